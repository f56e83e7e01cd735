"""A document that questions are about, as the beginning of a conversation, and its cache."""

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
    from ..integrations.transformers.generation import LanguageModel, Run


class Document:
    """Asked about in the model's chat template.

    prefix: the token ids that every question's prompt begins with.

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
        """The whole prompt: the document, a question, and the beginning of the answer."""
        from ..integrations.transformers import chat

        return chat.encode(self._language, chat.render(self._language, _about(self._text, question)))

    def check_length(self, question: str, new_tokens: int) -> list[int]:
        """`ids`, where they and an answer fit. Raises InputError."""
        ids, context = self.ids(question), self._language.context
        if context is not None and len(ids) + new_tokens > context:
            raise InputError(
                f"--file: expected at most {context:,} tokens (the model's context) with a question and "
                f"{new_tokens:,} tokens of an answer, got {len(ids) + new_tokens:,}"
            )
        return ids


def _about(text: str, question: str) -> list[Message]:
    # In the user's message, since not every template knows a system's.
    return [{"role": "user", "content": f"{text}\n\n{question.strip()}"}]


@dataclass(frozen=True)
class Ready:
    """A cache that holds a document: what every question starts from.

    seconds: what reading the document took; 0 where it came from a file.
    """

    document: Document
    run: Run
    held: list[int]
    seconds: float

    @classmethod
    def read(cls, document: Document, run: Run, bars: Bars, label: str = "") -> Ready:
        """Through the model once."""
        with bars.task(f"{label}Reading the document") as update:
            begun = time.perf_counter()
            run.prefill(document.prefix, update)
            return cls(document, run, document.prefix, time.perf_counter() - begun)

    @classmethod
    def load(cls, document: Document, language: LanguageModel, path: Path) -> Ready:
        """From a file. Raises InputError, FormatError for another model's, or another document's."""
        from ..integrations.transformers.generation import Run

        cache, held = cache_file.load(language, path)
        kept = cache_file.reuse(cache, held, document.prefix)
        return cls(document, Run(language, cache), held[:kept], 0.0)

    def ask(self, ids: list[int]) -> tuple[Run, int]:
        """A copy for one question, and how many tokens of its prompt are there already."""
        from ..integrations.transformers.generation import Run

        cache = copy.deepcopy(self.run.cache)
        shared = min(cache_file.shared_tokens(self.held, ids), len(ids) - 1)
        if shared < len(self.held):
            cache.crop(shared - len(self.held))
        return Run(self.run.language, cache), shared
