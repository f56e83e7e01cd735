"""Hugging Face transformers (5.16 to 5.23): ``attn_implementation="turbo"`` and a quantized cache.

    enable()                                   # registers "turbo"; disable() undoes it
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="turbo")
    model.generate(**inputs, past_key_values=TurboCache(model.config))
    calibrate(model, token_ids).save("folder")  # widths per head, by measured error
    with GraphedDecoding(model, cache): ...         # decode steps as one CUDA graph

Without a `TurboCache`, "turbo" runs on the model's own full-precision cache. Nothing is patched on import.
"""

from __future__ import annotations

RELEASES = "5.16 to 5.23"
"""Those of transformers that this integration is tested with."""

try:
    from .cache import TurboCache
    from .calibration import calibrate
    from .graphed import GraphedDecoding
    from .registry import disable, enable
except ImportError as error:
    if (error.name or "").partition(".")[0] != "transformers":
        raise
    raise ModuleNotFoundError(
        f"turboattention.integrations.transformers needs transformers {RELEASES} "
        f'(pip install ".[transformers]" in a clone of the repository): {error}',
        name="transformers",
    ) from None

__all__ = ["GraphedDecoding", "TurboCache", "calibrate", "disable", "enable"]
