"""Values whose head_dim is not that of the keys, as in models with latent attention; and heads of 512 channels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import turboattention as ta
from turboattention import dispatch
from turboattention.errors import FormatError, ShapeError
from turboattention.impl.inputs import pages_of
from turboattention.kv import serialization
from turboattention.kv.layout import PageLayout
from turboattention.kv.pages import Tiles, decode_pages, encode_pages
from turboattention.reference.exact import exact_attention

from .helpers import normals
from .kernels.cpu.attending import assert_close
from .kernels.cpu.tools import every_isa

OFF = ta.TurboConfig(guard="off")
DIMS = pytest.mark.parametrize("dims", [(192, 128), (24, 16), (16, 40), (512, 512), (512, 8), (8, 512)], ids=str)
WIDTHS = pytest.mark.parametrize("bits", [8, 4, 3, 2, "mixed", (4, 2)], ids=str)
PIECES = [130, 1, 1, 3, 40, 1, 64, 1]


def tensors(dims: tuple[int, int], tokens: int = sum(PIECES), batch: int = 2, heads: int = 4) -> list[Tensor]:
    """q [B, Hq, L, D], k [B, 2, L, D], v [B, 2, L, Dv]."""
    shapes = ((heads, dims[0]), (2, dims[0]), (2, dims[1]))
    return [normals(batch, n, tokens, width, seed=i) for i, (n, width) in enumerate(shapes)]


def run(cache: ta.KVCache, q: Tensor, k: Tensor, v: Tensor, backend: str, pieces: list[int] = PIECES):
    """out and lse of a cache that takes all tokens in pieces."""
    outs, start = [], 0
    for size in pieces:
        q_new, k_new, v_new = (x[:, :, start : start + size] for x in (q, k, v))
        outs.append(ta.turbo_attention_with_kvcache(q_new, cache, k_new, v_new, return_lse=True, backend=backend))
        start += size
    return torch.cat([out for out, _ in outs], 2), torch.cat([lse for _, lse in outs], 2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@DIMS
def test_close_to_exact_attention(dims, backend):
    q, k, v = tensors(dims)
    exact = exact_attention(q, k, v, is_causal=True)[0]
    config = OFF.replace(bits=8)
    for out in (
        ta.turbo_attention(q, k, v, is_causal=True, config=config, backend=backend),
        run(ta.KVCache(2, 2, dims[0], v_head_dim=dims[1], config=config), q, k, v, backend)[0],
    ):
        assert out.shape == (*q.shape[:3], dims[1])
        assert float((out - exact).norm() / exact.norm()) < 0.02


@every_isa
@WIDTHS
@DIMS
def test_kernels_and_reference_agree(isa, dims, bits, monkeypatch):
    monkeypatch.setenv("TURBOATTENTION_ISA", isa)
    config, given = OFF.replace(bits=bits), tensors(dims, heads=2)
    caches = [ta.KVCache(2, 2, dims[0], v_head_dim=dims[1], config=config) for _ in range(2)]
    assert_close(*(run(cache, *given, backend) for cache, backend in zip(caches, ("cpu", "reference"), strict=True)))
    both = [{"return_lse": True, "backend": backend} for backend in ("cpu", "reference")]
    assert_close(*(ta.turbo_attention_with_kvcache(given[0][:, :, :2], caches[0], **options) for options in both))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"token_scales": False, "reorder_k": False}, {"flush_lag": 64}], ids=str)
def test_the_same_as_values_padded_by_zeros(options, backend):
    """Without the rotation, channels of zeros change nothing, to the last bit. (In floating point, PyTorch computes the
    first queries in another order.)"""
    config, (q, k, v) = OFF.replace(rotate=False, exact_rows=0, bits=4, **options), tensors((48, 32))
    own = run(ta.KVCache(2, 2, 48, v_head_dim=32, config=config), q, k, v, backend)
    padded = run(ta.KVCache(2, 2, 48, config=config), q, k, F.pad(v, (0, 16)), backend)
    assert torch.equal(padded[0][..., :32], own[0])
    assert not padded[0][..., 32:].any()
    assert torch.equal(padded[1], own[1])


def test_queries_alone_and_a_cache_without_tokens():
    cache = ta.KVCache(1, 2, 24, v_head_dim=16, config=OFF)
    for backend in ("cpu", "reference"):
        out = ta.turbo_attention_with_kvcache(normals(1, 4, 3, 24), cache, backend=backend)
        assert out.shape == (1, 4, 3, 16)
        assert not out.any()


# -- what is stored ----------------------------------------------------------------------------------


@pytest.mark.parametrize("halves", [(), (True, False, True)])
def test_sections_of_a_page(halves):
    """Each byte is counted by the width it has; decoding gives what was encoded, at 8 bits exactly."""
    layout = PageLayout(48, 64, (3, 8, 2), (4, 2, 8), True, halves, v_head_dim=24)
    codes = 64 // 8 * (48 * (3 + 8 + 2) + 24 * (4 + 2 + 8))
    assert layout.k_steps == codes
    assert layout.v_steps == codes + 2 * 2 * 48
    assert layout.k_token_scales == codes + 2 * 2 * 48 + 2 * 2 * 24
    assert layout.page_bytes == -(-(layout.k_token_scales + 2 * 3 * 64 + 2 * 3 * 4) // 16) * 16
    assert layout != PageLayout(48, 64, (3, 8, 2), (4, 2, 8), True, halves)
    k8, v8 = ((normals(2, 3, 64, width) * 40).clamp(-119, 119).to(torch.int8) for width in (48, 24))
    scales = torch.ones(2, 3, 64)
    again = decode_pages(layout, encode_pages(layout, Tiles(k8, v8, scales, scales), False))
    assert torch.equal(again.k8[:, 1], k8[:, 1])
    assert torch.equal(again.v8[:, 2], v8[:, 2])
    assert int((again.v8[:, 0].int() - v8[:, 0].int()).abs().max()) <= 10


def test_values_take_their_own_bytes():
    """At 192 and 128 channels, a fifth of a cache whose values are padded to 192."""
    _, k, v = tensors((192, 128), 1024, batch=1)
    own, padded = ta.KVCache(1, 2, 192, v_head_dim=128, config=OFF), ta.KVCache(1, 2, 192, config=OFF)
    own.append(k, v)
    padded.append(k, F.pad(v, (0, 64)))
    assert own.nbytes / padded.nbytes == pytest.approx(320 / 384, abs=0.01)
    assert own.bits_per_element == pytest.approx(own.nbytes * 8 / (1024 * 2 * 320))
    assert own.bits_per_element == pytest.approx(padded.bits_per_element, rel=0.01)
    assert "v_head_dim=128" in repr(own)
    assert "v_head_dim" not in repr(padded)


@pytest.mark.parametrize("bits", [4, 3])
def test_crop_reorder_copies_and_files(bits, tmp_path):
    q, k, v = tensors((24, 40))
    cache = ta.KVCache(2, 2, 24, v_head_dim=40, config=OFF.replace(bits=bits))
    run(cache, q, k, v, "cpu")
    cache.save(tmp_path / "cache")
    loaded, copied = ta.KVCache.load(tmp_path / "cache"), copy.deepcopy(cache)
    assert (loaded.v_head_dim, loaded.nbytes) == (40, cache.nbytes)
    want = cache.dequantize()
    assert [x.shape[3] for x in want] == [24, 40]
    for other in (loaded, copied):
        assert all(torch.equal(x, y) for x, y in zip(other.dequantize(), want, strict=True))
    for changed in (cache, loaded):
        changed.crop(160)
        changed.reorder(torch.tensor([1, 1]))
    outs = [run(x, q[[1, 1], :, 160:], k[[1, 1], :, 160:], v[[1, 1], :, 160:], "cpu", [1, 70]) for x in (cache, loaded)]
    assert torch.equal(outs[0][0], outs[1][0])
    exact = exact_attention(q[[1, 1]], k[[1, 1]], v[[1, 1]], is_causal=True)[0][:, :, 160:231]
    assert float((outs[0][0] - exact).norm() / exact.norm()) < (0.12 if bits == 4 else 0.2)


def test_a_file_that_says_other_widths_is_refused(tmp_path):
    cache = ta.KVCache(1, 2, 24, v_head_dim=40, config=OFF)
    cache.append(*tensors((24, 40), batch=1)[1:])
    parts = serialization.cache_tensors(cache, ""), serialization.cache_metadata(cache)
    with pytest.raises(FormatError, match=r"buffer\.v8"):
        serialization.cache_from_tensors(parts[0], {**parts[1], "v_head_dim": 24}, "")
    without = {name: x for name, x in parts[1].items() if name != "v_head_dim"}
    with pytest.raises(FormatError, match=r"buffer\.v8"):  # as earlier releases wrote it: one head_dim
        serialization.cache_from_tensors(parts[0], without, "")


def test_the_guard_looks_at_values_of_their_own_width():
    q, k, v = tensors((64, 32), batch=1)
    cache = ta.KVCache(1, 2, 64, v_head_dim=32, config=ta.TurboConfig(bits=2))
    with pytest.warns(ta.errors.GuardWarning, match="KV head"):
        run(cache, 8 * q, k, v, "cpu", [sum(PIECES)])
    assert pages_of(cache) is not None


# -- compiled code and refusals ----------------------------------------------------------------------


def test_compiled_calls_have_the_shapes_of_plain_ones():
    torch._dynamo.reset()
    q, k, v = tensors((24, 40))
    caches = [ta.KVCache(2, 2, 24, v_head_dim=40, config=OFF) for _ in range(2)]

    def attend(q, k, v, cache):
        out = ta.turbo_attention_with_kvcache(q, cache, k, v)
        return ta.turbo_attention_with_kvcache(q[:, :, -1:], cache) + out.sum(2, keepdim=True), out

    def dense(q, k, v):
        return ta.turbo_attention(q, k, v, is_causal=True) * 2

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(q, k, v, caches[0]), attend(q, k, v, caches[1]), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(torch.compile(dense, backend="aot_eager", fullgraph=True)(q, k, v), dense(q, k, v))
    torch._dynamo.reset()


def test_tokens_of_other_widths_are_refused():
    cache = ta.KVCache(1, 2, 24, v_head_dim=40)
    q, k, v = tensors((24, 40), 5, batch=1)
    with pytest.raises(ShapeError, match=r"^v: expected shape \(1, 2, tokens, 40\), got \(1, 2, 5, 24\)$"):
        cache.append(k, k)
    with pytest.raises(ShapeError, match=r"^k_new: expected shape \(1, 2, tokens, 24\), got \(1, 2, 5, 40\)$"):
        ta.turbo_attention_with_kvcache(q, cache, v, v)
    with pytest.raises(ShapeError, match=r"^v: expected a head_dim that is a multiple of 8 up to 512, got 12$"):
        ta.turbo_attention(q, k, v[..., :12])
    assert len(cache) == 0


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ((512, 512), "head_dim is 512, the GPU kernels compute up to 256"),
        ((64, 512), "head_dim is 512, the GPU kernels compute up to 256"),
        ((192, 128), None),
        ((256, 256), None),
    ],
)
def test_gpu_kernels_refuse_them_by_name(dims, reason, monkeypatch):
    monkeypatch.setattr("turboattention.impl.triton._device_refusal", lambda device: None)
    call = dispatch.CallTraits(OFF, torch.float32, torch.device("cuda"), 1, dims)
    assert dispatch.TABLE["triton"].refusal(call) == reason
