"""Attention over pages that a server manages, against caches of one sequence each at the same configuration."""

from __future__ import annotations

import math

import pytest
import torch

import turboattention as ta
from turboattention.errors import ConfigError, DtypeError, InputError, ShapeError, UnsupportedError
from turboattention.kv.cache import KVCache
from turboattention.kv.channel_order import ChannelOrder
from turboattention.paged import BLOCK, PAGE_UNIT, PagedBatch, PagedFormat, TailBlocks, paged_attention

from .helpers import relative_error
from .kernels.cpu import tools  # noqa: F401
from .paging import CONFIG, HEADS, MIXED, QUERY_HEADS, UNIFORM, Server, draft, expected, random_schedule, serve, tokens

TOTALS = {7: 200, 3: 131, 5: 64, 1: 1}


@pytest.mark.parametrize("bits", [8, 4, 3, 2, MIXED], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"window_size": 90}, {"softcap": 3.0, "scale": 0.5}, {"sinks": torch.tensor([-1.0, 0.5, 2.0, 9.0])}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_any_schedule_gives_what_a_cache_of_its_own_does(bits, options):
    head_bits = UNIFORM.get(bits, MIXED) if isinstance(bits, int) else MIXED
    sequences = {key: tokens(10 * key, count) for key, count in TOTALS.items()}
    for seed in range(2):
        server = Server(head_bits, seed=seed)
        got = serve(server, sequences, random_schedule(seed, TOTALS), **options)
        for key, sequence in sequences.items():
            want, cache = expected(sequence, head_bits, **options)
            assert relative_error(got[key], want) < 1e-3
            assert server.holds(key, cache, TOTALS[key] // BLOCK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_batch_composition_does_not_change_a_bit(dtype):
    sequences = {key: tokens(key, 150, 64, dtype) for key in range(4)}
    alone = [
        serve(Server(head_dim=64), {key: x}, [{key: 70}, {key: 20}] + [{key: 1}] * 60) for key, x in sequences.items()
    ]
    schedule = [dict.fromkeys(range(4), 70), dict.fromkeys(range(4), 20)] + [dict.fromkeys(range(4), 1)] * 60
    together = serve(Server(head_dim=64), sequences, schedule)
    for key in sequences:
        assert torch.equal(together[key], alone[key][key])


@pytest.mark.parametrize("drafts", [1, 5, 64])
def test_tokens_taken_back(drafts):
    """Drafts are stored, some of them rejected, also behind a block that they filled."""
    sequence, wrong = tokens(1, 330), tokens(2, 330)
    server = Server(ring=2 * BLOCK)
    got = draft(server, sequence, wrong, 100, drafts)
    want, cache = expected(sequence, UNIFORM[4])
    assert relative_error(got, want) < 1e-3
    assert server.holds(0, cache, 330 // BLOCK)  # of blocks that were drafted twice, what the accepted tokens make them


@pytest.mark.parametrize("last, back", [(130, 126), (192, 130), (192, 128)])
def test_tokens_taken_back_of_a_long_step(last, back):
    """Back into the block before the incomplete one, which a ring of two blocks still holds."""
    sequence, wrong = tokens(1, 200), tokens(2, 200)
    server = Server(ring=2 * BLOCK)
    server.step({0: tuple(torch.cat((x[:, :back], y[:, back:last]), 1) for x, y in zip(sequence, wrong, strict=True))})
    server.lengths[0] = back
    got = server.step({0: tuple(x[:, back:] for x in sequence)})[0]
    want, cache = expected(sequence, UNIFORM[4])
    assert relative_error(got, want[:, back:]) < 1e-3
    assert server.holds(0, cache, 200 // BLOCK)


def test_pages_filled_in_a_step_are_read_by_others_in_the_same():
    """A prefix that two sequences share, the second admitted while the first computes it."""
    shared, tail = tokens(1, 128), tokens(2, 40)
    server = Server()
    second = tuple(torch.cat(pair, 1) for pair in zip(shared, tail, strict=True))
    server.blocks, server.lengths, server.slots = {0: [5, 9], 1: [5, 9]}, {0: 0, 1: 128}, {0: 0, 1: 1}
    got = server.step({1: tail, 0: shared})
    want, _ = expected(second, UNIFORM[4])
    assert relative_error(got[1], want[:, 128:]) < 1e-3


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_counts_as_zero_and_is_told(name):
    for count in (1, 70):
        sequence, index = tokens(3, count), "qkv".index(name)
        sequence[index][0, count // 2, 3] = torch.inf
        clean = tuple(x.clone() for x in sequence)
        if name == "q":
            clean[index][0, count // 2] = 0
        else:
            clean[index][0, count // 2, 3] = 0
        server, other = Server(), Server()
        got, want = server.step({0: sequence})[0], other.step({0: clean})[0]
        assert not server.finite
        assert other.finite
        assert torch.equal(got, want)
        assert all(torch.equal(x, y) for x, y in zip(server.tail_blocks.codes, other.tail_blocks.codes, strict=True))


def test_calibrated_means():
    config = CONFIG.replace(smooth_k=True)
    sequence, mean = tokens(4, 150), torch.randn(HEADS, 16, generator=torch.Generator().manual_seed(1))
    got = serve(Server(config=config, mean=mean), {0: sequence}, [{0: 100}] + [{0: 1}] * 50)[0]
    q, k, v = (x[None] for x in sequence)
    cache = KVCache(1, HEADS, 16, config=config, head_bits=torch.tensor(UNIFORM[4]), k_mean=mean)
    want = ta.turbo_attention_with_kvcache(q, cache, k, v, backend="reference")[0]
    assert relative_error(got, want) < 1e-3


ORDERED = CONFIG.replace(reorder_k=True)


def an_order(head_dim: int = 16, seed: int = 0) -> ChannelOrder:
    """Of two heads, of which the second has one width."""
    permutation = torch.rand(HEADS, head_dim, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return ChannelOrder(permutation, torch.tensor([True, False]))


@pytest.mark.parametrize("bits", [8, 4, 3, 2, MIXED], ids=str)
@pytest.mark.parametrize("options", [{}, {"window_size": 90, "softcap": 3.0}], ids=str)
def test_keys_in_a_calibrated_order(bits, options):
    """Pages are those of the reference's cache with this order, byte for byte, and attention is its attention."""
    head_bits = UNIFORM.get(bits, MIXED) if isinstance(bits, int) else MIXED
    config, order = ORDERED.replace(bits=8 if bits == 8 else 4), an_order()
    sequences = {key: tokens(10 * key, count) for key, count in TOTALS.items()}
    server = Server(head_bits, config=config, order=order)
    assert any(server.fmt.layouts[0].k_halves) == (bits != 8)
    got = serve(server, sequences, random_schedule(3, TOTALS), **options)
    for key, sequence in sequences.items():
        want, cache = expected(sequence, head_bits, config, order=order, **options)
        assert relative_error(got[key], want) < 1e-3
        assert server.holds(key, cache, TOTALS[key] // BLOCK)
        plain, _ = expected(sequence, head_bits, **options)
        # The kernels and the reference share the order, but not with a cache without one.
        assert bits == 8 or TOTALS[key] <= BLOCK or relative_error(got[key], plain) > 0.01


@pytest.mark.parametrize("drafts", [5, 64])
def test_tokens_taken_back_with_keys_in_order(drafts):
    sequence, order, server = tokens(1, 330), an_order(), Server(config=ORDERED, ring=2 * BLOCK, order=an_order())
    got = draft(server, sequence, tokens(2, 330), 100, drafts)
    want, cache = expected(sequence, UNIFORM[4], ORDERED, order=order)
    assert relative_error(got, want) < 1e-3
    assert server.holds(0, cache, 330 // BLOCK)


def test_a_shared_prefix_has_the_same_bytes_whoever_came_first():
    """Each server compresses another first block; an order found there would be another."""
    shared = tokens(1, 2 * BLOCK)
    pages = []
    for seed, stretch in ((20, 0), (30, 9)):
        first, tail = tokens(seed, 100), tokens(seed + 5, 40)
        first[1][..., stretch] *= 20
        server = Server(config=ORDERED, order=an_order())
        prompt = tuple(torch.cat(pair, 1) for pair in zip(shared, tail, strict=True))
        serve(server, {0: first, 1: prompt}, [{0: 70}, {1: 30, 0: 30}, {1: 138}])
        pages.append([server.page(1, block) for block in range(2)])
    assert all(torch.equal(x, y) for x, y in zip(*pages, strict=True))


def test_layers_with_orders_of_their_own():
    """Work shared by equal layers of a step still uses the order of each layer."""
    sequence, orders = tokens(6, 65), [an_order(seed=seed) for seed in (1, 2)]
    servers = [Server(config=ORDERED, order=order) for order in orders]
    for first, last in ((0, 64), (64, 65)):
        rows = [x[:, first:last].transpose(0, 1).contiguous() for x in sequence]
        batch = PagedBatch(
            torch.tensor([0, last - first]), torch.tensor([last]), torch.tensor([[7, 9]]), torch.tensor([2])
        )
        outs = [torch.empty_like(rows[0]) for _ in servers]
        for server, out in zip(servers, outs, strict=True):
            paged_attention(server.fmt, 0, batch, *rows, out, server.pages, server.tail_blocks)
    for server, order, out in zip(servers, orders, outs, strict=True):
        server.blocks = {0: [7, 9]}
        want, cache = expected(sequence, UNIFORM[4], ORDERED, order=order)
        assert server.holds(0, cache, 1)
        assert relative_error(out.transpose(0, 1), want[:, 64:]) < 1e-3


def test_orders_that_do_not_fit_are_refused():
    order = an_order()
    with pytest.raises(ConfigError, match=r"^orders: expected 1 for 1 layer with reorder_k=True, got 0: pages take"):
        PagedFormat.of(ORDERED, 16, [UNIFORM[4]])
    with pytest.raises(ConfigError, match=r"^orders: expected 0 for 1 layer with reorder_k=False, got 1"):
        PagedFormat.of(CONFIG, 16, [UNIFORM[4]], orders=(order,))
    with pytest.raises(ShapeError, match=r"^orders: expected shapes \(2, 32\) and \(2,\), got \(2, 16\) and \(2,\)$"):
        PagedFormat.of(ORDERED, 32, [UNIFORM[4]], orders=(order,))
    with pytest.raises(InputError, match=r"^orders: expected a permutation of 16 channels for each head"):
        PagedFormat.of(ORDERED, 16, [UNIFORM[4]], orders=(order._replace(permutation=order.permutation // 2),))


def test_all_layers_reserve_the_bytes_of_the_widest():
    widths = [((8, 8, 2, 2), (4, 4, 2, 2)), ((2, 2, 2, 2), (2, 2, 2, 2))]
    both, wide, narrow = (PagedFormat.of(CONFIG, 64, chosen) for chosen in (widths, widths[:1], widths[1:]))
    assert both.page_bytes == wide.page_bytes > narrow.page_bytes
    assert both.page_bytes % PAGE_UNIT == 0
    assert 0 <= wide.page_bytes - wide.layouts[0].page_bytes < PAGE_UNIT


def test_layers_of_one_batch_with_other_pools_and_pages():
    """Work shared within a step is not mixed up between different layers."""
    sequence, kinds = tokens(6, 65), ({}, {"ring": 2 * BLOCK}, {"head_bits": UNIFORM[2]})
    alone, layers = ([Server(**kind) for kind in kinds] for _ in range(2))
    want = [serve(server, {0: sequence}, [{0: 64}, {0: 1}])[0] for server in alone]
    for first, last in ((0, 64), (64, 65)):
        rows = [x[:, first:last].transpose(0, 1).contiguous() for x in sequence]
        start, length = torch.tensor([0, last - first]), torch.tensor([last])
        batch = PagedBatch(start, length, torch.tensor([[7, 9]]), torch.tensor([2]), last - first)
        for server, wanted in zip(layers, want, strict=True):
            out = torch.empty_like(rows[0])
            paged_attention(server.fmt, 0, batch, *rows, out, server.pages, server.tail_blocks)
            assert torch.equal(out.transpose(0, 1), wanted[:, first:last])
    for server, other in zip(layers, alone, strict=True):
        server.blocks = {0: [7, 9]}
        assert torch.equal(server.page(0, 0), other.page(0, 0))


def test_refusals():
    for change in ({"stored_prefill": False}, {"sink_tokens": 64}, {"token_scales": False}, {"block_size": 32}):
        with pytest.raises(ConfigError, match=rf"^config: expected {next(iter(change))}="):
            PagedFormat.of(CONFIG.replace(**change), 16, [UNIFORM[4]])
    with pytest.raises(ConfigError, match=r"^page_bytes: expected a multiple of 64 of at least"):
        PagedFormat(CONFIG, 16, (UNIFORM[4],), 64)
    with pytest.raises(ShapeError, match=r"^means: expected \[2, 16\] each, got \[2, 8\]$"):
        PagedFormat.of(CONFIG, 16, [UNIFORM[4]], means=(torch.zeros(2, 8),))
    with pytest.raises(InputError, match=r"^ring: expected 64 or 128, got 65$"):
        TailBlocks(1, 1, 1, 16, ring=65)
    server, sequence = Server(), tokens(1, 3)
    for index, name in ((0, "q, out"), (1, "k"), (2, "v")):
        broken = [x if i != index else x[:, :, :8] for i, x in enumerate(sequence)]
        with pytest.raises(ShapeError, match=rf"^{name}: expected "):
            Server().step({0: tuple(broken)})
    server.pages = server.pages[:, :64]
    with pytest.raises(ShapeError, match=r"^pages: expected uint8"):
        server.step({0: sequence})
    with pytest.raises(InputError, match=r"^backend: expected one of cpu"):
        Server().step({0: sequence}, backend="reference")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b.block_table.fill_(-1), "block_table: expected numbers from 0 to 63, got -1 to -1"),
        (lambda b: b.block_table.fill_(64), "block_table: expected numbers from 0 to 63, got 64 to 64"),
        (lambda b: b.tail_slots.fill_(9), "tail_slots: expected numbers from 0 to 3, got 9 to 9"),
        (lambda b: b.seq_lens.fill_(2), "seq_lens: expected at least the tokens of the step, got [2] for [3]"),
        (lambda b: b.seq_lens.fill_(65), "block_table: expected a column for each block of up to 65 tokens, got 1"),
    ],
)
def test_places_out_of_range_are_refused_before_anything_is_written(change, message):
    server, (q, k, v) = Server(), (x.transpose(0, 1).contiguous() for x in tokens(1, 3))
    batch = PagedBatch(*(torch.tensor(x) for x in ([0, 3], [3], [[5]], [1])))
    change(batch)
    pages, codes = server.pages.clone(), server.tail_blocks.codes[0].clone()
    with pytest.raises(InputError) as caught:
        paged_attention(server.fmt, 0, batch, q, k, v, q.clone(), server.pages, server.tail_blocks)
    assert str(caught.value) == message
    assert torch.equal(server.pages, pages)
    assert torch.equal(server.tail_blocks.codes[0], codes)


FLOATS = "expected torch.float32 on cpu, as q is, got"
MEMORY = "expected memory on cpu, as q is, got meta"
SCALE = "expected a number of at most 1e+06 in magnitude, got"
GRADIENTS = "expected a tensor without gradients (quantized attention has no backward pass; use torch.no_grad()), got"


@pytest.mark.parametrize(
    "name, change, error, message",
    [
        ("q", lambda q: q.double(), DtypeError, "expected float32, bfloat16 or float16, got torch.float64"),
        ("q", lambda q: q.numpy(), DtypeError, "expected a tensor, got ndarray"),
        ("k", lambda k: k.half(), DtypeError, f"{FLOATS} torch.float16 on cpu"),
        ("v", lambda v: v.to("meta"), DtypeError, f"{FLOATS} torch.float32 on meta"),
        ("out", lambda out: out.bfloat16(), DtypeError, f"{FLOATS} torch.bfloat16 on cpu"),
        ("k", lambda k: k.requires_grad_(), UnsupportedError, f"{GRADIENTS} requires_grad=True"),
        ("pages", lambda pages: pages.to("meta"), DtypeError, MEMORY),
        ("tail_blocks", lambda _: TailBlocks(1, 4, HEADS, 16, device="meta"), DtypeError, MEMORY),
        ("sinks", lambda _: torch.zeros(QUERY_HEADS, device="meta"), DtypeError, MEMORY),
        ("scale", lambda _: math.nan, ConfigError, f"{SCALE} nan"),
        ("scale", lambda _: True, ConfigError, f"{SCALE} True"),
        ("softcap", lambda _: 0.0, ConfigError, "expected a positive number, got 0.0"),
        ("softcap", lambda _: math.inf, ConfigError, "expected a positive number, got inf"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(name, change, error, message):
    server, (q, k, v) = Server(), (x.transpose(0, 1).contiguous() for x in tokens(1, 3))
    batch = PagedBatch(*(torch.tensor(x) for x in ([0, 3], [3], [[5]], [1])))
    arguments = {"q": q, "k": k, "v": v, "out": torch.zeros_like(q), "pages": server.pages}
    arguments |= {"tail_blocks": server.tail_blocks, "sinks": None, "scale": None, "softcap": None}
    pages, codes = server.pages.clone(), server.tail_blocks.codes[0].clone()
    arguments[name] = change(arguments[name])
    with pytest.raises(error) as caught:
        paged_attention(server.fmt, 0, batch, **arguments)
    assert str(caught.value) == f"{name}: {message}"
    assert torch.equal(server.pages, pages)
    assert torch.equal(server.tail_blocks.codes[0], codes)


def test_places_that_do_not_fit_are_refused():
    server, (q, k, v) = Server(), (x.transpose(0, 1).contiguous() for x in tokens(1, 3))
    batch = PagedBatch(*(torch.tensor(x) for x in ([0, 3], [3], [[5]], [1])))

    def call(layer=0, out=None, opened=server.tail_blocks, **options):
        out = torch.empty_like(q) if out is None else out
        paged_attention(server.fmt, layer, batch, q, k, v, out, server.pages, opened, **options)

    apart = torch.empty(*q.shape, 2)[..., 0]
    with pytest.raises(ShapeError, match=r"^out: expected last stride 1, got strides"):
        call(out=apart)
    with pytest.raises(ShapeError, match=r"^tail_blocks: expected 2 heads of 16 channels, got 2 of 8$"):
        call(opened=TailBlocks(1, 4, 2, 8))
    with pytest.raises(InputError, match=r"^layer: expected one of 1, got 1$"):
        call(layer=1)
    with pytest.raises(InputError, match=r"^window_size: expected at least 1, or None, got 0$"):
        call(window_size=0)
    with pytest.raises(ShapeError, match=r"^sinks: expected floats of shape \[4\], got torch.float32 \[2\]$"):
        call(sinks=torch.zeros(2))
    with pytest.raises(ShapeError, match=r"^sinks: expected floats of shape \[4\], got torch.int64 \[4\]$"):
        call(sinks=torch.zeros(4, dtype=torch.int64))
