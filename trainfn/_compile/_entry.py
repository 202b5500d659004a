"""A program keeps, for one kind of arguments, the compiled graph, and where its inputs and outputs belong."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from trainfn._compile._ahead import Helper
from trainfn._compile._backend import Built
from trainfn._compile._outside import Outside
from trainfn._compile._straight import emptier, maker, taker
from trainfn._compile._structure import Arguments, Function, Leaves, Row, Structure
from trainfn._compile._trace import Trace
from trainfn._dtensor import held
from trainfn._types import TrainState


class Known:
    """The leaves of the newest state, which need no second look: tensors that a program itself returned.

    The reference to the largest leaf is a weak one. When that leaf dies, the caller has dropped the state, and the
    other leaves are dropped, too.

    Args:
        take: Lists the leaves of a state with these containers.
        head: The leaves before the largest one.
        largest: See above.
        tail: The leaves after it.
        signature: The number of their kinds.
    """

    __slots__ = ("_head", "_largest", "_tail", "signature", "size", "take")

    def __init__(
        self, take: Callable[[Any], Leaves], head: Leaves, largest: Tensor, tail: Leaves, signature: int
    ) -> None:
        self.take, self.signature = take, signature
        self.size = len(head) + 1 + len(tail)
        self._head, self._tail = head, tail

        def let_go(_: object) -> None:
            head.clear()
            tail.clear()

        self._largest = weakref.ref(largest, let_go)

    def matches(self, leaves: Leaves) -> bool:
        """Return whether these are the very leaves."""
        at = len(self._head)
        return (
            len(leaves) == self.size == at + 1 + len(self._tail)
            and leaves[at] is self._largest()
            and all(map(is_, leaves, self._head))
            and all(map(is_, leaves[at + 1 :], self._tail))
        )


def largest(leaves: Sequence[Any]) -> int | None:
    """Return the place of the largest tensor."""
    sizes = [x.numel() if isinstance(x, Tensor) else -1 for x in leaves]
    return max(range(len(sizes)), key=sizes.__getitem__) if sizes and max(sizes) >= 0 else None


class Early:
    """A captured graph for one kind of arguments, which another process compiles meanwhile."""

    def __init__(self, found: Trace, outside: Outside, helper: Helper) -> None:
        self.found, self.outside, self.helper = found, outside, helper
        self._looks = _looks(found.constants)

    def holds(self) -> bool:
        """Return whether what the graph has fixed is as it was."""
        same = self.outside.unchanged() or not self.outside.changes()
        return same and _looks(self.found.constants) == self._looks


class Entry:
    """A compiled graph for one kind of arguments, with what goes in and where its outputs go."""

    def __init__(self, found: Trace, built: Built, outside: Outside, form: Structure, *, donating: bool) -> None:
        self.run, self.holds, self.outside, self.trace = built.run, built.holds, outside, found
        self.constants = found.constants
        self._looks = _looks(found.constants)
        self._retire = emptier(form.children[0]) if donating else None  # type: ignore[union-attr]
        every = found.inputs == list(range(form.size))  # then no list of inputs is made at each call
        self._inputs = None if every else found.inputs
        self._sharded = found.sharded
        self._layouts = [output.layout for output in found.outputs if output.kind == "graph"]
        self.state_size = _state_size(found.structure)
        self.signature: int | None = None  # of the state that comes out
        self._form, self._finish = form, None
        self.take = taker(found.structure.children[0]) if self.state_size else None  # type: ignore[union-attr]

    def _finisher(self, out: Sequence[Any], leaves: Leaves) -> Function:
        """Make the function that puts the result together, and lists the leaves of the new state around the largest."""
        names = {"graph": "out", "input": "leaves"}
        found = self.trace.outputs
        sources = [(names.get(o.kind, o.kind), o.value if o.kind == "value" else o.place) for o in found]
        values = {"graph": out, "input": leaves}
        new = [values[o.kind][o.place] if o.kind in values else o.value for o in found[: self.state_size]]
        at = largest(new)
        kept = [] if at is None else [range(at), range(at, at + 1), range(at + 1, self.state_size)]
        self.state_size = self.state_size if kept else 0
        sizes = {"leaves": self._form.size, "out": len(self._layouts)}
        self._finish = maker(self.trace.structure, sources, sizes, kept)
        return self._finish

    def stale(self) -> bool:
        """Return whether a tensor from outside has become another kind, as by `module.double()`."""
        return bool(self._looks) and _looks(self.constants) != self._looks

    def fits(self, leaves: Leaves) -> bool:
        """Return whether the graph is right for these sizes."""
        return self.holds is None or self.holds([leaves[i] for i in self.trace.inputs])

    def __call__(self, state: Any, leaves: Leaves) -> Arguments:
        """Run; return the result, and the leaves of the new state as `Known` takes them."""
        # This runs at every step, with hundreds of leaves: it makes no list that it does not need.
        tensors = leaves if self._inputs is None else [leaves[i] for i in self._inputs]
        if self._sharded:
            tensors = [held(x) for x in tensors]
        out = self.run(*tensors, *self.constants) if self.constants else self.run(*tensors)
        if self._sharded:
            out = [x if how is None else how.of_local(x) for x, how in zip(out, self._layouts, strict=True)]
        made = (self._finish or self._finisher(out, leaves))(leaves, out)
        if self._retire is not None:
            self._retire(state)
        return made


def _looks(tensors: list[Tensor]) -> Leaves:
    return [(x.dtype, x.device, x.shape) for x in tensors]


def _state_size(result: Structure) -> int:
    """How many leaves of a result are those of a state."""
    if isinstance(result, Row) and result.kind is tuple and result.children:
        first = result.children[0]
        return first.size if isinstance(first, Row) and issubclass(first.kind, TrainState) else 0
    return 0
