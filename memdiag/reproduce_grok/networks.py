"""The settings that are trained: a network for every one that a claim is about, and one for every cell of the map."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memdiag.grokking import Training
from memdiag.prune_modular import Setting

MAP_STEPS = {True: 700, False: 2000}  # with and without decay
ALPHAS, XIS, DECAYS = (0.2, 0.35, 0.5, 0.65, 0.8), (0.7, 0.55, 0.4, 0.25, 0.1), (0.0, 5.0, 15.0)
SMOKE_ALPHAS, SMOKE_XIS, SMOKE_DECAYS = (0.35, 0.5, 0.65), (0.3, 0.2, 0.1), (0.0, 10.0)


@dataclass(frozen=True)
class Network:
    """A setting, of which one network is trained for each seed, and what is looked at beyond accuracy and IPR."""

    name: str
    setting: Setting
    looks: tuple[str, ...] = ()  # of looks.LOOKS
    model: str = "mlp"
    in_map: bool = False


def networks(preset: str, dtype: str) -> list[Network]:
    """Every network of a preset, those of the map last."""
    found = _paper() if preset == "paper" else _smoke()
    return [_in_dtype(network, dtype) for network in found]


def _in_dtype(network: Network, dtype: str) -> Network:
    """With bfloat16 products, where the step is in closed form; the others stay in float32."""
    training = network.setting.training
    if network.model != "mlp" or training.norm != "none" or training.train_batch_size is not None:
        return network
    setting = dataclasses.replace(network.setting, training=dataclasses.replace(training, dtype=dtype))
    return dataclasses.replace(network, setting=setting)


def _network(
    name: str,
    *looks: str,
    operation: str = "addition",
    p: int = 97,
    alpha: float = 0.5,
    xi: float = 0.35,
    decay: float = 0.0,
    steps: int = 1000,
    model: str = "mlp",
    in_map: bool = False,
    **training: Any,
) -> Network:
    settled = Training(weight_decay=decay, steps=steps, **training)
    setting = Setting(operation, p, alpha, xi, "uniform", None, settled)
    return Network(name, setting, looks, model, in_map)


def _paper() -> list[Network]:
    batches: dict[str, Any] = {
        "alpha": 0.65,
        "xi": 0.2,
        "steps": 2000,
        "lr": 0.005,
        "train_batch_size": 64,
        "eval_every": 50,
    }
    return [
        _network("clean", xi=0.0, decay=5.0, steps=100, eval_every=10),
        _network("coexistence", "pruning", "random", "attribution", "filtration", eval_every=10),
        _network("partial", "attribution", decay=5.0, steps=600, eval_every=10),
        _network("inverted", decay=15.0, steps=600, eval_every=10),
        _network("forgetting", decay=20.0, steps=5000, eval_every=50),
        _network("noise_30", "pruning", "random", xi=0.3),
        _network("noise_20", "attribution", xi=0.2),
        _network("noise_10", "pruning", "attribution", xi=0.1),
        _network("noise_10_decay_5", xi=0.1, decay=5.0, steps=600),
        _network("noise_10_decay_15", xi=0.1, decay=15.0, steps=600),
        _network("product", operation="multiplication"),
        _network("product_inverted", "natural_order", operation="multiplication", decay=15.0, steps=600),
        _network("memorizing", "filtration", p=67, xi=0.3),
        _network("no_norm", **batches),
        _network("batch_norm", "gain", norm="batch", **batches),
        _network("layer_norm", "gain", norm="layer", **batches),
        _network("batch_norm_long", "gain", norm="batch", **{**batches, "steps": 8000, "eval_every": 200}),
        *(_network(f"dropout_{n}", dropout=n / 100, steps=1500, eval_every=50) for n in (30, 60, 90)),
        *(
            _network(f"relu_{n}", *looks, activation="relu", decay=float(n), steps=1500, eval_every=50)
            for n, looks in ((0, []), (1, []), (5, ["attribution"]), (10, []))
        ),
        *(
            _network(
                f"transformer_{n}",
                p=59,
                alpha=0.8,
                xi=0.2,
                decay=float(n),
                steps=2000,
                model="transformer",
                width=128,
                activation="relu",
                lr=0.001,
                eval_every=200,
            )
            for n in (0, 2, 10)
        ),
        *_map_of(97, 500, ALPHAS, XIS, DECAYS),
    ]


def _smoke() -> list[Network]:
    small: dict[str, Any] = {"p": 59, "width": 256}
    return [
        _network("coexistence", "pruning", "random", "attribution", xi=0.2, eval_every=10, **small),
        _network("partial", xi=0.2, decay=5.0, steps=800, **small),
        _network("inverted", xi=0.2, decay=10.0, steps=800, eval_every=10, **small),
        _network("noise_10_decay_10", xi=0.1, decay=10.0, steps=800, **small),
        _network("memorizing", "filtration", xi=0.3, **small),
        _network(
            "product_inverted", "natural_order", operation="multiplication", xi=0.2, decay=10.0, steps=800, **small
        ),
        *_map_of(59, 256, SMOKE_ALPHAS, SMOKE_XIS, SMOKE_DECAYS, scale=0.4),
    ]


def _map_of(
    p: int, width: int, alphas: Sequence[float], xis: Sequence[float], decays: Sequence[float], *, scale: float = 1.0
) -> list[Network]:
    return [
        _network(
            f"map_xi{xi:g}_alpha{alpha:g}_wd{decay:g}",
            p=p,
            width=width,
            alpha=alpha,
            xi=xi,
            decay=decay,
            steps=round(MAP_STEPS[decay > 0] * scale),
            eval_every=50,
            in_map=True,
        )
        for decay in decays
        for xi in xis
        for alpha in alphas
    ]
