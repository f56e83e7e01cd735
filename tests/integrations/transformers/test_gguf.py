"""Models in GGUF files: the same model as from a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from turboattention.errors import InputError
from turboattention.integrations.transformers import language_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

TEXT = "The door opened, and an old man stood in the light of the lamp. "
CONFIG = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=0, initializer_range=0.3,
    tie_word_embeddings=False,
)  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp, which rotates neighbours where transformers rotates halves."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def tensor_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=trained().get_vocab_size(), **CONFIG)).eval()


@pytest.fixture(scope="module")
def file(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer, config, tokenizer = gguf.GGUFWriter(path, "llama"), llama.config, trained()
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    ids = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in ids])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(ids) - 1)])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] + '<end>' }}{% endfor %}")
    for name, parameter in llama.state_dict().items():
        weight = parameter.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = paired(weight, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        writer.add_tensor(tensor_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def test_the_same_model_as_from_a_folder(
    file: Path, llama: LlamaForCausalLM, capfd: pytest.CaptureFixture[str]
) -> None:
    language = language_model.load(str(file), "cpu", "float32")
    assert capfd.readouterr() == ("", "")
    ids = trained().encode(TEXT).ids
    assert language.encode(TEXT) == ids
    assert language.decode(ids) == TEXT
    assert language.context == 256
    assert language.stop_tokens == {0}
    assert language.tokenizer.chat_template
    got, wanted = (model(torch.tensor([ids])).logits for model in (language.model, llama))
    torch.testing.assert_close(got, wanted)


def test_a_dtype_of_its_own(file: Path) -> None:
    assert language_model.load(str(file), "cpu", "bfloat16").model.dtype == torch.bfloat16
    assert language_model.load(str(file)).model.dtype == torch.float32


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^model: expected a GGUF file, got .*none.gguf: no such file$"):
        language_model.load(str(tmp_path / "none.gguf"))
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(InputError, match=r": a folder$"):
        language_model.load(str(tmp_path / "folder.gguf"))
    (tmp_path / "other.gguf").write_bytes(b"not one")
    with pytest.raises(InputError, match=r"which does not begin with GGUF$"):
        language_model.load(str(tmp_path / "other.gguf"))


def test_a_damaged_file(tmp_path: Path, file: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match=r"^model: .*cut.gguf cannot be loaded: "):
        language_model.load(str(tmp_path / "cut.gguf"))
