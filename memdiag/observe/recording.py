"""Hooks that stay on a model while it is trained: hidden states in their graph, and what a pass was given and gave.

Axes: b example, t position, d dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from memdiag.observe import Layer


class Recorder:
    """Keeps the hidden states of a forward pass in their graph, for a loss that is made of them.

    Only passes with gradients are recorded, and a new one replaces the last. A module that is called again (shared
    weights) is recorded at its first call.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        """Watch the model until `close`."""
        self._names = [layer.name for layer in layers]
        self._states: list[Tensor | None] = [None] * len(layers)
        self._handles = [model.register_forward_pre_hook(self._forget)]
        for i, layer in enumerate(layers):
            if layer.at == "input":
                self._handles.append(layer.module.register_forward_pre_hook(self._before(i), with_kwargs=True))
            else:
                self._handles.append(layer.module.register_forward_hook(self._after(i)))

    def take(self) -> list[Tensor]:
        """The hidden states of the last pass, (b, t, d) each, in the order of the layers; they are let go of.

        Raises:
            ValueError: there was no forward pass with gradients, or it did not reach a layer.
        """
        states = [state for state in self._states if state is not None]
        if len(states) != len(self._states):
            missing = [name for name, state in zip(self._names, self._states) if state is None]
            raise ValueError(f"no forward pass with gradients since the last one was used (layer {missing[0]!r})")
        self._states = [None] * len(self._states)
        return states

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._states = [None] * len(self._states)

    def _forget(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._states = [None] * len(self._states)

    def _keep(self, position: int, value: Any) -> None:
        if torch.is_grad_enabled() and self._states[position] is None:
            self._states[position] = value[0] if isinstance(value, tuple | list) else value

    def _before(self, position: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(position, args[0] if args else kwargs.get("hidden_states"))

        return hook

    def _after(self, position: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._keep(position, output)

        return hook


class Tap:
    """Takes a keyword argument away before a model sees it, and hands it on with what a training pass gave."""

    def __init__(self, model: nn.Module, keyword: str, take: Callable[[Any, dict[str, Any], Any], None]) -> None:
        """Watch the model until `close`.

        Args:
            keyword: the argument; passes without it go on as they are.
            take: given the argument (None: there was none), the other keyword arguments and the output of every pass
                in train mode with gradients.
        """
        self._keyword, self._take = keyword, take
        self._value: Any = None
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._value = kwargs.get(self._keyword)
        return args, {name: value for name, value in kwargs.items() if name != self._keyword}

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        value, self._value = self._value, None
        if module.training and torch.is_grad_enabled():
            self._take(value, kwargs, output)
