"""Everything that a pure function leaves alone, as it was before a call and after it."""

from __future__ import annotations

import contextlib
import random as python_random
import types
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainfn import tree
from trainfn.process import generators_kept
from trainfn.testing._violation import differences, listed

_DEPTH = 6
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Watched:
    """Everything besides its result that a step might change; `changes` says what it did change."""

    def __init__(self, step: Callable[..., Any], state: Any, batch: Any) -> None:
        self.step, self.module = step, getattr(state, "module", None)
        self.inputs = {"state": state, "batch": batch}
        self.copies = {name: tree.copy(value) for name, value in self.inputs.items()}
        self.generators, self.variables = _generators(), _variables(step)
        self.held = _held(self.module)

    def changes(self) -> dict[str, str]:
        """The changes since then: the kind of each, and where it is."""
        said: dict[str, str] = {}
        for name, value in self.inputs.items():
            changed = differences(value, self.copies[name])
            if changed:
                said[name] = listed(changed)
        now = _generators()
        moved = [name for name, before in self.generators.items() if not np.array_equal(before, now[name])]
        if moved:
            said["generator"] = ", ".join(moved)
        changed = {
            n: (old, new) for n, new in _variables(self.step).items() if (old := self.variables.get(n, new)) != new
        }
        if changed:
            said["variable"] = "\n".join(f"{n}: {old} became {new}" for n, (old, new) in list(changed.items())[:4])
        held = _held(self.module)
        module = [what for what, before in self.held.items() if not _same(before, held.get(what))]
        if module:
            said["module"] = "\n".join(module[:4])
        return said


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    return bool(a == b)


def _generators() -> dict[str, Any]:
    version, words, gauss = python_random.getstate()
    _, keys, *places = np.random.get_state()  # the keys alone change once in 624 draws
    return {
        "torch's global generator": torch.get_rng_state().numpy().copy(),
        "NumPy's global generator": np.array([*keys, *places], np.float64),  # type: ignore[misc]
        "Python's `random`": np.array([version, *words, gauss or 0.0]),
    }


@contextlib.contextmanager
def generators_seeded(seed: int) -> Generator[None]:
    """Seed the three global generators for a block, and give them back as they were."""
    with generators_kept():
        torch.manual_seed(seed)
        np.random.seed(seed)
        python_random.seed(seed)
        yield


def lasting(module: nn.Module | None) -> dict[str, Any]:
    """The parts of a module that not even its first call may change; its attributes may cache something then."""
    return {what: x for what, x in _held(module).items() if not what.startswith("the attributes")}


def _held(module: nn.Module | None) -> dict[str, Any]:
    """A module's tensors, modes and hooks."""
    if module is None:
        return {}
    found: dict[str, Any] = {}
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        if not x.is_meta:  # its storage was moved into the state
            found[f"the value of {name!r}"] = x.detach().clone()
        found[f"the .grad of {name!r}"] = None if x.grad is None else x.grad.clone()
    for name, part in module.named_modules():
        found[f"the mode of {name or 'the module'!r}"] = part.training
        found[f"the hooks of {name or 'the module'!r}"] = (len(part._forward_hooks), len(part._forward_pre_hooks))
        plain = {k: v for k, v in vars(part).items() if isinstance(v, _PLAIN) and k != "training"}
        found[f"the attributes of {name or 'the module'!r}"] = plain
    return found


def _variables(step: Callable[..., Any]) -> dict[str, str]:
    """The plain Python values that a function can reach by its closures, defaults, globals and attributes."""
    found: dict[str, str] = {}
    _reach(step, getattr(step, "__name__", type(step).__name__), found, set(), _DEPTH)
    return found


def _reach(value: Any, path: str, found: dict[str, str], seen: set[int], depth: int) -> None:
    if id(value) in seen or depth == 0 or isinstance(value, nn.Module | Tensor | type | types.ModuleType):
        return
    if isinstance(value, _PLAIN):
        found[path] = repr(value)
        return
    seen.add(id(value))
    if isinstance(value, list | tuple | set | dict):
        found[path] = f"a {type(value).__name__} of {len(value)}"
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _reach(item, f"{path}[{key!r}]", found, seen, depth - 1)
        return
    for name, item in _inside(value):
        _reach(item, f"{path}.{name}", found, seen, depth - 1)


def _inside(value: Any) -> list[tuple[str, Any]]:
    """The objects that a user's function or object refers to by name."""
    if _is_library(value):
        return []
    code = getattr(value, "__code__", None)
    if code is None:
        call = vars(type(value)).get("__call__")
        own = [("__call__", call)] if isinstance(call, types.FunctionType) else []
        return [*getattr(value, "__dict__", {}).items(), *own]
    cells = zip(code.co_freevars, value.__closure__ or (), strict=False)
    closed = [(name, cell.cell_contents) for name, cell in cells if _is_filled(cell)]
    globals_ = [(name, value.__globals__[name]) for name in code.co_names if name in value.__globals__]
    return [*closed, *globals_, *_enumerated(value.__defaults__)]


def _enumerated(values: tuple[Any, ...] | None) -> list[tuple[str, Any]]:
    """A function's defaults, by number."""
    return [(f"defaults[{i}]", value) for i, value in enumerate(values or ())]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_library(value: Any) -> bool:
    """Whether something is torch's or Python's: their caches and counters don't concern the law."""
    home = getattr(value, "__module__", None) or type(value).__module__
    return home.split(".")[0] in ("torch", "numpy", "builtins", "optree", "hypothesis", "logging", "warnings")
