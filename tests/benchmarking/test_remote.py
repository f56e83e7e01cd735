"""Peers in other environments: the protocol with a worker of its own, and the real ones where they are installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from turboattention import TurboConfig
from turboattention.benchmarking import remote
from turboattention.benchmarking.compare import measure
from turboattention.benchmarking.contenders import turbo
from turboattention.benchmarking.peers import PEERS, peers_for
from turboattention.benchmarking.problem import Problem, Shape, make_problem
from turboattention.benchmarking.records import Row
from turboattention.benchmarking.stepping import STORES, Step, step
from turboattention.benchmarking.timing import Effort

CONFIG = TurboConfig(bits=4, block_size=16)
SHORT = Effort(seconds=0.0, sample=0.0, least=1, most=1)

WORKER = """
import numpy as np
from serve import serve
print("a library talks")

class Exact:
    detail = "fake 1.0"
    def __init__(self, q, k, v, kind, causal, threads):
        if kind == "refused":
            raise ValueError("kind: expected another")
        self.q, self.k, self.v, self.bad, self.kind, self.runs = q, k, v, kind == "wrong", kind, 0
        self.threads = threads
    def prepare(self):
        pass
    def run(self):
        self.runs += 1
        if self.kind == "dies":
            import os
            print("out of memory", flush=True)
            os._exit(3)
    def output(self):
        group = len(self.q) // len(self.k)
        k, v = (x.repeat(group, 0).astype(np.float64) for x in (self.k, self.v))
        s = self.q @ k.transpose(0, 2, 1) / self.q.shape[2] ** 0.5
        p = np.exp(s - s.max(-1, keepdims=True))
        return ((p / p.sum(-1, keepdims=True)) @ v * (2 if self.bad else 1)).astype(np.float32)

serve(Exact)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment `fake`, whose Python is this one."""
    scripts = tmp_path / "workers"
    scripts.mkdir()
    serve = Path(remote.__file__).parent / "workers" / "serve.py"
    (scripts / "serve.py").write_text(serve.read_text(encoding="utf-8"), encoding="utf-8")
    (scripts / "fake.py").write_text(WORKER, encoding="utf-8")
    python = tmp_path / "peers-fake" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (tmp_path / "peers-fake" / "lib" / "python3" / "site-packages" / "fake-1.2.dist-info").mkdir(parents=True)
    monkeypatch.setenv(remote.FOLDER, str(tmp_path))
    monkeypatch.setattr(remote, "_SCRIPTS", scripts)
    monkeypatch.setattr(remote, "WORKERS", {"fake": "fake.py"})
    return tmp_path


@pytest.fixture
def problem() -> Problem:
    return make_problem(Shape(2, 1, 32, 1, 50)).with_cache(CONFIG)


def test_a_worker_answers(worker: Path, problem: Problem) -> None:
    call = remote.Remote("fake", problem, "exact", 1)
    assert call.detail == "fake 1.0"
    assert problem.expected.error(call()) < 1e-6
    assert 0 <= call.seconds(3) < 1
    process = call._process
    del call
    assert process.returncode is not None


def test_what_a_worker_says_about_its_end(worker: Path, problem: Problem) -> None:
    with pytest.raises(remote.WorkerError, match="ValueError: kind: expected another"):
        remote.Remote("fake", problem, "refused", 1)
    call = remote.Remote("fake", problem, "dies", 1)
    with pytest.raises(remote.WorkerError, match="the worker ended with exit status 3: out of memory"):
        call.seconds(1)
    with pytest.raises(remote.WorkerError, match="the worker ended with"):
        call.seconds(1)


def test_one_sequence_at_a_time(worker: Path) -> None:
    with pytest.raises(remote.WorkerError, match="batch: expected 1, got 2"):
        remote.Remote("fake", make_problem(Shape(2, 1, 32, 1, 8, batch=2)), "exact", 1)


def test_versions_and_absence(worker: Path) -> None:
    assert remote.versions() == {"fake": "1.2"}
    assert remote.missing("fake") is None
    assert "peers-openvino is not an environment: `make peers-openvino`" in str(remote.missing("openvino"))


@pytest.mark.parametrize(("kind", "refused"), [("exact", None), ("wrong", "relative error"), ("refused", "kind: exp")])
def test_a_storing_peer_is_compared_with_steps(worker: Path, problem: Problem, kind: str, refused: str | None) -> None:
    from turboattention.benchmarking import peers

    peer = peers._of_engine("fake", "Fake", "fake", kind, 1e-4)
    row = Row("decode", {}, "4 bits", "t", "float32")
    measured = measure(row, turbo(problem, "reference", CONFIG), problem, [peer], "reference", SHORT)
    (rival,) = measured.rivals
    assert measured.seconds is not None
    assert (rival.ratio is None) == (refused is not None)
    assert refused is None or refused in str(rival.refused)
    if refused is None:
        assert rival.detail == f"fake 1.0; on both sides {STORES}"
        # The times of the row are those of attention without storing: of the subject compared with itself.
        assert measured.seconds.count == 2


def test_a_step_stores_one_token_in_whole_blocks(problem: Problem) -> None:
    contender = step(problem, "reference")
    assert 0 < contender.check() < contender.bound
    call = Step(problem, "reference")
    assert call.least == 16
    assert len(call.stored()) == 50
    assert call.seconds(17) > 0
    assert len(call._growing.cache()) == 49 + 32
    call()
    assert len(call._growing.cache()) == 49 + 32


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (Shape(4, 2, 32, 1, 64), {"ort-f32", "ort-int8", "ort-int4", "openvino-f32", "openvino-u8", "openvino-u4"}),
        (Shape(4, 2, 32, 16, 64), set()),
        (Shape(4, 2, 32, 64, 64, causal=True), {"ort-f32"}),
        (Shape(4, 2, 32, 64, 64), set()),
    ],
)
def test_where_the_engines_apply(shape: Shape, names: set[str]) -> None:
    config = TurboConfig()
    problem = make_problem(shape)
    problem = problem if shape.queries == shape.keys else problem.with_cache(config)
    engines = [name for name in PEERS if name.startswith(("ort-", "openvino-"))]
    assert {peer.name for peer in peers_for(engines, problem, config)} == names


ENGINES = [name for name in PEERS if name.startswith(("ort-", "openvino-")) and PEERS[name].missing() is None]


@pytest.mark.skipif(not ENGINES, reason="no environment of a peer is here")
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_agrees_with_exact_attention(name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        problem = make_problem(Shape(4, 2, 64, 1, 96)).with_cache(TurboConfig())
        contender = PEERS[name].make(problem, "cpu")
        error = contender.check()
        assert error < contender.bound
        assert error > 1e-3 or name.endswith("f32"), "a quantized cache has an error"
        assert contender.call.seconds(2) > 0  # type: ignore[attr-defined]
        assert contender.check() == error
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif("ort-f32" not in ENGINES, reason="ONNX Runtime is not here")
def test_a_causal_prompt() -> None:
    problem = make_problem(Shape(4, 2, 64, 48, 48, causal=True))
    assert PEERS["ort-f32"].make(problem, "cpu").check() < 1e-5


def test_workers_import_nothing_of_this_package() -> None:
    for path in (Path(remote.__file__).parent / "workers").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "torch" not in [line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))]
        assert "turboattention" not in text
    assert os.listdir(Path(remote.__file__).parent / "workers")
