"""Pages that a server manages, by the kernels in Triton's interpreter, against caches of one sequence each."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from turboattention.errors import ShapeError, UnsupportedError
from turboattention.kernels.triton import configs, paged, quantize, restored_pages
from turboattention.kv.channel_order import ChannelOrder
from turboattention.paged import BLOCK, PagedBatch, TailBlocks, paged_attention

from ...helpers import relative_error
from ...paging import CONFIG, HEADS, MIXED, UNIFORM, Server, draft, expected, serve, tokens
from . import tools  # noqa: F401

# Prefill over several blocks, in pieces beside decoding; a block that decoding fills; a tail after a partial block.
SEQUENCES = {7: 150, 3: 66, 5: 1}
SCHEDULE = [{7: 70, 3: 30}, {7: 60, 3: 33, 5: 1}, {3: 1, 7: 1}, {3: 2}, {7: 19}]
SHORT = {0: 67}, [{0: 66}, {0: 1}]


def served(head_bits, given: dict, schedule: list[dict[int, int]], config=CONFIG, **options) -> None:
    server = Server(head_bits, given[min(given)][0].shape[2], config, backend="triton")
    got = serve(server, given, schedule, **options)
    for key, sequence in given.items():
        want, cache = expected(sequence, head_bits, config, **options)
        assert relative_error(got[key], want) < 1e-3
        assert server.holds(key, cache, sequence[0].shape[1] // BLOCK)
    assert not server.tail_blocks.poll_nonfinite()


@pytest.mark.parametrize("options", [{}, {"window_size": 90}, {"softcap": 3.0, "scale": -0.5}], ids=str)
def test_mixed_steps_give_what_a_cache_of_its_own_does(options):
    served(UNIFORM[4], {key: tokens(10 * key, count) for key, count in SEQUENCES.items()}, SCHEDULE, **options)


@pytest.mark.parametrize("bits", [8, 3, 2, MIXED], ids=str)
def test_widths(bits):
    served(MIXED if bits == MIXED else UNIFORM[bits], {0: tokens(1, 67)}, SHORT[1])


@pytest.mark.parametrize("fields", [{"softmax": "sas2"}, {"softmax": "exp"}, {"p_scale": "row"}], ids=str)
def test_forms_of_the_softmax(fields):
    served(UNIFORM[4], {0: tokens(1, 67)}, SHORT[1], CONFIG.replace(**fields))


def test_full_rows_of_a_half_precision():
    served(MIXED, {0: tokens(2, 67, 64, torch.float16)}, SHORT[1])


def test_more_query_heads_than_a_program_takes():
    served(UNIFORM[4], {0: tokens(2, 67, query_heads=20 * HEADS)}, SHORT[1])


@pytest.mark.parametrize("drafts", [3, 40])
def test_tokens_taken_back(drafts):
    sequence, server = tokens(1, 140), Server(ring=2 * BLOCK, backend="triton")
    got = draft(server, sequence, tokens(2, 140), 120, drafts)
    want, cache = expected(sequence, UNIFORM[4])
    assert relative_error(got, want) < 1e-3
    assert server.holds(0, cache, 2)


def test_drafts_beside_prefill_stay_in_their_slot():
    """A step of many tokens, of one sequence, leaves what a draft of another may be taken back to."""
    sequence, other = tokens(1, 72), tokens(2, 90)
    server = Server(ring=2 * BLOCK, backend="triton")
    server.step({0: tuple(x[:, :62] for x in sequence)})
    server.step({0: tuple(x[:, 62:67] for x in sequence), 1: other})
    server.lengths[0] = 63
    got = server.step({0: tuple(x[:, 63:] for x in sequence)})[0]
    assert relative_error(got, expected(sequence, UNIFORM[4])[0][:, 63:]) < 1e-3


def test_pages_filled_in_a_step_are_read_by_others_in_the_same():
    shared, tail = tokens(1, 64), tokens(2, 9)
    server = Server(backend="triton")
    server.blocks, server.lengths, server.slots = {0: [5], 1: [5]}, {0: 0, 1: 64}, {0: 0, 1: 1}
    got = server.step({1: tail, 0: shared})
    want, _ = expected(tuple(torch.cat(pair, 1) for pair in zip(shared, tail, strict=True)), UNIFORM[4])
    assert relative_error(got[1], want[:, 64:]) < 1e-3


@pytest.fixture
def restoring(monkeypatch):
    """Called, it turns restoring in memory on, and returns a list to which each call of an attention that restores adds
    the blocks of each sequence that it had memory for."""
    found = []

    def restored(*given):
        arguments = own(*given)
        ends = arguments["origins"].tolist()
        found.append([b - a if b <= arguments["capacity"] else 0 for a, b in itertools.pairwise(ends)])
        return arguments

    def turn_on(blocks=None):
        shipped = configs.ARCHITECTURES["interpreter"]
        monkeypatch.setattr(configs, "architecture_of", lambda device: replace(shipped, restores_pages=True))
        monkeypatch.setattr(paged, "restored", restored)
        if blocks is not None:
            monkeypatch.setattr(restored_pages, "RESTORED_BYTES", blocks * HEADS * restored_pages.bytes_per_block(64))
        return found

    own = paged.restored
    return turn_on


# A piece that ends inside a block; then one that reads three pages beside one that reads one, and a decode step.
PIECES = {7: 200, 3: 70, 5: 1}, [{7: 90, 3: 5}, {7: 110, 3: 65, 5: 1}]


@pytest.mark.parametrize(
    ("bits", "options", "blocks", "want"),
    [
        (4, {}, None, [3, 1, 0]),
        (3, {"window_size": 90}, None, [3, 1, 0]),
        (2, {"window_size": 20}, None, [2, 1, 0]),
        (MIXED, {"softcap": 3.0}, None, [3, 1, 0]),
        (4, {}, 3, [3, 0, 0]),
        (4, {}, 2, [0, 0, 0]),
    ],
    ids=str,
)
def test_pages_restored_in_memory_give_the_same_bits(bits, options, blocks, want, restoring):
    def pieces():
        server = Server(MIXED if bits == MIXED else UNIFORM[bits], backend="triton")
        return serve(server, {key: tokens(10 * key, count) for key, count in PIECES[0].items()}, PIECES[1], **options)

    as_read, found = pieces(), restoring(blocks)
    in_memory = pieces()
    assert found == [[1, 0], want]
    assert all(torch.equal(as_read[key], in_memory[key]) for key in as_read)


def test_pages_that_sequences_share_are_restored_for_each(restoring):
    shared, tail, other = tokens(1, 64, 64), tokens(2, 70, 64), tokens(3, 70, 64)
    whole = tuple(torch.cat(pair, 1) for pair in zip(shared, tail, strict=True))

    def step():
        server = Server(head_dim=64, backend="triton")
        server.blocks, server.lengths, server.slots = {0: [5], 1: [5]}, {0: 0, 1: 64}, {0: 0, 1: 1}
        return server.step({1: other, 0: whole})

    as_read, found = step(), restoring()
    in_memory = step()
    assert found == [[2, 2]]
    assert all(torch.equal(as_read[key], in_memory[key]) for key in as_read)


def test_calibrated_means():
    config = CONFIG.replace(smooth_k=True)
    sequence, mean = tokens(4, 70), torch.randn(HEADS, 16, generator=torch.Generator().manual_seed(1))
    for options in ({}, {"softcap": 2.0}):
        results = []
        for backend in ("triton", "cpu"):
            server = Server(config=config, backend=backend, mean=mean)
            results.append((serve(server, {0: sequence}, [{0: 69}, {0: 1}], **options)[0], server.page(0, 0)))
        (got, page), (want, wanted) = results
        assert relative_error(got, want) < 1e-3
        assert torch.equal(page, wanted)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_counts_as_zero_and_raises_a_flag(name):
    sequence, index = tokens(3, 2), "qkv".index(name)
    sequence[index][0, 1, 3] = torch.inf
    clean = tuple(x.clone() for x in sequence)
    clean[index][0, 1] = 0
    server, other = Server(backend="triton"), Server(backend="triton")
    got, want = serve(server, {0: sequence}, [{0: 1}] * 2)[0], serve(other, {0: clean}, [{0: 1}] * 2)[0]
    assert server.finite
    assert [
        server.tail_blocks.poll_nonfinite(),
        server.tail_blocks.poll_nonfinite(),
        other.tail_blocks.poll_nonfinite(),
    ] == [
        True,
        False,
        False,
    ]
    assert torch.equal(got, want)
    assert all(map(torch.equal, server.tail_blocks.codes, other.tail_blocks.codes))


def test_padding_is_left_alone():
    """As in a captured graph: sequences of no tokens, tokens of no sequence, wide tables of int32."""
    sequence, server = tokens(1, 66), Server(backend="triton")
    server.step({0: tuple(x[:, :65] for x in sequence)})
    before = [x.clone() for x in server.tail_blocks.codes]
    table = torch.full((3, 9), 10**6, dtype=torch.int32)
    table[0, :2] = torch.tensor(server.blocks[0])
    batch = PagedBatch(
        torch.tensor([0, 1, 1, 1], dtype=torch.int32), torch.tensor([66, 0, 0], dtype=torch.int32), table,
        torch.tensor([0, 10**6, 10**6], dtype=torch.int32), 1,
    )  # fmt: skip
    q, k, v = (torch.full((3, x.shape[0], 16), torch.nan) for x in sequence)
    for x, new in zip((q, k, v), sequence, strict=True):
        x[0] = new[:, 65]
    out = torch.full_like(q, 7.0)
    paged_attention(server.fmt, 0, batch, q, k, v, out, server.pages, server.tail_blocks, backend="triton")
    assert relative_error(out[0], expected(sequence, UNIFORM[4])[0][:, 65]) < 1e-3
    assert bool((out[1:] == 7.0).all())
    assert not server.tail_blocks.poll_nonfinite()
    after = server.tail_blocks.codes
    assert all(int((x != y).any(-1).sum()) <= HEADS for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("most", [1, 70, 200])
def test_no_launch_depends_on_what_tensors_hold(most, gpu, monkeypatch):
    """Tensors without values: whoever asked for one would fail, as a graph's capture does."""
    launched = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((self.name, grid))

    restoring = {"number_blocks", "restore_pages"} if most > 128 else set()
    names = {"hold_rows", "store_rows", "fill_pages", "paged_decode", "combine", "paged_prefill"}
    for name in names:
        monkeypatch.setattr(paged, name, Recorder(name))
    for name in ("number_blocks", "restore_pages"):
        monkeypatch.setattr(restored_pages, name, Recorder(name))
    monkeypatch.setattr(quantize, "_queries_kernel", Recorder("queries"))
    monkeypatch.setattr(configs, "architecture_of", lambda device: configs.ARCHITECTURES[gpu])
    monkeypatch.setattr(configs, "_processors", lambda device: 132)
    with torch.device("meta"):
        server_blocks = TailBlocks(1, 4, HEADS, 16, device="meta")
        index = torch.zeros(4, dtype=torch.int32)
        batch = PagedBatch(index, index[1:], torch.zeros(3, 999, dtype=torch.int32), index[1:], most)
        q, k, v = (torch.zeros(200, heads, 16, dtype=torch.bfloat16) for heads in (4, HEADS, HEADS))
        pages = torch.zeros(64, 8192, dtype=torch.uint8)
        fmt = Server().fmt
        with torch.device("cpu"):
            paged_attention(fmt, 0, batch, q, k, v, q.clone(), pages, server_blocks, backend="triton")
    grids = dict(launched)
    wanted = names | restoring | {"queries"}
    assert set(grids) == (wanted if most > 1 else wanted - {"hold_rows", "paged_prefill"})
    assert grids["paged_decode"][0] > 16, "a split count from the table's width"


def test_refusals():
    server, sequence = Server(backend="triton"), tokens(1, 3)
    server.pages = server.pages.flatten()[8 : 8 + 32 * 4096].view(32, -1)
    with pytest.raises(ShapeError, match=r"^pages: expected addresses that are multiples of 16"):
        server.step({0: sequence})
    with pytest.raises(UnsupportedError, match=r"^sinks: expected None for pages on a GPU, got sink logits"):
        server.step({0: sequence}, sinks=torch.zeros(4))
    batch = PagedBatch(*(torch.zeros(2, 2, dtype=torch.int16) for _ in range(4)))
    q, k, v = (x.transpose(0, 1).contiguous() for x in sequence)
    with pytest.raises(ShapeError, match=r"^query_start: expected int32 or int64"):
        paged_attention(server.fmt, 0, batch, q, k, v, q, server.pages, server.tail_blocks, backend="triton")


def test_more_queries_than_offsets_reach_are_refused(monkeypatch):
    server = Server(backend="triton")
    pages = server.pages.clone()
    monkeypatch.setattr("turboattention.impl.triton.paged._LARGEST_OFFSET", 100)
    with pytest.raises(UnsupportedError, match=r"^q: expected at most \d tokens in a step, got 7$"):
        server.step({0: tokens(1, 7)})
    assert torch.equal(server.pages, pages)


def test_keys_in_order_are_refused_by_name():
    order = ChannelOrder(torch.arange(16).expand(HEADS, -1), torch.ones(HEADS, dtype=torch.bool))
    server = Server(config=CONFIG.replace(reorder_k=True), order=order, backend="triton")
    with pytest.raises(
        UnsupportedError, match=r"^config: expected reorder_k=False for pages with backend 'triton', got"
    ):
        server.step({0: tokens(1, 3)})
