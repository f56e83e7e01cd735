from __future__ import annotations

import warnings

import pytest

from turboattention.cli.output import bytes_text, guard_warnings, number_text, share_text
from turboattention.errors import GuardWarning


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (16_252_928, "15.5 MiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_shares_never_round_up_to_all() -> None:
    assert [share_text(x) for x in (1.0, 0.99999, 0.9845, 0.0, None)] == ["100%", "99.9%", "98.5%", "0.0%", "–"]


def test_numbers() -> None:
    assert [number_text(12.345), number_text(1234.5, 2), number_text(None)] == ["12.3", "1,234.50", "–"]


def test_the_guard_is_heard_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with guard_warnings(show=True) as said:
        warnings.warn("layer 1: more bits", GuardWarning, stacklevel=1)
    with guard_warnings(show=False) as quietly:
        warnings.warn("layer 2: more bits", GuardWarning, stacklevel=1)
    assert (said, quietly) == (["layer 1: more bits"], ["layer 2: more bits"])
    assert capsys.readouterr().err == "warning: layer 1: more bits\n"


def test_other_warnings_stay_what_they_were() -> None:
    with pytest.raises(UserWarning, match="another"), guard_warnings(show=True):
        warnings.warn("another", UserWarning, stacklevel=1)
