"""The loop around a step. Read this third.

`steps` is a generator, and `fit` is a for-loop over it. Neither waits for the device; callbacks do, when they print.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import cast

from trainfn._checkpoint import Checkpoints, ranks_of
from trainfn._ranks._errors import explained
from trainfn._run._batches import Batches, placed, source
from trainfn._run._feed import feed_of
from trainfn._run._nonfinite import Policy, Watch
from trainfn._run._session import Session
from trainfn._types import Callback, Step, StepInfo, Stop, TrainState
from trainfn.callbacks._plain import callback_of
from trainfn.errors import NonFiniteError
from trainfn.process import Requests, uninterrupted


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
        batches: An iterable of batches; or a function from the number of completed steps to the next batch, or a
            `trainfn.data` loader, which a resumed run can continue. NumPy arrays become tensors, and tensors are moved
            to the state's device. With a plan, a loader is divided among the ranks; other batches are this rank's own
            rows.
        until: The value of ``state.step`` at which to stop; by default, the end of the batches.
        nonfinite: How to treat a loss that is NaN or infinite: ``"raise"``, ``"skip"`` (with a step that skips) or
            ``"continue"``. By default, skip if the step can, else raise.

    Raises:
        NonFiniteError: If the loss of a step is NaN or infinite, with the step's number.
        RuntimeError: If several processes were launched and the step has no plan: each would train by itself.
        ValueError: If the batches never end and there is no ``until``, or a call does not advance ``state.step`` by 1.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.1)
    >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> [(info.n, info.metrics["loss"].value.item()) for info in steps(step, state, [torch.ones(1)] * 2)]
    [(1, 4.0), (2, 3.9000000953674316)]
    """
    yield from _run(step, _Latest(state), batches, until, nonfinite, Requests())


class _Latest:
    """The newest complete state of a run, which `fit` still has when the loop is left by an error.

    While a step runs there is none: a donating step overwrites its state, so an error inside it leaves nothing to
    return.
    """

    def __init__(self, state: TrainState | None = None) -> None:
        self.state = state

    def complete(self) -> TrainState:
        assert self.state is not None
        return self.state

    def take(self) -> TrainState:
        state, self.state = self.complete(), None
        return state


def _run(
    step: Step,
    latest: _Latest,
    batches: Batches,
    until: int | None,
    nonfinite: Policy | None,
    requests: Requests,
) -> Iterator[StepInfo]:
    """`steps`, with what it keeps for `fit`: the latest state, and the requests to stop."""
    begin, feed = latest.complete(), feed_of(step)
    n, device = int(begin.step), begin.step.device  # waits for the device, here and after the first step
    begun = n
    feed.check(begin, until)
    del begin  # or its memory would be held for the whole run
    part = feed.part(batches)
    stream, until = source(part, n, until)
    until = feed.end(until)
    stream = feed.stream(stream, f"steps(step, state, batches), step {n + 1} or later")
    watch = Watch(nonfinite)
    last = time.perf_counter()
    try:
        while until is None or n < until:
            try:
                with explained(f", before step {n + 1},"):
                    batch = placed(next(stream), device)
            except StopIteration:
                break
            before = latest.take()
            with uninterrupted() as ctrl_c, explained(f", in step {n + 1},"):
                state, metrics = step(before, batch)
                latest.state = state
            _check_clock(state, n, first=n == begun)
            n += 1
            requests.interrupted |= ctrl_c.arrived
            watch.see(n, metrics, before)
            del before  # or its memory would be held while callbacks run
            now = time.perf_counter()
            yield StepInfo(n, state, metrics, now - last, until)
            last = now
            if requests.interrupted:
                raise KeyboardInterrupt
    finally:
        if stream is not part and isinstance(stream, Generator):
            stream.close()  # a loader's worker processes end with it; a user's own generator stays open
    watch.report(wait=True)
    if until is not None and n < until:
        warnings.warn(f"the batches ended at step {n}, before until={until}.", stacklevel=3)


def _check_clock(state: TrainState, n: int, *, first: bool) -> None:
    """Raise if a call did not advance ``state.step`` by 1; on an accelerator, only the first call is looked at."""
    if not (first or state.step.device.type == "cpu") or (now := int(state.step)) == n + 1:
        return
    raise ValueError(
        f"step(state, batch) has taken state.step from {n} to {now}, and a call is one step. Batches, checkpoints and"
        " callbacks count calls by it; a run would end early, or resume at other batches. A function that makes several"
        " updates is one step by `step = tfn.one_step(function)`, before `tfn.jit`. A function that makes a state"
        " itself advances it: `state._replace(step=state.step + 1)`."
    )


def fit(
    step: Step,
    state: TrainState,
    batches: Batches,
    *,
    until: int | None = None,
    callbacks: Sequence[Callable[[StepInfo], object]] = (),
    checkpoints: Checkpoints | None = None,
    nonfinite: Policy | None = None,
) -> TrainState:
    """Run a step over batches, call the callbacks after each step, and return the last state.

    Ctrl-C ends the run after the current step and returns its state. A second Ctrl-C ends it at once, with a
    ``KeyboardInterrupt`` and no state. An error that ends the run has the last complete state as its ``state``. Where a
    loss is not finite, that is the state before its step; if it was donated, the newest checkpoint, or None.

    With checkpoints, a fresh state is replaced by the newest saved one, and callbacks get back their saved states. Each
    change of the run since then is printed with its consequence. A finished run does nothing. The last state is always
    saved. On SIGTERM the state is saved after the current step, and the process exits.

    All ranks train a sharded state together. A signal, or a callback's `trainfn.Stop`, on one rank ends the run on all
    of them after the same step. Rank 0 prints.

    Args:
        step: See `steps`.
        state: See `steps`.
        batches: See `steps`.
        until: See `steps`.
        callbacks: Called in order after each step: functions of a `StepInfo`, or `trainfn.Callback` objects, such as
            those of `trainfn.callbacks`. One that returns `trainfn.Stop` ends the run.
        checkpoints: Where and how often to save.
        nonfinite: See `steps`.

    Raises:
        CheckpointError: If a checkpoint can't be written or does not fit; see `trainfn.Checkpoints`.
        TypeError: If a callback can't be called, or has methods of `trainfn.Callback` without being one.
        ValueError: If batches can't start at a checkpoint's step, or a callback waits for a metric that doesn't exist.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.1)
    >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> fit(step, state, lambda n: torch.ones(1), until=3)
    TrainState(functions, step=3, params=1 tensors / 1 numbers)
    """
    roles = [callback_of(callback) for callback in callbacks]
    latest = _Latest()
    try:
        with Requests(ranks_of(state)) as requests, Session(checkpoints, roles, step, batches, requests) as session:
            latest.state = session.resumed(state, until)
            session.begin(latest.state, until)
            try:
                _loop(session, roles, _run(step, latest, batches, until, nonfinite, requests))
            except KeyboardInterrupt:
                # The last step is complete, unless a second Ctrl-C forced its way out of it. Then a donated state may
                # be half overwritten, and other ranks may be at another step: there is nothing to return.
                if latest.state is None or (requests.ranks.size > 1 and not requests.interrupted):
                    raise
                if requests.ranks.rank == 0:
                    n = int(latest.state.step)
                    warnings.warn(
                        f"interrupted: the state after step {n} is returned; give it to `fit` to continue.",
                        stacklevel=2,
                    )
            session.finish(latest.complete())
    except Exception as error:
        if latest.state is not None:
            error.state = _kept(error, latest.state, checkpoints)  # type: ignore[attr-defined]
        raise
    return latest.complete()


def _kept(error: Exception, newest: TrainState, checkpoints: Checkpoints | None) -> TrainState | None:
    """The last good state: the newest; where its loss is not finite, the one before it, or that of a checkpoint."""
    if not isinstance(error, NonFiniteError):
        return newest
    if error.state is None and checkpoints is not None:
        found = checkpoints.restore(like=newest)
        return None if found is None else found[0]
    return cast("TrainState | None", error.state)


def _loop(session: Session, callbacks: Sequence[Callback], run: Iterator[StepInfo]) -> None:
    with contextlib.closing(run):  # type: ignore[type-var]
        for info in run:
            answers = [_call(callback, info) for callback in callbacks]  # all are called, also after a `Stop`
            stop = next((answer for answer in answers if answer is not None), None)
            if session.after(info, stop is not None):
                session.say(f"stopped after step {info.n}: {stop.reason if stop else 'a callback of another rank'}")
                return


def _call(callback: Callback, info: StepInfo) -> Stop | None:
    try:
        return callback(info)
    except Exception as error:
        error.add_note(f"Raised by the callback {callback!r} after step {info.n}.")
        raise
