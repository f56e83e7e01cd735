"""Positions on a device, which the host reads in a later forward pass. The flag works on a CPU, too."""

from __future__ import annotations

import pytest
import torch

from turboattention.errors import InputError
from turboattention.integrations.transformers.positions import LateFlag, PositionCheck

NEXT, BEHIND = torch.tensor([[5, 6], [5, 6]]), torch.tensor([[5, 6], [5, 5]])


def test_an_error_comes_with_the_next_call_and_once():
    check = PositionCheck()
    check.check_later(NEXT, 5)
    check.check_later(BEHIND, 5)
    with pytest.raises(InputError, match=r"at other positions in an earlier forward pass; reset\(\) empties the cache"):
        check.check_later(NEXT, 5)
    check.check_later(NEXT, 5)


def test_a_later_right_call_does_not_hide_it():
    flag = LateFlag(torch.device("cpu"))
    for raised in (True, False):
        flag.send(torch.tensor(raised))
    assert flag.take()
    assert not flag.take()


def test_a_copy_reports_on_its_own():
    check = PositionCheck()
    assert check.copied().check_later(NEXT, 5) is None
    check.check_later(BEHIND, 5)
    other = check.copied()
    for each in (check, other):
        with pytest.raises(InputError, match="earlier forward pass"):
            each.check_later(NEXT, 5)
        each.check_later(NEXT, 5)


def test_in_inference_mode_and_outside():
    check = PositionCheck()
    with torch.inference_mode():
        check.check_later(NEXT.clone(), 5)
    check.check_later(BEHIND, 5)
    with torch.inference_mode(), pytest.raises(InputError, match="earlier forward pass"):
        check.check_later(NEXT, 5)
