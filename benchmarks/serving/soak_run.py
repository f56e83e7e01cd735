"""All of the soak's requests through one engine whose cache is too small for them."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import engine
from soak_requests import Request, requests_of

from turboattention import bundled

_WAITING = 32  # requests beyond those that can run
_SAMPLED = 5  # ended requests between two looks at the memory
_TOLD = 100


class Load:
    """answers: generated ids by request. aborted: aborted requests. memory: resident bytes as requests finished."""

    def __init__(self, served: Any, requests: list[Request], in_flight: int):
        self.served, self.total, self.in_flight = served, len(requests), in_flight
        self.coming = deque(requests)
        self.answers: dict[str, list[int]] = {}
        self.aborted: list[str] = []
        self.memory: list[int] = []
        self._deadlines: dict[str, float] = {}
        self._ended = self._step = 0

    def run(self, told: Any) -> None:
        while self.coming or self._deadlines:
            while self.coming and len(self._deadlines) < self.in_flight:
                self._add(self.coming.popleft())
            for output in self.served.step():
                self.answers[output.request_id] = list(output.outputs[0].token_ids)
                if output.finished:
                    self._end(output.request_id, told)
            self._step += 1
            due = [name for name, deadline in self._deadlines.items() if deadline <= self._step]
            if due:
                self.served.abort_request(due)
                self.aborted += due
                for name in due:
                    self._end(name, told)

    def _add(self, request: Request) -> None:
        self.served.add_request(request.name, {"prompt_token_ids": list(request.prompt)}, engine.greedy(request.output))
        self.answers[request.name] = []
        steps = float("inf") if request.abort_after is None else request.abort_after
        self._deadlines[request.name] = self._step + steps

    def _end(self, name: str, told: Any) -> None:
        del self._deadlines[name]
        self._ended += 1
        if self._ended % _SAMPLED == 0:
            self.memory.append(engine.resident_bytes())
        if self._ended % _TOLD == 0 or self._ended == self.total:
            told(self)

    @property
    def ended(self) -> int:
        return self._ended


def text_ids(llm: Any) -> list[int]:
    return llm.get_tokenizer()(bundled.text()).input_ids


def run(spec: dict[str, Any]) -> dict[str, Any]:
    llm = engine.start(spec["options"])
    requests = requests_of(spec["requests"], text_ids(llm), spec["seed"])
    begin = time.perf_counter()

    def told(load: Load) -> None:
        print(
            f"  {load.ended:,} of {load.total:,} ended, {len(load.aborted)} of them taken back, "
            f"{engine.counters(llm)['num_preemptions']:,} preemptions, {load.memory[-1] / 2**20:.1f} MiB resident, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )

    load = Load(llm.llm_engine, requests, spec["options"]["max_num_seqs"] + _WAITING)
    load.run(told)
    return {
        **engine.cache_facts(llm),
        **engine.counters(llm),
        **engine.drafts(llm),
        "answers": load.answers,
        "aborted": load.aborted,
        "memory": load.memory,
        "memory_every": _SAMPLED,
        "shared_prefixes": sum(request.shared for request in requests),
        "seconds": time.perf_counter() - begin,
        "facts": engine.facts(),
    }
