"""Saves and loads caches as safetensors files, one or several per file.

The metadata holds the format's name and version, the rotation's number and everything else needed to read the bytes.
Any inconsistency raises `FormatError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import TurboConfig
from ..errors import FormatError, InputError, TurboError
from ..files import kind_of, open_regular, parse_json, write_whole
from ..flashq.rotation import ROTATION_ID
from ..modes import in_own_modes
from .cache import KVCache
from .channel_order import ChannelOrder, is_permutation, permutation_dtype
from .claims import MOST, TensorFile, claim_cache, counted
from .layout import FORMAT_NAME, FORMAT_VERSION
from .page_table import EVICTED, PageTable
from .pages import _decode_scales
from .pool import PagePool
from .stage1 import MEAN_DTYPE
from .tail_buffer import TailBuffer
from .window import first_kept_blocks, tokens_seen

_LARGEST = 1e30
_AGAIN = (
    "read its text again, in Python or with the command that saved it, for example: turboattention generate --model "
    "MODEL --file TEXT --max-new-tokens 0 --save-cache PATH"
)
_LARGEST_HEADER = 2**24
"""Bytes of the header of a safetensors file: metadata, and 100 to 150 for every tensor."""
_DAMAGES = (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError, OverflowError)
"""Exceptions raised when reading a damaged file, in addition to safetensors' own."""


def save_cache(cache: KVCache, path: str | os.PathLike[str]) -> None:
    """Save one cache to one file, atomically. Raises `InputError` if it cannot be written."""
    write_file(path, cache_tensors(cache, ""), {"cache": cache_metadata(cache)})


def load_cache(path: str | os.PathLike[str], device: torch.device | str | None = None) -> KVCache:
    """Load a file of `save_cache` to `device` (default CPU). Raises `FormatError`, or FileNotFoundError."""
    tensors, metadata = read_file(path, claim_one)
    return cache_from_tensors(tensors, metadata["cache"], "", device)


def claim_one(file: TensorFile, metadata: dict[str, Any]) -> None:
    """The tensors of a file of `save_cache`, for `read_file`."""
    if not isinstance(metadata.get("cache"), dict):
        raise FormatError(f"path: expected a file with one cache, got {sorted(metadata)}")
    claim_cache(file, metadata["cache"], "")


def write_file(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON metadata with this format's header. Raises `InputError` if the file cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = {"format": FORMAT_NAME, "version": str(FORMAT_VERSION), "rotation": str(ROTATION_ID)}
    content = json.dumps(metadata)
    if len(json.dumps(content)) > _LARGEST_HEADER // 2:  # the rest is for the names of tensors
        raise InputError(f"path: expected metadata of at most {_LARGEST_HEADER >> 21} MiB, got {len(content):,} bytes")
    header |= {"content": content, "digest": _digest(content, tensors)}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:  # wraps OS errors such as a full disk
            raise OSError(str(error)) from error

    write_whole(path, write)


def read_file(
    path: str | os.PathLike[str], claim: Callable[[TensorFile, dict[str, Any]], object]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of `write_file`. `claim` claims the tensors that the metadata implies, before any is read.

    Raises FileNotFoundError, or `FormatError` if the file is not valid.
    """
    name = os.fspath(path)
    with _errors_about(name), _opened(name) as file:
        header = file.metadata() or {}
        _check_header(header, name)
        metadata = parse_json(header["content"])
        if not isinstance(metadata, dict):
            raise FormatError(f"path: expected a saved cache, got {name}, whose content is no object")
        tensors = TensorFile(file)
        claim(tensors, metadata)
        content = tensors.read_all()
        if header["digest"] != _digest(header["content"], content):
            raise FormatError(f"path: expected a saved cache, got {name}, whose content was altered")
        return content, metadata


def check_saved_cache(path: str | os.PathLike[str]) -> None:
    """Raises the errors of `read_file` that the header of the file already shows."""
    name = os.fspath(path)
    with _errors_about(name), _opened(name) as file:
        _check_header(file.metadata() or {}, name)


@contextmanager
def _errors_about(name: str) -> Iterator[None]:
    """Errors of reading the file `name` as FileNotFoundError or `FormatError`."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"path: expected a saved cache, got {name}, which does not exist") from error
    except TurboError:
        raise
    except (SafetensorError, *_DAMAGES) as error:
        kind = kind_of(name) or f"which cannot be read ({error})"
        raise FormatError(f"path: expected a saved cache, got {name}, {kind}") from error


def is_saved_cache(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file whose header is of this format."""
    from safetensors import SafetensorError

    try:
        with _opened(os.fspath(path)) as file:
            return (file.metadata() or {}).get("format") == FORMAT_NAME
    except (SafetensorError, *_DAMAGES):
        return False


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The file at `path` with its header read. Raises also OSError, ValueError and safetensors' error."""
    from safetensors import safe_open

    with open_regular(path) as opened:  # safetensors opens a file twice; both must see the same file
        with open(opened, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(f"its header of {size:,} bytes is larger than {_LARGEST_HEADER >> 20} MiB")
        with safe_open(opened, framework="pt") as file:
            yield file


def cache_metadata(cache: KVCache) -> dict[str, Any]:
    """The JSON-serializable metadata of a cache."""
    return {
        "version": FORMAT_VERSION,
        "config": dataclasses.asdict(cache.config),
        "num_kv_heads": cache.num_kv_heads,
        "head_dim": cache.head_dim,
        "v_head_dim": cache.v_head_dim,
        "dtype": None if cache.dtype is None else str(cache.dtype).removeprefix("torch."),
        "window_size": cache.window_size,
        "max_tokens": cache.max_tokens,
        "label": cache.label,
        "widths_given": cache.given_bits is not None,
    }


def cache_tensors(cache: KVCache, prefix: str) -> dict[str, Tensor]:
    """The cache's tensors by name, with `prefix` before each name; shared pages are included once."""
    tensors = {"lengths": cache.seq_lens}
    optional = {"head_bits": cache.head_bits, "given_mean": cache.given_mean}
    if cache.given_order is not None:
        optional |= {"given_order": cache.given_order.permutation, "given_halved": cache.given_order.halved}
    if cache.page_table is not None and cache.tail is not None:
        pools, numbers = cache.page_table.pools, cache.page_table.pages
        tensors |= {f"buffer.{name}": getattr(cache.tail, name) for name in TailBuffer.TENSORS}
        optional |= {"k_mean": cache.k_mean, "universal": cache.universal, "frozen_bits": pools.head_bits}
        optional["query_energy"] = cache.query_energy
        order = pools.order
        if order is not None:
            optional |= {"k_order": order.permutation, "k_halved": order.halved}
        columns = max(map(len, numbers), default=0)
        table = torch.full((cache.batch_size, columns), EVICTED - 1)
        for row, pages in zip(table, numbers, strict=True):
            row[: len(pages)] = torch.tensor(pages)
        split = pools.sink_blocks
        for name, pool, part in (
            ("sinks", pools.sinks, table[:, :split]),
            ("pages", pools.compressed, table[:, split:]),
        ):
            used = part[part >= 0].unique()
            part[part >= 0] = torch.searchsorted(used, part[part >= 0])
            if pool is not None and len(used):
                tensors[name] = pool.gather(used.tolist())
        tensors["table"] = table.to(torch.int32)
    tensors |= {name: x for name, x in optional.items() if x is not None}
    return {prefix + name: x.contiguous().cpu() for name, x in tensors.items()}


@in_own_modes
def cache_from_tensors(
    tensors: dict[str, Tensor], metadata: dict[str, Any], prefix: str, device: torch.device | str | None = None
) -> KVCache:
    """Inverse of `cache_tensors` and `cache_metadata`. Raises `FormatError` if they do not match."""
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    try:
        return _build(own, metadata, torch.device(device or "cpu"))
    except FormatError:
        raise
    except (TurboError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise FormatError(f"cache: expected tensors that fit their metadata, got a mismatch ({error!r})") from error


def _build(own: dict[str, Tensor], metadata: dict[str, Any], device: torch.device) -> KVCache:
    fields = dict(metadata["config"])
    if isinstance(fields["bits"], list):
        fields["bits"] = tuple(fields["bits"])
    lengths, config = own["lengths"], TurboConfig(**{"reorder_k": False, **fields})
    version = metadata.get("version", 2)  # versions 1 and 2 wrote none
    if version < 3:
        config = _config_of_version_2(config)
    if version < 4 and "k_mean" in own:
        own["k_mean"] = _mean_of_version_3(own["k_mean"])
    _check_buffer(own, metadata, config)
    heads, head_dim = metadata["num_kv_heads"], metadata["head_dim"]
    cache = KVCache(
        len(lengths),
        heads,
        head_dim,
        config=config,
        head_bits=own["head_bits"] if metadata["widths_given"] else None,
        max_tokens=metadata["max_tokens"],
        device=device if "table" in own else None,
        dtype=None if metadata["dtype"] is None else getattr(torch, metadata["dtype"]),
        window_size=metadata["window_size"],
        k_mean=own.get("given_mean"),
        k_order=_order(own, heads, head_dim, "given") if "given_order" in own else None,
        v_head_dim=metadata.get("v_head_dim"),  # earlier files have none
    )
    cache.label = metadata["label"]
    _check("lengths", lengths, torch.zeros(len(lengths), dtype=torch.int64))
    if "table" in own:
        assert cache.page_table is not None and cache.tail is not None
        cache.tail.memory(own["buffer.k8"].shape[2])  # as many rows as in the file
        for name in TailBuffer.TENSORS:
            _copy(f"buffer.{name}", own, getattr(cache.tail, name))
        for name, target in (("k_mean", cache.k_mean), ("universal", cache.universal)):
            if target is not None:
                _copy(name, own, target)
            elif name in own:
                raise FormatError(f"{name}: expected none under this configuration, got a tensor")
        _restore_pages(cache.page_table, own)
        cache.page_table.evict(first_kept_blocks(lengths, cache.window_size, config.block_size).tolist())
        tail_lengths = lengths - cache.page_counts * cache.config.block_size
        if bool(((tail_lengths < 0) | (tail_lengths > cache.tail.rows)).any()):
            raise FormatError(f"lengths: expected them to fit the pages, got {lengths.tolist()}")
        longest = int(tail_lengths.max()) if len(lengths) else 0
        cache.tail.memory(cache.tail.rows_for(longest, tokens_seen(lengths, cache.window_size)))
        if "query_energy" in own and cache.learns_order:
            like = torch.empty(cache.num_kv_heads, cache.head_dim, dtype=torch.float64)
            _check("query_energy", own["query_energy"], like)
            _check_finite("query_energy", own["query_energy"])
            cache.query_energy = own["query_energy"].to(device)
    elif bool(lengths.any()):
        raise FormatError(f"lengths: expected zeros without pages, got {lengths.tolist()}")
    cache.lengths = lengths
    return cache


def _config_of_version_2(config: TurboConfig) -> TurboConfig:
    """Raises `FormatError` for reordered keys of 3 and 2 bits, whose INT8 rows were not rotated. Those of other widths
    were never reordered."""
    if config.reorders_k and config.bits != "mixed" and config.kv_bits[0] < 4:
        raise FormatError(
            "path: expected a saved cache of version 3 where keys are reordered (reorder_k), got one of version 2, "
            f"whose INT8 rows are not rotated: {_AGAIN}"
        )
    return config.replace(reorder_k=False)


def _mean_of_version_3(mean: Tensor) -> Tensor:
    """Raises `FormatError` for a mean of K that bfloat16 rounds: keys are stored without exactly this mean."""
    rounded = mean.to(MEAN_DTYPE)
    if not torch.equal(rounded.float(), mean.float()):
        raise FormatError(
            "path: expected a saved cache of version 4, whose mean of K is bfloat16, got one of version 3 or earlier, "
            f"whose mean is float32: {_AGAIN}"
        )
    return rounded


def _check_buffer(own: dict[str, Tensor], metadata: dict[str, Any], config: TurboConfig) -> None:
    """Check the sizes in the metadata against the tensors in the file, before memory is allocated for them."""
    counted(metadata, "num_kv_heads", MOST)
    if "table" in own:
        heads, capacity = metadata["num_kv_heads"], config.block_size - 1 + config.flush_lag
        rows = own["buffer.k8"].shape[2] if own["buffer.k8"].dim() == 4 else 0
        held = len(own["lengths"]), heads, min(rows, capacity)
        k_dim = metadata["head_dim"]
        for name, width in (("buffer.k8", k_dim), ("buffer.v8", metadata.get("v_head_dim", k_dim))):
            expected = (*held, width)
            if own[name].shape != expected:
                raise FormatError(f"{name}: expected shape {expected}, got {tuple(own[name].shape)}")


def _restore_pages(page_table: PageTable, own: dict[str, Tensor]) -> None:
    pools = page_table.pools
    if "frozen_bits" in own:
        layout, reorders = pools.sinks.layout, pools.config.reorders_k
        pools.freeze(own["frozen_bits"], _order(own, layout.num_kv_heads, layout.head_dim) if reorders else None)
    table, split = own["table"], pools.sink_blocks
    ended = table < EVICTED
    if bool((ended[:, :-1] & ~ended[:, 1:]).any()):  # later pages would take the positions of other blocks
        raise FormatError(f"table: expected rows without gaps, got {table.tolist()}")
    numbers = []
    for name, pool, part in (("sinks", pools.sinks, table[:, :split]), ("pages", pools.compressed, table[:, split:])):
        content, used = own.get(name), part[part >= 0].unique()
        count = 0 if content is None else len(content)
        if not torch.equal(used, torch.arange(count, dtype=used.dtype)) or (count and pool is None):
            raise FormatError(f"table: expected all of {count} {name}, got page numbers {used.tolist()}")
        runs = page_table.runs(_owners(part, count))
        new = _restore_pool(pool, name, content, runs) if pool is not None and content is not None else []
        numbers.append([[new[page] if page >= 0 else page for page in row] for row in part.tolist()])
        if pool is not None:
            pool.retain(page for row in numbers[-1] for page in row)
            pool.release(new)  # the reference held since `allocate`
    for sinks, pages, target in zip(*numbers, page_table.pages, strict=True):
        target.extend(page for page in sinks + pages if page >= EVICTED)


def _owners(part: Tensor, count: int) -> Tensor:
    """int64 [count]: for each page, a sequence that uses it. `part` int64 [B, P] refers to all pages."""
    owners = torch.zeros(count, dtype=torch.int64)
    rows = torch.arange(len(part))[:, None].expand_as(part)
    owners[part[part >= 0].long()] = rows[part >= 0]
    return owners


def _order(own: dict[str, Tensor], heads: int, head_dim: int, prefix: str = "k") -> ChannelOrder:
    """The order of K's channels in pages, or with the prefix "given" the one that the cache was made with. Raises
    `FormatError` unless each head has a permutation."""
    permutation, halved = f"{prefix}_order", f"{prefix}_halved"
    like = {
        permutation: torch.empty(heads, head_dim, dtype=permutation_dtype(head_dim)),
        halved: torch.empty(heads, dtype=torch.bool),
    }
    for name, tensor in like.items():
        if name not in own:
            raise FormatError(f"{name}: expected a tensor of that name, got none")
        _check(name, own[name], tensor)
    order = own[permutation].clone()
    if not is_permutation(order):
        raise FormatError(
            f"{permutation}: expected a permutation of {head_dim} channels for each head, got another tensor"
        )
    return ChannelOrder(order, own[halved].clone())


def _restore_pool(pool: PagePool, name: str, content: Tensor, runs: list[int]) -> list[int]:
    layout = pool.layout
    _check(name, content, torch.empty(len(content), layout.page_bytes, dtype=torch.uint8))
    for head, token in ((layout.k_scales, layout.k_token_scales), (layout.v_scales, layout.v_token_scales)):
        _check_finite(name, content[:, head : head + 4 * layout.num_kv_heads].contiguous().view(torch.float32))
        scales = _decode_scales(layout, content, head, token)
        _check_finite(name, scales)
        if bool((scales < 0).any()):
            raise FormatError(f"{name}: expected scales of at least 0, got {float(scales.min())}")
    pages = pool.allocate(runs)
    pool.write(pages, content)
    return pages


def _copy(name: str, own: dict[str, Tensor], target: Tensor) -> None:
    if name not in own:
        raise FormatError(f"{name}: expected a tensor of that name, got none")
    _check(name, own[name], target)
    _check_finite(name, own[name])
    target.copy_(own[name])


def _check(name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != like.dtype or x.shape != like.shape:
        raise FormatError(f"{name}: expected {like.dtype} {tuple(like.shape)}, got {x.dtype} {tuple(x.shape)}")


def _check_finite(name: str, x: Tensor) -> None:
    """Refuse values that are not finite, and scales so large that their products overflow float32."""
    if x.is_floating_point() and not bool((x.abs() < _LARGEST).all()):
        raise FormatError(f"{name}: expected numbers below {_LARGEST:g}, got {float(x.abs().max())}")


def _digest(content: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of metadata and tensors. Damage to a page cannot be detected otherwise."""
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_header(header: dict[str, str], name: str) -> None:
    versions = [str(version) for version in range(1, FORMAT_VERSION + 1)]
    readable = {"format": [FORMAT_NAME], "version": versions, "rotation": [str(ROTATION_ID)]}
    for key, values in readable.items():
        if header.get(key) not in values:
            expected = " or ".join(values)
            raise FormatError(f"path: expected a saved cache with {key} {expected}, got {header.get(key)!r} in {name}")
