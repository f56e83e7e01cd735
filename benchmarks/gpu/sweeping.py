"""Launches of decode and prefill tried one after the other, and the best of them set for what runs after.

A launch is timed in a CUDA graph of a whole attention call (queries quantized, splits combined), as it is used.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple
from typing import Any

import torch
from architecture import changed
from paging import piece
from plan import Plan
from problem import device, exact, filled_cache, normals
from timing import WRONG, graphed, on_gpu, once, relative_error, said

import turboattention as ta
from turboattention.impl.triton.host_lengths import Fills
from turboattention.impl.triton.steps import steps_of
from turboattention.kernels.triton import configs
from turboattention.kernels.triton.configs import Launch
from turboattention.params import AttentionParams

Row = dict[str, Any]
DECODE = tuple(Launch(*each) for each in itertools.product((4, 8), (1, 2), (2, 3, 4)))
PREFILL = tuple(Launch(*each) for each in ((64, 4, 3, 168), (64, 4, 3), (64, 4, 2, 168), (64, 4, 4, 168)))
RESTORED = tuple(Launch(*each) for each in ((64, 4, 3), (128, 8, 2), (128, 8, 3)))
FORMS = ("exp", "sas")


@contextlib.contextmanager
def launched(
    decode: Launch | None = None, prefill: Launch | None = None, restored: Launch | None = None
) -> Iterator[None]:
    """Within, these launches are taken whatever the shape."""
    own = configs.decode, configs.prefill, configs.restored_prefill
    if decode is not None:
        configs.decode = lambda *_: decode  # type: ignore[assignment]
    if prefill is not None:
        configs.prefill = lambda *_: prefill  # type: ignore[assignment]
    if restored is not None:
        configs.restored_prefill = lambda *_: restored  # type: ignore[assignment]
    try:
        yield
    finally:
        configs.decode, configs.prefill, configs.restored_prefill = own


@contextlib.contextmanager
def other_rescaling() -> Iterator[str]:
    """Within, prefill skips rescaling where it does not as shipped, or the other way round; gives what it does."""
    skips = not configs.architecture_of(device()).skips_rescaling
    with changed(skips_rescaling=skips):
        yield "rescaling as rows rise" if skips else "rescaling always"


def decode_candidates() -> tuple[Launch, ...]:
    return DECODE if on_gpu() else DECODE[:2]


def prefill_candidates() -> tuple[Launch, ...]:
    return PREFILL if on_gpu() else PREFILL[:2]


def decode(plan: Plan, bits: int | str, have: set[str]) -> Iterator[Row]:
    """Every launch over every shape of the sweep, one width; below 8 bits the shipped launch over keys in order, too.
    `have`: keys of rows that are there."""
    with torch.inference_mode():
        for batch, tokens in plan.sweep_decode:
            config = ta.TurboConfig(bits=bits, guard="off")
            yield from _decode(plan, batch, tokens, str(bits), config, decode_candidates(), have)
            if bits in (4, 3, 2):
                group, architecture = plan.heads // plan.kv_heads, configs.architecture_of(device())
                shipped = configs.decode(architecture, group, plan.head_dim, False, False)
                ordered = config.replace(reorder_k=True)
                yield from _decode(plan, batch, tokens, f"{bits}, keys in order", ordered, (shipped,), have)


def _decode(
    plan: Plan, batch: int, tokens: int, bits: str, config: ta.TurboConfig, launches: Iterable[Launch], have: set[str]
) -> Iterator[Row]:
    cache, q = None, normals(batch, plan.heads, 1, plan.head_dim, seed=1)
    for launch in launches:
        key = f"decode {bits} {batch}x{tokens} {_text(launch)}"
        if key in have:
            continue
        if cache is None:
            cache = filled_cache(batch, plan.kv_heads, plan.head_dim, tokens, config)
            want = exact(q[:1], *(x[:1] for x in cache.dequantize()), False)
        attend = functools.partial(_attended, cache, q)
        with launched(decode=launch):
            yield {"key": key, "bits": bits, "batch": batch, "keys": tokens, **_of(launch)} | _timed(
                attend, lambda attend=attend: attend()[0][:1], want
            )
    del cache
    if on_gpu():
        torch.cuda.empty_cache()


def prefill(plan: Plan, have: set[str]) -> Iterator[Row]:
    """Every launch and every softmax form at one length, causal; the first launch also with the other rescaling, and
    with a static scale of the weights."""
    with torch.inference_mode():
        for batch, tokens in plan.sweep_prefill:
            q = normals(batch, plan.heads, tokens, plan.head_dim, seed=0)
            k, v = (normals(batch, plan.kv_heads, tokens, plan.head_dim, seed=seed) for seed in (1, 2))
            want = exact(q[:1, :, -64:], k[:1], v[:1], True)
            tried = functools.partial(_prefill, (q, k, v), want, have)
            for form, launch in itertools.product(FORMS, prefill_candidates()):
                yield from tried(ta.TurboConfig(softmax=form, guard="off"), launch, form)
            for form in FORMS:
                plain = ta.TurboConfig(softmax=form, guard="off")
                with other_rescaling() as rescaling:
                    yield from tried(plain, PREFILL[0], f"{form}, {rescaling}")
                yield from tried(plain.replace(p_scale="static"), PREFILL[0], f"{form}, a static scale")


def _prefill(
    qkv: tuple[torch.Tensor, ...],
    want: torch.Tensor,
    have: set[str],
    config: ta.TurboConfig,
    launch: Launch,
    softmax: str,
) -> Iterator[Row]:
    """`softmax`: what the row says of form, rescaling and scales."""
    batch, heads, tokens, head_dim = qkv[0].shape
    key = f"prefill {softmax} {batch}x{tokens} {_text(launch)}"
    if key in have:
        return
    attend = functools.partial(ta.turbo_attention, *qkv, is_causal=True, config=config, backend="triton")
    with launched(prefill=launch):
        row = _timed(attend, lambda: attend()[:1, :, -64:], want, captured=False)
    if "seconds" in row:
        row["TOPS"] = 2 * batch * heads * head_dim * tokens**2 / row["seconds"] / 1e12
    yield {"key": key, "softmax": softmax, "batch": batch, "keys": tokens, **_of(launch)} | row


def pages(plan: Plan, have: set[str]) -> Iterator[Row]:
    """The last tokens of a prompt over pages that a server manages, at every width: pages restored as they are read, as
    shipped, and once per step by every launch. Errors are against the former, which should be the same."""
    launches = RESTORED if on_gpu() else RESTORED[:1]
    with torch.inference_mode():
        for bits, (before, new) in itertools.product((4, 3, 2), plan.sweep_pages):
            attend = piece(plan, bits, before, new)
            shipped = configs.paged_prefill(configs.architecture_of(device()), plan.head_dim)
            want = attend().clone()
            for once_a_step, launch in ((False, shipped), *((True, launch) for launch in launches)):
                name = "once" if once_a_step else "as read"
                key = f"pages {bits} {before}+{new} {name} {_text(launch)}"
                if key in have:
                    continue
                with changed(restores_pages=once_a_step), launched(restored=launch):
                    row = _timed(attend, attend, want)
                shape = {"batch": 1, "keys": before + new, "queries": new}
                yield {"key": key, "bits": str(bits), "restored": name, **shape, **_of(launch)} | row


def best(rows: list[Row], **wanted: Any) -> Launch | None:
    """The launch of the least time among rows that have these values, summed over shapes (and widths) of theirs
    relative to the best of each."""
    some = [row for row in rows if "seconds" in row and all(row.get(name) == value for name, value in wanted.items())]
    least: dict[tuple[Any, ...], float] = {}
    for row in some:
        shape = _shape(row)
        least[shape] = min(row["seconds"], least.get(shape, float("inf")))
    scores: dict[Launch, list[float]] = {}
    for row in some:
        launch = Launch(*(row[name] for name in _of(DECODE[0])))
        scores.setdefault(launch, []).append(row["seconds"] / least[_shape(row)])
    complete = {launch: sum(score) for launch, score in scores.items() if len(score) == len(least)}
    return min(complete, key=lambda launch: complete[launch]) if complete else None


def _shape(row: Row) -> tuple[Any, ...]:
    return row["batch"], row["keys"], row.get("bits")


def chosen(plan: Plan, decode_rows: list[Row], prefill_rows: list[Row]) -> Row:
    """What `configs.load` reads: the best launches of decode, over all widths alike, and of prefill in the softmax that
    "auto" is on GPUs; what was not swept is left out."""
    widths = [row for row in decode_rows if "," not in row["bits"]]  # without keys in order, which are timed once
    found = {"decode": best(widths), "prefill": best(prefill_rows, softmax="exp")}
    return {
        "architecture": configs.architecture_of(device()).name,
        "gpu": torch.cuda.get_device_name() if on_gpu() else None,
        "head_dim": plan.head_dim,
        "rows": plan.heads // plan.kv_heads,
        **{work: _of(launch) for work, launch in found.items() if launch is not None},
    }


def _attended(cache: ta.KVCache, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    steps = steps_of(cache)
    assert steps is not None
    return steps.run(q, None, None, AttentionParams(True, q.shape[3] ** -0.5), fills=Fills())


def _of(launch: Launch) -> Row:
    return asdict(launch)


def _text(launch: Launch) -> str:
    return ",".join(map(str, astuple(launch)))


def _timed(work: Callable, result: Callable, want: torch.Tensor, captured: bool = True) -> Row:
    try:
        error = relative_error(result(), want)
        if not error <= WRONG:
            return {"error": error, "refused": "WRONG"}
        return {"error": error, "seconds": once(graphed(work) if captured else work, 30)}
    except Exception as problem:
        return {"refused": said(problem)}
