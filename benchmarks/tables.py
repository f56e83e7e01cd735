"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from targets import TARGETS

from turboattention.benchmarking.limits import named
from turboattention.benchmarking.records import Row, rows_of
from turboattention.cli.bench_view import time_text

NOTHING = "Nothing has been measured yet."
PEERS = {
    "sdpa": "SDPA fp32",
    "sdpa-folded": "SDPA fp32, heads as rows",
    "sdpa-bf16": "SDPA bf16",
    "sdpa-bf16-folded": "SDPA bf16, heads as rows",
    "dequantize": "dequantize + SDPA",
    "int4": "own INT4",
    "ggml-f16": "ggml f16",
    "ggml-q8_0": "ggml q8_0",
    "ggml-q4_0": "ggml q4_0",
    "ort-f32": "ONNX Runtime fp32, storing",
    "ort-int8": "ONNX Runtime INT8, storing",
    "ort-int4": "ONNX Runtime INT4, storing",
    "openvino-f32": "OpenVINO fp32, storing",
    "openvino-u8": "OpenVINO u8, storing",
    "openvino-u4": "OpenVINO u4, storing",
}
STORING = (
    "*Storing*: each call of such an implementation also stores one token; so does the TurboAttention call that it is\n"
    "compared with."
)
SHORT = tuple(name for name in PEERS if name not in ("dequantize", "int4", "ort-f32", "openvino-f32"))
"""Peers that the summary shows."""
OTHER_ISAS = "isa-"
"""Prefix of files that measure an instruction set other than the best; the summary leaves them out."""


class Result(NamedTuple):
    """One file: `rows` of attention, `models` of whole models of random weights, `real` of trained ones.

    place: its path under benchmarks/results. processor: the file's name, or that of the folder it is in."""

    place: Path
    processor: str
    facts: dict[str, Any]
    rows: list[Row]
    models: list[dict[str, Any]]
    real: list[dict[str, Any]]


def result_of(root: Path, path: Path, document: dict[str, Any]) -> Result:
    place, facts = path.relative_to(root), document["facts"]
    rows = [named(row, facts) for row in rows_of(document)]
    models, real = document.get("end_to_end", []), document.get("real_models", [])
    return Result(place, place.with_suffix("").parts[1], facts, rows, models, real)


def summary(results: Sequence[Result]) -> str:
    """The README's section: prefill and decode at head_dim 128, memory, and whole models, of the processor measured
    last; the others below it."""
    first = results[0].processor if results else ""
    own = _summary([result for result in results if result.processor == first])
    others = _summary([result for result in results if result.processor != first])
    return "\n\n".join(own + (["Other processors:"] if others else []) + others) or NOTHING


def _summary(results: Sequence[Result]) -> list[str]:
    parts, said = [], ""
    for result in results:
        if result.place.stem.startswith(OTHER_ISAS):
            continue
        rows = [row for row in result.rows if row.shape["head_dim"] == 128]
        longest = _longest(rows)
        tables = [
            ratios([row for row in rows if row.work == "prefill" and row.shape["causal"]], SHORT),
            ratios([row for row in rows if row.work == "decode" and row.shape["keys"] == longest], SHORT),
            memory([row for row in rows if row.work == "memory"]),
            models(result.models),
            real_models(result.real),
        ]
        machine = machine_of(result)
        if any(tables) and machine != said:
            parts.append(machine)
            said = machine
        parts += tables
    return [part for part in parts if part]


def full(results: Sequence[Result]) -> str:
    """All measurements, and the targets."""
    parts = [targets(results)]
    for result in results:
        rows = result.rows
        parts += [heading(result), ratios([row for row in rows if row.work == "prefill"], tuple(PEERS))]
        parts += [ratios([row for row in rows if row.work == work], tuple(PEERS)) for work in ("chunk", "decode")]
        parts += [steps(rows), compress(rows), memory(rows), models(result.models), real_models(result.real)]
    parts.insert(1, limits(results))
    return "\n\n".join(part for part in parts if part)


def machine_of(result: Result) -> str:
    facts = result.facts
    isa = f" ({facts['isa']})" if facts.get("isa") else ""
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    versions = f"turboattention {facts['turboattention']}, torch {facts['torch']}"
    return f"**{facts['cpu']}**, {threads}, backend `{facts['backend']}`{isa}, {versions}"


def heading(result: Result) -> str:
    facts = result.facts
    ggml = f", ggml {facts['ggml']}" if facts.get("ggml") else ""
    commit = f", commit {facts['commit'][:12]}" if facts.get("commit") else ""
    peaks = "".join(f", {name} {value:,.0f}" for name, value in facts.get("peaks", {}).items())
    return f"{machine_of(result)}{ggml}{commit}{peaks} ([{result.place.name}](RESULTS/{result.place.as_posix()}))"


def targets(results: Sequence[Result]) -> str:
    lines = ["| work | floor | aim | measured |", "|---|---|---|---|"]
    for target in TARGETS:
        cells = []
        for result in results:
            if result.place.stem.startswith(OTHER_ISAS):
                continue
            found = target.measured(result.rows)
            if found is not None:
                text, reached = found
                cells.append(text + ("" if reached else " (below the floor)"))
        lines.append(f"| {target.work} | {target.floor or '–'} | {target.aim or '–'} | {'<br>'.join(cells) or '–'} |")
    return "\n".join(lines)


def limits(results: Sequence[Result]) -> str:
    """The shares of the processor's limits that the best rows reach."""
    lines = []
    for result in results:
        peaks, isa = result.facts.get("peaks", {}), result.facts.get("isa")
        arithmetic, memory = peaks.get(f"{isa} INT8 GOPS"), peaks.get("read GB/s")
        for work in ("prefill", "decode"):
            rows = [row for row in result.rows if row.work == work and row.gops and row.seconds is not None]
            if not rows or not arithmetic:
                continue
            best = max(rows, key=lambda row: row.gops or 0)
            share = f"{(best.gops or 0) / arithmetic:.0%} of {arithmetic:,.0f} GOPS"
            read = "–"
            if memory and "cache_bytes" in best.figures and best.seconds is not None:
                read = f"{best.figures['cache_bytes'] / best.seconds.median / 1e9 / memory:.0%} of {memory:.0f} GB/s"
            what = f"{work}, {best.bits or ('causal' if best.shape['causal'] else 'full')}, {best.shape['keys']:,}"
            lines.append(_line([what, isa or "", f"{result.facts['threads']}", share, read]))
    columns = ["best row of", "instruction set", "threads", "INT8 products in registers", "memory"]
    head = [_line(columns), _line(["---"] * len(columns))]
    return "\n".join(head + lines) if lines else ""


def ratios(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Times of peers relative to TurboAttention: medians, and p20 to p80."""
    rows = [row for row in rows if row.refused is None]
    if not rows:
        return ""
    present = [name for name in names if any(rival.peer == name for row in rows for rival in row.rivals)]
    work = rows[0].work
    heads = f"{rows[0].shape['heads']}/{rows[0].shape['kv_heads']} heads"
    reached = any("cache_bytes" in row.figures for row in rows)
    work = {"chunk": "256 queries over a cache"}.get(work, work)
    columns = [f"{work}, {heads}", "head_dim", "time", "GOPS", *(["GB/s"] if reached else []), "nearest limit"]
    columns += [f"× {PEERS[name]}" for name in present]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for row in rows:
        assert row.seconds is not None
        what = row.bits or ("causal" if row.shape["causal"] else "full")
        cells = [f"{what}, {row.shape['keys']:,}", str(row.shape["head_dim"])]
        cells += [time_text(row.seconds.median), f"{row.gops:,.0f}"]
        cells += [f"{row.figures['cache_bytes'] / row.seconds.median / 1e9:.1f}"] if reached else []
        cells += [f"{row.limit} {row.limit_share:.0%}" if row.limit and row.limit_share is not None else "–"]
        lines.append(_line(cells + [_ratio(row, name) for name in present]))
    storing = any(name.startswith(("ort-", "openvino-")) for name in present) and reached
    return "\n".join(lines + (["", STORING] if storing else []))


def _ratio(row: Row, name: str) -> str:
    rival = next((rival for rival in row.rivals if rival.peer == name), None)
    if rival is None:
        return "–"
    if rival.ratio is None:
        return "refused"
    return f"{rival.ratio.median:.2f} ({rival.ratio.p20:.2f} to {rival.ratio.p80:.2f})"


def steps(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row.work == "steps" and row.seconds is not None]
    lines = [_line(["bits", "tokens", "step", "at a flush", "slowest"]), _line(["---"] * 5)]
    for row in rows:
        assert row.seconds is not None
        flush, worst = (f"{row.figures[name]:.2f}x" for name in ("flush_over_median", "worst_over_median"))
        lines.append(_line([row.bits or "", f"{row.shape['keys']:,}", time_text(row.seconds.median), flush, worst]))
    return "\n".join(lines) if rows else ""


def compress(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row.work == "compress" and row.seconds is not None]
    columns = ["bits", "tokens", "compress a block", "decode step", "share per token", "append one by one"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for row in rows:
        assert row.seconds is not None
        f = row.figures
        share = f"{f['share']:.2%} ({f['share_p20']:.2%} to {f['share_p80']:.2%})"
        cells = [row.bits or "", f"{row.shape['keys']:,}", time_text(row.seconds.median)]
        lines.append(_line([*cells, time_text(f["decode_seconds"]), share, f"{f['single_append_share']:.1%}"]))
    return "\n".join(lines) if rows else ""


def memory(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row.work == "memory"]
    lines = [_line(["KV cache", "tokens", "below FP16", "bits per element"]), _line(["---"] * 4)]
    for row in rows:
        ratio, bits = row.figures["below_fp16"], row.figures["bits_per_element"]
        window = f", window of {row.shape['window']:,}" if row.shape.get("window") else ""
        lines.append(_line([row.bits or "", f"{row.shape['keys']:,}{window}", f"{ratio:.2f}x", f"{bits:.2f}"]))
    return "\n".join(lines) if rows else ""


def models(entries: Sequence[dict[str, Any]]) -> str:
    columns = ["whole model, context", "bits", "own cache, tokens/s", "TurboCache, tokens/s", "faster", "KV below FP16"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for entry in entries:
        ratio = entry["ratio"]
        speeds = [f"{entry[f'{name}_tokens_per_second']:.2f}" for name in ("sdpa", "turbo")]
        faster = f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
        below = f"{entry['fp16_bytes'] / entry['turbo_cache_bytes']:.2f}x"
        lines.append(_line([f"{entry['context']:,}", entry["bits"], *speeds, faster, below]))
    return "\n".join(lines) if entries else ""


def real_models(entries: Sequence[dict[str, Any]]) -> str:
    """Prompt time and tokens per second over each cache, alternating with the model's own, and llama.cpp's caches."""
    columns = ["real model, prompt", "cache", "prompt, s", "× own", "tokens/s", "× own", "in attention", "KV, MiB"]
    columns += ["peak, MiB", "KL"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for entry in entries:
        what = f"{entry['model']}, {entry['context']:,}"
        for cache in entry["caches"]:
            speeds = (cache[f"{part}_seconds"]["median"] for part in ("prompt", "token"))
            prompt, token = (cache[f"{part}_ratio"] for part in ("prompt", "token"))
            ratios = [f"{r['median']:.2f} ({r['p20']:.2f} to {r['p80']:.2f})" for r in (prompt, token)]
            seconds, each = speeds
            cells = [what, cache["cache"], f"{seconds:.2f}", ratios[0], f"{1 / each:.1f}", ratios[1]]
            cells += [f"{cache['attention_share']:.0%}"]
            cells += [f"{cache[name] / 2**20:.1f}" for name in ("cache_bytes", "peak_bytes")]
            lines.append(_line([*cells, f"{cache['kl']:.4f}"]))
        for cache in entry.get("llama.cpp", []):
            cells = [what, f"llama.cpp {cache['cache']}", f"{cache['prompt_seconds']:.2f}", "–"]
            lines.append(_line([*cells, f"{1 / cache['token_seconds']:.1f}", *["–"] * 5]))
    return "\n".join(lines) if entries else ""


def _longest(rows: Sequence[Row]) -> int:
    return max((row.shape["keys"] for row in rows if row.work == "decode"), default=0)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
