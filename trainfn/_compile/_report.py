"""The cost of compiling a step."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_CACHES = (("inductor", "fxgraph_cache"), ("aot_autograd", "autograd_cache"))


@dataclasses.dataclass
class Report:
    """Compilations so far, of one program or of the programs of a step together.

    Attributes:
        graphs: Compiled graphs. One for each program and shape; more say that something besides the batch changed.
        breaks: Graph breaks: 0, since a step that can't be one graph is an error.
        nodes: Operations in the captured graphs, before any optimization.
        seconds: Wall time of tracing and compiling.
        cache_hits: Graphs found in this process, or in the on-disk caches of this machine.
        cache_misses: Graphs that had to be generated.
        traces: How often the step was run to capture it; equal traces share one graph.
        shapes: What each compilation was for.
    """

    graphs: int = 0
    breaks: int = 0
    nodes: int = 0
    seconds: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    traces: int = 0
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

    @contextmanager
    def timing(self) -> Generator[None]:
        """Add the time of this block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def count(self, trace: Any, *, shared: bool = False) -> None:
        """Count one graph; ``shared`` if this process had an equal one."""
        self.graphs += 1
        self.nodes += sum(node.op.startswith("call") for node in trace.graph.graph.nodes)
        self.cache_hits += shared

    @contextmanager
    def counting(self, trace: Any) -> Generator[None]:
        """Count the graph that is compiled in this block, and where torch's caches had it."""
        nodes = sum(node.op.startswith("call") for node in trace.graph.graph.nodes)
        before = _cache_counts()
        yield
        hits, misses = (now - then for now, then in zip(_cache_counts(), before, strict=True))
        self.graphs, self.nodes = self.graphs + 1, self.nodes + nodes
        self.cache_hits, self.cache_misses = self.cache_hits + hits, self.cache_misses + misses


def _cache_counts() -> tuple[int, int]:
    """Hits and misses of this process so far; a graph found in the outer cache never reaches the inner one."""
    utils: Any = sys.modules.get("torch._dynamo.utils")  # torch's compiler takes seconds to import
    if utils is None:
        return 0, 0
    hits = sum(utils.counters[group][f"{name}_hit"] for group, name in _CACHES)
    return hits, utils.counters["inductor"]["fxgraph_cache_miss"]
