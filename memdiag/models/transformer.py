"""A transformer of one block that classifies a pair of tokens, as Doshi et al. train it on modular arithmetic.

Token and position embeddings, one block of attention (without a causal mask) and an MLP of ReLUs, and the read-out at
the last position. It has no norms and no biases. Attention logits are divided by the width of a head, and the output
logits multiplied by one over the width, as maximal update parametrization asks. "To grok or not to grok"
(arXiv:2310.13061), §4 and its code.

Axes: b example, t position, s position attended to, h head, c width of a head, d model width, k unit of the MLP,
m token, q class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

MLP_RATIO = 4  # units of the MLP per dimension of the model
MAX_SIZE = 2**20  # far above any sensible one; a damaged config must not ask for more than there can be


@dataclass(frozen=True)
class TransformerConfig:
    """Settings of a Transformer; the field names are the keys of its config.json."""

    tokens: int  # different ones
    classes: int
    positions: int = 2
    width: int = 128
    heads: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 0 < value <= MAX_SIZE:
                raise ValueError(f"{field.name} must be a whole number from 1 to {MAX_SIZE}, got {str(value)[:40]}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")

    @property
    def num_hidden_layers(self) -> int:
        """Blocks; this and the next by the names that transformers' configs have."""
        return 1

    @property
    def max_position_embeddings(self) -> int:
        """How long an example may be."""
        return self.positions

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """The settings found in a parsed config.json. Raises ValueError where they make no transformer."""
        missing = [name for name in ("tokens", "classes") if name not in config]
        if missing:
            raise ValueError(f"its config must hold {' and '.join(missing)}")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def to_json(self) -> dict[str, Any]:
        """What config.json holds, but for the task and the dtype."""
        return {"model_type": "memdiag-transformer", **asdict(self)}


class Block(nn.Module):
    """x + attention(x), and to that + MLP of it.

    The activation is a module of its own, so that a hook on `act` sees the units of the MLP.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.mlp_in = nn.Linear(d, MLP_RATIO * d, bias=False)
        self.act = nn.ReLU()
        self.mlp_out = nn.Linear(MLP_RATIO * d, d, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The residual stream (b, t, d) after the block; mask (b, t) is true where there is a token."""
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.query, self.key, self.value))
        scores = torch.einsum("bthc,bshc->bhts", q, k) / q.shape[-1]
        attention = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
        x = x + self.output(torch.einsum("bhts,bshc->bthc", attention, v).flatten(2))
        out: Tensor = x + self.mlp_out(self.act(self.mlp_in(x)))
        return out


class Transformer(nn.Module):
    """Embeddings, one block, and a read-out at the last position."""

    main_input_name = "input_ids"

    def __init__(self, config: TransformerConfig, generator: torch.Generator | None = None) -> None:
        """Draw weights: embeddings from N(0, 1), matrices from N(0, 1 / fan-in), from a generator of seed 0 if none."""
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # layers draw from the global generator when they are made
            self.token = nn.Embedding(config.tokens, config.width)
            self.position = nn.Embedding(config.positions, config.width)
            self.blocks = nn.ModuleList([Block(config)])
            self.unembed = nn.Linear(config.width, config.classes, bias=False)
        generator = generator or torch.Generator().manual_seed(0)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.normal_(generator=generator)
                elif isinstance(module, nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5, generator=generator)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, by transformers' name."""
        return self.token

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (b, q) of token ids (b, t), t at most the config's positions.

        Args:
            attention_mask: (b, t), 0 or false for padding, which comes after the tokens.
        """
        t = input_ids.shape[1]
        if t > self.config.positions:
            raise ValueError(f"takes {self.config.positions} tokens at most, got {t}")
        mask = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        x = self.token(input_ids) + self.position.weight[:t]  # (b, t, d)
        for block in self.blocks:
            x = block(x, mask)
        last = x[torch.arange(len(x), device=x.device), mask.sum(1) - 1]  # (b, d)
        logits: Tensor = self.unembed(last) / self.config.width
        return logits


@torch.no_grad()
def effective_curves(model: Transformer) -> tuple[Tensor, Tensor, Tensor]:
    """What each unit of the MLP has to do with each token: curves over the tokens and the classes.

    With E the token embedding and attention spread evenly over the n positions, the pre-activation of the unit at the
    last position is the sum of u over the other tokens, v of the last one, and what the positions add:

        u = W_in W_O W_V Eᵀ / n        v = u + W_in Eᵀ        w = (W_U W_out)ᵀ

    v has the residual stream on top of the way through attention. Periodicity is found in these rather than in the
    raw embedding, whose dimensions are shared between units.

    Returns:
        u (k, m), v (k, m) and w (k, q), without the output's 1 / d.
    """
    block, embedding = model.blocks[0], model.token.weight
    assert isinstance(block, Block)
    attended = block.output.weight @ block.value.weight @ embedding.T / model.config.positions  # (d, m)
    u = block.mlp_in.weight @ attended
    v = u + block.mlp_in.weight @ embedding.T
    return u, v, (model.unembed.weight @ block.mlp_out.weight).T
