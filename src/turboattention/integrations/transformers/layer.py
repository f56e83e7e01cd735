"""One layer of a `TurboCache`: `update` keeps the new keys and values pending until attention stores them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ...config import TurboConfig
from ...errors import ConfigError, GuardWarning, InputError, ShapeError, UnsupportedError
from ...guard import BeyondInt8Error, early_int8_message
from ...kv.cache import KVCache
from ...kv.channel_order import ChannelOrder
from ...validation import check_finite
from ...words import number_of
from ..model_shape import ModelShape
from .call import LayerCall, aligned
from .exact import ExactKV, attend_exactly, without_padding
from .held import HeldTokens
from .masks import MaskPlan
from .padding import attend_tokens, valid_after
from .parallel import HeadShare, TensorParallel
from .positions import PositionCheck
from .repeated import expect_attention

ALTERNATIVE = "leave past_key_values out to run without one"

BESIDE_AN_ENCODER = "EncoderDecoderCache(TurboCache(model.config), DynamicCache(config=model.config))"
"""What decoders with cross-attention take."""

_HANDLE = "_turbo_layer"
_VALUES = "_turbo_values"
_MARKS = "_turbo_marks"
_FEWEST = 32
"""New tokens of a call whose INT8 attention is compared with exact attention before any block is compressed."""


def layer_of(key: Tensor) -> TurboLayer | None:
    """The layer whose `update` returned this tensor."""
    return getattr(key, _HANDLE, None)


def _mark(x: Tensor) -> int | None:
    """A number that changes with every in-place modification of `x`. None if there is no such counter: while Dynamo
    traces, and for tensors of inference mode."""
    return None if torch.compiler.is_dynamo_compiling() or x.is_inference() else x._version


def _modified(x: Tensor, mark: int | None) -> bool:
    now = _mark(x)
    return now is not None and mark is not None and now != mark


class TurboLayer(HeldTokens, CacheLayerMixin):
    """A quantized `KVCache` with the interface of a transformers cache layer.

    Lengths towards transformers count every position, padding included, also in sliding layers;
    the `KVCache` holds tokens only. `valid` (bool [B, length] on the CPU, None while there is no
    padding) translates.

    Until the guard has checked the first compressed block, `floats` holds the same tokens in the model's own dtype. If
    the guard finds that INT8 cannot represent them, the layer keeps only `floats` (`exact`), as a layer created with
    `always_exact` does, and the model's own attention reads them.

    `update` does not store anything: it returns its arguments with a handle to the layer on them. The attention
    function finds the handle and calls `attend`, which attends and appends in one call.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        index: int,
        window: int | None = None,
        *,
        config: TurboConfig | None = None,
        head_bits: Any = None,
        k_mean: Tensor | None = None,
        k_order: ChannelOrder | None = None,
        max_tokens: int | None = None,
        model: ModelShape | None = None,
        parallel: TensorParallel | None = None,
        backend: str = "auto",
        always_exact: bool = False,
    ):
        super().__init__()
        self.index, self.window, self.backend = index, window, backend
        self.config, self.model, self.parallel = config or TurboConfig(), model, parallel or TensorParallel()
        self.always_exact = always_exact
        self.record_past = False
        self.leads = index == 0
        """Whether it is the first attention layer of its cache."""
        self.may_stay_empty = False
        """Whether it may read another layer's keys and be empty after a successful forward pass."""
        self._head_bits, self._k_mean, self._k_order, self._max_tokens = head_bits, k_mean, k_order, max_tokens
        self._checked: object = None
        self._positions = PositionCheck()

    def __repr__(self) -> str:
        held = "exact" if self.exact else f"kv={self.kv}"
        return (
            f"{type(self).__name__}(index={self.index}, length={self.get_seq_length()}, window={self.window}, {held})"
        )

    # -- what transformers asks -------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self._stored + (self._pending[0].shape[2] if self._pending is not None else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The first method of the cache that a forward pass calls.

        Raises:
            InputError: there are no new tokens, for which models would raise errors about shapes.
        """
        self.check_settled()
        if not int(query_length):
            raise InputError(
                f"input_ids: expected at least one new token, got none; the TurboCache already holds {self._stored}"
            )
        return self._stored + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """In sliding layers, keep the tokens that a crop of everything added by the last forward pass would need."""
        self.record_past = True

    @property
    def _kind(self) -> str:
        """The architecture, for messages."""
        return repr(self.model.model_type) if self.model is not None else "of this model"

    @property
    def keys(self) -> Any:
        """Not available: models that read them attend to more than new tokens and the past.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"past_key_values: the architecture {self._kind} is not supported: it reads keys or values of a cache's "
            f"layer {self.index}, which a TurboCache does not return"
        )

    @keys.setter
    def keys(self, value: None) -> None:  # type: ignore
        """False at first, as in transformers' own layers."""

    values = keys  # type: ignore

    # -- new tokens -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        v_head_dim = value_states.shape[3]
        share = self._share(heads)
        self.is_initialized = True
        if self.always_exact:
            self.floats = ExactKV.empty(key_states, value_states)
            return
        self.kv = KVCache(
            batch,
            heads,
            head_dim,
            config=self.config,
            head_bits=share.cut(self._head_bits, "head_bits", -1),
            max_tokens=self._max_tokens,
            device=key_states.device,
            dtype=key_states.dtype,
            window_size=self.window,
            k_mean=share.cut(self._k_mean, "k_mean", 0),
            k_order=self._order_of(share),
            v_head_dim=v_head_dim,
        )
        self.kv.label, self.kv.first_head = f"layer {self.index}", share.first
        if self.config.guard == "adapt" and self._head_bits is None:
            self.floats = ExactKV.empty(key_states, value_states)

    def _order_of(self, share: HeadShare) -> ChannelOrder | None:
        order = self._k_order
        if not isinstance(order, ChannelOrder):
            return order  # None, or an invalid value, for which the cache raises the error
        return ChannelOrder(*(share.cut(x, "k_order", 0) for x in order))

    def _share(self, heads: int) -> HeadShare:
        """The range of the model's KV heads that `heads` heads of the keys are.

        Raises:
            ConfigError: their widths follow from the others'.
        """
        share = self.parallel.share(heads, None if self.model is None else self.model.num_key_value_heads)
        if share.partial and self.config.bits == "mixed" and self._head_bits is None:
            raise ConfigError(
                f"head_bits: expected widths for the {share.total} KV heads of layer {self.index}, by themselves or in "
                f'a calibration: "mixed" compares all heads, and this process holds {share.count} (tensor parallelism)'
            )
        return share

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.check_settled()
        self._check_new(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*aligned(key_states, value_states))
        self._pending = aligned(key_states, value_states)  # type: ignore[assignment]
        setattr(key_states, _HANDLE, self)
        setattr(key_states, _VALUES, value_states)
        setattr(key_states, _MARKS, (_mark(key_states), _mark(value_states)))
        expect_attention()
        return key_states, value_states

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        plan: MaskPlan | None,
        is_causal: bool,
        call: LayerCall,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [B, Hq, Lq, D] over stored and pending tokens; the pending ones are then stored.

        Without new tokens (layers that share another's keys) the queries are at the last stored positions.
        `positions`: the model's position_ids of the queries, if it passes them on.
        """
        pending, self._pending = self._pending, None
        new = query.shape[2] if pending is None else pending[0].shape[2]
        past = self._stored - new if pending is None else self._stored
        if not self.is_initialized or query.shape[2] != new or past < 0:
            raise UnsupportedError(
                f"query: expected as many as new keys of layer {self.index} ({new}), got {query.shape[2]}: a "
                f"TurboCache holds the decoder's own tokens. With cross-attention pass {BESIDE_AN_ENCODER}"
            )
        self._check_model(module)
        if call.window is None and (is_causal if plan is None else plan.is_causal):
            self._check_length(past + new)
        if pending is not None:
            self._check_positions(positions)
            query, *_ = aligned(query, *pending)
        known = None if self.valid is None else self.valid[:, :past]
        valid = valid_after(plan, known, past, new, self.batch_size)
        if self.exact:
            out = self._attend_exactly(module, query, pending, plan, valid, is_causal, call)
        else:
            out = self._attend_quantized(module, query, pending, plan, valid, is_causal, call)
        if pending is not None:
            self._stored, self.valid = past + new, valid
        return out

    def _attend_quantized(
        self,
        module: nn.Module,
        query: Tensor,
        pending: tuple[Tensor, Tensor] | None,
        plan: MaskPlan | None,
        valid: Tensor | None,
        is_causal: bool,
        call: LayerCall,
    ) -> Tensor:
        """Attention over the `KVCache`, or exact attention if the guard finds that INT8 cannot represent this layer."""
        kv, floats = self.kv, self.floats
        assert kv is not None
        kv.window_size = self._kept_window(query.shape[2])
        if floats is None or pending is None:
            return attend_tokens(query, kv, pending, plan, valid, is_causal, call)
        kv.exact_past, before = floats.past(self.valid), kv.seq_lens
        try:
            out = attend_tokens(query, kv, pending, plan, valid, is_causal, call)
        except BeyondInt8Error as found:
            return self._become_exact(str(found), module, query, pending, plan, valid, is_causal, call)
        finally:
            kv.exact_past = None
        if kv.head_bits is not None:  # decided
            self.floats = None
            return out
        own = None if valid is None else valid[:, -query.shape[2] :]
        after = floats.extended(*(without_padding(x, own) for x in (*pending, query)))
        if query.shape[2] >= _FEWEST:
            exact = attend_exactly(module, without_padding(query, own), after, plan, valid, is_causal, call)
            found = early_int8_message(out, exact, kv.num_kv_heads, kv.first_head, min(self.config.kv_bits))
            if found is not None:
                try:
                    return self._become_exact(found, module, query, pending, plan, valid, is_causal, call)
                except BaseException:  # the warning may be an error
                    kv.crop(before)
                    raise
        self.floats = after
        return out

    def _become_exact(self, found: str, module: nn.Module, query: Tensor, *call: Any) -> Tensor:
        """Keep the tokens in the model's own dtype from now on, for the reason `found`; attend exactly in this call."""
        assert self.floats is not None
        dtype = str(self.floats.keys.dtype).removeprefix("torch.")
        message = f"layer {self.index} is kept in the model's own dtype ({dtype}): {found}"
        warnings.warn(message, GuardWarning, stacklevel=4)
        out = self._attend_exactly(module, query, *call)
        self.kv = None
        return out

    def _attend_exactly(
        self,
        module: nn.Module,
        query: Tensor,
        pending: tuple[Tensor, Tensor] | None,
        plan: MaskPlan | None,
        valid: Tensor | None,
        is_causal: bool,
        call: LayerCall,
    ) -> Tensor:
        """Attention over `floats`, to which the new tokens are appended."""
        held = self.floats
        assert held is not None
        own = None if valid is None else valid[:, -query.shape[2] :]
        query = without_padding(query, own)
        check_finite("q", query)
        if pending is not None:
            key, value = (without_padding(x, own) for x in pending)
            check_finite("k_new", key)
            check_finite("v_new", value)
            held = held.extended(key, value)
        out = attend_exactly(module, query, held, plan, valid, is_causal, call)
        self.floats = held.behind(self._kept_window(query.shape[2]))
        return out

    def _kept_window(self, new: int) -> int | None:
        """The window that determines which tokens are kept after a forward pass of so many tokens."""
        return None if self.window is None else self.window + (new if self.record_past else 0)

    def take_step(self) -> None:
        """Count a token of every sequence that was stored without `attend`, before the `KVCache` counts it."""
        if self.kv is not None and self.window is not None:
            self.kv.window_size = self.window + (1 if self.record_past else 0)
        self._stored += 1
        if self.valid is not None:
            self.valid = torch.cat([self.valid, self.valid.new_ones(len(self.valid), 1)], 1)

    def clone(self) -> Any:
        other = super().clone()
        other._positions = self._positions.copied()
        return other

    def reset(self) -> None:
        super().reset()
        self._positions = PositionCheck()

    def restore(self, kv: KVCache | None, floats: ExactKV | None, stored: int, valid: Tensor | None) -> None:
        if kv is not None:
            kv.first_head = self._share(kv.num_kv_heads).first
        super().restore(kv, floats, stored, valid)

    # -- checks ---------------------------------------------------------------------------------------

    def check_settled(self) -> None:
        """Check that no tokens of an earlier `update` are pending.

        Raises:
            InputError: attention never stored them.
        """
        if self._pending is not None:
            raise InputError(
                f'attn_implementation: expected "turbo" with a TurboCache, but no "turbo" attention took the '
                f"{number_of(self._pending[0].shape[2], 'new token')} of layer {self.index}. Load the model with "
                'attn_implementation="turbo" (after enable()). If it was, the architecture '
                f"{self._kind} is not supported: it does not call transformers' attention interface, or changes keys "
                "after the cache. reset() empties the cache"
            )

    def forget_new(self) -> None:
        """Drop pending tokens, so that the cache is unchanged."""
        self._pending = None

    def refuse_other_keys(self) -> None:
        """Reject a module that attends to its new keys and to others (`repeated`). Drops pending tokens.

        Raises:
            UnsupportedError: always.
        """
        self.forget_new()
        raise UnsupportedError(
            f"key: expected only what the TurboCache stored of layer {self.index}, got others in another call of its "
            f"attention: the architecture {self._kind} is not supported. reset() empties the cache"
        )

    def check_values(self, key: Tensor, value: Tensor) -> None:
        """Check that `key` and `value` are a pair returned by `update`: attention reads the pending tokens instead.

        Raises:
            UnsupportedError: the values are different tensors, or one of the two was modified in place (not detected
                under `torch.inference_mode`). Pending tokens are then dropped.
        """
        if value is not getattr(key, _VALUES):
            argument, fault = "value", "changes values"
        elif any(_modified(x, mark) for x, mark in zip((key, value), getattr(key, _MARKS), strict=True)):
            argument, fault = "key, value", "modifies keys or values in place"
        else:
            return
        self.forget_new()
        raise UnsupportedError(
            f"{argument}: expected what the TurboCache stored of layer {self.index}, got others: the architecture "
            f"{self._kind} is not supported: it {fault} after the cache"
        )

    def _check_new(self, key: Tensor, value: Tensor) -> None:
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise UnsupportedError("gradients: a TurboCache is for inference; call the model under torch.no_grad()")
        if key.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise UnsupportedError(
                f"value_states: expected the batch, heads and tokens of key_states {tuple(key.shape)}, got "
                f"{tuple(value.shape)}"
            )
        expected, got = self._sizes, (key.shape[0], key.shape[1], key.shape[3], value.shape[3])
        if expected is not None and expected != got:
            hint = "; repeat it with batch_repeat_interleave()" if expected[1:] == got[1:] else ""
            raise ShapeError(
                f"key_states: expected (batch, KV heads, head_dim of keys, of values) = {expected} as in layer "
                f"{self.index} of the TurboCache, got {got}{hint}"
            )

    def _check_positions(self, positions: Tensor | None) -> None:
        """Check that new tokens follow the stored ones. If a prompt is no longer than the cache, `generate` silently
        selects tokens that do not. With padding, positions do not number the cache's tokens."""
        if not self.leads or not self._stored or self.valid is not None:
            return
        if isinstance(positions, Tensor) and positions.dim() == 2:
            self._positions.check(positions, self._stored)

    def _check_length(self, length: int) -> None:
        """Some models have sliding layers in their caches, but masks without a window. The keys that a query sees would
        then depend on how the text is split into forward passes."""
        if self.window is not None and length > self.window:
            raise UnsupportedError(
                f"attention_mask: expected the window of {self.window} that the cache of layer {self.index} has, got "
                f"none for {length} tokens: the architecture {self._kind} is not supported beyond its window"
            )

    def _check_model(self, module: nn.Module) -> None:
        config = getattr(module, "config", None)
        if self.model is not None and config is not None and config is not self._checked:
            self.model.check(config)
            self._checked = config
