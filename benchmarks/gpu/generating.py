"""The bundled model through transformers' `generate`: its own cache, a TurboCache, and one whose steps are a CUDA
graph; the CPU's tokens beside the GPU's; a decoder step under torch.compile.

    PYTHONPATH=src python3 benchmarks/gpu/generating.py --out FOLDER

writes rows to FOLDER/generating.jsonl as they are found. Without a GPU (TRITON_INTERPRET=1) a tiny model takes a few
steps: nothing is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(Path(__file__).parent)]

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

Row = dict[str, Any]

PROMPT, STEPS, LIMIT = 300, 100, 60.0
"""Tokens of the prompt and behind it, over two ends of blocks; seconds in all, after which no further part begins."""

TIMED = ("steps", "speed")
"""Parts that nothing may run beside."""

GATE = ("eager and graph", "padded", "again", "CPU and GPU")
"""Parts that compare tokens."""


def rows(parts: Sequence[str] = (*TIMED, *GATE, "torch.compile"), limit: float = LIMIT) -> Iterator[Row]:
    """The parts' rows; what a part raises is a row as well."""
    begin = time.monotonic()
    setup = Setup()
    yield {"note": "setup", **setup.facts}
    for name in parts:
        part = _PARTS[name]
        spent = time.monotonic() - begin
        if spent > limit:
            yield {"part": name, "skipped": f"no time left after {spent:.0f} s"}
            continue
        try:
            for row in part(setup):
                yield {"part": name, **row}
        except Exception as problem:
            said = f"{type(problem).__name__}: {str(problem)[:2000]}"
            yield {"part": name, "passed": False, "problem": said, "trace": traceback.format_exc()[-4000:]}
        yield {"note": "time", "part": name, "seconds": round(time.monotonic() - begin - spent, 2)}


class Setup:
    """The model, on the GPU where there is one, and a prompt."""

    def __init__(self) -> None:
        import transformers

        from turboattention.integrations.transformers import enable

        enable()
        transformers.utils.logging.set_verbosity_error()
        self.gpu = torch.cuda.is_available()
        self.device = "cuda" if self.gpu else "cpu"
        self.model = self._load(self.device)
        self.own = "sdpa"
        prompt, self.steps = (PROMPT, STEPS) if self.gpu else (126, 5)
        ids = self._ids(2 * prompt)
        self.prompt = torch.tensor([ids[:prompt], ids[prompt:]], device=self.device)
        self.room = 2048 if self.gpu else 192
        name = torch.cuda.get_device_name() if self.gpu else "CPU, interpreted"
        self.facts: Row = {
            "gpu": name, "torch": torch.__version__, "transformers": transformers.__version__, "prompt": prompt,
            "steps": self.steps, "layers": self.model.config.num_hidden_layers, "dtype": str(self.model.dtype),
        }  # fmt: skip

    def _load(self, device: str) -> Any:
        import transformers

        from turboattention.bundled import model_path

        if self.gpu:
            model = transformers.AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.bfloat16)
        else:
            config = transformers.LlamaConfig(
                vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, max_position_embeddings=512, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.to(device).eval()

    def _ids(self, count: int) -> list[int]:
        if not self.gpu:
            return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(1)).tolist()
        from turboattention.bundled import model_path, text

        try:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(model_path())(text())["input_ids"][:count]
        except Exception:  # any tokens do
            return torch.randint(3, 2048, (count,), generator=torch.Generator().manual_seed(1)).tolist()

    def cache(self, bits: Any = 4, device: str | None = None) -> Any:
        cache = self.empty_cache(bits, device)
        if not self.gpu and not device:
            self.fill(cache)
        return cache

    def empty_cache(self, bits: Any = 4, device: str | None = None, room: int | None = None) -> Any:
        import turboattention as ta
        from turboattention.integrations.transformers import TurboCache

        config = ta.TurboConfig(bits=bits, guard="off")
        # There is no C++ extension in a plain source tree.
        backend = "reference" if device else "triton"
        return TurboCache(self.model.config, config, max_tokens=room or self.room, backend=backend)

    def fill(self, cache: Any) -> None:
        """The prompt but its last token, by a quicker backend than the interpreter."""
        self.model.set_attn_implementation("turbo")
        for layer in cache.layers:
            layer.backend = "reference"
        with torch.no_grad():
            self.model(self.prompt[:, :-1], past_key_values=cache)
        for layer in cache.layers:
            layer.backend = "triton"

    def generate(
        self, cache: Any, batch: int = 2, steps: int | None = None, sample: bool = False, **options: Any
    ) -> Any:
        self.model.set_attn_implementation(self.own if cache is None else "turbo")
        torch.manual_seed(7)
        prompt = options.pop("input_ids", self.prompt[:1].expand(batch, -1) if batch != 2 else self.prompt)
        mask = options.pop("attention_mask", torch.ones_like(prompt))
        return self.model.generate(
            prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=steps or self.steps, do_sample=sample,
            **({"temperature": 0.8, "top_p": 0.95} if sample else {}), **options,
        )  # fmt: skip

    def graphed(self, cache: Any, **options: Any) -> tuple[Any, Any]:
        from turboattention.integrations.transformers.graphed import GraphedDecoding

        self.model.set_attn_implementation("turbo")
        with GraphedDecoding(self.model, cache, capture=self.gpu) as graph:
            return self.generate(cache, **options), graph

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


def _agreement(a: Any, b: Any) -> Row:
    """Of two token tensors [B, L]: whether they are equal, and how many new ones were before they parted."""
    length = min(a.shape[1], b.shape[1])
    same = (a[:, :length].cpu() == b[:, :length].cpu()).all(0)
    first = int(same.int().cumprod(0).sum())
    return {"equal": bool(same.all()) and a.shape == b.shape, "tokens": length, "same before": first}


def _eager_and_graph(setup: Setup) -> Iterator[Row]:
    """Token by token over several blocks, greedy and sampled."""
    real = ((4, False, setup.steps), (4, True, setup.steps), (2, True, setup.steps))
    for bits, sample, steps in real if setup.gpu else ((4, True, setup.steps),):
        eager, other = setup.cache(bits), setup.cache(bits)
        want = setup.generate(eager, steps=steps, sample=sample)
        got, graph = setup.graphed(other, steps=steps, sample=sample)
        row = _agreement(want, got)
        held = all(
            torch.equal(x, y)
            for a, b in zip(eager.layers, other.layers, strict=True)
            for x, y in zip(a.kv.dequantize(), b.kv.dequantize(), strict=True)
        )
        yield {
            "bits": bits, "sample": sample, **row, "caches equal": held, "passed": row["equal"] and graph.replayed > 0,
            "replayed": graph.replayed, "ordinary": graph.ordinary,
        }  # fmt: skip


def _speed(setup: Setup) -> Iterator[Row]:
    """New tokens a second of whole `generate` calls behind one of each, which compiles and warms."""
    ways: dict[str, Callable[[int, bool, int], Any]] = {
        "own cache": lambda batch, sample, steps: setup.generate(None, batch, steps, sample),
        "TurboCache": lambda batch, sample, steps: setup.generate(setup.cache(), batch, steps, sample),
        "TurboCache, graph": lambda batch, sample, steps: setup.graphed(
            setup.cache(), batch=batch, steps=steps, sample=sample
        ),
    }
    steps = 128 if setup.gpu else 2
    for batch, sample in ((1, False), (16, False), (1, True)) if setup.gpu else ((2, False),):
        for name, way in ways.items():
            if setup.gpu:
                way(batch, sample, 20)
            setup.wait()
            begin = time.perf_counter()
            way(batch, sample, steps)
            setup.wait()
            seconds = time.perf_counter() - begin
            yield {
                "way": name, "batch": batch, "sample": sample, "steps": steps, "seconds in all": seconds,
                "tokens/s": batch * steps / seconds,
            }  # fmt: skip


def _step_times(setup: Setup) -> Iterator[Row]:
    """A step without `generate`'s loop: forwards of a fixed token, the same on all caches."""
    from turboattention.integrations.transformers.graphed import GraphedDecoding

    token = setup.prompt[:, -1:]
    count = 128 if setup.gpu else 2

    def timed(cache: Any) -> Row:
        with torch.no_grad():
            setup.model(setup.prompt[:, :-1], past_key_values=cache) if setup.gpu else None
            for _ in range(4 if setup.gpu else 1):
                setup.model(token, past_key_values=cache)
            setup.wait()
            times = []
            for _ in range(count):
                begin = time.perf_counter()
                setup.model(token, past_key_values=cache).logits[0, -1].argmax().item()
                times.append(time.perf_counter() - begin)
        times.sort()
        return {"median ms": times[count // 2] * 1e3, "slowest ms": times[-1] * 1e3}

    if setup.gpu:
        from transformers import DynamicCache

        setup.model.set_attn_implementation(setup.own)
        yield {"way": "own cache", **timed(DynamicCache(config=setup.model.config))}
    setup.model.set_attn_implementation("turbo")
    yield {"way": "TurboCache", **timed(setup.cache())}
    cache = setup.cache()
    with GraphedDecoding(setup.model, cache, capture=setup.gpu) as graph:
        yield {"way": "TurboCache, graph", **timed(cache), "replayed": graph.replayed}


def _large(setup: Setup) -> Iterator[Row]:
    """The same for a model of Llama-3-8B's shapes with random weights, whose steps take the GPU's time and not the
    host's: prompts, then steps of one token for each sequence. transformers' StaticCache is also captured, as it is."""
    import transformers

    from turboattention.integrations.transformers.graphed import GraphedDecoding

    shapes = ((16, 2048), (16, 8192)) if setup.gpu else ((1, 126),)
    layers, hidden = (32, 4096) if setup.gpu else (1, 64)
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // 128 or 2, num_key_value_heads=hidden // 512 or 1, max_position_embeddings=16384,
        eos_token_id=None, pad_token_id=0, dtype=torch.bfloat16 if setup.gpu else torch.float32,
    )  # fmt: skip
    with torch.device(setup.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
    other, setup.model = setup.model, model
    try:
        for batch, tokens in shapes:
            room = tokens + 256
            ways: dict[str, Callable[[], Any]] = {
                "own cache": lambda: transformers.DynamicCache(config=config),
                "static cache": lambda room=room: transformers.StaticCache(config=config, max_cache_len=room),
                "TurboCache": lambda room=room: setup.empty_cache(room=room),
                "TurboCache, graph": lambda room=room: setup.empty_cache(room=room),
                "TurboCache, 2 bits, graph": lambda room=room: setup.empty_cache(2, room=room),
            }
            ids = torch.randint(3, 4096, (batch, tokens), device=setup.device)
            for name, make in ways.items():
                if not setup.gpu and "Turbo" not in name:
                    continue
                model.set_attn_implementation("turbo" if "Turbo" in name else setup.own)
                row: Row = {"way": name, "batch": batch, "keys": tokens}
                try:
                    cache = make()
                    setup.wait()
                    begin = time.perf_counter()
                    with torch.no_grad():
                        model(ids, past_key_values=cache, logits_to_keep=1)
                    setup.wait()
                    row["prompt ms"] = (time.perf_counter() - begin) * 1e3
                    graph = GraphedDecoding(model, cache, capture=setup.gpu) if "graph" in name else None
                    with graph or contextlib.nullcontext():
                        row |= _times_of_steps(setup, model, cache, ids[:, -1:])
                except Exception as problem:  # the others are measured all the same
                    row["refused"] = f"{type(problem).__name__}: {str(problem)[:300]}"
                yield row
                cache = graph = None
                if setup.gpu:
                    torch.cuda.empty_cache()
    finally:
        setup.model = other


def _times_of_steps(setup: Setup, model: Any, cache: Any, token: torch.Tensor) -> Row:
    """Steps of one token each; the host waits only at the end, as with a queue of requests."""
    count = 64 if setup.gpu else 2
    with torch.no_grad():
        for _ in range(4 if setup.gpu else 1):
            model(token, past_key_values=cache)
        setup.wait()
        begin = time.perf_counter()
        for _ in range(count):
            model(token, past_key_values=cache)
        setup.wait()
    seconds = time.perf_counter() - begin
    return {"step ms": seconds / count * 1e3, "tokens/s": token.shape[0] * count / seconds}


def _devices(setup: Setup) -> Iterator[Row]:
    """Greedy tokens of the GPU and of the CPU, from the same cache and configuration. They may part where the model's
    own bfloat16 arithmetic differs; said is how far they go together."""
    if not setup.gpu:
        yield {"missing": "a GPU"}
        return
    steps = 48
    try:
        for name in ("own cache", "TurboCache"):
            here = setup.generate(None if name == "own cache" else setup.cache(), steps=steps)
            with _Moved(setup, "cpu"):
                there = setup.generate(None if name == "own cache" else setup.cache(device="cpu"), steps=steps)
            yield {"way": name, **_agreement(here, there)}
    finally:
        setup.model.to(setup.device)


class _Moved:
    def __init__(self, setup: Setup, device: str):
        self.setup, self.device = setup, device

    def __enter__(self) -> None:
        self.prompt = self.setup.prompt
        self.setup.model.to(self.device)
        self.setup.prompt = self.prompt.to(self.device)

    def __exit__(self, *_: object) -> None:
        self.setup.model.to(self.setup.device)
        self.setup.prompt = self.prompt


def _padded(setup: Setup) -> Iterator[Row]:
    """A left-padded batch."""
    if not setup.gpu:
        yield {"missing": "a GPU"}
        return
    ids, mask = setup.prompt.clone(), torch.ones_like(setup.prompt)
    mask[0, :70] = 0
    ids[0, :70] = 0
    given = {"input_ids": ids, "attention_mask": mask, "steps": setup.steps}
    want = setup.generate(setup.cache(), **given)
    got, graph = setup.graphed(setup.cache(), **given)
    row = _agreement(want, got)
    yield {**row, "passed": row["equal"] and graph.replayed > 0, "replayed": graph.replayed}


def _again(setup: Setup) -> Iterator[Row]:
    """The cache goes on behind a graph: a crop, then more tokens, on both; many steps until the cache is full."""
    steps, more = (90, 70) if setup.gpu else (3, 2)

    def twice(cache: Any, run: Callable[..., Any]) -> Any:
        first = run(cache, steps=steps)
        cache.crop(-1)
        return run(cache, steps=more, input_ids=first[:, : cache.get_seq_length() + 2])

    want = twice(setup.cache(), setup.generate)
    got = twice(setup.cache(), lambda cache, **given: setup.graphed(cache, **given)[0])
    row = _agreement(want, got)
    yield {**row, "passed": row["equal"]}
    if setup.gpu:
        setup.room = 384
        want = setup.generate(setup.cache(), steps=120)
        got, graph = setup.graphed(setup.cache(), steps=120)
        setup.room = 2048
        row = _agreement(want, got)
        yield {"past max_tokens": True, **row, "passed": row["equal"], "replayed": graph.replayed}


def _compiled(setup: Setup) -> Iterator[Row]:
    """A decoder step as users of the plain API compile it: fullgraph, beside the same step eager. Where Triton is
    interpreted, the same operators in a graph that nothing is generated from."""
    import turboattention as ta
    from turboattention.config import TurboConfig

    batch, heads, kv_heads, size = (4, 8, 2, 128) if setup.gpu else (1, 2, 1, 16)
    before, steps = (1000, 130) if setup.gpu else (62, 4)
    dtype = torch.bfloat16 if setup.gpu else torch.float32
    generator = torch.Generator(setup.device).manual_seed(3)

    def normals(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=setup.device).to(dtype)

    width = heads * size
    wq, wk, wv, wo = (normals(x, width) * width**-0.5 for x in (width, kv_heads * size, kv_heads * size, width))
    up, down = normals(2 * width, width) * width**-0.5, normals(width, 2 * width) * width**-0.5

    def step(x: torch.Tensor, cache: Any) -> torch.Tensor:
        y = torch.nn.functional.rms_norm(x, (width,))
        q, k, v = ((y @ w.t()).view(batch, 1, -1, size).transpose(1, 2) for w in (wq, wk, wv))
        out = ta.turbo_attention_with_kvcache(q, cache, k, v, backend="triton")
        x = x + out.transpose(1, 2).reshape(batch, 1, width) @ wo.t()
        y = torch.nn.functional.rms_norm(x, (width,))
        return x + torch.nn.functional.silu(y @ up.t()) @ down.t()

    config = TurboConfig(guard="off", softmax="exp")  # what GPUs take
    filled = [
        ta.KVCache(batch, kv_heads, size, config=config, max_tokens=2048, device=setup.device, dtype=dtype)
        for _ in range(2)
    ]
    k, v = (normals(batch, kv_heads, before, size) for _ in range(2))
    for cache in filled:
        cache.append(k, v)
    inputs = [normals(batch, 1, width) for _ in range(steps)]
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if setup.gpu else "aot_eager")
    error, times = 0.0, {"eager": [], "compiled": []}
    with torch.no_grad():
        for x in inputs:
            pair = []
            for (name, call), cache in zip((("eager", step), ("compiled", compiled)), filled, strict=True):
                begin = time.perf_counter()
                pair.append(call(x, cache))
                setup.wait()
                times[name].append(time.perf_counter() - begin)
            want, got = (y.float() for y in pair)
            error = max(error, float((got - want).norm() / want.norm()))
    medians = {f"{name} ms": sorted(values)[len(values) // 2] * 1e3 for name, values in times.items()}
    equal = bool((filled[0].lengths == filled[1].lengths).all())
    # bfloat16: what inductor fuses rounds at other places.
    yield {"steps": len(inputs), "error": error, **medians, "passed": error < 0.03 and equal}


_PARTS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "eager and graph": _eager_and_graph, "steps": _step_times, "padded": _padded, "speed": _speed, "again": _again,
    "CPU and GPU": _devices, "torch.compile": _compiled, "large": _large,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "generating", help="folder of the results")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds, after which no further part begins")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = False
    with (options.out / "generating.jsonl").open("a", encoding="utf-8") as file:
        for row in rows(limit=options.limit):
            wrong |= row.get("passed") is False
            print({name: value for name, value in row.items() if name != "trace"}, flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
