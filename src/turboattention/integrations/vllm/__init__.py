"""vLLM (0.32): attention over the packed cache, as an out-of-tree plugin.

    TURBOATTENTION_VLLM=4 python -m vllm.entrypoints.openai.api_server --model MODEL

The variable is a width (8, 4, 3, 2), the folder of a calibration, or 1, which means 4 bits.

vLLM finds `register` through its entry point and calls it in every process. Unless the variable is set, the plugin is
inactive and imports no module of vLLM. Further settings: `settings.Settings`; unsupported features: `refusals`.
"""

from __future__ import annotations

import importlib
import logging
import os

from ...errors import BackendError
from .bypassing import check_models
from .settings import VARIABLE, parse_variable

RELEASE = "0.32"
"""The release of vLLM that this plugin is tested with. The plugin uses interfaces that change between releases."""

BACKEND = f"{__name__}.backend.TurboBackend"
"""The backend class in vLLM's registry."""

_MODEL_CHECKS = "vllm.model_executor.models.config"

__all__ = ["BACKEND", "register"]


def register() -> None:
    """Register the backend with vLLM if the environment variable is set. Idempotent.

    It is registered as CUSTOM, for ``--attention-backend CUSTOM`` on GPUs, and replaces CPU_ATTN, the only backend of
    vLLM's CPU platform. The CPU platform's backends for multi-head latent attention, and those that models select
    themselves for values with a head_dim of their own, are replaced by backends that refuse. Models that ask for no
    backend are refused by name (`bypassing`).

    Raises:
        ConfigError: the variable has another value than those above. BackendError: vLLM is another release than
            `RELEASE`, and lacks an interface that the plugin uses.
    """
    if parse_variable(os.environ.get(VARIABLE)) is None:
        return
    _check_release()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    check_models()
    for name in ("CPU_ATTN", "CUSTOM"):
        register_backend(AttentionBackendEnum[name], BACKEND)
    for name in ("CPU_MLA", "AMX_MLA"):
        register_backend(AttentionBackendEnum[name], f"{__name__}.backend.RefusedMLA")
    for name in ("FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV"):
        register_backend(AttentionBackendEnum[name], f"{__name__}.backend.RefusedDiffKV")


def _check_release() -> None:
    """Warns of a release that was not tested. Its missing interfaces are found here, not in the first request."""
    found = str(importlib.import_module("vllm").__version__)
    if found.split("+")[0].split(".")[:2] == RELEASE.split("."):
        return
    try:
        for module in ("vllm.v1.attention.backends.registry", _MODEL_CHECKS, BACKEND.rpartition(".")[0]):
            importlib.import_module(module)
    except (ImportError, AttributeError) as error:
        raise BackendError(f"vllm: expected release {RELEASE}, got {found} ({error})") from error
    logging.getLogger("vllm.turboattention").warning(
        "turboattention is tested with vLLM %s, this is %s: check its answers before relying on them", RELEASE, found
    )
