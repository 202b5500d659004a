"""The generators of NumPy and of Python, which an eager step seeds from the state, and a compiled one can't draw from.

Asking them for their state takes longer than a small step. So their memory is read where they are: 2,500 bytes each,
in a tenth of a microsecond.
"""

from __future__ import annotations

import contextlib
import ctypes
import random as _random
import sys
from collections.abc import Generator
from typing import Any, NoReturn

import torch
from torch import Tensor

from trainfn import tree
from trainfn._keyed._vmap import functorch
from trainfn.errors import RandomnessError

_BYTES = 625 * 4  # of a Mersenne Twister: 624 words and the position among them


def positions() -> dict[str, Any]:
    """Where the generators are; those of modules that nobody has imported have not moved."""
    return {"`random`": _python(), "`numpy.random`": _numpy()}


def moved(before: dict[str, Any]) -> list[str]:
    """Return the names of the generators that have drawn since."""
    now = positions()
    return [name for name in before if before[name] != now[name]]


def restore(before: dict[str, Any]) -> None:
    """Put the generators back, which `can_be_keyed` has looked at."""
    python, numpy = before.values()
    if isinstance(python, bytes):
        _memory(id(_random._inst) + object.__basicsize__).raw = python  # type: ignore[attr-defined]
    elif python is not None:
        _random.setstate(python)
    if numpy is not None:
        _memory(sys.modules["numpy.random"].get_bit_generator().ctypes.state_address).raw = numpy


def refuse(names: list[str]) -> NoReturn:
    """Raise, where a draw can't be keyed: a captured step would have the same number at every call."""
    raise RandomnessError(
        f"this step drew from the global generator of {' and '.join(names)}, which is not a part of the state. An eager"
        " step seeds it from state.key, and a compiled step would draw the same number at every call. Draw with torch"
        " instead, such as `torch.rand(())`, which comes from state.key in a step; or draw before the step and pass"
        " the number in the batch; or run the step eagerly, `tfn.jit(step, compile=False)`."
    )


def can_be_keyed(key: Tensor) -> bool:
    """Whether the key has numbers that can be read now, and NumPy's generator can be seeded."""
    module = sys.modules.get("numpy.random")
    return (
        not tree.is_traced(key)
        and functorch.peek_interpreter_stack() is None
        and not (key.is_cuda and torch.cuda.is_current_stream_capturing())
        and (module is None or type(module.get_bit_generator()).__name__ == "MT19937")
    )


@contextlib.contextmanager
def kept() -> Generator[None]:
    """Put the generators back at the end."""
    numpy: Any = sys.modules.get("numpy.random")
    before = _random.getstate(), None if numpy is None else numpy.get_state(legacy=False)
    try:
        yield
    finally:
        _random.setstate(before[0])
        if numpy is not None:
            numpy.set_state(before[1])


@contextlib.contextmanager
def keyed(key: Tensor) -> Generator[None]:
    """Let the generators draw what a key says, and put them back at the end."""
    words = [word & 0xFFFFFFFF for word in key.flatten().tolist()]  # waits for the device
    with kept():
        _random.seed(repr(words))
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed(words)
        yield


def _memory(address: int) -> Any:
    return (ctypes.c_char * _BYTES).from_address(address)


def _python() -> Any:
    module = sys.modules.get("random")
    if module is None:
        return None
    generator = getattr(module, "_inst", None)
    if generator is None or not _PEEKS:
        return module.getstate()
    return _memory(id(generator) + object.__basicsize__).raw


def _numpy() -> Any:
    module = sys.modules.get("numpy.random")
    if module is None:
        return None
    generator = module.get_bit_generator()
    if type(generator).__name__ != "MT19937":  # the user has put in another
        return repr(generator.state)
    return _memory(generator.ctypes.state_address).raw


def _python_lies_open() -> bool:
    """Whether Python's generators keep their state where CPython's do; seen on one of our own."""
    generator = sys.modules["random"].Random(0)  # torch has imported it
    if sys.implementation.name != "cpython" or type(generator).__basicsize__ < object.__basicsize__ + _BYTES:
        return False
    memory = (ctypes.c_uint32 * 625).from_address(id(generator) + object.__basicsize__)
    seeded = tuple(memory)
    drawn = generator.getstate()[1] == (*seeded[1:], seeded[0])
    generator.random()
    return drawn and generator.getstate()[1] == (*memory[1:], memory[0]) and tuple(memory) != seeded


_PEEKS = _python_lies_open()
