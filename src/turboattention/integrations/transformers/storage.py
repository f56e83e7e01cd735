"""A `TurboCache` as one safetensors file: the layers' packed bytes, padding, and how to recognize it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import FormatError, InputError, TurboError
from ...kv.storage import cache_from_tensors, cache_metadata, cache_tensors
from .cache import TurboCache
from .layer import TurboLayer
from .model import ModelShape

KIND = "turboattention TurboCache"
VERSION = 1
_KEY = "turboattention"
_VALID, _PROMPT = "valid", "prompt_ids"


def save_cache(cache: TurboCache, path: str | os.PathLike[str], input_ids: Tensor | None = None) -> None:
    """Write `cache`; the file appears whole or not at all."""
    for layer in cache.layers:
        layer.check_settled()
    cache.check_level()
    tensors: dict[str, Tensor] = {}
    for layer in cache.layers:
        if layer.kv is not None:
            tensors |= cache_tensors(layer.kv, _prefix(layer.index))
    valid = next((layer.valid for layer in cache.layers if layer.valid is not None), None)
    if valid is not None:
        tensors[_VALID] = valid.to(torch.uint8)
    if input_ids is not None:
        tensors[_PROMPT] = _checked_prompt(input_ids, cache)
    header = {"kind": KIND, "version": VERSION, "model": _model(cache), "length": cache.get_seq_length()}
    header["layers"] = [
        {"window": layer.window, "kv": None if layer.kv is None else cache_metadata(layer.kv)} for layer in cache.layers
    ]
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    partial = f"{os.fspath(path)}.partial"
    save_file(tensors, partial, metadata={_KEY: json.dumps(header)})
    os.replace(partial, path)


def load_cache(
    cls: type[TurboCache], path: str | os.PathLike[str], model_config: Any, device: torch.device | str, backend: str
) -> TurboCache:
    """Read what `save_cache` wrote."""
    header, tensors = _read(path, device)
    try:
        model = None if header["model"] is None else ModelShape(**header["model"])
        if model is not None and model_config is not None:
            model.check(model_config)
        valid, prompt = tensors.get(_VALID), tensors.get(_PROMPT)
        valid = None if valid is None else valid.to("cpu", torch.bool)
        layers = []
        for index, entry in enumerate(header["layers"]):
            layer = TurboLayer(index, entry["window"], model=model, backend=backend)
            if entry["kv"] is not None:
                kv = cache_from_tensors(tensors, entry["kv"], _prefix(index))
                kv.label = f"layer {index}"
                _check_lengths(kv.seq_lens, valid, header["length"])
                layer.restore(kv, header["length"], valid)
            layers.append(layer)
    except TurboError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise FormatError(f"path: expected a file written by TurboCache.save, got a damaged one: {path}") from error
    return cls.from_layers(layers, None if prompt is None else prompt.cpu())


def _read(path: str | os.PathLike[str], device: torch.device | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if not isinstance(header, dict) or header.get("kind") != KIND:
                raise FormatError(f"path: expected a file written by TurboCache.save, got another kind of file: {path}")
            if header.get("version") != VERSION:
                raise FormatError(
                    f"path: expected version {VERSION} of the format, got {header.get('version')}: {path}"
                )
            return header, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"path: expected a file written by TurboCache.save, got a damaged one: {path}") from error


def _check_lengths(seq_lens: Tensor, valid: Tensor | None, length: int) -> None:
    expected = torch.full_like(seq_lens, length) if valid is None else valid.sum(-1)
    if (valid is not None and valid.shape[1] != length) or not torch.equal(seq_lens, expected):
        raise FormatError("length: expected the layers' tokens to agree with the padding stored, got another number")


def _checked_prompt(input_ids: Tensor, cache: TurboCache) -> Tensor:
    rows = cache.batch_size
    if input_ids.dim() != 2 or input_ids.is_floating_point() or (rows >= 0 and input_ids.shape[0] != rows):
        raise InputError(f"input_ids: expected integers [{rows}, L], got {input_ids.dtype} {tuple(input_ids.shape)}")
    return input_ids.to(torch.int64)


def _model(cache: TurboCache) -> dict[str, Any] | None:
    model = next((layer.model for layer in cache.layers), None)
    return None if model is None else asdict(model)


def _prefix(index: int) -> str:
    return f"layer{index}."
