"""LoRA adapters and structured output, beside requests without them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from .answers import MOVED_BY_SHAPE, Answer, answer, assert_same, greedy, metric, prompts
from .models import save_adapter

LENGTHS = (5, 64, 130, 200, 250)
BUSY: dict[str, Any] = dict(
    block_size=64, max_num_batched_tokens=60, num_gpu_blocks_override=11, max_num_seqs=6, max_model_len=512
)


@pytest.fixture(scope="module")
def asked(token_ids) -> list[dict[str, list[int]]]:
    return prompts(token_ids, LENGTHS)


def test_adapters(start, asked, tmp_path) -> None:
    """An adapted request answers as the model with the adapter merged, and shares no block with one that is not."""
    from vllm.lora.request import LoRARequest

    adapter, merged = save_adapter(tmp_path)
    plain, adapted = answer(start(), asked), answer(start(model=str(merged)), asked)
    assert all(a.tokens != b.tokens for a, b in zip(plain, adapted, strict=True))
    llm = start(enable_lora=True, max_lora_rank=8, **BUSY)
    which = [None, LoRARequest("adapter", 1, str(adapter))]
    pairs = [(prompt, lora) for prompt in asked for lora in which]
    for _ in range(2):
        outputs = llm.generate(
            [prompt for prompt, _ in pairs], greedy(40), lora_request=[lora for _, lora in pairs], use_tqdm=False
        )
        got = [Answer.of(output) for output in outputs]
        assert_same(got[::2], plain, MOVED_BY_SHAPE)
        assert_same(got[1::2], adapted, MOVED_BY_SHAPE)
    assert metric(llm, "prefix_cache_hits") > 0


def test_structured_output(start, asked) -> None:
    """It follows its grammar, also where preempted, and other requests are not changed by it."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    kinds = [
        StructuredOutputsParams(json=schema, disable_any_whitespace=True),
        StructuredOutputsParams(regex="[a-z]{3} [0-9]{70}"),
        StructuredOutputsParams(choice=["yes, sir", "no, sir"]),
    ]
    constrained = [SamplingParams(temperature=0, max_tokens=90, structured_outputs=kind) for kind in kinds]
    idle = start(enable_prefix_caching=False)
    solo = [answer(idle, [prompt], max_tokens=90)[0] for prompt in asked]
    busy = start(**BUSY)
    pairs = [(prompt, params) for prompt in asked for params in (*constrained, greedy(90))]
    outputs = busy.generate([prompt for prompt, _ in pairs], [params for _, params in pairs], use_tqdm=False)
    assert metric(busy, "num_preemptions") > 0
    assert_same([Answer.of(output) for output in outputs[3::4]], solo, MOVED_BY_SHAPE)
    texts = [output.outputs[0].text for output in outputs]
    assert all(set(json.loads(text)) == {"name", "age"} for text in texts[::4])
    assert all(re.fullmatch("[a-z]{3} [0-9]{70}", text) for text in texts[1::4])
    assert {*texts[2::4]} <= {"yes, sir", "no, sir"}
