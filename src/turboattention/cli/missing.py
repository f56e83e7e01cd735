"""Optional packages that commands need."""

from __future__ import annotations

from importlib.util import find_spec

INSTALL = 'pip install ".[all]" in a clone of the repository'

OPTIONAL = {
    "typer": "the command line",
    "rich": "the command line",
    "transformers": "generate, and models in general",
    "matplotlib": "plots",
    "gguf": "models in GGUF files",
    "accelerate": "models in GGUF files",
}
"""Optional packages, and what needs them."""

_BEHIND = {"tokenizers": "transformers", "huggingface_hub": "transformers"}


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The optional package that could not be imported; None if the error has another cause."""
    package = (error.name or "").partition(".")[0]
    package = _BEHIND.get(package, package)
    return package if package in OPTIONAL else None


def missing() -> list[str]:
    """The optional packages that are not installed."""
    return [name for name in OPTIONAL if find_spec(name) is None]
