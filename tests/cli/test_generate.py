"""``turboattention generate`` as typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from turboattention import TurboConfig, backends, bundled
from turboattention.cli.output import bytes_text
from turboattention.cli.plain import size_text
from turboattention.dispatch import choose
from turboattention.errors import InputError, UnsupportedError
from turboattention.integrations.transformers import calibrate, generation, language_model, registry
from turboattention.integrations.transformers.language_model import LanguageModel

from .conftest import CONTEXT, TEXT, Run, save_model

PROMPT = TEXT * 2
OTHER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 96}


@pytest.fixture(scope="module")
def expected(language: LanguageModel) -> generation.Generation:
    """Eight greedy tokens at 4 bits, without the command line."""
    with registry.enabled():
        run = generation.Run(language, language.new_cache(TurboConfig()))
        run.prefill(language.encode(PROMPT))
        return generation.generate(run, 8)


def call(run: Run, model: Path, *arguments: object, **options):
    return run("generate", "--model", model, "--max-new-tokens", 8, *arguments, **options)


# -- plain -------------------------------------------------------------------------------------------


def test_text_on_stdout_and_figures_on_stderr(run: Run, model: Path, language, expected) -> None:
    ran = call(run, model, "--prompt", PROMPT)
    assert ran.code == 0
    assert ran.stdout == language.decode(expected.tokens) + "\n"
    assert ran.stderr.startswith(f"note: prompt of {len(language.encode(PROMPT))} tokens in ")
    assert "8 new at" in ran.stderr
    assert "below FP16" in ran.stderr


@pytest.mark.parametrize(
    ("ratio", "tokens", "text"),
    [
        (3.764, 4000, "3.76x below FP16"),
        (1.0, 130, "1.00x below FP16"),
        (0.5, 128, "2.00x above FP16, as compression begins with token 128"),
        (0.5, 129, "2.00x above FP16"),  # layers in float32
    ],
)
def test_sizes_in_words(ratio: float, tokens: int, text: str) -> None:
    assert size_text(ratio, tokens, TurboConfig()) == text


def test_compression_begins_where_it_is_said(language: LanguageModel) -> None:
    ids = language.encode(PROMPT)
    with registry.enabled():
        run = generation.Run(language, language.new_cache(TurboConfig()))
        run.prefill(ids[:127])
        assert run.kv_bytes > run.kv_bytes_fp16
        run.advance(ids[127])
        assert run.kv_bytes < run.kv_bytes_fp16


def test_json(run: Run, model: Path, language, expected) -> None:
    ran = call(run, model, "--prompt", PROMPT, "--json")
    data = ran.json
    assert ran.stderr == ""
    assert data["tokens"] == expected.tokens
    assert data["text"] == language.decode(expected.tokens)
    assert (data["new_tokens"], data["ended"], data["reused_tokens"]) == (8, False, 0)
    assert data["prompt_tokens"] == len(language.encode(PROMPT))
    assert data["config"]["bits"] == 4
    assert data["warnings"] == []
    cached = data["prompt_tokens"] + 7
    assert data["kv_bytes_fp16"] == 2 * 2 * cached * 2 * 2 * 16
    assert data["ratio"] == pytest.approx(data["kv_bytes_fp16"] / data["kv_bytes"])
    assert data["bits_per_element"] == pytest.approx(16 / data["ratio"])
    assert data["prefill_seconds"] > 0
    assert data["decode_tokens_per_second"] > 0
    facts = {name: data[name] for name in ("model", "device", "dtype", "backend", "context")}
    assert facts == {
        "model": str(model), "device": "cpu", "dtype": "float32", "backend": choose("auto").name, "context": CONTEXT,
    }  # fmt: skip


def test_file_and_stdin_are_the_same_as_a_prompt(run: Run, model: Path, expected, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    assert call(run, model, "--file", file, "--json").json["tokens"] == expected.tokens
    assert call(run, model, "--file", "-", "--json", stdin=PROMPT.encode()).json["tokens"] == expected.tokens


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (["--bits", "3"], TurboConfig(bits=3, reorder_k=True)),
        (["--bits", "4,2"], TurboConfig(bits=(4, 2), reorder_k=True)),
        (["--bits", "8"], TurboConfig(bits=8)),
        (["--bits", "mixed"], TurboConfig(bits="mixed")),
        (["--bits", "2", "--preset", "paper"], TurboConfig.paper(bits=2)),
        (["--bits", "mixed", "--preset", "paper"], TurboConfig.paper(bits="mixed")),
        (["--preset", "default", "--guard", "off"], TurboConfig(guard="off", reorder_k=True)),
    ],
)
def test_quantization(run: Run, model: Path, arguments: list[str], config: TurboConfig) -> None:
    got = call(run, model, "--prompt", PROMPT, "--json", *arguments).json["config"]
    assert (
        TurboConfig(**(got | {"bits": tuple(got["bits"]) if isinstance(got["bits"], list) else got["bits"]})) == config
    )


@pytest.mark.skipif(not backends()["cpu"].usable, reason="the CPU kernels are not built")
class TestTheBackendNamed:
    """It is the one that runs, which has no kernels for some configurations that a kept cache may have."""

    @pytest.mark.parametrize("preset", ["default", "paper"])
    @pytest.mark.parametrize("compared", [[], ["--compare"]], ids=["alone", "compared"])
    def test_of_every_preset(self, run: Run, model: Path, preset: str, compared: list[str]) -> None:
        data = call(run, model, "--prompt", PROMPT, "--preset", preset, "--json", *compared).json
        assert (data["backend"], data["warnings"]) == ("cpu", [])

    def test_of_a_kept_cache(self, run: Run, model: Path, language: LanguageModel, tmp_path: Path) -> None:
        ids, kept = language.encode(PROMPT), tmp_path / "kept"
        with registry.enabled():
            cache = language.new_cache(TurboConfig(row_max="running"))
            generation.Run(language, cache).prefill(ids)
            cache.save(kept, input_ids=torch.tensor([ids]))
        data = call(run, model, "--load-cache", kept, "--json").json
        assert data["backend"] == "reference"
        (said,) = data["warnings"]
        assert said.startswith(
            "the CPU kernels do not compute this (row_max is 'running', its kernels compute 'block')"
        )
        assert f"warning: {said}\n" in call(run, model, "--load-cache", kept).stderr


def test_sampling(run: Run, model: Path, expected) -> None:
    def tokens(*arguments: object) -> list[int]:
        return call(run, model, "--prompt", PROMPT, "--json", "--temperature", 1.5, *arguments).json["tokens"]

    assert tokens("--seed", 1) == tokens("--seed", 1)
    assert tokens("--seed", 1) != tokens("--seed", 2)
    assert tokens("--top-p", 1e-6) == expected.tokens


def test_dtype_device_and_threads(run: Run, model: Path) -> None:
    options = ("--dtype", "bfloat16", "--device", "cpu", "--threads", 1)
    data = call(run, model, "--prompt", PROMPT, "--json", *options).json
    assert (data["dtype"], data["device"], data["threads"]) == ("bfloat16", "cpu", 1)


def test_stops_at_the_end_token(run: Run, tmp_path: Path) -> None:
    for seed in range(20):
        model = save_model(tmp_path / str(seed), seed=seed, eos=None)
        tokens = call(run, model, "--prompt", "The door", "--json").json["tokens"]
        if len(set(tokens)) > 1:
            break
    last = next(token for token in tokens if token != tokens[0])
    ending = save_model(tmp_path / "ending", seed=seed, eos=last)
    data = call(run, ending, "--prompt", "The door", "--json").json
    assert data["ended"]
    assert data["tokens"] == tokens[: tokens.index(last) + 1]


def test_nothing_of_a_command_stays(run: Run, model: Path) -> None:
    from transformers import AttentionInterface

    call(run, model, "--prompt", "x")
    assert "turbo" not in AttentionInterface()


def test_pipes_get_plain_text(model: Path) -> None:
    source = Path(__file__).parents[2] / "src"
    ran = subprocess.run(
        [sys.executable, "-m", "turboattention", "generate", "--model", str(model), "--prompt", "The door",
         "--max-new-tokens", "4", "--compare", "--threads", "1"],
        capture_output=True, env={"PYTHONPATH": str(source), "COLUMNS": "100", "PATH": ""}, check=True,
    )  # fmt: skip
    assert b"\x1b" not in ran.stdout
    assert b"top-1" in ran.stdout
    assert ran.stderr == b""


# -- compare -----------------------------------------------------------------------------------------


def test_compare(run: Run, model: Path) -> None:
    ran = call(run, model, "--prompt", PROMPT, "--compare", columns=80)
    assert (ran.code, ran.stderr) == (0, "")
    for word in ("own cache", "4 bits", "below", "FP16", "tok/s", "first", "same", "top-1", "1.00x"):
        assert word in ran.stdout
    assert "3 bits" not in ran.stdout


def test_compare_several_settings(run: Run, model: Path, expected) -> None:
    options = ("--compare", "--bits", 4, "--bits", "3", "--bits", "mixed", "--json")
    data = call(run, model, "--prompt", PROMPT, *options).json
    assert [setting["bits"] for setting in data["settings"]] == ["4", "3", "mixed"]
    assert data["settings"][0]["tokens"] == expected.tokens
    assert data["own"]["new_tokens"] == 8
    assert data["backend"] == choose("auto").name
    for setting in data["settings"]:
        assert setting["kv_bytes"] < data["own"]["kv_bytes"]
        assert setting["kv_bytes_fp16"] == data["own"]["kv_bytes_fp16"]
        assert 0 <= setting["same_tokens"] <= 1
        assert 0 <= setting["top1_agreement"] <= 1
        assert setting["first_difference"] is None or 0 <= setting["first_difference"] < 8


def test_demo_compares_three_settings_on_the_bundled_text(run: Run, model: Path, language, tmp_path: Path) -> None:
    tokens = len(language.encode(bundled.text()))
    assert call(run, model, "--demo", "--compare").error.endswith(f"got {tokens:,}")
    (tmp_path / "text.txt").write_text(PROMPT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled, "text_path", lambda: tmp_path / "text.txt")
        data = call(run, model, "--demo", "--compare", "--json").json
    assert [setting["bits"] for setting in data["settings"]] == ["4", "3", "mixed"]


# -- kept caches -------------------------------------------------------------------------------------


def test_save_then_load(run: Run, model: Path, language, tmp_path: Path, expected) -> None:
    kept = tmp_path / "kept"
    first = call(run, model, "--prompt", PROMPT, "--save-cache", kept, "--json").json
    assert first["tokens"] == expected.tokens
    again = call(run, model, "--load-cache", kept, "--json").json
    assert again["prompt_tokens"] == first["prompt_tokens"]
    assert again["reused_tokens"] == first["prompt_tokens"] - 1
    more = call(run, model, "--load-cache", kept, "--prompt", PROMPT + " He spoke", "--json").json
    assert more["prompt_tokens"] > first["prompt_tokens"]
    assert more["reused_tokens"] >= first["prompt_tokens"] - 2
    assert more["new_tokens"] == 8


def test_loaded_and_unloaded_agree(run: Run, model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    run("generate", "--model", model, "--prompt", PROMPT, "--bits", 8, "--max-new-tokens", 0, "--save-cache", kept)
    prompt = PROMPT + TEXT[:140]  # behind which this random model has no two tokens that are nearly as likely
    loaded = call(run, model, "--load-cache", kept, "--prompt", prompt, "--json").json
    plain = call(run, model, "--bits", 8, "--prompt", prompt, "--json").json
    assert loaded["config"] == plain["config"]
    assert loaded["tokens"][0] == plain["tokens"][0]


def test_saving_alone(run: Run, model: Path, language, tmp_path: Path) -> None:
    ran = run(
        "generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", 0, "--save-cache", tmp_path / "kept"
    )
    assert (ran.code, ran.stdout) == (0, "")
    size = bytes_text((tmp_path / "kept").stat().st_size)
    tokens = len(language.encode(PROMPT))
    assert ran.stderr.startswith(f"note: cache of {tokens} tokens saved to {tmp_path / 'kept'}, {size}\n")


def test_the_summary_says_what_was_spared(run: Run, model: Path, tmp_path: Path) -> None:
    call(run, model, "--prompt", PROMPT, "--save-cache", tmp_path / "kept")
    assert "from the cache)" in call(run, model, "--load-cache", tmp_path / "kept").stderr


def test_a_file_that_is_no_cache_is_not_replaced(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("of a year")
    error = call(run, model, "--prompt", PROMPT, "--save-cache", tmp_path / "notes.txt").error
    assert error.startswith("--save-cache: expected a new file or a saved cache to replace")
    assert (tmp_path / "notes.txt").read_text() == "of a year"


def test_a_kept_cache_is_replaced(run: Run, model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    call(run, model, "--prompt", "The door", "--save-cache", kept)
    first = call(run, model, "--prompt", PROMPT, "--save-cache", kept, "--json").json
    again = call(run, model, "--load-cache", kept, "--json").json
    assert again["prompt_tokens"] == first["prompt_tokens"]


def test_a_damaged_cache(run: Run, model: Path, tmp_path: Path) -> None:
    call(run, model, "--prompt", PROMPT, "--save-cache", tmp_path / "kept")
    (tmp_path / "kept").write_bytes((tmp_path / "kept").read_bytes()[:-64])
    assert str(tmp_path / "kept") in call(run, model, "--load-cache", tmp_path / "kept").error


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt: expected a text (or a file with --file, or --demo), got none"),
        (["--compare"], "--prompt: expected a text (or a file with --file, or --demo), got none"),
        (["--load-cache", "x", "--compare"], "--compare: expected no --save-cache or --load-cache with it"),
        (["--prompt", "x", "--temperature", "inf"], "--temperature: expected a finite number of at least 0, got inf"),
        (["--prompt", " "], "--prompt: expected some text, got none"),
        (["--prompt", "x", "--demo"], "--demo: expected one of --prompt, --file and --demo, got --prompt and --demo"),
        (["--file", "/no/such/file"], "--file: /no/such/file cannot be read: No such file or directory"),
        (
            ["--prompt", "x", "--bits", "5"],
            "--bits: expected 8, 4, 3, 2, mixed, or two widths for K,V such as 4,3; got '5'",
        ),
        (["--prompt", "x", "--bits", "4", "--bits", "3"], "--bits: expected one value without --compare, got 2"),
        (
            ["--load-cache", "x", "--bits", "4"],
            "--load-cache: expected no --bits, --preset, --guard or --calibration with it: the file has its own "
            "quantization",
        ),
        (
            ["--prompt", "x", "--compare", "--load-cache", "y"],
            "--compare: expected no --save-cache or --load-cache with it",
        ),
        (
            ["--prompt", "x", "--compare", "--temperature", "1"],
            "--compare: expected --temperature 0 (the likeliest token each time)",
        ),
        (["--prompt", "x", "--top-p", "0.5"], "--top-p: expected --temperature above 0 with it, got 0"),
        (
            ["--prompt", "x", "--temperature", "1", "--top-p", "0"],
            "--top-p: expected a share above 0 and up to 1, got 0.0",
        ),
        (
            ["--prompt", "x", "--max-new-tokens", "0"],
            "--max-new-tokens: expected at least 1 (0 is for --save-cache alone), got 0",
        ),
        (
            ["--prompt", "x", "--save-cache", "/no/such/folder/kept"],
            "--save-cache: /no/such/folder/kept cannot be written: there is no folder /no/such/folder",
        ),
        (
            ["--prompt", "x", "--device", "nowhere"],
            "--device: expected a device of this machine such as cpu, got 'nowhere'",
        ),
    ],
)
def test_options_that_do_not_go_together(run: Run, model: Path, arguments: list[str], message: str) -> None:
    assert run("generate", "--model", model, *arguments).error == message


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-new-tokens", "-1"],
        ["--max-new-tokens", "many"],
        ["--preset", "best"],
        ["--guard", "maybe"],
        ["--dtype", "int8"],
        ["--threads", "0"],
        ["--threads", "100000"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
    ],
)
def test_values_out_of_range(run: Run, arguments: list[str]) -> None:
    assert arguments[0] in run("generate", "--prompt", "x", *arguments).error


def test_a_prompt_longer_than_the_context(run: Run, model: Path, language) -> None:
    long = TEXT * 12
    tokens = len(language.encode(long))
    assert call(run, model, "--prompt", long).error == (
        f"--prompt: expected at most {CONTEXT - 8} tokens (the model's context of {CONTEXT} less 8 new ones), "
        f"got {tokens:,}"
    )


@pytest.mark.parametrize("name", ["", " "])
def test_a_model_without_a_name(run: Run, name: str) -> None:
    error = run("generate", "--model", name, "--prompt", "x").error
    assert error == f"--model: expected a folder or a name such as org/model, got {name!r}"


def test_errors_are_text_with_json_too(run: Run, model: Path) -> None:
    assert call(run, model, "--prompt", " ", "--json").error == "--prompt: expected some text, got none"


def test_no_such_model(run: Run) -> None:
    error = run("generate", "--model", "/no/such/model", "--prompt", "x").error
    assert error == "--model: expected a folder or a name such as org/model, got '/no/such/model': no such folder"


def test_a_name_that_cannot_be_fetched(run: Run) -> None:
    error = run("generate", "--model", "nobody/nothing", "--prompt", "x").error
    assert error == "--model: nobody/nothing is no folder here, and the hub could not be reached for it"


def test_a_folder_without_a_model(run: Run, tmp_path: Path) -> None:
    assert "config.json" in run("generate", "--model", tmp_path, "--prompt", "x").error


def test_not_utf8(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "expected UTF-8 text" in call(run, model, "--file", tmp_path / "latin").error
    assert "expected UTF-8 text" in call(run, model, "--file", "-", stdin=b"caf\xe9").error


# -- before the weights are loaded -------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved cache of the prompt."""
    path = tmp_path_factory.mktemp("kept") / "kept.cache"
    language = language_model.load(str(model), "cpu", "float32")
    with registry.enabled():
        whole = generation.Run(language, language.new_cache(TurboConfig()))
        whole.prefill(language.encode(PROMPT))
        whole.cache.save(path, torch.tensor([language.encode(PROMPT)]))  # type: ignore[union-attr]
    return path


@pytest.mark.usefixtures("no_weights")
class TestWhatNeedsNoWeights:
    def test_a_cache_file_that_is_none(self, run: Run, model: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("of a year")
        error = call(run, model, "--load-cache", tmp_path / "notes.txt").error
        assert error == f"--load-cache: expected a saved cache, got {tmp_path / 'notes.txt'}, a text file"
        error = call(run, model, "--load-cache", tmp_path / "none").error
        assert error == f"--load-cache: expected a file, got {tmp_path / 'none'}: no such file"

    def test_a_cache_file_is_looked_at_before_the_model(self, run: Run, tmp_path: Path) -> None:
        error = run("generate", "--model", "/no/such/model", "--load-cache", tmp_path / "none").error
        assert error.startswith("--load-cache: ")

    def test_a_cache_of_another_model(self, run: Run, kept: Path, tmp_path: Path) -> None:
        other = save_model(tmp_path / "other", num_hidden_layers=3)
        assert "num_hidden_layers" in call(run, other, "--load-cache", kept).error

    def test_a_cache_of_another_text(self, run: Run, model: Path, kept: Path) -> None:
        error = call(run, model, "--load-cache", kept, "--prompt", "Quite another beginning " * 9).error
        assert error.startswith("--load-cache: expected a prompt that begins like the cached one")

    def test_a_long_prompt(self, run: Run, model: Path, tmp_path: Path) -> None:
        (tmp_path / "long").write_text(TEXT * 12, encoding="utf-8")
        for options in ([], ["--compare"]):
            error = call(run, model, "--file", tmp_path / "long", *options).error
            assert error.startswith(f"--file: expected at most {CONTEXT - 8} tokens (the model's context")

    def test_a_cache_that_leaves_no_room(self, run: Run, model: Path, kept: Path) -> None:
        error = run("generate", "--model", model, "--load-cache", kept, "--max-new-tokens", CONTEXT).error
        assert error.startswith("--max-new-tokens: expected at most ")

    def test_a_model_without_a_chat_template(self, run: Run, model: Path) -> None:
        assert "chat template" in call(run, model, "--chat", "--prompt", "hello").error

    def test_a_model_that_is_not_supported(self, run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise UnsupportedError("model_config: multi-head latent attention (MLA) is not supported by a TurboCache")

        monkeypatch.setattr(language_model, "TurboCache", refuse)
        for options in ([], ["--compare"]):
            assert call(run, model, "--prompt", "x", *options).error.startswith("--model: multi-head latent")

    def test_a_calibration_of_another_model(self, run: Run, model: Path, tmp_path: Path) -> None:
        calibrate(LlamaForCausalLM(LlamaConfig(**OTHER)), list(range(96)) * 3, length=288).save(tmp_path)
        for options in ([], ["--compare"]):
            error = call(run, model, "--prompt", "x", "--calibration", tmp_path, *options).error
            assert error.startswith("--calibration: expected one of this model")
        error = call(run, model, "--prompt", "x", "--calibration", tmp_path / "none").error
        assert error.startswith("--calibration: expected a calibration, ")


# -- the bundled model -------------------------------------------------------------------------------


def has_bundled_model() -> bool:
    try:
        return bundled.model_path().is_dir()
    except InputError:
        return False


@pytest.mark.skipif(not has_bundled_model(), reason="this source tree comes without the bundled model")
def test_bundled_model_has_room_for_the_bundled_text() -> None:
    language = language_model.load(str(bundled.model_path()), "cpu", "float32")
    tokens = len(language.encode(bundled.text()))
    assert language.context == 4096
    assert 3880 <= tokens <= 3930
    assert torch.isfinite(next(language.model.parameters())).all()


@pytest.mark.skipif(not has_bundled_model(), reason="this source tree comes without the bundled model")
def test_the_bundled_model_is_the_default(run: Run) -> None:
    data = run("generate", "--prompt", "Once upon a time", "--max-new-tokens", 4, "--json").json
    assert data["model"] == str(bundled.model_path())
    assert data["text"].strip()


def test_without_the_bundled_model(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bundled, "_HERE", tmp_path)
    assert run("generate", "--prompt", "x").error.startswith("--model: expected the bundled model in ")
