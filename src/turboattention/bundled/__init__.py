"""What ships with the package: a small language model for tests, texts, and questions about one of them.

The document is the tale "Aladdin and the Wonderful Lamp" as "The Blue Fairy Book" tells it (1889, edited by Andrew
Lang, public domain). The text is the beginning of chapter II of "Dracula" by Bram Stoker (1897, public domain): about
4,000 tokens of the bundled model's tokenizer, ending in the middle of a sentence.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError

_HERE = Path(__file__).parent


def model_path() -> Path:
    """The folder of the bundled model, as ``AutoModelForCausalLM.from_pretrained`` takes it.

    Raises:
        InputError: this installation comes without it.
    """
    path = _HERE / "model"
    if not (path / "config.json").is_file():
        raise InputError(f"model: expected the bundled model in {path}, got none there; name another model or folder")
    return path


def text_path() -> Path:
    """The file of the bundled text, UTF-8."""
    return _HERE / "text.txt"


def document() -> str:
    """The bundled document that `questions` are about: 6,800 tokens of SmolLM2's tokenizer."""
    return (_HERE / "document.txt").read_text(encoding="utf-8")


def questions() -> list[str]:
    """Questions about the bundled document, which SmolLM2-135M answers over its own cache."""
    return (_HERE / "questions.txt").read_text(encoding="utf-8").splitlines()


def text() -> str:
    """The bundled text: about 4,000 tokens of the bundled model's tokenizer."""
    return text_path().read_text(encoding="utf-8")
