"""`enable` and `disable`, and that nothing happens without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, GenerationMixin
from transformers.masking_utils import AttentionMaskInterface

from turboattention import TurboConfig
from turboattention.errors import BackendError, ConfigError, InputError
from turboattention.integrations.transformers import disable, enable, followed

SOURCE = Path(__file__).parents[3] / "src"
REGISTRIES = (AttentionInterface, AttentionMaskInterface)


def snapshot() -> list[dict]:
    return [dict(registry._global_mapping) for registry in REGISTRIES]


def test_disable_leaves_the_registries_as_they_were():
    disable()
    before = snapshot()
    assert all("turbo" not in mapping for mapping in before)
    enable()
    enable(TurboConfig(bits=3))
    assert all("turbo" in mapping for mapping in snapshot())
    disable()
    assert snapshot() == before
    disable()
    assert snapshot() == before


def test_a_release_with_another_name_for_the_cache_is_refused(monkeypatch):
    """As 5.24: prompts would not be compared with what a cache holds."""
    disable()
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", lambda self, input_ids, cache=None: {})
    monkeypatch.setattr(followed, "transformers", SimpleNamespace(__version__="5.24.0"))
    before = snapshot()
    with pytest.raises(BackendError, match=r"expected a release from 5\.16 to 5\.23, got 5\.24\.0, whose models"):
        enable()
    assert snapshot() == before


def test_disable_puts_back_what_stood_under_the_name():
    disable()
    try:
        for registry in REGISTRIES:
            registry.register("turbo", "someone else's")
        before = snapshot()
        enable()
        assert snapshot() != before
        disable()
        assert snapshot() == before
    finally:
        for registry in REGISTRIES:
            del registry._global_mapping["turbo"]


def test_models_that_still_want_turbo_say_so(tiny, tokens):
    model = tiny("llama")
    model.set_attn_implementation("turbo")
    disable()
    with pytest.raises(KeyError, match="turbo"), torch.no_grad():
        model(tokens(1, 4))
    with pytest.raises(ValueError, match="turbo"):
        AutoModelForCausalLM.from_config(model.config, attn_implementation="turbo")


def test_config_and_backend_apply_without_a_turbo_cache(tiny, forward, tokens, distance):
    model, ids = tiny("llama"), tokens(1, 40)
    default = forward(model, "turbo", ids)
    enable(TurboConfig(softmax="exp"))
    other = forward(model, "turbo", ids)
    assert 0 < distance(other, default) < 0.05
    enable(backend="reference")
    assert 0 < distance(forward(model, "turbo", ids), default) < 0.01


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"backend": "cuda"}, InputError),
        ({"backend": "triton"}, BackendError),
        ({"config": {"bits": 4}}, ConfigError),
    ],
)
def test_what_no_call_would_take_is_not_registered(options, error):
    disable()
    before = snapshot()
    with pytest.raises(error, match=f"^{next(iter(options))}: expected"):
        enable(**options)
    assert snapshot() == before


MISSING = """
import sys, types
sys.path.insert(0, {source!r})
sys.modules["transformers"] = {stand_in}
import turboattention as ta
try:
    ta.integrations.transformers.enable()
except ImportError as error:
    print(type(error).__name__, error.name, error)
"""


@pytest.mark.parametrize("stand_in", ["None", "types.ModuleType('transformers')"], ids=["none", "another release"])
def test_without_transformers(stand_in):
    probe = MISSING.format(source=str(SOURCE), stand_in=stand_in)
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(
        "ModuleNotFoundError transformers turboattention.integrations.transformers needs transformers 5.16 to 5.23 "
        '(pip install ".[transformers]" in a clone of the repository): '
    )


@pytest.mark.parametrize(
    ("statement", "imported"),
    [
        ("import turboattention.integrations", False),
        ("import turboattention as ta; ta.integrations.transformers.enable", True),
    ],
)
def test_transformers_is_imported_by_name_and_never_patched(statement, imported):
    probe = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
{statement}
print("transformers" in sys.modules)
if "transformers" in sys.modules:
    from transformers import AttentionInterface
    assert "turbo" not in AttentionInterface._global_mapping
"""
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == str(imported)


def test_unknown_integrations_are_attribute_errors():
    from turboattention import integrations

    assert "transformers" in dir(integrations)
    with pytest.raises(AttributeError, match="no attribute 'jax'"):
        _ = integrations.jax
