"""The numbers and functions that the closures of a step show, to be compared by a later run."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from trainfn._step import TrainStep
from trainfn._types import Transform

_MOST = 2000  # objects that are looked at; a closure may hold anything
# Names of closures that say nothing about what is in them.
_PLUMBING = {
    "update",
    "gradients",
    "function",
    "inner",
    "advance",
    "change",
    "of_rows",
    "whole",
    "transforms",
    "optimizer",
    "fn",
    "step",
}


def described(step: Any) -> dict[str, Any]:
    """The numbers and functions of a step by name, as plain JSON; several of one name are a list.

    >>> import trainfn as tfn
    >>> described(tfn.train_step(lambda p, x: tfn.Mean.of(x), tfn.optim.sgd(0.5)))["rate"]
    0.5
    """
    found: dict[str, list[Any]] = {}
    seen: set[int] = set()
    for path, value in _facts(getattr(step, "step", step), (), seen):
        name = ".".join(part for part in path if part not in _PLUMBING and not part.isdigit()) or "function"
        found.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _facts(x: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if x is None or isinstance(x, bool | int | float | str):
        yield path, x
        return
    if id(x) in seen or len(seen) > _MOST:
        return
    seen.add(id(x))
    for name, inner in _inside(x):
        yield from _facts(inner, (*path, name), seen)
    if isinstance(x, FunctionType) and not x.__module__.startswith(("trainfn.", "torch.")):
        yield path, f"{x.__qualname__} ({_code(x.__code__)})"


def _inside(x: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(x, TrainStep):
        yield from (("gradients", x.gradients), ("update", x.update))
    elif isinstance(x, Transform):
        yield "update", x.update
    elif isinstance(x, functools.partial):
        yield "function", x.func
        yield from x.keywords.items()
        yield from ((str(i), value) for i, value in enumerate(x.args))
    elif isinstance(x, FunctionType):
        cells = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
        yield from ((name, cell.cell_contents) for name, cell in cells if _is_filled(cell))
    elif type(x) in (tuple, list):
        yield from ((str(i), value) for i, value in enumerate(x))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable without a value yet
        return False


def _code(code: CodeType) -> str:
    """A fingerprint of what a function computes, whatever file and line it is in."""
    made = hashlib.blake2b(code.co_code, digest_size=4)
    made.update(repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        made.update((_code(constant) if isinstance(constant, CodeType) else repr(constant)).encode())
    return made.hexdigest()
