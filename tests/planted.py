"""A network whose neurons are known: analytic ones that add modulo p, and one look-up for every corrupted pair.

Nothing is trained. The analytic solution is that of Gromov (arXiv:2301.02679), whose constraint is that the read-out's
phase is the sum of the input phases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from memdiag.models.mlp import MLP, MlpConfig
from memdiag.modular import Pairs, make_pairs


def analytic(p: int, width: int, seed: int = 0, *, exponent: float = 1 / 3) -> tuple[torch.Tensor, ...]:
    """U, V and W, (k, p) each: A cos(ω σ_k m + phase) with A = (2/N)^exponent."""
    rng = np.random.default_rng(seed)
    sigma = torch.from_numpy(rng.permutation(width) % p)[:, None].double()
    a, b = (torch.from_numpy(math.pi - 2 * math.pi * rng.random(width))[:, None] for _ in range(2))
    at = 2 * math.pi / p * sigma * torch.arange(p).double()
    amplitude = (2 / width) ** exponent
    return tuple((amplitude * torch.cos(x)).float() for x in (at + a, at + b, -at - a - b))


@dataclass(frozen=True, eq=False)
class Planted:
    """The network, its pairs, and which neurons are look-ups (the last ones)."""

    model: MLP
    pairs: Pairs
    is_lookup: np.ndarray


def planted(p: int = 59, width: int = 590, *, corruption: float = 0.05, c: float = 1.2, seed: int = 0) -> Planted:
    """Look-ups have U = onehot(m), V = onehot(n), W = (c/4)(onehot(label) − onehot(truth)): 4 c/4 on their own pair."""
    pairs = make_pairs("addition", p, corruption=corruption, law="wrong", seed=seed)
    u, v, w = analytic(p, width, seed)
    at = np.flatnonzero(pairs.corrupted)
    eye = torch.eye(p)
    u = torch.cat([u, eye[pairs.operands[at, 0]]])
    v = torch.cat([v, eye[pairs.operands[at, 1]]])
    w = torch.cat([w, c / 4 * (eye[pairs.labels[at]] - eye[pairs.truth[at]])])
    model = MLP(MlpConfig((2 * p, len(u), p), "square", False)).eval().requires_grad_(False)
    model.layers.linear_1.weight.copy_(torch.cat([u, v], dim=1))
    model.layers.linear_2.weight.copy_(w.T)
    return Planted(model, pairs, np.arange(len(u)) >= width)
