"""Attention metadata of a step: vLLM's common metadata as a `PagedBatch`, shared by all layers of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from ...paged import BLOCK, PagedBatch
from .refusals import refuse, refuse_block_size

logger = init_logger("vllm.turboattention")

_POLL_INTERVAL = 256


@dataclass(frozen=True)
class TurboMetadata(AttentionMetadata):
    """batch: the ragged batch. num_actual_tokens: its rows; rows after them are padding. first_prompt: the rows of the
    first sequence that starts with at least a block, in the step in which it starts; else None."""

    batch: PagedBatch
    num_actual_tokens: int
    first_prompt: slice | None


class TurboMetadataBuilder(AttentionMetadataBuilder[TurboMetadata]):
    """Builds the metadata of a group of layers, and gives each layer its index in the model."""

    # Steps with one token per sequence make all decisions on the device.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: Any):
        """Raises `UnsupportedError` for unsupported kinds of layers, `ConfigError` for a calibration of other layers or
        heads."""
        from .steps import follow_steps

        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_spec(kv_cache_spec)
        follow_steps()
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for name, layer in layers.items():
            layer.impl.bind(name, extract_layer_index(name))
        impls = [layer.impl for layer in layers.values()]
        self.spare_slot = vllm_config.scheduler_config.max_num_seqs
        self._slots = torch.full((self.spare_slot,), self.spare_slot, dtype=torch.int32, device=device)
        self._impls, self._builds, self._seen_prompt = impls, 0, False
        logger.info(
            "TurboAttention: %s, %d bytes for %d tokens of a layer; %.1f MiB in addition for the tail blocks of "
            "%d sequences in %d layers",
            impls[0].widths.settings.name,
            impls[0].format.page_bytes,
            BLOCK,
            sum(impl.tail_blocks.nbytes for impl in impls) / 2**20,
            self.spare_slot,
            len(impls),
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TurboMetadata:
        """Raises `UnsupportedError` if attention is not causal, `RuntimeError` for a row without a slot."""
        common = common_attn_metadata
        if common.causal is not True:
            refuse("attention that is not causal")
        self._poll_nonfinite()
        # Views of vLLM's persistent tensors, which CUDA graphs require.
        batch = PagedBatch(
            query_start=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            tail_slots=self._row_slots(common),
            max_query_len=common.max_query_len,
        )
        return TurboMetadata(batch, common.num_actual_tokens, self._first_prompt(common))

    def _row_slots(self, common: CommonAttentionMetadata) -> Tensor:
        """int32 [rows], the slot of each row, in a persistent tensor."""
        from .steps import current_step

        step = current_step()
        if common.req_idx is not None:
            slots = common.req_idx.tolist()
        elif step is not None:
            slots = step.row_slots(common.num_reqs)
        else:
            # No sequence is running: what is written is never read.
            slots = []
        slots += [self.spare_slot] * (common.num_reqs - len(slots))
        if len(slots) > len(self._slots):
            self._slots = self._slots.new_empty(len(slots))
        rows = self._slots[: len(slots)]
        # A new tensor in every step, because the previous copy may not have finished.
        there = torch.tensor(slots, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        rows.copy_(there, non_blocking=True)
        return rows

    def _poll_nonfinite(self) -> None:
        """On a GPU, steps do not wait for the flag of values that are not finite. It is polled every few hundred steps,
        and copied to the host for the next poll."""
        self._builds += 1
        if self.device.type != "cpu" and self._builds % _POLL_INTERVAL == 0:
            for impl in self._impls:
                impl.report_nonfinite(not impl.tail_blocks.poll_nonfinite())

    def _first_prompt(self, common: CommonAttentionMetadata) -> slice | None:
        """Lengths are read on the host. They are upper bounds that are exact for prompts."""
        if self._seen_prompt or common.max_query_len < BLOCK or common.seq_lens_cpu_upper_bound is None:
            return None
        starts = common.query_start_loc_cpu.tolist()
        for row, length in enumerate(common.seq_lens_cpu_upper_bound.tolist()):
            begin, end = starts[row : row + 2]
            if BLOCK <= end - begin == length:
                self._seen_prompt = True
                return slice(begin, end)
        return None


def check_spec(spec: KVCacheSpec) -> None:
    """Raises `UnsupportedError` for unsupported kinds of layers or pages."""
    if getattr(spec, "attention_chunk_size", None):
        refuse(f"chunked local attention ({type(spec).__name__})")
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec) or getattr(spec, "non_causal", False):
        refuse(f"layers of {type(spec).__name__}")
    refuse_block_size(spec.block_size)
