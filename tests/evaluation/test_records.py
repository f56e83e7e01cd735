"""Saved results of a run that was interrupted."""

from __future__ import annotations

import pytest

from turboattention.errors import InputError
from turboattention.evaluation.records import Part

HEAD = {"length": 64}


def test_a_full_disk_is_one_error_and_nothing_is_lost(tmp_path, file_limit):
    """Also in the midst of a line, which the next one does not continue."""
    path = tmp_path / "part.jsonl"
    part = Part(path, HEAD)
    part.put("first", 1.0)
    with (
        file_limit(path.stat().st_size + 10),
        pytest.raises(InputError, match=r"^--out: .* cannot be written: File too"),
    ):
        part.put("second", "x" * 100)
    assert Part(path, HEAD).values == {"first": 1.0}
    part.put("third", 3.0)
    part.put("fourth", 4.0)
    assert Part(path, HEAD).values == {"first": 1.0, "second": "x" * 100, "third": 3.0, "fourth": 4.0}
