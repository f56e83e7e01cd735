from __future__ import annotations

import pytest
import torch

from turboattention.cli.device import Dtype, choose, use_threads
from turboattention.errors import InputError


def test_float32_on_a_cpu() -> None:
    assert choose("cpu", Dtype.auto) == ("cpu", "float32")
    assert choose("cpu", Dtype.bfloat16) == ("cpu", "bfloat16")


def test_the_models_own_elsewhere() -> None:
    assert choose("meta", Dtype.auto) == ("meta", "auto")


def test_auto_finds_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto", Dtype.auto)[0] == "cpu"


@pytest.mark.parametrize("name", ["nowhere", "cuda:99", ""])
def test_no_such_device(name: str) -> None:
    with pytest.raises(InputError, match=r"^--device: expected a device of this machine"):
        choose(name, Dtype.auto)


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        use_threads(None)
        assert torch.get_num_threads() == before
        use_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
