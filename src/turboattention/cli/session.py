"""A conversation and its quantized cache: turns, saving and loading."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import cache_file
from .interrupt import Interrupt
from .plain import Result, Start, config_of, continue_text
from .progress import Bars
from .settings import Setting, bits_label

if TYPE_CHECKING:
    from ..integrations.transformers.cache import TurboCache
    from ..integrations.transformers.chat import Message
    from ..integrations.transformers.generation import Sampler
    from ..integrations.transformers.language_model import Described, LanguageModel

_KIND = "conversation"


class Session:
    """A conversation and its cache.

    Raises:
        InputError: the model has no chat template.
    """

    def __init__(self, language: LanguageModel, setting: Setting, system: str | None):
        from ..integrations.transformers import chat

        self._language, self._setting, self._system = language, setting, system
        self._stop = chat.stop_tokens(language)
        self.clear()

    @property
    def about(self) -> str:
        """A description of the model and its cache, shown at the start."""
        config = self._setting.config if self._cache is None else config_of(self._cache)
        return f"{self._language.name}, KV cache of {bits_label(config.bits)}"

    @property
    def turns(self) -> int:
        return sum(message["role"] == "assistant" for message in self._conversation.messages)

    @property
    def tokens(self) -> int:
        return len(self._conversation.ids)

    def clear(self) -> None:
        """Start a new conversation with the system prompt."""
        from ..integrations.transformers import chat

        check_conversation(self._language, self._system)
        self._conversation = chat.Conversation(self._language, _system(self._system))
        self._cache: TurboCache | None = None

    def answer(
        self,
        question: str,
        limit: int,
        sampler: Sampler,
        bars: Bars,
        write: Callable[[str], None],
        interrupt: Interrupt,
    ) -> Result:
        """One turn. After an exception the conversation is unchanged.

        Raises:
            InputError: the conversation is longer than the model's context. KeyboardInterrupt: from `interrupt`.
        """
        from ..integrations.transformers.generation import Run

        ids = self._conversation.ask(question)
        context = self._language.context
        if context is not None and len(ids) >= context:
            raise InputError(
                f"conversation: expected less than the model's context of {context:,} tokens, got {len(ids):,}; "
                "/clear starts over"
            )
        room = limit if context is None else min(limit, context - len(ids))
        start = self._start(ids)
        result = continue_text(
            self._language, start, room, sampler, bars, write=write, stop=self._stop, enough=interrupt.enough
        )
        said = result.tokens[:-1] if result.ended else result.tokens
        if not result.ended:  # the last token was generated, but not read
            Run(self._language, start.cache).advance(said[-1])
        self._conversation.take(question, ids, said)
        self._cache = start.cache
        return result

    def _start(self, ids: list[int]) -> Start:
        """A copy of the cache, cropped to the tokens that the template still renders in the same way."""
        shared = cache_file.shared_tokens(self._conversation.ids, ids)
        if self._cache is None or not shared:
            return Start(ids, self._language.new_cache(self._setting.config, self._setting.calibration))  # type: ignore[arg-type]
        cache = copy.deepcopy(self._cache)
        shared = min(shared, len(ids) - 1)
        if shared < len(self._conversation.ids):
            cache.crop(shared - len(self._conversation.ids))
        return Start(ids, cache, shared)

    def save(self, path: Path) -> None:
        """Save the conversation and its cache to one file.

        Raises:
            InputError: there is no turn yet, or the file cannot be written.
        """
        import torch

        from ..integrations.transformers.serialization import save_cache

        if self._cache is None:
            raise InputError("/save: expected a conversation of at least one turn, got none")
        cache_file.check_target(path, "/save")
        conversation = self._conversation
        notes = {
            "kind": _KIND,
            "messages": conversation.messages,
            "text": conversation.text,
            "weights": self._language.fingerprint(),
        }
        with cache_file.writing("/save", path):
            save_cache(self._cache, path, torch.tensor([conversation.ids]), notes)

    def load(self, path: Path) -> None:
        """Continue a saved conversation, with its widths and its system prompt.

        Raises:
            InputError, FormatError: the file does not exist, is damaged, of another model, or not a conversation. The
                current conversation is then unchanged.
        """
        self.take(Kept.read(self._language, path))

    def take(self, kept: Kept) -> None:
        """Continue a conversation that was read from a file. Raises InputError for one with other weights."""
        from ..integrations.transformers.chat import Conversation

        if kept.notes["weights"] != self._language.fingerprint():
            raise InputError(
                f"{kept.option}: expected a conversation with {self._language.name}, got one with other weights"
            )
        self._conversation = Conversation(self._language, kept.notes["messages"], kept.ids, kept.notes["text"])
        self._cache = kept.cache


@dataclass(frozen=True)
class Kept:
    """A conversation in a file: its cache, the token ids in it, and the further fields of `Session.save`.

    option: the option that named the file, for messages.
    """

    cache: TurboCache
    ids: list[int]
    notes: dict[str, Any]
    option: str

    @classmethod
    def read(cls, language: Described, path: Path, option: str = "/load") -> Kept:
        """Raises InputError, FormatError: the file does not exist, is damaged, of another model, or not a
        conversation."""
        from ..integrations.transformers.serialization import read_notes

        cache, ids = cache_file.load(language, path, option)
        notes = read_notes(path)
        if not isinstance(notes, dict) or notes.get("kind") != _KIND:
            raise InputError(f"{option}: expected a conversation that /save kept, got another saved cache: {path}")
        return cls(cache, ids, notes, option)


def check_conversation(language: Described, system: str | None) -> None:
    """Raises InputError for a model without a chat template, or whose template does not take a system prompt."""
    from ..integrations.transformers import chat

    chat.render(language, [*_system(system), {"role": "user", "content": "0"}])


def _system(text: str | None) -> list[Message]:
    return [] if text is None else [{"role": "system", "content": text}]
