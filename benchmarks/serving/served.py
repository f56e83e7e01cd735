"""What a model served by vLLM's API server gives: a completion, a text read as a prompt, a chat, a tool call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server import Server

from turboattention import bundled

TEXT = bundled.text()[:4000]
QUESTION = {"role": "user", "content": "What is the capital of France? Answer in one short sentence."}
WEATHER = {"role": "user", "content": "What is the weather in Paris?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
RESULT = "18 degrees Celsius and sunny"


@dataclass(frozen=True)
class Abilities:
    """chat: whether the tokenizer has a template for chats. tools: whether the template has a place for tools."""

    chat: bool
    tools: bool

    @classmethod
    def of(cls, folder: Path) -> Abilities:
        file = folder / "chat_template.jinja"
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = file.read_text(encoding="utf-8") if file.exists() else str(settings.get("chat_template") or "")
        return cls(bool(template), "tools" in template)


@dataclass(frozen=True)
class Answers:
    """best: the likeliest token at each place of the text, from the second on. nats: negative log-probabilities of the
    text's own tokens there. chat: the answer to `QUESTION`. call: name and arguments of the call of `TOOL`. told: what
    the model says of the call's result. The last three are None for models that lack the ability."""

    completion: str
    best: tuple[int, ...]
    nats: tuple[float, ...]
    chat: str | None
    call: dict[str, Any] | None
    told: str | None


def ask(server: Server, abilities: Abilities) -> Answers:
    reading = server.post("completions", {"prompt": TEXT, "max_tokens": 1, "prompt_logprobs": 1})
    places = reading["choices"][0]["prompt_logprobs"][1:]
    # The text's own token comes first, and then the likeliest, unless they are the same.
    nats = tuple(-next(iter(place.values()))["logprob"] for place in places)
    completion = server.post("completions", {"prompt": TEXT[:1500], "max_tokens": 32})["choices"][0]["text"]
    chat = _say(server, [QUESTION])["content"] if abilities.chat else None
    call, told = _use_tool(server) if abilities.tools else (None, None)
    return Answers(completion, tuple(map(_likeliest, places)), nats, chat, call, told)


def _likeliest(place: dict[str, Any]) -> int:
    return next(int(token) for token, found in place.items() if found["rank"] == 1)


def _say(server: Server, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """The message that follows."""
    body = {"messages": messages, "max_tokens": 64, **options}
    return server.post("chat/completions", body)["choices"][0]["message"]


def _use_tool(server: Server) -> tuple[dict[str, Any], str]:
    """The model calls the tool, and is given `RESULT`."""
    (call,) = _say(server, [WEATHER], tools=[TOOL], tool_choice=NAMED)["tool_calls"]
    made = {"role": "assistant", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": RESULT}
    told = _say(server, [WEATHER, made, result], tools=[TOOL], tool_choice="none")["content"]
    function = call["function"]
    return {"name": function["name"], "arguments": json.loads(function["arguments"])}, told
