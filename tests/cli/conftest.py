"""A tiny random Llama with a tokenizer of its own, and a way to run commands in this process."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from turboattention.cli.main import app
from turboattention.integrations.transformers import language_model
from turboattention.integrations.transformers.language_model import LanguageModel

CONTEXT = 512
TEXT = (
    "The door opened, and an old man stood in the light of the lamp. He spoke slowly, as one who has not spoken for a "
    "long time, and bade the traveller come in from the cold. — “Née à Mohács”, she said: 12 May. "
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def save_model(folder: Path, *, seed: int = 0, eos: int | None = 0, template: str | None = None, **sizes: Any) -> Path:
    """A random Llama that does not immediately repeat itself."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=eos,
        initializer_range=0.3,
        **(shape | sizes),
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slowed down by threads, and `--threads` changes them for the process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", eos=None)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    return save_model(tmp_path_factory.mktemp("models") / "chatting", eos=None, template=TEMPLATE)


@pytest.fixture(scope="session")
def chat_language(chat_model: Path) -> LanguageModel:
    return language_model.load(str(chat_model), "cpu", "float32")


@pytest.fixture(scope="session")
def language(model: Path) -> LanguageModel:
    return language_model.load(str(model), "cpu", "float32")


class Ran:
    """The result of a command: exit code, stdout, stderr."""

    def __init__(self, code: int, stdout: str, stderr: str):
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def json(self) -> Any:
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)

    @property
    def error(self) -> str:
        """The one line that a wrong call leaves on stderr, with nothing on stdout."""
        assert self.code == 2, (self.code, self.stdout, self.stderr)
        assert self.stdout == ""
        assert self.stderr.startswith("error: ")
        assert self.stderr.count("\n") == 1
        return self.stderr.removeprefix("error: ").rstrip("\n")


Run = Callable[..., Ran]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands must check everything that needs only the config and the tokenizer before they load weights."""

    def load(*_: object) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(language_model.Opened, "load", load)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line, as a machine without a network would."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("TURBOATTENTION_DEBUG", raising=False)

    def call(*arguments: object, stdin: str | bytes | None = None, columns: int = 100) -> Ran:
        monkeypatch.setenv("COLUMNS", str(columns))
        with warnings.catch_warnings():
            result = CliRunner().invoke(app, [str(x) for x in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return call
