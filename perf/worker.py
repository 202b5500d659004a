"""One competitor in a process of its own: reads ``step N`` on stdin, answers with one line of JSON on stdout.

    ready                     →  {"import_seconds": …}                    sent unasked, once imported
    step 20                   →  {"seconds": [20 numbers], "losses": [20 numbers], "rss_mb": …, "device_mb": …}
    (end of input)            →  the process ends

The competitor's loop runs in `train`; ``tick``, which it calls after each step, takes the time, and between two
commands keeps it waiting. Reading the loss as a number happens after the time is taken, for every competitor. On an
accelerator the host may run ahead of it: there it waits after a burst's first step and after the last, and the time
between is shared out among the steps between.
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

    def __init__(self, answers: TextIO, device: str) -> None:
        self._answers, self._device = answers, device
        self._left = 0
        self._seconds: list[float] = []
        self._losses: list[Any] = []
        self.wait()

    def __call__(self, loss: Any) -> None:
        self._left -= 1
        if self._device == "cpu":
            self._seconds.append(time.perf_counter() - self._start)
            self._losses.append(float(loss))
        else:
            self._losses.append(loss.clone() if hasattr(loss, "clone") else loss)  # a launch writes it where it was
            if len(self._losses) == 1 or self._left == 0:
                finish(loss)
                took, steps = time.perf_counter() - self._start, len(self._losses) - len(self._seconds)
                self._seconds += [took / steps] * steps
        if self._left == 0:
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            losses = [float(loss) for loss in self._losses]
            say(self._answers, seconds=self._seconds, losses=losses, rss_mb=rss, device_mb=device_mb(self._device))
            self._seconds, self._losses = [], []
            if self._device == "cuda" and "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()  # others have the GPU now; a burst's first step is not timed
            self.wait()
        if self._device == "cpu" or len(self._losses) == 1:
            self._start = time.perf_counter()

    def wait(self) -> None:
        """Until the next command."""
        command = sys.stdin.readline().split()
        if not command:
            os._exit(0)  # from the depths of a Trainer's loop: nothing of it shall be saved or logged
        self._left = int(command[1])
        self._start = time.perf_counter()


def finish(loss: Any) -> None:
    """Wait until the accelerator has done all there is to do."""
    float(loss)
    if "torch" in sys.modules and sys.modules["torch"].accelerator.is_available():
        sys.modules["torch"].accelerator.synchronize()


def device_mb(device: str) -> float:
    """The accelerator's memory that was in use at most."""
    if device == "cpu":
        return 0.0
    if "jax" in sys.modules:
        return (sys.modules["jax"].local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**20
    return sys.modules["torch"].cuda.max_memory_allocated() / 2**20


def say(answers: TextIO, **what: Any) -> None:
    print(json.dumps(what), file=answers, flush=True)


def fail(answers: TextIO, error: BaseException, missing: bool) -> NoReturn:
    traceback.print_exc()
    say(answers, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", missing=missing)
    sys.exit(1)


def main() -> None:
    name, size, dtype, device = sys.argv[1:]
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
        module.train(Work(SIZES[size], dtype, peer.compile, device, peer.mode), Clock(answers, device))
    except Exception as error:
        fail(answers, error, missing=False)


if __name__ == "__main__":
    main()
