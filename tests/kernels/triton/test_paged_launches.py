"""Which launches a step over a server's pages takes, and into how many splits decode divides sequences."""

from __future__ import annotations

import pytest
import torch

from turboattention.kernels.triton import configs, paged, quantize, restored_pages
from turboattention.kernels.triton.configs import Launch
from turboattention.paged import PagedBatch, TailBlocks, paged_attention

from ...helpers import relative_error
from ...paging import HEADS, MIXED, UNIFORM, Server, expected, tokens
from . import tools  # noqa: F401

GROUP = 2


@pytest.fixture
def launches(monkeypatch):
    """Called with a number of sequences and the most tokens of one, it takes a step of tensors without values and
    returns the grids and keyword arguments of the launches by kernel, in order."""
    found: list[tuple[str, tuple, dict]] = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: found.append((self.name, grid, options))

    for module, names in (
        (paged, ("hold_rows", "store_rows", "fill_pages", "paged_decode", "combine", "paged_prefill")),
        (restored_pages, ("number_blocks", "restore_pages")),
        (quantize, ("_queries_kernel",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(name))

    def step(sequences, most, head_bits=UNIFORM[4], head_dim=128, blocks=128):
        index = torch.zeros(sequences + 1, dtype=torch.int32, device="meta")
        table = torch.zeros(sequences, blocks, dtype=torch.int32, device="meta")
        batch = PagedBatch(index, index[1:], table, index[1:], most)
        count = sequences + most - 1
        q, k, v = (torch.zeros(count, n, head_dim, dtype=torch.bfloat16, device="meta") for n in (4, HEADS, HEADS))
        pages = torch.zeros(64, 1 << 16, dtype=torch.uint8, device="meta")
        tail_blocks = TailBlocks(1, sequences, HEADS, head_dim, device="meta")
        fmt = Server(head_bits, head_dim).fmt
        found.clear()
        paged_attention(fmt, 0, batch, q, k, v, torch.empty_like(q), pages, tail_blocks, backend="triton")
        by_kernel: dict[str, list] = {}
        for name, grid, options in found:
            by_kernel.setdefault(name, []).append((grid, options))
        return by_kernel

    return step


def as_on(monkeypatch, gpu, processors, shared):
    monkeypatch.setattr(configs, "architecture_of", lambda device: configs.ARCHITECTURES[gpu])
    monkeypatch.setattr(configs, "_processors", lambda device: processors)
    monkeypatch.setattr(configs, "_shared_memory", lambda device: shared << 10)
    configs.resident.cache_clear()


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "gfx942"])
def test_decode_rows_of_a_mixed_step_take_the_launch_of_a_decode_step(gpu, launches, monkeypatch):
    as_on(monkeypatch, gpu, 132, 228)
    (alone,), (mixed,) = launches(4, 1)["paged_decode"], launches(4, 300)["paged_decode"]
    for name in ("R", "num_warps", "num_stages"):
        assert mixed[1][name] == alone[1][name]
    assert mixed[0] == (alone[0][0], 16 // mixed[1]["R"] * HEADS, 4), "splits as alone, tiles for 16 rows"
    assert mixed[1]["most"] == 16, "sequences with more rows are prefill's"
    many = launches(4, 300)["paged_prefill"]
    assert {options["M"] for _, options in many} == {
        configs.paged_prefill(configs.ARCHITECTURES[gpu], 128).rows,
        configs.restored_prefill(configs.ARCHITECTURES[gpu], 128).rows,
    }
    assert "paged_prefill" not in launches(4, 1)


@pytest.mark.parametrize("left_out", ["paged_decode", "paged_prefill"])
def test_each_sequence_of_a_mixed_step_is_computed_by_one_kernel(left_out, monkeypatch):
    """The device chooses: without its kernel, a sequence's results are missing, and the others' are there."""
    prompt, other = tokens(1, 40), tokens(2, 71)
    server = Server(backend="triton")
    server.step({0: tuple(x[:, :70] for x in other)})

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    monkeypatch.setattr(paged, left_out, Nothing())
    if left_out == "paged_decode":
        monkeypatch.setattr(paged, "combine", Nothing())  # it would read what was not written
    given = {1: prompt, 0: tuple(x[:, 70:] for x in other)}
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    got = server.step(given)
    there, missing = (1, 0) if left_out == "paged_decode" else (0, 1)
    assert bool((got[missing].isnan() | (got[missing] == 0)).all())
    want = expected(prompt, UNIFORM[4])[0] if there else expected(other, UNIFORM[4])[0][:, 70:]
    assert relative_error(got[there], want) < 1e-3


@pytest.mark.parametrize("head_bits", [UNIFORM[4], MIXED], ids=str)
def test_one_launch_restores_pages_of_all_widths(head_bits, launches, monkeypatch):
    as_on(monkeypatch, "sm_90", 132, 228)
    found = launches(4, 300, head_bits)
    ((grid, options),) = found["restore_pages"]
    assert grid[1] == HEADS
    pairs = len({*zip(*head_bits, strict=True)})
    assert options["K_WIDTHS"].bit_count() == pairs
    assert len(found["paged_decode"]) == 1
    assert len(found["paged_prefill"]) == pairs + 1, "as read by pair of widths, and from memory at once"


@pytest.mark.parametrize(
    ("gpu", "processors", "shared", "head_dim", "splits"),
    [
        ("sm_90", 132, 228, 128, 16),  # eight programs of a warp by registers
        ("sm_90", 132, 228, 256, 8),  # four of two warps
        ("sm_80", 108, 164, 128, 13),
        ("sm_80", 82, 100, 256, 2),  # two, by shared memory
        ("gfx942", 304, 64, 128, 9),  # two of four warps
        ("gfx942", 304, 64, 256, 4),  # one
    ],
)
def test_splits_fill_the_device_with_programs_that_are_resident(
    gpu, processors, shared, head_dim, splits, launches, monkeypatch
):
    """32 sequences of 128 blocks with two KV heads are 64 programs per split; four programs per processor, whatever
    the launch needs, would be 8 splits on sm_90."""
    as_on(monkeypatch, gpu, processors, shared)
    ((grid, _),) = launches(32, 1, head_dim=head_dim)["paged_decode"]
    assert grid == (splits, HEADS, 32)


def test_resident_programs_follow_registers_and_shared_memory(monkeypatch):
    as_on(monkeypatch, "sm_90", 10, 228)
    device = torch.device("meta")

    def of(*launch, wide=128, widths=((4, 4),)):
        return configs.resident(Launch(*launch), wide, widths, device)

    assert of(4, 1, 3) == 80
    assert of(4, 2, 3) == 40
    assert of(4, 1, 3, 168) == 120, "a limit of registers lets more run"
    assert of(4, 1, 3, wide=256, widths=((8, 8),)) == 30, "65 KiB and 1 reserved"
    assert of(4, 1, 2, wide=256, widths=((8, 8),)) == 60
    assert of(4, 1, 3, wide=256, widths=((12, 4), (4, 4))) == 40
    assert of(4, 1, 3, wide=256, widths=()) == 80, "no compressed pages"
    assert of(16, 16, 4, wide=256, widths=((8, 8),)) == 10, "at least one"
