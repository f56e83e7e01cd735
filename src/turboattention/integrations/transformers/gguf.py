"""Models in a single GGUF file (llama.cpp's format), whose weights transformers dequantizes to floats."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ...errors import InputError

_MAGIC = b"GGUF"


def is_gguf(name: str) -> bool:
    """Whether a model's name is the name of a GGUF file; the file need not exist."""
    return name.lower().endswith(".gguf")


def check_file(name: str) -> Path:
    """The path of the file, after a check of its magic bytes.

    Raises:
        InputError: the file does not exist, or is not a GGUF file.
        ModuleNotFoundError: a package that transformers needs for reading it is missing.
    """
    path = Path(name)
    if not path.is_file():
        raise InputError(f"model: expected a GGUF file, got {name}: {'a folder' if path.is_dir() else 'no such file'}")
    try:
        with path.open("rb") as file:
            begin = file.read(len(_MAGIC))
    except OSError as error:
        raise InputError(f"model: {name} cannot be read: {error.strerror or error}") from error
    if begin != _MAGIC:
        raise InputError(f"model: expected a GGUF file, got {name}, which does not begin with GGUF")
    # If one of these is missing, transformers raises errors of several kinds.
    import accelerate  # noqa: F401
    import gguf  # noqa: F401

    return path


def open_gguf(path: Path) -> tuple[Any, Any]:
    """The config and the tokenizer, both from this file. Raises the errors of transformers."""
    folder, options = _place(path)
    return AutoConfig.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder, **options)


def load_gguf(path: Path, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' loading report.

    Weights are dequantized to `dtype`; "auto" is float32, which represents them exactly.

    Raises the errors of transformers.
    """
    folder, options = _place(path)
    with redirect_stderr(io.StringIO()):  # transformers' progress bar, which no setting disables
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="float32" if dtype == "auto" else dtype,
            output_loading_info=True,
            **_as_floats(),
            **options,
        )
    return loaded


def _place(path: Path) -> tuple[str, dict[str, Any]]:
    """The arguments with which transformers loads the file."""
    return str(path.resolve().parent), {"gguf_file": path.name, "local_files_only": True}


def _as_floats() -> dict[str, Any]:
    """Disables computing on packed weights in releases that can, so that the model is the same in all releases."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
