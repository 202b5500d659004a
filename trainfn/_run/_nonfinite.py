"""Find the step whose loss became NaN or infinite, without waiting for the device."""

from __future__ import annotations

import collections
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from trainfn._compile import is_alive
from trainfn._types import Mean, Metrics
from trainfn.errors import NonFiniteError, NonFiniteWarning

Policy = Literal["raise", "skip", "continue"]


class Watch:
    """Checks each step's loss as soon as it is known.

    On a CPU it is known at once. On an accelerator a flag is copied to the host behind the computation and read once it
    has arrived, a step or two later; the report names the step of the flag.
    """

    def __init__(self, policy: Policy | None) -> None:
        if policy not in (None, "raise", "skip", "continue"):
            raise ValueError(f'nonfinite={policy!r}: give "raise", "skip" or "continue".')
        self.policy = policy
        self._pending: collections.deque[tuple[int, Tensor, torch.Event | None, bool, Any]] = collections.deque()

    def see(self, n: int, metrics: Metrics, before: Any) -> None:
        """Watch the loss of step ``n``, and report the flags that have arrived.

        Args:
            n: The step.
            metrics: Its metrics.
            before: The state that it was given, which an error holds.

        Raises:
            NonFiniteError: If a loss is not finite and the policy is to raise.
        """
        loss = metrics.get("loss")
        if loss is None:
            return
        skips = "skipped" in metrics
        if self.policy == "skip" and not skips:
            raise ValueError(
                'nonfinite="skip": this step does not skip, and only a step can keep its old state. Compose it before'
                " compiling: `tfn.jit(tfn.transforms.skip_nonfinite()(tfn.train_step(loss, optimizer)))`."
            )
        raises = self.policy == "raise" or (self.policy is None and not skips)
        self._pending.append((n, *_flag(loss), skips, before if raises else None))
        self.report(wait=False)

    def report(self, *, wait: bool) -> None:
        """Report the flags that have arrived, or wait for all of them."""
        while self._pending:
            n, flag, event, skips, before = self._pending[0]
            if event is not None and not wait and not event.query():
                return
            if event is not None:
                event.synchronize()  # the copy has arrived, or `wait` asks for it: only then is the flag valid
            self._pending.popleft()
            if not bool(flag):
                self._report(n, skips, before)

    def _report(self, n: int, skips: bool, before: Any) -> None:
        policy = self.policy or ("skip" if skips else "raise")
        if policy == "raise":
            error = NonFiniteError(
                f"the loss of step {n} is NaN or infinite. Lower the learning rate, clip the gradient"
                " (`tfn.optim.clip_by_global_norm(1.0)`), or look at that step's batch. To go on without such steps,"
                ' compose `tfn.transforms.skip_nonfinite()`; to let them through, `nonfinite="continue"`.'
            )
            error.state = before if is_alive(before) else None
            if error.state is None:
                error.add_note(
                    f"The state before step {n} was donated, so the error holds no state, or that of the newest"
                    " checkpoint. A step with `donate=False` keeps it."
                )
            raise error
        done = "skipped: the state is as it was before it" if policy == "skip" else "let through, as asked"
        warnings.warn(f"the loss of step {n} is NaN or infinite; the step was {done}.", NonFiniteWarning, stacklevel=2)


def _flag(loss: Mean) -> tuple[Tensor, torch.Event | None]:
    finite = torch.isfinite(loss.total).all()
    if finite.device.type == "cpu":
        return finite, None
    arrived = finite.to("cpu", non_blocking=True)
    event = torch.Event(device=finite.device)
    event.record()
    return arrived, event
