"""Running a causal language model token by token, on its own cache or on a quantized one.

`model.generate` does the same for users; here prefill and decode are separate, so that they can be
timed, watched, forked and fed with given tokens.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .cache import TurboCache
from .language_model import LanguageModel
from .registry import NAME

PREFILL_CHUNK = 4096
"""Tokens of a prompt that go through the model at once; bounds the memory of longer prompts."""

Progress = Callable[[int, int], None]
"""Called with the layers done and the layers to do."""


class Run:
    """A sequence in progress: its cache, and the logits of the next token."""

    def __init__(self, language: LanguageModel, cache: TurboCache | DynamicCache):
        self.language, self.cache = language, cache
        self.logits = torch.empty(0)

    def fork(self) -> Run:
        """An independent run in the same state. Quantized caches share their compressed blocks, others are copied."""
        other = Run(self.language, copy.deepcopy(self.cache))
        other.logits = self.logits
        return other

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        if isinstance(self.cache, TurboCache):
            return self.cache.nbytes
        return sum(x.nbytes for x in _own_tensors(self.cache))

    @property
    def kv_bytes_fp16(self) -> int:
        """Bytes of the same keys and values at 2 bytes each."""
        if isinstance(self.cache, TurboCache):
            return self.cache.fp16_nbytes
        return sum(2 * x.numel() for x in _own_tensors(self.cache))

    def prefill(self, ids: Sequence[int], progress: Progress | None = None) -> None:
        """Process the tokens of the prompt that are not in the cache yet."""
        pieces = [ids[at : at + PREFILL_CHUNK] for at in range(0, len(ids), PREFILL_CHUNK)]
        with _layer_progress(self.language.model, len(pieces), progress):
            for piece in pieces:
                self._forward(piece)

    def advance(self, token: int) -> None:
        """Process one more token."""
        self._forward([token])

    @torch.inference_mode()
    def _forward(self, ids: Sequence[int]) -> None:
        model = self.language.model
        self.language.use(NAME if isinstance(self.cache, TurboCache) else self.language.own_attention)
        options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        tokens = torch.tensor([ids], device=model.device)
        out = model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **options)
        self.logits = out.logits[0, -1].float().cpu()


@dataclass(frozen=True)
class Sampler:
    """Chooses a token: the likeliest at temperature 0, else at random among the `top_p` likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __call__(self, logits: Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        odds, order = torch.softmax(logits / self.temperature, -1).sort(descending=True)
        # The token that reaches top_p is kept: the sum before it is below top_p.
        odds = odds.where(odds.cumsum(-1) - odds < self.top_p, 0.0)
        return int(order[torch.multinomial(odds, 1, generator=self.generator)])


@dataclass(frozen=True)
class Generation:
    """The generated tokens (including an end token), and the seconds for all but the first."""

    tokens: list[int]
    ended: bool
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; None without a second token."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds else None


def generate(
    run: Run,
    limit: int,
    pick: Callable[[Tensor], int] | None = None,
    on_token: Callable[[int], bool | None] | None = None,
    stop: frozenset[int] | None = None,
) -> Generation:
    """Up to `limit` tokens after a prefill, or to one of `stop`, by default the model's stop tokens.

    `on_token` is called with each token before the run processes it, and ends the text by returning True; its time is
    not counted.
    """
    pick = pick or Sampler()
    stop = run.language.stop_tokens if stop is None else stop
    token, tokens, seconds = pick(run.logits), [], 0.0
    while True:
        tokens.append(token)
        enough = on_token is not None and on_token(token) is True
        ended = token in stop
        if ended or enough or len(tokens) == limit:
            return Generation(tokens, ended, seconds)
        start = time.perf_counter()
        run.advance(token)
        token = pick(run.logits)
        seconds += time.perf_counter() - start


def _own_tensors(cache: DynamicCache) -> list[Tensor]:
    """Keys and values of all layers that have them."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return [x for x in held if isinstance(x, Tensor)]


@contextmanager
def _layer_progress(model: Any, passes: int, progress: Progress | None) -> Iterator[None]:
    """Calls `progress` after each decoder layer, if the model has a list of them."""
    layers = getattr(model.get_decoder(), "layers", None)
    if progress is None or layers is None:
        yield
        return
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        progress(done, passes * len(layers))

    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
