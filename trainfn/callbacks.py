"""Functions of a `StepInfo`, for `trainfn.fit`: progress, logging, and whatever should happen every so often.

A metric becomes a number only here, in `values`, and only when it is shown: that is the one place that waits for
the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from trainfn._types import Metrics, StepInfo


def values(metrics: Metrics) -> dict[str, float]:
    """The metrics as numbers. Waits for the device.

    >>> import torch, trainfn as tfn
    >>> values({"loss": tfn.Mean.of(torch.tensor([1.0, 3.0]))})
    {'loss': 2.0}
    """
    return {name: float(mean.value) for name, mean in metrics.items()}


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
        raise ValueError(f"every({n}, fn): the interval is 1 or more.")

    def call(info: StepInfo) -> None:
        if info.n % n == 0:
            fn(info)

    return call


def window(n: int, fn: Callable[[StepInfo], object]) -> Callable[[StepInfo], None]:
    """Like `every`, with the metrics and seconds of all steps since the last call, added up.

    The sum stays on the device; nothing waits until ``fn`` looks.

    >>> import torch, trainfn as tfn
    >>> callback = window(2, lambda info: print(info.n, values(info.metrics)))
    >>> for k in range(1, 5):
    ...     callback(tfn.StepInfo(k, None, {"loss": tfn.Mean.of(torch.tensor([float(k)]))}, 0.1))
    2 {'loss': 1.5}
    4 {'loss': 3.5}
    """
    if n < 1:
        raise ValueError(f"window({n}, fn): the interval is 1 or more.")
    held = _Sum()

    def call(info: StepInfo) -> None:
        held.add(info)
        if info.n % n == 0:
            fn(held.take(info))

    return call


class _Sum:
    """Metrics and seconds of several steps, added up."""

    def __init__(self) -> None:
        self.metrics: Metrics = {}
        self.seconds = 0.0
        self.steps = 0

    def add(self, info: StepInfo) -> None:
        self.metrics = {k: m + self.metrics[k] if k in self.metrics else m for k, m in info.metrics.items()}
        self.seconds += info.seconds
        self.steps += 1

    def take(self, info: StepInfo) -> StepInfo:
        summed = info._replace(metrics=self.metrics, seconds=self.seconds)
        self.__init__()
        return summed


def log(n: int, fn: Callable[[str], object] = print) -> Callable[[StepInfo], None]:
    """Every ``n`` steps, give ``fn`` one line: step, the metrics' means since the last line, steps per second.

    >>> import torch, trainfn as tfn
    >>> callback = log(1)
    >>> callback(tfn.StepInfo(1, None, {"loss": tfn.Mean.of(torch.tensor([0.5]))}, 0.1, until=3))
    step 1/3  loss 0.5  10 steps/s
    """

    def line(info: StepInfo) -> None:
        numbers = "  ".join(f"{name} {number:.4g}" for name, number in values(info.metrics).items())
        end = f"/{info.until}" if info.until is not None else ""
        fn(f"step {info.n}{end}  {numbers}  {n / info.seconds:.3g} steps/s")

    return window(n, line)


class progress:
    """A progress bar for terminals and notebooks: mean metrics, steps per second, time left.

    Args:
        per_step: Also show how many of something a second: ``per_step={"tok": batch * length}``.
        seconds: Time between refreshes; only a refresh waits for the device.
        **options: For ``tqdm.auto.tqdm``.

    >>> import trainfn as tfn
    >>> callbacks = [tfn.callbacks.progress(per_step={"tok": 64 * 128})]
    """

    def __init__(self, *, per_step: dict[str, float] | None = None, seconds: float = 0.5, **options: Any) -> None:
        self.per_step, self.seconds, self.options = per_step or {}, seconds, options

    def __enter__(self) -> progress:
        """Show that the first step is under way, which compiles the program."""
        from tqdm.auto import tqdm  # here, so that `import trainfn` stays fast

        options: dict[str, Any] = {"unit": "step", "desc": "first step", **self.options}
        self._bar: Any = tqdm(**options)
        self._sum, self._shown, self._started = _Sum(), time.perf_counter(), False
        return self

    def __call__(self, info: StepInfo) -> None:
        """Count a step; refresh if it is time."""
        self._sum.add(info)
        if not self._started:
            self._start(info)
            return
        now = time.perf_counter()
        if now - self._shown >= self.seconds or info.n == info.until:
            steps, window = self._sum.steps, self._sum.take(info)
            rates = {f"{name}/s": f"{amount * steps / window.seconds:,.0f}" for name, amount in self.per_step.items()}
            self._show(window, rates)
            self._shown = now

    def _start(self, info: StepInfo) -> None:
        """Begin to measure: the first step, with its compilation, tells nothing about the others."""
        self._started = True
        self._bar.reset(total=info.until)
        self._bar.initial = self._bar.n = self._bar.last_print_n = info.n
        self._bar.set_description(self.options.get("desc"), refresh=False)
        self._show(self._sum.take(info), {})

    def _show(self, info: StepInfo, rates: dict[str, str]) -> None:
        numbers = {name: f"{number:.4g}" for name, number in values(info.metrics).items()}
        self._bar.set_postfix({**numbers, **rates}, refresh=False)
        self._bar.update(info.n - self._bar.n)
        self._bar.refresh()

    def __exit__(self, *error: object) -> None:
        """Leave the bar as it is."""
        self._bar.close()
