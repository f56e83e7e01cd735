"""The attention backend for vLLM: its features, and the bytes of a block of 64 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NoReturn

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from ...paged import BLOCK
from .implementation import TurboImpl, latest_widths, widths_for
from .metadata import TurboMetadataBuilder
from .refusals import largest_head, refuse_latents, refuse_value_heads


class TurboBackend(AttentionBackend):
    """Attention over packed pages. To vLLM, a page is uint8 [1, 64, bytes / 64]: one "head" with all heads in it."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """The name of the registry entry, because vLLM looks the name up among its own backends."""
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TurboImpl]:
        return TurboImpl

    @staticmethod
    def get_builder_cls() -> type[TurboMetadataBuilder]:
        return TurboMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [BLOCK]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(8, largest_head(current_platform.device_type) + 1, 8))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return current_platform.is_cpu()

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return current_platform.is_cpu()

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec of a layer with packed pages. Idempotent.

        vLLM calls this while its configuration is set, or after the layers were created.
        """
        config = get_current_vllm_config_or_none()
        widths = latest_widths() if config is None else widths_for(config)
        page_bytes = widths.page_bytes(spec.num_kv_heads, spec.head_size)
        return replace(spec, num_head_slots=1, state_content_bytes=page_bytes // BLOCK, dtype=torch.uint8)


class RefusedMLA(AttentionBackend):
    """Replaces the CPU platform's backends for multi-head latent attention, which would not quantize, and raises."""

    @staticmethod
    def get_name() -> str:
        return "CPU_MLA"

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> NoReturn:
        refuse_latents(get_current_vllm_config_or_none())

    @staticmethod
    def get_builder_cls() -> NoReturn:
        RefusedMLA.get_impl_cls()


class RefusedDiffKV(AttentionBackend):
    """Replaces the backends that a model selects itself if its values have another head_dim than its keys (MiMo-V2):
    they would not quantize. Raises whatever the model asks first."""

    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN_DIFFKV"

    @classmethod
    def is_supported_on_current_device(cls, **shape: Any) -> NoReturn:
        cls.get_impl_cls()

    @classmethod
    def set_head_size_v(cls, head_size_v: int) -> NoReturn:
        cls.get_impl_cls()

    @staticmethod
    def get_impl_cls() -> NoReturn:
        refuse_value_heads(get_current_vllm_config_or_none())

    @staticmethod
    def get_builder_cls() -> NoReturn:
        RefusedDiffKV.get_impl_cls()
