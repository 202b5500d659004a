"""Replay: compute a part of a run again, and check that every bit is the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from trainfn._checkpoint import restore
from trainfn._run._batches import Batches, placed, source, start_anywhere
from trainfn._types import Step, StepInfo, TrainState
from trainfn._value import diff
from trainfn.errors import ReplayError


def replay(
    folder: str | os.PathLike[str],
    first: int,
    last: int,
    *,
    step: Step,
    batches: Batches,
    like: TrainState,
    each: Callable[[StepInfo], object] = lambda info: None,
) -> TrainState:
    """Compute from a run's checkpoint of step ``first`` to that of step ``last``, and compare every bit.

    Args:
        folder: The folder of the run, as given to `trainfn.Checkpoints`.
        first: The step of the checkpoint to start from.
        last: The step of the checkpoint to compare with.
        step: The run's step.
        batches: The run's batches: a function of the step number, or a `trainfn.data` loader.
        like: A state of the same model and optimizer; it is not changed.
        each: Called with a `StepInfo` after each step.

    Returns:
        The state at ``last``.

    Raises:
        ReplayError: If a leaf comes out differently, with its name.
        CheckpointError: If a checkpoint is missing or damaged.
        ValueError: If the steps are not in order, or the batches can't start at ``first``.

    >>> import tempfile, torch, trainfn as tfn
    >>> optimizer, folder = tfn.optim.adam(0.1), tempfile.mkdtemp()
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
    >>> batch = lambda n: torch.full((1,), float(n))
    >>> _ = tfn.fit(step, state, batch, until=4, checkpoints=tfn.Checkpoints(folder, every=2))
    >>> replay(folder, 2, 4, step=step, batches=batch, like=state)
    TrainState(functions, step=4, params=1 tensors / 1 numbers)
    """
    if not 0 <= first < last:
        raise ValueError(f"replay(folder, first={first}, last={last}): give an earlier step and a later one.")
    if not start_anywhere(batches):
        raise ValueError(
            "replay(..., batches): these batches can't be started in the middle. Give the run's function of the step"
            " number, or its `tfn.data.loader`."
        )
    start, end = (restore(Path(folder) / f"checkpoint-{n}", like=like) for n in (first, last))
    state, (stream, _) = start, source(batches, first, last)
    for n in range(first + 1, last + 1):
        state, metrics = step(state, placed(next(stream), start.step.device))
        each(StepInfo(n, state, metrics, 0.0, last))
    found = diff(end, state)
    if found:
        raise ReplayError(
            f"replay({str(folder)!r}, {first}, {last}): computed again, the state of step {last} differs from the saved"
            f" one. {found}.\nThe step, the batches or the machine are not those of the run."
        )
    return state
