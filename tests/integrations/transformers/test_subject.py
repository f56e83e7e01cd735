"""Sessions over methods' caches: the logits are the model's own, whatever the pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.conftest import TEXT, save_model
from turboattention.evaluation.baselines import METHODS
from turboattention.integrations.transformers import generation
from turboattention.integrations.transformers.subject import TransformersSubject


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    folder: Path = save_model(tmp_path_factory.mktemp("models") / "tiny", eos=None)
    with generation.enabled():
        yield TransformersSubject(generation.load(str(folder), "cpu", "float32"))


@pytest.fixture(scope="module")
def ids(subject: TransformersSubject) -> list[int]:
    return subject.encode(TEXT * 3)[:150]


def test_own_cache_in_pieces_is_one_forward(subject: TransformersSubject, ids: list[int]) -> None:
    with torch.inference_mode():
        wanted = subject.language.model(torch.tensor([ids])).logits[0]
    session = subject.open(METHODS["fp16"])
    session.read(ids[:70])
    got = session.feed(ids[70:])
    torch.testing.assert_close(got, wanted[70:], rtol=1e-4, atol=1e-4)
    assert session.bits_per_element == 16


def test_each_session_has_its_own_attention(subject: TransformersSubject, ids: list[int]) -> None:
    own, turbo = subject.open(METHODS["fp16"]), subject.open(METHODS["turbo-2"])
    alone = subject.open(METHODS["turbo-2"]).feed(ids)
    turns = [(own.feed(ids[at : at + 16]), turbo.feed(ids[at : at + 16])) for at in range(0, 144, 16)]
    torch.testing.assert_close(torch.cat([y for _, y in turns]), alone[:144])
    assert not torch.allclose(turns[-1][0], turns[-1][1])


def test_texts_have_no_special_tokens_of_their_own(subject: TransformersSubject) -> None:
    assert subject.decode(subject.encode("a door")) == "a door"
    assert subject.encode("a") + subject.encode(" door") == subject.encode("a door")
    assert subject.begin == []


def test_fingerprint_tells_weights_apart(subject: TransformersSubject, tmp_path: Path) -> None:
    other = generation.load(str(save_model(tmp_path / "other", seed=1, eos=None)), "cpu", "float32")
    assert other.fingerprint() != subject.language.fingerprint() == subject.language.fingerprint()


def test_head_errors(subject: TransformersSubject, ids: list[int]) -> None:
    shape = (2, 4)
    assert subject.head_errors(METHODS["fp16"], ids, 32) == torch.zeros(shape).tolist()
    by_bits = [torch.tensor(subject.head_errors(METHODS[f"turbo-{bits}"], ids, 32)) for bits in (8, 4, 2)]
    assert all(errors.shape == shape for errors in by_bits)
    assert (by_bits[0] < 0.05).all()
    assert by_bits[0].mean() < by_bits[1].mean() < by_bits[2].mean()


def test_an_error_is_its_own_layers(subject: TransformersSubject, ids: list[int]) -> None:
    """Layer 1 is given what it has without errors, however wrong layer 0 is."""
    seen: list[torch.Tensor] = []
    layer = subject.language.model.get_decoder().layers[1]
    # In front of the hooks of head_errors stands the input as it came, behind them the one that it was given.
    attention = layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        subject.head_errors(METHODS["turbo-2"], ids, 32)
    finally:
        attention.remove()
    for own, other in zip(seen[0::2], seen[1::2], strict=True):
        torch.testing.assert_close(other, own, rtol=0, atol=0)


def test_hooks_are_gone_afterwards(subject: TransformersSubject, ids: list[int]) -> None:
    subject.head_errors(METHODS["turbo-4"], ids[:40], 8)
    assert not any(module._forward_pre_hooks for module in subject.language.model.modules())
