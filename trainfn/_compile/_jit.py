"""`jit`: a step in, the same step out, compiled."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch

from trainfn._batch_types import recognize
from trainfn._changes import check_unchanged
from trainfn._compile._backend import Settings
from trainfn._compile._buckets import Buckets
from trainfn._compile._donate import check_alive
from trainfn._compile._file_save import save_step
from trainfn._compile._launch import Launches
from trainfn._compile._program import Program
from trainfn._compile._report import Report
from trainfn._compile._sizes import Dynamic, check_dynamic
from trainfn._compile._structure import Function
from trainfn._compile._warm import Warm, check_warm
from trainfn._grad import of_whole
from trainfn._module import check_whole
from trainfn._reached import without_late
from trainfn._step import TrainStep
from trainfn._types import TrainState


class Compiled:
    """A compiled step: call it as the step itself. Made by `jit`."""

    def __init__(
        self,
        step: Function,
        settings: Settings,
        *,
        donate: bool,
        buckets: Buckets | None,
        warm: int | Literal["eager"] | None,
    ) -> None:
        self.step, self.settings, self.buckets = step, settings, buckets
        self.plan: Any = getattr(step, "plan", None)
        self._programs = _programs(step, settings, donate)
        self._run = _joined(step, self._programs)
        if settings.compile and settings.launches and getattr(step, "accumulate", 1) != "stream":
            self._run = Launches(self._run, self._programs, donate=donate)
        if settings.compile and warm is not None:
            early = _joined(step, [program.ahead for program in self._programs])
            self._run = Warm(self._run, early, self._programs, warm)

    @property
    def takes_first_row(self) -> bool:
        """Whether a third argument says how many rows were before this batch, as in an `eval_step`."""
        return getattr(self.step, "takes_first_row", False)

    def __call__(self, state: Any, batch: Any, /, *first_row: Any) -> Any:
        """Run the step."""
        check_alive(state)
        if isinstance(state, TrainState):
            check_unchanged(state)
        if self.settings.compile and self.plan is not None:  # eager steps look themselves
            self.plan.check(state)
        elif self.settings.compile and isinstance(self.step, TrainStep):
            check_whole(state)
        recognize(batch)
        if self.buckets is not None:
            batch = self.buckets.apply(batch)
        return self._run(state, batch, *first_row)

    def graph(self, state: Any, batch: Any) -> torch.fx.GraphModule:
        """Capture the whole step for these arguments, without running it, and return its graph.

        The graph takes the tensors of the state and the batch one by one, and has the user's line and module path at
        each operation. `print_readable()` prints it, ``graph.graph.nodes`` lists its operations.

        >>> import torch, trainfn as tfn
        >>> optimizer = tfn.optim.sgd(0.5)
        >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
        >>> step = jit(tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer))
        >>> [node.name for node in step.graph(state, torch.ones(2)).graph.find_nodes(op="placeholder")]
        ['step', 'params_w', 'key', 'batch']
        """
        recognize(batch)
        if self.buckets is not None:
            batch = self.buckets.apply(batch)
        with torch.no_grad():
            return Program(self.step, self.settings, donate=False, name="step").capture(state, batch).graph

    def save(self, path: str | os.PathLike[str], state: Any, batch: Any, *more: Any) -> None:
        """Compile the step ahead of time into a file, which `trainfn.load_step` runs at once in another process.

        Nothing is run, and the state stays as it is. The file holds for arguments like these, for this version of
        torch and this kind of machine; what the step read from outside them is fixed in it.

        Args:
            path: The file to write.
            state: A state.
            batch: A batch.
            more: Further batches, for steps of other sizes.

        Raises:
            CaptureError: If the step can't be one graph, or can't be compiled.
            ValueError: If the step's settings, or what it takes and returns, can't be in a file.
        """
        save_step(Path(path), self.step, self._programs, state, [batch, *more], buckets=self.buckets)

    def explain(self) -> Report:
        """Graphs, breaks, compile seconds and cache hits so far; print it."""
        return sum((program.report for program in self._programs), Report())

    def __repr__(self) -> str:
        return f"Compiled({self.step!r}, {self.explain()})"


def _programs(step: Function, settings: Settings, donate: bool) -> list[Program]:
    """Return the programs of a step: its two parts under accumulation, or all of it."""
    if isinstance(step, TrainStep) and step.accumulate != 1:
        exact = dataclasses.replace(settings, dynamic=None)
        gradients = Program(step.gradients, settings, donate=False, name="gradients")
        return [gradients, Program(step.update, exact, donate=donate, name="update")]
    if isinstance(step, TrainStep):
        parts = step
        run = lambda s, b: parts.advanced(s, of_whole(parts.gradients)(s, b))  # noqa: E731
        return [Program(run, settings, donate=donate, name="step")]
    return [Program(step, settings, donate=donate, name=getattr(step, "__name__", "step").strip("<>"))]


def _joined(step: Function, parts: Sequence[Function]) -> Function:
    """Return the step that is made of these parts."""
    if len(parts) == 1:
        return parts[0]
    gradients = lambda state, *rest: parts[0](without_late(state), *rest)  # noqa: E731
    return torch.no_grad()(dataclasses.replace(cast("TrainStep", step), gradients=gradients, update=parts[1]))


def jit(
    step: Function,
    *,
    compile: bool = True,
    donate: bool = False,
    backend: str | Function = "inductor",
    mode: str | None = None,
    dynamic: Dynamic = None,
    options: dict[str, Any] | None = None,
    max_graphs: int = 8,
    buckets: Buckets | None = None,
    warm: int | Literal["eager"] | None = None,
) -> Compiled:
    """Compile a pure step whole: forward, loss, backward, optimizer, schedule and metrics in one graph.

    With accumulation there are two graphs, whatever the number of micro-batches: the gradients of one, and the
    update. Log lines and warnings of a module's forward pass are left out of the compiled program.

    Args:
        step: ``(state, batch) -> (state, metrics)``, or any pure function of a state and a batch.
        compile: False runs the same step eagerly, donation and checks included: for debugging.
        donate: Let the new state take the old one's memory: no second copy of parameters and moments. The old state
            must not be used again; if it is, a `DonatedStateError` says so.
        backend: A backend of ``torch.compile``.
        mode: A mode of ``torch.compile``, such as ``"max-autotune"``. With ``"reduce-overhead"`` on CUDA, the whole
            step is one launch of a CUDA graph from its third call on.
        dynamic: Dimensions of the batch whose sizes vary, compiled once for all sizes. True for every dimension,
            ``(1,)`` for the second of every leaf, ``{"input_ids": (0, 1)}`` by leaf, ``"auto"`` for those that are
            seen to vary. By default sizes are exact, and each new one is compiled for.
        options: Options of the backend.
        max_graphs: Compiled graphs allowed per program. One more is a `RecompileError` that names what changed.
        buckets: Sizes to pad batches to, one compilation each.
        warm: Run the steps before this one eagerly, while a second process compiles. From the step on at which
            ``state.step`` is ``warm``, the compiled program runs; it is waited for if it must be. What runs depends
            on ``state.step`` alone: a repeated or resumed run has the same bits. ``"eager"`` is 100. The second
            process needs memory of its own: some 0.5 GB, and on an accelerator a context.

    Raises:
        CaptureError: At the first call, if the step can't be one graph; it shows the line and the remedy.
        RecompileError: If the budget is exceeded.
        DonatedStateError: If a donated state is used again.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.5)
    >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
    >>> step = jit(tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer), donate=True, compile=False)
    >>> state, metrics = step(state, torch.ones(2))
    >>> state.params["w"]
    tensor([3.5000])

    The first hundred steps run at once, those after them faster:

    >>> step = jit(tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer), warm=100)
    >>> state, metrics = step(state, torch.ones(2))
    >>> step.explain().graphs  # the step was eager
    0
    """
    if isinstance(step, Compiled):
        raise TypeError(
            "jit(step): this step is compiled already. Call it as it is; or compile the one inside with other options,"
            " `jit(step.step, ...)`."
        )
    if not callable(step):
        raise TypeError(
            f"jit(step) takes a function (state, batch) -> (state, metrics), not {type(step).__name__}. Write"
            " `jit(tfn.train_step(loss, optimizer))`."
        )
    if max_graphs < 1:
        raise ValueError(
            f"jit(step, max_graphs={max_graphs}): a step can't run without at least one graph. Write `max_graphs=1` for"
            " one shape of batches, or leave it out."
        )
    check_dynamic(dynamic)
    check_warm(warm, backend, dynamic)
    settings = Settings(
        compile=compile,
        backend=backend,
        mode=mode,
        dynamic=dynamic,
        options=options,
        max_graphs=max_graphs,
    )
    return Compiled(step, settings, donate=donate, buckets=buckets, warm=warm)
