"""A progress bar."""

from __future__ import annotations

import time
from typing import Any, Self

from trainfn._plan import rank
from trainfn._types import Callback, StepInfo
from trainfn.callbacks._log import Sum, values


class progress(Callback):
    """Show a progress bar on rank 0, in terminals and notebooks: mean metrics, steps per second, time left.

    Args:
        per_step: Amounts of one step, to be shown per second: ``per_step={"tok": batch * length}``.
        seconds: The time between two refreshes; only a refresh waits for the device.
        **options: Passed to ``tqdm.auto.tqdm``.

    >>> import trainfn as tfn
    >>> callbacks = [tfn.callbacks.progress(per_step={"tok": 64 * 128})]
    """

    def __init__(self, *, per_step: dict[str, float] | None = None, seconds: float = 0.5, **options: Any) -> None:
        self.per_step, self.seconds, self.options = per_step or {}, seconds, options

    def __enter__(self) -> Self:
        """Show the bar, which says "first step" while the program is compiled."""
        from tqdm.auto import tqdm  # here, so that `import trainfn` stays fast

        options: dict[str, Any] = {"unit": "step", "desc": "first step", "disable": rank() > 0, **self.options}
        self._bar: Any = tqdm(**options)
        self._sum, self._shown, self._started = Sum(), time.perf_counter(), False
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
        """Begin to measure after the first step, whose time includes the compilation."""
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
