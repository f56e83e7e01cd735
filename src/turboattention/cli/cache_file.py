"""``--save-cache`` and ``--load-cache``: saves the cache of a long prompt, and loads it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FormatError, InputError
from ..words import number_of
from . import targets
from .output import bytes_text

if TYPE_CHECKING:
    from ..integrations.transformers.cache import TurboCache
    from ..integrations.transformers.language_model import Described


def check_target(path: Path, option: str = "--save-cache") -> None:
    """Raises InputError for a file that cannot be written or should not be replaced, before a long prompt is read."""
    from ..kv.serialization import is_saved_cache

    targets.check_target(option, path)
    if path.exists() and not is_saved_cache(path):
        raise InputError(f"{option}: expected a new file or a saved cache to replace, got {path}, which is neither")


def save(cache: TurboCache, ids: Sequence[int], path: Path) -> None:
    import torch

    with writing("--save-cache", path):
        cache.save(path, input_ids=torch.tensor([list(ids)]))


def saved_text(path: Path, tokens: int) -> str:
    """Report what was saved."""
    return f"cache of {number_of(tokens, 'token')} saved to {path}, {bytes_text(path.stat().st_size)}"


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Name the option in errors about a file that cannot be written."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}: {_without_argument(str(error))}") from error
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be written: {error.strerror or error}") from error


def check_source(path: Path, option: str = "--load-cache") -> None:
    """Raises InputError or FormatError for a file that is not a saved cache, before a model is opened."""
    from ..kv.serialization import check_saved_cache

    if not path.is_file():
        kinds = (path.is_dir(), "a folder"), (path.exists() or path.is_symlink(), "not a regular file")
        kind = next((kind for is_one, kind in kinds if is_one), "no such file")
        raise InputError(f"{option}: expected a file, got {path}: {kind}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{option}: {path} cannot be read: no permission")
    with reading(option):
        check_saved_cache(path)


@contextmanager
def reading(option: str) -> Iterator[None]:
    """Name the option in errors about a saved cache."""
    try:
        yield
    except (FormatError, InputError) as error:
        raise type(error)(f"{option}: {_without_argument(str(error))}") from error


def load(language: Described, path: Path, option: str = "--load-cache") -> tuple[TurboCache, list[int]]:
    """A saved cache and its tokens.

    Raises:
        FormatError, InputError: the file does not exist, is damaged, of another model, or without tokens.
    """
    check_source(path, option)
    with reading(option):
        cache = language.load_cache(path)
    assert cache.prompt_ids is not None
    return cache, cache.prompt_ids[0].tolist()


def _without_argument(message: str) -> str:
    """A message of the library without its argument name."""
    for name in ("path: ", "cache: ", "past_key_values: "):
        message = message.removeprefix(name)
    return message


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of two texts, in tokens."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def reuse(cache: TurboCache, cached: Sequence[int], ids: Sequence[int]) -> int:
    """Crop the cache to the prefix that it shares with the prompt `ids`; returns the number of remaining tokens.

    At least one token of the prompt is left to process, because its logits are needed. The end of the cached text can
    be tokenized differently in a longer prompt, so a shorter match is accepted; a match of less than half is treated
    as another text.

    Raises:
        InputError: the prompt is another text.
    """
    shared = shared_tokens(cached, ids)
    if 2 * shared < len(cached):
        raise InputError(
            f"--load-cache: expected a prompt that begins like the cached one ({number_of(len(cached), 'token')}), "
            f"got one that shares {shared:,} of its tokens"
        )
    kept = min(shared, len(ids) - 1)
    if kept < len(cached):
        try:
            cache.crop(kept - len(cached))
        except InputError as error:  # a sliding window has released tokens that the crop needs
            raise InputError(
                "--load-cache: expected a prompt that continues the cached one "
                f"({number_of(len(cached), 'token')}), since this model's sliding windows cannot go back far, got one "
                f"that shares {shared:,} of its tokens; run it without --load-cache"
            ) from error
    return kept
