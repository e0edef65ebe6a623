"""memdiag: what a neural network memorized, where it sits, whether it matters, and whether a fix worked.

The functions here take the options of the command of the same name and return its report:

    >>> import memdiag
    >>> report = memdiag.entropy("runs/my-model", data="texts.jsonl")  # doctest: +SKIP
    >>> report.to_pandas()  # doctest: +SKIP

Importing memdiag does not import torch; calling one of its functions does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memdiag.errors import IncompleteError, InputError

if TYPE_CHECKING:
    from memdiag.check_report import Checked, check
    from memdiag.counterfactual_report import Counterfactual, counterfactual, merge_counterfactual
    from memdiag.diff_report import Diffed, diff
    from memdiag.entropy_report import entropy
    from memdiag.import_report import import_score
    from memdiag.page_report import Page, report
    from memdiag.prune_report import Pruned, prune_memorizers
    from memdiag.regulariser import Gapt
    from memdiag.reproduce_report import Reproduced, ReproducedEffects, reproduce
    from memdiag.score_report import score
    from memdiag.second_split_report import second_split
    from memdiag.tables import Report, read
    from memdiag.train_gapt_report import TrainedGapt, train_gapt
    from memdiag.train_report import Trained, train
    from memdiag.trajectory_recorder import TrajectoryRecorder

__version__ = "0.1.0"
__all__ = [
    "Checked",
    "Counterfactual",
    "Diffed",
    "Gapt",
    "IncompleteError",
    "InputError",
    "Page",
    "Pruned",
    "Report",
    "Reproduced",
    "ReproducedEffects",
    "Trained",
    "TrainedGapt",
    "TrajectoryRecorder",
    "__version__",
    "check",
    "counterfactual",
    "diff",
    "entropy",
    "import_score",
    "merge_counterfactual",
    "prune_memorizers",
    "read",
    "report",
    "reproduce",
    "score",
    "second_split",
    "train",
    "train_gapt",
]

_HOME = {
    "Checked": "memdiag.check_report",
    "check": "memdiag.check_report",
    "Counterfactual": "memdiag.counterfactual_report",
    "counterfactual": "memdiag.counterfactual_report",
    "merge_counterfactual": "memdiag.counterfactual_report",
    "Gapt": "memdiag.regulariser",
    "Diffed": "memdiag.diff_report",
    "diff": "memdiag.diff_report",
    "entropy": "memdiag.entropy_report",
    "import_score": "memdiag.import_report",
    "Page": "memdiag.page_report",
    "report": "memdiag.page_report",
    "prune_memorizers": "memdiag.prune_report",
    "Pruned": "memdiag.prune_report",
    "Report": "memdiag.tables",
    "read": "memdiag.tables",
    "reproduce": "memdiag.reproduce_report",
    "Reproduced": "memdiag.reproduce_report",
    "ReproducedEffects": "memdiag.reproduce_report",
    "score": "memdiag.score_report",
    "second_split": "memdiag.second_split_report",
    "train": "memdiag.train_report",
    "Trained": "memdiag.train_report",
    "TrajectoryRecorder": "memdiag.trajectory_recorder",
    "train_gapt": "memdiag.train_gapt_report",
    "TrainedGapt": "memdiag.train_gapt_report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'memdiag' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
