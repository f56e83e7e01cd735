"""Generation with a quantized cache: streamed text, then time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..words import number_of
from . import cache_file
from .output import bytes_text, guard_warnings, note, number_text
from .progress import Bars
from .stream import TokenText

if TYPE_CHECKING:
    from ..config import TurboConfig
    from ..integrations.transformers.cache import TurboCache
    from ..integrations.transformers.generation import Sampler
    from ..integrations.transformers.language_model import LanguageModel


@dataclass(frozen=True)
class Start:
    """A prompt and its cache, which already contains the first `reused` tokens."""

    ids: list[int]
    cache: TurboCache
    reused: int = 0


@dataclass(frozen=True)
class Result:
    """The result of a generation. `kv_bytes` are allocated, `kv_bytes_fp16` the same elements at 2 bytes.

    `late`: the `warnings` that were issued while the text was written, and are shown after it.
    """

    text: str
    tokens: list[int]
    ended: bool
    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    decode_tokens_per_second: float | None
    kv_bytes: int
    kv_bytes_fp16: int
    config: TurboConfig
    warnings: list[str]
    late: list[str]

    def as_json(self) -> dict[str, Any]:
        ratio = self.kv_bytes_fp16 / self.kv_bytes
        figures = {"new_tokens": len(self.tokens), "ratio": ratio, "bits_per_element": 16 / ratio}
        fields = asdict(self)
        del fields["late"]
        return fields | figures

    def show_cost(self, turn: str = "") -> None:
        """Print late warnings and the summary on stderr, below the text."""
        for text in self.late:
            note(text, "warning")
        note(f"{turn}{self.summary()}")

    def summary(self) -> str:
        reused = f" ({self.reused_tokens:,} from the cache)" if self.reused_tokens else ""
        ratio = self.kv_bytes_fp16 / self.kv_bytes
        speed = f" at {number_text(self.decode_tokens_per_second)} tokens/s" if self.decode_tokens_per_second else ""
        return (
            f"prompt of {number_of(self.prompt_tokens, 'token')}{reused} in {self.prefill_seconds:.2f} s, "
            f"{len(self.tokens):,} new{speed}; KV cache {bytes_text(self.kv_bytes)}, "
            f"{size_text(ratio, self.prompt_tokens + len(self.tokens), self.config)} "
            f"({16 / ratio:.2f} bits per element)"
        )


def size_text(ratio: float, tokens: int, config: TurboConfig) -> str:
    """A size relative to FP16. Before the first block is compressed, a cache is larger: its tokens are INT8 and, until
    the guard has checked that block, also in the model's own dtype."""
    if ratio >= 1:
        return f"{ratio:.2f}x below FP16"
    first = config.sink_tokens + config.block_size + config.flush_lag
    why = f", as compression begins with token {first}" if tokens <= first else ""
    return f"{1 / ratio:.2f}x above FP16{why}"


def continue_text(
    language: LanguageModel,
    start: Start,
    limit: int,
    sampler: Sampler,
    bars: Bars,
    *,
    save_to: Path | None = None,
    write: Callable[[str], None] | None = None,
    stop: frozenset[int] | None = None,
    enough: Callable[[], bool] | None = None,
) -> Result:
    """Process the prompt, save its cache if requested, then generate up to `limit` tokens and pass them to `write`.

    Generation ends early after one of `stop`, by default the model's stop tokens, or after the token at which `enough`
    returns true.
    """
    from ..integrations.transformers.generation import Generation, Run, generate

    run = Run(language, start.cache)
    with guard_warnings(show=write is not None) as said:
        with bars.task("Reading the prompt") as update:
            begun = time.perf_counter()
            run.prefill(start.ids[start.reused :], update)
            seconds = time.perf_counter() - begun
        if save_to is not None:
            with bars.task("Saving the cache"):
                cache_file.save(start.cache, start.ids, save_to)
            if write is not None:
                note(cache_file.saved_text(save_to, len(start.ids)))
    with guard_warnings(show=False) as late:
        stream = TokenText(language.decode, write or _nowhere)

        def on_token(token: int) -> bool:
            stream.add(token)
            return enough is not None and enough()

        nothing = Generation([], ended=False, seconds=0.0)
        generation = generate(run, limit, sampler, on_token, stop) if limit else nothing
        stream.finish()
    return Result(
        text=language.decode(generation.tokens),
        tokens=generation.tokens,
        ended=generation.ended,
        prompt_tokens=len(start.ids),
        reused_tokens=start.reused,
        prefill_seconds=seconds,
        decode_tokens_per_second=generation.tokens_per_second,
        kv_bytes=run.kv_bytes,
        kv_bytes_fp16=run.kv_bytes_fp16,
        config=config_of(start.cache),
        warnings=list(dict.fromkeys([*said, *late])),
        late=list(dict.fromkeys(late)),
    )


def config_of(cache: TurboCache) -> TurboConfig:
    """The configuration of its first layer, or of the file."""
    layer = cache.attention_layers[0]
    return layer.config if layer.kv is None else layer.kv.config


def _nowhere(_: str) -> None:
    pass
