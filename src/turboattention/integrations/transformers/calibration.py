"""Calibration of a model: a text goes through it, and what its attention sees is measured layer by layer."""

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
"""Tokens of a text that go through the model at once, forward and back."""


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

    Each piece of the text goes forward and back once, so that an error is judged by what the model makes of it
    (`LayerStatistics`): the activations of a whole piece are in memory at that time, more than inference needs.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        input_ids: the text's tokens; they are cut into pieces of `length`, and a shorter last one is left out if it is
            too short to measure.
        budget, strategy, means: as in `Calibration.choose`.
        config: how caches will store; `TurboConfig()` by default.
        progress: called with the pieces done and to do.

    Raises:
        InputError: the text is too short. NonFiniteError: the model gives NaN or infinity, with the layer.
        UnsupportedError: models that `TurboCache` refuses, parts of models (tensor parallelism), or models without
            an attention function to watch.
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
    windows = layer_windows(model.config)
    meters = [LayerMeter(config or TurboConfig()) for _ in windows]
    least = meters[0].least_tokens
    if length < least:
        raise InputError(f"length: expected at least {least} tokens, got {length}")
    pieces = [input_ids[at : at + length] for at in range(0, len(input_ids), length)]
    pieces = [list(piece) for piece in pieces if len(piece) >= least]
    if not pieces:
        raise InputError(f"text: expected at least {least} tokens, got {len(input_ids)}")
    generator = torch.Generator().manual_seed(0)
    with _frozen(model), recorded_attention(model) as calls:
        for done, piece in enumerate(pieces):
            calls.clear()
            ids = torch.tensor([piece], device=model.device)
            with torch.enable_grad():
                logs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), -1)
                # Tokens drawn from the model, not the text's: that is what makes it a divergence.
                drawn = torch.multinomial(
                    logs.detach().exp().nan_to_num(0.0).clamp(min=1e-30).cpu(), 1, generator=generator
                )
                logs.gather(-1, drawn.to(logs.device)).sum().backward()
            for index, (meter, window) in enumerate(zip(meters, windows, strict=True)):
                _measure(meter, calls, index, window)
            if progress:
                progress(done + 1, len(pieces))
    return tuple(meter.statistics() for meter in meters)


def _measure(meter: LayerMeter, calls: dict[int, RecordedCall], index: int, window: int | None) -> None:
    call = calls.get(index)
    if call is None or call.out.grad is None:
        raise UnsupportedError(f"model: no attention function of layer {index} was called that could be watched")
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
    """Parameters collect no gradients inside."""
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
