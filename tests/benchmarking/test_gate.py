"""A wrong result is not timed."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from turboattention.benchmarking import sdpa
from turboattention.benchmarking.compare import measure
from turboattention.benchmarking.contenders import Contender, turbo
from turboattention.benchmarking.gate import WrongResultError, check
from turboattention.benchmarking.peers import PEERS, Peer, peers_for
from turboattention.benchmarking.problem import Problem, Shape, make_problem
from turboattention.benchmarking.records import Row
from turboattention.benchmarking.timing import Effort
from turboattention.config import TurboConfig
from turboattention.reference.exact import exact_attention

CONFIG = TurboConfig()
BRIEF = Effort(seconds=0.0, sample=0.0, least=1)


@pytest.fixture(scope="module")
def prefill() -> Problem:
    return make_problem(Shape(4, 2, 32, 130, 130, causal=True))


@pytest.fixture(scope="module")
def decode() -> Problem:
    return make_problem(Shape(4, 2, 32, 1, 200)).with_cache(CONFIG)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (7, 7), (130, 130), (65, 127)])
def test_the_rows_looked_at_are_exact(queries: int, keys: int, causal: bool) -> None:
    problem = make_problem(Shape(4, 2, 32, queries, keys, causal))
    whole = exact_attention(problem.q, problem.k, problem.v, is_causal=causal)[0]
    assert problem.expected.error(whole) < 1e-12


@pytest.mark.parametrize("row", [0, 64, 129])
def test_a_wrong_row_is_seen_at_both_ends_and_in_the_middle(prefill: Problem, row: int) -> None:
    out = exact_attention(prefill.q, prefill.k, prefill.v, is_causal=True)[0]
    out[:, :, row] += 1
    with pytest.raises(WrongResultError, match=r"who: relative error 0\.\d+ .* above its bound 0.01"):
        check("who", out, prefill.expected, 0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_wrong(prefill: Problem, value: float) -> None:
    out = torch.full_like(prefill.q, value)
    with pytest.raises(WrongResultError):
        check("who", out, prefill.expected, float("1e300"))


def test_zeros_are_wrong_within_every_bound(decode: Problem) -> None:
    bounds = [peer.make(decode, "reference").bound for peer in peers_for(["sdpa", "sdpa-bf16"], decode, CONFIG)]
    assert decode.expected.error(torch.zeros_like(decode.q)) == pytest.approx(1.0)
    assert max(bounds) < 1


def test_the_subject_and_its_peers_pass(prefill: Problem, decode: Problem) -> None:
    for problem in (prefill, decode):
        assert turbo(problem, "reference", CONFIG).check() < 0.05
        for peer in peers_for(list(PEERS), problem, TurboConfig(bits=3)):
            if peer.missing() is None:
                assert peer.make(problem, "reference").check() < 0.3


def test_decode_is_judged_over_what_is_stored(decode: Problem) -> None:
    coarse = decode.with_cache(TurboConfig(bits=2))
    found = turbo(coarse, "reference", CONFIG)
    assert found.check() < 0.05
    assert coarse.expected.error(found.output(found.call())) > 0.1


def test_operations() -> None:
    assert Shape(8, 2, 64, 5, 7).operations == 4 * 8 * 64 * 35
    assert Shape(8, 2, 64, 3, 3, causal=True).operations == 4 * 8 * 64 * 6
    assert Shape(8, 2, 64, 2, 3, causal=True).operations == 4 * 8 * 64 * 5


@pytest.mark.parametrize("heads", [2, 4])
def test_every_way_to_call_sdpa_agrees(heads: int) -> None:
    problem = make_problem(Shape(heads, 2, 32, 1, 50))
    q, k, v = problem.q, problem.k, problem.v
    want = sdpa.grouped(q, k, v, False)
    _, direct = sdpa.best(q, k, v, False, folded=False)
    torch.testing.assert_close(direct(), want)
    assert sdpa.can_fold(q, 2) == (heads > 2)
    torch.testing.assert_close(sdpa.folded(q, k, v, False).reshape(q.shape), want)


# -- measuring ----------------------------------------------------------------------------------


def wrong(problem: Problem, backend: str) -> Contender:
    def fail() -> torch.Tensor:
        calls.append(1)
        return torch.zeros_like(problem.q)

    return Contender("wrong peer", fail, problem.expected, 0.3)


calls: list[int] = []


def row_of(problem: Problem) -> Row:
    return Row("prefill", asdict(problem.shape), None, "turboattention reference", "float32")


def test_a_wrong_peer_is_not_timed(prefill: Problem) -> None:
    calls.clear()
    peers = [Peer("wrong", "", wrong), PEERS["sdpa"]]
    row = measure(row_of(prefill), turbo(prefill, "reference", CONFIG), prefill, peers, "reference", BRIEF)
    refused, good = row.rivals
    assert len(calls) == 1  # for the check
    assert refused.refused is not None
    assert "wrong peer: relative error 1 " in refused.refused
    assert (refused.seconds, refused.ratio, refused.gops) == (None, None, None)
    assert good.ratio is not None
    assert row.refused is None
    assert row.gops is not None


def test_a_wrong_subject_is_not_timed_nor_are_its_peers(prefill: Problem) -> None:
    calls.clear()
    subject = replace(wrong(prefill, ""), name="turboattention")
    row = measure(row_of(prefill), subject, prefill, [PEERS["sdpa"]], "reference", BRIEF)
    assert len(calls) == 1
    assert row.refused is not None
    assert (row.seconds, row.rivals) == (None, [])


def test_an_absent_peer_says_why(prefill: Problem) -> None:
    absent = replace(PEERS["sdpa"], name="absent", missing=lambda: "not here")
    row = measure(row_of(prefill), turbo(prefill, "reference", CONFIG), prefill, [absent], "reference", BRIEF)
    assert row.rivals[0].refused == "not here"
    assert row.seconds is not None
