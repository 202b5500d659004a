"""The helper's side: a process that compiles graphs into the compiler's caches on the disk, one after the other.

It is run as a script, so that it reads its orders while torch is still being imported: who writes them never waits.
An order on stdin is eight bytes of its length, and what `_ahead.order` made; a length of zero is the last one. An
answer on stdout is a line of JSON: what went wrong, or nothing. When stdin ends before that, the other process is
gone, and this one ends at once, with the compilers that it has started.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading


def _read(orders: queue.SimpleQueue[bytes]) -> None:
    stdin = sys.stdin.buffer
    while head := stdin.read(8):
        orders.put(stdin.read(int.from_bytes(head, "little")))
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)  # it leads a group of its own
    os._exit(1)


def main() -> None:
    """Compile what is ordered, until there is no more."""
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not answer
    from trainfn._compile._ahead import carry_out

    while order := orders.get():
        try:
            carry_out(order)
            answer = None
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # the thread waits for ever


if __name__ == "__main__":
    main()
