"""How far the next-token distributions over a served cache are from those over an exact one: a text read as a prompt.

The reference run reads it with vLLM's own attention, writes its log-probabilities, and reads it again with keys and
values rounded to e4m3 as they are stored, which is what `--kv-cache-dtype fp8` does without scales. Other runs are
compared with what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import torch
from torch import Tensor

from turboattention import bundled

_FROM = 64  # before this token, nothing is read from a packed block


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """The figures of "fp8", or of "own" where `spec["reference"]` exists already."""
    llm = engine.start(spec["options"])
    ids = llm.get_tokenizer()(bundled.text()).input_ids[: spec["tokens"]]
    file = Path(spec["reference"])
    if file.exists():
        return {"own": _figures(torch.load(file, mmap=True), _read(llm, ids), ids), "facts": engine.facts()}
    exact = _read(llm, ids)
    torch.save(exact, file)
    with_fp8()
    return {"fp8": _figures(exact, _read(llm, ids), ids), "facts": engine.facts()}


def with_fp8() -> None:
    """From now on vLLM's own attention stores keys and values as e4m3 holds them."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    store = CPUAttentionBackendImpl.do_kv_cache_update

    def rounded(self: Any, layer: Any, key: Tensor, value: Tensor, *others: Any) -> None:
        store(self, layer, e4m3(key), e4m3(value), *others)

    CPUAttentionBackendImpl.do_kv_cache_update = rounded


def e4m3(x: Tensor) -> Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).to(x.dtype)


def _read(llm: Any, ids: list[int]) -> Tensor:
    """float32 log-probabilities [tokens - 1, vocabulary], of the token after each one."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    parts: list[Tensor] = []
    compute = model.compute_logits
    model.compute_logits = _kept(compute, parts)
    try:
        llm.generate({"prompt_token_ids": ids}, engine.greedy(1, prompt_logprobs=0), use_tqdm=False)
    finally:
        model.compute_logits = compute
    read = torch.cat(parts)
    assert len(read) == len(ids) - 1, f"{len(read)} rows of logits for {len(ids)} tokens"
    return read.float().log_softmax(-1)


def _kept(compute: Callable[..., Tensor], parts: list[Tensor]) -> Callable[..., Tensor]:
    """Also called for the one token that is sampled in each step, which is not of the text."""

    def keep(hidden: Tensor, *others: Any) -> Tensor:
        logits = compute(hidden, *others)
        if len(hidden) > 1:
            parts.append(logits.clone())
        return logits

    return keep


def _figures(exact: Tensor, got: Tensor, ids: list[int]) -> dict[str, float]:
    """kl: nats, from `exact`, mean. top1: share of equal likeliest tokens. perplexity: of the text, and its change."""
    exact, got, following = exact[_FROM:], got[_FROM:], torch.tensor(ids[_FROM + 1 :])[:, None]
    nats, exact_nats = (-x.gather(1, following).mean().item() for x in (got, exact))
    kl = torch.stack([(a.exp() * (a - b)).sum() for a, b in zip(exact, got, strict=True)])
    perplexity, before = (torch.tensor(x).exp().item() for x in (nats, exact_nats))
    return {
        "kl": kl.mean().item(),
        "top1": (exact.argmax(-1) == got.argmax(-1)).float().mean().item(),
        "perplexity": perplexity,
        "perplexity_change": perplexity / before - 1,
    }
