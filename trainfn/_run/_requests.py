"""Signals that ask a run to stop, answered after the current step."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

from trainfn._ranks._group import ALONE, Ranks
from trainfn.process import Pending, uninterrupted


class Requests:
    """Ctrl-C and SIGTERM of a run, on one process or on any of several, answered between steps.

    Args:
        ranks: The processes that run the step together.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.interrupted = self.terminated = False
        self.sigterm = Pending()  # replaced by the session, which can save
        self._ctrl_c = Pending()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        # Several processes must stop after the same step, or the others wait for one that has left. So Ctrl-C is held
        # back between steps too, until all have heard of it. One process holds it back inside a step only.
        if self.ranks.size > 1:
            self._ctrl_c = self._stack.enter_context(uninterrupted())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if error is None and self._ctrl_c.arrived and not self.interrupted:
            raise KeyboardInterrupt  # it came after the last step, and was held back

    def agree(self, *others: bool) -> list[bool]:
        """After a step: what any rank was asked to do; of each of ``others``, whether it is set on any rank."""
        # One reduction of a few flags between hosts: 0.25 ms on one machine, and no device waits for it. It is made
        # after every step and not only before a save: SIGTERM leaves half a minute, and the next save may be an hour
        # away.
        interrupted = self.interrupted or self._ctrl_c.arrived
        self.interrupted, self.terminated, *found = self.ranks.any([interrupted, self.sigterm.arrived, *others])
        return found
