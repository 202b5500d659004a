"""The values that a step reads from outside its arguments, and whether they have changed since it was captured.

A captured step has fixed whatever Python did: the numbers and flags of its modules, the variables that its functions
close over, the hooks, autocast. `Outside` remembers these by identity, and looks again before each call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trainfn._compile._reach import OWN, PLAIN, Reach, content

ENVIRONMENT: dict[str, Callable[[], Any]] = {
    "torch.get_default_dtype()": torch.get_default_dtype,
    'torch.is_autocast_enabled("cpu")': partial(torch.is_autocast_enabled, "cpu"),
    'torch.get_autocast_dtype("cpu")': partial(torch.get_autocast_dtype, "cpu"),
    'torch.is_autocast_enabled("cuda")': partial(torch.is_autocast_enabled, "cuda"),
    'torch.get_autocast_dtype("cuda")': partial(torch.get_autocast_dtype, "cuda"),
    "the number of modes in force, such as `torch.set_default_device`": torch._C._len_torch_function_stack,
    "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision,
    "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled,
}
_READ = tuple(ENVIRONMENT.values())
_TRAINS = attrgetter("requires_grad")


# Read at every call of a step, so there are few. A setting of torch that is not here is not noticed when it changes.
def environment() -> tuple[Hashable, ...]:
    """Return what torch's own settings are now: a step is captured again for other ones."""
    return tuple(map(call, _READ))


class Change(NamedTuple):
    """One value that is not what it was.

    Attributes:
        name: What to call it.
        place: The identity of the container, and the key in it.
        old: What it was; `ABSENT` if it is new.
        new: What it is; `ABSENT` if it is gone.
        holder: The container.
    """

    name: str
    place: tuple[int, Any]
    old: object
    new: object
    holder: Any = None

    def __str__(self) -> str:
        return f"{self.name} from {_short(self.old)} to {_short(self.new)}"


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()


class Outside:
    """The values that a step may read, as they are now.

    Args:
        roots: The functions to look at.
        module: The module of the state.
        written: Places that the step writes to while it is captured: results of it, not inputs.
    """

    def __init__(
        self, roots: Iterable[Any], module: nn.Module | None, written: frozenset[tuple[int, Any]] = frozenset()
    ) -> None:
        self._reach = reach = Reach(roots, module)
        self._written = written
        named = [(held, name, self._keys(held, reach.names)) for held, name in reach.dicts.values()]
        named += [(held, "", self._keys(held, used)) for held, used in reach.globals.values()]
        named += [(vars(held), name, self._keys(vars(held), reach.names)) for held, name in reach.scopes.values()]
        named = [(held, name, keys) for held, name, keys in named if keys]
        rows = [(row, name) for row, name in reach.rows.values() if (id(row), None) not in written]
        self._named = named
        self._rows = rows
        # Called with the containers, they return tuples of values; `itemgetter` of one key would not.
        readers: list[Callable[[Any], Any]] = [itemgetter(*keys, keys[0]) for _, _, keys in named]
        readers += [_values if isinstance(row, dict) else tuple for row, _ in rows]
        self._readers = readers
        self._held = [held for held, _, _ in named] + [row for row, _ in rows]
        self._sized = [held for held, _ in reach.dicts.values()] + [row for row, _ in rows]
        self._cells = [cell for cell, _ in reach.cells.values() if (id(cell), None) not in written]
        self._cell_names = [name for cell, name in reach.cells.values() if (id(cell), None) not in written]
        self._parameters = [] if module is None else list(module.named_parameters())
        self._flagged = [p for _, p in self._parameters]
        self._read_tensors: list[Tensor] = []
        self._versions: list[int] = []
        self._remember()

    def watch(self, tensors: list[Tensor]) -> None:
        """Add tensors whose numbers were read: a write to one of them is a change."""
        self._read_tensors = list({id(x): x for x in tensors}.values())
        self._versions = [x._version for x in self._read_tensors]

    def _keys(self, held: Mapping[Any, Any], names: set[str]) -> tuple[Any, ...]:
        return tuple(k for k in held if k in names and k not in OWN and (id(held), k) not in self._written)

    def _remember(self) -> None:
        self._now = self._read()
        self._sizes = list(map(len, self._sized))
        self._key_sets = [set(held) for held, _ in self._reach.dicts.values()]
        self._flags = list(map(_TRAINS, self._flagged))
        self._handles = RemovableHandle.next_id
        self._hooks = [tuple(held.values()) for held, _ in self._reach.hooks]
        self._hooked = [held for held, _ in self._reach.hooks if held]
        self._hooked_sizes = list(map(len, self._hooked))

    def _read(self) -> list[Any]:
        values = chain.from_iterable([read(held) for read, held in zip(self._readers, self._held, strict=True)])
        return [*values, *map(content, self._cells)]

    def unchanged(self) -> bool:
        """Return whether everything is the very object it was: some 0.15 µs for each module with settings."""
        try:
            now = self._read()
        except (KeyError, RuntimeError):
            return False
        return (
            len(now) == len(self._now)
            and all(map(is_, now, self._now))
            and list(map(len, self._sized)) == self._sizes
            and list(map(_TRAINS, self._flagged)) == self._flags
            and RemovableHandle.next_id == self._handles
            and list(map(len, self._hooked)) == self._hooked_sizes
            and [x._version for x in self._read_tensors] == self._versions
        )

    def changes(self) -> list[Change]:
        """Return what has changed; numbers and strings that are equal have not."""
        if self.unchanged():
            return []
        found = [*self._changed_keys(), *self._new_keys(), *self._changed_rows(), *self._changed_cells()]
        hooks = zip(self._reach.hooks, self._hooks, strict=True)
        found += [
            Change(f"the hooks of {name}", (id(held), None), then, tuple(held.values()))
            for (held, name), then in hooks
            if not _same(tuple(held.values()), then)
        ]
        found += [
            Change(f"`requires_grad` of {name!r}", (id(p), "requires_grad"), then, p.requires_grad)
            for (name, p), then in zip(self._parameters, self._flags, strict=True)
            if p.requires_grad != then
        ]
        found += [
            Change(f"the numbers of a tensor {list(x.shape)} that the step reads", (id(x), None), version, x._version)
            for x, version in zip(self._read_tensors, self._versions, strict=True)
            if x._version != version
        ]
        if not found:
            self._remember()
        return found

    def _changed_keys(self) -> Iterable[Change]:
        start = 0
        for held, name, keys in self._named:
            old = self._now[start : start + len(keys)]
            start += len(keys) + 1
            for key, then in zip(keys, old, strict=True):
                now = held.get(key, ABSENT)
                if not _equal(now, then):
                    yield Change(f"{name}.{key}" if name else f"`{key}`", (id(held), key), then, now, held)

    def _new_keys(self) -> Iterable[Change]:
        for (held, name), before in zip(self._reach.dicts.values(), self._key_sets, strict=True):
            for key in [k for k in held if k not in before and (id(held), k) not in self._written]:
                yield Change(f"{name}.{key}", (id(held), key), ABSENT, held[key], held)

    def _changed_rows(self) -> Iterable[Change]:
        start = sum(len(keys) + 1 for _, _, keys in self._named)
        sizes = self._sizes[len(self._reach.dicts) :]
        for (row, name), size in zip(self._rows, sizes, strict=True):
            then, now = tuple(self._now[start : start + size]), tuple(row.values() if isinstance(row, dict) else row)
            start += size
            if not _same(now, then):
                yield Change(name, (id(row), None), then, now, row)

    def _changed_cells(self) -> Iterable[Change]:
        then = self._now[len(self._now) - len(self._cells) :]
        for cell, name, old in zip(self._cells, self._cell_names, then, strict=True):
            if not _equal(content(cell), old):
                yield Change(name, (id(cell), None), old, content(cell))


def _values(held: dict[Any, Any]) -> Iterable[Any]:
    return held.values()


def _same(now: tuple[object, ...], then: tuple[object, ...]) -> bool:
    return len(now) == len(then) and all(map(_equal, now, then))


def _equal(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and a == b)


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    plain = isinstance(value, (*PLAIN, _Absent, tuple))
    text = repr(value) if plain else f"{getattr(value, '__name__', '')} ({type(value).__name__})".strip()
    return text if len(text) <= 60 else f"{text[:57]}..."
