"""`torch.compile(fullgraph=True)`: compiled calls give what plain calls give, and a growing cache never recompiles."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config

import turboattention as ta
from turboattention import guard
from turboattention.errors import GuardWarning, InputError, NonFiniteError, ShapeError, UnsupportedError
from turboattention.kv.handle import cache_of
from turboattention.ops import config_of

from .helpers import qkv

OFF = ta.TurboConfig(guard="off")
SOURCE = Path(__file__).parents[1] / "src"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code outlives its test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable, backend: str = "aot_eager", fullgraph: bool = True) -> Callable:
    return torch.compile(function, backend=backend, fullgraph=fullgraph)


def same(got: object, want: object) -> bool:
    if isinstance(want, (tuple, list)):
        return len(got) == len(want) and all(same(a, b) for a, b in zip(got, want, strict=True))
    return torch.equal(got, want) and got.dtype == want.dtype and got.stride() == want.stride()


def empty(**options) -> ta.KVCache:
    return ta.KVCache(2, 2, 16, **{"config": OFF, **options})


def prompt_and_token() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """q, k, v of 70 tokens, and of one."""
    return qkv(2, 4, 2, 70, 70, 16), qkv(2, 4, 2, 1, 1, 16, seed=1)


# -- the same numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention(dtype):
    q, k, v = qkv(2, 4, 2, 9, 12, 16, dtype=dtype)
    mask = torch.rand(9, 12) > 0.2
    for options in (
        {"is_causal": True, "return_lse": True},
        {"attn_mask": mask, "scale": 0.2, "softcap": 5.0},
        {"is_causal": True, "window_size": 3, "config": ta.TurboConfig(softmax="exp", bits=(4, 2))},
        {"backend": "reference"},
    ):
        torch._dynamo.reset()
        run = compiled(lambda q, k, v, options=options: ta.turbo_attention(q * 2, k, v, **options))
        assert same(run(q, k, v), ta.turbo_attention(q * 2, k, v, **options))


def test_another_configuration_is_not_mixed_up():
    q, k, v = qkv(1, 2, 2, 5, 50, 16)
    run = compiled(lambda q, k, v, config: ta.turbo_attention(q, k, v, config=config))
    results = [run(q, k, v, config) for config in (None, ta.TurboConfig(softmax="exp"), ta.TurboConfig.paper())]
    assert not torch.equal(results[0], results[1])
    assert same(results[1], ta.turbo_attention(q, k, v, config=ta.TurboConfig(softmax="exp")))
    assert same(results[2], ta.turbo_attention(q, k, v, config=ta.TurboConfig.paper()))


@pytest.mark.parametrize("config", [None, ta.TurboConfig(bits=(4, 2), sas_threshold=-5), ta.TurboConfig.paper()])
def test_configurations_survive_as_text(config):
    assert config_of("" if config is None else config.text) == config


def test_a_growing_cache_compiles_once_per_shape():
    prompt, token = prompt_and_token()
    cache, plain = empty(window_size=100), empty(window_size=100)
    run = compiled(lambda q, cache, k, v: ta.turbo_attention_with_kvcache(q, cache, k, v, return_lse=True))
    for q, k, v in (prompt, token):
        assert same(run(q, cache, k, v), ta.turbo_attention_with_kvcache(q, plain, k, v, return_lse=True))
    q, k, v = token
    with dynamo_config.patch(error_on_recompile=True):
        for _ in range(140):  # over two blocks, the freezing of widths and the first eviction
            assert same(run(q, cache, k, v), ta.turbo_attention_with_kvcache(q, plain, k, v, return_lse=True))
        # Nor do other caches of the same kind.
        for other in (cache.clone(), empty(window_size=100)):
            before = len(other)
            run(q, other, k, v)
            assert len(other) == before + 1
    assert len(cache) == len(plain) == 211
    assert same(cache.dequantize(), plain.dequantize())


def step(q: Tensor, cache: ta.KVCache, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Everything that compiled code can do with a cache, in an order that matters; one result is dropped."""
    before = cache.seq_lens
    q = q + before[:, None, None, None]
    first = ta.turbo_attention_with_kvcache(q, cache, k, v)
    between = cache.seq_lens
    ta.turbo_attention_with_kvcache(q, cache, k, v)
    cache.append(k, v, torch.tensor([1, 0]))
    second, lse = ta.turbo_attention_with_kvcache(q, cache, return_lse=True)
    third = ta.turbo_attention_with_kvcache(q, cache, k, v, lengths=torch.tensor([0, 1]))
    return before, first, between, second, lse, third, cache.seq_lens


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="it needs g++")),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # PyTorch's own
def test_calls_in_one_graph_keep_their_order(backend):
    prompt, (q, k, v) = prompt_and_token()
    cache, plain = empty(), empty()
    for each in (cache, plain):
        each.append(*prompt[1:])
    run = compiled(step, backend)
    for _ in range(2):
        assert same(run(q, cache, k, v), step(q, plain, k, v))
    assert cache.seq_lens.tolist() == plain.seq_lens.tolist() == [76, 76]


def test_two_caches_in_one_graph():
    _, (q, k, v) = prompt_and_token()
    caches, plain = [empty(), empty()], [empty(), empty()]

    def layers(q: Tensor, caches: list[ta.KVCache], k: Tensor, v: Tensor) -> Tensor:
        for cache in caches:
            q = ta.turbo_attention_with_kvcache(q, cache, k, v)
        return q

    run = compiled(layers)
    for _ in range(3):
        assert same(run(q, caches, k, v), layers(q, plain, k, v))
    assert [len(cache) for cache in caches] == [3, 3]


# -- what a graph does not know ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nbytes", "head_bits", "device", "page_counts", "__len__", "dequantize"])
@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")  # it looks into what it then leaves alone
def test_other_reads_of_a_cache_end_the_graph_and_are_not_stale(name):
    (q, k, v), _ = prompt_and_token()

    def read(cache: ta.KVCache) -> object:
        ta.turbo_attention_with_kvcache(q, cache, k, v)
        value = getattr(cache, name)
        return value() if callable(value) else value

    want = read(empty())
    got = compiled(read, "eager", fullgraph=False)(empty())
    assert same(got, want) if isinstance(want, (Tensor, tuple)) else got == want
    with pytest.raises(torch._dynamo.exc.Unsupported, match="of a KVCache, compiled code can use"):
        compiled(read)(empty())


@pytest.mark.parametrize("change", [lambda cache: cache.crop(3), lambda cache: cache.reorder(torch.tensor([1, 0, 0]))])
@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")  # it looks into what it then leaves alone
def test_other_changes_of_a_cache_end_the_graph(change):
    (q, k, v), _ = prompt_and_token()

    def turn(cache: ta.KVCache) -> Tensor:
        ta.turbo_attention_with_kvcache(q, cache, k, v)
        change(cache)
        return cache.seq_lens

    assert same(compiled(turn, "eager", fullgraph=False)(empty()), turn(empty()))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="of a KVCache, compiled code can use"):
        compiled(turn)(empty())


# -- refusals and warnings ----------------------------------------------------------------------------------


def test_errors_are_those_of_plain_calls_and_leave_the_cache():
    (q, k, v), _ = prompt_and_token()
    with pytest.raises(ShapeError, match=r"q: expected \[batch"):
        compiled(lambda: ta.turbo_attention(q[0], k, v))()
    cache = empty()
    run = compiled(lambda q, k, v: ta.turbo_attention_with_kvcache(q, cache, k, v))
    with pytest.raises(NonFiniteError, match="k_new"):
        run(q, k / 0, v)
    with pytest.raises(ShapeError, match="v_new"):
        run(q, k, v[:, :, 1:])
    assert len(cache) == 0


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_gradients_are_refused(name):
    tensors = dict(zip("qkv", prompt_and_token()[0], strict=True))
    tensors[name].requires_grad_()
    cache = empty()

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ta.turbo_attention(q * 2, k * 2, v * 2)

    def cached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ta.turbo_attention_with_kvcache(q * 2, cache, k * 2, v * 2)

    for function in (dense, cached):
        with torch.no_grad():
            compiled(function, fullgraph=False)(**tensors)
        with pytest.raises(UnsupportedError, match=f"{name}.*: expected a tensor without gradients"):
            compiled(function, fullgraph=False)(**tensors)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{name}.*: expected a tensor without gradients"):
            compiled(function)(**tensors)
    assert len(cache) == 70  # from under no_grad


def test_the_guard_speaks_from_compiled_code(monkeypatch):
    monkeypatch.setitem(guard.BOUNDS, 4, 1e-3)
    q, k, v = qkv(1, 2, 1, 200, 200, 16)
    cache = ta.KVCache(1, 1, 16)
    with pytest.warns(GuardWarning, match="loses? too much"):
        compiled(lambda: ta.turbo_attention_with_kvcache(q, cache, k, v))()


# -- handles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [ta.KVCache.clone, copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["clone", "copy", "deepcopy", "pickle"],
)
def test_copies_have_handles_of_their_own(duplicate):
    cache = empty()
    other = duplicate(cache)
    assert cache_of(cache.handle) is cache
    assert cache_of(other.handle.clone()) is other
    cache.reorder(torch.tensor([0]))
    assert cache_of(cache.handle) is cache


def test_handles_keep_no_cache_alive():
    handle = empty().handle
    gc.collect()
    with pytest.raises(InputError, match="handle: expected the handle of a live KVCache"):
        cache_of(handle)


# -- the operators ------------------------------------------------------------------------------------------

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_opcheck_attention(dtype):
    q, k, v = qkv(2, 4, 2, 5, 7, 16, dtype=dtype)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.rand(5, 7) > 0.3
    for call in (
        (q, k, v, None, True, None, None, None, "", "auto"),
        (strided, k, v, mask, False, 0.3, 4, 20.0, ta.TurboConfig.paper().text, "reference"),
        (q[:0], k[:0], v[:0], None, False, None, None, None, "", "auto"),
    ):
        torch.library.opcheck(torch.ops.turboattention.attention.default, call, test_utils=CHECKS)


def test_opcheck_attention_over_a_cache():
    q, k, v = qkv(2, 4, 2, 5, 5, 16)
    cache = empty()
    cache.append(k, v)
    options = None, False, None, None, None, "auto", 16
    op = torch.ops.turboattention.attention_with_kvcache.default
    # Reading can be repeated, which the last check does; appending cannot.
    torch.library.opcheck(op, (cache.handle, q, None, None, None, *options), test_utils=CHECKS)
    torch.library.opcheck(op, (cache.handle, q, k, v, torch.tensor([5, 2]), *options), test_utils=CHECKS[:3])
    torch.library.opcheck(torch.ops.turboattention.append.default, (cache.handle, k, v, None), test_utils=CHECKS)
    torch.library.opcheck(torch.ops.turboattention.seq_lens.default, (cache.handle, 2), test_utils=CHECKS)


# -- outside of compilation ----------------------------------------------------------------------------------


def test_plain_calls_do_not_go_through_the_operators(monkeypatch):
    monkeypatch.setattr("turboattention.api.ops", None)
    (q, k, v), _ = prompt_and_token()
    ta.turbo_attention(q, k, v)
    ta.turbo_attention_with_kvcache(q, empty(), k, v)


def test_the_first_use_of_the_package_may_be_compiled():
    probe = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
import torch
import turboattention as ta
x = torch.ones(1, 2, 3, 8)
run = torch.compile(lambda x: ta.turbo_attention(x, x, x), fullgraph=True, backend="eager")
print(run(x).shape == x.shape)
"""
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"]
