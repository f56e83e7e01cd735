"""The loop of a worker: one line of JSON in, one line of JSON out, until its input ends.

A worker runs in another environment, which has neither PyTorch nor this package: standard library and NumPy only. It
times its own calls, so that no pipe and no other process is part of a measurement.

    {"build": {"arrays": PATH.npz, "kind": NAME, "causal": BOOL, "threads": N}}  ->  {"detail": TEXT}
    {"run": COUNT}                                                               ->  {"seconds": FLOAT}, of all calls
    {"output": PATH.npy}                                                         ->  {}, float32 [Hq, Lq, D] in the file

An exception is answered by ``{"error": TEXT}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Session(Protocol):
    """detail: a description of the implementation. `prepare` runs untimed before the calls of a sample. `output`: the
    result of a call over exactly the tokens of the arrays."""

    detail: str

    def prepare(self) -> None: ...
    def run(self) -> None: ...
    def output(self) -> np.ndarray: ...


def serve(build: Callable[[np.ndarray, np.ndarray, np.ndarray, str, bool, int], Session]) -> None:
    """Answer requests with what `build(q, k, v, kind, causal, threads)` returns; q [Hq, Lq, D], k, v [Hkv, Lk, D]."""
    # Libraries write to standard output, too, from their import on: the answers have a pipe of their own.
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    session: Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "build" in request:
                session = _built(build, **request["build"])
                answer: dict[str, Any] = {"detail": session.detail}
            else:
                assert session is not None
                answer = _answer(session, request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        answers.write(json.dumps(answer) + "\n")


def _built(build: Callable[..., Session], arrays: str, kind: str, causal: bool, threads: int) -> Session:
    with np.load(arrays) as found:
        return build(found["q"], found["k"], found["v"], kind, causal, threads)


def _answer(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    if "output" in request:
        np.save(request["output"], session.output())
        return {}
    session.prepare()
    begun = time.perf_counter()
    for _ in range(request["run"]):
        session.run()
    return {"seconds": time.perf_counter() - begun}
