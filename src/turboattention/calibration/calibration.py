"""`Calibration`: measurements of a model, and the widths chosen from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import ConfigError
from ..guard import BOUNDS
from ..kv.channel_order import ChannelOrder, order_by
from .assignment import Strategy, assign_bits, beyond_int8, chosen, chosen_error, keep_bounds
from .measure import LayerStatistics


@dataclass(frozen=True)
class Provenance:
    """The model and text of the measurements.

    model: its name or folder. model_hash: SHA-256 of the parameters' names, shapes and first values.
    shape: the sizes that identify the model (`integrations.model_shape.ModelShape`).
    text_hash: SHA-256 of the token ids. tokens: their number. length: tokens of one piece. version: of this package.
    """

    model: str
    model_hash: str
    shape: Mapping[str, str | int | None]
    text_hash: str
    tokens: int
    length: int
    version: str


@dataclass(frozen=True)
class Calibration:
    """Statistics per layer, and the widths chosen from them.

    layers: one entry for each layer of the cache.
    provenance: the model and text of the measurements.
    head_bits: int64 [2, Hkv] per layer, the widths of K and V.
    budget, strategy: the arguments with which `head_bits` were chosen, see `assign_bits`.
    means: whether caches smooth K with the measured means instead of the mean of their own first block.
    bounds: width -> the largest relative error of a head that `head_bits` allow.
    exact_layers: indices of layers with heads that stay beyond their bound at 8 bits: a `TurboCache` keeps these layers
        in the model's own dtype.
    """

    layers: tuple[LayerStatistics, ...]
    provenance: Provenance
    head_bits: tuple[Tensor, ...]
    budget: float
    strategy: Strategy
    means: bool = False
    bounds: Mapping[int, float] = field(default_factory=lambda: dict(BOUNDS))
    exact_layers: tuple[int, ...] = ()

    @classmethod
    def choose(
        cls,
        layers: tuple[LayerStatistics, ...],
        provenance: Provenance,
        budget: float = 3.0,
        strategy: Strategy = "error",
        means: bool = False,
    ) -> Calibration:
        """The widths of `assign_bits`, with heads beyond their bound promoted, which can exceed the budget.

        Raises:
            ConfigError: budget or strategy out of range.
        """
        by_priority = strategy == "priority"
        scores = [layer.priority if by_priority else layer.costs for layer in layers]
        bits = assign_bits(scores, budget, strategy)
        exact: tuple[int, ...] = ()
        if not by_priority:
            errors = [layer.errors for layer in layers]
            bits, exact = keep_bounds(bits, errors), beyond_int8(errors)
        return cls(layers, provenance, tuple(bits), float(budget), strategy, means, exact_layers=exact)

    def rechosen(self, budget: float, strategy: Strategy = "error", means: bool | None = None) -> Calibration:
        """The same statistics with another budget or strategy."""
        means = self.means if means is None else means
        return Calibration.choose(self.layers, self.provenance, budget, strategy, means)

    @property
    def average_bits(self) -> float:
        """Mean width of K and V over all heads, without steps, zeros and scales."""
        return sum(int(bits.sum()) for bits in self.head_bits) / sum(bits.numel() for bits in self.head_bits)

    @property
    def k_mean(self) -> list[Tensor] | None:
        """Means of K per layer, float32 [Hkv, D]; None unless `means` is set."""
        return [layer.k_mean for layer in self.layers] if self.means else None

    @property
    def k_order(self) -> list[ChannelOrder] | None:
        """Orders of K's channels per layer; None from files of version 1, which have no weights of channels."""
        weights = [layer.k_weight for layer in self.layers if layer.k_weight is not None]
        return [order_by(weight) for weight in weights] if len(weights) == len(self.layers) else None

    @property
    def chosen_errors(self) -> list[Tensor]:
        """Per layer float64 [Hkv], the relative error of each head's output at the chosen widths."""
        return [chosen_error(bits, layer.errors) for bits, layer in zip(self.head_bits, self.layers, strict=True)]

    @property
    def chosen_costs(self) -> list[Tensor]:
        """Per layer float64 [2, Hkv], the expected cost of K and V at the chosen widths, in nats per token."""
        return [chosen(bits, layer.costs) for bits, layer in zip(self.head_bits, self.layers, strict=True)]

    @property
    def expected_kl(self) -> float:
        """The sum of the costs: the KL divergence from the model's own cache for small, independent errors, in nats per
        token. Exact layers have no cost."""
        costs = enumerate(self.chosen_costs)
        return sum(float(cost.sum()) for index, cost in costs if index not in self.exact_layers)

    def check_shape(self, shape: Mapping[str, str | int | None]) -> None:
        """Raises `ConfigError` that names the first size in which `shape` differs from the calibrated model."""
        for name, expected in self.provenance.shape.items():
            if shape.get(name) != expected:
                raise ConfigError(
                    f"calibration: expected one of this model ({name}={shape.get(name)!r}), got one of "
                    f"{self.provenance.model} ({name}={expected!r})"
                )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``calibration.json`` atomically into `folder`, which is created if necessary.

        Raises:
            InputError: the file cannot be written.
        """
        from .files import save_calibration

        save_calibration(self, folder)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a calibration from a folder written by `save`, or from the file itself.

        Raises:
            InputError: the file does not exist. FormatError: it is damaged, of another kind or of another version.
        """
        from .files import load_calibration

        return load_calibration(path)
