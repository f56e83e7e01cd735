"""A document for questions, as the start of a conversation, and its cache."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from . import cache_file
from .plain import Start
from .progress import Bars

if TYPE_CHECKING:
    from ..integrations.transformers.chat import Message
    from ..integrations.transformers.generation import Run
    from ..integrations.transformers.language_model import Described


class Document:
    """A document in the model's chat template.

    prefix: the token ids at the start of every question's prompt. option: the option that named it, for messages.

    Raises:
        InputError: the model has no chat template.
    """

    def __init__(self, language: Described, text: str, option: str = "--file"):
        from ..integrations.transformers import chat

        chat.check_template(language)
        self._language, self._text, self._option = language, text.strip(), option
        one, other = self.ids("0"), self.ids("a")
        self.prefix = one[: cache_file.shared_tokens(one, other)]

    def ids(self, question: str) -> list[int]:
        """The whole prompt: the document, a question, and the prefix of the answer."""
        from ..integrations.transformers import chat

        return chat.encode(self._language, chat.render(self._language, _about(self._text, question)))

    def check_length(self, question: str, new_tokens: int) -> list[int]:
        """`ids`, if they and an answer fit into the context. Raises InputError."""
        ids, context = self.ids(question), self._language.context
        if context is not None and len(ids) + new_tokens > context:
            raise InputError(
                f"{self._option}: expected at most {context:,} tokens (the model's context) with a question and "
                f"{new_tokens:,} tokens of an answer, got {len(ids) + new_tokens:,}"
            )
        return ids

    def load(self, path: Path) -> Start:
        """The cache in a file of this document or of its beginning.

        Raises:
            InputError, FormatError: the file of another model or document.
        """
        cache, held = cache_file.load(self._language, path)
        kept = cache_file.reuse(cache, held, [*self.prefix, _QUESTION])  # whose beginning may be there as a whole
        return Start(self.prefix, cache, kept)


def _about(text: str, question: str) -> list[Message]:
    # In the user's message, because not every template supports a system message.
    return [{"role": "user", "content": f"{text}\n\n{question.strip()}"}]


_QUESTION = -1
"""The first token of any question behind a document."""


@dataclass(frozen=True)
class Ready:
    """A cache with a document, from which every question starts.

    loaded: tokens that came from a file. seconds: the time for reading the others.
    """

    document: Document
    run: Run
    loaded: int
    seconds: float

    @classmethod
    def read(cls, document: Document, run: Run, bars: Bars, label: str = "", loaded: int = 0) -> Ready:
        """Read the document, of which `loaded` tokens are in the cache already."""
        if loaded == len(document.prefix):
            return cls(document, run, loaded, 0.0)
        with bars.task(f"{label}Reading the document") as update:
            begun = time.perf_counter()
            run.prefill(document.prefix[loaded:], update)
            return cls(document, run, loaded, time.perf_counter() - begun)

    @cached_property
    def stop(self) -> frozenset[int]:
        """The tokens that end an answer."""
        from ..integrations.transformers import chat

        return chat.stop_tokens(self.run.language)

    def ask(self, ids: list[int]) -> tuple[Run, int]:
        """A copy for one question, and the number of prompt tokens that it already contains."""
        from ..integrations.transformers.generation import Run

        cache, held = copy.deepcopy(self.run.cache), self.document.prefix
        shared = min(cache_file.shared_tokens(held, ids), len(ids) - 1)
        if shared < len(held):
            cache.crop(shared - len(held))
        return Run(self.run.language, cache), shared
