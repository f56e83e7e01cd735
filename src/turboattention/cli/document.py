"""A document for questions, as the start of a conversation, and its cache."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from . import cache_file
from .progress import Bars

if TYPE_CHECKING:
    from ..integrations.transformers.chat import Message
    from ..integrations.transformers.generation import Run
    from ..integrations.transformers.language_model import LanguageModel


class Document:
    """A document in the model's chat template.

    prefix: the token ids at the start of every question's prompt.

    Raises:
        InputError: the model has no chat template.
    """

    def __init__(self, language: LanguageModel, text: str):
        from ..integrations.transformers import chat

        chat.check_template(language)
        self._language, self._text = language, text.strip()
        self.stop = chat.stop_tokens(language)
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
                f"--file: expected at most {context:,} tokens (the model's context) with a question and "
                f"{new_tokens:,} tokens of an answer, got {len(ids) + new_tokens:,}"
            )
        return ids


def _about(text: str, question: str) -> list[Message]:
    # In the user's message, because not every template supports a system message.
    return [{"role": "user", "content": f"{text}\n\n{question.strip()}"}]


@dataclass(frozen=True)
class Ready:
    """A cache with a document, from which every question starts.

    seconds: the time for reading the document; 0 if the cache was loaded from a file.
    """

    document: Document
    run: Run
    held: list[int]
    seconds: float

    @classmethod
    def read(cls, document: Document, run: Run, bars: Bars, label: str = "") -> Ready:
        """Read the document."""
        with bars.task(f"{label}Reading the document") as update:
            begun = time.perf_counter()
            run.prefill(document.prefix, update)
            return cls(document, run, document.prefix, time.perf_counter() - begun)

    @classmethod
    def load(cls, document: Document, language: LanguageModel, path: Path) -> Ready:
        """From a file. Raises InputError or FormatError for the file of another model or document."""
        from ..integrations.transformers.generation import Run

        cache, held = cache_file.load(language, path)
        kept = cache_file.reuse(cache, held, document.prefix)
        return cls(document, Run(language, cache), held[:kept], 0.0)

    def ask(self, ids: list[int]) -> tuple[Run, int]:
        """A copy for one question, and the number of prompt tokens that it already contains."""
        from ..integrations.transformers.generation import Run

        cache = copy.deepcopy(self.run.cache)
        shared = min(cache_file.shared_tokens(self.held, ids), len(ids) - 1)
        if shared < len(self.held):
            cache.crop(shared - len(self.held))
        return Run(self.run.language, cache), shared
