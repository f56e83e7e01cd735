"""One architecture with "turbo", in exact arithmetic: with a `TurboCache`, its own cache and a static one, each
compared with eager attention over the model's own cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.exact_core import STANDINS
from turboattention import TurboConfig
from turboattention.errors import TurboError
from turboattention.integrations import transformers as integration

from . import tiny
from .verdict import WORSE, Finding, Verdict

PIECES = [40, 1, 1, 9, 1, 1]
LENGTH = sum(PIECES)
CLOSE = 1e-4
"""Largest relative error of the logits that float32 rounding may cause."""
LARGEST = 30_000_000
CACHES: dict[str, Callable[[Any], Any]] = {
    "TurboCache": lambda config: integration.TurboCache(config, TurboConfig(bits=8, guard="off")),
    "DynamicCache": lambda config: DynamicCache(config=config),
    "StaticCache": lambda config: StaticCache(config=config, max_cache_len=LENGTH + 3),
}

Way = Callable[[Any, Any], Tensor]
"""A way to run a model over a cache, which returns its logits."""


class UnusableError(Exception):
    """The model cannot be compared."""


def judge(name: str) -> Verdict:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    integration.enable()
    try:
        model, turbo = _build(name), _turbo(name)
        turbo.load_state_dict(model.state_dict())
        wanted, left_out = _wanted(model)
        if not _past_matters(model):
            raise UnusableError("its logits do not depend on earlier tokens at these sizes")
    except Exception as error:  # any library's
        return Verdict(name, Finding("not built", _line(error)), _refused(name))
    verdict = Verdict(name, Finding("right", left_out))
    with exact_core():
        for kind in CACHES:
            found = [_compare((model, turbo), kind, way, logits) for way, logits in wanted.items()]
            verdict.found[kind] = max(found, key=lambda x: (WORSE.index(x.verdict), x.error or 0))
    way, logits = next(iter(wanted.items()))
    verdict.found["INT8"] = _compare((model, turbo), "TurboCache", way, logits, bound=math.inf)
    if pieces in wanted:
        verdict.found["at once"] = _at_once(model, wanted[pieces])
    verdict.found["default sizes"] = _made(tiny.default(name))  # tiny ones hide wide heads
    return verdict


def _refused(name: str) -> dict[str, Finding]:
    """The error that a `TurboCache` raises for the config of a model that cannot be compared, if any."""
    for config in (tiny.config, tiny.default):
        with contextlib.suppress(Exception):  # transformers refuses the sizes
            made = _made(config(name))
            return {} if made.verdict == "right" else {"TurboCache": made}
    return {}


def _made(config: Any) -> Finding:
    """Whether a `TurboCache` accepts a config."""
    try:
        integration.TurboCache(config)
    except TurboError as refusal:
        return Finding("refused", _line(refusal))
    except Exception as fault:
        return Finding("foreign", _line(fault))
    return Finding("right")


@contextmanager
def exact_core() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, standin in STANDINS.items():
            stack.enter_context(patch(f"turboattention.integrations.transformers.{name}", standin))
        yield


def _turbo(name: str) -> Any:
    """The model as users load it; if transformers cannot build it with "turbo", it is switched later."""
    try:
        return _build(name, "turbo")
    except Exception:
        model = _build(name)
        model.set_attn_implementation("turbo")
        return model


def _build(name: str, attention: str = "eager") -> Any:
    with torch.device("meta"):
        size = sum(x.numel() for x in tiny.model(name).parameters())
    if size > LARGEST:
        raise UnusableError(f"{size / 1e6:.0f} million parameters at these sizes")
    torch.manual_seed(0)
    model = tiny.model(name, attention).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than any initializer's: attention must matter to the logits
            parameter.data.normal_(0, 0.12, generator=generator)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, decoder_start_token_id=1)
    return model


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def pieces(model: Any, cache: Any) -> Tensor:
    """Logits [2, L, V]: a prompt, single tokens, several at once, and single ones again."""
    return _fed(model, cache, PIECES)


def singly(model: Any, cache: Any) -> Tensor:
    """Logits [2, L, V] of a model that accepts only single tokens."""
    return _fed(model, cache, [1] * (tiny.WINDOW // 2))


@torch.no_grad()
def _fed(model: Any, cache: Any, sizes: list[int]) -> Tensor:
    ids, start, logits = _ids(2, LENGTH), 0, []
    numbered = model.config.model_type in tiny.NUMBERED_BY_THE_CALLER
    for size in sizes:
        positions = {"position_ids": torch.arange(start, start + size).expand(2, -1)} if numbered else {}
        out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True, **positions)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise UnusableError("it has no past_key_values, the cache of attention layers")
        logits.append(out.logits)
        start += size
    return torch.cat(logits, 1)


@torch.no_grad()
def padded(model: Any, cache: Any) -> Tensor:
    """Logits [2, 6, V] of greedy `generate` after two prompts, one of them padded."""
    ids, mask = _ids(2, 40), torch.ones(2, 40, dtype=torch.int64)
    ids[1, :11], mask[1, :11] = 0, 0
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options = options if cache is None else {**options, "past_key_values": cache}
    return torch.stack(model.generate(ids, attention_mask=mask, **options).logits, 1)


def _wanted(model: Any) -> tuple[dict[Way, Tensor], str]:
    """The logits of eager attention over the model's own cache for each way to run, or the error of transformers if the
    model cannot be run in this way."""
    wanted, left_out = {}, ""
    for way in (pieces, padded):
        try:
            wanted[way] = way(model, None)
        except UnusableError:
            raise
        except Exception as fault:  # any library's
            left_out = _line(fault)
    return wanted or {singly: singly(model, None)}, left_out


@torch.no_grad()
def _past_matters(model: Any) -> bool:
    ids = _ids(2, LENGTH)
    before = model(input_ids=ids, use_cache=False).logits[:, -1]
    ids[:, -5] = (ids[:, -5] + 1) % tiny.VOCAB
    return distance(model(input_ids=ids, use_cache=False).logits[:, -1], before) > 20 * CLOSE


@torch.no_grad()
def _at_once(model: Any, wanted: Tensor) -> Finding:
    """Whether transformers itself gives the logits of `pieces` in one forward pass without a cache."""
    error = distance(model(input_ids=_ids(2, LENGTH), use_cache=False).logits, wanted)
    return Finding("right" if error < CLOSE else "differs", error=error)


def _compare(models: tuple[Any, Any], kind: str, way: Way, wanted: Tensor, bound: float = CLOSE) -> Finding:
    """Compare a run over a cache of this kind with the expected logits."""
    eager, turbo = models
    try:
        cache = CACHES[kind](turbo.config)
        result = way(turbo, cache)
    except TurboError as refusal:
        return Finding("refused", _line(refusal))
    except Exception as fault:
        if kind != "TurboCache" and (own := _own_fault(eager, kind, way)):
            return Finding("refused", f"eager attention fails over this cache, too: {own}")
        return Finding("foreign", _line(fault))
    if kind == "TurboCache" and not cache.get_seq_length():
        return Finding("foreign", "the model leaves its TurboCache empty")
    error = distance(result, wanted)
    if error < bound:
        return Finding("right", error=error)
    if kind != "TurboCache" and not _own_fault(eager, kind, way):
        own = way(eager, CACHES[kind](eager.config))
        if distance(own, wanted) >= CLOSE and distance(result, own) < CLOSE:
            return Finding("as eager", "wrong in transformers, too: eager attention gives the same logits", error)
    return Finding("wrong", error=error)


def _own_fault(model: Any, kind: str, way: Way) -> str | None:
    """The error that eager attention raises over a cache of this kind."""
    try:
        way(model, CACHES[kind](model.config))
    except Exception as fault:
        return _line(fault)
    return None


def distance(result: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm; infinite if it is NaN."""
    error = float((result.double() - wanted.double()).norm() / wanted.double().norm())
    return float(f"{error:.1e}") if math.isfinite(error) else math.inf


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (TurboError, UnusableError)) else f"{type(error).__name__}: {text}"[:300]
