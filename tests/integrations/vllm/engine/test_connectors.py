"""Full blocks leave an engine through a connector of vLLM, and another engine reads them: the same bytes, so the same
answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .answers import answer, assert_same, metric, prompts

LENGTHS = (40, 66, 130, 200, 300)
BLOCK = 64


def through(folder: Path) -> Any:
    """A connector that stores the full blocks of every new prompt in files, and loads those of a prompt it knows."""
    from vllm.config import KVTransferConfig

    where = {"shared_storage_path": str(folder)}
    return KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both", kv_connector_extra_config=where)


def test_blocks_of_another_engine(start, token_ids, tmp_path) -> None:
    asked = prompts(token_ids, LENGTHS)
    options: dict[str, Any] = {"block_size": BLOCK, "additional_config": {"turboattention": {"bits": 8}}}
    wanted = answer(start(**options), asked)

    def served() -> int:
        """Each engine in a process of its own, for which vLLM has one connector; the tokens that it loaded."""
        llm = start(processes=True, kv_transfer_config=through(tmp_path), **options)
        before = metric(llm, "external_prefix_cache_hits")
        assert_same(answer(llm, asked), wanted)
        llm.llm_engine.engine_core.shutdown()
        return round(metric(llm, "external_prefix_cache_hits") - before)

    assert served() == 0
    assert served() == sum((length - 1) // BLOCK * BLOCK for length in LENGTHS)
