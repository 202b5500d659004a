"""Numbers and lines: the value of a metric, of one step and over a window of steps.

A metric becomes a number in `values` alone, when it is shown. No other function here waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from trainfn._plan import rank
from trainfn._types import Callback, Mean, Metrics, StepInfo, Stop
from trainfn.callbacks._plain import callback_of


def values(metrics: Metrics) -> dict[str, float]:
    """The metrics as numbers. Waits for the device.

    A metric of several numbers, such as one for each class, has an entry for each: ``name/0``, ``name/1``, ….

    >>> import torch, trainfn as tfn
    >>> values({"loss": tfn.Mean.of(torch.tensor([1.0, 3.0]))})
    {'loss': 2.0}
    """
    return {key: number for name, mean in metrics.items() for key, number in _numbers(name, mean).items()}


def _numbers(name: str, mean: Mean) -> dict[str, float]:
    value = mean.value
    if value.dim() == 0:
        return {name: float(value)}
    places = itertools.product(*map(range, value.shape))
    return {"/".join([name, *map(str, at)]): x for at, x in zip(places, value.flatten().tolist(), strict=True)}


def every(n: int, fn: Callable[[StepInfo], object]) -> Callable[[StepInfo], None]:
    """Call ``fn(info)`` after every ``n`` steps.

    >>> import torch, trainfn as tfn
    >>> seen = []
    >>> callback = every(2, lambda info: seen.append(info.n))
    >>> for k in range(1, 6):
    ...     callback(tfn.StepInfo(k, None, {}, 0.0))
    >>> seen
    [2, 4]
    """
    if n < 1:
        raise ValueError(f"every({n}, fn): the interval is {n}; give 1 or more steps.")

    def call(info: StepInfo) -> None:
        if info.n % n == 0:
            fn(info)

    return call


class window(Callback):
    """Call ``fn(info)`` after every ``n`` steps, with the metrics and seconds of these steps added up.

    The sums are in float64 and stay on the device: nothing waits until ``fn`` reads them. Checkpoints keep them.

    >>> import torch, trainfn as tfn
    >>> callback = window(2, lambda info: print(info.n, values(info.metrics)))
    >>> for k in range(1, 5):
    ...     callback(tfn.StepInfo(k, None, {"loss": tfn.Mean.of(torch.tensor([float(k)]))}, 0.1))
    2 {'loss': 1.5}
    4 {'loss': 3.5}
    """

    def __init__(self, n: int, fn: Callable[[StepInfo], object]) -> None:
        if n < 1:
            raise ValueError(f"window({n}, fn): the interval is {n}; give 1 or more steps.")
        self.n, self.fn, self._sum = n, callback_of(fn), Sum()

    def __call__(self, info: StepInfo) -> Stop | None:
        """Add a step; call ``fn`` if it is time."""
        self._sum.add(info)
        return self.fn(self._sum.take(info)) if info.n % self.n == 0 else None

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, as JSON. Waits for the device."""
        means = {name: [mean.total.tolist(), mean.weight.tolist()] for name, mean in self._sum.metrics.items()}
        return {"metrics": means, "seconds": self._sum.seconds, "steps": self._sum.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._sum = Sum()
        self._sum.metrics = {
            name: Mean(*(torch.tensor(part, dtype=torch.float64) for part in parts))
            for name, parts in state["metrics"].items()
        }
        self._sum.seconds, self._sum.steps = state["seconds"], state["steps"]


def _sum(held: Mean, new: Mean) -> Mean:
    # A restored sum is on the CPU until a step says where the metrics are.
    return type(new)(held.total.to(new.total), held.weight.to(new.weight)) + new


class Sum:
    """Metrics and seconds of several steps, added up."""

    def __init__(self) -> None:
        self.metrics: Metrics = {}
        self.seconds = 0.0
        self.steps = 0

    def add(self, info: StepInfo) -> None:
        """Add a step."""
        new = {name: mean.wide() for name, mean in info.metrics.items()}
        self.metrics = {name: _sum(self.metrics[name], m) if name in self.metrics else m for name, m in new.items()}
        self.seconds += info.seconds
        self.steps += 1

    def take(self, info: StepInfo) -> StepInfo:
        """Return the sums as a `StepInfo`, and begin anew."""
        summed = info._replace(metrics=self.metrics, seconds=self.seconds)
        self.__init__()
        return summed


def log(n: int, fn: Callable[[str], object] | None = None) -> window:
    """Print a line after every ``n`` steps: the step, the means of the metrics since the last line, steps per second.

    Rank 0 prints it. If ``fn`` is given, every rank calls it with the line instead.

    >>> import torch, trainfn as tfn
    >>> callback = log(1)
    >>> callback(tfn.StepInfo(1, None, {"loss": tfn.Mean.of(torch.tensor([0.5]))}, 0.1, until=3))
    step 1/3  loss 0.5  10 steps/s
    """
    show = fn if fn is not None else _print

    def line(info: StepInfo) -> None:
        numbers = "  ".join(f"{name} {number:.4g}" for name, number in values(info.metrics).items())
        end = f"/{info.until}" if info.until is not None else ""
        show(f"step {info.n}{end}  {numbers}  {n / info.seconds:.3g} steps/s")

    return window(n, line)


def _print(line: str) -> None:
    if rank() == 0:
        print(line)
