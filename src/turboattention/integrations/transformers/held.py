"""The content of a layer of a `TurboCache`, and its changes other than new tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...kv.cache import KVCache
from .exact import ExactKV
from .views import own_memory


class HeldTokens:
    """Quantized tokens, exact ones, or both (see `TurboLayer`).

    `valid`: bool [B, length] on the CPU, which positions are tokens; None while there is no padding.
    """

    index: int
    window: int | None
    always_exact: bool
    is_initialized: bool
    kv: KVCache | None = None
    floats: ExactKV | None = None
    valid: Tensor | None = None
    _stored = 0
    _max_tokens: int | None = None
    _pending: tuple[Tensor, Tensor] | None = None

    def check_settled(self) -> None:
        """Check that no tokens of an earlier `update` are pending."""
        raise NotImplementedError

    # -- changing what is stored --------------------------------------------------------------------

    def check_crop(self, length: int) -> None:
        """Raises `InputError` if a crop to `length` positions needs tokens that a sliding window has released."""
        self.check_settled()
        if not self.is_initialized or length >= self._stored:
            return
        if self.floats is not None:
            self.floats.check_crop(length, self.window)
        if self.kv is not None:
            self.kv.window_size = self.window
            self.kv.check_crop(length if self.valid is None else self.valid[:, :length].sum(1))

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last ``-tokens_to_remove`` positions; a positive number is the length to keep. With a window, also
        remove the tokens recorded for a crop, as in transformers."""
        self.check_settled()
        removed = int(tokens_to_remove)
        keep = removed if removed > 0 else self._stored + removed
        if not self.is_initialized:
            return
        keep = min(max(keep, 0), self._stored)
        left = None if self.valid is None else self.valid[:, :keep]
        if self.floats is not None:
            self.floats.check_crop(keep, self.window)
        if self.kv is not None:
            self.kv.window_size = self.window
            self.kv.crop(keep if left is None else left.sum(1))
        if self.floats is not None:
            self.floats = self.floats.cropped(keep)
            if self.kv is None:  # otherwise the guard still needs all of them
                self.floats = self.floats.behind(self.window)
        self._stored, self.valid = keep, (None if left is None or bool(left.all()) else own_memory(left))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.check_settled()
        index = beam_idx.cpu()
        if self.kv is not None:
            self.kv.reorder(index)
        self.floats = None if self.floats is None else self.floats.selected(index)
        self.valid = None if self.valid is None else self.valid[index]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.batch_size)[torch.as_tensor(indices).cpu()])

    def reset(self) -> None:
        self.kv = self.floats = self.valid = self._pending = None
        self._stored, self.is_initialized = 0, False

    def offload(self) -> None:
        raise UnsupportedError("offload: a TurboCache is not offloaded")

    def prefetch(self) -> None:
        raise UnsupportedError("prefetch: a TurboCache is not offloaded")

    def clone(self) -> Any:
        """An independent layer with the same content; compressed blocks are shared."""
        self.check_settled()
        other = object.__new__(type(self))
        vars(other).update(vars(self), kv=None if self.kv is None else self.kv.clone())
        return other

    def __copy__(self) -> Any:
        return self.clone()

    def restore(self, kv: KVCache | None, floats: ExactKV | None, stored: int, valid: Tensor | None) -> None:
        """Set the content that was read from a file."""
        self.kv, self.floats, self._stored, self.valid = kv, floats, stored, valid
        self.is_initialized = True

    # -- what it holds ------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether the layer is kept in the model's own dtype."""
        return self.always_exact if not self.is_initialized else self.kv is None

    @property
    def batch_size(self) -> int:
        return -1 if self._sizes is None else self._sizes[0]

    @property
    def _sizes(self) -> tuple[int, int, int, int] | None:
        """Sequences, KV heads, and head_dim of keys and of values; None until they are known."""
        if self.kv is not None:
            return self.kv.token_shape
        if self.floats is not None:
            batch, heads, _, head_dim = self.floats.keys.shape
            return batch, heads, head_dim, self.floats.values.shape[3]
        return None

    @property
    def seq_lens(self) -> Tensor:
        """int64 [B]: tokens of each sequence, without padding."""
        if self.kv is not None:
            return self.kv.seq_lens
        if self.valid is not None:
            return self.valid.sum(1)
        return torch.full((max(self.batch_size, 0),), self._stored, dtype=torch.int64)

    @property
    def max_tokens(self) -> int | None:
        """Tokens per sequence that memory is reserved for."""
        return self._max_tokens if self.kv is None else self.kv.max_tokens

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.kv, self.floats, self.valid) if x is not None)

    @property
    def fp16_nbytes(self) -> int:
        """Bytes of the same tokens at 16 bits; of a sliding layer those inside the window."""
        if self._sizes is None:
            return 0
        tokens = self.seq_lens
        if self.window is not None:
            tokens = tokens.clamp(max=self.window)
        _, heads, head_dim, v_head_dim = self._sizes
        return 2 * int(tokens.sum()) * heads * (head_dim + v_head_dim)
