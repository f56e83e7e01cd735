"""Saved caches, damaged and forged at random: every file must be rejected, or load as a valid cache.

    python benchmarks/fuzz_files.py --files 100000 --seed 0

Half of the files have bytes or headers changed; the others have tensors or metadata changed under a digest that fits,
as someone would forge them. Loaded caches are dequantized and attended; no result may be NaN or infinite. Prints
counts, the slowest load and the largest memory, and exits with 1 if a file was neither rejected by an error of this
package nor loaded, took too long or gave values that are not finite, or if an object could not be deleted.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import turboattention as ta
from turboattention.errors import TurboError
from turboattention.kv import serialization

SLOWEST = 5.0  # seconds
MEMORY = 4 << 30  # address space beyond what the process has at the start

DTYPES = "BOOL U8 I8 I16 U16 F16 BF16 I32 U32 F32 F64 I64 U64 F8_E4M3 X1".split()
SIZES = [0, 1, -1, 2, 3, 63, 64, 2**16, 2**31, 2**40, 2**62, 2**63, 2**64]
VALUES = [
    None,
    True,
    "",
    "x",
    [],
    {},
    0,
    -1,
    1,
    2,
    7,
    64,
    2**31,
    2**40,
    2**63,
    1e400,
    float("nan"),
    0.5,
    [1, 2],
    "bfloat16",
]
NUMBERS = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-45, 0.0, -1.0, 127.0, 255.0, -128.0, 1e9]


def seeds(folder: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """Whole files of both kinds, and what loads them."""
    from transformers import LlamaConfig

    from turboattention.integrations.transformers import TurboCache

    caches = {
        "plain": ta.KVCache(2, 2, 16),
        "paper": ta.KVCache(1, 1, 16, config=ta.TurboConfig.paper()),
        "mixed": ta.KVCache(1, 2, 16, config=ta.TurboConfig(bits="mixed", guard="off"), max_tokens=256),
        "window": ta.KVCache(1, 1, 16, window_size=70, head_bits=[3]),
        "mean": ta.KVCache(1, 1, 16, k_mean=torch.ones(1, 16), dtype=torch.bfloat16),
        "empty": ta.KVCache(1, 1, 16),
    }
    made: dict[str, tuple[Path, Callable[[Path], Any]]] = {}
    for name, cache in caches.items():
        if name != "empty":
            shape = (cache.batch_size, cache.num_kv_heads, 200, 16)
            cache.append(*(torch.randn(shape).to(cache.dtype or torch.float32) for _ in "kv"))
        cache.save(folder / name)
        made[name] = folder / name, ta.KVCache.load
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_hidden_layers=2, vocab_size=8
    )
    whole = TurboCache(config)
    for layer in whole.layers:
        kv = ta.KVCache(2, 1, 16)
        kv.append(*torch.randn(2, 2, 1, 100, 16), torch.tensor([100, 90]))
        layer.restore(kv, None, 100, torch.arange(100) >= torch.tensor([[0], [10]]))
    whole.save(folder / "turbo", torch.zeros(2, 100, dtype=torch.int64))
    made["turbo"] = folder / "turbo", lambda path: TurboCache.load(path, config)
    return made


# -- damage: bytes and headers ------------------------------------------------------------------------


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], content: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def flipped(data: bytes, pick: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(pick.choice((1, 1, 2, 16))):
        at = pick.randrange(min(len(out), pick.choice((8, 600, len(out)))))
        out[at] = pick.randrange(256)
    return bytes(out)


def cut(data: bytes, pick: random.Random) -> bytes:
    at = pick.randrange(len(data))
    return pick.choice((data[:at], data + data[:at], data[at:], data[:at] + b"\0" * pick.randrange(99) + data[at:]))


def other_length(data: bytes, pick: random.Random) -> bytes:
    return struct.pack("<Q", pick.choice([*(x % 2**64 for x in SIZES), len(data), pick.randrange(2000)])) + data[8:]


def other_entry(data: bytes, pick: random.Random) -> bytes:
    """A tensor of another dtype or shape, or that overlaps another or ends beyond the file."""
    header, content = split(data)
    names = [name for name in header if name != "__metadata__"]
    entry, other = header[pick.choice(names)], header[pick.choice(names)]
    kind = pick.randrange(5)
    if kind == 0:
        entry["dtype"] = pick.choice(DTYPES)
    elif kind == 1 and entry["shape"]:
        entry["shape"][pick.randrange(len(entry["shape"]))] = pick.choice(SIZES)
    elif kind == 2:
        entry["data_offsets"] = other["data_offsets"]
    elif kind == 3:
        entry["data_offsets"][pick.randrange(2)] = pick.choice([*SIZES, len(content) + 1, pick.randrange(len(content))])
    else:
        header[pick.choice(names)] = copy.deepcopy(pick.choice(VALUES))
    return joined(header, content)


def other_metadata(data: bytes, pick: random.Random) -> bytes:
    header, content = split(data)
    own = header["__metadata__"]
    own[pick.choice([*own])] = pick.choice(["", "2", "0", "x", "{}", "[" * 10_000, "null", '{"cache": {}}', "1" * 5000])
    return joined(header, content)


# -- forgery: other content under a digest that fits --------------------------------------------------


def forged(data: bytes, pick: random.Random, folder: Path) -> bytes:
    from safetensors.torch import load, save

    tensors, header = dict(load(data)), split(data)[0]["__metadata__"]
    content = json.loads(header["content"])
    for _ in range(pick.choice((1, 1, 2, 3))):
        if pick.random() < 0.5 and tensors:
            forge_tensor(tensors, pick)
        else:
            forge_value(content, pick)
    text = json.dumps(content)
    header |= {"content": text, "digest": serialization._digest(text, tensors)}
    return save({name: x.contiguous() for name, x in tensors.items()}, header)


def forge_tensor(tensors: dict[str, torch.Tensor], pick: random.Random) -> None:
    name = pick.choice([*tensors])
    x, kind = tensors[name].clone().contiguous(), pick.randrange(7)
    if kind == 0:
        del tensors[name]
        return
    if kind == 1:
        tensors[pick.choice([*tensors, "new"])] = x
        return
    if kind == 2:
        x = x.to(pick.choice((torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float64)))
    elif kind == 3:
        x = pick.choice((x[:0], x[1:], torch.cat([x, x]), x[None], x.flatten(), x.mT if x.dim() > 1 else x))
    elif x.numel():
        flat, count = x.view(-1), pick.choice((1, 1, x.numel()))
        at = torch.tensor([pick.randrange(x.numel()) for _ in range(count)]) if count == 1 else slice(None)
        if kind == 4 and x.dtype == torch.uint8:  # pages: scales are at their ends
            x[..., -pick.randrange(1, 40) :] = pick.choice((0, 127, 128, 255))
        elif x.is_floating_point():
            flat[at] = pick.choice(NUMBERS)
        elif x.dtype != torch.bool:
            info = torch.iinfo(x.dtype)
            flat[at] = max(info.min, min(info.max, pick.choice([*SIZES, -2, -3, 200, info.max, info.min])))
    tensors[name] = x.contiguous()


def forge_value(content: Any, pick: random.Random) -> None:
    """Something else somewhere in nested metadata."""
    while isinstance(content, (dict, list)) and content:
        key = pick.choice([*content]) if isinstance(content, dict) else pick.randrange(len(content))
        if not isinstance(content[key], (dict, list)) or not content[key] or pick.random() < 0.2:
            content[key] = copy.deepcopy(pick.choice(VALUES))
            return
        content = content[key]


# -- looking at what came of it -----------------------------------------------------------------------


def is_finite(loaded: Any) -> bool:
    """Whether the content and the results of a loaded cache are finite."""
    caches = [loaded] if isinstance(loaded, ta.KVCache) else [x.kv for x in loaded.layers if x.kv is not None]
    for cache in caches:
        parts = [*cache.dequantize()]
        if len(cache) and bool(cache.seq_lens.min()):
            q = torch.ones(cache.batch_size, cache.num_kv_heads, 1, cache.head_dim, dtype=cache.dtype or torch.float32)
            parts.append(ta.turbo_attention_with_kvcache(q, cache))
        if not all(bool(x.isfinite().all()) for x in parts):
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(options.seed)
    pick, counts, faults = random.Random(options.seed), collections.Counter[str](), []
    slowest, undeleted = 0.0, list[str]()
    sys.unraisablehook = lambda error: undeleted.append(repr(error.exc_value))
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), Path(name) / "file"
        made = seeds(folder)
        whole = {seed: made[seed][0].read_bytes() for seed in made}
        assert all(is_finite(load(file)) for file, load in made.values())
        before = peak()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for number in range(options.files):
            seed = pick.choice([*made])
            change = pick.choice((flipped, cut, other_length, other_entry, other_metadata, *[forged] * 5))
            data = forged(whole[seed], pick, folder) if change is forged else change(whole[seed], pick)
            path.write_bytes(data)
            begun = time.perf_counter()
            try:
                loaded = made[seed][1](path)
                took = time.perf_counter() - begun
                try:
                    kind = "loaded" if is_finite(loaded) else "not finite"
                except TurboError:
                    kind = "loaded, refused when read"
            except TurboError:
                kind, took = "refused", time.perf_counter() - begun
            except Exception as error:
                kind, took = f"{type(error).__name__} in {change.__name__} of {seed}: {error}"[:200], 0.0
            loaded = None
            if undeleted:
                kind = f"{undeleted.pop()} at deletion, {change.__name__} of {seed}"
            counts[kind] += 1
            slowest = max(slowest, took)
            if kind not in ("refused", "loaded", "loaded, refused when read") or took > SLOWEST:
                faults.append((number, kind, took))
            if number % 10_000 == 9_999:
                print(number + 1, dict(counts), flush=True)
    print(f"{options.files} files:", dict(counts))
    print(f"slowest {slowest:.2f} s, memory {peak() / 2**20:.0f} MiB, of that {before / 2**20:.0f} before the first")
    for fault in faults[:20]:
        print("fault:", *fault)
    return 1 if faults else 0


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
