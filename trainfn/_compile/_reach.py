"""Where the code of a step may look: the variables it closes over, its globals, the attributes that it names.

Attributes count by name: an object's attribute is of interest if some reached function, or some module's method,
mentions that name. A counter that only the training loop around the step uses is not.
"""

from __future__ import annotations

import collections
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainfn._compile._lines import is_library, is_ours

OWN = frozenset(nn.Module().__dict__)  # what every module has
_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks"))
_SKIPPED = frozenset(("__init__", "__repr__", "extra_repr", "reset_parameters", "_init_weights", "__setattr__"))
_LARGEST = 256  # items of a container that is looked into
_DEPTH = 12
_ROUNDS = 16
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CLOSED = (*PLAIN, type, types.ModuleType, Tensor)


class Reach:
    """The objects that a step may look at.

    Attributes:
        names: The names that its code mentions.
        dicts: Dicts whose values are looked up by those names, each with what to call it.
        globals: Pairs of a function's globals and the names that it uses.
        rows: Lists, sets and small dicts, all of whose items count.
        cells: Variables of enclosing functions.
        scopes: A user's classes and imported modules, whose attributes are looked up by those names.
        hooks: The hooks of modules.
    """

    def __init__(self, roots: Iterable[Any], module: nn.Module | None) -> None:
        self.names: set[str] = {"forward", "__call__"}
        self.dicts: dict[int, tuple[dict[str, Any], str]] = {}
        self.globals: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self.rows: dict[int, tuple[Any, str]] = {}
        self.scopes: dict[int, tuple[Any, str]] = {}
        self.cells: dict[int, tuple[types.CellType, str]] = {}
        self.hooks: list[tuple[dict[Any, Any], str]] = []
        self._called: set[str] = set()  # names in our own code: methods that it may call
        self._objects: dict[int, tuple[Any, str]] = {}
        self._seen: dict[int, object] = {}  # keeps them alive, or an id could become another object's
        if module is not None:
            self._module(module, type(module).__name__)
        for root in roots:
            self._visit(root, "step", 0)
        for _ in range(_ROUNDS):  # names that are found later may be attributes of what was found before
            before = len(self._seen), len(self.names)
            for value, name in list(self._objects.values()):
                self._attributes(value, name)
            if (len(self._seen), len(self.names)) == before:
                break

    def _visit(self, value: Any, name: str, depth: int, *, ours: bool = False) -> None:
        if isinstance(value, _CLOSED) or id(value) in self._seen or depth > _DEPTH:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Module):
            self._module(value, name)
        elif isinstance(value, types.FunctionType):
            self._function(value, name, depth)
        elif isinstance(value, types.MethodType):
            self._visit(value.__self__, name, depth + 1)
            self._visit(value.__func__, name, depth + 1)
        elif isinstance(value, functools.partial):
            self._items((value.func, *value.args, *value.keywords.values()), name, depth)
        elif isinstance(value, tuple | frozenset):
            self._items(value, name, depth, ours=ours)
        elif isinstance(value, collections.UserDict):
            self._visit(value.data, name, depth + 1, ours=ours)
        elif isinstance(value, list | dict | set | collections.deque):
            if len(value) <= _LARGEST:
                if not ours:
                    self.rows[id(value)] = value, name
                self._items(value.values() if isinstance(value, dict) else value, name, depth, ours=ours)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._objects[id(value)] = value, name

    def _items(self, items: Iterable[Any], name: str, depth: int, *, ours: bool = False) -> None:
        for item in list(items):
            self._visit(item, name, depth + 1, ours=ours)

    def _module(self, module: nn.Module, name: str) -> None:
        for path, part in module.named_modules():
            called = f"{name}.{path}" if path else name
            self._seen[id(part)] = part
            self._objects[id(part)] = part, called
            self.names |= _names_of(type(part))
            self.hooks += [(held, called) for hook in _HOOKS if isinstance(held := part.__dict__.get(hook), dict)]
            if part._modules:
                self.rows[id(part._modules)] = part._modules, called
            for held, _ in self.hooks[-len(_HOOKS) :]:
                self._items(held.values(), called, 0)

    def _attributes(self, value: Any, name: str) -> None:
        """Look at the attributes of an object that the code names, and at the methods it may call."""
        held: dict[str, Any] = value.__dict__
        library = is_ours(_file_of(type(value)))
        if isinstance(value, nn.Module) or not library:
            self.dicts[id(held)] = held, name
        read: frozenset[str] | None = getattr(type(value), "_steps_read", None)  # a class of ours may say what
        for key in list(held):
            if key not in OWN and (key in self.names or library if read is None or not library else key in read):
                self._visit(held[key], f"{name}.{key}", 1, ours=library)
        if not library:
            for kind in type(value).__mro__:
                self._class(kind, name)

    def _class(self, kind: type, name: str) -> None:
        """Look at a user's class: its attributes, and the methods that the code may call."""
        if not _is_users(_file_of(kind)):
            return
        self.scopes[id(kind)] = kind, name
        for key, value in list(vars(kind).items()):
            method = _function_of(value)
            if (
                method is not None
                and (key in self.names | self._called or key.startswith("__"))
                and key not in _SKIPPED
            ):
                self._visit(method, name, 1)

    def _function(self, function: types.FunctionType, name: str, depth: int) -> None:
        code = function.__code__
        ours = is_library(code.co_filename)
        (self._called if ours else self.names).update(_names_in(code))
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if not ours:  # ours never bind a variable again
                self.cells.setdefault(id(cell), (cell, f"`{variable}` in {function.__qualname__}"))
            self._visit(content(cell), variable, depth + 1, ours=ours)
        self._items((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()), name, depth)
        if ours or "site-packages" in code.co_filename:
            return
        held = function.__globals__
        used = {key for key in _names_in(code) if key in held}
        self.globals.setdefault(id(held), (held, set()))[1].update(used)
        for key in used:
            if isinstance(held[key], type):
                self._class(held[key], key)
            elif isinstance(held[key], types.ModuleType) and _is_users(getattr(held[key], "__file__", None) or ""):
                self.scopes[id(held[key])] = held[key], key
            else:
                self._visit(held[key], key, depth + 1)


def content(cell: types.CellType) -> Any:
    """Return what a variable holds; itself if it holds nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant  # as in getattr(self, "flag")


@functools.cache
def _names_of(kind: type) -> frozenset[str]:
    """Return the names that the methods of a module's class mention."""
    found: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for key, method in vars(base).items():
            while hasattr(method, "__wrapped__"):
                method = method.__wrapped__
            if isinstance(method, property):
                method = method.fget
            if isinstance(method, types.FunctionType) and key not in _SKIPPED:
                found.update(_names_in(method.__code__))
    return frozenset(found)


def _function_of(value: object) -> types.FunctionType | None:
    """The function behind a method, a static one, a property."""
    value = value.fget if isinstance(value, property) else getattr(value, "func", value)
    value = getattr(value, "__wrapped__", getattr(value, "__func__", value))
    return value if isinstance(value, types.FunctionType) else None


def _is_users(file: str) -> bool:
    return bool(file) and not is_library(file) and "site-packages" not in file


def _file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
