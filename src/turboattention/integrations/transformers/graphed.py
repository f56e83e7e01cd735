"""`GraphedDecoding`: decode steps of a whole model as one CUDA graph, in any loop that calls the model.

Inside the `with` block, the model's `forward` is replaced. Steps of one token over its cache are replayed; all other
calls (prompts, the first blocks, steps with arguments other than tokens, positions and a padding mask) run as before.
Sampling, logits processors, stopping criteria and streamers remain those of transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ... import dispatch
from ...errors import InputError, UnsupportedError
from ...kv.in_place import settled
from ..model_shape import text_config
from .cache import TurboCache
from .model import shares_keys
from .registry import NAME

if TYPE_CHECKING:
    from .static_step import StaticStep


class Given(NamedTuple):
    """The inputs of a forward pass of one token: token ids int64 [B, 1]; positions [B or 1, 1], padding [B, L]."""

    tokens: Tensor
    positions: Tensor | None
    mask: Tensor | None


class GraphedDecoding:
    """Decode steps of `model` over `cache` as a CUDA graph.

        cache = TurboCache(model.config, max_tokens=8192)
        with GraphedDecoding(model, cache):
            model.generate(**inputs, past_key_values=cache)

    A graph is captured after the cache's first blocks have been compressed, and is valid until the cache is full. Until
    it is captured, and after any other change of the cache, such as another prompt or a crop, a few steps run without
    it. Greedy search and sampling are replayed; beam search and assisted decoding change the cache between steps, and
    run as usual. Memory for `max_tokens` of every sequence is allocated while the graph exists.

    If the guard keeps a layer in the model's own dtype, all steps run as usual; a cache that has such layers from the
    start raises an error.

    `replayed` and `ordinary` count forward passes.

    Args:
        model: loaded with ``attn_implementation="turbo"``, on one CUDA device.
        cache: created with `max_tokens`, the number of tokens of every sequence up to which graphs can be replayed.
        capture: if False, the same work runs step by step without a graph, also on a
            CPU (backend "triton" in Triton's interpreter).

    Raises:
        InputError: a model or cache that is not as above. UnsupportedError: models with layers that share keys, on
            several devices, or whose forward takes no position_ids; in a step, what a graph does not hold.
    """

    def __init__(self, model: PreTrainedModel, cache: TurboCache, *, capture: bool = True):
        _check(model, cache, capture)
        self.replayed = self.ordinary = 0
        self._model, self._cache, self._captures = model, cache, capture
        self._parameters = list(inspect.signature(model.forward).parameters)
        # The backend state after the last ordinary step: if nothing has changed the cache since then, a graph of the
        # next step is captured.
        self._steady: list[Any] = []
        self._static: StaticStep | None = None
        self._forward: Callable[..., Any] | None = None
        self._replaced: Any = None

    def __enter__(self) -> GraphedDecoding:
        if self._forward is not None:
            raise InputError("GraphedDecoding: expected it to be entered once at a time, got a second time")
        self._forward, self._replaced = self._model.forward, self._model.__dict__.get("forward")

        @functools.wraps(self._forward)  # generate inspects the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(*args, **kwargs)

        self._model.forward = forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._replaced is None:
            del self._model.forward
        else:
            self._model.forward = self._replaced
        self._forward = self._replaced = None
        self._release()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        assert self._forward is not None
        step = self._step_of({**dict(zip(self._parameters, args, strict=False)), **kwargs})
        if step is not None and self._made_ready(step):
            assert self._static is not None
            out = self._static.run(step)
            self.replayed += 1
            return out
        out = self._forward(*args, **kwargs)
        self.ordinary += 1
        self._steady = [] if step is None else [layer.kv and layer.kv.backend_state for layer in self._cache.layers]
        return out

    def _step_of(self, given: dict[str, Any]) -> Given | None:
        """None unless a forward pass is a step of one token over the cache that requests only logits."""
        ids, mask, positions = (given.pop(name, None) for name in ("input_ids", "attention_mask", "position_ids"))
        if given.pop("past_key_values", None) is not self._cache or self._cache.batch_size < 1:
            return None
        if not given.pop("use_cache", True) or not given.pop("return_dict", True):
            return None
        keep = given.pop("logits_to_keep", 0)
        if not isinstance(keep, int) or any(x is not None and x is not False for x in given.values()):
            return None
        batch, stored = self._cache.batch_size, self._cache.get_seq_length()
        if not isinstance(ids, Tensor) or ids.shape != (batch, 1) or ids.device != self._model.device:
            return None
        padded = any(layer.valid is not None for layer in self._cache.layers)
        if positions is None and padded:
            return None
        if positions is not None and positions.shape not in ((batch, 1), (1, 1)):
            return None
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (batch, stored + 1)):
            return None
        if mask is None and padded:
            return None
        return Given(ids, positions, mask)

    def _made_ready(self, step: Given) -> bool:
        """Whether there is a graph for the step; it is captured if the cache has not changed between two steps."""
        if self._static is None or not self._static.current:
            self._release()
            kept = [layer.kv and layer.kv.backend_state for layer in self._cache.layers]
            steady = bool(self._steady) and all(
                x is not None and x is y for x, y in zip(kept, self._steady, strict=True)
            )
            if not steady or not all(layer.kv is not None and settled(layer.kv) for layer in self._cache.layers):
                return False
            if any(_full(layer.kv) for layer in self._cache.layers):
                return False
            from .static_step import StaticStep  # Triton, which need not be installed

            assert self._forward is not None
            self._cache.check_level()
            made = StaticStep(self._model, self._forward, self._cache)
            self._static = made
            try:
                made.make(step, self._captures)
            except BaseException:
                self._release()
                raise
        return self._static.agrees(step)

    def _release(self) -> None:
        if self._static is not None:
            self._static.close()
        self._static = None


def _full(kv: Any) -> bool:
    return kv.max_tokens is None or int(kv.lengths.max()) >= kv.max_tokens


def _check(model: Any, cache: Any, capture: bool) -> None:
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model: expected a transformers model, got {type(model).__name__}")
    if not isinstance(cache, TurboCache):
        raise InputError(f"cache: expected a TurboCache, got {type(cache).__name__}")
    if any(layer.max_tokens is None for layer in cache.attention_layers):
        raise InputError(
            "cache: expected a TurboCache with max_tokens, got one without: a graph needs a fixed capacity"
        )
    if model.config._attn_implementation != NAME:
        raise InputError(f'model: expected attn_implementation="{NAME}", got {model.config._attn_implementation!r}')
    devices = {x.device for x in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedError(f"model: expected all parameters on one device, got {sorted(map(str, devices))}")
    if capture and model.device.type != "cuda":
        raise InputError(f"model: expected it on a CUDA device, got {model.device} (capture=False runs without graphs)")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedError(f"model: expected one whose forward takes position_ids, got {type(model).__name__}")
    if shares_keys(text_config(model.config)):
        raise UnsupportedError("model: layers that share the keys of others are not supported in a graph")
    if len(cache.attention_layers) < len(cache.layers) or cache.state_layers:
        raise UnsupportedError("model: layers other than attention are not supported in a graph")
    if cache.exact_layers:
        raise UnsupportedError(
            f"cache: expected quantized layers, got layers {list(cache.exact_layers)} in the model's own dtype "
            "(exact_layers), which a graph does not support"
        )
    if any(layer.parallel.size > 1 for layer in cache.layers):
        raise UnsupportedError("model: tensor parallelism is not supported in a graph")
    layer = cache.layers[0]
    call = dispatch.CallTraits(layer.config, model.dtype, model.device)
    chosen = dispatch.choose(layer.backend, call)
    if chosen.name != "triton":
        raise UnsupportedError(f'backend: expected "triton", whose steps can be captured, got "{chosen.name}"')
