"""Requests to a served model: a text to score, a continuation, a chat, and a tool call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from server import Server

from turboattention import bundled

TEXT = bundled.document()[:4000]  # not the text that calibrations are measured on
BEGINNING = TEXT[: TEXT.index("\n", 1500)]
QUESTION = "What is the capital of France? Answer in one short sentence."
WEATHER = "What is the weather in Paris?"
RESULT = "18 degrees Celsius and sunny"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_NAMED = {"type": "function", "function": {"name": "get_weather"}}


@dataclass(frozen=True)
class Answers:
    """The answers of one server. best: the likeliest token at each position of the text, from the second on. nats: the
    mean negative log-probability of the text's tokens. completion: the continuation of the beginning of the text. chat:
    the answer to the question. call: the name and arguments of the tool call; told: the answer given the tool's result;
    None if the model was not asked."""

    best: list[int]
    nats: float
    completion: str
    chat: str
    call: tuple[str, dict[str, Any]] | None
    told: str | None


def ask(server: Server, *, tools: bool) -> Answers:
    reading = server.post("completions", {"prompt": TEXT, "max_tokens": 1, "prompt_logprobs": 1})
    positions = reading["choices"][0]["prompt_logprobs"][1:]
    # The text's own token comes first, and then the likeliest, unless they are the same.
    own = [next(iter(position.values()))["logprob"] for position in positions]
    completion = server.post("completions", {"prompt": BEGINNING, "max_tokens": 32})["choices"][0]["text"]
    said = _say(server, [_user(QUESTION)])["content"]
    call, told = _use_tool(server) if tools else (None, None)
    return Answers([_likeliest(each) for each in positions], -sum(own) / len(own), completion, said, call, told)


def _use_tool(server: Server) -> tuple[tuple[str, dict[str, Any]], str]:
    """The model calls the tool, and is given a result."""
    asked = _user(WEATHER)
    (call,) = _say(server, [asked], tools=[TOOL], tool_choice=_NAMED)["tool_calls"]
    made = {"role": "assistant", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": RESULT}
    told = _say(server, [asked, made, result])["content"]
    return (call["function"]["name"], json.loads(call["function"]["arguments"])), told


def _say(server: Server, messages: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """The message that follows."""
    body = {"messages": messages, "max_tokens": 64, **options}
    return server.post("chat/completions", body)["choices"][0]["message"]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _likeliest(position: dict[str, Any]) -> int:
    return next(int(token) for token, found in position.items() if found["rank"] == 1)
