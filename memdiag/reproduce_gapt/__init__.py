"""The three experiments of Yu, "Memorization-Compression Cycles Improve Generalization" (arXiv:2505.08727).

Each is a module with

    ARMS                    the ways to train, those that need another one behind it
    effects(preset)         what the paper says changes
    steps(preset, arm)      updates of one run, for progress
    settings(preset)        what decides the figures besides arm and seed, as plain values
    run(arm, seed, preset, given, advance, ...) -> measures     of one run; `given` are the measures of what it needs
"""

from __future__ import annotations

import importlib
from types import ModuleType

from memdiag.reproduce_report import GAPT


def experiment(name: str) -> ModuleType:
    """The module of gapt-lm, gapt-multiplication or gapt-conflict."""
    return importlib.import_module(f"{__name__}.{GAPT[name]}")
