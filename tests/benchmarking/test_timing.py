from __future__ import annotations

import pytest

from turboattention.benchmarking.timing import Effort, alternate, fastest


class Machine:
    """A clock that calls move."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, ""

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.log += name
            self.now += seconds

        return run

    def clock(self) -> float:
        return self.now


def test_turns() -> None:
    machine = Machine()
    a, b = machine.call("A", 1.0), machine.call("B", 3.0)
    pairs = alternate(a, b, Effort(seconds=8.0, sample=0.5, least=1), machine.clock, pause=0)
    assert machine.log == "AABB" + "ABAB"  # warm up each, then in turns until the time is up
    assert (pairs.a, pairs.b) == ([1.0, 1.0], [3.0, 3.0])


def test_short_calls_fill_a_sample_and_run_once_untimed() -> None:
    machine = Machine()
    effort = Effort(seconds=0.0, sample=0.1, least=2)
    pairs = alternate(machine.call("A", 0.01), machine.call("B", 0.05), effort, machine.clock, pause=0)
    assert machine.log == "AABB" + ("A" * 11 + "BB") * 2
    assert pairs.a == pytest.approx([0.01, 0.01])
    assert pairs.b == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize(("seconds", "pairs"), [(0.0, 3), (1e9, 7)])
def test_at_least_and_at_most(seconds: float, pairs: int) -> None:
    machine = Machine()
    call = machine.call("A", 1.0)
    assert len(alternate(call, call, Effort(seconds, least=3, most=7), machine.clock, pause=0).a) == pairs


def test_the_fastest_way() -> None:
    machine = Machine()
    ways = {"slow": machine.call("s", 2.0), "quick": machine.call("q", 1.0), "slower": machine.call("t", 3.0)}
    assert fastest(ways, clock=machine.clock) == "quick"
