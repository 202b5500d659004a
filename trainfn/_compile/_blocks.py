"""Cut a graph where it repeats itself, so that equal parts are compiled once."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import operator
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from trainfn._compile._atoms import Atom, Uncuttable, atoms, check, in_order, inputs, is_same, looks_through, owner
from trainfn._compile._leafwise import leafwise
from trainfn._compile._repeats import repeats
from trainfn._compile._structure import Function
from trainfn._compile._twins import merge_twins

Run = Callable[[list[Tensor]], Sequence[Any]]
Compiler = Callable[[fx.GraphModule, list[Tensor]], Run]

_LEAST_SAVED = 16  # atoms: what repeats must save so many to be cut out
_LEAST_SHARE = 0.25  # of all atoms: a graph that repeats less stays whole
_LOOSE = 2  # atoms: so few between two pieces run as they are, one by one
_COPY = torch.ops.aten.copy_.default
_HEAVY = ("mm", "bmm", "addmm", "baddbmm", "convolution", "scaled_dot_product", "dot")

# A value of a piece: the position of its atom and, of an atom with several tensors, the number of the tensor.
_Place = tuple[int, int | None]


@dataclasses.dataclass
class _Piece:
    """A stretch of the line: the values it takes, in order of appearance, and the places of those it gives away."""

    span: range
    takes: list[fx.Node]
    gives: list[_Place]


def cut(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph that calls submodules, equal parts the same submodule; the graph itself where cutting doesn't pay.

    Args:
        graph: a flat graph of ATen operations whose nodes have their fake tensors in ``meta["val"]``. It may write to
            its inputs. Inputs are taken to share no memory with each other.

    Returns:
        A module with the same inputs and outputs; the bits are those of the graph where nothing is compiled.
    """
    try:
        check(graph)
        return _Cutter(graph).cut() or graph
    except Uncuttable:
        return graph


class _Cutter:
    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._graph = leafwise(module)
        merge_twins(self._graph)
        self._line = in_order(atoms(self._graph))
        self._names = _Names()
        self._tokens = [self._names.token(atom) for atom in self._line]
        self._made = {part: (i, n) for i, atom in enumerate(self._line) for n, part in atom.parts.items()}

    def cut(self) -> fx.GraphModule | None:
        """The outer graph, or nothing when too little repeats."""
        groups = self._groups()
        saved = sum(len(piece.span) for group in groups for piece in group[1:])
        if saved < _LEAST_SHARE * len(self._line):
            return None
        pieces = sorted((p for group in groups for p in group), key=lambda p: p.span.start)
        groups += [[self._piece(span)] for span in _gaps([p.span for p in pieces], len(self._line))]
        self._find_gives(groups)
        return self._outer(groups)

    def _groups(self) -> list[list[_Piece]]:
        """Pieces that are equal, two or more, by what they compute and from what."""
        heavy = [any(h in str(atom.node.target) for h in _HEAVY) for atom in self._line]
        out: list[list[_Piece]] = []
        for windows in repeats(self._tokens, heavy, _LEAST_SAVED):
            if 2 * sum(self._line[i].node.target is _COPY for i in windows[0]) > len(windows[0]):
                continue  # mere copies of what is computed elsewhere, into which they are to be fused
            same: defaultdict[Any, list[_Piece]] = defaultdict(list)
            for span in windows:
                piece = self._piece(span)
                same[self._wiring(piece)].append(piece)
            out += [group for group in same.values() if (len(group) - 1) * len(group[0].span) >= _LEAST_SAVED]
        return out

    def _piece(self, span: range) -> _Piece:
        """The piece of a span; what it gives is found once all pieces are known."""
        reads = (read for i in span for read in self._line[i].reads)
        outside = [read for read in reads if self._made.get(read, (-1, None))[0] not in span]
        return _Piece(span, list(dict.fromkeys(outside)), [])

    def _wiring(self, piece: _Piece) -> tuple[Any, ...]:
        """Return, for each read of the piece, the place of the value that it reads."""
        number = {value: (-1 - n, None) for n, value in enumerate(piece.takes)}
        places = (number.get(read) or self._place(read, piece) for i in piece.span for read in self._line[i].reads)
        return tuple(places)

    def _place(self, value: fx.Node, piece: _Piece) -> _Place:
        at, part = self._made[value]
        return at - piece.span.start, part

    def _find_gives(self, groups: list[list[_Piece]]) -> None:
        """Let each piece give what any of its group is asked for from outside."""
        asked: defaultdict[int, set[_Place]] = defaultdict(set)
        holder = {i: n for n, group in enumerate(groups) for piece in group for i in piece.span}
        starts = {i: piece.span.start for group in groups for piece in group for i in piece.span}
        uses = [(read, starts.get(i)) for i, atom in enumerate(self._line) for read in atom.reads]
        uses += [(owner(node), None) for node in inputs(_output(self._graph))]
        for value, reader in uses:
            at, part = self._made.get(value, (-1, None))
            if at in holder and starts[at] != reader:
                asked[holder[at]].add((at - starts[at], part))
        for n, group in enumerate(groups):
            for piece in group:
                piece.gives = sorted(asked[n], key=lambda place: (place[0], place[1] or 0))

    def _build(self, piece: _Piece) -> fx.GraphModule:
        emitter = _Emitter(fx.Graph())
        for value in piece.takes:
            new = emitter.graph.placeholder(value.name)
            new.meta["val"] = value.meta["val"].contiguous() if _has_gaps(value) else value.meta["val"]
            emitter.env[value] = new
        for i in piece.span:
            emitter.run(self._line[i])
        emitter.graph.output([emitter.part(self._line[piece.span.start + at], part) for at, part in piece.gives])
        return fx.GraphModule(torch.nn.Module(), emitter.graph)

    def _outer(self, groups: list[list[_Piece]]) -> fx.GraphModule:
        root: dict[str, Any] = {}
        emitter = _Emitter(fx.Graph())
        for node in self._graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                emitter.env[node] = emitter.graph.node_copy(node)
            if node.op == "get_attr":
                root[node.target] = getattr(self._module, node.target)
        names: dict[int, str] = {}
        for n, group in enumerate(groups):
            root[f"piece_{n}"] = self._build(group[0])
            names |= {piece.span.start: f"piece_{n}" for piece in group}
        pieces = {piece.span.start: piece for group in groups for piece in group}
        i = 0
        while i < len(self._line):
            if piece := pieces.get(i):
                self._call(emitter, piece, names[i])
                i = piece.span.stop
            else:
                emitter.run(self._line[i])
                i += 1
        emitter.graph.node_copy(_output(self._graph), emitter.emit)
        return fx.GraphModule(root, emitter.graph)

    def _call(self, emitter: _Emitter, piece: _Piece, name: str) -> None:
        call = emitter.graph.call_module(name, tuple(_without_gaps(emitter, value) for value in piece.takes))
        for n, (at, part) in enumerate(piece.gives):
            value = self._line[piece.span.start + at].parts.get(part)
            if value is not None and value.users:
                emitter.env[value] = emitter.graph.call_function(operator.getitem, (call, n))


def _has_gaps(value: fx.Node) -> bool:
    """Whether a computed value is a part of a larger tensor: a compiler may give it without the rest, or not."""
    if value.op == "placeholder":
        return False
    need = 1
    sizes = zip(value.meta["val"].stride(), value.meta["val"].shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in sizes if size != 1):
        if stride != need:
            return True
        need *= size
    return False


def _without_gaps(emitter: _Emitter, value: fx.Node) -> fx.Node:
    given = emitter.env[value]
    if not _has_gaps(value):
        return given
    return emitter.graph.call_function(torch.ops.aten.contiguous.default, (given,))


class _Emitter:
    """Writes atoms into another graph, with the views that they read."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.env: dict[fx.Node, fx.Node] = {}

    def emit(self, node: fx.Node) -> fx.Node:
        """The node of the new graph for a value or a view of one."""
        if node not in self.env:
            if is_same(node):
                return self.emit(inputs(node)[0])
            self.env[node] = self.graph.node_copy(node, self.emit)
        return self.env[node]

    def run(self, atom: Atom) -> None:
        self.env[atom.node] = self.graph.node_copy(atom.node, self.emit)
        for n in atom.parts:
            self.part(atom, n)

    def part(self, atom: Atom, part: int | None) -> fx.Node:
        """The node of one of the atom's values."""
        if part is None:
            return self.env[atom.node]
        value = atom.parts.get(part)
        if value is None or value not in self.env:
            new = self.graph.call_function(operator.getitem, (self.env[atom.node], part))
            new.meta["val"] = atom.node.meta["val"][part]
            if value is None:
                return new
            self.env[value] = new
        return self.env[value]


class _Names:
    """Numbers for atoms that do the same with tensors of the same sizes, whichever these are."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._views: dict[fx.Node, Any] = {}

    def token(self, atom: Atom) -> int:
        node = atom.node
        key = (
            str(node.target),
            self._form(node.args),
            self._form(node.kwargs),
            _look(node.meta.get("val")),
            atom.prompt,
        )
        return self._numbers.setdefault(key, len(self._numbers))

    def _form(self, arg: Any) -> Any:
        """An argument without the identity of the tensors in it."""
        if isinstance(arg, fx.Node):
            if arg not in self._views:
                self._views[arg] = self._view(arg)
            return self._views[arg]
        if isinstance(arg, list | tuple):
            return tuple(self._form(a) for a in arg)
        if isinstance(arg, dict):
            return tuple((k, self._form(v)) for k, v in arg.items())
        return type(arg).__name__, repr(arg)

    def _view(self, node: fx.Node) -> Any:
        if not (node.op == "call_function" and looks_through(node)):
            return _look(node.meta["val"])
        if is_same(node):
            return self._form(inputs(node)[0])
        return str(node.target), self._form(node.args), self._form(node.kwargs)


def _look(value: Any) -> Any:
    """Size, strides, type and device of a tensor, or of each of several."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return tuple(_look(v) for v in value) if isinstance(value, list | tuple) else None


def _output(graph: fx.Graph) -> fx.Node:
    return next(iter(reversed(graph.nodes)))


def _gaps(spans: list[range], stop: int) -> list[range]:
    """Return the gaps between the spans that are long enough for a piece."""
    edges = [0, *(edge for span in spans for edge in (span.start, span.stop)), stop]
    gaps = (range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True))
    return [gap for gap in gaps if len(gap) > _LOOSE]


class Source(NamedTuple):
    """The text of a function that calls pieces, and the operations and values that it calls them with.

    Attributes:
        text: The function, ``program``. It calls a piece as ``_run_`` and its name.
        scope: By name, operations and values that are not tensors.
    """

    text: str
    scope: dict[str, Any]


def compile_pieces(graph: fx.GraphModule, compiler: Compiler) -> Function:
    """The graph, cut and each of its distinct pieces compiled once.

    Args:
        graph: as for `cut`.
        compiler: gets a module and the fake tensors of its inputs. What it returns is called with one list of the
            inputs, which it may empty.
    """
    return assemble(*pieces(graph, compiler))


def pieces(graph: fx.GraphModule, compiler: Compiler) -> tuple[Source, dict[str, Run]]:
    """Return what `compile_pieces` assembles: the program, and the compiled pieces by name."""
    with _unswept():
        outer = cut(graph)
        if outer is graph:
            whole = {"whole": compiler(graph, _examples(graph))}
            return Source("def program(*args):\n    return _run_whole(list(args))", {}), whole
        ready: dict[str, Run] = {}
        for node in outer.graph.nodes:
            if node.op == "call_module" and node.target not in ready:
                piece = getattr(outer, node.target)
                ready[node.target] = compiler(piece, _examples(piece))
        return _written(outer), ready


def assemble(source: Source, ready: Mapping[str, Run]) -> Callable[..., Any]:
    """Return the program as a function."""
    scope = {**source.scope, **{f"_run_{name}": run for name, run in ready.items()}}
    exec(compile(source.text, "<pieces>", "exec"), scope)
    return scope["program"]


@contextlib.contextmanager
def _unswept() -> Generator[None]:
    """Keep Python from looking for garbage: a tenth of the time goes into finding little among a compiler's objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _examples(graph: fx.GraphModule) -> list[Tensor]:
    return [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]


def _written(outer: fx.GraphModule) -> Source:
    """The outer graph as one function, line by line. Each value is let go of before the last piece that takes it."""
    scope: dict[str, Any] = {}
    last: dict[fx.Node, fx.Node] = {used: node for node in outer.graph.nodes for used in node.all_input_nodes}
    lines: list[str] = []

    def written(arg: Any) -> str:
        """An argument as text: tensors have names, and so have other values."""
        if isinstance(arg, fx.Node):
            return arg.name
        if isinstance(arg, list | tuple) and any(isinstance(x, fx.Node) for x in arg):
            return f"[{', '.join(map(written, arg))}]"
        scope[f"_value_{len(scope)}"] = arg
        return f"_value_{len(scope) - 1}"

    for node in outer.graph.nodes:
        ends = [used.name for used in node.all_input_nodes if last[used] is node and used.op != "get_attr"]
        free = f"del {', '.join(ends)}" if ends else "pass"
        if node.op == "call_module":
            args = ", ".join(str(arg) for arg in node.args)
            lines += [f"_args = [{args}]", free, f"{node.name} = _run_{node.target}(_args)"]
            lines += [] if node.users else [f"del {node.name}"]
        elif node.op == "call_function" and node.target is operator.getitem:
            lines += [f"{node.name} = {node.args[0]}[{node.args[1]}]", free]
        elif node.op == "call_function":
            args = [*map(written, node.args), *(f"{name}={written(arg)}" for name, arg in node.kwargs.items())]
            scope[f"_op_{node.name}"] = node.target
            lines += [f"{node.name} = _op_{node.name}({', '.join(args)})", free]
        elif node.op == "get_attr":
            scope[node.name] = getattr(outer, node.target)
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
    names = ", ".join(node.name for node in outer.graph.nodes if node.op == "placeholder")
    return Source(f"def program({names}):\n" + "\n".join(f"    {line}" for line in lines), scope)
