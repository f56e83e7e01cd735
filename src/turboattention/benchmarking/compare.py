"""Compares a subject with its peers: each is checked, then timed alternately with the subject."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .contenders import Contender
from .gate import WrongResultError
from .peers import Peer
from .problem import Problem
from .records import Rival, Row
from .statistics import paired_ratio, spread
from .timing import Effort, alternate

Say = Callable[[str], None]


def measure(
    row: Row,
    subject: Contender,
    problem: Problem,
    peers: Sequence[Peer],
    backend: str,
    effort: Effort,
    say: Say = lambda _: None,
) -> Row:
    """`row` with the measurements. If the result of the subject is wrong, neither it nor its peers are timed."""
    say(subject.name)
    try:
        error = subject.check()
    except WrongResultError as wrong:
        return replace(row, refused=str(wrong))
    rivals, own = [], []
    for peer in peers:
        say(peer.name)
        rival, seconds = _beside(subject, peer, problem, backend, effort)
        rivals.append(rival)
        own += seconds
        # Caches of peers are large, and some are allocated outside of torch.
        gc.collect()
    if not own:
        own = _alone(subject, effort)
    seconds = spread(own)
    gops = problem.shape.operations / seconds.median / 1e9
    return replace(row, error=error, seconds=seconds, gops=gops, rivals=rivals)


def _beside(
    subject: Contender, peer: Peer, problem: Problem, backend: str, effort: Effort
) -> tuple[Rival, list[float]]:
    absent = peer.missing()
    if absent is not None:
        return Rival(peer.name, peer.name, refused=absent), []
    contender = peer.make(problem, backend)
    try:
        error = contender.check()
    except WrongResultError as wrong:
        return Rival(contender.name, peer.name, contender.detail, refused=str(wrong)), []
    with torch.no_grad():
        pairs = alternate(subject.call, contender.call, effort)
    seconds = spread(pairs.b)
    gops = problem.shape.operations / seconds.median / 1e9
    ratio = paired_ratio(pairs.b, pairs.a)
    return Rival(contender.name, peer.name, contender.detail, error, seconds, gops, ratio), pairs.a


def _alone(subject: Contender, effort: Effort) -> list[float]:
    with torch.no_grad():
        pairs = alternate(subject.call, subject.call, effort)
    return pairs.a + pairs.b
