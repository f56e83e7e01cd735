"""vLLM's API server as a process: started, asked, killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import processes

_PATIENCE = 1800  # seconds until it serves, or answers, beside other work too


class Server:
    """`python -m vllm.entrypoints.openai.api_server` with `options`, as `{"max-num-seqs": 8, "enforce-eager": None}`.

    Leaving the context kills its remaining processes.
    """

    def __init__(self, model: Path, options: Mapping[str, Any], more: Mapping[str, str], log: str):
        self.port = _free_port()
        call = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        call += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(self.port)]
        for name, value in options.items():
            call += [f"--{name}"] if value is None else [f"--{name}", str(value)]
        processes.BUILD.mkdir(parents=True, exist_ok=True)
        with (processes.BUILD / f"{log}.log").open("w", encoding="utf-8") as stream:
            # A session of its own: its engine is another process, which has to go with it.
            self._process = subprocess.Popen(
                call, env=processes.environment(more), stdout=stream, stderr=stream, start_new_session=True
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill it (SIGKILL) with the processes it started. Idempotent."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait(self) -> float:
        """Seconds until it serves. Raises RuntimeError if it exits before, or takes too long."""
        begin = time.monotonic()
        while time.monotonic() - begin < _PATIENCE:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return time.monotonic() - begin
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"the server did not serve within {_PATIENCE} s")

    def answer(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Greedy ids. Raises OSError if the server exits."""
        body = {"prompt": list(prompt), "max_tokens": tokens, "ignore_eos": True, "return_token_ids": True}
        return self.post("completions", body)["choices"][0]["token_ids"]

    def post(self, endpoint: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply of `/v1/ENDPOINT`, greedy. Raises OSError if the server exits."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/{endpoint}",
            data=json.dumps({"model": "model", "temperature": 0, **body}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_PATIENCE) as reply:
            return json.load(reply)


def ask(pool: ThreadPoolExecutor, server: Server, asked: Mapping[str, tuple[Sequence[int], int]]) -> dict[str, Future]:
    """All at once: name, prompt and tokens."""
    return {name: pool.submit(server.answer, prompt, tokens) for name, (prompt, tokens) in asked.items()}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
