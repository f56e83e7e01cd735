"""The error of each head's attention output over a method's cache, layer by layer.

The model runs twice over the same pieces of text. In the second run, over the method's cache, every decoder layer gets
the input that it had in the first run, so that errors do not propagate from layer to layer. The input of the output
projection, which is the concatenated outputs of the heads, is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from ..baselines import METHODS, CacheMethod
from ..subject import PIECE, Session

PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
"""Names of the output projection in transformers' models."""


def head_errors(
    model: Any, opened: Callable[[CacheMethod], Session], method: CacheMethod, ids: Sequence[int], skip: int
) -> list[list[float]]:
    """Relative errors (Frobenius norm over positions from `skip` on) by layer and query head.

    Raises:
        UnsupportedError: the layers or output projections of the model are not found.
    """
    layers, projections = _parts(model)
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    own, other = opened(METHODS["fp16"]), opened(method)
    wrong, whole = (torch.zeros(len(layers), heads, dtype=torch.float64) for _ in range(2))
    for at in range(0, len(ids), PIECE):
        piece = ids[at : at + PIECE]
        with _recorded(layers) as inputs, _recorded(projections) as wanted:
            own.feed(piece)
        with _replaced(layers, inputs), _recorded(projections) as got:
            other.feed(piece)
        if at < skip:
            continue
        for index, (x, y) in enumerate(zip(got, wanted, strict=True)):
            wrong[index] += _by_head(x - y, heads)
            whole[index] += _by_head(y, heads)
    return (wrong / whole).sqrt().tolist()


def _parts(model: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    layers = list(getattr(model.get_decoder(), "layers", []))
    projections = [_projection(layer) for layer in layers]
    if not layers or None in projections:
        raise UnsupportedError(f"heads: expected decoder layers with an o_proj, got {type(model).__name__} without")
    return layers, projections  # type: ignore[return-value]


def _projection(layer: nn.Module) -> nn.Module | None:
    attention = getattr(layer, "self_attn", None)
    found = [getattr(attention, name) for name in PROJECTIONS if isinstance(getattr(attention, name, None), nn.Module)]
    return found[0] if found else None


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Sum of squares float64 [heads] of [..., heads * D]."""
    return x.detach().double().reshape(-1, heads, x.shape[-1] // heads).square().sum((0, 2)).cpu()


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the first argument of each module's next call, in order."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    with _hooked(modules, [keep] * len(modules)):
        yield seen


@contextmanager
def _replaced(modules: Sequence[nn.Module], values: Sequence[Tensor]) -> Iterator[None]:
    """Replace the first argument of each module's calls by its value."""

    def give(value: Tensor) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return ((value, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": value})

        return hook

    with _hooked(modules, [give(value) for value in values]):
        yield


@contextmanager
def _hooked(modules: Sequence[nn.Module], hooks: Sequence[Callable]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in zip(modules, hooks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
