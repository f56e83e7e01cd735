"""Attention over pages that somebody else manages: block tables, open blocks in a pool of slots, ragged batches.

For servers, which own the memory and decide where blocks lie. A page holds a full block of 64 tokens in the packed
format (`kv/layout.py`) and is final. Blocks that are not full yet are INT8 rows in `OpenBlocks`, one slot a running
sequence. What is computed is `stored_prefill` (numerics.md section 6): a query in block j reads the blocks before
j as stored, and block j as INT8, so that a page's bytes do not depend on how tokens were scheduled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from .config import TurboConfig
from .dispatch import Call, choose
from .errors import ConfigError, InputError, ShapeError
from .flashq import rotate
from .kv.layout import PageLayout
from .modes import in_own_modes
from .reference.queries import logit_scale

BLOCK = 64
"""Tokens of a page."""

PAGE_UNIT = 64
"""Pages are reserved in multiples of this many bytes, so that a token's share is a whole number."""

T = TypeVar("T")

HeadBits = tuple[tuple[int, ...], tuple[int, ...]]
"""Widths of K and V, one per KV head."""

_MODULES = {"cpu": "turboattention.execution.cpu_paged", "triton": "turboattention.execution.triton_paged"}


@dataclass(frozen=True)
class PagedFormat:
    """The pages of all layers.

    head_bits: per layer the widths of this process's KV heads. page_bytes: bytes reserved for each page, the
    largest of all layers (and of all ranks, where heads are spread over several). means: per layer float32 [H, D]
    that keys are stored without (in the model's space, on the device of the pages), or None; empty for none at all.

    Raises:
        ConfigError: a configuration that pages cannot serve. ShapeError: means of other heads.
    """

    config: TurboConfig
    head_dim: int
    head_bits: tuple[HeadBits, ...]
    page_bytes: int
    means: tuple[Tensor | None, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        wanted = {"block_size": BLOCK, "stored_prefill": True, "sink_tokens": 0, "token_scales": True}
        for name, value in wanted.items():
            if getattr(self.config, name) != value:
                raise ConfigError(f"config: expected {name}={value!r} for pages, got {getattr(self.config, name)!r}")
        needed = reserved_bytes(self.head_dim, self.head_bits)
        if self.page_bytes % PAGE_UNIT or self.page_bytes < needed:
            raise ConfigError(
                f"page_bytes: expected a multiple of {PAGE_UNIT} of at least {needed}, got {self.page_bytes}"
            )
        for mean in self.means:
            if mean is not None and mean.shape != (self.kv_heads, self.head_dim):
                raise ShapeError(f"means: expected [{self.kv_heads}, {self.head_dim}] each, got {list(mean.shape)}")
        _ = self.stored_means  # now, since a CUDA graph that is being captured could not

    @classmethod
    def of(
        cls,
        config: TurboConfig,
        head_dim: int,
        head_bits: Sequence[HeadBits],
        means: tuple[Tensor | None, ...] = (),
    ) -> PagedFormat:
        """With pages of no more bytes than these widths need."""
        return cls(config, head_dim, tuple(head_bits), reserved_bytes(head_dim, head_bits), means)

    @property
    def kv_heads(self) -> int:
        return len(self.head_bits[0][0])

    @cached_property
    def layouts(self) -> tuple[PageLayout, ...]:
        """One per layer."""
        return tuple(_layout(self.head_dim, bits) for bits in self.head_bits)

    @cached_property
    def stored_means(self) -> tuple[Tensor | None, ...]:
        """The means in the space that keys are stored in, one per layer."""
        turn = rotate if self.config.rotate else torch.clone
        means = self.means or (None,) * len(self.head_bits)
        return tuple(None if mean is None else turn(mean.float()).contiguous() for mean in means)


def reserved_bytes(head_dim: int, head_bits: Iterable[HeadBits]) -> int:
    """Bytes for a page of any of these widths."""
    largest = max((_layout(head_dim, bits).page_bytes for bits in head_bits), default=0)
    return -(-largest // PAGE_UNIT) * PAGE_UNIT


def _layout(head_dim: int, bits: HeadBits) -> PageLayout:
    return PageLayout(head_dim, BLOCK, *bits, token_scales=True)


class OpenBlocks:
    """INT8 rows of blocks that are not full yet: one slot a running sequence, for all layers.

    codes: int8 [layers, slots, H, ring, D] of K and V; scales: float32 [layers, slots, H, ring]. Position p of a
    sequence is row `p % ring` of its slot.

    ring: 64; or 128 where tokens may be taken back (speculative decoding), up to 64 of them.
    """

    @in_own_modes
    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        ring: int = BLOCK,
    ):
        if ring not in (BLOCK, 2 * BLOCK):
            raise InputError(f"ring: expected {BLOCK} or {2 * BLOCK}, got {ring}")
        self.ring = ring
        shape = layers, slots, kv_heads, ring
        self.codes = [torch.zeros(*shape, head_dim, dtype=torch.int8, device=device) for _ in "kv"]
        self.scales = [torch.zeros(shape, dtype=torch.float32, device=device) for _ in "kv"]
        (kc, vc), (ks, vs) = self.codes, self.scales
        self._layers = [((kc[layer], vc[layer]), (ks[layer], vs[layer])) for layer in range(layers)]
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        """On a GPU: becomes 1 where a step meets what is not finite."""
        self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=True) if self.flag.is_cuda else self.flag

    def of(self, layer: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """One layer's codes and scales, each of K and V."""
        return self._layers[layer]

    @in_own_modes
    def notice(self) -> bool:
        """Whether steps on a GPU met values that were not finite, as far as is known here.

        Nothing waits for the device: what it says now arrives later, for the next one who asks.
        """
        raised = bool(self._seen)
        if raised:
            self.flag.zero_()
            self._seen.zero_()
        elif self._seen is not self.flag:
            self._seen.copy_(self.flag, non_blocking=True)
        return raised

    @property
    def slots(self) -> int:
        return self.codes[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.codes, *self.scales))


@dataclass(frozen=True)
class PagedBatch:
    """What one step asks of every layer.

    query_start: int64 [R + 1], sequence r has rows `query_start[r]` to `query_start[r + 1]` of the flat tokens;
    seq_lens: int64 [R], its tokens with those of this step; block_table: int64 [R, P], its pages;
    slots: int64 [R], its slot in the `OpenBlocks`. All on the device of the tokens, where int32 will do too.

    max_query_len: the most tokens that a sequence has in this step, or more; None where it is not known. On a GPU
    kernels are chosen by it, and by shapes: steps of one token, or of up to 64 with a ring of 128, need no memory of
    their own. Sequences of no tokens and tokens behind `query_start[R]` are padding, and left alone.

    A sequence begins at a multiple of 64, or goes on in the slot that has its open block. Where tokens were taken
    back, a step begins before the last one's end.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slots: Tensor
    max_query_len: int | None = None
    _derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Any, derive: Callable[[], T]) -> T:
        """What is the same for all layers of the step that agree in `key`."""
        if key not in self._derived:
            self._derived[key] = derive()
        return self._derived[key]


def paged_attention(
    fmt: PagedFormat,
    layer: int,
    batch: PagedBatch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    pages: Tensor,
    open_blocks: OpenBlocks,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> bool:
    """Store a step's tokens, all sequences' first, then attend causally into `out`.

    Args:
        q, out: [T, Hq, D]; k, v: [T, H, D]. float32, bfloat16 or float16.
        pages: uint8 [N, page_bytes or more], pages of this layer, channels side by side; written where blocks fill.
        scale: of the logits, `1 / sqrt(D)` unless given. window: keys `p - window + 1` to p of a query at p. Pages
            wholly behind every window are not read.

    Returns:
        Whether all of q, k and v was finite. What was not is stored and attended as zeros, on a GPU with
        its row, and nothing waits for the answer there: always true, and `OpenBlocks.notice` tells.

    Raises:
        ShapeError: tensors that do not fit. InputError: a layer or window out of range; on a CPU also lengths, slots or
            pages out of range (a GPU is not waited for, and trusts them). Nothing is stored then.
            BackendError, UnsupportedError: as for `turbo_attention`.
    """
    _check(fmt, q, k, v, out, pages)
    _check_place(fmt, layer, open_blocks, window)
    run = batch.once((fmt.config, q.dtype, q.device, backend), lambda: _kernels(fmt.config, q, backend))
    factor = logit_scale(scale, fmt.head_dim)
    return run(fmt, layer, batch, q, k, v, out, pages, open_blocks, scale=factor, window=window, softcap=softcap)


def _kernels(config: TurboConfig, q: Tensor, backend: str) -> Callable[..., bool]:
    module = _MODULES[backend_for(config, q.dtype, q.device, backend)]
    return importlib.import_module(module).paged_attention


def backend_for(config: TurboConfig, dtype: torch.dtype, device: torch.device, backend: str = "auto") -> str:
    """The backend whose kernels compute pages for tensors of this kind.

    Raises:
        InputError: there are none. BackendError, UnsupportedError: as for `turbo_attention`.
    """
    chosen = choose(backend, Call(_over_caches(config), dtype, device, queries=1)).name
    if chosen not in _MODULES:
        raise InputError(f"backend: expected one of {', '.join(_MODULES)} for pages, got {chosen!r}")
    return chosen


@cache
def _over_caches(config: TurboConfig) -> TurboConfig:
    """What a backend is asked for: those with kernels for pages compute `stored_prefill` there, whatever they do
    over caches."""
    return config.replace(stored_prefill=False)


def _check(fmt: PagedFormat, q: Tensor, k: Tensor, v: Tensor, out: Tensor, pages: Tensor) -> None:
    heads, head_dim = fmt.kv_heads, fmt.head_dim
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] % heads or out.shape != q.shape:
        raise ShapeError(
            f"q, out: expected [tokens, a multiple of {heads} heads, {head_dim}] both, got {list(q.shape)} and "
            f"{list(out.shape)}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.shape != (q.shape[0], heads, head_dim):
            raise ShapeError(f"{name}: expected [{q.shape[0]}, {heads}, {head_dim}], got {list(x.shape)}")
    if out.stride(-1) != 1:
        raise ShapeError(f"out: expected channels side by side, got strides {out.stride()}")
    if pages.dim() != 2 or pages.dtype != torch.uint8 or pages.shape[1] < fmt.page_bytes or pages.stride(1) != 1:
        raise ShapeError(
            f"pages: expected uint8 [pages, {fmt.page_bytes} or more], got {pages.dtype} {list(pages.shape)}"
        )


def _check_place(fmt: PagedFormat, layer: int, open_blocks: OpenBlocks, window: int | None) -> None:
    shape = open_blocks.codes[0].shape
    if (shape[2], shape[4]) != (fmt.kv_heads, fmt.head_dim):
        raise ShapeError(
            f"open_blocks: expected {fmt.kv_heads} heads of {fmt.head_dim} channels, got {shape[2]} of {shape[4]}"
        )
    if not 0 <= layer < min(shape[0], len(fmt.layouts)):
        raise InputError(f"layer: expected one of {min(shape[0], len(fmt.layouts))}, got {layer}")
    if window is not None and window < 1:
        raise InputError(f"window: expected at least 1, or None, got {window}")
