"""A causal language model with its tokenizer, from a folder, a GGUF file or the hub.

`open_model` reads the config and the tokenizer, which is enough for every check of a prompt, of a saved cache and of a
calibration; `Opened.load` then reads the weights, which takes most of the time.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from ...calibration import Calibration
from ...config import TurboConfig
from ...errors import InputError
from .cache import TurboCache
from .gguf import check_file, is_gguf, load_gguf, open_gguf

Loaded = tuple[Any, dict[str, Any]]
"""A model and transformers' loading report."""


class Described(ABC):
    """A causal language model without its weights: config and tokenizer."""

    name: str
    tokenizer: Any

    @property
    @abstractmethod
    def config(self) -> Any:
        """transformers' config of the model."""

    @property
    @abstractmethod
    def device(self) -> Any:
        """The device of the model and its caches."""

    @property
    def context(self) -> int | None:
        """The model's context length in tokens; None if its config does not state it."""
        size = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return size if isinstance(size, int) else None

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def new_cache(
        self, config: TurboConfig | None, calibration: Calibration | None = None
    ) -> TurboCache | DynamicCache:
        """A quantized cache, or without `config` the model's own.

        Raises:
            UnsupportedError: a model that `TurboCache` does not support. InputError: a calibration of another model.
        """
        if config is None:
            return DynamicCache(config=self.config)
        return TurboCache(self.config, config, calibration=calibration)

    def load_cache(self, path: Path) -> TurboCache:
        """A saved cache of this model, with the tokens it was made from in `prompt_ids`.

        Raises:
            FormatError, InputError: damaged, of another model, or saved without its tokens.
        """
        cache = TurboCache.load(path, self.config, device=self.device)
        if cache.prompt_ids is None or cache.prompt_ids.shape[0] != 1:
            raise InputError(f"cache: expected one prompt and its tokens in {path}, got a file without them")
        return cache


@dataclass(frozen=True)
class LanguageModel(Described):
    """A causal language model in evaluation mode, and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    own_attention: str

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> Any:
        return self.model.device

    @property
    def stop_tokens(self) -> frozenset[int]:
        ids = self.model.generation_config.eos_token_id
        return frozenset([] if ids is None else ids if isinstance(ids, list) else [ids])

    def fingerprint(self) -> str:
        """Eight hex digits that identify the weights, computed from the beginning of every parameter."""
        crc = 0
        for parameter in self.model.parameters():
            crc = zlib.crc32(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes(), crc)
        return f"{crc:08x}"

    def use(self, attention: str) -> None:
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)


class Opened(Described):
    """A causal language model whose weights are not loaded yet."""

    def __init__(self, name: str, config: Any, tokenizer: Any, device: str, weights: Callable[[], Loaded]):
        self.name, self.tokenizer = name, tokenizer
        self._config, self._device, self._weights = config, device, weights

    @property
    def config(self) -> Any:
        return self._config

    @property
    def device(self) -> Any:
        return self._device

    def load(self) -> LanguageModel:
        """Read the weights.

        Raises:
            InputError: they are missing, or cannot be read.
        """
        with _loading(self.name):
            model, info = self._weights()
        if info["missing_keys"]:
            raise InputError(f"model: {self.name} has no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
        model = model.to(self._device).eval()
        return LanguageModel(self.name, model, self.tokenizer, model.config._attn_implementation)


def open_model(name: str, device: str = "cpu", dtype: str = "auto") -> Opened:
    """The config and the tokenizer of a model from a folder, a GGUF file, the local cache of the hub, or the hub.

    device, dtype: what its weights are loaded to.

    Raises:
        InputError: there is no such model, or its config or tokenizer cannot be read.
        ModuleNotFoundError: a GGUF file, without the packages that read it.
    """
    file = check_file(name) if is_gguf(name) else None
    with _loading(name):
        if file is not None:
            return Opened(name, *open_gguf(file), device, partial(load_gguf, file, dtype))
        options: dict[str, Any] = {"local_files_only": _local_only(name)}
        config: Any = AutoConfig.from_pretrained(name, **options)
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
        weights: Any = partial(AutoModelForCausalLM.from_pretrained, name, dtype=dtype, output_loading_info=True)
        return Opened(name, config, tokenizer, device, partial(weights, **options))


def load(name: str, device: str = "cpu", dtype: str = "auto") -> LanguageModel:
    """`open_model`, with its weights."""
    return open_model(name, device, dtype).load()


def _local_only(name: str) -> bool:
    """Whether to load only from this machine. Asks the hub once, since loading would retry for a long time."""
    path = Path(name)
    if path.is_dir():
        return True
    if path.exists():
        raise InputError(
            f"model: expected a folder, a .gguf file or a name such as org/model, got {name!r}, another kind of file"
        )
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
def _loading(name: str) -> Iterator[None]:
    """Silence the logs, and convert the exceptions of several libraries to one class."""
    with _quiet():
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise InputError(_why_not(name, error)) from error


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


def _why_not(name: str, error: Exception) -> str:
    """A one-line message for a model that cannot be loaded."""
    folder = Path(name)
    if not folder.is_dir() and not is_gguf(name):
        return f"model: {name} is no folder here, and the hub could not be reached for it"
    if not is_gguf(name) and not (folder / "config.json").is_file():
        return f"model: expected a model's folder with a config.json, got {name}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"model: {name} cannot be loaded: {lines[0] if lines else type(error).__name__}"
