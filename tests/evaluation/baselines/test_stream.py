"""When tokens are quantized, and how bits are counted."""

from __future__ import annotations

import torch
from torch import Tensor

from turboattention.evaluation.baselines.stream import Restored, Stream


class Negate:
    """Blocks of four tokens are stored with their sign turned, at one bit an element."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def settled(self, length: int) -> int:
        return length - length % 4

    def __call__(self, x: Tensor, start: int) -> Restored:
        assert x.dtype == torch.float32
        self.starts.append(start)
        return Restored(-x, x.numel())


def grow(stream: Stream, x: Tensor, *lengths: int) -> Tensor:
    held = x[:, :, :0]
    for length in lengths:
        held = torch.cat([held, x[:, :, held.shape[2] : length]], 2)
        stream.settle(held)
    return held


def test_quantizes_what_is_due_once() -> None:
    x, quantizer = torch.rand(2, 3, 11, 5) + 1, Negate()
    held = grow(Stream(quantizer), x, 3, 6, 7, 11)
    assert quantizer.starts == [0, 4]
    assert torch.equal(held, torch.cat([-x[:, :, :8], x[:, :, 8:]], 2))


def test_works_in_place_in_any_dtype() -> None:
    x = torch.ones(1, 1, 4, 2, dtype=torch.bfloat16)
    Stream(Negate()).settle(x)
    assert torch.equal(x, -torch.ones_like(x))


def test_counts_codes_and_the_window() -> None:
    x, stream = torch.rand(2, 3, 11, 5), Stream(Negate())
    held = grow(stream, x, 11)
    assert stream.stored_bits(held) == 2 * 3 * 5 * (8 * 1 + 3 * 16)
    assert stream.stored_bits(held[:1]) == 3 * 5 * (8 * 1 + 3 * 16)


def test_crop_takes_tokens_of_the_window_then_quantized_ones() -> None:
    x, stream = torch.rand(1, 1, 11, 1), Stream(Negate())
    held = grow(stream, x, 11)
    stream.crop(9)
    assert stream.stored_bits(held[:, :, :9]) == 8 + 16
    stream.crop(6)
    assert stream.stored_bits(held[:, :, :6]) == 6
    assert grow(stream, x, 6, 8) is not None
    assert stream.quantizer.starts[-1] == 6  # type: ignore[attr-defined]
