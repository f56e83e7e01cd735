"""Question sets as conversations: worked examples as earlier turns, in a model's chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from ...errors import InputError
from .question import Example, QuestionSet

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]
"""A conversation as text; with True as second argument, followed by the prefix of the next answer."""


def as_conversation(questions: QuestionSet, render: Render) -> QuestionSet:
    """The same questions, each as the user's turn after the examples; instructions are the system message.

    Raises:
        InputError: the template refuses the conversation, or renders earlier turns differently as it goes on.
    """
    system = [_message("system", questions.head)] if questions.head else []
    turns = list(system)
    texts = []
    for example in questions.examples:
        turns += [_message("user", example.prompt), _message("assistant", example.solution)]
        texts.append(render(turns, False))
    asked = [_message("user", question.prompt) for question in questions.questions]
    prompts = [_added(texts[-1] if texts else "", render([*turns, message], True)) for message in asked]
    # What precedes the first turn: the system message, or the template's own.
    alone = render([*system, asked[0]], True)
    head = alone.removesuffix(prompts[0])
    return replace(
        questions,
        head=head,
        examples=tuple(Example("", _added(before, text)) for before, text in pairwise([head, *texts])),
        questions=tuple(replace(q, prompt=prompt) for q, prompt in zip(questions.questions, prompts, strict=True)),
        stops=(),
        chat=True,
    )


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text.strip()}


def _added(before: str, text: str) -> str:
    if not text.startswith(before):
        raise InputError(
            "model: expected a chat template that renders earlier turns the same as a conversation goes on, got one "
            "that does not"
        )
    return text[len(before) :]
