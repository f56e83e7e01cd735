"""Tensor parallelism in transformers: each process has a contiguous range of a model's heads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import distributed

from ...errors import ConfigError, InputError, UnsupportedError


@dataclass(frozen=True)
class HeadShare:
    """KV heads `first` to `first + count` of a layer's `total`."""

    first: int
    count: int
    total: int

    @property
    def partial(self) -> bool:
        return self.count < self.total

    def cut(self, values: Any, name: str, axis: int) -> Any:
        """This range of `values`, which have one entry per head along `axis`. Values of only these heads are unchanged.

        Raises:
            ConfigError: the number of entries is neither the total nor that of this process.
        """
        if values is None or not self.partial:
            return values
        try:
            x = torch.as_tensor(values)
            length = x.shape[axis]
        except (IndexError, RuntimeError, TypeError, ValueError):
            return values  # not a valid value: the cache raises the error
        if length == self.count:
            return x
        if length != self.total:
            raise ConfigError(
                f"{name}: expected entries for all {self.total} KV heads, or for the {self.count} that this process "
                f"holds (tensor parallelism), got {length}"
            )
        return x.narrow(axis, self.first, self.count)


@dataclass(frozen=True)
class TensorParallel:
    """Process `rank` of the `size` processes that share the heads of a layer."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, config: Any) -> TensorParallel:
        """From the config of a model loaded with ``distributed_config``; a single process for other models."""
        size = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
        if size == 1 or not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(
            distributed.get_rank() % size, size
        )  # tensor parallelism is the innermost dimension of transformers' device mesh

    def share(self, held: int, total: int | None) -> HeadShare:
        """The range of a layer with `total` KV heads, given that keys have `held` heads in this process.

        Raises:
            UnsupportedError: `held` is neither `total` (some plans do not split attention) nor an equal part of it.
        """
        if self.size == 1 or total is None or held == total:
            return HeadShare(0, held, held)
        if held * self.size != total:
            raise UnsupportedError(
                f"key_states: expected all {total} KV heads, or an equal part of them on each of {self.size} tensor "
                f"parallel processes, got {held}"
            )
        return HeadShare(self.rank * held, held, total)

    def path(self, path: str) -> str:
        """The path of this process's part of a saved cache."""
        return path if self.size == 1 else f"{path}.rank{self.rank}of{self.size}"

    def metadata(self) -> dict[str, int]:
        return asdict(self)

    def check(self, saved: TensorParallel, path: str) -> None:
        """Raises `InputError` if a file's heads are not those of this process."""
        if saved != self:
            raise InputError(
                f"path: expected a cache saved by {self}, got one saved by {saved} in {path}. Saved parts are loaded "
                "by as many tensor parallel processes, each given the path that was saved to and model_config"
            )

    def __str__(self) -> str:
        return "a single process" if self.size == 1 else f"tensor parallel rank {self.rank} of {self.size}"
