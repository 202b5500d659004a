"""Where a function reads a tensor's values on the host."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
_KERNELS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")
_KEYED = "/trainfn/_keyed/"
_OWN = "check_unused"  # compares generators' states on the host, after an eager step: they live there


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS:
            _note(self.found, f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _KERNELS or (name == "index" and any(_is_mask(i) for i in args[1])):
            _note(self.found, "Tensor.item()" if name == _KERNELS[0] else name)
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _note(found: list[str], what: str) -> None:
    frames = [
        f for f in traceback.extract_stack() if "/torch/" not in f.filename and "/testing/_host.py" not in f.filename
    ]
    if frames[-1].name != _OWN:
        place = [f for f in frames if _KEYED not in f.filename][-1]  # torch's functions pass through that mode
        said = f"{what} at {place.filename}:{place.lineno}, in {place.name}: {place.line}"
        if said not in found:
            found.append(said)


def host_reads(fn: Callable[[], Any]) -> list[str]:
    """Run a function and list what it read on the host, and where."""
    found: list[str] = []
    with _Methods(found), _Kernels(found):
        fn()
    return found
