"""The way from a captured graph to its compiled pieces, on the disk, so that a second process need not find it again.

Inductor's own cache is asked by the decomposed graph of each piece. To cut the graph and to decompose its pieces takes
longer than the trace. A recipe is the result: inductor's key of each piece, and the program that calls the pieces. It
is asked by the captured graph, all of inductor's configuration, and the source of this package's compiler.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import operator
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from trainfn._compile._blocks import Run, Source, assemble
from trainfn._compile._graph import canonical

_LOG = logging.getLogger("trainfn")
# An operation of another library may be another one in the next process.
_NAMESPACES = ("aten", "prims")


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A compiled piece: call it with one list of its inputs, which it may empty.

    Attributes:
        run: What inductor made. It may return more values than the piece has.
        count: The number of the piece's outputs.
        key: Inductor's key of the piece; None if inductor does not keep it.
    """

    run: Callable[[list[Tensor]], Sequence[Any]]
    count: int
    key: str | None = None

    def __call__(self, args: list[Tensor]) -> Sequence[Any]:
        """Run the piece."""
        return self.run(args)[: self.count]


class Absent(Exception):
    """There is no recipe for a graph, or inductor has forgotten one of its pieces."""


class _Recipe(NamedTuple):
    """A program's text, what it calls and gives by name, and of each piece inductor's key and its number of outputs."""

    text: str
    operations: dict[str, str]
    values: dict[str, Any]
    pieces: dict[str, tuple[str, int]]


def key_of(graph: fx.GraphModule, examples: Sequence[Any]) -> str | None:
    """Return the name under which a graph's recipe is kept; None if it can't have one.

    Sizes that are symbols come with conditions, which only the compiler finds.
    """
    if any(not _is_exact(x) for x in examples) or not all(_is_known(node) for node in graph.graph.nodes):
        return None
    try:
        parts = (_inductor_key(), _own_source(), repr(canonical(graph)))
    except Exception as error:  # other internals of torch: all goes inductor's own way
        _LOG.debug("no recipe: %s: %s", type(error).__name__, error)
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _is_exact(example: Any) -> bool:
    return isinstance(example, Tensor) and all(isinstance(n, int) for n in (*example.shape, *example.stride()))


def _is_known(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    return node.target is operator.getitem or getattr(node.target, "namespace", None) in _NAMESPACES


def _inductor_key() -> str:
    """Inductor's own key of an empty graph: it covers its configuration, the system, and torch's sources."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.codecache import compiled_fx_graph_hash
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    if not config.fx_graph_cache or getattr(config, "force_disable_caches", False):
        raise Absent("inductor keeps nothing")
    empty = fx.GraphModule(torch.nn.Module(), fx.Graph())
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
        return compiled_fx_graph_hash(empty, [torch.empty(0)], {}, ())[0]


@functools.cache
def _own_source() -> str:
    """A hash of the files that cut and decompose."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _file(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "trainfn" / key[:2] / key


def keep(key: str, source: Source, ready: Mapping[str, Run]) -> None:
    """Write a recipe, if inductor keeps every piece; the graph is compiled all the same where that fails."""
    pieces = {name: (run.key, run.count) for name, run in ready.items() if isinstance(run, Piece) and run.key}
    if len(pieces) < len(ready):
        return
    operations = {name: str(x) for name, x in source.scope.items() if isinstance(x, torch._ops.OpOverload)}
    values = {name: x for name, x in source.scope.items() if name not in operations}
    try:
        _write(_file(key), pickle.dumps(tuple(_Recipe(source.text, operations, values, pieces))))
    except Exception as error:  # a full disk, a folder that can't be written, a value that can't be pickled
        _LOG.debug("a recipe that can't be kept: %s: %s", type(error).__name__, error)


def _write(file: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as new:
        try:
            new.write(data)
            new.flush()
            os.replace(new.name, file)
        except BaseException:
            os.unlink(new.name)
            raise


def follow(key: str | None) -> Callable[..., Any]:
    """Return the compiled graph of a recipe.

    Raises:
        Absent: If there is no recipe, it can't be read, or inductor has forgotten one of its pieces.
    """
    if key is None:
        raise Absent
    try:
        recipe = _Recipe(*pickle.loads(_file(key).read_bytes()))
        scope = {name: _operation(path) for name, path in recipe.operations.items()}
        ready = {name: Piece(_loaded(key), count, key) for name, (key, count) in recipe.pieces.items()}
        _count_hits(len(ready))
        return assemble(Source(recipe.text, {**scope, **recipe.values}), ready)
    except FileNotFoundError as error:
        raise Absent from error
    except Exception as error:
        _LOG.debug("a recipe that can't be followed: %s: %s", type(error).__name__, error)
        raise Absent from error


def _count_hits(count: int) -> None:
    from torch._dynamo.utils import counters

    # Inductor counts in a place that a recipe does not pass. `Report.cache_hits` is the sum of its counters.
    counters["inductor"]["fxgraph_cache_hit"] += count


def _operation(path: str) -> Any:
    found: Any = torch.ops
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _loaded(key: str) -> Callable[[list[Tensor]], Sequence[Any]]:
    """Return what inductor keeps under a key."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.codecache import FxGraphCache
    from torch._inductor.output_code import CompiledFxGraphConstants
    from torch._inductor.utils import BoxedBool
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    constants, options = CompiledFxGraphConstants(), {"cudagraphs": BoxedBool(False), "is_backward": False}
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
        found, _ = FxGraphCache._lookup_graph(key, (), local=True, remote_cache=None, constants=constants)
        if found is None:
            raise Absent
        found.post_compile((), constants, options)  # pyright: ignore[reportArgumentType]
    return found
