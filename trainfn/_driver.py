"""The loop around a step. Read this third.

`steps` is a generator, `fit` a for-loop over it. Nothing here waits for the device; callbacks do, when they print.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainfn import tree
from trainfn._interrupt import uninterrupted
from trainfn._nonfinite import Policy, Watch
from trainfn._types import Batch, Mean, Metrics, Step, StepInfo, TrainState

Batches = Iterable[Batch] | Callable[[int], Batch]
Callback = Callable[[StepInfo], object]


def steps(
    step: Step,
    state: TrainState,
    batches: Batches,
    *,
    until: int | None = None,
    nonfinite: Policy | None = None,
) -> Iterator[StepInfo]:
    """Run a step over batches; yield a `StepInfo` after each.

    The generator may be left at any point: the last `StepInfo` holds the state. Ctrl-C takes effect between steps.

    Args:
        step: Compiled or not.
        state: Where to start.
        batches: An iterable of batches; or a function from the number of completed steps to the next batch, with
            which a restored state goes on exactly where it was. NumPy arrays become tensors; tensors are moved to
            the state's device.
        until: Stop when ``state.step`` has reached it; by default, when the batches end.
        nonfinite: What to do about a loss that is NaN or infinite: ``"raise"``, ``"skip"`` (with a step that does)
            or ``"continue"``. By default, skip if the step can and raise if it can't.

    Raises:
        NonFiniteError: Naming the step.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.1)
    >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> [(info.n, info.metrics["loss"].value.item()) for info in steps(step, state, [torch.ones(1)] * 2)]
    [(1, 4.0), (2, 3.9000000953674316)]
    """
    yield from _run(step, [state], batches, until, nonfinite)


def _run(
    step: Step, latest: list[TrainState], batches: Batches, until: int | None, nonfinite: Policy | None
) -> Iterator[StepInfo]:
    """`steps`, with the newest complete state in ``latest``; it is empty while a step runs."""
    n, device = int(latest[0].step), latest[0].step.device  # waits for the device, once
    source, until = _source(batches, n, until)
    watch = Watch(nonfinite)
    last = time.perf_counter()
    while until is None or n < until:
        try:
            batch = _placed(next(source), device)
        except StopIteration:
            break
        with uninterrupted() as held:
            state, metrics = step(latest.pop(), batch)
            latest.append(state)
        n += 1
        watch.see(n, metrics)
        now = time.perf_counter()
        yield StepInfo(n, state, metrics, now - last, until)
        last = now
        if held.pressed:
            raise KeyboardInterrupt
    watch.report(wait=True)
    if until is not None and n < until:
        warnings.warn(f"the batches ended at step {n}, before until={until}.", stacklevel=3)


def _source(batches: Batches, n: int, until: int | None) -> tuple[Iterator[Batch], int | None]:
    if isinstance(batches, Iterable):
        known = n + len(batches) if isinstance(batches, Sized) else None
        return iter(batches), until if until is not None else known
    if not callable(batches):
        raise TypeError(f"steps(step, state, batches): batches are an iterable, or a function of the step number, not"
                        f" {type(batches).__name__}.")  # fmt: skip
    if until is None:
        raise ValueError("steps(step, state, batches) with a function for batches never ends: say `until=1000`.")
    return (batches(i) for i in range(n, until)), until


def _placed(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Iterator):  # a stream of micro-batches
        return (_placed(micro, device) for micro in batch)
    return tree.map(lambda x: _tensor(x, device), batch)


def _tensor(x: Any, device: torch.device) -> Any:
    if isinstance(x, np.ndarray | np.number):
        x = torch.as_tensor(x)
    return x.to(device, non_blocking=True) if isinstance(x, Tensor) and x.device != device else x


def fit(
    step: Step,
    state: TrainState,
    batches: Batches,
    *,
    until: int | None = None,
    callbacks: Sequence[Callback] = (),
    nonfinite: Policy | None = None,
) -> TrainState:
    """Run a step over batches, call the callbacks after each, and return the last state.

    Ctrl-C ends the run after the step at hand and returns the last complete state; a second Ctrl-C ends it at once,
    with a ``KeyboardInterrupt`` and no state.

    Args:
        step: See `steps`, as for ``state``, ``batches``, ``until`` and ``nonfinite``.
        state: The same.
        batches: The same.
        until: The same.
        callbacks: Functions of a `StepInfo`, called in order. One that is a context manager is entered for the run.
        nonfinite: The same.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.1)
    >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> fit(step, state, lambda n: torch.ones(1), until=3)
    TrainState(functions, step=3, params=1 tensors / 1 numbers)
    """
    latest = [state]
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, contextlib.AbstractContextManager):
                stack.enter_context(callback)
        try:
            for info in _run(step, latest, batches, until, nonfinite):
                for callback in callbacks:
                    _call(callback, info)
        except KeyboardInterrupt:
            if not latest:  # forced inside a step, by a second Ctrl-C: a donated state may be half overwritten
                raise
            warnings.warn(
                f"interrupted: the state after step {int(latest[0].step)} is returned; call `fit` again to go on.",
                stacklevel=2,
            )
    return latest[0]


def _call(callback: Callback, info: StepInfo) -> None:
    try:
        callback(info)
    except Exception as error:
        error.add_note(f"Raised by the callback {callback!r} after step {info.n}.")
        raise


def evaluate(eval_step: Callable[[TrainState, Batch], Metrics], state: TrainState, batches: Iterable[Batch]) -> Metrics:
    """The metrics over all batches, exact whatever their sizes; sums are kept in float64 where the device has it.

    Raises:
        ValueError: If there is no batch.

    >>> import torch, trainfn as tfn
    >>> state = tfn.init({"w": torch.tensor([3.0])}, tfn.optim.sgd(0.1))
    >>> step = tfn.eval_step(lambda p, x: tfn.Mean.of(p["w"] * x))
    >>> evaluate(step, state, [torch.ones(3), torch.zeros(1)])["loss"]
    Mean(2.25 over weight 4)
    """
    device = state.step.device
    total: Metrics = {}
    for batch in batches:
        metrics = {name: _wide(mean) for name, mean in eval_step(state, _placed(batch, device)).items()}
        total = {name: total[name] + mean for name, mean in metrics.items()} if total else metrics
    if not total:
        raise ValueError("evaluate(eval_step, state, batches): there was no batch. An iterator can be used once.")
    return total


def _wide(mean: Mean) -> Mean:
    dtype = torch.float32 if mean.total.device.type == "mps" else torch.float64
    return Mean(mean.total.to(dtype), mean.weight.to(dtype))
