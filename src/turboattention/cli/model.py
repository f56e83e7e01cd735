"""``--model``, ``--device``, ``--dtype`` and ``--threads``: opens the model, and loads its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..bundled import model_path
from ..errors import InputError
from .device import Dtype, choose, use_threads
from .progress import Bars

if TYPE_CHECKING:
    from ..integrations.transformers.language_model import LanguageModel, Opened
    from .settings import Setting


def open_model(name: str | None, device: str, dtype: Dtype, threads: int | None, bars: Bars) -> Opened:
    """Read the config and the tokenizer of a model, by default of the bundled one. What can be checked with them is
    checked before `load_weights`, which takes long.

    Raises:
        InputError: the model or device does not exist.
    """
    if name is not None and not name.strip():
        raise InputError(f"--model: expected a folder or a name such as org/model, got {name!r}")
    name = str(model_path()) if name is None else name
    with bars.task("Opening the model"):
        from ..integrations.transformers import language_model

        use_threads(threads)
        return language_model.open_model(name, *choose(device, dtype))


def check_caches(opened: Opened, settings: Sequence[Setting]) -> None:
    """Raises UnsupportedError for a model without quantized caches, InputError for the calibration of another one."""
    for setting in settings:
        opened.new_cache(setting.config, setting.calibration)


def load_weights(opened: Opened, bars: Bars) -> LanguageModel:
    """Raises InputError if weights are missing or cannot be read."""
    with bars.task("Loading the model"):
        return opened.load()
