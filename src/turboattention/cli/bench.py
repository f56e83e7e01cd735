"""``turboattention bench``: speed and memory in comparison with other implementations on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..config import TurboConfig
from ..errors import InputError
from .bench_files import check_plot, write_json, write_plot
from .bench_view import facts_line, show
from .device import use_threads
from .options import MACHINE, MEASURED, Threads, numbers
from .output import note, notices, print_json, results
from .progress import Bars
from .settings import bits_label, parse_bits, reordered
from .targets import check_target

if TYPE_CHECKING:
    from ..benchmarking.plan import Plan

AGAINST = "Comparison"


class Work(str, Enum):
    prefill = "prefill"
    chunk = "chunk"
    decode = "decode"
    steps = "steps"
    compress = "compress"
    memory = "memory"
    all = "all"


class BenchDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Mask(str, Enum):
    both = "both"
    causal = "causal"
    full = "full"


def bench(
    work: Annotated[Work, typer.Argument(help="A kind of work, or all of them.")] = Work.all,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Context lengths in tokens.", rich_help_panel=MEASURED)
    ] = None,
    head_dim: Annotated[
        str | None,
        typer.Option(metavar="D,D,...", help="By default 128; prefill also 64.", rich_help_panel=MEASURED),
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.", rich_help_panel=MEASURED)] = 8,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.", rich_help_panel=MEASURED)] = 2,
    bits: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WIDTH",
            help="Stored width: 8, 4, 3, 2, mixed, or K,V such as 4,3; may be repeated. By default 4, 3, mixed and 2.",
            rich_help_panel=MEASURED,
            show_default=False,
        ),
    ] = None,
    reorder_k: Annotated[
        bool,
        typer.Option(
            "--reorder-k",
            help="Reorder the channels of K at 4, 3 and 2 bits, as the commands that run models do.",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    mask: Annotated[Mask, typer.Option(help="Of prefill.", rich_help_panel=MEASURED)] = Mask.both,
    dtype: Annotated[
        BenchDtype, typer.Option(help="Dtype of TurboAttention's inputs.", rich_help_panel=MEASURED)
    ] = BenchDtype.float32,
    backend: Annotated[str, typer.Option(help="auto, or one that doctor lists.", rich_help_panel=AGAINST)] = "auto",
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Some of sdpa, sdpa-folded, sdpa-bf16, sdpa-bf16-folded, dequantize, int4, ggml-f16, ggml-q8_0, "
            "ggml-q4_0, ort-f32, ort-int8, ort-int4, openvino-f32, openvino-u8, openvino-u4; or none. By default all "
            "that are available.",
            rich_help_panel=AGAINST,
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Time per pair.", rich_help_panel=AGAINST)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short lengths and short measurements.", rich_help_panel=AGAINST)
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random tensors.", rich_help_panel=AGAINST)] = 0,
    threads: Threads = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object instead of tables.", rich_help_panel=MACHINE)
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Also write the JSON to this file.", rich_help_panel=MACHINE)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Draw ratios against context length (needs matplotlib).", rich_help_panel=MACHINE
        ),
    ] = None,
) -> None:
    """Compare TurboAttention with other implementations: results are checked, then timed alternately in one process.

    Example: turboattention bench decode --lengths 4096,16384 --bits 4 --bits 3
    """
    tokens, dims = numbers("--lengths", lengths), numbers("--head-dim", head_dim)
    configs = [TurboConfig(bits=parse_bits(text)) for text in bits or ["4", "3", "mixed", "2"]]
    if reorder_k:
        configs = [reordered(config) for config in configs]
    if heads % kv_heads:
        raise InputError(f"--heads: expected a multiple of --kv-heads ({kv_heads}), got {heads}")
    check_target("--out", out)
    check_plot(plot)
    with Bars(hidden=json).task("Getting ready"):
        import torch

        from ..benchmarking import plan as plans
        from ..benchmarking.timing import QUICK, Effort
        from ..dispatch import choose

        use_threads(threads)
        chosen = choose(backend).name
    works = plans.WORKS if work is Work.all else (work.value,)
    names = _peers(peers)
    # The reference is not optimized: full lengths would take hours.
    small = quick or chosen == "reference"
    if small and not quick and not tokens:
        note("the reference backend is not optimized; measuring short contexts only (choose with --lengths)")
    effort = QUICK if quick else Effort()
    if seconds is not None:
        effort = Effort(seconds, effort.sample, effort.least, effort.most)
    plan = plans.Plan(
        works=works,
        backend=chosen,
        settings=[(bits_label(config.bits) + ", reordered" * config.reorder_k, config) for config in configs],
        heads=heads,
        kv_heads=kv_heads,
        lengths=dict.fromkeys(works, tokens) if tokens else dict(plans.QUICK_LENGTHS) if small else {},
        head_dims=dict.fromkeys(works, dims) if dims else {},
        masks={Mask.both: (True, False), Mask.causal: (True,), Mask.full: (False,)}[mask],
        peers=names,
        dtype=getattr(torch, dtype.value),
        effort=effort,
        seed=seed,
        step_blocks=1 if quick else 4,
    )
    _run(plan, json, out, plot)


def _run(plan: Plan, json: bool, out: Path | None, plot: Path | None) -> None:
    from dataclasses import asdict

    from ..benchmarking import peak
    from ..benchmarking.limits import beyond_products, named
    from ..benchmarking.plan import run
    from ..benchmarking.records import as_document
    from .bench_facts import bench_facts

    with _doing(hidden=json) as say:
        say("the processor's own limits")
        before = peak.peaks()
        rows = list(run(plan, say))
        say("the processor's own limits again")
        # Other load only lowers a measured rate, so the larger value is closer to the peak.
        peaks = {name: max(rate, before[name]) for name, rate in peak.peaks().items()}
    facts = bench_facts(plan.backend, peaks=peaks, effort=asdict(plan.effort), seed=plan.seed)
    rows = [named(row, facts) for row in rows]
    document = as_document(rows, facts)
    if out is not None:
        write_json(out, document)
    if plot is not None and not write_plot(plot, rows, facts_line(facts)):
        note("--plot: nothing was compared, so nothing was drawn", "warning")
    if json:
        print_json(document)
    else:
        show(rows, facts, results())
    if beyond_products(rows):
        note("the machine was busy: its limits were measured too low, so that shares of them exceed 100%", "warning")
    if any(row.refused for row in rows):
        note("a wrong result is not timed", "warning")
        raise typer.Exit(1)


@contextmanager
def _doing(*, hidden: bool) -> Iterator[Callable[[str], None]]:
    """A status line on stderr, if that is a terminal."""
    console = notices()
    if hidden or not console.is_terminal:
        yield lambda text: None
        return
    # Redrawn rarely, so that it does not affect the timing.
    with console.status("Measuring", refresh_per_second=1) as status:
        yield lambda text: status.update(f"Measuring {escape(text)}")


def _peers(text: str | None) -> list[str]:
    """Names of peers; by default those that can run here.

    Raises:
        InputError: an unknown name, or a peer that cannot run here.
    """
    from ..benchmarking.peers import PEERS

    if text is None:
        return [name for name, peer in PEERS.items() if peer.missing() is None]
    if text.strip() == "none":
        return []
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in PEERS:
            raise InputError(f"--peers: expected some of {', '.join(PEERS)}, or none; got {name!r}")
        why = PEERS[name].missing()
        if why is not None:
            raise InputError(f"--peers: {name} cannot run here: {why}")
    return names
