"""`generate` with decode steps at fixed places, as a CUDA graph holds them, beside the same steps one by one.

Without a GPU the places are the same and the work is run instead of replayed: what the host counts, when it falls
back, and that nothing in a step is read back is tested here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("transformers")

import transformers

import turboattention as ta
from turboattention.errors import InputError, NonFiniteError, UnsupportedError
from turboattention.integrations.transformers import TurboCache, disable, enable
from turboattention.integrations.transformers.graphed import GraphedDecoding

from ...kv.tools import content
from .test_boundary import nothing_read

OFF = ta.TurboConfig(guard="off", sink_tokens=0)
WINDOW = 70

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HALF = ["sliding_attention", "full_attention"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": WINDOW, "layer_types": HALF}),
    "gpt_oss": (
        "GptOssConfig",
        {"sliding_window": WINDOW, "layer_types": HALF, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gpt2": ("GPT2Config", {"num_key_value_heads": 2, "n_positions": 512}),
    "opt": ("OPTConfig", {"num_key_value_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "llama4": (
        "Llama4TextConfig",
        {"attention_chunk_size": 512, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
}


@pytest.fixture(autouse=True)
def turbo() -> Iterator[None]:
    enable()
    yield
    disable()


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def build(kind: str) -> Any:
        if kind not in made:
            name, changes = KINDS[kind]
            torch.manual_seed(0)
            config = getattr(transformers, name)(**{**COMMON, **changes})
            model = made[kind] = transformers.AutoModelForCausalLM.from_config(config).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(0, 0.2)
            model.generation_config.eos_token_id = None
        return made[kind]

    return build


@pytest.fixture
def llama(models: Callable[[str], Any]) -> Any:
    model = models("llama")
    model.set_attn_implementation("turbo")
    return model


def drawn(batch: int, length: int) -> Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def filled(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> TurboCache:
    """All tokens of `ids` but the last, stored by a backend that is quicker than the interpreter."""
    model.set_attn_implementation("turbo")
    cache = TurboCache(
        model.config, options.pop("config", OFF), **{"max_tokens": 256, "check_prompts": False, **options}
    )
    for layer in cache.layers:
        layer.backend = "reference"
    given = {}
    if mask is not None:
        given = {"attention_mask": mask[:, :-1], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]}
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, **given)
    for layer in cache.layers:
        layer.backend = "triton"
    return cache


def generated(model: Any, ids: Tensor, cache: TurboCache, steps: int, **options: Any) -> Tensor:
    torch.manual_seed(3)
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, past_key_values=cache, max_new_tokens=steps, **options)


def assert_alike(a: TurboCache, b: TurboCache) -> None:
    """To the last bit, and in what is counted."""
    assert a.get_seq_length() == b.get_seq_length()
    for x, y in zip(a.layers, b.layers, strict=True):
        assert content(x.kv) == content(y.kv)
        assert (x.valid is None) == (y.valid is None)
        if x.valid is not None:
            assert torch.equal(x.valid, y.valid)
    a.check_level()


# -- the same tokens, the same cache ----------------------------------------------------------------------


@pytest.mark.parametrize("sample", [pytest.param(False, marks=pytest.mark.long), True], ids=["greedy", "sampled"])
def test_steps_over_a_flush(sample, llama, tmp_path):
    ids = drawn(2, 126)
    eager = filled(llama, ids)
    cache = eager.clone()
    want = generated(llama, ids, eager, 5, do_sample=sample)
    with GraphedDecoding(llama, cache, capture=False) as graph:
        got = generated(llama, ids, cache, 5, do_sample=sample)
    assert torch.equal(got, want)
    assert (graph.ordinary, graph.replayed) == (1, 4)
    assert_alike(cache, eager)
    # What was reserved went back, and the cache goes on: saved, cropped, in another call.
    cache.save(tmp_path / "cache", got[:, : cache.get_seq_length()])
    assert_alike(TurboCache.load(tmp_path / "cache", llama.config), eager)
    for held in (cache, eager):
        held.crop(-4)
    assert_alike(cache, eager)
    assert torch.equal(generated(llama, got[:, :128], cache, 1), generated(llama, got[:, :128], eager, 1))
    assert_alike(cache, eager)


def test_a_first_block_that_is_not_full_yet(llama):
    ids = drawn(1, 62)
    eager = filled(llama, ids)
    cache = eager.clone()
    want = generated(llama, ids, eager, 5)
    with GraphedDecoding(llama, cache, capture=False) as graph:
        got = generated(llama, ids, cache, 5)
    assert torch.equal(got, want)
    assert (graph.ordinary, graph.replayed) == (3, 2)
    assert_alike(cache, eager)


@pytest.mark.long
def test_padding_and_an_end_token(llama):
    """Rows of unequal length, of which one ends before the other and goes on as padding."""
    ids, mask = drawn(2, 150), torch.ones(2, 150, dtype=torch.int64)
    ids[0, :23], mask[0, :23] = 0, 0
    eager = filled(llama, ids, mask)
    cache = eager.clone()
    end = int(generated(llama, ids, eager.clone(), 3, attention_mask=mask)[0, -2])
    options = {"attention_mask": mask, "eos_token_id": end, "do_sample": False}
    want = generated(llama, ids, eager, 5, **options)
    with GraphedDecoding(llama, cache, capture=False) as graph:
        got = generated(llama, ids, cache, 5, **options)
    assert torch.equal(got, want)
    assert bool((got[0, 152:] == 0).all())
    assert graph.replayed == got.shape[1] - 151 > 0
    assert_alike(cache, eager)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gpt_oss", "gpt2", "opt"])
def test_other_models(kind, models):
    """Windows that evict, sinks, positions that are learned; driven without position_ids."""
    model = models(kind)
    ids = drawn(1, 192)
    eager = filled(model, ids[:, :191])
    cache = eager.clone()
    with torch.no_grad(), GraphedDecoding(model, cache, capture=False) as graph:
        for step in range(3):
            token = ids[:, 188 + step : 189 + step]
            got = model(token, past_key_values=cache).logits
            want = model(token, past_key_values=eager).logits
            assert torch.equal(got, want)
    assert graph.replayed == 2
    assert_alike(cache, eager)


@pytest.mark.long
def test_a_cache_that_is_full_goes_on(llama):
    ids = drawn(1, 125)
    eager = filled(llama, ids, max_tokens=127)
    cache = eager.clone()
    want = generated(llama, ids, eager, 5)
    with GraphedDecoding(llama, cache, capture=False) as graph:
        got = generated(llama, ids, cache, 5)
    assert torch.equal(got, want)
    assert (graph.ordinary, graph.replayed) == (3, 2)
    assert_alike(cache, eager)


@pytest.mark.long
def test_what_changes_the_cache_in_between(llama):
    """A crop and a next prompt: a graph is made anew behind them."""
    ids = drawn(1, 131)
    eager = filled(llama, ids)
    cache = eager.clone()
    with GraphedDecoding(llama, cache, capture=False) as graph:
        for held in (eager, cache):
            first = generated(llama, ids, held, 3)
            held.crop(-2)
            assert held.get_seq_length() == 131
            second = generated(llama, torch.cat([first[:, :131], ids[:, :2]], 1), held, 3)
            if held is eager:
                want, graph.ordinary = second, 0
    assert torch.equal(second, want)
    assert (graph.ordinary, graph.replayed) == (3, 3)
    assert_alike(cache, eager)


@pytest.mark.long
def test_beams_run_as_usual(llama):
    ids = drawn(1, 131)
    eager = filled(llama, ids)
    eager.batch_repeat_interleave(2)
    cache = eager.clone()
    want = generated(llama, ids, eager, 3, num_beams=2)
    with GraphedDecoding(llama, cache, capture=False) as graph:
        got = generated(llama, ids, cache, 3, num_beams=2)
    assert torch.equal(got, want)
    assert graph.replayed == 0


@pytest.mark.long
def test_more_than_logits_is_asked_of_the_model_itself(llama):
    ids = drawn(1, 131)
    cache = filled(llama, ids)
    with torch.no_grad(), GraphedDecoding(llama, cache, capture=False) as graph:
        token = ids[:, -1:]
        for _ in range(2):
            llama(token, past_key_values=cache)
        assert graph.replayed == 1
        out = llama(token, past_key_values=cache, output_hidden_states=True)
        assert len(out.hidden_states) == 3
        assert isinstance(llama(token, past_key_values=cache, return_dict=False), tuple)
        other = filled(llama, ids)
        llama(token, past_key_values=other)
    assert (graph.ordinary, graph.replayed) == (4, 1)
    assert other.get_seq_length() == 131


# -- what is wrong ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_values_that_are_not_finite_are_told_of_in_the_next_step(llama):
    ids = drawn(1, 131)
    eager = filled(llama, ids)
    cache = eager.clone()
    embedding = llama.get_input_embeddings().weight
    before = embedding[5].clone()
    told = []
    try:
        for held in (eager, cache):
            graph = GraphedDecoding(llama, held, capture=False)
            with torch.no_grad(), graph:
                if held is eager:
                    graph._step_of = lambda given: None  # type: ignore[method-assign]
                for token in (7, 7):
                    llama(torch.tensor([[token]]), past_key_values=held)
                embedding.data[5] = torch.nan
                llama(torch.tensor([[5]]), past_key_values=held)
                embedding.data[5] = before
                with pytest.raises(NonFiniteError, match="in an earlier step") as raised:
                    llama(torch.tensor([[7]]), past_key_values=held)
                told.append(str(raised.value))
                assert held.get_seq_length() == 133
            held.reset() if held is eager else None
    finally:
        embedding.data[5] = before
    assert "layer 0" in told[0]
    assert told[0] == told[1]
    with torch.no_grad():
        for layer in cache.layers[1:]:
            with pytest.raises(NonFiniteError):
                layer.kv.look()
        llama(torch.tensor([[7]]), past_key_values=cache)
    assert cache.get_seq_length() == 134


@pytest.mark.long
@pytest.mark.parametrize("said", ["mask", "positions"])
def test_steps_that_contradict_the_cache_are_refused_as_without_a_graph(said, llama):
    ids = drawn(1, 131)
    cache = filled(llama, ids)
    with torch.no_grad(), GraphedDecoding(llama, cache, capture=False) as graph:
        for _ in range(2):
            llama(ids[:, -1:], past_key_values=cache)
        mask = torch.ones(1, 133, dtype=torch.int64)
        mask[0, 9] = 0
        given = {"attention_mask": mask} if said == "mask" else {"position_ids": torch.tensor([[17]])}
        with pytest.raises(InputError, match="hides tokens" if said == "mask" else "behind the 132"):
            llama(ids[:, -1:], past_key_values=cache, **given)
    assert graph.replayed == 1


@pytest.mark.long
def test_attention_that_a_graph_does_not_hold_is_refused_before_anything_changes(models):
    model = models("llama4")
    ids = drawn(1, 131)
    cache = filled(model, ids)
    with torch.no_grad(), GraphedDecoding(model, cache, capture=False):
        model(ids[:, -1:], past_key_values=cache)
        before = [content(layer.kv) for layer in cache.layers]
        with pytest.raises(UnsupportedError, match=r"^model: layer \d has a mask of another kind"):
            model(ids[:, -1:], past_key_values=cache)
    cache.check_level()
    assert [content(layer.kv) for layer in cache.layers] == before
    with torch.no_grad():
        model(ids[:, -1:], past_key_values=cache)
    assert cache.get_seq_length() == 132


def test_arguments(llama, models):
    cache = TurboCache(llama.config, OFF, max_tokens=256, backend="triton")
    with pytest.raises(InputError, match=r"^model: expected a transformers model, got Linear"):
        GraphedDecoding(torch.nn.Linear(1, 1), cache, capture=False)
    with pytest.raises(InputError, match=r"^cache: expected a TurboCache, got DynamicCache"):
        GraphedDecoding(llama, transformers.DynamicCache(), capture=False)
    with pytest.raises(InputError, match=r"^cache: expected a TurboCache with max_tokens"):
        GraphedDecoding(llama, TurboCache(llama.config, OFF, backend="triton"), capture=False)
    with pytest.raises(InputError, match=r"^model: expected it on a CUDA device, got cpu"):
        GraphedDecoding(llama, cache)
    with pytest.raises(UnsupportedError, match=r'^backend: expected "triton"'):
        GraphedDecoding(llama, TurboCache(llama.config, OFF, max_tokens=256, backend="reference"), capture=False)
    llama.set_attn_implementation("eager")
    with pytest.raises(InputError, match=r'^model: expected attn_implementation="turbo", got \'eager\''):
        GraphedDecoding(llama, cache, capture=False)


def test_the_models_forward_comes_back(llama):
    cache = TurboCache(llama.config, OFF, max_tokens=256, backend="triton")
    graph = GraphedDecoding(llama, cache, capture=False)

    def entered() -> None:
        with graph:
            assert "forward" in llama.__dict__
            with pytest.raises(InputError, match="once at a time"):
                graph.__enter__()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        entered()
    assert "forward" not in llama.__dict__
    llama.forward = mine = llama.forward
    try:
        with graph:
            assert llama.__dict__["forward"] is not mine
        assert llama.__dict__["forward"] is mine
    finally:
        del llama.forward


# -- what a graph holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_devices_work_of_a_step_reads_nothing(kind, models, monkeypatch):
    model = models(kind)
    ids = drawn(1, 191)
    cache = filled(model, ids)
    with torch.no_grad(), GraphedDecoding(model, cache, capture=False) as graph:
        for _ in range(2):
            model(ids[:, -1:], past_key_values=cache)
        static = graph._static
        static._try(True)
        with nothing_read(monkeypatch):
            static._work()
        static._try(False)
