"""Ranks that stay for many cases: a process imports a module, forks the ranks, and gives them one case after the other.

The ranks are not forked from the tests' own process: it has threads, and may have used an accelerator.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch.distributed as dist

SECONDS = 120  # for a case; once a rank has failed, the others have less
LEFT = 3


class Failed(Exception):
    """A case failed on a rank, or a rank did not answer."""


class Server:
    """Runs ``call(case)`` of a module, given by its name, on as many ranks as each case asks for."""

    def __init__(self, module):
        command = [sys.executable, "-m", "tests.ranks.server", module]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, world, case):
        """What the case returns, as JSON has it, on each rank."""
        self.process.stdin.write(json.dumps([world, case]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise Failed(f"{case!r}: the server has ended")
        found, error = json.loads(answer)
        if error:
            raise Failed(error)
        return found

    def close(self):
        """End it, and with it the ranks."""
        with self.process:
            self.process.stdin.close()


class Group:
    """The ranks of one number."""

    def __init__(self, world, call):
        self.ranks = []  # of each its process, the pipe to it and the pipe from it
        meeting = Path(tempfile.mkdtemp()) / "store"
        for rank in range(world):
            (asked, ask), (told, tell) = os.pipe(), os.pipe()
            process = os.fork()
            if process == 0:
                if world > 1:
                    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
                answer(call, open(asked), open(tell, "w"))
            os.close(asked)
            os.close(tell)
            self.ranks.append((process, open(ask, "w"), open(told)))

    def __call__(self, case):
        """What the ranks return, and their errors as one text."""
        for _, ask, _ in self.ranks:
            print(json.dumps(case), file=ask, flush=True)
        found, errors, end = [], [], time.monotonic() + SECONDS
        for rank, (_, _, told) in enumerate(self.ranks):
            ready, _, _ = select.select([told], [], [], max(end - time.monotonic(), 0.0))
            result, error = json.loads((ready and told.readline()) or '[null, "no answer"]')
            found.append(result)
            if error:
                errors.append(f"rank {rank}: {error}")
                end = min(end, time.monotonic() + LEFT)
        return found, "\n".join(errors)

    def end(self):
        for process, ask, told in self.ranks:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            ask.close()
            told.close()


def answer(call, asked, tell):
    """The life of a rank."""
    for line in asked:
        try:
            result = call(json.loads(line)), None
        except Exception:
            result = None, traceback.format_exc()
        print(json.dumps(result), file=tell, flush=True)
    os._exit(0)


def serve(module):
    """Answer each line of stdin by a line of stdout, to which nothing else is printed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    call, groups = importlib.import_module(module).call, {}
    for line in sys.stdin:
        world, case = json.loads(line)
        if world not in groups:
            groups[world] = Group(world, call)
        found, error = groups[world](case)
        if error:  # the next case has new ranks
            groups.pop(world).end()
        print(json.dumps([found, error]), file=answers, flush=True)
    for group in groups.values():
        group.end()


if __name__ == "__main__":
    serve(sys.argv[1])
