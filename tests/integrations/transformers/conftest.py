"""Tiny random models of each shape, run step by step or through `generate`.

    PYTHONPATH=<folder with another transformers release> pytest tests/integrations

runs the same tests under that release (`pip install --target <folder> --no-deps transformers==5.16.0`;
releases before 5.18 also want ``"huggingface-hub<2" httpx`` there).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import transformers
    from transformers import AutoModelForCausalLM

    from turboattention.integrations import transformers as integration

    transformers.utils.logging.set_verbosity_error()

VOCAB = 96
WINDOW = 24

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 64}),
    "qwen3": ("Qwen3Config", {"head_dim": 96}),
    "phi3": ("Phi3Config", {"hidden_size": 96, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 96}),
    "mistral": ("MistralConfig", {"head_dim": 128, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", {"head_dim": 256, "sliding_window": WINDOW, "query_pre_attn_scalar": 256}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "gpt_oss": (
        "GptOssConfig",
        {"sliding_window": WINDOW, "layer_types": MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gpt2": ("GPT2Config", {"num_key_value_heads": 4}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "olmo3": ("Olmo3Config", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "mimo_v2_flash": (  # values narrower than keys
        "MiMoV2FlashConfig",
        {
            "head_dim": 24,
            "v_head_dim": 16,
            "swa_head_dim": 24,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
            "mlp_layer_types": ["dense", "sparse", "dense"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "opt": ("OPTConfig", {"num_key_value_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "llama4": (
        "Llama4TextConfig",
        {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 96},
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [96] * 4,
        },
    ),
}


@cache
def _build(name: str, seed: int, overrides: tuple[tuple[str, Any], ...]) -> Any:
    kind, changes = CONFIGS[name]
    config = getattr(transformers, kind)(**{**COMMON, **changes, **dict(overrides)})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # Larger than any initializer's: attention must matter to the logits.
            parameter.data.normal_(0, 0.12)
    model.generation_config.eos_token_id = None
    return model.to(getattr(torch, dict(overrides).get("dtype", "float32")))


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """A model by name (see `CONFIGS`), eager until told otherwise; models are shared between tests.

    In float64 the model itself rounds too little to flip INT8 codes, so that two ways to the same
    numbers agree to many digits.
    """

    def build(name: str = "llama", seed: int = 0, **overrides: Any) -> Any:
        model = _build(name, seed, tuple(overrides.items()))
        model.set_attn_implementation("eager")
        return model

    return build


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for the other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def turbo() -> Iterator[None]:
    """Registers "turbo" in every test, and removes it afterwards."""
    integration.enable()
    yield
    integration.disable()


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """Random token ids [batch, length], none of them special."""

    def draw(batch: int, length: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def forward() -> Callable[..., torch.Tensor]:
    """Logits [B, L, V] of `ids`, fed in pieces of the given sizes, each on top of the cache so far."""

    def run(
        model: Any,
        attention: str,
        ids: torch.Tensor,
        pieces: Sequence[int] | None = None,
        cache: Any = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        model.set_attn_implementation(attention)
        start = 0 if cache is None else int(cache.get_seq_length())
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        logits = []
        with torch.no_grad():
            for size in pieces or [ids.shape[1]]:
                end = start + size
                out = model(
                    input_ids=ids[:, start:end],
                    attention_mask=None if mask is None else mask[:, :end],
                    position_ids=None if positions is None else positions[:, start:end],
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
                logits.append(out.logits)
                start = end
        return torch.cat(logits, 1)

    return run


@pytest.fixture
def padded() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Rows [1, n] of different lengths as one left-padded batch: ids and mask."""

    def pad(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(row.shape[1] for row in rows)
        ids, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
        for i, row in enumerate(rows):
            ids[i, width - row.shape[1] :] = row
            mask[i, width - row.shape[1] :] = 1
        return ids, mask

    return pad


@pytest.fixture
def distance() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Relative error in the Frobenius norm."""

    def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
        return float((result - expected).norm() / expected.norm())

    return relative
