"""The kinds of methods: the model's own cache, a baseline's quantizers, transformers' quantized cache, and ours.

transformers is imported when a cache is made, so that names can be listed and checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ...config import TurboConfig
from ...errors import BackendError, InputError
from .oscar import Moments
from .stream import FLOAT_BITS, Quantizer

if TYPE_CHECKING:
    from ...calibration import Calibration

NUMERICS = 3
"""The version of TurboAttention's numerics. Raised with every change of what a configuration computes, except for which
softmax "auto" is, so that saved results are measured again (tests/evaluation/test_numerics_version.py)."""


@dataclass(frozen=True)
class OwnCache:
    """The model's own full-precision cache."""

    name: str = "fp16"
    title: str = "FP16 (own cache)"
    source: str = "transformers, DynamicCache"
    settings: str = "keys and values in the model's dtype"
    attention: str | None = None
    numerics: int = 0

    def unavailable(self) -> str | None:
        return None

    def make_cache(self, model_config: Any) -> Any:
        from ..hf.baseline_cache import own_cache

        return own_cache(model_config)

    def bits_per_element(self, cache: Any) -> float:
        return float(FLOAT_BITS) if cache.get_seq_length() else float("inf")


@dataclass(frozen=True)
class QuantizerMethod:
    """A published baseline: a quantizer for keys and one for values, of all layers or of each."""

    name: str
    title: str
    source: str
    settings: str
    keys: Quantizer | Sequence[Quantizer]
    values: Quantizer | Sequence[Quantizer]
    attention: str | None = None
    numerics: int = 0

    def unavailable(self) -> str | None:
        return None

    def make_cache(self, model_config: Any) -> Any:
        from ..hf.baseline_cache import BaselineCache

        return BaselineCache(model_config, self.keys, self.values)

    def bits_per_element(self, cache: Any) -> float:
        return cache.bits_per_element


@dataclass(frozen=True)
class FittedMethod:
    """A published baseline whose quantizers are fitted to the model, offline, before it can be used."""

    name: str
    title: str
    source: str
    settings: str
    fit: Callable[[Sequence[Moments]], tuple[Sequence[Quantizer], Sequence[Quantizer]]]
    attention: str | None = None
    numerics: int = 0

    def unavailable(self) -> str | None:
        return None

    def fitted(self, layers: Sequence[Moments]) -> QuantizerMethod:
        """The method, fitted to a model whose layers have these moments."""
        return QuantizerMethod(self.name, self.title, self.source, self.settings, *self.fit(layers))

    def make_cache(self, model_config: Any) -> Any:
        raise InputError(f"--methods: expected {self.name} fitted to a model, got it unfitted; `eval` fits it")

    def bits_per_element(self, cache: Any) -> float:
        return cache.bits_per_element


@dataclass(frozen=True)
class HubMethod:
    """transformers' own `QuantizedCache`, if its backend is installed."""

    name: str
    title: str
    backend: str
    module: str
    options: dict[str, int] = field(hash=False)
    source: str = "transformers, QuantizedCache"
    attention: str | None = None
    numerics: int = 0

    @property
    def settings(self) -> str:
        if not self.options:
            return "float8_e4m3, one scale per tensor, frozen after the first call"
        return f"{self.options['nbits']} bits, groups of 64, residual 128"

    def unavailable(self) -> str | None:
        try:
            found = find_spec(self.module) is not None
        except ModuleNotFoundError:  # the package that the module is in
            found = False
        return None if found else f"not available: it needs {self.module}, which is not installed"

    def make_cache(self, model_config: Any) -> Any:
        from ..hf.baseline_cache import quantized_cache

        reason = self.unavailable()
        if reason is not None:
            raise BackendError(f"--methods: {self.name} is {reason}")
        return quantized_cache(model_config, self.backend, **self.options)

    def bits_per_element(self, cache: Any) -> float:
        from ..hf.baseline_cache import quantized_cache_bits

        return quantized_cache_bits(cache)


@dataclass(frozen=True)
class TurboMethod:
    """TurboAttention in one configuration. Needs ``turboattention.integrations.transformers.enable()``."""

    name: str
    title: str
    settings: str
    config: TurboConfig
    calibration: Calibration | None = field(default=None, hash=False)
    source: str = "Kang et al., TurboAttention, arXiv 2412.08585"
    attention: str | None = "turbo"
    numerics: int = NUMERICS

    def unavailable(self) -> str | None:
        return None

    def make_cache(self, model_config: Any) -> Any:
        from ...integrations.transformers.cache import TurboCache

        return TurboCache(model_config, self.config, calibration=self.calibration)

    def bits_per_element(self, cache: Any) -> float:
        """From all allocated bytes (`TurboCache.bits_per_element`); layers in floating point count as 16 bits, as all
        floating-point values of the other methods do, whatever the model's dtype."""
        if not cache.fp16_nbytes:
            return float("inf")
        floats = [layer.floats for layer in cache.attention_layers if layer.floats is not None]
        excess = sum(x.nbytes * max(0.0, 1 - FLOAT_BITS / (8 * x.keys.element_size())) for x in floats)
        return (cache.nbytes - excess) * FLOAT_BITS / cache.fp16_nbytes
