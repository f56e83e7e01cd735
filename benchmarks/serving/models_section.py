"""The measured section of docs/serving.md on served models' answers."""

from __future__ import annotations

from typing import Any

from sections import machine, markdown

_ASKED = (
    ("completion", "continue the beginning of a story"),
    ("chat", "*What is the capital of France?*"),
    ("call", "*What is the weather in Paris?*, with a tool"),
    ("told", "the same, followed by the tool's result"),
)


def models(document: dict[str, Any], name: str) -> str:
    rows, answers = [], []
    for found in document["models"]:
        for row in found["rows"][1:]:
            rows.append([found["model"], row["title"], f"{row['top1']:.1%}", f"{row['perplexity']:+.2%}"])
        for key, asked in _ASKED:
            said: dict[str, list[str]] = {}
            for row in found["rows"]:
                if row[key] is not None:
                    said.setdefault(_told(row[key]), []).append(row["title"])
            answers += [[found["model"], asked, "; ".join(caches), text] for text, caches in said.items()]
    return "\n\n".join(
        [
            "## Real models behind the server",
            machine(document["facts"]),
            "Over vLLM's API, in float32, so that only the cache differs: the fp8 cache and the packed caches compared "
            "with vLLM's own cache. *top-1*: the share of positions of a text, after its first 64 tokens, at which "
            "both rank the same token first; *perplexity*: its relative change. *calibrated*: with an order of K's "
            "channels, and for Qwen also means of K, measured on another text.",
            markdown(["model", "cache", "top-1", "perplexity"], rows),
            "The answers (greedy):",
            markdown(["model", "request", "cache", "answer"], answers),
        ]
    )


def _told(answer: str | list[Any]) -> str:
    if isinstance(answer, list):
        function, arguments = answer
        answer = f"{function}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
    return "`" + " ".join(answer.replace("|", "\\|").replace("`", "'").split()) + "`"
