"""The generators of NumPy and of Python, which a step must not draw from.

Asking them for their state takes longer than a small step. So their memory is read where they are: 2,500 bytes each,
in a tenth of a microsecond.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from trainfn.errors import RandomnessError

_BYTES = 625 * 4  # of a Mersenne Twister: 624 words and the position among them


def positions() -> dict[str, Any]:
    """Where the generators are; those of modules that nobody has imported have not moved."""
    return {"`random`": _python(), "`numpy.random`": _numpy()}


def check_unmoved(before: dict[str, Any]) -> None:
    """Raise if one of the generators has drawn since."""
    now = positions()
    moved = [name for name in before if before[name] != now[name]]
    if moved:
        raise RandomnessError(
            f"this step drew from the global generator of {' and '.join(moved)}, which is not a part of the state."
            " The same state and batch would give another result, and a compiled step the same number at every call."
            " Draw with torch instead, such as `torch.rand(())`, which comes from state.key in a step; or draw"
            " before the step and pass the number in the batch."
        )


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
