"""A transformers language model as the subject of an evaluation: tokens in, logits out, over any method's cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ... import bundled
from ...integrations.transformers import chat
from ...integrations.transformers.generation import PREFILL_CHUNK
from ...integrations.transformers.language_model import Described, LanguageModel
from ...integrations.transformers.recording import recorded_attention
from ..baselines import CacheMethod
from ..baselines.kinds import FittedMethod
from ..baselines.oscar import Moments, moments
from ..questions import Render
from ..subject import PIECE
from .batched import Row, can_go_together, forward_together
from .head_errors import head_errors

FITTED_TO = 2048
"""Tokens of the bundled text for fitting methods that need a calibration."""


def begin_tokens(language: Described, begin: str | None) -> list[int]:
    """The tokens before every text: those of `begin`; None: BOS if the tokenizer adds it."""
    if begin is not None:
        return chat.encode(language, begin)
    # Many tokenizers define a BOS token but do not add it, Qwen2.5's <|endoftext|> for example.
    tokenizer = language.tokenizer
    ids = tokenizer("", verbose=False)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def renderer(language: Described, begin: str | None) -> Render:
    """Renders conversations in the model's chat template, without the BOS token if texts begin with tokens already.

    The returned function raises InputError if the model has no template, or the template rejects the conversation.
    """
    bos = (language.tokenizer.bos_token or "") if begin_tokens(language, begin) else ""

    def render(messages: Sequence[chat.Message], answer: bool) -> str:
        return chat.render(language, messages, answer=answer).removeprefix(bos)

    return render


class TransformersSubject:
    """Implements `evaluation.subject.Subject`. "turbo" must be enabled while it is used.

    Args:
        begin: a prefix of every text, with special tokens by name; None: the BOS token if the tokenizer adds one.
        chats: questions are conversations, so that the end of a turn ends an answer.
    """

    def __init__(self, language: LanguageModel, begin: str | None = None, *, chats: bool = False):
        self.language, self._begin, self._chats = language, begin, chats
        self._moments: list[Moments] = []

    @property
    def name(self) -> str:
        return self.language.name

    @property
    def context(self) -> int | None:
        return self.language.context

    @property
    def vocabulary(self) -> int:
        return int(self.language.model.config.get_text_config(decoder=True).vocab_size)

    @property
    def begin(self) -> list[int]:
        return begin_tokens(self.language, self._begin)

    @property
    def stop_tokens(self) -> frozenset[int]:
        return self._stop_tokens

    @cached_property
    def _stop_tokens(self) -> frozenset[int]:  # asked for after every token of an answer, and slow to find
        return chat.stop_tokens(self.language) if self._chats else self.language.stop_tokens

    def encode(self, text: str) -> list[int]:
        return chat.encode(self.language, text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.language.decode(ids)

    def open(self, method: CacheMethod) -> MethodSession:
        return MethodSession(self.language, self.fitted(method))

    def fitted(self, method: CacheMethod) -> CacheMethod:
        """The method, fitted to this model if it needs to be."""
        if not isinstance(method, FittedMethod):
            return method
        if not self._moments:
            self.language.use(self.language.own_attention)
            ids = [*self.begin, *self.encode(bundled.text())][: min(FITTED_TO, self.context or FITTED_TO)]
            self._moments = attention_moments(self.language.model, ids)
        return method.fitted(self._moments)

    @torch.inference_mode()
    def feed_together(self, sessions: Sequence[Any], ids: Sequence[Sequence[int]], *, last: bool = False) -> Tensor:
        if not can_go_together(self.language.own_attention):
            rows = [
                session.forward(row)[-1:] if last else session.forward(row)
                for session, row in zip(sessions, ids, strict=True)
            ]
            return torch.stack(rows).float().cpu()
        rows = [Row(one.method.name, one.cache, one.attention) for one in sessions]
        return forward_together(self.language, rows, ids, last).float().cpu()

    def head_errors(self, method: CacheMethod, ids: Sequence[int], skip: int) -> list[list[float]]:
        return head_errors(self.language.model, self.open, method, ids, skip)


class MethodSession:
    """One text in progress: the model, and a method's cache of its tokens so far."""

    def __init__(self, language: LanguageModel, method: CacheMethod, cache: Any = None):
        self._language, self.method = language, method
        self.cache = method.make_cache(language.model.config) if cache is None else cache
        self.attention = method.attention or language.own_attention

    def read(self, ids: Sequence[int]) -> None:
        for at in range(0, len(ids), PREFILL_CHUNK):
            self.forward(ids[at : at + PREFILL_CHUNK], logits_to_keep=1)

    def feed(self, ids: Sequence[int]) -> Tensor:
        pieces = [self.forward(ids[at : at + PIECE]) for at in range(0, len(ids), PIECE)]
        return torch.cat(pieces).float().cpu()

    def fork(self) -> MethodSession:
        return MethodSession(self._language, self.method, copy.deepcopy(self.cache))

    @property
    def bits_per_element(self) -> float:
        return self.method.bits_per_element(self.cache)

    @torch.inference_mode()
    def forward(self, ids: Sequence[int], **options: Any) -> Tensor:
        """Logits [L, V] of one piece, in the model's dtype."""
        model = self._language.model
        # Sessions with different attention implementations alternate, so each call sets its own.
        self._language.use(self.attention)
        tokens = torch.tensor([list(ids)], device=model.device)
        return model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **options).logits[0]


@torch.no_grad()
def attention_moments(model: Any, ids: Sequence[int]) -> list[Moments]:
    """The moments of each layer of the model's cache, over one text."""
    with recorded_attention(model) as seen:
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
    return [moments(seen[layer].q, seen[layer].k, seen[layer].v) for layer in sorted(seen)]
