"""Decode steps as a CUDA graph: all inputs have fixed addresses, and the host only counts tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import DtypeError, InputError, ShapeError, UnsupportedError
from ...kernels.inputs import BLOCK
from ...kv.cache import KVCache
from ...kv.in_place import settled
from ...modes import in_own_modes
from ...params import AttentionParams
from ...softmax import logit_scale
from ...validation import check_floats, check_softmax, check_window
from .deferred_error import flag_of
from .device import guard
from .host_lengths import Fills
from .steps import new_steps, steps_of

_FILLS = Fills(pages=True)


class DecodeGraph:
    """Decode steps of one token over a cache, captured once and replayed.

        graph = DecodeGraph(cache, num_heads=32)
        out, lse = graph.step(q, k, v)

    To capture a larger graph, such as a whole model's step, call `attend` during the capture and `advance` before every
    replay; or `ready` before and `count` after it, so that the host counts while the device computes. Between steps,
    `cache` may be read and saved; after any other change of the cache, make a new graph. If a cache has several graphs,
    only the latest may step.

    Args:
        cache: on a CUDA device, past its first block and its sinks, with `max_tokens`. Pages for that many tokens per
            sequence are allocated here and released by `close`.
        num_heads: query heads.
        scale, window_size, softcap: as in `turbo_attention_with_kvcache`.
        capture: if False, `step` runs the same kernels eagerly on the same memory.

    Raises:
        InputError: the cache does not meet the requirements above. UnsupportedError: steps are not supported for its
        configuration. ShapeError, ConfigError: other arguments are out of range.
    """

    @in_own_modes
    def __init__(
        self,
        cache: KVCache,
        num_heads: int,
        *,
        scale: float | None = None,
        window_size: int | None = None,
        softcap: float | None = None,
        capture: bool = True,
    ):
        if cache.max_tokens is None or int(cache.lengths.max()) >= cache.max_tokens or not settled(cache):
            raise InputError(
                "cache: expected max_tokens beyond its lengths and every sequence past its first block and sinks, "
                f"got max_tokens={cache.max_tokens} and lengths {cache.lengths.tolist()}"
            )
        kv_heads = cache.num_kv_heads
        if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1 or num_heads % kv_heads:
            raise ShapeError(f"num_heads: expected a multiple of the {kv_heads} KV heads, got {num_heads!r}")
        check_softmax(scale, softcap)
        window = check_window(cache.window_size if window_size is None else window_size)
        if cache.window_size is not None and (window is None or window > cache.window_size):
            raise InputError(f"window_size: expected at most the cache's own {cache.window_size}, got {window}")
        if steps_of(cache) is None or cache.dtype is None or cache.device is None:
            raise UnsupportedError("cache: expected a configuration with decode steps on a GPU, got another")
        # A new object: an older graph keeps the memory it captured, and its next step raises an error.
        cache.backend_state = self._steps = new_steps(cache)
        self._cache = cache
        self._steps.tables.reserve([cache.max_tokens // BLOCK - int(count) for count in cache.page_counts])
        self._params = AttentionParams(True, logit_scale(scale, cache.head_dim), window, softcap)
        self._inputs = tuple(
            torch.zeros(cache.batch_size, heads, 1, head_dim, dtype=cache.dtype, device=cache.device)
            for heads, head_dim in (
                (num_heads, cache.head_dim),
                (kv_heads, cache.head_dim),
                (kv_heads, cache.v_head_dim),
            )
        )
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._graph = self._capture() if capture else None

    @in_own_modes
    def step(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, Hq, 1, D], k [B, Hkv, 1, D], v [B, Hkv, 1, Dv] -> out [B, Hq, 1, Dv], lse float32 [B, Hq, 1], valid
        until the next step.

        Raises InputError if the cache is full or was changed by something else; NonFiniteError for values of an earlier
        step; ShapeError, DtypeError, UnsupportedError (gradients). The step is then not counted.
        """
        self._check(q, k, v)
        self.advance()
        for held, new in zip(self._inputs, (q, k, v), strict=True):
            held.copy_(new)
        if self._graph is None:
            self._outputs = self.attend(*self._inputs)
        else:
            self._graph.replay()
        flag_of(self._cache).send()
        assert self._outputs is not None
        return self._outputs

    @in_own_modes
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The device work of a step, without counting on the host. Raises as `step` does for q, k and v."""
        self._check(q, k, v)
        return self._steps.run(q, k, v, self._params, fills=_FILLS)

    @in_own_modes
    def try_out(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Run `attend` on copies of all that a step changes, to compile its kernels before a capture."""
        self._check(q, k, v)
        return self._steps.copied().run(q, k, v, self._params, fills=_FILLS)

    @in_own_modes
    def advance(self) -> None:
        """Count a step on the host before its device work is submitted. Raises as `step` does."""
        self.ready()
        self.count()
        flag_of(self._cache).send()  # reports the previous step; this one is not submitted yet

    @property
    def current(self) -> bool:
        """Whether the cache was changed only by this graph."""
        return self._cache.backend_state is self._steps

    @property
    def full(self) -> bool:
        """Whether a sequence has reached the cache's `max_tokens`."""
        assert self._cache.max_tokens is not None
        return int(self._cache.lengths.max()) >= self._cache.max_tokens

    @property
    def flag(self) -> Tensor:
        """int32 [1] on the device, nonzero once a step had values that were not finite."""
        return self._steps.flag

    @in_own_modes
    def ready(self) -> None:
        """Raise as `step` does if no step is possible; changes nothing."""
        self._cache.look()
        if not self.current:
            raise InputError("cache: expected no change since the graph's last step, got it changed by another call")
        if self.full:
            raise InputError(f"cache: expected room in its max_tokens={self._cache.max_tokens}, got it full")

    @in_own_modes
    def count(self) -> None:
        """Count a step on the host, after `ready`. Not part of the step's device work."""
        plan = self._steps.host_lengths.plan([1] * self._cache.batch_size)
        assert plan is not None
        self._steps.count(self._cache, plan, self._steps.tables.take(plan))

    @in_own_modes
    def send(self) -> None:
        """Start copying the flag for values that are not finite to the host, where the next call checks it."""
        flag_of(self._cache).send()

    @in_own_modes
    def close(self) -> None:
        """Release the pages that were not filled. The graph cannot be used afterwards."""
        self._steps.tables.release()
        if self._cache.backend_state is self._steps:
            self._cache.backend_state = None

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        check_floats(q=q, k=k, v=v)
        for name, held, x in zip(("q", "k", "v"), self._inputs, (q, k, v), strict=True):
            if x.shape != held.shape:
                raise ShapeError(f"{name}: expected shape {tuple(held.shape)}, got {tuple(x.shape)}")
            if x.dtype != held.dtype or x.device != held.device:
                want, got = f"{held.dtype} on {held.device}", f"{x.dtype} on {x.device}"
                raise DtypeError(f"{name}: expected {want}, as the cache is, got {got}")

    def _capture(self) -> torch.cuda.CUDAGraph:
        device, graph = self._cache.device, torch.cuda.CUDAGraph()
        assert device is not None
        with guard(device):
            # Compile the kernels before the capture, with a step on copies.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                q, k, v = self._inputs
                self.try_out(q, k, v)
            torch.cuda.current_stream().wait_stream(stream)
            # PyTorch's default capture stream belongs to the device of the first capture.
            with torch.cuda.graph(graph, stream=stream):
                self._outputs = self.attend(q, k, v)
        return graph
