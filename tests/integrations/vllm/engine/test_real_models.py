"""Models that people serve, behind vLLM's API server at 4 bits and with vLLM's own attention: `make vllm-models
MODELS='smollm2=FOLDER qwen=FOLDER gemma3=FOLDER'`. In float32, so that only the cache differs."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from turboattention import bundled

VARIABLE = "TURBOATTENTION_MODELS"
SERVING = Path(__file__).parents[4] / "benchmarks" / "serving"
OPTIONS = {"dtype": "float32", "max-model-len": 2048, "max-num-seqs": 4, "max-num-batched-tokens": 512}
OPTIONS |= {"kv-cache-memory-bytes": 256 << 20, "block-size": 64, "enforce-eager": None}
TEXT = bundled.text()[:4000]
BLOCK = 64
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@dataclass(frozen=True)
class Model:
    """agreement: the least share of tokens of a text at which the likeliest next token is that of the stock backend.
    perplexity: the most that the text's perplexity may grow, relatively."""

    label: str
    chat: bool
    tools: bool
    agreement: float
    perplexity: float


MODELS = (
    Model("smollm2", chat=True, tools=False, agreement=0.90, perplexity=0.03),
    Model("qwen", chat=True, tools=True, agreement=0.90, perplexity=0.03),
    Model("gemma3", chat=False, tools=False, agreement=0.90, perplexity=0.03),
)


@dataclass(frozen=True)
class Served:
    """What one server gave. best: the likeliest token at each place of the text, from the second on. nats: the mean
    negative log-probability of the text's tokens. call: of a tool, its name and arguments. told: what the model says of
    the tool's result."""

    completion: str
    best: list[int]
    nats: float
    chat: str | None
    call: tuple[str, dict[str, Any]] | None
    told: str | None

    @classmethod
    def ask(cls, server: Any, model: Model) -> Served:
        reading = server.post("completions", {"prompt": TEXT, "max_tokens": 1, "prompt_logprobs": 1})
        places = reading["choices"][0]["prompt_logprobs"][1:]
        # The text's own token comes first, and then the likeliest, unless they are the same.
        own = [next(iter(place.values()))["logprob"] for place in places]
        completion = server.post("completions", {"prompt": TEXT[:1500], "max_tokens": 32})["choices"][0]["text"]
        chat = say(server, QUESTION)["content"] if model.chat else None
        call, told = use_tool(server) if model.tools else (None, None)
        return cls(completion, [likeliest(place) for place in places], -sum(own) / len(own), chat, call, told)


def say(server: Any, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """The message that follows."""
    body = {"messages": messages, "max_tokens": 64, **options}
    return server.post("chat/completions", body)["choices"][0]["message"]


def use_tool(server: Any) -> tuple[tuple[str, dict[str, Any]], str]:
    """The model calls the tool, and is given a result."""
    asked = {"role": "user", "content": "What is the weather in Paris?"}
    calling = say(server, [asked], tools=[TOOL], tool_choice=NAMED)
    (call,) = calling["tool_calls"]
    made = {"role": "assistant", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "18 degrees Celsius and sunny"}
    told = say(server, [asked, made, result], tools=[TOOL], tool_choice="none")["content"]
    return (call["function"]["name"], json.loads(call["function"]["arguments"])), told


def likeliest(place: dict[str, Any]) -> int:
    return next(int(token) for token, found in place.items() if found["rank"] == 1)


def folder_of(label: str) -> Path:
    """Skips where there is no such model."""
    given = dict(pair.split("=", 1) for pair in os.environ.get(VARIABLE, "").split())
    wanted = f"make vllm-models MODELS='{label}=FOLDER', with a model in Hugging Face's format"
    if label not in given:
        pytest.skip(f"{label}: no folder was given ({wanted})")
    if not Path(given[label], "config.json").exists():
        pytest.skip(f"{label}: no model in {given[label]} ({wanted})")
    return Path(given[label])


@pytest.fixture(scope="module")
def serve() -> Any:
    """Ask a model's questions of a server with these bits, or of the stock one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SERVING))
        server = importlib.import_module("server")

    def serve(model: Model, bits: str) -> Served:
        options = OPTIONS | ({"enable-auto-tool-choice": None, "tool-call-parser": "hermes"} if model.tools else {})
        name = f"{model.label}-{bits or 'stock'}"
        with server.Server(folder_of(model.label), options, {"TURBOATTENTION_VLLM": bits}, name) as running:
            running.wait()
            return Served.ask(running, model)

    return serve


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.label)
def test_beside_the_stock_backend(serve: Callable[[Model, str], Served], model: Model) -> None:
    folder_of(model.label)
    stock, ours = serve(model, ""), serve(model, "4")
    pairs = list(zip(ours.best, stock.best, strict=True))[BLOCK:]  # before them nothing is read from a packed block
    agreement = sum(a == b for a, b in pairs) / len(pairs)
    grown = math.exp(ours.nats - stock.nats) - 1
    told = [f"\n{model.label}: {agreement:.1%} of {len(pairs)} likeliest tokens are equal, perplexity {grown:+.2%}"]
    told += [
        f"  {name}: {getattr(one, name)!r}" for name in ("completion", "chat", "call", "told") for one in (ours, stock)
    ]
    sys.stdout.write("\n".join(told) + "\n")
    assert agreement >= model.agreement
    assert abs(grown) <= model.perplexity
    assert len(ours.completion) > 40
    if model.chat:
        assert "Paris" in (ours.chat or "")
    if model.tools:
        assert ours.call == stock.call == ("get_weather", {"city": "Paris"})
        assert "18" in (ours.told or "")
