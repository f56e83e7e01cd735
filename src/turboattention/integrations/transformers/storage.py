"""A `TurboCache` as one safetensors file: the packed bytes of all layers, the padding, and the shape of its model."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from ...errors import FormatError, InputError, TurboError
from ...kv.storage import cache_from_tensors, cache_metadata, cache_tensors, read_file, write_file
from ..model_shape import ModelShape
from .cache import TurboCache
from .layer import TurboLayer
from .parallel import TensorParallel
from .prompt import checked_ids

VERSION = 1
_KIND = "turbo_cache"
_PARALLEL = "tensor_parallel"
_NOTES = "notes"
_VALID, _PROMPT = "valid", "prompt_ids"


def save_cache(
    cache: TurboCache, path: str | os.PathLike[str], input_ids: Tensor | None = None, notes: Any = None
) -> None:
    """Write `cache` atomically. `notes`, any JSON value, are stored in the file for `read_notes`."""
    cache.check_level()
    if cache.get_seq_length() == 0:
        raise InputError("past_key_values: expected a TurboCache that holds tokens, got an empty one")
    tensors: dict[str, Tensor] = {}
    for layer in cache.layers:
        if layer.kv is not None:
            tensors |= cache_tensors(layer.kv, _prefix(layer.index))
    valid = next((layer.valid for layer in cache.layers if layer.valid is not None), None)
    if valid is not None:
        tensors[_VALID] = valid.to(torch.uint8).contiguous()
    if input_ids is not None:
        tensors[_PROMPT] = checked_ids(input_ids, cache.batch_size, cache.get_seq_length()).contiguous()
    model, parallel = cache.layers[0].model, cache.layers[0].parallel
    content = {
        "version": VERSION,
        "model": None if model is None else asdict(model),
        _PARALLEL: parallel.metadata(),
        "length": cache.get_seq_length(),
        "layers": [
            {"window": layer.window, "kv": None if layer.kv is None else cache_metadata(layer.kv)}
            for layer in cache.layers
        ],
    }
    write_file(parallel.path(os.fspath(path)), tensors, {_KIND: content} | ({} if notes is None else {_NOTES: notes}))


def read_notes(path: str | os.PathLike[str]) -> Any:
    """The `notes` passed to `save_cache`; None if there were none."""
    return read_file(path)[1].get(_NOTES)


def load_cache(
    cls: type[TurboCache], path: str | os.PathLike[str], model_config: Any, device: torch.device | str, backend: str
) -> TurboCache:
    """Read a file written by `save_cache`."""
    dispatch.choose(backend)
    parallel = TensorParallel.of(model_config)
    path = parallel.path(os.fspath(path))
    if os.path.isdir(path):
        raise FormatError(f"path: expected a file written by TurboCache.save, got the folder {os.fspath(path)}")
    tensors, metadata = read_file(path)
    content = metadata.get(_KIND)
    if not isinstance(content, dict):
        raise FormatError(f"path: expected a file written by TurboCache.save, got {sorted(metadata)} in {path}")
    if content.get("version") != VERSION:
        raise FormatError(f"path: expected version {VERSION} of a TurboCache, got {content.get('version')} in {path}")
    try:
        model = None if content["model"] is None else ModelShape(**content["model"])
        saved = TensorParallel(**content.get(_PARALLEL, {}))
        parallel.check(saved, path)
        valid = tensors[_VALID].to(torch.bool) if _VALID in tensors else None
        layers = [
            _layer(index, entry, tensors, content["length"], valid, model, parallel, device, backend)
            for index, entry in enumerate(content["layers"])
        ]
    except TurboError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise FormatError(f"path: expected a file written by TurboCache.save, got a damaged one: {path}") from error
    if model is not None and model_config is not None:
        model.check(model_config)
    cache = cls.from_layers(layers, tensors.get(_PROMPT))
    expected = (cache.batch_size, cache.get_seq_length())
    if cache.prompt_ids is not None and cache.prompt_ids.shape != expected:
        raise FormatError(f"{_PROMPT}: expected shape {expected}, got {tuple(cache.prompt_ids.shape)} in {path}")
    return cache


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
) -> TurboLayer:
    if entry["kv"] is None:
        layer = TurboLayer(index, entry["window"], model=model, parallel=parallel, backend=backend)
        layer.may_stay_empty = True
        return layer
    kv = cache_from_tensors(tensors, entry["kv"], _prefix(index), device)
    expected = torch.full_like(kv.seq_lens, length) if valid is None else valid.sum(-1)
    if (valid is not None and valid.shape[1] != length) or not torch.equal(kv.seq_lens, expected):
        raise FormatError(
            f"{_prefix(index)}lengths: expected them to agree with the padding, got {kv.seq_lens.tolist()}"
        )
    layer = TurboLayer(
        index,
        entry["window"],
        config=kv.config,
        head_bits=kv.head_bits if kv.widths_given else None,
        k_mean=tensors.get(f"{_prefix(index)}given_mean"),
        max_tokens=kv.max_tokens,
        model=model,
        parallel=parallel,
        backend=backend,
    )
    layer.restore(kv, length, valid)
    return layer


def _prefix(index: int) -> str:
    return f"layer{index}."
