"""The served models: the bundled one, real ones in folders, and Llama 3 8B's shapes with random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import processes
import torch
from safetensors.torch import load_file, save_file

from turboattention import __version__, bundled
from turboattention.calibration import Calibration, LayerStatistics, Provenance
from turboattention.config import WIDTHS, TurboConfig
from turboattention.paged import TailBlocks

TITLES = {"smollm2": "SmolLM2-135M-Instruct", "qwen": "Qwen2.5-Coder-0.5B-Instruct", "gemma3": "Gemma 3 270M"}
"""Titles of the real models, by their label on the command line."""
MEANS = ("qwen",)
"""Calibrated with means of K. A large part of Qwen2.5's keys is the same in all tokens; SmolLM2 is better without."""


@dataclass(frozen=True)
class Model:
    """A folder for vLLM. random: without weights and tokenizer; vLLM uses random weights."""

    title: str
    folder: Path
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    random: bool

    def options(self) -> dict[str, object]:
        """For `LLM`."""
        made_up = {"load_format": "dummy", "skip_tokenizer_init": True} if self.random else {}
        return {"model": str(self.folder), **made_up}

    def side_pool(self, sequences: int) -> int:
        """Bytes of the tail slots of a bfloat16 model: one for each sequence that may run, and a spare one."""
        sizes = self.layers, sequences + 1, self.kv_heads, self.head_dim
        rows = TurboConfig.serving().exact_rows
        return TailBlocks(*sizes, device="meta", exact_rows=rows, dtype=torch.bfloat16).nbytes

    def mixed(self, folder: Path) -> Path:
        """A calibration with the paper's widths: half of the KV heads at 2 bits, the others at 4. Its statistics are
        zeros, because sizes depend only on the widths."""
        bits = torch.tensor([[2 if head < self.kv_heads // 2 else 4 for head in range(self.kv_heads)]] * 2)
        layer = LayerStatistics(
            errors=torch.zeros(2, self.kv_heads, len(WIDTHS), dtype=torch.float64),
            costs=torch.zeros(2, self.kv_heads, len(WIDTHS), dtype=torch.float64),
            priority=torch.zeros(2, self.kv_heads, dtype=torch.float64),
            k_mean=torch.zeros(self.kv_heads, self.head_dim),
            outliers=((),) * self.kv_heads,
        )
        source = Provenance(str(self.folder), "", {}, "", 0, 0, __version__)
        Calibration((layer,) * self.layers, source, (bits,) * self.layers, 3.0, "priority").save(folder)
        return folder


def bundled_model() -> Model:
    return _read("the bundled model", bundled.model_path(), random=False)


def calibration(model: Model, label: str) -> Path:
    """The folder of a real model's calibration, which is created if there is none."""
    folder = processes.BUILD / "calibrations" / label
    if not (folder / "calibration.json").exists():
        print(f"calibrates {model.title}", flush=True)
        spec = {"model": str(model.folder), "folder": str(folder), "means": label in MEANS}
        processes.call("calibration_run", spec, {}, f"calibration-{label}")
    return folder


def real_model(label: str, folder: Path) -> Model:
    """One of `TITLES`, in a folder of Hugging Face's format."""
    return _read(TITLES[label], folder, random=False)


def drafter(folder: Path) -> Path:
    """A model that drafts for the bundled one, and is often wrong: without the MLP of one layer. Written into
    `folder`."""
    shutil.copytree(bundled.model_path(), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.6.mlp.down_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def llama(folder: Path, *, attention_only: bool) -> Model:
    """Llama 3 8B's shapes, written into `folder`.

    attention_only: two layers, with minimal sizes of everything except attention.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512 if attention_only else 128256,
        "hidden_size": 256 if attention_only else 4096,
        "intermediate_size": 256 if attention_only else 14336,
        "num_hidden_layers": 2 if attention_only else 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    title = "2 layers of Llama 3 8B's attention" if attention_only else "Llama 3 8B's shapes"
    return _read(title, folder, random=True)


def _read(title: str, folder: Path, random: bool) -> Model:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers, kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    return Model(title, folder, layers, kv_heads, head_dim, config["vocab_size"], random)
