"""Conversations, rendered with a model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...bundled import model_path
from ...errors import InputError
from .language_model import Described, LanguageModel

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``"""


def check_template(language: Described) -> None:
    """Raises InputError for a model without a chat template."""
    if not getattr(language.tokenizer, "chat_template", None):
        bundled = language.name == str(model_path())
        what = "the bundled test model" if bundled else language.name
        advice = "; name a chat model (--model)" if bundled else ""
        raise InputError(f"model: expected one with a chat template, got {what}, which has none{advice}")


def render(language: Described, messages: Sequence[Message], *, answer: bool = True) -> str:
    """The conversation as text; with `answer`, including the prefix of the model's answer.

    Raises:
        InputError: the template rejects it (some reject a system message).
    """
    check_template(language)
    try:
        text: Any = language.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # templates raise exceptions of any kind
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"model: the chat template of {language.name} refuses this conversation: {said}") from error
    return text


def encode(language: Described, text: str) -> list[int]:
    """Token ids of rendered text, which already contains its special tokens."""
    return list(language.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def stop_tokens(language: LanguageModel) -> frozenset[int]:
    """Tokens that end an answer: the model's stop tokens, and the special token after answers in its template."""
    asked: list[Message] = [{"role": "user", "content": "0"}]
    begin = render(language, asked)
    whole = render(language, [*asked, {"role": "assistant", "content": "0"}], answer=False)
    ids = encode(language, whole[len(begin) + 1 :]) if whole.startswith(f"{begin}0") else []
    special = set(ids[:1]) & set(language.tokenizer.all_special_ids)
    return language.stop_tokens | special


class Conversation:
    """Messages, and their tokens so far.

    messages: the turns; the caller keeps track of whose turn is next.
    ids, text: the contents of this conversation's cache, as token ids and as rendered text.
    """

    def __init__(self, language: Described, messages: Sequence[Message] = (), ids: Sequence[int] = (), text: str = ""):
        self._language = language
        self.messages, self.ids, self.text = list(messages), list(ids), text

    def ask(self, question: str) -> list[int]:
        """Token ids of the conversation, followed by `question` and the prefix of its answer. Changes nothing.

        Existing tokens are kept as the model generated them, and only new text is encoded. If the template now
        renders earlier messages differently, everything is encoded again.
        """
        text = render(self._language, [*self.messages, {"role": "user", "content": question}])
        if self.text and text.startswith(self.text):
            return self.ids + encode(self._language, text[len(self.text) :])
        return encode(self._language, text)

    def take(self, question: str, ids: Sequence[int], answer: Sequence[int]) -> None:
        """Add a turn: the `ids` returned by `ask`, and the tokens of the answer without its stop token."""
        said = self._language.decode(answer)
        asked = [*self.messages, {"role": "user", "content": question}]
        self.text = render(self._language, asked) + said
        self.ids = [*ids, *answer]
        self.messages = [*asked, {"role": "assistant", "content": said}]
