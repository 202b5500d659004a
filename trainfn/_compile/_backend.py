"""From a captured graph to a program: torch.compile's backends, called on the graph itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainfn._compile._capture import compiler_error
from trainfn._compile._outside import environment
from trainfn._compile._report import Report
from trainfn._compile._sizes import Dynamic, conditions
from trainfn._compile._structure import Function
from trainfn._compile._trace import Trace
from trainfn.errors import CaptureError


class Built(NamedTuple):
    """A compiled graph.

    Attributes:
        run: Takes and returns the tensors of the graph.
        holds: Whether it is right for inputs of these sizes; None if their sizes are fixed.
    """

    run: Callable[..., Sequence[Tensor]]
    holds: Callable[[Sequence[Tensor]], bool] | None


# Programs of this process by their graph, so that twenty seeds of a sweep compile once. They hold code, no tensors.
_PROGRAMS: OrderedDict[Hashable, Built] = OrderedDict()
_MOST_PROGRAMS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to compile; see `jit`."""

    compile: bool
    backend: str | Function
    mode: str | None
    dynamic: Dynamic
    options: dict[str, Any] | None
    max_graphs: int

    @property
    def launches(self) -> bool:
        """Whether the whole step is to be one CUDA graph."""
        from_mode = self.mode in ("reduce-overhead", "max-autotune") and self.backend == "inductor"
        return (self.options or {}).get("triton.cudagraphs", from_mode)

    def key(self) -> Hashable:
        """A value that is equal for equal settings."""
        options = tuple(sorted((name, repr(value)) for name, value in (self.options or {}).items()))
        return (self.backend, self.mode, options)


def build(trace: Trace, inputs: list[Tensor], settings: Settings, report: Report) -> Built:
    """Compile a graph, unless an equal one is known.

    Raises:
        CaptureError: If the backend fails; the message says what it said.
    """
    key = _key(trace, settings)
    if key in _PROGRAMS:
        _PROGRAMS.move_to_end(key)
        report.count(trace, shared=True)
        return _PROGRAMS[key]
    with report.counting(trace):
        exact = trace.mode.shape_env is None
        run = _compiled(trace, inputs, settings)
        built = Built(run, None if exact else conditions(trace.mode, trace.graph))  # compiling adds conditions
    _PROGRAMS[key] = built
    while len(_PROGRAMS) > _MOST_PROGRAMS:
        _PROGRAMS.popitem(last=False)
    return built


def is_built(trace: Trace, settings: Settings) -> bool:
    """Return whether this process has compiled an equal graph."""
    return _key(trace, settings) in _PROGRAMS


def _key(trace: Trace, settings: Settings) -> Hashable:
    return (trace.key, settings.key(), environment())


def _compiled(trace: Trace, inputs: list[Tensor], settings: Settings) -> Callable[..., Sequence[Tensor]]:
    if settings.backend == "eager":
        return trace.graph.forward
    try:
        if settings.backend == "inductor":
            return _by_inductor(trace, settings)
        compiler: Any = torch._TorchCompileWrapper(settings.backend, settings.mode, settings.options, None)
        with _tracing(trace, inputs) as example:
            return compiler(trace.graph, example)
    except Exception as error:
        if isinstance(error, CaptureError):
            raise
        raise compiler_error(error) from error


def _by_inductor(trace: Trace, settings: Settings) -> Callable[..., Sequence[Tensor]]:
    """Compile as `torch.compile` does by default, equal parts of the graph once; see `_blocks.py`."""
    from trainfn._compile._inductor import compile_graph  # the compiler takes a second to import

    with configured(trace, settings):
        return compile_graph(trace.graph)


@contextlib.contextmanager
def configured(trace: Trace, settings: Settings) -> Generator[Any]:
    """Inductor's configuration for a graph, as it is while the graph is compiled."""
    from torch._inductor import config
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # It takes the modes and options of torch.compile, and refuses the same ones.
    patches = torch._TorchCompileInductorWrapper(settings.mode, settings.options, None).config
    patches.pop("triton.cudagraphs", None)  # see `_launch.py`: one launch for the whole step
    if trace.mode.shape_env is None:
        trace.mode.shape_env, trace.mode.static_shapes = ShapeEnv(), True  # torch's caches ask for one
    with config.patch(patches):
        yield config


@contextlib.contextmanager
def _tracing(trace: Trace, inputs: list[Tensor]) -> Generator[list[Any]]:
    """The inputs to compile for: fake ones, of symbolic sizes, if some sizes are symbolic."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    if trace.mode.shape_env is None:
        with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
            yield inputs
        return
    with tracing(TracingContext(trace.mode)):
        yield [node.meta["val"] for node in trace.graph.graph.nodes if node.op == "placeholder"]
