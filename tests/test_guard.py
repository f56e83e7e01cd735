"""The guard: heads with a large error get more bits, with one warning."""

from __future__ import annotations

import warnings

import pytest
import torch

import turboattention as ta
from turboattention.errors import GuardWarning, NonFiniteError
from turboattention.guard import BOUNDS, _advice, bound_of, fixed_widths_message, widen
from turboattention.guard_sample import Sample
from turboattention.reference.exact import exact_attention

from .helpers import qkv, relative_error
from .kv.tools import content


def hard(
    heads: tuple[int, ...], batch: int = 1, length: int = 200, kv_heads: int = 4, group: int = 1, gain: float = 40.0
):
    """q, k, v of normal values, where the keys of some heads swing by `gain` along a direction that
    no query looks at: exact attention does not notice, a step that covers the swing hides the rest."""
    q, k, v = qkv(batch, kv_heads * group, kv_heads, length, length, 64)
    swing = torch.where(torch.arange(length) % 2 == 0, -gain, gain)
    q[..., 0] = 0
    for head in heads:
        q[:, head * group : (head + 1) * group] *= 3
        k[:, head, :, 0] += swing
    return q, k, v


def run(tensors, config=None, label: str | None = "layer 3", **options) -> tuple[ta.KVCache, list[str]]:
    """One prefill; the cache and its warnings."""
    q, k, v = tensors
    cache = ta.KVCache(k.shape[0], k.shape[1], k.shape[3], config=config, **options)
    cache.label = label
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ta.turbo_attention_with_kvcache(q, cache, k, v)
    assert all(w.category is GuardWarning for w in caught)
    return cache, [str(w.message) for w in caught]


def in_steps(cache: ta.KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: int) -> None:
    """One call for every `step` tokens."""
    for start in range(0, q.shape[2], step):
        part = [x[:, :, start : start + step] for x in (q, k, v)]
        ta.turbo_attention_with_kvcache(part[0], cache, *part[1:])


# -- what it does ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"scale": 1e-4}, {"softcap": 1e-3}, {"window_size": 1}], ids=str)
def test_attention_is_judged_as_it_is_called(options):
    """The keys of these heads cannot be stored at 4 bits, but such weights hardly depend on them."""
    q, k, v = hard((1, 3))
    cache = ta.KVCache(1, 4, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ta.turbo_attention_with_kvcache(q, cache, k, v, **options)
    assert cache.head_bits.tolist() == [[4] * 4] * 2
    assert run((q, k, v))[0].head_bits.tolist() == [[4, 8, 4, 8]] * 2


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_hard_heads_get_more_bits_and_are_named_once(bits, group):
    cache, said = run(hard((1, 3), group=group), ta.TurboConfig(bits=bits))
    wide = [[bits, 8, bits, 8]] * 2
    assert cache.head_bits.tolist() == wide
    assert len(said) == 1
    assert "\n" not in said[0]
    assert said[0].startswith("layer 3: KV heads 1, 3 lose too much in the quantized cache (head ")
    assert f"at K {bits} and V {bits} bits, bound {BOUNDS[bits]:.2f}); raised to K/V bits 1: 8/8, 3: 8/8" in said[0]
    assert cache.page_table.pools.compressed.layout.k_bits == tuple(wide[0])


def test_two_bits():
    cache, said = run(hard((1,)), ta.TurboConfig(bits=2))
    assert cache.head_bits.tolist() == [[2, 8, 2, 2]] * 2
    assert "at K 2 and V 2 bits, bound 0.70); raised to K/V bits 1: 8/8" in said[0]


@pytest.mark.parametrize("length", [200, 400, 1024])
@pytest.mark.parametrize("group", [1, 2])
def test_large_keys_with_outlier_channels_at_two_bits(length, group):
    """The head's output is about as wrong as zeros would be."""
    q, k, v = qkv(1, 2 * group, 2, length, length, 64)
    k[:, 1] *= 6
    k[:, 1, :, :2] *= 20
    plain, _ = run((q, k, v), ta.TurboConfig(bits=2, guard="off"))
    stored, exact = (exact_attention(q[:, :, -64:], *kv, is_causal=True)[0] for kv in (plain.dequantize(), (k, v)))
    assert relative_error(stored[:, group:], exact[:, group:]) > 0.7
    cache, said = run((q, k, v), ta.TurboConfig(bits=2))
    assert int(cache.head_bits[:, 1].min()) > 2
    assert cache.head_bits[:, 0].tolist() == [2, 2]
    assert len(said) == 1
    assert said[0].startswith("layer 3: KV head 1 loses too much")


def measured(monkeypatch, errors: list[dict[int, float]]) -> None:
    """Let the error of head h at narrower width w be `errors[h][w]`."""

    def by_width(_, bits: torch.Tensor) -> torch.Tensor:
        found = [error[int(width)] for error, width in zip(errors, bits.amin(0), strict=True)]
        return torch.tensor(found, dtype=torch.float64)

    monkeypatch.setattr("turboattention.guard.Sample.errors", by_width)


def test_bits_go_up_only_as_far_as_needed(monkeypatch):
    errors = [
        {2: 0.7},
        {2: 0.71, 3: 0.6, 8: 0.0},
        {2: 1.1, 3: 0.61, 4: 0.3, 8: 0.0},
        {2: 9.0, 3: 9.0, 4: 0.31, 8: 0.06},
    ]
    measured(monkeypatch, errors)
    cache, said = run(hard(()), ta.TurboConfig(bits=2))
    assert cache.head_bits.tolist() == [[2, 3, 4, 8]] * 2
    assert said == [
        "layer 3: KV heads 1, 2, 3 lose too much in the quantized cache (head 3 has relative error 9.00 at K 2 and V 2 "
        "bits, bound 0.70); raised to K/V bits 1: 3/3, 2: 4/4, 3: 8/8; head 3 remains beyond its bound; "
        "8 bits are not enough: keep the layer in the model's own dtype (exact_layers of a TurboCache)"
    ]


def test_an_error_that_is_not_a_number_is_beyond_every_bound(monkeypatch):
    measured(monkeypatch, [{4: 0.1}, {4: float("nan"), 8: 0.01}, {4: 0.1}, {4: 0.1}])
    cache, said = run(hard(()))
    assert cache.head_bits.tolist() == [[4, 8, 4, 4]] * 2
    assert len(said) == 1


def test_the_narrower_of_keys_and_values_goes_up_first():
    bits = torch.tensor([[4, 2, 8, 8, 3], [2, 4, 8, 4, 3]])
    chosen = torch.tensor([True, True, True, True, False])
    assert widen(bits, chosen).tolist() == [[4, 3, 8, 8, 3], [3, 4, 8, 8, 3]]
    cache, _ = run(hard((0,)), ta.TurboConfig(bits=(3, 8)))
    assert cache.head_bits.tolist() == [[8, 3, 3, 3], [8, 8, 8, 8]]


def test_bounds():
    assert BOUNDS == {8: 0.05, 4: 0.3, 3: 0.6, 2: 0.7}
    assert bound_of(torch.tensor([[8, 4, 2], [8, 3, 4]])).tolist() == [0.05, 0.6, 0.7]


def test_more_bits_help():
    tensors = hard((1,))
    guarded, _ = run(tensors)
    plain, _ = run(tensors, ta.TurboConfig(guard="off"))
    errors = [relative_error(cache.dequantize()[0][:, 1], tensors[1][:, 1]) for cache in (guarded, plain)]
    assert errors[0] < errors[1] / 4


def test_warn_keeps_the_widths():
    cache, said = run(hard((1,)), ta.TurboConfig(guard="warn"))
    assert cache.head_bits.tolist() == [[4] * 4] * 2
    assert len(said) == 1
    assert said[0].startswith("layer 3: KV head 1 loses too much")
    assert said[0].endswith("widths kept as configured; pass bits=(8, 4) (--bits 8,4), or calibrate the model")


class Lost:
    """Stands in for the sample: heads lose what the narrower of the sides that matter to them loses."""

    def __init__(self, sides: slice):
        self.sides = sides

    def errors(self, bits: torch.Tensor) -> torch.Tensor:
        return torch.tensor([{2: 0.9, 3: 0.8, 4: 0.5, 8: 0.04}[int(b)] for b in bits[self.sides].amin(0)])


@pytest.mark.parametrize(
    ("sides", "advice"), [(slice(0, 1), "(8, 3)"), (slice(1, 2), "(4, 8)"), (slice(0, 2), "(8, 8)")]
)
def test_the_advice_names_the_side_that_loses(sides, advice):
    planned = torch.tensor([[4, 4], [3, 3]])
    said = _advice(Lost(sides), planned, torch.tensor([True, True]))
    assert said.startswith(f"pass bits={advice} (--bits {advice[1]},{advice[4]}), or calibrate")


def test_the_advice_holds_what_it_says():
    """The widths it names do not warn."""
    _, said = run(hard((1,)), ta.TurboConfig(guard="warn"))
    assert "pass bits=(8, 4)" in said[0]
    assert run(hard((1,)), ta.TurboConfig(bits=(8, 4), guard="warn"))[1] == []


def test_off_is_silent():
    cache, said = run(hard((1,)), ta.TurboConfig(guard="off"))
    assert cache.head_bits.tolist() == [[4] * 4] * 2
    assert said == []


def test_given_widths_are_never_changed():
    given = [[4, 4, 2, 2], [4, 8, 2, 2]]
    cache, said = run(hard((0, 1)), head_bits=given)
    assert cache.head_bits.tolist() == given
    assert len(said) == 1
    assert "KV heads 0, 1 lose" in said[0]
    assert "; widths kept as configured; pass bits=(8, 4) (--bits 8,4)" in said[0]


def test_heads_that_eight_bits_do_not_help_are_named():
    cache, said = run(hard((1,), gain=2000.0))
    assert cache.head_bits.tolist() == [[4, 8, 4, 4]] * 2
    assert "raised to K/V bits 1: 8/8; head 1 remains beyond its bound; 8 bits are not enough" in said[0]


def test_a_cache_without_a_label():
    _, said = run(hard((1,)), label=None)
    assert said[0].startswith("cache: KV head 1 loses")


def test_the_warning_points_at_the_caller():
    q, k, v = hard((1,))
    with pytest.warns(GuardWarning) as caught:
        ta.turbo_attention_with_kvcache(q, ta.KVCache(1, 4, 64), k, v)
    assert [w.filename for w in caught] == [__file__]


def test_mixed_widths_are_raised_from_what_they_are():
    tensors = hard((1,), gain=120.0)
    planned, _ = run(tensors, ta.TurboConfig(bits="mixed", guard="off"))
    cache, said = run(tensors, ta.TurboConfig(bits="mixed"))
    others = [0, 2, 3]
    assert cache.head_bits[:, others].tolist() == planned.head_bits[:, others].tolist()
    assert int(cache.head_bits[:, 1].min()) > int(planned.head_bits[:, 1].min())
    assert len(said) == 1


# -- when it looks -----------------------------------------------------------------------------------


def test_it_looks_at_the_first_compressed_block_only():
    q, k, v = hard((), length=400)
    cache = ta.KVCache(1, 4, 64)
    ta.turbo_attention_with_kvcache(q[:, :, :200], cache, k[:, :, :200], v[:, :, :200])
    q, k, v = hard((1,), length=400)
    ta.turbo_attention_with_kvcache(q[:, :, 200:], cache, k[:, :, 200:], v[:, :, 200:])  # a warning would be an error
    assert cache.head_bits.tolist() == [[4] * 4] * 2


def test_a_second_block_does_not_warn_again():
    q, k, v = hard((1,), length=400)
    cache = ta.KVCache(1, 4, 64)
    with pytest.warns(GuardWarning) as caught:
        in_steps(cache, q, k, v, 100)
    assert len(caught) == 1
    assert cache.head_bits.tolist() == [[4, 8, 4, 4]] * 2


@pytest.mark.parametrize("step", [1, 16, 63, 65])
def test_small_calls_are_guarded_when_the_block_fills(step):
    q, k, v = hard((1,), length=130, gain=120.0)  # few queries are there to notice
    cache = ta.KVCache(1, 4, 64)
    with pytest.warns(GuardWarning, match="KV head 1 loses") as caught:
        in_steps(cache, q, k, v, step)
    assert len(caught) == 1
    assert cache.head_bits.tolist() == [[4, 8, 4, 4]] * 2


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("parts", [[20, 130], [45, 105], [64, 86], [70, 80], [20, 60, 70], [5] * 30], ids=str)
def test_the_judgement_does_not_depend_on_the_calls(parts, window, monkeypatch):
    """Also where a call ends among the sinks, and where a window has released some of them by then."""
    tensors, judged = hard((1,), length=sum(parts), gain=120.0), []
    errors = Sample.errors

    def record(sample: Sample, bits: torch.Tensor) -> torch.Tensor:
        judged.append(errors(sample, bits))
        return judged[-1]

    def judge(parts: list[int]) -> tuple[list[list[int]], torch.Tensor]:
        judged.clear()
        cache = ta.KVCache(1, 4, 64, config=ta.TurboConfig(block_size=16), window_size=window)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for part in zip(*(x.split(parts, 2) for x in tensors), strict=True):
                ta.turbo_attention_with_kvcache(part[0], cache, *part[1:], window_size=window)
        assert [str(w.message).partition(" in ")[0] for w in caught] == ["cache: KV head 1 loses too much"]
        return cache.head_bits.tolist(), judged[0]

    monkeypatch.setattr(Sample, "errors", record)
    wanted, at_once = judge([sum(parts)])
    found, in_parts = judge(parts)
    assert found == wanted == [[4, 8, 4, 4]] * 2
    torch.testing.assert_close(in_parts, at_once, rtol=0.5, atol=0.02)


def test_appending_alone_is_not_guarded():
    """There are no queries to compare with."""
    _, k, v = hard((1,))
    cache = ta.KVCache(1, 4, 64)
    cache.append(k, v)
    assert cache.head_bits.tolist() == [[4] * 4] * 2


@pytest.mark.parametrize("lengths", [[200, 130], [30, 200], [127, 129]])
def test_ragged_batches(lengths):
    q, k, v = hard((1,), batch=2, gain=120.0)
    for row, length in enumerate(lengths):
        q[row, :, length:] = k[row, :, length:] = v[row, :, length:] = torch.nan
    cache = ta.KVCache(2, 4, 64)
    with pytest.warns(GuardWarning, match="KV head 1 loses") as caught:
        ta.turbo_attention_with_kvcache(q, cache, k, v, lengths=torch.tensor(lengths))
    assert len(caught) == 1
    assert cache.head_bits.tolist() == [[4, 8, 4, 4]] * 2


def test_without_sinks_the_first_block_is_the_first_page():
    q, k, v = hard((1,), length=64)
    cache, said = run((q, k, v), ta.TurboConfig(sink_tokens=0))
    assert cache.head_bits.tolist() == [[4, 8, 4, 4]] * 2
    assert len(said) == 1


def test_stored_prefill_reads_the_raised_widths():
    """The same call already attends what will be stored."""
    q, k, v = hard((1,), length=257)
    cache = ta.KVCache(1, 4, 64, config=ta.TurboConfig(stored_prefill=True))
    with pytest.warns(GuardWarning):
        got = ta.turbo_attention_with_kvcache(q, cache, k, v)
    assert relative_error(got[:, :, -1:], ta.turbo_attention_with_kvcache(q[:, :, -1:], cache)) < 1e-5


# -- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k_new", "v_new"])
def test_non_finite_values_come_before_the_guard(name):
    q, k, v = hard((1,))
    tensors = {"q": q, "k_new": k, "v_new": v}
    tensors[name][0, 1, 100, 3] = torch.nan
    cache = ta.KVCache(1, 4, 64)
    with pytest.raises(NonFiniteError, match=rf"^{name}: "):
        ta.turbo_attention_with_kvcache(tensors.pop("q"), cache, **tensors)
    assert len(cache) == 0
    assert cache.head_bits is None


def test_a_warning_made_an_error_leaves_the_cache_as_it_was():
    q, k, v = hard((1,))
    cache = ta.KVCache(1, 4, 64)
    cache.append(k[:, :, :100], v[:, :, :100])
    before = content(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuardWarning)
        with pytest.raises(GuardWarning):
            ta.turbo_attention_with_kvcache(q[:, :, 100:], cache, k[:, :, 100:], v[:, :, 100:])
    assert content(cache) == before


# -- storage with fixed widths ------------------------------------------------------------------------


def fixed(tensors, bits: int, **options) -> str | None:
    """The message for one sequence of `hard`, as a server's pages store it."""
    q, k, v = (x[0].transpose(0, 1) for x in tensors)
    return fixed_widths_message(ta.TurboConfig.serving(), torch.full((2, k.shape[1]), bits), q, k, v, **options)


def test_fixed_widths_are_reported_with_the_models_head_numbers():
    message = fixed(hard((1, 3)), 4, first_head=8)
    assert message is not None
    assert message.startswith("KV heads 9, 11 lose too much in the quantized cache (head ")
    assert message.endswith(
        "at K 4 and V 4 bits, bound 0.30); widths kept as configured; calibrate the model, or serve it with more bits"
    )


def test_fixed_widths_within_their_bounds_are_not_reported():
    assert fixed(hard(()), 4) is None
    assert fixed(hard((1, 3)), 8) is None


def test_fixed_widths_do_not_report_values_that_are_not_finite():
    q, k, v = hard((1,))
    k[0, 0, 5, 0] = torch.nan
    assert fixed((q, k, v), 4) is None
