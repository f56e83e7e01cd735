"""The device, dtype and backend of a model, for text and JSON output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import TurboConfig
    from ..dispatch import Explanation
    from ..integrations.transformers.language_model import LanguageModel


def facts(language: LanguageModel, config: TurboConfig) -> dict[str, Any]:
    """The model, and the backend that computes its quantized attention with `config`."""
    import torch

    model = language.model
    return {
        "model": language.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": _explained(language, config).backend,
        "threads": torch.get_num_threads(),
        "context": language.context,
    }


def slower_than_kernels(language: LanguageModel, config: TurboConfig) -> str | None:
    """A warning if the CPU kernels are available but do not compute `config`, so that the reference runs."""
    from .. import backends

    explained = _explained(language, config)
    if explained.backend != "reference" or language.model.device.type != "cpu" or not backends()["cpu"].usable:
        return None
    reason = explained.others["cpu"]
    return f"the CPU kernels do not compute this ({reason}): it runs on the reference, which is much slower"


def _explained(language: LanguageModel, config: TurboConfig) -> Explanation:
    import torch

    from .. import explain

    probe = torch.empty(1, 1, 1, 64, device=language.model.device, dtype=language.model.dtype)
    return explain(probe, probe, probe, config=config)
