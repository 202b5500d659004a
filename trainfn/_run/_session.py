"""A run and its checkpoints: where it resumes, what is saved with the state, and what has changed since."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from trainfn import tree
from trainfn._checkpoint import Checkpoints
from trainfn._dtensor import full
from trainfn._run._batches import Batches, start_anywhere
from trainfn._run._describe import described
from trainfn._types import Callback, StepInfo, TrainState
from trainfn.callbacks._evaluation import SavedBest
from trainfn.optim import get_hyperparams
from trainfn.process import Requests

_OTHER_ROWS = "from here on the steps see other rows than the saved run would have seen"
# The consequence of a changed entry of the run's description, by the beginning of its name.
_CONSEQUENCES = {
    "batches": _OTHER_ROWS,
    "accumulate": "the same rows per step and the same update, but for the order of floating-point additions",
    "until": "the run ends at another step; a schedule made from its length is another one",
    "step": "the steps from here on are those of this run",
    "seed": "the saved run's key is kept; for the new seed, give another folder",
    "hyperparams": "the saved state's value is kept; `tfn.optim.set_hyperparams(state, ...)` changes it",
}


class Session:
    """The checkpoints and callbacks of one call of `fit`, as a context.

    Args:
        checkpoints: Where to save, or None.
        callbacks: The run's callbacks, whose states are saved too.
        step: The step function.
        batches: The run's batches.
        requests: What signals asked the run to do.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        callbacks: Sequence[Callback],
        step: Any,
        batches: Batches,
        requests: Requests,
    ) -> None:
        self._stack = contextlib.ExitStack()
        self.checkpoints, self.callbacks = checkpoints, callbacks
        self.step, self.batches, self.requests = step, batches, requests
        self.saved: int | None = None
        self.until: int | None = None
        self._given: dict[str, Any] = {}  # what the run's description says of the state that `fit` was given
        self.best: SavedBest | None = None
        if checkpoints is None:
            return
        if not start_anywhere(batches):
            raise ValueError(
                "fit(..., checkpoints=...): these batches can't be started in the middle, so a run could not resume"
                " from a checkpoint. Give a function of the step number, `lambda n: batch`, or a `tfn.data.loader`."
            )
        if checkpoints.best is not None:
            self.best = SavedBest(checkpoints.best, checkpoints.mode)

    def __enter__(self) -> Self:
        """Lock the folder, and take note of SIGTERM, which a run with checkpoints answers by a save."""
        if self.checkpoints is not None:
            self._stack.enter_context(self.checkpoints)  # first, so that it is left last: it waits for the last save
            self._stack.enter_context(self.requests.termination())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Leave the callbacks, then the checkpoints."""
        return self._stack.__exit__(kind, error, trace)

    def begin(self, state: TrainState, until: int | None) -> None:
        """Enter the callbacks; before a first step, have them begin.

        Raises:
            ValueError: If the metric by which to keep the best checkpoint is not among those that are evaluated.
        """
        for callback in self.callbacks:
            self._stack.enter_context(callback)
        info = StepInfo(int(state.step), state, {}, 0.0, until)
        if info.until is not None and info.n >= info.until:
            if self.checkpoints is not None:
                self.say(
                    f"the run is finished: the state is at step {info.n}, and until={info.until}. Nothing is trained."
                    " To train on, give a larger `until`; to start anew, give another folder."
                )
            return  # a finished run does nothing
        self._check_best([name for callback in self.callbacks for name in callback.begin(info) or ()])

    def resumed(self, state: TrainState, until: int | None) -> TrainState:
        """The newest saved state, if there is one and ``state`` is a fresh one; else ``state``."""
        self.until = until
        if self.checkpoints is None:
            return state
        self._given = _of_state(state)
        if not isinstance(state, TrainState):
            raise TypeError(
                f"fit(..., checkpoints=...): the state is a {type(state).__name__}, and only states of `tfn.init` can"
                " be saved. DeepSpeed's engine saves itself: leave `checkpoints` out and write"
                " `callbacks=[tfn.deepspeed.saving(folder, every=100)]`."
            )
        steps, n = self.checkpoints.steps(), int(state.step)
        if not steps or (n == steps[-1] and n > 0):
            self.saved = n if steps else None
            return state
        if n > 0:
            if n > steps[-1]:
                return state
            raise ValueError(
                f"fit(step, state, ...): the state is at step {n}, and {str(self.checkpoints.folder)!r} has checkpoints"
                f" up to step {steps[-1]}. To resume from there, give the fresh state that `tfn.init` makes; to"
                " continue from this state, give another folder."
            )
        found = self.checkpoints.restore(like=state)
        if found is None:
            return state
        state, extra = found
        self.saved = int(state.step)
        self.say(f"resuming from {self.checkpoints.folder}/checkpoint-{self.saved}")
        self._say_changes(extra.get("run", {}))
        self._give_back(extra.get("callbacks", []))
        if self.best is not None and extra.get("best"):
            self.best.load_state_dict(extra["best"])
        return state

    def after(self, info: StepInfo, stop: bool = False) -> bool:
        """Raise the error of a save in the background; save if it is time, or if the process is to end.

        Returns:
            Whether to stop, because ``stop`` is set on any rank.
        """
        failed = self.checkpoints is not None and self.checkpoints.failed()
        stop, failed, wanted = self.requests.agree(stop, failed, self._wanted(info.n))
        if self.checkpoints is None:
            return stop
        if failed:
            self.checkpoints.wait()
        if wanted or self.requests.terminated:
            self._save(info.state, info.n)
        if self.requests.terminated:
            self.checkpoints.wait()
            self.say(f"SIGTERM: saved {self.checkpoints.folder}/checkpoint-{info.n}, and stopped")
            raise SystemExit(128 + 15)  # the exit status of a process that SIGTERM ended
        return stop

    def _check_best(self, names: list[str]) -> None:
        if self.best is None:
            return
        if not names:
            raise ValueError(
                f"Checkpoints(..., best={self.best.metric!r}): nothing is evaluated in this run. Add"
                " `tfn.callbacks.evaluation(eval_step, batches, every=...)` to its callbacks."
            )
        self.best.check(names)

    def _wanted(self, n: int) -> bool:
        """Whether it is time to save: by the number of the step, or because the state is the best so far."""
        if self.checkpoints is None:
            return False
        metrics = self._metrics(n)
        better = self.best is not None and self.best.metric in metrics and self.best.better(
            metrics[self.best.metric], n)  # fmt: skip
        return better or self.checkpoints.due(n)

    def finish(self, state: TrainState) -> None:
        """Save the last state, unless it is saved already."""
        if self.checkpoints is not None and int(state.step) != self.saved:
            self._save(state, int(state.step))

    def _save(self, state: TrainState, n: int) -> None:
        assert self.checkpoints is not None
        extra: dict[str, Any] = {"run": self._description(), "callbacks": self._states()}
        if self.best is not None:
            extra["best"] = self.best.state_dict()
        self.checkpoints.save(state, extra, metrics=self._metrics(n) or None)
        self.saved = n

    def _metrics(self, n: int) -> dict[str, float]:
        """The metrics of the evaluations at step ``n``."""
        latest = [callback.latest for callback in self.callbacks if callback.latest is not None]
        return {name: value for step, metrics in latest if step == n for name, value in metrics.items()}

    def _description(self) -> dict[str, Any]:
        inner = getattr(self.step, "step", self.step)
        describe = getattr(self.batches, "describe", None)
        name = getattr(self.batches, "__qualname__", type(self.batches).__name__)
        return {
            "batches": describe() if describe is not None else {"function": name},
            "accumulate": getattr(inner, "accumulate", 1),
            "until": self.until,
            "step": described(self.step),
            **self._given,
        }

    def _say_changes(self, then: dict[str, Any]) -> None:
        current = {name: value for name, value in self._description().items() if name in then}
        was, now = _flat(then), _flat(current)
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                why = next((text for start, text in _CONSEQUENCES.items() if name.startswith(start)), "")
                self.say(f"changed: {name} was {was.get(name)!r}, is {now.get(name)!r}: {why}")

    def _states(self) -> list[dict[str, Any]]:
        states = [(type(callback).__name__, callback.state_dict()) for callback in self.callbacks]
        return [{"name": name, "state": state} for name, state in states if state is not None]

    def _give_back(self, states: list[dict[str, Any]]) -> None:
        """Give each callback the first state saved under its class's name; two of one class keep their order."""
        left = list(states)
        for callback in self.callbacks:
            name = type(callback).__name__
            mine = next((saved for saved in left if saved["name"] == name), None)
            if mine is not None:
                left.remove(mine)
                callback.load_state_dict(mine["state"])
            elif callback.state_dict() is not None:
                self.say(f"changed: the callback {name} is new, and starts without a state")
        for saved in left:
            name = saved["name"]
            self.say(f"changed: the callback {name} of the saved run is not in this one; its state is dropped")

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.requests.ranks.rank == 0:
            print(f"trainfn: {text}", file=sys.stderr)


def _of_state(state: TrainState) -> dict[str, Any]:
    """The seed and the hyperparameters of the state that `fit` was given, which a restored one replaces."""
    if not isinstance(state, TrainState):
        return {}
    try:
        numbers = {name: float(f"{float(full(value)):.7g}") for name, value in get_hyperparams(state).items()}
    except ValueError:  # the optimizer has none in its state
        numbers = {}
    return {"seed": str([int(x) for x in full(state.key)]), "hyperparams": numbers}


def _flat(description: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("/", "."): value for name, value in tree.named_leaves(description).items()}
