from __future__ import annotations

from turboattention.words import listed, number_of


def test_one_thing_is_singular() -> None:
    assert [number_of(n, "token") for n in (0, 1, 2, 1000)] == ["0 tokens", "1 token", "2 tokens", "1,000 tokens"]
    assert listed("head", [1]) == "head 1"
    assert listed("head", [1, 3]) == "heads 1, 3"
