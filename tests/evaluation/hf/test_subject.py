"""Sessions over methods' caches: the logits equal the model's own, for any pieces."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

from tests.cli.conftest import TEMPLATE, TEXT, save_model
from turboattention.evaluation.baselines import METHODS
from turboattention.evaluation.hf.subject import TransformersSubject, renderer
from turboattention.evaluation.subject import attending
from turboattention.integrations.transformers import language_model, registry
from turboattention.integrations.transformers.language_model import LanguageModel


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    folder: Path = save_model(tmp_path_factory.mktemp("models") / "tiny", eos=None)
    with registry.enabled():
        yield TransformersSubject(language_model.load(str(folder), "cpu", "float32"))


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


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_of_a_batch_are_what_they_are_alone(tiny, name: str) -> None:
    """Over caches of several kinds and lengths, in layers with and without a window."""
    model = tiny(name)
    model.set_attn_implementation("sdpa")
    subject = TransformersSubject(LanguageModel("tiny", model, None, "sdpa"))
    ids = torch.randint(5, model.config.vocab_size, (160,), generator=torch.Generator().manual_seed(0)).tolist()
    methods = [METHODS[name] for name in ("fp16", "turbo-4", "kivi-2", "turbo-3-lag", "int4")]
    with registry.enabled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the guard, about random weights
        alone, together = ([subject.open(method) for method in methods] for _ in range(2))
        for at, (one, other) in enumerate(zip(alone, together, strict=True)):
            for session in (one, other):
                session.read(ids[: 70 + 9 * at])
        for length in (20, 1, 1):
            wanted = [session.forward(ids[:length]) for session in alone]
            got = subject.feed_together(together, [ids[:length]] * len(methods))
            # The model's own sums depend on the batch, in their last bits, and INT8 codes on these.
            torch.testing.assert_close(got, torch.stack(wanted).float(), rtol=5e-3, atol=5e-3)
        assert subject.feed_together(together, [[5]] * len(methods), last=True).shape[1] == 1
        assert [one.cache.get_seq_length() for one in together] == [70 + 9 * at + 23 for at in range(len(methods))]
    assert "turbo_together" not in AttentionInterface._global_mapping


def test_a_fork_goes_its_own_way(subject: TransformersSubject, ids: list[int]) -> None:
    for name in ("fp16", "turbo-2", "int4"):
        session = subject.open(METHODS[name])
        session.read(ids[:90])
        fork = session.fork()
        fork.feed(ids[::-1][:30])
        again = subject.open(METHODS[name])
        again.read(ids[:90])
        torch.testing.assert_close(session.feed(ids[90:]), again.feed(ids[90:]), rtol=0, atol=0)


def test_a_model_with_an_attention_of_its_own_takes_turns(subject: TransformersSubject, ids: list[int]) -> None:
    other = TransformersSubject(replace(subject.language, own_attention="eager"))
    rows = [[other.open(METHODS[name]) for name in ("fp16", "turbo-4")] for _ in range(2)]
    wanted = torch.stack([session.forward(ids[:40]) for session in rows[0]])
    torch.testing.assert_close(other.feed_together(rows[1], [ids[:40]] * 2), wanted)


def test_guards_say_whose_cache_they_speak_of(subject: TransformersSubject, ids: list[int]) -> None:
    """Keys that an adversary would choose: the warning carries the method's name."""
    heard: list[str | None] = []
    row = subject.open(METHODS["turbo-4"])
    with patched(row.cache, lambda: heard.append(attending.get())):
        subject.feed_together([subject.open(METHODS["fp16"]), row], [ids[:20]] * 2)
    assert set(heard) == {"turbo-4"}
    assert attending.get() is None


@contextmanager
def patched(cache, call):
    """`call` at every layer's attention."""
    for layer in cache.layers:
        layer.attend = (lambda attend: lambda *args: (call(), attend(*args))[1])(layer.attend)
    yield


def test_oscar_is_fitted_to_what_each_layer_is_asked(subject: TransformersSubject, ids: list[int]) -> None:
    method = subject.fitted(METHODS["oscar-2"])
    assert subject.fitted(METHODS["kivi-2"]) is METHODS["kivi-2"]
    assert len(method.keys) == len(method.values) == 2
    assert not torch.equal(method.keys[0].rotation, method.keys[1].rotation)
    session = subject.open(METHODS["oscar-2"])
    own = subject.open(METHODS["fp16"])
    for at in range(0, 400, 50):
        text = (ids * 3)[at : at + 50]
        exact, got = own.forward(text), session.forward(text)
    assert not torch.equal(exact, got)
    assert 2 < session.bits_per_element < 16


def test_texts_have_no_special_tokens_of_their_own(subject: TransformersSubject) -> None:
    assert subject.decode(subject.encode("a door")) == "a door"
    assert subject.encode("a") + subject.encode(" door") == subject.encode("a door")
    assert subject.begin == []
    assert TransformersSubject(subject.language, "a door").begin == subject.encode("a door")


@pytest.mark.parametrize(("put", "begin"), [([7], [7]), ([], []), ([8], [])])
def test_begins_with_bos_only_where_the_tokenizer_puts_it(put: list[int], begin: list[int]) -> None:
    tokenizer = type("Tokenizer", (), {"bos_token_id": 7, "__call__": lambda self, text, **_: {"input_ids": put}})()
    assert TransformersSubject(LanguageModel("tiny", None, tokenizer, "sdpa")).begin == begin


def test_fingerprint_tells_weights_apart(subject: TransformersSubject, tmp_path: Path) -> None:
    other = language_model.load(str(save_model(tmp_path / "other", seed=1, eos=None)), "cpu", "float32")
    assert other.fingerprint() != subject.language.fingerprint() == subject.language.fingerprint()


def test_head_errors(subject: TransformersSubject, ids: list[int]) -> None:
    shape = (2, 4)
    assert subject.head_errors(METHODS["fp16"], ids, 32) == torch.zeros(shape).tolist()
    by_bits = [torch.tensor(subject.head_errors(METHODS[f"turbo-{bits}"], ids, 32)) for bits in (8, 4, 2)]
    assert all(errors.shape == shape for errors in by_bits)
    assert (by_bits[0] < 0.05).all()
    assert by_bits[0].mean() < by_bits[1].mean() < by_bits[2].mean()


def test_an_error_is_its_own_layers(subject: TransformersSubject, ids: list[int]) -> None:
    """Layer 1 gets its error-free input, regardless of the error of layer 0."""
    seen: list[torch.Tensor] = []
    layer = subject.language.model.get_decoder().layers[1]
    # Before the hooks of head_errors there is the original input, after them the replaced one.
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


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "chat", eos=None, template=TEMPLATE)
    subject = TransformersSubject(language_model.load(str(folder), "cpu", "float32"), chats=True)
    render = renderer(subject.language, None)
    assert render([{"role": "user", "content": TEXT}], True) == f"[user]{TEXT}<end>[assistant]"
    (end,) = subject.encode("<end>")
    assert end in subject.stop_tokens
    assert end not in TransformersSubject(subject.language).stop_tokens


def test_a_conversation_has_one_bos(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "chat", eos=None, template="{{ bos_token }}" + TEMPLATE)
    language = language_model.load(str(folder), "cpu", "float32")
    language.tokenizer.bos_token = "<end>"
    messages = [{"role": "user", "content": "Who?"}]
    assert renderer(language, None)(messages, False) == "<end>[user]Who?<end>"
    assert renderer(language, "<end>")(messages, False) == "[user]Who?<end>"
