"""Whether the positions of new tokens continue a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ...modes import in_own_modes

_ADVICE = (
    "a prompt has to begin with the cache's tokens and be longer, new ids alone need an attention_mask of all "
    "positions, and a model that numbers the tokens of every call from 0, as Bamba does, needs position_ids"
)


class PositionCheck:
    """Compares the position_ids [B, L] of new tokens with the length of a cache: at once on a CPU; on another device
    there, and the host, which does not wait for it, reports an error in a later forward pass."""

    def __init__(self) -> None:
        self._late: LateFlag | None = None

    def copied(self) -> PositionCheck:
        """For a copy of the cache, which reports an error that is not known yet independently."""
        other = PositionCheck()
        other._late = None if self._late is None else self._late.copied()
        return other

    def check(self, positions: Tensor, stored: int) -> None:
        """Raises `InputError` if a token is at a position before that of its place behind `stored` ones; on a GPU, if
        one of an earlier call was."""
        (self.check_now if positions.device.type == "cpu" else self.check_later)(positions, stored)

    def check_now(self, positions: Tensor, stored: int) -> None:
        wrong = _behind(positions, stored).any(1)
        if wrong.any():
            row = positions[int(wrong.int().argmax())].tolist()
            at = ", ".join(map(str, row if len(row) <= 4 else [*row[:2], "…", row[-1]]))
            raise InputError(
                f"input_ids: expected new tokens after the {stored} that the TurboCache already holds, got some at "
                f"positions {at}; {_ADVICE}"
            )

    def check_later(self, positions: Tensor, stored: int) -> None:
        if self._late is None:
            self._late = LateFlag(positions.device)
        if self._late.take():
            raise InputError(
                "input_ids: expected new tokens after those that the TurboCache already holds, got some at other "
                f"positions in an earlier forward pass; reset() empties the cache; {_ADVICE}"
            )
        self._late.send(_behind(positions, stored).any())


class LateFlag:
    """A flag on a device that the host reads without waiting: an int32 [1] there, and an asynchronous copy here."""

    @in_own_modes
    def __init__(self, device: torch.device):
        self._there = torch.zeros(1, dtype=torch.int32, device=device)
        self._here = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")

    def copied(self) -> LateFlag:
        other = LateFlag(self._there.device)
        other.send(self._there[0] != 0)
        return other

    @in_own_modes
    def send(self, raised: Tensor) -> None:
        """Raise the flag if `raised`, a bool on the device, is true."""
        self._there.bitwise_or_(raised.to(torch.int32))
        self._here.copy_(self._there, non_blocking=True)

    @in_own_modes
    def take(self) -> bool:
        """Whether it was raised, as far as the device has come; lowers it."""
        raised = bool(self._here)
        if raised:
            self._there.zero_()
            self._here.zero_()
        return raised


def _behind(positions: Tensor, stored: int) -> Tensor:
    """bool [B, L]: positions before the next ones. Those after a gap are in the model's rotations, and in order."""
    return positions < torch.arange(stored, stored + positions.shape[1], device=positions.device)
