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
from .remote import WorkerError
from .statistics import paired_ratio, spread
from .stepping import STORES, step
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
    """`row` with the measurements. If the result of the subject is wrong, neither it nor its peers are timed.

    A peer that cannot be called without storing a token is compared with the subject's step that does so too; the
    times of such steps are not those of the row.
    """
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
    """The peer's measurement, and the times of the subject beside it."""
    absent = peer.missing()
    if absent is not None:
        return Rival(peer.name, peer.name, refused=absent), []
    try:
        beside = step(problem, backend) if peer.stores and problem.cache is not None else subject
        if beside is not subject:
            beside.check()
        contender = peer.make(problem, backend)
        error = contender.check()
        with torch.no_grad():
            pairs = alternate(beside.call, contender.call, effort)
    except (WrongResultError, WorkerError) as why:
        return Rival(peer.name, peer.name, refused=str(why)), []
    seconds = spread(pairs.b)
    gops = problem.shape.operations / seconds.median / 1e9
    ratio = paired_ratio(pairs.b, pairs.a)
    detail = contender.detail if beside is subject else f"{contender.detail}; on both sides {STORES}"
    rival = Rival(contender.name, peer.name, detail, error, seconds, gops, ratio)
    return rival, pairs.a if beside is subject else []


def _alone(subject: Contender, effort: Effort) -> list[float]:
    with torch.no_grad():
        pairs = alternate(subject.call, subject.call, effort)
    return pairs.a + pairs.b
