"""Engines of the bundled model, in this process, so that a test sees the scheduler and the side pool.

What needs vLLM is left out where it is not installed: `make vllm-test` runs it, in an environment of its own.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from turboattention import bundled

MODEL = Path(bundled.__file__).parent / "model"
TEXT = Path(bundled.__file__).parent / "text.txt"

if find_spec("vllm") is None:
    collect_ignore_glob = ["engine/*"]
else:
    os.environ.update(
        TURBOATTENTION_VLLM="1",
        VLLM_CPU_CI_ENV="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM issues warnings of its own."""
    for item in items:
        if "engine" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Any]]:
    """Start an engine, in this process or in some of its own; all are gone with the module's last test."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    started: list[Any] = []

    def start(processes: bool = False, **options: Any) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(processes))
        defaults = {
            "model": str(MODEL),
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 32 << 20,
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "seed": 0,
            "disable_log_stats": False,
        }
        started.append(LLM(**(defaults | options)))
        return started[-1]

    yield start
    for llm in started:
        llm.llm_engine.engine_core.shutdown()
    started.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def token_ids() -> list[int]:
    """The bundled text."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)(TEXT.read_text()).input_ids
