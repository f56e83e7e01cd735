"""``--model``: checks the name, and loads the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..bundled import model_path
from ..errors import InputError
from .device import Dtype, choose, use_threads
from .progress import Bars

if TYPE_CHECKING:
    from ..integrations.transformers.language_model import LanguageModel


def check_model(name: str | None) -> None:
    """Raises InputError for a name that is blank."""
    if name is not None and not name.strip():
        raise InputError(f"--model: expected a folder or a name such as org/model, got {name!r}")


def load_model(name: str | None, device: str, dtype: Dtype, threads: int | None, bars: Bars) -> LanguageModel:
    """Load the model, by default the bundled one, with a progress bar.

    Raises:
        InputError: the model or device does not exist.
    """
    name = str(model_path()) if name is None else name
    with bars.task("Loading the model"):
        from ..integrations.transformers import language_model

        use_threads(threads)
        return language_model.load(name, *choose(device, dtype))
