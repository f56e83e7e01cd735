"""Alternatives to the numerics that were measured and rejected: `python benchmarks/trials.py TRIAL LABEL=FOLDER...
--text WIKITEXT2` prints the tables of docs/numerics.md.

Queries, keys and values are those of the model on the text. Errors are relative (Frobenius norm, per query head) to
exact attention, of every fourth query of the later half unless stated otherwise, and are averaged over heads and over
every sixth layer, from the second on. Axes and orders are fitted to the earlier half of the text. `bigbias` and `sink`
select the synthetic tensors of the page instead of a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import turboattention as ta
from turboattention.evaluation.synthetic import KINDS, synthetic_qkv
from turboattention.flashq import progressive_dequantize, progressive_quantize, quantize_tokens, rotate
from turboattention.flashq.rotation import rotation_matrix
from turboattention.integrations.transformers import language_model
from turboattention.integrations.transformers.recording import recorded_attention
from turboattention.reference.exact import exact_attention

BLOCK, LAYERS_APART, QUERIES_APART = 64, 6, 4
Encode = Callable[[Tensor], Tensor]
"""INT8 codes int8 [N, H, B, D] of blocks -> what is read back, float64."""
Found = dict[str, Tensor]
"""Errors [Hq] by row of the table."""


class Layer:
    """A layer's queries q [1, Hq, L, D], keys and values k, v [1, Hkv, L, D], float64."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, window: int | None = None):
        self.q, self.k, self.v = (x.double() for x in (q, k, v))
        self.heads, self.tokens, self.head_dim = self.k.shape[1:]
        self._scale, self._window = scale or self.head_dim**-0.5, window
        self._exact: dict[int, Tensor] = {}

    def error(
        self, k: Tensor, v: Tensor, q: Tensor | None = None, first: int | None = None, end: int | None = None
    ) -> Tensor:
        """[Hq], of queries `first` to `end` over other keys and values (and with other queries)."""
        first = self.tokens // 2 if first is None else first
        if first not in self._exact:
            self._exact[first] = self._attend(self.q, self.k, self.v, first)
        rows = slice(((end or self.tokens) - first) // QUERIES_APART)
        got, exact = self._attend(q, k, v, first)[:, :, rows], self._exact[first][:, :, rows]
        return ((got - exact).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))).sqrt()

    def _attend(self, q: Tensor | None, k: Tensor, v: Tensor, first: int) -> Tensor:
        at, keys = torch.arange(first, self.tokens, QUERIES_APART)[:, None], torch.arange(self.tokens)
        seen = (keys <= at) & (keys > at - (self._window or self.tokens))
        return exact_attention((self.q if q is None else q)[:, :, at[:, 0]], k, v, seen, scale=self._scale)[0]

    @cached_property
    def energy(self) -> Tensor:
        """E[q q^T] [Hkv, D, D]."""
        q = self.q[0, :, : self.tokens // 2].unflatten(0, (self.heads, -1)).flatten(1, 2)
        return q.mT @ q / q.shape[1]

    @cached_property
    def hadamard(self) -> Tensor:
        return rotation_matrix(self.head_dim, torch.float64, self.k.device).expand(self.heads, -1, -1)


def layers(folder: str, text: str, tokens: int) -> list[Layer]:
    language = language_model.load(folder, "cpu", "float32")
    ids = language.encode(text[: 8 * tokens])[:tokens]
    with torch.no_grad(), recorded_attention(language.model) as calls:
        language.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    given = [calls[index] for index in sorted(calls)]
    return [Layer(c.q, c.k, c.v, c.options.get("scaling"), c.options.get("sliding_window")) for c in given]


def stored(x: Tensor, axes: Tensor, back: Tensor, encode: Encode) -> Tensor:
    """x [1, H, L, D] along `axes` [H, D, D] as INT8 with a scale per token, its blocks after the first through
    `encode`, and `back` [H, D, D]."""
    codes, scales = quantize_tokens((x @ axes).float())
    blocks = codes[0].unflatten(1, (-1, BLOCK)).transpose(0, 1)
    read = torch.cat([blocks[:1].double(), encode(blocks[1:])]).transpose(0, 1).flatten(1, 2)[None]
    return (read * scales[..., None].double()) @ back


def uniform(*widths: int) -> Encode:
    """Stage 2 with the channels in as many runs of the same length as there are `widths`."""

    def encode(blocks: Tensor) -> Tensor:
        runs = blocks.unflatten(-1, (len(widths), -1)).unbind(-2)
        pairs = zip(runs, widths, strict=True)
        return torch.cat([progressive_dequantize(*progressive_quantize(run, w, True)) for run, w in pairs], -1).double()

    return encode


def covariance(x: Tensor) -> Tensor:
    """[H, D, D] of x [1, H, L, D] within blocks, without the first."""
    blocks = x[0, :, BLOCK : x.shape[2] // 2].unflatten(1, (-1, BLOCK))
    centred = (blocks - blocks.mean(2, keepdim=True)).flatten(1, 2)
    return centred.mT @ centred / centred.shape[1]


def along(axes: Tensor, *moments: Tensor) -> Tensor:
    """`axes` [H, D, D] (columns), sorted by the decreasing product of the `moments` [H, D, D] along them."""
    weight = torch.stack([(axes.mT @ one @ axes).diagonal(dim1=-2, dim2=-1) for one in moments]).prod(0)
    return axes.gather(-1, weight.argsort(-1, descending=True)[:, None].expand_as(axes))


def channels(layer: Layer) -> Tensor:
    return torch.eye(layer.head_dim, dtype=torch.float64).expand(layer.heads, -1, -1)


def value_axes(layer: Layer) -> Found:
    """V along its principal axes."""
    spread = covariance(layer.v)
    bases = {"not rotated": along(channels(layer), spread), "principal axes": torch.linalg.eigh(spread).eigenvectors}
    bases["principal axes"] = along(bases["principal axes"], spread)
    found = {}
    for title, widths in (("4", (4,)), ("3", (3,)), ("2", (2,))):
        for name, axes in {"rotated": layer.hadamard, **bases}.items():
            found[f"V, {title}, {name}"] = layer.error(layer.k, stored(layer.v, axes, axes.mT, uniform(*widths)))
    for title, widths in (
        ("halves of 4 and 2", (4, 2)),
        ("halves of 3 and 1", (3, 1)),
        ("quarters of 4, 2, 1, 1", (4, 2, 1, 1)),
    ):
        bits, axes = sum(widths) // len(widths), bases["principal axes"]
        encode = uniform(*widths)
        found[f"V, {bits}: {title}, principal axes"] = layer.error(layer.k, stored(layer.v, axes, axes.mT, encode))
    return found


def key_axes(layer: Layer) -> Found:
    """K along axes fitted to the queries."""
    energy, spread = layer.energy, covariance(layer.k)
    values, asked = torch.linalg.eigh(energy)
    order = along(channels(layer), energy, spread)
    asked, own = along(asked, energy, spread), along(torch.linalg.eigh(spread).eigenvectors, energy, spread)
    # Keys times the square root of E[q q^T], queries times its inverse: all errors then have equal weight. Not
    # orthogonal.
    root = torch.linalg.eigh(energy).eigenvectors * values.clamp(min=1e-6 * values.amax()).sqrt()[:, None]
    balanced = along(root @ torch.linalg.eigh(root.mT @ spread @ root).eigenvectors, spread)
    halved = {
        "channels in order": (order, order.mT),
        "principal axes of K": (own, own.mT),
        "axes of E[q q^T]": (asked, asked.mT),
        "axes of K after the root of E[q q^T]": (balanced, torch.linalg.inv(balanced)),
    }
    mixed = asked @ layer.hadamard
    whole = {"rotated": (layer.hadamard, layer.hadamard.mT), "axes of E[q q^T], rotated": (mixed, mixed.mT)}
    found = {}
    for bits, halves in ((4, (5, 3)), (3, (4, 2)), (2, (3, 1))):
        for name, (axes, back) in (whole | halved).items():
            encode = uniform(bits) if name in whole else uniform(*halves)
            title = f"K, {bits}" if name in whole else f"K, {bits}: halves of {halves[0]} and {halves[1]}"
            found[f"{title}, {name}"] = layer.error(stored(layer.k, axes, back, encode), layer.v)
    return found


LLOYD_MAX = {
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326],
    3: [0.2451, 0.7560, 1.3439, 2.1520],
    2: [0.4528, 1.5104],
}
"""The optimal levels of a normal variable (Max 1960), the positive half."""


def levels(half: Sequence[float]) -> Encode:
    """Levels that are spaced like `half` and its mirror image, with any step, rounded to INT8; the range is searched as
    below 4 bits."""
    points = torch.tensor([-x for x in reversed(half)] + list(half), dtype=torch.float64) / half[-1]
    edges = (points[1:] + points[:-1]) / 2

    def encode(blocks: Tensor) -> Tensor:
        values = blocks.double()
        low, high = values.amin(-2, keepdim=True), values.amax(-2, keepdim=True)
        kept, least = values, torch.full_like(low, torch.inf)
        for shrink in range(16, 7, -1):
            reach = ((high - low) / 2 * shrink / 16).clamp(min=0.5)
            for quarter in (0, -1, 1):
                middle = (low + high) / 2 + quarter * reach / 2 / (len(points) - 1)
                read = (points[torch.bucketize((values - middle) / reach, edges)] * reach + middle).round()
                error = (read - values).square().sum(-2, keepdim=True)
                kept, least = torch.where(error < least, read, kept), torch.minimum(error, least)
        return kept

    return encode


def level_tables(layer: Layer) -> Found:
    """Unevenly spaced levels in stage 2."""
    found = {}
    for bits, uneven in LLOYD_MAX.items():
        even = [i + 0.5 for i in range(len(uneven))]
        ways = {"as it is": uniform(bits), "any step": levels(even), "Lloyd-Max": levels(uneven)}
        for name, encode in ways.items():
            keys, values = (stored(x, layer.hadamard, layer.hadamard.mT, encode) for x in (layer.k, layer.v))
            found[f"K, {bits}, {name}"] = layer.error(keys, layer.v)
            found[f"V, {bits}, {name}"] = layer.error(layer.k, values)
    return found


def rows_of(x: Tensor, bits: int) -> Tensor:
    """x with a scale per row: in one INT8 plane, or with 16 bits in two."""
    if bits == 8:
        codes, scales = quantize_tokens(x.float())
        return codes.double() * scales[..., None].double()
    scales = x.abs().amax(-1, keepdim=True) / (119 * 256)
    return (x / scales).round() * scales


def two_planes(layer: Layer) -> Found:
    """K and Q of 8 and 16 bits, smoothed (all of K; the logits of the mean are exact), and the error of only V."""
    q, k = rotate(layer.q), rotate(layer.k)
    mean = k[:, :, 4:BLOCK].mean(2, keepdim=True)
    of_mean = (q.unflatten(1, (layer.heads, -1)) * mean[:, :, None]).sum(-1, keepdim=True).flatten(1, 2)
    found = {}
    for key_bits, query_bits in ((8, 8), (16, 8), (8, 16), (16, 16)):
        keys = torch.cat([rows_of(k - mean, key_bits), torch.ones_like(k[..., :1])], -1)
        queries = torch.cat([rows_of(q, query_bits), of_mean], -1)
        found[f"K in {key_bits} bits, Q in {query_bits}"] = layer.error(keys, layer.v, queries)
    for bits in (8, 4, 3):
        encode = (lambda codes: codes.double()) if bits == 8 else uniform(bits)
        values = stored(layer.v, layer.hadamard, layer.hadamard.mT, encode)
        found[f"only V, in {bits} bits"] = layer.error(layer.k, values)
        if bits < 8:
            found[f"K and Q in 16 bits, V in {bits}"] = layer.error(keys, values, queries)
    return found


def first_block(layer: Layer) -> Found:
    """Subtracting the mean from keys of the first block: never (current), from their INT8 form, or before INT8."""
    found = {}
    for bits in (8, 4, 3):
        for sinks in (64, 0) if bits < 8 else (64,):
            config = ta.TurboConfig(bits=bits, guard="off", sink_tokens=sinks)
            for name, (k, v) in first_blocks(layer.k, layer.v, config).items():
                title = f"{bits}{'' if sinks else ', no sink block'}, {name}"
                found[f"{title}, all rows"] = layer.error(k, v, first=0)
                found[f"{title}, first 128"] = layer.error(k, v, first=0, end=128)
    return found


def first_blocks(k: Tensor, v: Tensor, config: ta.TurboConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """The stored k and v, for each way to smooth the keys of the first block."""

    def cache(config: ta.TurboConfig, mean: Tensor | None = None) -> ta.KVCache:
        made = ta.KVCache(1, k.shape[1], k.shape[3], config=config, k_mean=mean)
        made.append(k.float(), v.float())
        return made

    now = cache(config)
    keys, values = now.dequantize()
    assert now.k_mean is not None
    mean = now.k_mean[:, :, None].float()
    whole, _ = cache(config.replace(bits=8)).dequantize()  # whose first block is INT8 rows
    codes, scales = quantize_tokens(rotate(whole[:, :, :BLOCK].float()) - mean)
    if not config.sink_tokens:
        codes = progressive_dequantize(*progressive_quantize(codes, config.kv_bits[0], config.search))
    block = rotate(codes * scales[..., None] + mean, inverse=True)
    return {
        "as now": (keys, values),
        "mean off the INT8 rows": (torch.cat([block.to(keys), keys[:, :, BLOCK:]], 2), values),
        "mean off the keys": cache(config, rotate(mean[0, :, 0], inverse=True)).dequantize(),
    }


TRIALS: dict[str, Callable[[Layer], Found]] = {
    "value-axes": value_axes,
    "key-axes": key_axes,
    "levels": level_tables,
    "two-planes": two_planes,
    "first-block": first_block,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("models", nargs="+", metavar="LABEL=FOLDER", help=f"or one of {', '.join(KINDS)}")
    parser.add_argument("--text", type=Path, help="the raw test split of WikiText-2")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layer", type=int, help="this one alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns: dict[str, Found] = {}
    for label, _, folder in (one.partition("=") for one in options.models):
        if label in KINDS:
            q, k, v = (torch.from_numpy(x) for x in synthetic_qkv(label))
            chosen = [Layer(q, k, v)]
        else:
            every = layers(folder, options.text.read_text(encoding="utf-8"), options.tokens)
            chosen = every[1::LAYERS_APART] if options.layer is None else [every[options.layer]]
        found = [TRIALS[options.trial](layer) for layer in chosen]
        columns[label] = {name: torch.stack([one[name] for one in found]) for name in found[0]}
    print(f"| | {' | '.join(columns)} |\n" + "|---" * (1 + len(columns)) + "|")
    for name in next(iter(columns.values())):
        cells = [f"{errors[name].mean():.4f}, at most {errors[name].max():.3f}" for errors in columns.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
