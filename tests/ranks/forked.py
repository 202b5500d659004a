"""Several ranks as forked children of this process, so that torch is imported once: `on(world, call, *args)`."""

import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch._dynamo  # before the fork: the first sharded tensor of each rank would import it, in 0.6 s
import torch.distributed as dist
import torch.distributed.tensor

torch.set_num_threads(1)


class Ended(Exception):
    """A rank ended otherwise than by returning."""


def start(world, call, args, seconds=90):
    """Fork; the processes' numbers and the pipes with what they return."""
    sys.stderr.flush()
    meeting = Path(tempfile.mkdtemp()) / "store"
    children = []
    for rank in range(world):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            signal.alarm(seconds)  # whatever hangs is killed
            os._exit(_child(rank, world, meeting, write, call, args))
        os.close(write)
        children.append((pid, read))
    return children


def _child(rank, world, meeting, write, call, args):
    try:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        found = call(*args)
        os.write(write, json.dumps(found).encode())
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        return 0
    except SystemExit as end:
        return end.code
    except BaseException:
        os.write(write, json.dumps({"error": f"rank {rank}:\n{traceback.format_exc()}"}).encode())
        return 1


def finish(children):
    """The exit codes, negative for signals, and what the ranks returned."""
    codes, found = [], []
    for pid, read in children:
        with open(read) as pipe:
            text = pipe.read()
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        found.append(json.loads(text) if text else None)
    return codes, found


def on(world, call, *args):
    """What a call returns on each of so many ranks."""
    codes, found = finish(start(world, call, args))
    if any(codes):
        errors = [f["error"] for f in found if isinstance(f, dict) and "error" in f]
        raise Ended(f"{codes}\n" + "\n".join(errors))
    return found
