"""One layer of a `TurboCache`: `update` holds the new keys and values back until attention takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ...config import TurboConfig
from ...errors import ConfigError, InputError, ShapeError, UnsupportedError
from ...kv.cache import KVCache
from ..model_shape import ModelShape
from .call import Call, aligned
from .masks import MaskPlan
from .padding import attend_tokens, valid_after
from .parallel import HeadShare, TensorParallel

ALTERNATIVE = "leave past_key_values out to run without one"

_HANDLE = "_turbo_layer"
_VALUES = "_turbo_values"


def layer_of(key: Tensor) -> TurboLayer | None:
    """The layer whose `update` returned this tensor."""
    return getattr(key, _HANDLE, None)


class TurboLayer(CacheLayerMixin):
    """A quantized `KVCache` behind transformers' cache layer interface.

    Lengths towards transformers count every position, padding included, also in sliding layers;
    the `KVCache` holds tokens only. `valid` (bool [B, length] on the CPU, None while there is no
    padding) translates.

    `update` stores nothing yet: it returns its own arguments with a handle to the layer on them.
    The attention function finds the handle and calls `attend`, which attends and appends in one go.
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
        max_tokens: int | None = None,
        model: ModelShape | None = None,
        parallel: TensorParallel | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.index, self.window, self.backend = index, window, backend
        self.config, self.model, self.parallel = config or TurboConfig(), model, parallel or TensorParallel()
        self.kv: KVCache | None = None
        self.valid: Tensor | None = None
        self.record_past = False
        self.may_stay_empty = False
        """Whether it may read another layer's keys and hold none, in a forward that went well."""
        self._head_bits, self._k_mean, self._max_tokens = head_bits, k_mean, max_tokens
        self._stored = 0
        self._pending: tuple[Tensor, Tensor] | None = None
        self._checked: object = None

    def __repr__(self) -> str:
        return f"TurboLayer(index={self.index}, length={self.get_seq_length()}, window={self.window}, kv={self.kv})"

    # -- what transformers asks -------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self._stored + (self._pending[0].shape[2] if self._pending is not None else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The first that the cache learns of a forward.

        Raises:
            InputError: there are no new tokens, which models would fail at with errors about shapes.
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
        """Keep, in sliding layers, what a crop of everything the last forward added would need."""
        self.record_past = True

    @property
    def _kind(self) -> str:
        """The architecture, for messages."""
        return repr(self.model.model_type) if self.model is not None else "of this model"

    @property
    def keys(self) -> Any:  # type: ignore
        """Not there: models that read them attend to more than new tokens and the past.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"past_key_values: the architecture {self._kind} is not supported: it reads keys or values of a cache's "
            f"layer {self.index}, which a TurboCache does not give back"
        )

    @keys.setter
    def keys(self, value: None) -> None:
        """transformers' own layers begin without."""

    values = keys  # type: ignore

    # -- new tokens -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        share = self._share(heads)
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
        )
        self.kv.label, self.kv.first_head = f"layer {self.index}", share.first
        self.is_initialized = True

    def _share(self, heads: int) -> HeadShare:
        """The model's KV heads that `heads` of the keys are.

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
        if self.kv is None:
            self.lazy_initialization(*aligned(key_states, value_states))
        self._pending = aligned(key_states, value_states)  # type: ignore[assignment]
        setattr(key_states, _HANDLE, self)
        setattr(key_states, _VALUES, value_states)
        return key_states, value_states

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        plan: MaskPlan | None,
        is_causal: bool,
        call: Call,
        positions: Tensor | None = None,
    ) -> Tensor:
        """query [B, Hq, Lq, D] over what is stored and what `update` brought, which is then stored.

        Without new tokens (layers that share another's keys) the queries are the last ones stored.
        `positions`: the model's position_ids of the queries, where it hands them on.
        """
        pending, self._pending = self._pending, None
        new = query.shape[2] if pending is None else pending[0].shape[2]
        past = self._stored - new if pending is None else self._stored
        if self.kv is None or query.shape[2] != new or past < 0:
            raise UnsupportedError(
                f"query: expected the {new} new tokens of layer {self.index}, got {query.shape[2]}; "
                "cross-attention through the cache is not supported"
            )
        self._check_model(module)
        if call.window is None and (is_causal if plan is None else plan.is_causal):
            self._check_length(past + new)
        if pending is not None:
            self._check_positions(positions)
            query, *_ = aligned(query, *pending)
        known = None if self.valid is None else self.valid[:, :past]
        valid = valid_after(plan, known, past, new, self.batch_size)
        if self.window is not None:
            self.kv.window_size = self.window + (new if self.record_past else 0)
        out = attend_tokens(query, self.kv, pending, plan, valid, is_causal, call)
        if pending is not None:
            self._stored, self.valid = past + new, valid
        return out

    def take_step(self) -> None:
        """Count a token of every sequence that attention took without `attend`, ahead of the `KVCache`'s own count."""
        if self.kv is not None and self.window is not None:
            self.kv.window_size = self.window + (1 if self.record_past else 0)
        self._stored += 1
        if self.valid is not None:
            self.valid = torch.cat([self.valid, self.valid.new_ones(len(self.valid), 1)], 1)

    # -- changing what is stored --------------------------------------------------------------------

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last ``-tokens_to_remove`` positions; a positive number is the length to keep."""
        self.check_settled()
        removed = int(tokens_to_remove)
        keep = removed if removed > 0 else self._stored + removed
        if self.kv is None or keep >= self._stored:
            return
        keep = max(keep, 0)
        left = None if self.valid is None else self.valid[:, :keep]
        self.kv.window_size = self.window
        self.kv.crop(keep if left is None else left.sum(1))
        self._stored, self.valid = keep, (None if left is None or bool(left.all()) else left)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.check_settled()
        if self.kv is not None:
            index = beam_idx.cpu()
            self.kv.reorder(index)
            self.valid = None if self.valid is None else self.valid[index]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.kv is not None:
            self.reorder_cache(torch.arange(self.batch_size)[torch.as_tensor(indices).cpu()])

    def reset(self) -> None:
        self.kv = self.valid = self._pending = None
        self._stored, self.is_initialized = 0, False

    def offload(self) -> None:
        raise UnsupportedError("offload: a TurboCache is not offloaded")

    def prefetch(self) -> None:
        raise UnsupportedError("prefetch: a TurboCache is not offloaded")

    def clone(self) -> TurboLayer:
        """An independent layer with the same content; compressed blocks are shared."""
        self.check_settled()
        other = object.__new__(type(self))
        vars(other).update(vars(self), kv=None if self.kv is None else self.kv.clone())
        return other

    def __copy__(self) -> TurboLayer:
        return self.clone()

    def restore(self, kv: KVCache, stored: int, valid: Tensor | None) -> None:
        """Take what a file held."""
        kv.first_head = self._share(kv.num_kv_heads).first
        self.kv, self._stored, self.valid = kv, stored, valid
        self.is_initialized = True

    # -- what it holds ------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return -1 if self.kv is None else self.kv.batch_size

    @property
    def max_tokens(self) -> int | None:
        """Tokens per sequence that memory is reserved for."""
        return self._max_tokens if self.kv is None else self.kv.max_tokens

    @property
    def nbytes(self) -> int:
        held = 0 if self.kv is None else self.kv.nbytes
        return held + (0 if self.valid is None else self.valid.nbytes)

    @property
    def fp16_nbytes(self) -> int:
        """Bytes of the same tokens at 16 bits; of a sliding layer those inside the window."""
        if self.kv is None:
            return 0
        tokens = self.kv.seq_lens
        if self.window is not None:
            tokens = tokens.clamp(max=self.window)
        return 2 * 2 * int(tokens.sum()) * self.kv.num_kv_heads * self.kv.head_dim

    # -- checks ---------------------------------------------------------------------------------------

    def check_settled(self) -> None:
        """No tokens of an earlier `update` are left over.

        Raises:
            InputError: attention never took them.
        """
        if self._pending is not None:
            raise InputError(
                f'attn_implementation: expected "turbo" with a TurboCache, but no "turbo" attention took the '
                f"{self._pending[0].shape[2]} new tokens of layer {self.index}. Load the model with "
                'attn_implementation="turbo" (after enable()). If it was, the architecture '
                f"{self._kind} is not supported: it does not call transformers' attention interface, or changes keys "
                "after the cache. reset() empties the cache"
            )

    def forget_new(self) -> None:
        """Drop what `update` brought, so that the cache is as it was."""
        self._pending = None

    def check_values(self, key: Tensor, value: Tensor) -> None:
        """`key` and `value` are a pair that `update` returned: attention reads what it stored, not these.

        Raises:
            UnsupportedError: the values are others. What `update` brought is then forgotten.
        """
        if value is getattr(key, _VALUES):
            return
        self.forget_new()
        raise UnsupportedError(
            f"value: expected the values that the TurboCache stored with the keys of layer {self.index}, got others: "
            f"the architecture {self._kind} is not supported: it changes values after the cache"
        )

    def _check_new(self, key: Tensor, value: Tensor) -> None:
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise UnsupportedError("gradients: a TurboCache is for inference; call the model under torch.no_grad()")
        if key.dim() != 4 or key.shape != value.shape:
            raise UnsupportedError(
                f"value_states: expected the shape of key_states {tuple(key.shape)}, got {tuple(value.shape)}: "
                "multi-head latent attention (MLA) is not supported by a TurboCache"
            )
        kv = self.kv
        if kv is None:
            return
        expected, got = (kv.batch_size, kv.num_kv_heads, kv.head_dim), (key.shape[0], key.shape[1], key.shape[3])
        if expected != got:
            hint = "; repeat it with batch_repeat_interleave()" if expected[1:] == got[1:] else ""
            raise ShapeError(
                f"key_states: expected (batch, KV heads, head_dim) = {expected} as in layer {self.index} of the "
                f"TurboCache, got {got}{hint}"
            )

    def _check_positions(self, positions: Tensor | None) -> None:
        """New tokens stand behind the stored ones. From a prompt that is no longer than the cache, `generate` cuts
        some that do not, and would go on from them without a word. With padding, positions say less."""
        if self.index or not self._stored or self.valid is not None:
            return
        if isinstance(positions, Tensor) and positions.dim() == 2 and int(positions[:, -1].min()) < self._stored:
            raise InputError(
                f"input_ids: expected new tokens behind the {self._stored} that the TurboCache already holds, got some "
                f"that end at position {int(positions[:, -1].min())}; its prompts begin with its tokens and are longer"
            )

    def _check_length(self, length: int) -> None:
        """Some models have sliding layers in their caches, and masks without a window. What a query then sees depends
        on how the text was cut into forwards."""
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
