"""Calibration of a model: runs a text through it and measures the attention of every layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from ... import __version__
from ...calibration import Calibration, LayerMeter, LayerStatistics, Provenance, Strategy
from ...config import TurboConfig
from ...errors import InputError, NonFiniteError, UnsupportedError
from ..model_shape import ModelShape
from .model import layer_windows
from .parallel import TensorParallel
from .recording import RecordedCall, recorded_attention

TEXT_LENGTH = 1024
"""Tokens per forward and backward pass."""


def calibrate(
    model: Any,
    input_ids: Sequence[int],
    *,
    budget: float = 3.0,
    strategy: Strategy = "error",
    means: bool = False,
    length: int = TEXT_LENGTH,
    config: TurboConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure `model` on a text, and choose widths.

    Each piece of the text takes one forward and one backward pass, because the cost of an error is derived from
    gradients (`LayerStatistics`). The activations of a piece are held in memory, which is more than inference needs.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        input_ids: the tokens of the text, split into pieces of `length`; a last piece that is too short is skipped.
        budget, strategy, means: as in `Calibration.choose`.
        config: the configuration of the caches; `TurboConfig()` by default.
        progress: called with the number of finished pieces and of all pieces.

    Raises:
        InputError: the text is too short. NonFiniteError: NaN or infinity in a layer, which the message names.
        UnsupportedError: models that `TurboCache` does not support, tensor-parallel models, or models whose attention
            does not go through transformers' attention interface.
        ConfigError: budget or strategy out of range.
    """
    layers = collect(model, input_ids, length=length, config=config, progress=progress)
    ids = torch.tensor(list(input_ids), dtype=torch.int64)
    provenance = Provenance(
        model=str(getattr(model, "name_or_path", "") or type(model).__name__),
        model_hash=_model_hash(model),
        shape=asdict(ModelShape.of(model.config)),
        text_hash=hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        tokens=len(ids),
        length=length,
        version=__version__,
    )
    return Calibration.choose(layers, provenance, budget, strategy, means)


def collect(
    model: Any,
    input_ids: Sequence[int],
    *,
    length: int = TEXT_LENGTH,
    config: TurboConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LayerStatistics, ...]:
    """The statistics of `calibrate`, one entry for each layer of the model's cache."""
    parallel = TensorParallel.of(model.config)
    if parallel.size > 1:
        raise UnsupportedError(
            f"model: expected a whole model, got {parallel}: calibrate in a single process, and give every rank's "
            "TurboCache the calibration"
        )
    pieces = text_pieces(model.config, input_ids, length, config)
    windows = layer_windows(model.config)
    meters = [LayerMeter(config or TurboConfig()) for _ in windows]
    generator = torch.Generator().manual_seed(0)
    with _frozen(model), recorded_attention(model) as calls:
        for done, piece in enumerate(pieces):
            calls.clear()
            ids = torch.tensor([piece], device=model.device)
            with torch.enable_grad():
                logs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), -1)
                # Sampled from the model, not taken from the text: the expectation is then a Fisher information.
                drawn = torch.multinomial(
                    logs.detach().exp().nan_to_num(0.0).clamp(min=1e-30).cpu(), 1, generator=generator
                )
                logs.gather(-1, drawn.to(logs.device)).sum().backward()
            for index, (meter, window) in enumerate(zip(meters, windows, strict=True)):
                _measure(meter, calls, index, window)
            if progress:
                progress(done + 1, len(pieces))
    return tuple(meter.statistics() for meter in meters)


def text_pieces(
    model_config: Any, input_ids: Sequence[int], length: int = TEXT_LENGTH, config: TurboConfig | None = None
) -> list[list[int]]:
    """The pieces of a text with which `calibrate` measures a model, before its weights are needed.

    Raises:
        InputError: `length` or the text is too short. UnsupportedError: models that cannot be calibrated.
    """
    layer_windows(model_config)
    least = LayerMeter(config or TurboConfig()).least_tokens
    if length < least:
        raise InputError(f"length: expected at least {least} tokens, got {length}")
    pieces = [input_ids[at : at + length] for at in range(0, len(input_ids), length)]
    pieces = [list(piece) for piece in pieces if len(piece) >= least]
    if not pieces:
        raise InputError(f"text: expected at least {least} tokens, got {len(input_ids)}")
    return pieces


def _measure(meter: LayerMeter, calls: dict[int, RecordedCall], index: int, window: int | None) -> None:
    call = calls.get(index)
    if call is None or call.out.grad is None:
        raise UnsupportedError(f"model: layer {index} does not call transformers' attention interface")
    try:
        meter.add(
            call.q,
            call.k,
            call.v,
            call.out.grad.transpose(1, 2),
            scale=call.options.get("scaling"),
            softcap=call.options.get("softcap"),
            window_size=call.options.get("sliding_window") or window,
            sinks=call.options.get("s_aux"),
        )
    except NonFiniteError as error:
        raise NonFiniteError(f"layer {index}, {error}") from error


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Disable the gradients of parameters inside the `with` block."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)


def _model_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + head)
    return digest.hexdigest()
