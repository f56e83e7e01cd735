"""Attention of one layer: stores new tokens in its tail blocks and pages, and attends over both."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from ...guard import fixed_widths_message
from ...paged import PagedFormat, TailBlocks, paged_attention
from ..model_shape import ModelShape
from .metadata import TurboMetadata
from .refusals import refuse, refuse_calibration, refuse_device, refuse_engine, refuse_layer
from .settings import VARIABLE, Settings
from .tail_slots import ring_for
from .widths import Rank, Widths, widths_of

# A child of vLLM's logger, so that its settings apply.
logger = init_logger("vllm.turboattention")

_latest: list[Widths] = []


def widths_for(config: VllmConfig) -> Widths:
    """The widths of an engine with this configuration.

    Raises:
        ConfigError: settings out of range, or the calibration of another model.
    """
    additional = config.additional_config
    settings = Settings.resolve(os.environ.get(VARIABLE), additional if isinstance(additional, dict) else None)
    widths = widths_of(settings)
    if widths.calibration is not None and config.model_config is not None:
        widths.calibration.check_shape(asdict(ModelShape.of(config.model_config.hf_text_config)))
    _latest[:] = [widths]
    return widths


def latest_widths() -> Widths:
    """The widths of the engine whose layers were created last in this process."""
    return _latest[0]


class TurboImpl(AttentionImpl[TurboMetadata]):
    """Attention of one layer on one tensor-parallel rank.

    The pool of INT8 rows (`tail_blocks`) is allocated with the layer, so that vLLM counts it with the weights. `bind`
    sets what depends on the layer's index in the model, which is not known to the constructor.
    """

    format: PagedFormat
    name: str

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ):
        """Raises `UnsupportedError` for the features listed in refusals.py, `ConfigError` for settings out of range."""
        config = get_current_vllm_config()
        refuse_layer(
            head_size,
            device_type=config.device_config.device_type,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            kv_cache_dtype=kv_cache_dtype,
            attn_type=attn_type,
            kv_sharing_target=kv_sharing_target_layer_name,
            others=others,
        )
        refuse_engine(config)
        self.widths = widths_for(config)
        if self.widths.calibration is not None:
            refuse_calibration(config)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.total_kv_heads = config.model_config.get_total_num_kv_heads()
        self.window, self.softcap, self.sinks = sliding_window, logits_soft_cap or None, sinks
        self.kv_cache_dtype = kv_cache_dtype
        self.device = torch.get_default_device()
        refuse_device(self.widths.config, config.model_config.dtype, self.device)
        # One spare slot, for runs without a sequence (warm-up, profiling).
        self.tail_blocks = TailBlocks(
            layers=1,
            num_slots=config.scheduler_config.max_num_seqs + 1,
            kv_heads=self.num_kv_heads,
            head_dim=head_size,
            device=self.device,
            ring=ring_for(config.speculative_config is not None),
            exact_rows=self.widths.config.exact_rows,
            dtype=config.model_config.dtype,
        )
        self._finite = True

    def bind(self, name: str, layer: int) -> None:
        """Set the layer's name and its index `layer` in the whole model.

        Raises:
            ConfigError: the calibration has other layers or heads.
        """
        rank = Rank(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), self.num_kv_heads)
        self.name, self.format = name, self.widths.format(layer, rank, self.head_size, self.device)
        self.first_head = rank.of(self.total_kv_heads).start
        self.guard_pending = self.widths.settings.guard

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TurboMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store the new keys and values, attend, and write `output`.

        Args:
            query, output: [T, Hq, D], T at least the tokens of the batch; rows of padding are not written.
            key, value: [T, Hkv, D].
            kv_cache: uint8 [blocks, 1, 64, bytes / 64].
        """
        if attn_metadata is None:
            # a profiling run of vLLM, without a batch
            return output.zero_()
        if output_scale is not None or output_block_scale is not None:
            refuse("fused output quantization")
        tokens = attn_metadata.num_actual_tokens
        q, k, v, out = query, key, value, output
        if tokens < len(q):  # padded; otherwise avoid the cost of four views
            q, k, v, out = (x[:tokens] for x in (q, k, v, out))
        if self.guard_pending and attn_metadata.first_prompt is not None:
            self._guard(*(x[attn_metadata.first_prompt] for x in (q, k, v)))
        finite = paged_attention(
            self.format,
            0,
            attn_metadata.batch,
            q,
            k,
            v,
            out,
            kv_cache.view(kv_cache.shape[0], -1),
            self.tail_blocks,
            scale=self.scale,
            window_size=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
        )
        self.report_nonfinite(finite)
        return output

    def report_nonfinite(self, finite: bool) -> None:
        """Log once that a query, key or value was not finite."""
        if not finite and self._finite:
            self._finite = False
            logger.error("%s: NaN or infinity among queries, keys or values; they are treated as zeros", self.name)

    def _guard(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Compare attention over this layer's first prompt, as stored, with exact attention; once. Both are computed
        without sinks, which would scale both equally."""
        self.guard_pending = False
        message = fixed_widths_message(
            self.format.config,
            torch.tensor(self.format.head_bits[0]),
            q,
            k,
            v,
            k_mean=self.format.means[0] if self.format.means else None,
            k_order=self.format.orders[0] if self.format.orders else None,
            first_head=self.first_head,
            scale=self.scale,
            softcap=self.softcap,
            window_size=self.window,
        )
        if message is not None:
            logger.warning("%s: %s", self.name, message)
