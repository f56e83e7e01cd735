"""vLLM (0.32): attention over our packed cache, as an out-of-tree plugin.

    TURBOATTENTION_VLLM=4 python -m vllm.entrypoints.openai.api_server --model MODEL

The variable is a width (8, 4, 3, 2), a calibration's folder, or 1, which is 4 bits.

vLLM finds `register` by its entry point and calls it in every process. Without the variable nothing happens there, and
no module of vLLM is imported. More settings: `settings.Settings`; what is refused: `refusals`.
"""

from __future__ import annotations

import os

from .settings import VARIABLE, parse_variable

BACKEND = f"{__name__}.backend.TurboBackend"
"""What stands in vLLM's registry."""

__all__ = ["BACKEND", "register"]


def register() -> None:
    """Enter the backend in vLLM's registry, if the environment asks for it; again is the same as once.

    As CUSTOM, for ``--attention-backend CUSTOM`` on GPUs, and in place of CPU_ATTN, the one backend that vLLM's CPU
    platform ever takes. Multi-head latent attention, which it takes from elsewhere, is refused by name.

    Raises:
        ConfigError: the variable has a value that is none of those above.
    """
    if parse_variable(os.environ.get(VARIABLE)) is None:
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in ("CPU_ATTN", "CUSTOM"):
        register_backend(AttentionBackendEnum[name], BACKEND)
    for name in ("CPU_MLA", "AMX_MLA"):
        register_backend(AttentionBackendEnum[name], f"{__name__}.backend.RefusedMLA")
