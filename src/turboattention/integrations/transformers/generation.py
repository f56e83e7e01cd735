"""Running a causal language model token by token, on its own cache or on a quantized one.

`model.generate` does the same for users; here prefill and decode are separate, so that they can be
timed, watched, forked and fed with given tokens.
"""

from __future__ import annotations

import copy
import inspect
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from ...calibration import Calibration
from ...config import TurboConfig
from ...errors import InputError
from .cache import TurboCache
from .gguf import check_file, is_gguf, load_gguf
from .registry import NAME, disable, enable

PREFILL_CHUNK = 4096
"""Tokens of a prompt that go through the model at once; bounds the memory of longer prompts."""

Progress = Callable[[int, int], None]
"""Called with the layers done and the layers to do."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in evaluation mode, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    own_attention: str

    @property
    def context(self) -> int | None:
        """Tokens it was made for; None where its config does not say."""
        size = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return size if isinstance(size, int) else None

    @property
    def stop_tokens(self) -> frozenset[int]:
        ids = self.model.generation_config.eos_token_id
        return frozenset([] if ids is None else ids if isinstance(ids, list) else [ids])

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        """Eight hex digits that identify the weights, computed from the beginning of every parameter."""
        crc = 0
        for parameter in self.model.parameters():
            crc = zlib.crc32(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes(), crc)
        return f"{crc:08x}"

    def use(self, attention: str) -> None:
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)

    def new_cache(
        self, config: TurboConfig | None, calibration: Calibration | None = None
    ) -> TurboCache | DynamicCache:
        """A quantized cache, or without `config` the model's own."""
        of_model = self.model.config
        if config is None:
            return DynamicCache(config=of_model)
        return TurboCache(of_model, config, calibration=calibration)

    def load_cache(self, path: Path) -> TurboCache:
        """A saved cache of this model, with the tokens it was made from in `prompt_ids`.

        Raises:
            FormatError, InputError: damaged, of another model, or saved without its tokens.
        """
        cache = TurboCache.load(path, self.model.config, device=self.model.device)
        if cache.prompt_ids is None or cache.prompt_ids.shape[0] != 1:
            raise InputError(f"cache: expected one prompt and its tokens in {path}, got a file without them")
        return cache


def load(name: str, device: str = "cpu", dtype: str = "auto") -> LanguageModel:
    """A model from a folder, a GGUF file, the local cache of the hub, or the hub.

    Raises:
        InputError: there is no such model, or it cannot be loaded.
        ModuleNotFoundError: a GGUF file, without the packages that read it.
    """
    file = check_file(name) if is_gguf(name) else None
    with _quiet():
        try:
            model, info, tokenizer = _load_named(name, dtype) if file is None else load_gguf(file, dtype)
        except InputError:
            raise
        except Exception as error:  # the libraries below raise different types
            raise InputError(_why_not(name, error)) from error
    if info["missing_keys"]:
        raise InputError(f"model: {name} has no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    model = model.to(device).eval()
    return LanguageModel(name, model, tokenizer, model.config._attn_implementation)


def _load_named(name: str, dtype: str) -> tuple[Any, dict[str, Any], Any]:
    options: dict[str, Any] = {"local_files_only": _local_only(name)}
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    return *loaded, AutoTokenizer.from_pretrained(name, **options)


@contextmanager
def enabled() -> Iterator[None]:
    """``attn_implementation="turbo"`` is registered inside."""
    enable()
    try:
        yield
    finally:
        disable()


class Run:
    """One sequence on its way through a model: what is cached, and the logits of the next token."""

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
        """Process the prompt, or what of it the cache does not hold yet."""
        pieces = [ids[at : at + PREFILL_CHUNK] for at in range(0, len(ids), PREFILL_CHUNK)]
        with _layer_progress(self.language.model, len(pieces), progress):
            for piece in pieces:
                self._forward(piece)

    def advance(self, token: int) -> None:
        """Take one more token."""
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
    """Tokens that a run gave (an end token included), and the seconds of all but the first."""

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

    `on_token` sees each before the run takes it, and ends the text by returning True; its time is not counted.
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
    """Keys and values of every layer that has some."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return [x for x in held if isinstance(x, Tensor)]


def _local_only(name: str) -> bool:
    """Whether to load only from this machine. Asks the hub once, since loading would retry for a long time."""
    if Path(name).is_dir():
        return True
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=10)
    except HFValidationError as error:
        raise InputError(
            f"model: expected a folder or a name such as org/model, got {name!r}: no such folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"model: {name} is neither a folder here nor a public model on the hub") from error
    except Exception:  # not reachable, by whichever client: the local cache of the hub may have it
        return True
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Load without the log lines and progress bars of transformers."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _layer_progress(model: Any, passes: int, progress: Progress | None) -> Iterator[None]:
    """Calls `progress` after each decoder layer, where the model has a list of them."""
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


def _why_not(name: str, error: Exception) -> str:
    """One line on a model that does not load."""
    folder = Path(name)
    if not folder.is_dir() and not is_gguf(name):
        return f"model: {name} is no folder here, and the hub could not be reached for it"
    if not is_gguf(name) and not (folder / "config.json").is_file():
        return f"model: expected a model's folder with a config.json, got {name}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"model: {name} cannot be loaded: {lines[0] if lines else type(error).__name__}"
