"""ggml as a peer, if its libraries are installed, and the message if they are not."""

from __future__ import annotations

import pytest
import torch

from turboattention.benchmarking import ggml
from turboattention.benchmarking.problem import Shape, make_problem

here = pytest.mark.skipif(ggml.missing() is not None, reason=str(ggml.missing()))


@here
@pytest.mark.parametrize(("kind", "bound"), [("f16", 0.01), ("q8_0", 0.05), ("q4_0", 0.3)])
@pytest.mark.parametrize(
    "shape", [Shape(4, 2, 64, 1, 33), Shape(4, 2, 64, 7, 65), Shape(4, 2, 32, 65, 65, causal=True)], ids=str
)
def test_agrees_with_exact_attention(kind: str, bound: float, shape: Shape) -> None:
    problem = make_problem(shape)
    attention = ggml.FlashAttention(problem.q, problem.k, problem.v, kind, shape.causal, threads=1)
    for _ in range(2):
        attention.compute()
    assert problem.expected.error(attention.output()) < bound


@here
def test_one_sequence_at_a_time() -> None:
    x = torch.zeros(2, 1, 1, 32)
    with pytest.raises(ValueError, match="q: expected a batch of 1, got 2"):
        ggml.FlashAttention(x, x, x, "f16", False, 1)


def test_a_folder_without_the_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv(ggml.FOLDER, str(tmp_path))
    why = ggml.missing()
    assert why is not None
    assert "llama-cpp-python is not installed" in why
    assert ggml.version() is None


def test_libraries_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "libggml-base.so").write_bytes(b"not a library")
    monkeypatch.setenv(ggml.FOLDER, str(tmp_path))
    ggml._library.cache_clear()
    why = ggml.missing()
    ggml._library.cache_clear()
    assert why is not None
    assert f"ggml's libraries in {tmp_path} cannot be used" in why
