"""Peers in environments of their own: each runs in a worker process, which is driven by lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from .problem import Problem
from .timing import Measured

FOLDER = "TURBOATTENTION_PEERS"
"""Environment variable: the folder of the environments, instead of ``build/`` of the source tree."""

WORKERS = {"onnxruntime": "ort_gqa.py", "openvino": "openvino_sdpa.py"}
"""The script of each environment; `make peers-NAME` installs it."""

_SCRIPTS = Path(__file__).parent / "workers"


class WorkerError(Exception):
    """A worker could not be started, or could not execute a request."""


def missing(name: str) -> str | None:
    """Why the peers of an environment cannot be used here; None if they can."""
    if _python(name).exists():
        return None
    folder = _python(name).parents[1]
    return f"{folder} is not an environment: `make peers-{name}` creates it ({FOLDER} names another folder)"


def versions() -> dict[str, str]:
    """The releases of the installed peers, by the name of their environment."""
    found = {}
    for name in WORKERS:
        for info in _python(name).parents[1].glob(f"lib/python*/site-packages/{name}-*.dist-info"):
            found[name] = info.name.removeprefix(f"{name}-").removesuffix(".dist-info")
    return found


def _python(name: str) -> Path:
    named = os.environ.get(FOLDER)
    folder = Path(named) if named else Path(__file__).parents[3] / "build"
    return folder / f"peers-{name}" / "bin" / "python"


class Remote(Measured):
    """One attention call of a worker, over the tensors of a problem. The worker ends with this object.

    Raises:
        WorkerError: the peer refuses the problem, here or in a later call.
    """

    def __init__(self, name: str, problem: Problem, kind: str, threads: int):
        if problem.shape.batch != 1:
            raise WorkerError(f"batch: expected 1, got {problem.shape.batch}")
        self._folder = tempfile.TemporaryDirectory(prefix="turboattention-")
        self._errors = (Path(self._folder.name) / "stderr").open("w+", encoding="utf-8", errors="replace")
        # The same number of threads for all peers; the library chooses all other thread settings.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("PYTHONPATH", None)
        answers, write = os.pipe()
        self._answers = os.fdopen(answers, encoding="utf-8")
        self._process = subprocess.Popen(
            [str(_python(name)), str(_SCRIPTS / WORKERS[name]), str(write)],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            text=True,
            env=environment,
        )
        os.close(write)
        weakref.finalize(self, _end, self._process, self._answers, self._errors, self._folder)
        arrays = self._path("arrays.npz")
        np.savez(arrays, **{x: getattr(problem, x)[0].float().numpy() for x in "qkv"})
        build = {"arrays": arrays, "kind": kind, "causal": problem.shape.causal, "threads": threads}
        self.detail: str = self._ask({"build": build})["detail"]

    def __call__(self) -> Tensor:
        """One call, and its result [1, Hq, Lq, D] in float32."""
        path = self._path("out.npy")
        self._ask({"output": path})
        return torch.from_numpy(np.load(path))[None]

    def seconds(self, count: int) -> float:
        return self._ask({"run": count})["seconds"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()[-1:]
            raise WorkerError(f"the worker ended with exit status {self._process.wait()}: {' '.join(said)}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _path(self, name: str) -> str:
        return str(Path(self._folder.name) / name)


def _end(
    process: subprocess.Popen[str], answers: TextIO, errors: TextIO, folder: tempfile.TemporaryDirectory[str]
) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    answers.close()
    errors.close()
    folder.cleanup()
