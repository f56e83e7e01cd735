"""The known token ids of a cache's tokens: those from `generate`, and those from the cache's file."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...words import number_of

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
UNKNOWN = -1
"""In the place of an id that is not known."""


class KnownIds:
    """The known ids of a cache's tokens. Tensors belong to the cache and are replaced, never modified.

    saved: ids [B, L] of the file the cache was loaded from, as long as they are in the cache, or None. fed: ids [B, L]
    of the cache's first tokens and of those that a forward of `generate` is about to add, `UNKNOWN` where they are not
    known, or None. checked: whether a prompt of `generate` is compared with them.
    """

    def __init__(self, saved: Tensor | None = None, checked: bool = True):
        self.saved, self.fed, self.checked = saved, saved, checked
        self._before: Tensor | None = None
        self._skipped = 0
        self._warned = False

    def begin(self, input_ids: Tensor, length: int) -> None:
        """A `generate` with the ids [B, L] of a whole prompt, over a cache of `length` tokens. They are compared only
        here, since that waits for the device.

        Warns once if some of the cache's tokens are not known.

        Raises:
            InputError: the prompt does not begin with the cache's tokens.
        """
        if length:
            self._check_goes_on(input_ids, length)
        self._record_behind(length, input_ids, skipped=length)

    def begin_behind(self, input_ids: Tensor, length: int, positions: int) -> None:
        """A `generate` with only the new ids [B, L], behind the `length` tokens of the cache, and a mask of so many
        `positions`.

        Raises:
            InputError: the mask has other positions than these tokens.
        """
        given = input_ids.shape[1]
        if positions != length + given:
            raise InputError(
                f"attention_mask: expected {number_of(length + given, 'position')} ({length} in the TurboCache, "
                f"{given} new), got {positions}"
            )
        self._record_behind(length, input_ids, skipped=0)

    def begin_assisted(self, input_ids: Tensor, length: int, positions: int) -> None:
        """A `generate` with an assistant or `prompt_lookup_num_tokens`, whose first forward takes all ids [B, L] that
        it got, also those of the cache's `length` tokens. `positions`: of its mask.

        Raises:
            InputError: the mask does not have the positions of the cache's tokens and of the ids: the ids are a whole
                prompt, or the mask is wrong.
        """
        given = input_ids.shape[1]
        if not length:
            self.begin(input_ids, length)
        elif positions == given:
            raise InputError(
                f"input_ids: expected only the ids after the {number_of(length, 'token')} of the TurboCache, because "
                f"assisted decoding passes all given ids to the model, got {number_of(given, 'id')} under a mask of "
                f"{number_of(positions, 'position')}: pass input_ids[:, {length}:] of a prompt that begins with the "
                "cached tokens; new ids alone need an attention_mask of all positions"
            )
        else:
            self.begin_behind(input_ids, length, positions)

    def begin_unknown(self, length: int) -> None:
        """A `generate` with embeddings. Warns once if they cannot be compared with the cache's tokens."""
        if length and self.checked:
            held = number_of(length, "token")
            self._warn(f"inputs_embeds: cannot be compared with the {held} that the TurboCache holds")

    def follow(self, input_ids: Tensor) -> None:
        """Record the ids [B, L] of a forward pass of the latest `generate`, including those before it."""
        if self._before is not None and len(self._before) == len(input_ids):  # the model refuses another batch
            self.fed = torch.cat([self._before, input_ids[:, self._skipped :]], 1)

    def _record_behind(self, length: int, input_ids: Tensor, skipped: int) -> None:
        """From now on, `follow` records its ids, without the first `skipped`, behind those of the cache's `length`
        tokens. These remain as they are: a prompt says nothing about tokens with which it cannot be compared."""
        self._before, self._skipped = self._first(length, input_ids), skipped
        self.follow(input_ids)

    def _first(self, length: int, like: Tensor) -> Tensor:
        """The ids [B, length] of the cache's tokens, `UNKNOWN` where they are not known."""
        held = like[:, :0] if self.fed is None else self.fed[:, :length].to(like)
        return torch.cat([held, held.new_full((len(held), length - held.shape[1]), UNKNOWN)], 1)

    def _check_goes_on(self, input_ids: Tensor, length: int) -> None:
        given = input_ids.shape[1]
        if 0 < given <= length:
            raise InputError(
                f"input_ids: expected a prompt that continues the {number_of(length, 'token')} that the TurboCache "
                f"already holds, got {given}; crop({given - 1 - length}) leaves one of them to process, reset() "
                f"empties the cache, and new ids alone need an attention_mask of all {length + given} positions"
            )
        mine, theirs = self._first(length, input_ids).cpu(), input_ids[:, :length].cpu()
        if not self.checked or mine.shape != theirs.shape:  # transformers refuses an empty prompt
            return
        differs = ((mine != theirs) & (mine != UNKNOWN)).any(0)
        if differs.any():
            same = int(differs.int().argmax())
            back = f"crop({same}) keeps what they share, " if same else ""  # crop(0) would keep everything
            raise InputError(
                f"input_ids: expected a prompt that begins with the {number_of(length, 'token')} of the TurboCache, "
                f"got one that differs from token {same} on; {back}reset() empties the cache, and check_prompts=False "
                "switches this off"
            )
        unknown = int((mine == UNKNOWN).any(0).sum())
        if unknown:
            self._warn(
                f"input_ids: cannot be compared with {unknown} of the {number_of(length, 'token')} that the "
                "TurboCache holds, which came from a call of the model or from inputs_embeds"
            )

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            again = (
                "the prompt has to begin with all of them; cache.prompt_ids = ids makes all of them known, "
                "check_prompts=False switches this warning off"
            )
            warnings.warn(f"{what}: {again}", stacklevel=4)

    def all_of(self, length: int) -> Tensor | None:
        """The ids [B, length] of all tokens of a cache; None if some are not known."""
        if self.fed is None or self.fed.shape[1] != length or bool((self.fed == UNKNOWN).any()):
            return None
        return self.fed

    def copy(self) -> KnownIds:
        return copy.copy(self)

    def cut(self, length: int) -> None:
        """Remove the ids past `length`."""
        self.saved, self.fed = (None if x is None else x[:, :length] for x in (self.saved, self.fed))

    def select(self, index: Tensor) -> None:
        """Sequences `index`, int64 [B']."""
        for name in ("saved", "fed", "_before"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[index.to(held.device)])

    def clear(self) -> None:
        self.__init__(checked=self.checked)


def checked_ids(input_ids: Any, batch: int, length: int) -> Tensor:
    """int64 [batch, length] on the CPU: one id per position of a cache, including padding.

    Raises:
        InputError: `input_ids` have another shape or dtype.
    """
    ids = _integers(input_ids, batch)
    given = ids.shape[1]
    if given != length:
        crop = f"crop({given - length}) the cache, or " if given < length else ""
        raise InputError(
            f"input_ids: expected the {number_of(length, 'token')} that the cache holds, got {given}; {crop}pass the "
            "ids of what it took: after generate, output[:, : cache.get_seq_length()]"
        )
    return ids


def check_goes_on(input_ids: Any, known: Tensor, length: int) -> None:
    """Check that a prompt continues the `length` tokens of a cache, whose first ids are `known` [B, L].

    Raises:
        InputError: it does not, or the cache has tokens whose ids are not known.
    """
    if known.shape[1] != length:
        raise InputError(
            f"prompt_ids: expected a cache that knows the ids of all its {number_of(length, 'token')}, got one that "
            f"knows the first {known.shape[1]}: crop({known.shape[1] - length}) removes the tokens added since it was "
            "loaded"
        )
    ids = _integers(input_ids, len(known))
    if not torch.equal(ids[:, :length], known[:, : ids.shape[1]]):
        held = number_of(length, "token")
        raise InputError(f"input_ids: expected a prompt that begins with the {held} of the cache, got another")
    if ids.shape[1] <= length:
        raise InputError(
            f"input_ids: expected a prompt that continues the {number_of(length, 'token')} of the cache, got "
            f"{ids.shape[1]}; crop({ids.shape[1] - 1 - length}) leaves one of them to process"
        )


def _integers(input_ids: Any, batch: int) -> Tensor:
    if not isinstance(input_ids, Tensor):
        raise InputError(f"input_ids: expected a tensor of integers [{batch}, L], got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype not in _INTEGERS or input_ids.shape[0] != batch:
        raise InputError(f"input_ids: expected integers [{batch}, L], got {input_ids.dtype} {tuple(input_ids.shape)}")
    return input_ids.to("cpu", torch.int64)
