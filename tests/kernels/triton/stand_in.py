"""A GPU that is not there: tensors on the CPU that say they are on a device, and a record of where the host would wait.

    with stand_in(monkeypatch) as waits:
        q = waits.put(q)                    # on the device
        ...
    assert waits.found == [("kv/stage1.py", "_check_finite", "__bool__")]

Kernels run in Triton's interpreter. The host waits where it reads a value, where the shape of a result depends on
values, and where memory that is not pinned is copied from or to the device. An operation between a tensor there and one
on the CPU, which would fail on a GPU, fails.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

from turboattention import dispatch
from turboattention.impl.triton import device as triton_device
from turboattention.impl.triton import graph
from turboattention.impl.triton import quantizer as triton_quantizer
from turboattention.kernels.triton import configs

DEVICE = torch.device("cuda", 0)
PACKAGE = Path(configs.__file__).parents[2]

READS = {
    "item", "tolist", "numpy", "nonzero", "masked_select", "unique", "unique_consecutive", "equal", "allclose",
    "is_nonzero", "bincount", "__bool__", "__int__", "__float__", "__index__", "__contains__",
}  # fmt: skip
"""Operations that the host waits for, if a tensor on the device is among their arguments."""

_disabled: Any = torch._C._disabled_torch_function_impl


class OnDevice(Tensor):
    """A tensor that says it is on the device."""

    __torch_function__ = _disabled


class Pinned(Tensor):
    """A tensor on the CPU in pinned memory."""

    __torch_function__ = _disabled


class Waits(TorchFunctionMode):
    """found: file, function and operation of each wait, in order; files are relative to the package."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []

    def put(self, x: Tensor) -> Tensor:
        """A copy on the device."""
        with torch._C.DisableTorchFunction():
            return x.clone().as_subclass(OnDevice)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = (resolve_name(func) or getattr(func, "__name__", "")).removesuffix(".__get__").rsplit(".", 1)[-1]
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = any(isinstance(x, OnDevice) for x in leaves)
        with torch._C.DisableTorchFunction():
            if name == "device" and leaves:
                return DEVICE if here else args[0].device
            if name in ("to", "cpu", "copy_"):
                return self._copied(name, func, args, kwargs)
            if name == "pin_memory":
                assert not here, "pinned on the device"
                return args[0].clone().as_subclass(Pinned)
            made = _is_device(kwargs.get("device"))
            pinned = kwargs.pop("pin_memory", False)
            if made:
                kwargs["device"] = "cpu"
                if name in ("tensor", "as_tensor"):
                    self._note(name)
            if here:
                self._check(name, args, leaves)
            result = func(*args, **kwargs)
            if not here and not made:
                return result.as_subclass(Pinned) if pinned else result
            return tree_map(lambda x: _marked(x, leaves), result)

    def _copied(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Copies between the host and the device, or on one of them."""
        if name == "copy_":
            target, source = args[:2]
            there, pair = isinstance(target, OnDevice), (target, source)
            across = there != isinstance(source, OnDevice)
        else:
            pair = args[:1]
            there, across = _goes_to_device(name, *args, **kwargs)
        if across:
            host = next((x for x in pair if not isinstance(x, OnDevice)), None)
            if not (isinstance(host, Pinned) and kwargs.get("non_blocking")):
                self._note(name)
        if name == "copy_":
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda x: torch.device("cpu") if _is_device(x) else x, (args, kwargs))
        result = func(*args, **kwargs)
        plain = result.clone().as_subclass(Tensor) if across else result
        return plain.as_subclass(OnDevice if there else Tensor) if across or there else plain

    def _check(self, name: str, args: Any, leaves: list[Tensor]) -> None:
        """Waits of an operation on tensors of which one is on the device."""
        others = [x for x in leaves if not isinstance(x, OnDevice)]
        if name in READS or (name == "repeat_interleave" and len(leaves) > 1):
            self._note(name)
        elif name in ("__getitem__", "__setitem__"):
            indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            scalar = name == "__setitem__" and not isinstance(args[2], Tensor)
            chosen = any(x.dtype == torch.bool for x in indices) and not scalar
            if chosen or any(x.dim() for x in others):
                self._note(name)
        else:
            assert not any(x.dim() for x in others), f"{name} of tensors on the device and on the CPU"

    def _note(self, name: str) -> None:
        frame = sys._getframe(1)
        while frame is not None and PACKAGE not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back
        where = ("", "") if frame is None else (frame.f_code.co_filename, frame.f_code.co_name)
        self.found.append((where[0].removeprefix(f"{PACKAGE}/"), where[1], name))


def _is_device(x: object) -> bool:
    return str(x).startswith(DEVICE.type) if isinstance(x, (torch.device, str)) else False


def _goes_to_device(name: str, x: Tensor, *args: Any, **kwargs: Any) -> tuple[bool, bool]:
    """Whether `x.to(...)` or `x.cpu()` is on the device, and whether x was elsewhere."""
    there = isinstance(x, OnDevice)
    named = [a for a in (*args, *kwargs.values()) if isinstance(a, (torch.device, str))]
    other = next((a for a in args if isinstance(a, Tensor)), None)
    if name == "cpu":
        return False, there
    to = _is_device(named[0]) if named else isinstance(other, OnDevice) if other is not None else there
    return to, to != there


def _marked(x: Any, inputs: list[Tensor]) -> Any:
    if not isinstance(x, Tensor) or any(x is given for given in inputs):
        return x
    return x.as_subclass(OnDevice)


@contextlib.contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    run = GridExecutor.__call__

    def launched(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        for x in (*args, *kwargs.values()):
            assert not isinstance(x, Tensor) or isinstance(x, OnDevice), "a kernel was given a tensor on the CPU"
        with torch._C.DisableTorchFunction():
            return run(self, *args, **kwargs)

    interpreter = replace(configs.ARCHITECTURES["interpreter"], restores_pages=True)
    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launched)
        patch.setattr(configs, "architecture_of", lambda device: interpreter)
        patch.setattr(configs, "_processors", lambda device: 1)
        patch.setattr(configs, "_shared_memory", lambda device: 1 << 20)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(dispatch, "quantizer_on", lambda device: triton_quantizer if _is_device(device) else None)
        nothing: Callable[[torch.device], Any] = lambda device: contextlib.nullcontext()  # noqa: E731
        for module in (triton_device, graph):
            patch.setattr(module, "guard", nothing)
        with Waits() as waits:
            yield waits
