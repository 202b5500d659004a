"""Ranks that stay for many cases: a process imports modules, forks ranks, and gives them one case after the other.

The ranks are not forked from the tests' own process: it has threads, and may have used an accelerator. One server is
for all files of tests, the fixture `ranks`, so that torch is imported once.
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
    """Runs ``call(case)`` of a module, given by its name, on as many ranks as asked for."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.ranks.server"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, module, world, case, seconds=SECONDS):
        """What the case returns, as JSON has it, on each rank."""
        self.process.stdin.write(json.dumps([module, world, case, seconds]) + "\n")
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
                    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
                    os.environ |= {"WORLD_SIZE": f"{world}", "LOCAL_WORLD_SIZE": f"{world}"}
                    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
                answer(call, open(asked), open(tell, "w"))
            os.close(asked)
            os.close(tell)
            self.ranks.append((process, open(ask, "w"), open(told)))

    def __call__(self, case, seconds):
        """What the ranks return, and their errors as one text."""
        for _, ask, _ in self.ranks:
            print(json.dumps(case), file=ask, flush=True)
        found, errors, end = [], [], time.monotonic() + seconds
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


def serve():
    """Answer each line of stdin by a line of stdout, to which nothing else is printed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for before_the_fork in ("torch.distributed.tensor", "torch._dynamo"):  # or each rank would import them, in a second
        importlib.import_module(before_the_fork)
    newest, groups = None, {}
    for line in sys.stdin:
        module, world, case, seconds = json.loads(line)
        if module != newest:
            while groups:
                groups.popitem()[1].end()
            newest = module
        if world not in groups:
            groups[world] = Group(world, importlib.import_module(module).call)
        found, error = groups[world](case, seconds)
        if error:  # the next case has new ranks
            groups.pop(world).end()
        print(json.dumps([found, error]), file=answers, flush=True)
    for group in groups.values():
        group.end()


if __name__ == "__main__":
    serve()
