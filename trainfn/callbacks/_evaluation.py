"""Evaluate during training; stop early or keep the best state by the metrics."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from trainfn import tree
from trainfn._run._evaluate import evaluate
from trainfn._text import nearest
from trainfn._types import Batch, Callback, Metrics, StepInfo, Stop, TrainState
from trainfn.callbacks._log import values
from trainfn.callbacks._plain import callback_of

Mode = Literal["min", "max"]


class evaluation(Callback):
    """Evaluate after every ``every`` steps and at the end, and call further callbacks with the metrics.

    One batch is evaluated before the first step. So a misspelt metric or a failing evaluation raises its error at once,
    and not after an hour.

    Args:
        eval_step: From `trainfn.eval_step`, compiled or not.
        batches: Batches that can be iterated many times: a list, or a `trainfn.data` loader with ``epochs=1``.
        every: The number of steps from one evaluation to the next.
        then: Callbacks, called with a `StepInfo` whose metrics are those of the evaluation.
        prefix: The beginning of the metrics' names for these callbacks.
        of: A function from the run's state to the state to evaluate: ``lambda s: s._replace(params=s.extra["ema"])``.

    Raises:
        ValueError: If ``every`` is below 1, or the batches never end or can be iterated only once; before the first
            step, if a callback waits for a metric that does not exist.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.5)
    >>> loss = lambda p, x: tfn.Mean.of((p["w"] - x) ** 2)
    >>> check = evaluation(tfn.eval_step(loss), [torch.ones(2)], every=2, then=[
    ...     lambda info: print(info.n, values(info.metrics))])
    >>> state = tfn.init({"w": torch.tensor([5.0])}, optimizer)
    >>> _ = tfn.fit(tfn.train_step(loss, optimizer), state, lambda n: torch.ones(2), until=3, callbacks=[check])
    2 {'eval_loss': 0.0}
    3 {'eval_loss': 0.0}
    """

    def __init__(
        self,
        eval_step: Callable[[TrainState, Batch], Metrics],
        batches: Iterable[Batch],
        *,
        every: int,
        then: Sequence[Callable[[StepInfo], object]] = (),
        prefix: str = "eval_",
        of: Callable[[TrainState], TrainState] = lambda state: state,
    ) -> None:
        if every < 1:
            raise ValueError(
                f"evaluation(..., every={every}): give the number of steps from one to the next, 1 or more."
            )
        if iter(batches) is batches:
            raise ValueError(
                "evaluation(eval_step, batches): these batches can be iterated only once. Give a list, or a"
                " `tfn.data.loader(..., epochs=1)`."
            )
        if getattr(batches, "steps", 1) is None:
            raise ValueError(
                "evaluation(eval_step, batches): the batches never end. Write `tfn.data.loader(..., epochs=1)`."
            )
        self.eval_step, self.batches, self.every = eval_step, batches, every
        self.then = [callback_of(callback) for callback in then]
        self.prefix, self.of = prefix, of
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for callback in self.then:
            self._stack.enter_context(callback)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    def begin(self, info: StepInfo) -> list[str]:
        """Evaluate one batch, and return the names of the metrics."""
        first = next(iter(self.batches), None)
        if first is None:
            raise ValueError("evaluation(eval_step, batches): there is no batch. Give at least one.")
        names = [self.prefix + name for name in evaluate(self.eval_step, self.of(info.state), [first])]
        for callback in self.then:
            callback.check(names)
            callback.begin(info)
        return names

    def __call__(self, info: StepInfo) -> Stop | None:
        """Evaluate if it is time; return the `Stop` of a further callback."""
        if info.n % self.every != 0 and info.n != info.until:
            return None
        metrics = evaluate(self.eval_step, self.of(info.state), self.batches)
        named = info._replace(metrics={self.prefix + name: mean for name, mean in metrics.items()})
        self.latest = info.n, values(named.metrics)
        answers = [callback(named) for callback in self.then]
        return next((answer for answer in answers if answer is not None), None)

    def state_dict(self) -> dict[str, Any]:
        """The states of the further callbacks, by their number."""
        states = {str(i): callback.state_dict() for i, callback in enumerate(self.then)}
        return {i: state for i, state in states.items() if state is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        for i, callback in enumerate(self.then):
            if str(i) in state:
                callback.load_state_dict(state[str(i)])


class Best:
    """The best value of a metric so far.

    Args:
        metric: The name of the metric.
        mode: Whether the ``"min"`` or the ``"max"`` is best.
        min_delta: By how much a value must improve on the best to count as better.
    """

    def __init__(self, metric: str, mode: Mode = "min", min_delta: float = 0.0) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"{type(self).__name__}({metric!r}, mode={mode!r}): give 'min' or 'max'.")
        self.metric, self.mode, self.min_delta = metric, mode, min_delta
        self.value, self.n = math.nan, 0

    def better(self, value: float, n: int) -> bool:
        """Whether a value is the best so far, in which case it is kept; NaN never is."""
        gain = self.value - value if self.mode == "min" else value - self.value
        if math.isnan(value) or not (math.isnan(self.value) or gain > self.min_delta):
            return False
        self.value, self.n = value, n
        return True

    def of(self, info: StepInfo) -> float:
        """The value of this metric. Waits for the device."""
        self.check(info.metrics)
        return float(info.metrics[self.metric].value)

    def check(self, names: Iterable[str]) -> None:
        """Raise if the metric is not among the names."""
        known = list(names)
        if self.metric not in known:
            hint = nearest(self.metric, known, likeness=0)
            raise ValueError(f"{type(self).__name__}({self.metric!r}): the metrics are {known}.{hint}")


class SavedBest(Best):
    """A `Best` that checkpoints keep."""

    def state_dict(self) -> dict[str, Any]:
        """The best value and its step; JSON has no NaN."""
        return {"value": None if math.isnan(self.value) else self.value, "n": self.n}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.value, self.n = math.nan if state["value"] is None else state["value"], state["n"]


class early_stopping(SavedBest, Callback):
    """Stop when a metric has not improved in ``patience`` looks at it.

    Args:
        metric: The name of the metric, such as ``"eval_loss"`` in an `evaluation`.
        patience: The number of looks without a better value after which the run stops.
        mode: Whether the ``"min"`` or the ``"max"`` is best.
        min_delta: By how much a value must improve on the best to count as better.

    Raises:
        ValueError: If the metric does not exist: before the first step in an `evaluation`, else after it.

    >>> import torch, trainfn as tfn
    >>> stop = early_stopping("loss", patience=2)
    >>> for n, value in enumerate([3.0, 2.0, 2.5, 2.0]):
    ...     answer = stop(tfn.StepInfo(n, None, {"loss": tfn.Mean.of(torch.tensor([value]))}, 0.1))
    >>> answer
    Stop(reason="'loss' was best at step 1 (2), and has not improved in 2 looks since")
    """

    def __init__(self, metric: str, *, patience: int = 3, mode: Mode = "min", min_delta: float = 0.0) -> None:
        super().__init__(metric, mode, min_delta)
        if patience < 1:
            raise ValueError(f"early_stopping({metric!r}, patience={patience}): give 1 or more looks.")
        self.patience, self.waited = patience, 0

    def __call__(self, info: StepInfo) -> Stop | None:
        """Look at the metric."""
        self.waited = 0 if self.better(self.of(info), info.n) else self.waited + 1
        if self.waited < self.patience:
            return None
        looks = "look" if self.waited == 1 else "looks"
        return Stop(
            f"{self.metric!r} was best at step {self.n} ({self.value:.6g}), and has not improved in"
            f" {self.waited} {looks} since"
        )

    def state_dict(self) -> dict[str, Any]:
        """The best value, its step, and the number of looks since."""
        return {**super().state_dict(), "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        super().load_state_dict(state)
        self.waited = state["waited"]


class keep_best(Best, Callback):
    """Keep a copy of the state with the best value of a metric, in memory, as ``.state``.

    It is lost when the process ends. `trainfn.Checkpoints` with ``best="eval_loss"`` keeps the best on the disk.

    Args:
        metric: The name of the metric.
        mode: Whether the ``"min"`` or the ``"max"`` is best.
        min_delta: By how much a value must improve on the best to count as better.

    >>> import torch, trainfn as tfn
    >>> best = keep_best("loss")
    >>> for n, value in enumerate([3.0, 2.0, 2.5]):
    ...     best(tfn.StepInfo(n, {"w": torch.tensor(n)}, {"loss": tfn.Mean.of(torch.tensor([value]))}, 0.1))
    >>> best.state, best.value, best.n
    ({'w': tensor(1)}, 2.0, 1)
    """

    state: TrainState | None = None

    def __call__(self, info: StepInfo) -> None:
        """Look at the metric, and copy the state if it is the best."""
        if self.better(self.of(info), info.n):
            self.state = tree.copy(info.state)
