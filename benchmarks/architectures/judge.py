"""One architecture under "turbo", in exact arithmetic: with a `TurboCache`, its own cache and a static one, each beside
eager attention over the model's own cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from tests.exact_core import STANDINS
from turboattention import TurboConfig
from turboattention.errors import TurboError
from turboattention.integrations import transformers as integration

from . import tiny

PIECES = [40, 1, 1, 9, 1, 1]
LENGTH = sum(PIECES)
CLOSE = 1e-4
"""Relative error of the logits that float32 may leave."""
LARGEST = 30_000_000
CACHES: dict[str, Callable[[Any], Any]] = {
    "TurboCache": lambda config: integration.TurboCache(config, TurboConfig(bits=8, guard="off")),
    "DynamicCache": lambda config: DynamicCache(config=config),
    "StaticCache": lambda config: StaticCache(config=config, max_cache_len=LENGTH + 3),
}


WORSE = ["right", "refused", "foreign", "wrong"]


@dataclass
class Finding:
    """`verdict`: right, refused, foreign, wrong, or not built. `note`: the message or the reason. `error`: the largest
    relative error of the logits, of a model that ran."""

    verdict: str
    note: str = ""
    error: float | None = None


@dataclass
class Verdict:
    """What became of one architecture: how it was built, and by cache the worse finding of two ways to run; "INT8" is a
    `TurboCache` of 8 bits in its own arithmetic, "default sizes" whether one is made for the config as it is."""

    name: str
    built: Finding
    found: dict[str, Finding] = field(default_factory=dict)


class UnusableError(Exception):
    """The model cannot be compared."""


def judge(name: str) -> Verdict:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    integration.enable()
    try:
        model, turbo = _build(name), _turbo(name)
        turbo.load_state_dict(model.state_dict())
        wanted = {way.__name__: way(model, None) for way in (pieces, padded)}
        if not _past_matters(model):
            raise UnusableError("its logits do not depend on earlier tokens at these sizes")
    except Exception as error:  # any library's
        return Verdict(name, Finding("not built", _line(error)))
    verdict = Verdict(name, Finding("right"))
    with exact_core():
        for kind in CACHES:
            found = [_compare((model, turbo), kind, way, wanted[way.__name__]) for way in (pieces, padded)]
            verdict.found[kind] = max(found, key=lambda x: (WORSE.index(x.verdict), x.error or 0))
    verdict.found["INT8"] = _compare((model, turbo), "TurboCache", pieces, wanted["pieces"], bound=math.inf)
    verdict.found["default sizes"] = _at_default_sizes(name)
    return verdict


def _at_default_sizes(name: str) -> Finding:
    """Whether a `TurboCache` is made for the config as it is; tiny sizes hide wide heads."""
    try:
        integration.TurboCache(tiny.default(name))
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
    """As users load it, or, where transformers cannot build it with "turbo", switched later."""
    try:
        return _build(name, "turbo")
    except Exception:
        model = _build(name)
        model.set_attn_implementation("turbo")
        return model


def _build(name: str, attention: str = "eager") -> Any:
    config = tiny.config(name)
    with torch.device("meta"):
        size = sum(x.numel() for x in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise UnusableError(f"{size / 1e6:.0f} million parameters at these sizes")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than any initializer's: attention must matter to the logits
            parameter.data.normal_(0, 0.12, generator=generator)
    model.generation_config.eos_token_id = None
    return model


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def pieces(model: Any, cache: Any) -> Tensor:
    """Logits [2, L, V]: a prompt, single tokens, several at once, and single ones again."""
    ids, start, logits = _ids(2, LENGTH), 0, []
    for size in PIECES:
        out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise UnusableError("it has no past_key_values, the cache of attention layers")
        logits.append(out.logits)
        start += size
    return torch.cat(logits, 1)


@torch.no_grad()
def padded(model: Any, cache: Any) -> Tensor:
    """Logits [2, 6, V] that `generate` chose the likeliest tokens by, after prompts of which one is padded."""
    ids, mask = _ids(2, 40), torch.ones(2, 40, dtype=torch.int64)
    ids[1, :11], mask[1, :11] = 0, 0
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options = options if cache is None else {**options, "past_key_values": cache}
    return torch.stack(model.generate(ids, attention_mask=mask, **options).logits, 1)


@torch.no_grad()
def _past_matters(model: Any) -> bool:
    ids = _ids(2, LENGTH)
    before = model(input_ids=ids).logits[:, -1]
    ids[:, -5] = (ids[:, -5] + 1) % tiny.VOCAB
    return distance(model(input_ids=ids).logits[:, -1], before) > 20 * CLOSE


def _compare(
    models: tuple[Any, Any], kind: str, way: Callable[..., Tensor], wanted: Tensor, bound: float = CLOSE
) -> Finding:
    """A run over a cache of this kind beside the wanted logits."""
    try:
        error = distance(way(models[1], CACHES[kind](models[1].config)), wanted)
    except TurboError as refusal:
        return Finding("refused", _line(refusal))
    except Exception as fault:
        if kind != "TurboCache" and (own := _own_fault(models[0], kind, way)):
            return Finding("refused", f"eager attention fails over this cache, too: {own}")
        return Finding("foreign", _line(fault))
    if error < bound:
        return Finding("right", error=error)
    if kind == "StaticCache" and distance(way(models[0], CACHES[kind](models[0].config)), wanted) >= CLOSE:
        return Finding("refused", "eager attention is wrong over a static cache, too")
    return Finding("wrong", error=error)


def _own_fault(model: Any, kind: str, way: Callable[..., Tensor]) -> str | None:
    """What eager attention says to a cache of this kind."""
    try:
        way(model, CACHES[kind](model.config))
    except Exception as fault:
        return _line(fault)
    return None


def distance(result: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm; infinite where it is NaN."""
    error = float((result.double() - wanted.double()).norm() / wanted.double().norm())
    return float(f"{error:.1e}") if math.isfinite(error) else math.inf


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (TurboError, UnusableError)) else f"{type(error).__name__}: {text}"[:300]
