"""A flat graph as a line of atoms: operations that compute or write, each with the values that it reads."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

# `_unsafe_view` promises a tensor of its own and returns a view all the same.
_VIEWS = {torch.ops.aten._unsafe_view.default}
_RANDOM = torch.Tag.nondeterministic_seeded
_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class Uncuttable(Exception):
    """The graph has something in it that this module doesn't understand."""


@dataclasses.dataclass(eq=False)
class Atom:
    """One operation. Its values are itself, or its parts where it returns several tensors.

    ``reads`` are values, in the order of the arguments: views are looked through, down to what owns the memory.
    """

    node: fx.Node
    parts: dict[int | None, fx.Node]
    reads: list[fx.Node]
    writes: list[fx.Node]

    @property
    def prompt(self) -> bool:
        """Whether it is to run as soon as it can: one leaf's chain, and numbers that such chains may wait for."""
        target, out = self.node.target, self.node.meta.get("val")
        if not isinstance(target, OpOverload) or target.namespace != "aten" or _RANDOM in target.tags:
            return False  # draws and what talks to other ranks keep their places
        return self.lane >= 0 or (isinstance(out, Tensor) and out.numel() == 1 and not self.writes)

    @functools.cached_property
    def lane(self) -> int:
        """The leaf whose chain it is of, or -1."""
        lane = self.node.meta.get("lane")
        return -1 if lane is None else lane


@functools.cache
def _is_view(target: object) -> bool:
    if not isinstance(target, OpOverload):
        return False
    returns = target._schema.returns
    aliases = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return aliases or target in _VIEWS


@functools.cache
def written_positions(target: object) -> list[int]:
    """The positions of the arguments that an operation writes to; it may return only the first of them, or nothing."""
    if not isinstance(target, OpOverload):
        return []
    schema = target._schema
    written = [n for n, arg in enumerate(schema.arguments) if arg.alias_info is not None and arg.alias_info.is_write]
    if written and (len(schema.returns) > 1 or any(schema.arguments[n].kwarg_only for n in written)):
        raise Uncuttable(f"{target} writes and returns several tensors")
    return written


def owner(node: fx.Node) -> fx.Node:
    """The value whose memory a node is: its own, or that of the value it is a view of."""
    while node.op == "call_function" and looks_through(node):
        node = node.args[0]  # pyright: ignore[reportAssignmentType]
    return node


def looks_through(node: fx.Node) -> bool:
    """Whether a node is another one's memory: a view of it, an element of a list of views, or it, written to."""
    if node.target is operator.getitem:
        return _is_view(node.args[0].target)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    return node.op == "call_function" and (_is_view(node.target) or bool(written_positions(node.target)))


def is_same(node: fx.Node) -> bool:
    """Whether a node is just another name: of a tensor detached, or of one written to."""
    return node.target in _SAME or (node.op == "call_function" and bool(written_positions(node.target)))


def check(module: fx.GraphModule) -> None:
    """Raise `Uncuttable` unless the graph has tensors of known sizes only, and operations of the dispatcher only."""
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "get_attr":
            if not isinstance(getattr(module, node.target, None), Tensor):
                raise Uncuttable(f"{node} is not a tensor")
        elif node.op == "call_function":
            if node.target is not operator.getitem and not isinstance(node.target, OpOverload):
                raise Uncuttable(f"{node.target} is not an operation of the dispatcher")
        elif node.op != "placeholder":
            raise Uncuttable(f"{node.op} {node}")
        for value in _tensors(node.meta.get("val")):
            if not isinstance(value, Tensor) or not all(type(n) is int for n in (*value.shape, *value.stride())):
                raise Uncuttable(f"{node} has no fixed size")


def _tensors(value: Any) -> Iterable[Any]:
    """The tensors a node stands for. Some of several results may be missing, or be numbers that the sizes fix."""
    several = value if isinstance(value, list | tuple) else [value]
    return [v for v in several if v is not None and type(v) is not int]


def atoms(graph: fx.Graph) -> list[Atom]:
    """The atoms of a graph in its order, without those that nobody needs."""
    found: dict[fx.Node, Atom] = {}
    for node in graph.nodes:
        if node.op != "call_function" or (looks_through(node) and not written_positions(node.target)):
            continue
        if node.target is operator.getitem:
            found[node.args[0]].parts[node.args[1]] = node
            continue
        written = [node.args[n] for n in written_positions(node.target)]
        writes = [owner(n) for arg in written for n in (arg if isinstance(arg, list | tuple) else [arg])]
        parts: dict[int | None, fx.Node] = {} if isinstance(node.meta.get("val"), list | tuple) else {None: node}
        found[node] = Atom(node, parts, [owner(n) for n in inputs(node)], writes)
    return _alive(list(found.values()), graph)


def inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, in order, one that is there twice twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _alive(line: list[Atom], graph: fx.Graph) -> list[Atom]:
    needed = {owner(n) for n in inputs(next(iter(reversed(graph.nodes))))}
    out: list[Atom] = []
    for atom in reversed(line):
        if atom.writes or atom.node.is_impure() or any(part in needed for part in atom.parts.values()):
            needed.update(atom.reads)
            out.append(atom)
    return out[::-1]


def in_order(line: list[Atom]) -> list[Atom]:
    """The atoms with each leaf's chain in one piece, as early as its inputs allow; all others stay in their order.

    What is computed from the state alone (a decayed parameter) runs no earlier than the first that needs it.
    """
    before = _dependencies(line)
    lazy: set[int] = set()
    for i, atom in enumerate(line):
        if atom.prompt and atom.lane >= 0 and not atom.writes:
            if all(n in lazy or (line[n].prompt and line[n].lane < 0) for n in before[i]):
                lazy.add(i)
    return _Schedule(line, before, lazy).run()


class _Schedule:
    def __init__(self, line: list[Atom], before: list[set[int]], lazy: set[int]) -> None:
        self._line, self._before, self._lazy = line, before, lazy
        self._waiting = [0] * len(line)
        self._after: list[list[int]] = [[] for _ in line]
        waits: list[set[int]] = []
        for i, needs in enumerate(before):
            waits.append(needs - lazy)
            waits[i].update(*(waits[n] for n in needs & lazy))
            for n in waits[i]:
                self._after[n].append(i)
            self._waiting[i] = len(waits[i])
        self._ready: list[tuple[int, int]] = []
        self._done: set[int] = set()
        self._out: list[Atom] = []

    def run(self) -> list[Atom]:
        for i in range(len(self._line)):
            self._offer(i)
        self._drain()
        for i, atom in enumerate(self._line):
            if not atom.prompt:
                self._emit(i)
                self._drain()
        for i in sorted(self._lazy):  # only graph outputs need these
            self._emit(i)
        return self._out

    def _offer(self, i: int) -> None:
        if self._line[i].prompt and not self._waiting[i] and i not in self._lazy:
            heapq.heappush(self._ready, (self._line[i].lane, i))

    def _drain(self) -> None:
        while self._ready:
            self._emit(heapq.heappop(self._ready)[1])

    def _emit(self, i: int) -> None:
        if i in self._done:
            return
        self._done.add(i)
        for n in sorted(self._before[i] & self._lazy):
            self._emit(n)
        self._out.append(self._line[i])
        for follower in self._after[i]:
            self._waiting[follower] -= 1
            self._offer(follower)


def _dependencies(line: list[Atom]) -> list[set[int]]:
    """Per atom, the atoms that must run before it: they compute what it reads, or use memory before it is written."""
    made: dict[fx.Node, int] = {part: i for i, atom in enumerate(line) for part in atom.parts.values()}
    last: dict[fx.Node, int] = {}
    readers: defaultdict[fx.Node, list[int]] = defaultdict(list)
    out: list[set[int]] = []
    for i, atom in enumerate(line):
        needs = {made[r] for r in atom.reads if r in made} | {last[r] for r in atom.reads if r in last}
        for value in atom.writes:
            needs.update(readers.pop(value, ()))
            last[value] = i
        for value in atom.reads:
            readers[value].append(i)
        out.append(needs - {i})
    return out
