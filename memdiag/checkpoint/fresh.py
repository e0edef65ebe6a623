"""New causal language models: from a name or a Hugging Face config.json to weights that were just drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdiag.checkpoint.weights import read_json
from memdiag.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import nn

# no dropout: results then do not depend on how an update is cut into parts
_PLAIN = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_PLAIN |= {"bos_token_id": 0, "eos_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2-tiny": _PLAIN | {"vocab_size": 512, "n_positions": 128, "n_embd": 64, "n_layer": 4, "n_head": 4},
    "gpt2-small": _PLAIN | {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
}
MOST_WEIGHTS, MOST_LAYERS = 2**36, 10_000  # a config that asks for more is damaged


def read_config(name: str) -> dict[str, Any]:
    """The config of that name, or of that config.json file.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    if name in CONFIGS:
        return dict(CONFIGS[name])
    path = Path(name)
    if not os.path.exists(path):  # unlike Path's, False for a name that is too long
        if path.suffix == ".json":
            raise InputError(f"{path}: no such file; give a Hugging Face config.json, or {', '.join(CONFIGS)}")
        raise unknown("config", name, CONFIGS)
    return read_json(path / "config.json" if path.is_dir() else path)


def new_model(where: str, config: Mapping[str, Any], seed: int) -> nn.Module:
    """A causal language model with weights that depend on config and seed alone, float32, in training mode.

    Raises:
        InputError: the config makes no causal language model.
    """
    import torch

    from memdiag.checkpoint.guard import quiet, refusing
    from memdiag.checkpoint.huggingface import check_config, settings_of

    check_config(Path(where), config)
    with quiet(), refusing(f"{where}: makes no causal language model"), torch.random.fork_rng():
        from transformers import AutoModelForCausalLM

        settings = settings_of(Path(where), config)
        depth = getattr(settings.get_text_config(), "num_hidden_layers", None) or 0
        if depth > MOST_LAYERS:
            raise InputError(f"{where}: asks for {depth:.3g} layers; is the config damaged?")
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
        wanted = sum(p.numel() for p in skeleton.parameters())
        if wanted > MOST_WEIGHTS:
            raise InputError(f"{where}: asks for {wanted:.3g} weights; is the config damaged?")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if 4 * wanted > memory:  # else the system would end the process in the middle
            raise InputError(
                f"{where}: asks for {wanted:.3g} weights, {4 * wanted / 2**30:.0f} GiB; there are {memory / 2**30:.0f}"
            )
        torch.random.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False)
    return model.train()
