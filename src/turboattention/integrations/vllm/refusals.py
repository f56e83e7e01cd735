"""Features of vLLM that this backend does not support. They are rejected at startup with a one-line message."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionType

from ...config import TurboConfig
from ...errors import InputError, UnsupportedError
from ...kernels.inputs import GPU_HEAD_DIM
from ...paged import BLOCK, backend_for
from ...validation import MAX_HEAD_DIM
from .settings import VARIABLE

DRAFT_MODELS = ("draft_model", "eagle", "eagle3", "mtp")
"""Methods of speculative decoding in which a model drafts, one token after another, over a cache of its own."""

CONNECTORS = ("ExampleConnector",)
"""Tested KV connectors. They store and load only full blocks: rows of an incomplete block are not in pages."""

HYBRIDS = ("falcon_h1", "granitemoehybrid", "nemotron_h", "qwen3_next")
"""Tested model types with recurrent layers next to attention."""

_OTHER_HYBRIDS = {
    "jamba": "which vLLM 0.32.0 itself does not run on CPUs (it has no kernel for Mamba 1 there)",
    "lfm2": "which vLLM 0.32.0 itself computes wrongly on CPUs",
    "olmo_hybrid": "which vLLM 0.32.0 itself does not run on CPUs (its layers need Triton)",
}
"""By model type, why the hybrid is refused; any other was not tested."""


def largest_head(device_type: str) -> int:
    """Channels per head that the kernels for this type of device support."""
    return MAX_HEAD_DIM if device_type == "cpu" else GPU_HEAD_DIM


def refuse_layer(
    head_size: int,
    *,
    device_type: str,
    alibi_slopes: Any,
    sinks: Any,
    kv_cache_dtype: str,
    attn_type: str,
    kv_sharing_target: str | None,
    others: dict[str, Any],
) -> None:
    """Raises `UnsupportedError` that names the unsupported feature of a layer."""
    largest = largest_head(device_type)
    if head_size % 8 or not 0 < head_size <= largest:
        refuse(f"head_dim {head_size} (a multiple of 8 up to {largest} is needed)")
    if attn_type != AttentionType.DECODER:
        refuse(f"{AttentionType(attn_type).value} attention (only decoders have a cache to quantize)")
    if kv_cache_dtype != "auto":
        refuse(f'kv_cache_dtype {kv_cache_dtype!r} (leave it "auto": blocks have a format of their own)')
    if alibi_slopes is not None:
        refuse("ALiBi")
    if sinks is not None and device_type != "cpu":
        refuse("attention sinks on GPUs (the kernels for pages do not compute them there)")
    if kv_sharing_target is not None:
        refuse(f"layers that share the cache of another ({kv_sharing_target})")
    asked = [name for name, value in others.items() if value not in (None, False)]
    if asked:
        refuse(f"an attention layer with {', '.join(asked)}")


def refuse_engine(config: VllmConfig) -> None:
    """Raises `UnsupportedError` that names the unsupported feature of an engine."""
    if config.cache_config.user_specified_block_size:  # otherwise vLLM asks for the preferred size later
        refuse_block_size(config.cache_config.block_size)
    for what in _of_engine(config):
        refuse(what)


def refuse_latents(config: VllmConfig | None) -> NoReturn:
    """Raises `UnsupportedError` for a model with multi-head latent attention."""
    refuse(
        "multi-head latent attention (model: expected one that caches keys and values, got "
        f"{_model_type(config)} with cached latents, which are smaller than quantized keys and values of all heads)"
    )


def refuse_value_heads(config: VllmConfig | None) -> NoReturn:
    """Raises `UnsupportedError` for a model whose values have another head_dim than its keys."""
    refuse(
        "values with a head_dim of their own (model: expected one with the same head_dim for keys and values, got "
        f"{_model_type(config)}, for which vLLM selects another attention backend, whose cache is not quantized)"
    )


def refuse_block_size(size: int) -> None:
    """Raises `UnsupportedError` for a block size that is not a multiple of a page."""
    if size % BLOCK:
        refuse(f"--block-size {size} (a multiple of {BLOCK} is needed)")


def refuse_device(config: TurboConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raises `UnsupportedError` if there are no kernels for pages, as on CPUs without the extension."""
    try:
        backend_for(config, dtype, device)
    except InputError as error:
        refuse(f"{device.type} here ({error})")


def refuse_calibration(config: VllmConfig) -> None:
    """Raises `UnsupportedError` for features that need more than the layers of one model, which a calibration knows."""
    if config.model_config.is_hybrid:
        refuse("a calibration of models that mix attention with recurrent layers")
    draft = config.speculative_config
    if draft is not None and draft.method in DRAFT_MODELS:
        refuse(f"a calibration with speculative decoding by {draft.method!r}, whose layers it does not cover")


def _model_type(config: VllmConfig | None) -> str:
    return "one" if config is None else repr(config.model_config.hf_text_config.model_type)


def _of_engine(config: VllmConfig) -> Iterator[str]:
    model, parallel = config.model_config, config.parallel_config
    if model.is_hybrid:
        yield from _of_hybrids(config)
    if model.is_mm_prefix_lm:  # vLLM clears it if the limit of every modality is 0
        yield "attention that is not causal among the tokens of an image (use --language-model-only to serve text)"
    if config.attention_config.use_non_causal:
        yield "attention that is not causal"
    if model.rswa_window is not None:
        yield "reference sliding windows"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism"
    if parallel.data_parallel_size > 1 and config.device_config.device_type != "cpu":
        yield "data parallelism on GPUs (its idle steps cannot be distinguished)"
    if parallel.use_ubatching:
        yield "batches split in two (--enable-dbo)"
    yield from _of_connectors(config)
    yield from _of_drafts(config)


def _of_hybrids(config: VllmConfig) -> Iterator[str]:
    if config.model_config.hf_text_config.model_type not in HYBRIDS:
        kind = config.model_config.hf_text_config.model_type
        got = f"{kind!r}, {_OTHER_HYBRIDS.get(kind, 'which was not tested')}"
        yield f"this mix of attention and recurrent layers (model: expected one of {', '.join(HYBRIDS)}, got {got})"
    if config.device_config.device_type != "cpu":
        yield "models that mix attention with recurrent layers on GPUs (not tested)"
    if config.cache_config.enable_prefix_caching:
        yield "prefix caching in models that mix attention with recurrent layers (use --no-enable-prefix-caching)"


def _of_connectors(config: VllmConfig) -> Iterator[str]:
    transfer = config.kv_transfer_config
    if transfer is None or not transfer.is_kv_transfer_instance:
        return
    named = f"the KV connector {transfer.kv_connector}"
    if transfer.kv_connector not in CONNECTORS:
        yield f"{named} (not tested, and rows of incomplete blocks are not in pages; only {', '.join(CONNECTORS)})"
    if config.device_config.device_type != "cpu":
        yield f"{named} on GPUs (not tested)"
    if config.cache_config.block_size != BLOCK:  # it uses block numbers as page numbers
        yield f"{named} with blocks of {config.cache_config.block_size} tokens (use --block-size {BLOCK})"
    if config.parallel_config.world_size > 1:  # it writes the files of all ranks under the same names
        yield f"{named} with {config.parallel_config.world_size} processes per engine"
    if config.speculative_config is not None or config.model_config.is_hybrid:
        yield f"{named} with speculative decoding or recurrent layers (not tested)"


def _of_drafts(config: VllmConfig) -> Iterator[str]:
    draft, device = config.speculative_config, config.device_config.device_type
    if draft is None:
        return
    if draft.method not in ("ngram", *DRAFT_MODELS):
        yield f"speculative decoding by {draft.method!r} (only by ngram, {', '.join(DRAFT_MODELS)})"
    if config.model_config.is_hybrid:
        yield "speculative decoding in models that mix attention with recurrent layers"
    if draft.method != "ngram" and device != "cpu":
        yield f"speculative decoding by {draft.method!r} on GPUs (not tested; 'ngram' is supported)"
    if draft.method != "ngram" and draft.parallel_drafting:
        yield "drafts that are computed in parallel"
    if draft.num_speculative_tokens >= BLOCK:
        yield f"{draft.num_speculative_tokens} speculative tokens (fewer than {BLOCK} are supported)"


def refuse(what: str) -> NoReturn:
    """Raises `UnsupportedError` with the message common to all refusals."""
    raise UnsupportedError(f"TurboAttention does not support {what} in vLLM; unset {VARIABLE} to serve without it")
