"""A causal language model with its tokenizer, from a folder, a GGUF file or the hub."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from ...calibration import Calibration
from ...config import TurboConfig
from ...errors import InputError
from .cache import TurboCache
from .gguf import check_file, is_gguf, load_gguf


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
    """One line on a model that does not load."""
    folder = Path(name)
    if not folder.is_dir() and not is_gguf(name):
        return f"model: {name} is no folder here, and the hub could not be reached for it"
    if not is_gguf(name) and not (folder / "config.json").is_file():
        return f"model: expected a model's folder with a config.json, got {name}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"model: {name} cannot be loaded: {lines[0] if lines else type(error).__name__}"
