"""Where the kernels meet their callers: devices, launch options, what the host may read, the quantizer of caches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import turboattention as ta
from turboattention import dispatch
from turboattention.config import TurboConfig
from turboattention.errors import DtypeError, UnsupportedError
from turboattention.impl import triton as backend
from turboattention.impl.triton import TritonBackend
from turboattention.impl.triton import quantizer as triton_quantizer
from turboattention.impl.triton import steps as triton_steps
from turboattention.impl.triton.host_lengths import Fills
from turboattention.params import AttentionParams

from ...helpers import normals, qkv
from ...kv.tools import append_range, content
from ...kv.tools import filled as filled_with
from .attending import OFF, both, filled

from turboattention.kernels.triton import configs, decode_rows, prefill_rows  # isort: skip

NO_SINKS = OFF.replace(sink_tokens=0)
GPU = torch.device("cuda", 0)


# -- arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40])
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_beyond_int32_hide_nothing(window, queries, causal):
    cache = filled([130, 70])
    q = normals(2, 4, queries, 16)
    got = both(q, cache, causal=causal, window=window)
    for a, b in zip(got, both(q, cache, causal=causal), strict=True):
        assert torch.equal(a, b)


def test_a_mask_on_another_device_is_refused():
    q, k, v = qkv(1, 2, 1, 3, 3, 16)
    mask = torch.ones(3, 3, dtype=torch.bool, device="meta")
    cache = ta.KVCache(1, 1, 16, config=OFF)
    with pytest.raises(DtypeError, match=r"^attn_mask: expected a tensor on cpu, as q is, got one on meta$"):
        ta.turbo_attention(q, k, v, attn_mask=mask)
    with pytest.raises(DtypeError, match=r"^attn_mask: expected a tensor on cpu, as q is, got one on meta$"):
        ta.turbo_attention_with_kvcache(q, cache, k, v, attn_mask=mask)
    assert cache.seq_lens.tolist() == [0]


# -- devices ----------------------------------------------------------------------------------------------


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch):
    """Makes the GPU one of a compute capability."""

    plain = {name: getattr(configs, name).__wrapped__ for name in ("architecture_of", "refusal")}

    def make(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        for name, function in plain.items():
            monkeypatch.setattr(configs, name, function)

    return make


@pytest.mark.parametrize(
    "given, name",
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_90"), ((12, 0), "sm_80")],
    ids=str,
)
def test_gpus_take_launches_whose_memory_they_have(given, name, capability):
    capability(*given)
    assert configs.refusal(GPU) is None
    assert configs.architecture_of(GPU).name == name


def test_gpus_without_the_instructions_are_refused(capability, monkeypatch):
    capability(7, 5)
    reason = "cuda:0 has compute capability 7.5, its kernels need 8.0"
    assert configs.refusal(GPU) == reason
    assert configs.refusal(torch.device("cpu")) is None
    assert TritonBackend().refusal(dispatch.CallTraits(TurboConfig(), torch.float32, GPU)) == reason
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    monkeypatch.setattr(backend, "_availability", lambda interpreted: dispatch.Availability("triton", True, ""))
    assert dispatch.quantizer_on(GPU) is None
    capability(8, 0)
    assert dispatch.quantizer_on(GPU) is triton_quantizer


def test_the_launcher_refuses_them_too(monkeypatch):
    monkeypatch.setattr(configs, "refusal", lambda device: "it is old")
    with pytest.raises(UnsupportedError, match=r"got one where it is old$"):
        both(normals(1, 2, 1, 16), filled([70]))


# -- launches ---------------------------------------------------------------------------------------------


def test_every_launch_of_attention_names_fusion(monkeypatch):
    launched: dict[str, dict[str, Any]] = {}

    class Recorded:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(launchers[name], name)

        def __getitem__(self, grid: tuple[int, ...]):
            def launch(*args: Any, **options: Any) -> None:
                launched[self.name] = options
                self.kernel[grid](*args, **options)

            return launch

    launchers = dict.fromkeys(("decode", "combine"), decode_rows)
    launchers |= dict.fromkeys(("prefill", "unpack_pages", "unpack_rows"), prefill_rows)
    for name, launcher in launchers.items():
        monkeypatch.setattr(launcher, name, Recorded(name))
    cache = filled([130])
    for queries in (1, 20):
        both(normals(1, 4, queries, 16), cache)
    assert set(launched) == set(launchers)
    assert all(options["enable_fp_fusion"] is True for options in launched.values())


# -- what the host reads ----------------------------------------------------------------------------------

READS = (
    "tolist",
    "item",
    "cpu",
    "numpy",
    "nonzero",
    "equal",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
)


@contextlib.contextmanager
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of the CPU stand for the device's here: whatever would fetch a value of theirs fails."""

    def read(*args: Any, **options: Any) -> None:
        raise AssertionError("a tensor was read")

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, read)
        yield


@pytest.mark.parametrize("name", ["tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__"])
def test_reads_are_noticed(name, monkeypatch):
    x = torch.ones(1)
    with pytest.raises(AssertionError, match="a tensor was read"), nothing_read(monkeypatch):
        getattr(x, name)()


@pytest.mark.parametrize("lengths, fills", [([191, 130], True), ([190, 130], False)], ids=str)
def test_the_devices_work_of_a_step_reads_nothing_in_any_way(lengths, fills, monkeypatch):
    cache, *_ = filled_with(lengths, config=NO_SINKS)
    q, k, v = qkv(2, 4, 2, 1, 1, 16, seed=7)
    steps = triton_steps.steps_of(cache)
    plan = steps.host_lengths.plan([1, 1])
    assert plan.fills == Fills(pages=fills)
    steps.tables.take(plan)
    with nothing_read(monkeypatch):
        steps.copied().run(q, k, v, AttentionParams(True, 0.25), fills=plan.fills)
        steps.store(k, v, fills=plan.fills)


# -- the quantizer that caches on a GPU take --------------------------------------------------------------


@pytest.mark.parametrize(
    "config, options",
    [
        (OFF, {}),
        (NO_SINKS.replace(bits="mixed"), {}),
        (NO_SINKS.replace(bits=3, smooth_k=False), {"window_size": 100}),
        (OFF.replace(bits=(4, 2), flush_lag=1), {}),
    ],
    ids=str,
)
def test_caches_store_by_the_kernels_what_they_store_by_pytorch(config, options, monkeypatch):
    """Prompts, ragged chunks, single tokens over a block's end, and back again."""
    used = set()

    def recorded(name: str):
        def call(*args: Any) -> Any:
            used.add(name)
            return getattr(triton_quantizer, name)(*args)

        return call

    kernels = SimpleNamespace(**{name: recorded(name) for name in triton_quantizer.__all__})
    found = []
    for provider in (lambda device: kernels, lambda device: None):
        monkeypatch.setattr(dispatch, "quantizer_on", provider)
        cache, *_ = filled_with([30, 3], config=config, **options)
        more = normals(2, 2, 2, 200, 16, seed=4)
        append_range(cache, *more, (0, 0), (120, 7))
        append_range(cache, *more, (120, 7), (150, 130))
        for at in range(130, 134):
            cache.append(*(x[:, :, at : at + 1] for x in more))
        cache.append(*(x[:, :, 140:180] for x in more))
        found.append((content(cache), cache.dequantize()))
    (stored, values), (wanted, wanted_values) = found
    assert stored == wanted
    assert all(torch.equal(a, b) for a, b in zip(values, wanted_values, strict=True))
    assert used >= {"append", "encode_pages", "decode_pages"}
    decides = config.bits == "mixed"  # else `append` stores all, prompts too
    assert ("quantize_tokens" in used) is decides
    assert ("first_block_mean" in used) is (decides and config.smooth_k)
