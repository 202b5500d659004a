"""One competitor in a process of its own: reads ``step N`` on stdin, answers with one line of JSON on stdout.

    ready                     →  {"import_seconds": …}                    sent unasked, once imported
    step 20                   →  {"seconds": [20 numbers], "losses": [20 numbers], "rss_mb": …}
    (end of input)            →  the process ends

The competitor's loop runs in `train`; ``tick``, which it calls after each step, takes the time, and between two
commands keeps it waiting. Reading the loss as a number happens after the time is taken, for every competitor.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import traceback
from typing import Any, NoReturn, TextIO

from peers import PEERS
from workloads import SIZES, Work


class Clock:
    """What a competitor calls after each step."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._left = 0
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self.wait()

    def __call__(self, loss: Any) -> None:
        self._seconds.append(time.perf_counter() - self._start)
        self._losses.append(float(loss))
        self._left -= 1
        if self._left == 0:
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            say(self._answers, seconds=self._seconds, losses=self._losses, rss_mb=rss)
            self._seconds, self._losses = [], []
            self.wait()
        self._start = time.perf_counter()

    def wait(self) -> None:
        """Until the next command."""
        command = sys.stdin.readline().split()
        if not command:
            os._exit(0)  # from the depths of a Trainer's loop: nothing of it shall be saved or logged
        self._left = int(command[1])
        self._start = time.perf_counter()


def say(answers: TextIO, **what: Any) -> None:
    print(json.dumps(what), file=answers, flush=True)


def fail(answers: TextIO, error: BaseException, missing: bool) -> NoReturn:
    traceback.print_exc()
    say(answers, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", missing=missing)
    sys.exit(1)


def main() -> None:
    name, size, dtype = sys.argv[1:]
    # The answers' channel is ours alone: whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = time.perf_counter()
    try:
        peer = PEERS[name]
        module = importlib.import_module(f"peers.{peer.module}")
    except ImportError as error:
        fail(answers, error, missing=True)
    say(answers, import_seconds=time.perf_counter() - start)
    try:
        module.train(Work(SIZES[size], dtype, peer.compile), Clock(answers))
    except Exception as error:
        fail(answers, error, missing=False)


if __name__ == "__main__":
    main()
