"""The shape of a tree of tensors: taken apart and put together at the cost of a few nanoseconds a leaf.

A call of a compiled step takes its state apart and puts the next one together. That takes optree 160 ns a leaf, because
it sorts the names of every dict. A structure that is known already needs 20.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import optree
from torch import Tensor

from trainfn._compile._donate import DONATED

Leaves = list[Any]  # of a tree, in order: tensors, numbers, strings
Arguments = tuple[Any, ...]  # of a call: a state, a batch, and more
Function = Callable[..., Any]  # the user's step, or what stands for it


class Misfit(Exception):
    """A tree does not have the structure that it was taken apart by."""


def check_leaf(value: object) -> None:
    """Raise if a container, or None, stands where a leaf was."""
    if not isinstance(value, Tensor) and not isinstance(structure(value), Leaf):
        raise Misfit


class Leaf(NamedTuple):
    """A tensor, a number, or anything else that is not a container."""

    size = 1

    def flatten(self, tree: Any, out: Leaves) -> None:
        """Add the leaf to the list."""
        check_leaf(tree)
        out.append(tree)

    def build(self, leaves: Iterator[Any]) -> Any:
        """Take the next leaf."""
        return next(leaves)

    def retire(self, tree: Any) -> None:
        """Do nothing: only containers can be emptied."""

    def places(self, replaceable: bool) -> list[bool]:
        """Return whether the leaf may be overwritten."""
        return [replaceable]


class Dict(NamedTuple):
    """A dict; ``children`` is empty where every value is a leaf."""

    names: tuple[Any, ...]
    children: tuple[Structure, ...]
    size: int

    def flatten(self, tree: Any, out: Leaves) -> None:
        """Add the leaves to the list; another order of the names is another structure."""
        # Not a subclass: it may order or make its values in another way.
        if type(tree) is not dict or tuple(tree) != self.names:
            raise Misfit
        values = list(tree.values())
        if not self.children:
            # The kinds are few and the values are many, so the kinds are looked at.
            if not all(issubclass(kind, Tensor) for kind in set(map(type, values))):
                for value in values:
                    check_leaf(value)
            out += values
            return
        for child, value in zip(self.children, values, strict=True):
            child.flatten(value, out)

    def build(self, leaves: Iterator[Any]) -> Any:
        """Make a new dict of the next leaves."""
        if not self.children:
            return dict(zip(self.names, islice(leaves, self.size), strict=True))
        return {name: child.build(leaves) for name, child in zip(self.names, self.children, strict=True)}

    def retire(self, tree: Any) -> None:
        """Put `DONATED` in the place of every leaf."""
        if not self.children:
            tree.update(dict.fromkeys(self.names, DONATED))
            return
        for name, child in zip(self.names, self.children, strict=True):
            if isinstance(child, Leaf):
                tree[name] = DONATED
            else:
                child.retire(tree[name])

    def places(self, replaceable: bool) -> list[bool]:
        """Return, for every leaf, whether it may be overwritten."""
        return [True] * self.size if not self.children else [p for c in self.children for p in c.places(True)]


class Row(NamedTuple):
    """A list, a tuple or a NamedTuple."""

    kind: type[Any]
    children: tuple[Structure, ...]
    size: int

    def flatten(self, tree: Any, out: Leaves) -> None:
        """Add the leaves to the list."""
        if type(tree) is not self.kind or len(tree) != len(self.children):
            raise Misfit
        for child, value in zip(self.children, tree, strict=True):
            child.flatten(value, out)

    def build(self, leaves: Iterator[Any]) -> Any:
        """Make a new one of the next leaves."""
        items = [child.build(leaves) for child in self.children]
        return self.kind._make(items) if hasattr(self.kind, "_fields") else self.kind(items)  # type: ignore[attr-defined]

    def retire(self, tree: Any) -> None:
        """Put `DONATED` in the place of every leaf of a list; a tuple can't be changed."""
        for i, child in enumerate(self.children):
            if isinstance(child, Leaf):
                if self.kind is list:
                    tree[i] = DONATED
            else:
                child.retire(tree[i])

    def places(self, replaceable: bool) -> list[bool]:
        """Return, for every leaf, whether it may be overwritten."""
        return [p for child in self.children for p in child.places(self.kind is list)]


class Other(NamedTuple):
    """A container that optree knows and we do not."""

    spec: optree.PyTreeSpec
    size: int

    def flatten(self, tree: Any, out: Leaves) -> None:
        """Add the leaves to the list."""
        leaves, spec = optree.tree_flatten(tree)
        if spec != self.spec:
            raise Misfit
        out += leaves

    def build(self, leaves: Iterator[Any]) -> Any:
        """Make a new one of the next leaves."""
        return optree.tree_unflatten(self.spec, list(islice(leaves, self.size)))

    def retire(self, tree: Any) -> None:
        """Do nothing: how to empty it is not known."""

    def places(self, replaceable: bool) -> list[bool]:
        """Return that no leaf may be overwritten."""
        return [False] * self.size


Structure = Leaf | Dict | Row | Other

_LEAF = Leaf()


def structure(tree: Any) -> Structure:
    """Return the structure of a tree.

    >>> structure({"a": 1, "b": (2, 3)}).size
    3
    """
    kind = type(tree)
    if issubclass(kind, Tensor):
        return _LEAF
    if kind is dict:
        if all(issubclass(each, Tensor) for each in set(map(type, tree.values()))):
            return Dict(tuple(tree), (), len(tree))  # as most of a state is: no look at each value
        children = tuple(structure(value) for value in tree.values())
        plain = all(isinstance(child, Leaf) for child in children)
        return Dict(tuple(tree), () if plain else children, sum(child.size for child in children))
    if kind is list or kind is tuple or (isinstance(tree, tuple) and hasattr(kind, "_fields")):
        children = tuple(structure(value) for value in tree)
        return Row(kind, children, sum(child.size for child in children))
    spec = optree.tree_structure(tree)  # pyright: ignore[reportArgumentType]
    return _LEAF if spec.is_leaf() else Other(spec, spec.num_leaves)


def flatten(tree: Any) -> tuple[Leaves, Structure]:
    """Return the leaves of a tree and its structure."""
    found = structure(tree)
    leaves: Leaves = []
    found.flatten(tree, leaves)
    return leaves, found


def leaf_names(found: Structure, prefix: str = "") -> list[str]:
    """Name every leaf by its path, such as ``opt_state/0/mu/weight``."""
    if isinstance(found, Leaf):
        return [prefix]
    if isinstance(found, Other):
        paths = ["/".join(map(str, path)) for path in found.spec.paths()]
        return ["/".join(filter(None, (prefix, path))) for path in paths]
    keys: Sequence[Any] = (
        getattr(found.kind, "_fields", range(len(found.children))) if isinstance(found, Row) else found.names
    )
    children = found.children or (Leaf(),) * len(keys)
    pairs = zip(keys, children, strict=True)
    return [name for key, child in pairs for name in leaf_names(child, f"{prefix}/{key}" if prefix else str(key))]
