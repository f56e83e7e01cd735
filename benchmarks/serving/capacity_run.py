"""One engine, started for its number of blocks."""

from __future__ import annotations

from typing import Any

import engine


def run(spec: dict[str, Any]) -> dict[str, Any]:
    llm = engine.start(spec["options"])
    # Checks that it can serve.
    answer = llm.generate({"prompt_token_ids": list(range(10, 110))}, engine.greedy(4), use_tqdm=False)
    assert len(answer[0].outputs[0].token_ids) == 4
    return engine.cache_facts(llm) | {"facts": engine.facts()}
