"""Batches of the user's own types: dataclasses, mappings such as `BatchEncoding`, and objects with ``to()``.

optree learns such a type when a batch of it comes. From then on it is taken apart and put together like a dict.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from collections.abc import Mapping
from typing import Any

import optree
import torch
from torch import Tensor, nn

_PLAIN = (Tensor, int, float, complex, str, bytes)
_registered: set[type] = set()


def recognize(batch: Any) -> None:
    """Teach optree the types in a batch that it does not know.

    Raises:
        TypeError: If the batch is, or has in it, a mapping that can't be made anew.
    """
    new = True
    while new:
        found = {type(leaf): leaf for leaf in optree.tree_leaves(batch) if not isinstance(leaf, _PLAIN)}
        new = [kind for kind, leaf in found.items() if kind not in _registered and _has_parts(leaf)]
        for kind in new:
            _check(found[kind])
            _register(kind, _taken_apart, _Rest.made, namespace=_EVERYWHERE)
            _registered.add(kind)


_register: Any = optree.register_pytree_node
_EVERYWHERE: Any = optree.registry.__GLOBAL_NAMESPACE  # pyright: ignore[reportAttributeAccessIssue]


def is_object(x: Any) -> bool:
    """Whether ``x`` is neither a mapping nor a dataclass, and holds tensors all the same."""
    return type(x) in _registered and not isinstance(x, Mapping) and not dataclasses.is_dataclass(x)


def _has_parts(x: Any) -> bool:
    if isinstance(x, Mapping) or (dataclasses.is_dataclass(x) and not isinstance(x, type)):
        return True
    if isinstance(x, nn.Module | type) or not callable(getattr(x, "to", None)):
        return False
    leaves = optree.tree_leaves(_attributes(x))  # pyright: ignore[reportArgumentType]
    return any(isinstance(leaf, Tensor) for leaf in leaves)


def _attributes(x: Any) -> dict[str, Any]:
    slots = [name for kind in type(x).__mro__ for name in _names(kind.__dict__.get("__slots__", ()))]
    return {**{name: getattr(x, name) for name in slots if hasattr(x, name)}, **getattr(x, "__dict__", {})}


def _names(slots: Any) -> list[str]:
    return [name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__")]


def _check(x: Any) -> None:
    if isinstance(x, Mapping) and not isinstance(x, dict) and _store(x) is None:
        raise TypeError(
            f"a batch of type {type(x).__name__} is a mapping that does not keep its items in a dict, so its tensors"
            " can't be moved or split. Write `dict(batch)` where the batches are made."
        )


def _store(x: Any) -> str | None:
    """The attribute in which a mapping that is not a dict keeps its items."""
    if isinstance(x, UserDict):
        return "data"
    names = [name for name, v in _attributes(x).items() if isinstance(v, dict) and v.keys() == x.keys()]
    return names[0] if names else None


@dataclasses.dataclass(eq=False)
class _Rest:
    """All of an object but its parts: two are equal if a graph for one is right for the other."""

    kind: type
    names: tuple[Any, ...]
    attributes: dict[str, Any]
    linked: tuple[str, ...] = ()  # attributes that are items too, as in a `ModelOutput`
    store: str | None = None

    def _facts(self) -> Any:
        plain = {k: v for k, v in self.attributes.items() if isinstance(v, str | int | float | None | torch.dtype)}
        return self.kind, self.names, self.linked, tuple(plain.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rest) and self._facts() == other._facts()

    def __hash__(self) -> int:
        return hash((self.kind, self.names))

    def made(self, parts: Any) -> Any:
        """An object of these parts."""
        named = dict(zip(self.names, parts, strict=True))
        out: Any = self.kind.__new__(self.kind)  # pyright: ignore[reportCallIssue]
        if issubclass(self.kind, dict):
            put = OrderedDict.__setitem__ if issubclass(self.kind, OrderedDict) else dict.__setitem__
            for name, value in named.items():
                put(out, name, value)
            named = {name: named[name] for name in self.linked}
        elif self.store is not None:
            named = {self.store: named}
        for name, value in {**self.attributes, **named}.items():
            object.__setattr__(out, name, value)  # a frozen one has no other way
        return out


def _taken_apart(x: Any) -> tuple[list[Any], _Rest, tuple[Any, ...]]:
    attributes = _attributes(x)
    if not isinstance(x, Mapping):
        parts, rest = attributes, _Rest(type(x), tuple(attributes), {})
    else:
        parts = {name: x[name] for name in sorted(x, key=str)}
        store = None if isinstance(x, dict) else _store(x)
        linked = tuple(k for k, v in attributes.items() if k in parts and parts[k] is v)
        kept = {k: v for k, v in attributes.items() if k not in linked and k != store}
        rest = _Rest(type(x), tuple(parts), kept, linked, store)
    return list(parts.values()), rest, rest.names
