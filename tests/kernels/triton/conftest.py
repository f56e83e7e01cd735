"""The tests here run Triton's kernels on the CPU, by its interpreter; whether they do is decided where a kernel is
defined, so they are defined while the tests are collected. The rest of the tests do not see the setting."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from turboattention.config import TurboConfig

_NAME = "TRITON_INTERPRET"
_before = os.environ.get(_NAME)
os.environ[_NAME] = "1"


def pytest_collection_finish() -> None:
    if _before is None:
        del os.environ[_NAME]
    else:
        os.environ[_NAME] = _before


def pytest_itemcollected(item: pytest.Item) -> None:
    # Of the interpreter itself, in Triton 3.6.
    item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))


def _softmax_on(config: TurboConfig, device: torch.device) -> str:
    return "sas" if config.softmax == "auto" else config.softmax


# Half of the interpreter's time would be spent on nothing. It computes at each operation whether integers overflow, but
# asserts that they do not only in debug mode. And it replaces Triton's language by its own at a launch, and searches
# all of it again at each call of a jitted function within the launch, where nothing is left to replace.
_builder = interpreter.interpreter_builder
_builder.options = dataclasses.replace(_builder.options, sanitize_overflow=_builder.options.debug)
_patch_language = interpreter._patch_lang


def _patch_language_once(function: FunctionType) -> Any:
    languages = _languages(function)
    if languages and not any(tl.core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()
    return _patch_language(function)


@functools.cache
def _languages(function: FunctionType) -> list[ModuleType]:
    """The modules of Triton's language that a function refers to."""
    return [x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_NAME, "1")
    # The interpreter's tensors are on a CPU, where "auto" is what no GPU kernel computes.
    monkeypatch.setattr(TurboConfig, "softmax_on", _softmax_on)
    monkeypatch.setattr(interpreter, "_patch_lang", _patch_language_once)
