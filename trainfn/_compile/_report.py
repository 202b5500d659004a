"""What compiling a step took."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from trainfn._compile._capture import check_keyed, check_no_sync

_CACHES = (("inductor", "fxgraph_cache"), ("aot_autograd", "autograd_cache"))


@dataclasses.dataclass
class Report:
    """Compilations so far, of one program or of the programs of a step together.

    Attributes:
        graphs: Compiled graphs. One for each program and shape; more say that something besides the batch changed.
        breaks: Graph breaks: 0, since a step that can't be one graph is an error.
        nodes: Operations in the traced graphs, before any optimization.
        seconds: Wall time of tracing and compiling.
        cache_hits: Graphs found in the on-disk caches of this machine.
        cache_misses: Graphs that had to be generated.
        shapes: What each compilation was for.
    """

    graphs: int = 0
    breaks: int = 0
    nodes: int = 0
    seconds: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    shapes: list[str] = dataclasses.field(default_factory=list[str])

    def __add__(self, other: Report) -> Report:
        """Both reports as one."""
        fields = [f.name for f in dataclasses.fields(Report)]
        return Report(**{name: getattr(self, name) + getattr(other, name) for name in fields})

    def __str__(self) -> str:
        head = (
            f"{self.graphs} graphs of {self.nodes} operations, {self.breaks} breaks, compiled in {self.seconds:.1f} s"
            f" (cache: {self.cache_hits} hits, {self.cache_misses} misses)"
        )
        return "\n  ".join([head, *self.shapes])

    def counting(self, compiler: Callable[..., Any]) -> Callable[..., Any]:
        """The same compiler backend, with its graphs counted here."""

        def counted(graph: Any, inputs: Any, **kwargs: Any) -> Any:
            check_no_sync(graph)
            check_keyed(graph)
            nodes = sum(node.op.startswith("call") for node in graph.graph.nodes)
            compiled = compiler(graph, inputs, **kwargs)
            self.graphs += 1  # not before: a compiler may ask torch to trace again
            self.nodes += nodes
            return compiled

        return counted

    @contextmanager
    def timing(self, shape: str) -> Generator[None]:
        """Attribute what is compiled in this block to ``shape``."""
        before, graphs, start = _cache_counts(), self.graphs, time.perf_counter()
        try:
            yield
        finally:
            hits, misses = (now - then for now, then in zip(_cache_counts(), before, strict=True))
            self.cache_hits += hits
            self.cache_misses += misses
            if self.graphs > graphs:
                self.seconds += time.perf_counter() - start
                self.shapes.append(shape)


def _cache_counts() -> tuple[int, int]:
    """Hits and misses of this process so far; a graph found in the outer cache never reaches the inner one."""
    from torch._dynamo.utils import counters  # here, since the tracer takes seconds to import

    hits = sum(counters[group][f"{name}_hit"] for group, name in _CACHES)
    return hits, counters["inductor"]["fxgraph_cache_miss"]
