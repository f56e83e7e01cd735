"""A `TurboCache` as one safetensors file: the packed bytes of all layers, the padding, and the shape of its model."""

from __future__ import annotations

import functools
import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from ... import dispatch
from ...errors import FormatError, InputError, TurboError
from ...guard_sample import QUERIES
from ...kv.claims import FLOATS, LONGEST, MOST, TensorFile, claim_cache, counted
from ...kv.serialization import cache_from_tensors, cache_metadata, cache_tensors, read_file, write_file
from ...ops import config_of
from ...validation import check_finite
from ...words import number_of
from ..model_shape import ModelShape
from .cache import TurboCache
from .exact import ExactKV
from .known_ids import checked_ids
from .layer import TurboLayer
from .parallel import TensorParallel
from .states import EmptyLayer, HybridLayer, load_states, state_entry

VERSION = 1
MIXED_VERSION = 2
"""The version of files with exact layers or states, which earlier releases do not support."""
_KIND = "turbo_cache"
_PARALLEL = "tensor_parallel"
_CHECKED = "check_prompts"  # absent from files of earlier releases, which ignore it
_NOTES = "notes"
_VALID, _PROMPT = "valid", "prompt_ids"
_STATES, _ATTENDS = "states", "attends"
_MOST_CHANNELS = 2**12  # and heads, of a layer in the model's own dtype
_EXACT, _EXACT_TENSORS = "exact", ("exact_keys", "exact_values", "exact_queries")


def save_cache(
    cache: TurboCache, path: str | os.PathLike[str], input_ids: Tensor | None = None, notes: Any = None
) -> None:
    """Write `cache` atomically. `notes`, any JSON value, are stored in the file for `read_notes`."""
    cache.check_level()
    if cache.get_seq_length() == 0:
        raise InputError("past_key_values: expected a TurboCache that holds tokens, got an empty one")
    tensors: dict[str, Tensor] = {}
    for layer in cache.attention_layers:
        if layer.kv is not None:
            tensors |= cache_tensors(layer.kv, _prefix(layer.index))
        if layer.floats is not None:
            for name, x in zip(_EXACT_TENSORS, layer.floats.tensors, strict=False):
                tensors[f"{_prefix(layer.index)}{name}"] = x.contiguous()
    states = {index: state_entry(layer, _prefix(index)) for index, layer in cache.state_layers}
    for _, held in states.values():
        tensors |= held
    valid = next((layer.valid for layer in cache.attention_layers if layer.valid is not None), None)
    if valid is not None:
        tensors[_VALID] = valid.to(torch.uint8).contiguous()
    ids = cache.known_ids if input_ids is None else input_ids
    if ids is not None:
        tensors[_PROMPT] = checked_ids(ids, cache.batch_size, cache.get_seq_length()).contiguous()
    model, parallel = cache.attention_layers[0].model, cache.attention_layers[0].parallel
    plain = all(isinstance(layer, TurboLayer) and layer.floats is None for layer in cache.layers) and not states
    content = {
        "version": VERSION if plain else MIXED_VERSION,
        "model": None if model is None else asdict(model),
        _PARALLEL: parallel.metadata(),
        _CHECKED: cache.check_prompts,
        "length": cache.get_seq_length(),
        "layers": [
            _entry(layer) | ({_STATES: states[index][0]} if index in states else {})
            for index, layer in enumerate(cache.layers)
        ],
    }
    write_file(parallel.path(os.fspath(path)), tensors, {_KIND: content} | ({} if notes is None else {_NOTES: notes}))


def _entry(layer: Any) -> dict[str, Any]:
    if not isinstance(layer, TurboLayer):
        return {"window": None, "kv": None, _ATTENDS: False}
    entry: dict[str, Any] = {"window": layer.window, "kv": None if layer.kv is None else cache_metadata(layer.kv)}
    if layer.floats is not None:
        known = {"config": layer.config.text, "max_tokens": layer.max_tokens, "always": layer.always_exact}
        entry[_EXACT] = {"first": layer.floats.first} | known
    return entry


def read_notes(path: str | os.PathLike[str]) -> Any:
    """The `notes` passed to `save_cache`; None if there were none."""
    return read_file(path, _claim)[1].get(_NOTES)


def load_cache(
    cls: type[TurboCache], path: str | os.PathLike[str], model_config: Any, device: torch.device | str, backend: str
) -> TurboCache:
    """Read a file written by `save_cache`."""
    dispatch.choose(backend)
    parallel = TensorParallel.of(model_config)
    path = parallel.path(os.fspath(path))
    if os.path.isdir(path):
        raise FormatError(f"path: expected a file written by TurboCache.save, got the folder {os.fspath(path)}")
    tensors, metadata = read_file(path, _claim)
    content = metadata[_KIND]
    try:
        model = None if content["model"] is None else ModelShape(**content["model"])
        saved = TensorParallel(**content.get(_PARALLEL, {}))
        parallel.check(saved, path)
        valid = tensors[_VALID].to(torch.bool) if _VALID in tensors else None
        layers = [
            _layer(index, entry, tensors, content["length"], valid, model, parallel, device, backend)
            for index, entry in enumerate(content["layers"])
        ]
        batch = max(layer.batch_size for layer in layers if isinstance(layer, TurboLayer))
        for index, (layer, entry) in enumerate(zip(layers, content["layers"], strict=True)):
            if _STATES in entry:
                load_states(layer, entry[_STATES], tensors, _prefix(index), batch, device)
    except TurboError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise FormatError(f"path: expected a file written by TurboCache.save, got a damaged one: {path}") from error
    if model is not None and model_config is not None:
        model.check(model_config)
    kind = cls.of_kind(None if model is None else model.model_type)
    cache = kind.from_layers(layers, tensors.get(_PROMPT), bool(content.get(_CHECKED, True)))
    expected = (cache.batch_size, cache.get_seq_length())
    if cache.prompt_ids is not None and cache.prompt_ids.shape != expected:
        raise FormatError(f"{_PROMPT}: expected shape {expected}, got {tuple(cache.prompt_ids.shape)} in {path}")
    return cache


def _claim(file: TensorFile, metadata: dict[str, Any]) -> None:
    """The tensors of a file of `save_cache`, for `read_file`. Raises `FormatError`."""
    content = metadata.get(_KIND)
    if not isinstance(content, dict):
        raise FormatError(f"path: expected a file written by TurboCache.save, got {sorted(metadata)}")
    if content.get("version") not in (VERSION, MIXED_VERSION):
        raise FormatError(
            f"path: expected version {VERSION} or {MIXED_VERSION} of a TurboCache, got {content.get('version')}"
        )
    length = counted(content, "length", LONGEST)
    sequences: int | range = range(1, MOST + 1)
    for index, entry in enumerate(content["layers"]):
        prefix, sizes = _prefix(index), range(1, _MOST_CHANNELS + 1)
        if entry["kv"] is not None:
            sequences = claim_cache(file, entry["kv"], prefix, length)
        if entry.get(_EXACT) is not None:
            held = length - counted(entry[_EXACT], "first", length, 0)
            for name, positions in zip(_EXACT_TENSORS, (held, held, range(QUERIES + 1)), strict=True):
                file.claim(f"{prefix}{name}", FLOATS, (sequences, sizes, positions, sizes))
        if _STATES in entry:
            for name, number in entry[_STATES]["held"]:
                file.claim_state(f"{prefix}{name}{number}", sequences)
    for name, dtype in ((_VALID, torch.uint8), (_PROMPT, torch.int64)):
        file.claim(name, [dtype], (sequences, length))


def _layer(
    index: int,
    entry: dict[str, Any],
    tensors: dict[str, Tensor],
    length: int,
    valid: Tensor | None,
    model: ModelShape | None,
    parallel: TensorParallel,
    device: torch.device | str,
    backend: str,
) -> Any:
    floats = _floats(index, entry, tensors, length, valid, device)
    if not entry.get(_ATTENDS, True):
        return _without_attention(entry)
    kind = (
        functools.partial(HybridLayer, number_of_states=len(entry[_STATES]["kernels"]))
        if _STATES in entry
        else TurboLayer
    )
    if entry["kv"] is None:
        known = entry[_EXACT] if floats is not None else {"config": "", "max_tokens": None, "always": False}
        layer = kind(
            index,
            entry["window"],
            config=config_of(known["config"]),
            max_tokens=known["max_tokens"],
            model=model,
            parallel=parallel,
            backend=backend,
            always_exact=bool(known["always"]),
        )
        if floats is None:
            layer.may_stay_empty = True
        else:
            layer.restore(None, floats, length, valid)
        return layer
    kv = cache_from_tensors(tensors, entry["kv"], _prefix(index), device)
    expected = torch.full_like(kv.seq_lens, length) if valid is None else valid.sum(-1)
    if (valid is not None and valid.shape[1] != length) or not torch.equal(kv.seq_lens, expected):
        raise FormatError(
            f"{_prefix(index)}lengths: expected them to agree with the padding, got {kv.seq_lens.tolist()}"
        )
    layer = kind(
        index,
        entry["window"],
        config=kv.config,
        head_bits=kv.head_bits if kv.given_bits is not None else None,
        k_mean=tensors.get(f"{_prefix(index)}given_mean"),
        k_order=kv.given_order,
        max_tokens=kv.max_tokens,
        model=model,
        parallel=parallel,
        backend=backend,
    )
    layer.restore(kv, floats, length, valid)
    return layer


def _without_attention(entry: dict[str, Any]) -> Any:
    return LinearAttentionLayer(len(entry[_STATES]["kernels"])) if _STATES in entry else EmptyLayer()


def _floats(
    index: int,
    entry: dict[str, Any],
    tensors: dict[str, Tensor],
    length: int,
    valid: Tensor | None,
    device: torch.device | str,
) -> ExactKV | None:
    """The keys and values of a layer in the model's own dtype, checked."""
    if entry.get(_EXACT) is None:
        return None
    names = [f"{_prefix(index)}{name}" for name in _EXACT_TENSORS]
    keys, values, *queries = (tensors[name].to(device) for name in names if name in tensors)
    held = ExactKV(keys, values, int(entry[_EXACT]["first"]), *queries)
    for name, x in zip(names, held.tensors, strict=False):
        sizes = x.shape[:3] == keys.shape[:3] if x is not held.queries else x.shape[:1] + x.shape[3:] == keys.shape[::3]
        if x.dim() != 4 or not sizes or x.dtype != keys.dtype or not x.is_floating_point():
            raise FormatError(f"{name}: expected floats of the keys' shape, got {x.dtype} {tuple(x.shape)}")
        check_finite(name, x)
    expected = length if valid is None else valid.shape[1]
    if held.first < 0 or held.end != length or expected != length:
        raise FormatError(f"{names[0]}: expected positions up to {length}, got {held.first} to {held.end}")
    if valid is not None and len(valid) != len(held.keys):
        raise FormatError(f"{names[0]}: expected {number_of(len(valid), 'sequence')}, got {len(held.keys)}")
    needed = 0 if entry["window"] is None else max(length - entry["window"] + 1, 0)
    if held.first > needed:
        raise FormatError(f"{names[0]}: expected positions from {needed} on, got some from {held.first} on")
    return held


def _prefix(index: int) -> str:
    return f"layer{index}."
