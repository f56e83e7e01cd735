"""Deferred detection of values that are not finite: a flag on the device that the host reads later."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import NonFiniteError
from ...kv.cache import KVCache
from ...modes import in_own_modes


class NonFiniteFlag:
    """`KVCache.deferred_error`: a flag int32 [1] that kernels set, and an asynchronous copy of it on the host."""

    @in_own_modes
    def __init__(self, device: torch.device):
        self.on_device = torch.zeros(1, dtype=torch.int32, device=device)
        self._here = self.on_device
        if device.type != "cpu":
            self._here = torch.zeros(1, dtype=torch.int32, pin_memory=True)

    @in_own_modes
    def copied(self) -> NonFiniteFlag:
        """A flag for a copy of the cache, which reports the error independently."""
        other = NonFiniteFlag(self.on_device.device)
        other.on_device.copy_(self.on_device)
        other.send()
        return other

    @in_own_modes
    def send(self) -> None:
        if self._here is not self.on_device:
            self._here.copy_(self.on_device, non_blocking=True)

    @in_own_modes
    def look(self, label: str | None) -> None:
        """Raise NonFiniteError if the host's copy of the flag is set, and clear the flag."""
        if not int(self._here):
            return
        self.on_device.zero_()
        self._here.zero_()
        raise NonFiniteError(
            "q, k_new, v_new, attn_mask: expected finite values (of attn_mask also -inf), got others in an earlier "
            f"step ({label or 'cache'}); they were read as zeros"
        )


def flag_of(cache: KVCache) -> NonFiniteFlag:
    """The cache's flag, created if there is none."""
    flag = cache.deferred_error
    if not isinstance(flag, NonFiniteFlag):
        assert cache.page_table is not None
        cache.deferred_error = flag = NonFiniteFlag(cache.page_table.device)
    return flag


def cleaned(mask: Tensor | None, flag: Tensor) -> Tensor | None:
    """Replace NaN and +inf in a mask by 0, and set the flag (int32 [1] on the device) if there are any."""
    if mask is None or not mask.is_floating_point():
        return mask
    bad = ~(mask < torch.inf)
    flag.bitwise_or_(bad.any().to(flag.dtype))
    return mask.masked_fill(bad, 0)
