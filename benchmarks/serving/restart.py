"""A server killed in the middle of requests and started again: whether it gives the same answers."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from server import Server, ask

Asked = Mapping[str, tuple[Sequence[int], int]]

_GONE = (OSError, http.client.HTTPException)


def restart(model: Path, options: Mapping[str, Any], more: Mapping[str, str], asked: Asked) -> dict[str, Any]:
    """first, second: answers before the kill and after the restart. lost: requests interrupted by the kill."""
    with ThreadPoolExecutor(len(asked)) as pool:
        with Server(model, options, more, "server-first") as server:
            print(f"  serves after {server.wait():.0f} s", flush=True)
            first = {name: answer.result() for name, answer in ask(pool, server, asked).items()}
            print(f"  {len(first)} answers; killed in the middle of as many more", flush=True)
            lost = _killed(pool, server, asked)
        with Server(model, options, more, "server-second") as server:
            seconds = server.wait()
            print(f"  {lost} requests were cut off; serves again after {seconds:.0f} s", flush=True)
            second = {name: answer.result() for name, answer in ask(pool, server, asked).items()}
    return {"first": first, "second": second, "lost": lost, "seconds_to_serve_again": seconds}


def _killed(pool: ThreadPoolExecutor, server: Server, asked: Asked) -> int:
    """Kill the server as soon as the first of many requests is answered; the number of unanswered ones."""
    pending = ask(pool, server, asked)
    while not any(answer.done() for answer in pending.values()):
        time.sleep(0.005)
    server.kill()
    lost = 0
    for answer in pending.values():
        problem = answer.exception()
        if problem is not None and not isinstance(problem, _GONE):
            raise problem
        lost += problem is not None
    return lost
