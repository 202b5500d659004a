"""The other places in a module that hold one of its Parameters, and parameters that can't be trained.

A module may keep a Parameter in a list, a dict, a tuple, a `functools.partial` or a variable of a function, too. While
a step runs, the stand-in takes its place there. This search does not find every reference, such as a variable of the
loss. The first step does: its loss reaches the Parameter itself, which is an error.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_OWN = frozenset(nn.Module().__dict__)  # what every module has
_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks"))
_PLAIN = frozenset((
    *(bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.Size, torch.Generator, range),
))  # fmt: skip
_SELF_MADE = "_flat_weights"  # of recurrent modules, which look for themselves whether it is right
_DEPTH, _MOST = 6, 20_000

Make = Callable[[Mapping[str, Tensor]], Any]


class Alias(NamedTuple):
    """A place, other than the one that registers it, that holds a Parameter.

    Attributes:
        where: The identity of the container, and the key in it.
        place: The container: a dict, a list, or what stands for a variable.
        make: Makes of the tensors by name what has to be there.
    """

    where: tuple[int, Any]
    place: Any
    make: Make

    @property
    def key(self) -> Any:
        """The key in the container."""
        return self.where[1]


class _Variable:
    """A variable of a function, or an attribute, as a container of one item."""

    def __init__(self, holder: Any, attribute: str) -> None:
        self._holder, self._attribute = holder, attribute

    def __getitem__(self, key: Any) -> Any:
        return getattr(self._holder, self._attribute)

    def __setitem__(self, key: Any, value: Any) -> None:
        setattr(self._holder, self._attribute, value)


def audit(module: nn.Module, names: Mapping[int, str]) -> tuple[Alias, ...]:
    """Every alias of a Parameter in a module; ``names`` are those of its tensors, by identity.

    Raises:
        ValueError: If an embedding is sparse, or something holds a part of a Parameter's memory, which can't follow.
    """
    search = _Search(module, names)
    for path, part in module.named_modules():
        search.module(part, path or type(module).__name__)
    return tuple(search.found)


class _Search:
    def __init__(self, module: nn.Module, names: Mapping[int, str]) -> None:
        self._names = names
        self._module = module
        self._seen: dict[int, Any] = {id(part): part for part in module.modules()}
        self._memory: dict[int, str] | None = None
        self.found: list[Alias] = []

    def module(self, part: nn.Module, path: str) -> None:
        """Look at the attributes of a module, except for its parameters, buffers and submodules.

        Each call of the module makes some of them anew, by a hook that has the attribute's name: `spectral_norm` does.
        """
        held = part.__dict__
        if held.get("sparse") is True and isinstance(part, nn.Embedding | nn.EmbeddingBag):
            raise ValueError(
                f"init(model, ...): {path!r} is an embedding with `sparse=True`: its gradients are sparse, and updates"
                " are dense. Set `sparse=False`, which gives the same numbers with every rule that updates all rows."
            )
        made = {getattr(hook, "name", None) for hook in part._forward_pre_hooks.values()}
        for key in held.keys() - _OWN:
            value = held[key]
            if type(value) not in _PLAIN and key != _SELF_MADE and key not in made:
                self._place(held, key, value, f"{path}.{key}", 0)
        if any(map(held.get, _HOOKS)):
            for key in _HOOKS:
                if hooks := held.get(key):
                    self._items(hooks, hooks.items(), f"a hook of {path}", 0)

    def _place(self, place: Any, key: Any, value: Any, path: str, depth: int, where: Any = None) -> None:
        make = self._make(value, path, depth)
        if make is not None:
            self.found.append(Alias((id(place if where is None else where), key), place, make))

    def _items(self, place: Any, items: Iterable[tuple[Any, Any]], path: str, depth: int) -> None:
        for key, value in list(items):
            if type(value) not in _PLAIN:
                self._place(place, key, value, f"{path}[{key!r}]", depth + 1)

    def _make(self, value: Any, path: str, depth: int) -> Make | None:
        """Return a function that makes a new value for a place, if one is needed for a Parameter in it."""
        if type(value) in _PLAIN or id(value) in self._seen:
            return None
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if depth > _DEPTH or len(self._seen) > _MOST:
            return None
        self._seen[id(value)] = value
        if isinstance(value, tuple | set | frozenset):
            return self._rebuilt(value, path, depth)
        if isinstance(value, functools.partial):
            inner = self._rebuilt((value.func, value.args, value.keywords), path, depth)
            return None if inner is None else lambda tensors: _partial(*inner(tensors))
        if isinstance(value, list):
            self._items(value, enumerate(value), path, depth)
        elif isinstance(value, dict):
            self._items(value, value.items(), path, depth)
        elif isinstance(value, types.FunctionType):
            self._function(value, path, depth)
        elif isinstance(value, types.MethodType):
            self._make(value.__self__, path, depth + 1)
        elif isinstance(value, nn.Module):
            self._foreign(value, path)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._items(value.__dict__, value.__dict__.items(), path, depth)
        return None

    def _tensor(self, value: Tensor, path: str) -> Make | None:
        name = self._names.get(id(value))
        if name is not None:
            return lambda tensors: tensors[name]
        if self._memory is None:
            trained = ((name, p) for name, p in self._module.named_parameters() if p.requires_grad)
            self._memory = {_memory(p): name for name, p in trained}
            self._memory.pop(0, None)
        whole = self._memory.get(_memory(value)) if value.grad_fn is None or value._is_view() else None
        if whole is not None:
            raise ValueError(
                f"init(model, ...): {path} is a tensor in the memory of the parameter {whole!r}. A step would not"
                " change it, for it makes new parameters. Compute it in the forward pass, from the parameter."
            )
        return None

    def _rebuilt(self, value: Any, path: str, depth: int) -> Make | None:
        makes = [self._make(item, path, depth + 1) for item in value]
        if all(make is None for make in makes):
            return None
        items = list(value)

        def make(tensors: Mapping[str, Tensor]) -> Any:
            new = [item if one is None else one(tensors) for item, one in zip(items, makes, strict=True)]
            return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)

        return make

    def _function(self, function: types.FunctionType, path: str, depth: int) -> None:
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # nothing yet
                continue
            place = _Variable(cell, "cell_contents")
            self._place(place, None, value, f"the variable `{variable}` of {path}", depth + 1, where=cell)
        for attribute in ("__defaults__", "__kwdefaults__"):
            if (value := getattr(function, attribute)) is not None:
                place = _Variable(function, attribute)
                self._place(place, attribute, value, f"a default of {path}", depth + 1, where=function)

    def _foreign(self, module: nn.Module, path: str) -> None:
        """A module that is not registered, and may share Parameters."""
        for inner, part in module.named_modules():
            self._seen[id(part)] = part
            self._items(part._parameters, part._parameters.items(), f"{path}.{inner}", 0)
            self.module(part, f"{path}.{inner}")


def _partial(function: Any, args: Any, keywords: Any) -> Any:
    return functools.partial(function, *args, **keywords)


def _memory(x: Tensor) -> int:
    try:
        return x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # it has none, as a sparse one
        return 0
