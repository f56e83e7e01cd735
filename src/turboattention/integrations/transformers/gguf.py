"""Models in one GGUF file, as llama.cpp keeps them: transformers gives their weights back as floats."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...errors import InputError

_MAGIC = b"GGUF"


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of such a file, there or not."""
    return name.lower().endswith(".gguf")


def check_file(name: str) -> Path:
    """The file.

    Raises:
        InputError: there is none, or another kind of file.
        ModuleNotFoundError: without the packages that transformers reads it with.
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
        raise InputError(f"model: expected a GGUF file, got {name}, which begins otherwise")
    # Where one of these is missing, transformers says so in errors of several kinds.
    import accelerate  # noqa: F401
    import gguf  # noqa: F401

    return path


def load_gguf(path: Path, dtype: str) -> tuple[Any, dict[str, Any], Any]:
    """The model, transformers' report on its weights, and the tokenizer, all from this one file.

    Weights are dequantized to `dtype`; "auto" is float32, which loses nothing of them.

    Raises what transformers does.
    """
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    folder = str(path.resolve().parent)
    with redirect_stderr(io.StringIO()):  # a progress bar of its own, which no setting turns off
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="float32" if dtype == "auto" else dtype,
            output_loading_info=True,
            **_as_floats(),
            **options,
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return model, info, tokenizer


def _as_floats() -> dict[str, Any]:
    """Releases that can compute on packed weights are asked not to: the model is to be the same everywhere."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
