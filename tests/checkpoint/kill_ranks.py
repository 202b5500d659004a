"""Kill one rank of a training run at every moment of its saves, begin again, and compare the bits of the end.

    python -m tests.checkpoint.kill_ranks --kills 40

Two ranks train a state that is split over them. One is killed with SIGKILL at one of its calls to the disk, counted
over the run; what becomes of the other is its own affair, and it is killed as a launcher would do.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import trainfn as tfn
from tests.checkpoint.ranks import PLANS, batch_of, fresh, step_of
from tests.ranks.forked import on, start
from trainfn._checkpoint import Checkpoints, _disk, _snapshot

STEPS = 4
WAYS = {
    "pieces": {"asynchronous": False},
    "pieces, in the background": {"asynchronous": True},
    "full": {"asynchronous": False, "full": True},
}


def train(folder, options, victim, at_call):
    """A run to its end: digest, where it went on, and the calls to the disk of this rank."""
    calls, rank = [], torch.distributed.get_rank()

    def hook(call, path):
        if rank == victim and len(calls) == at_call:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(call)

    plan = PLANS[2]["fsdp"]
    like = fresh(plan)
    _disk.hook = hook
    if options.get("full") and rank == 1:  # which writes nothing, and is killed while leaves are gathered
        full = _snapshot.full
        _snapshot.full = lambda leaf: (hook("gather", None), full(leaf))[1]
    at = Checkpoints(folder).restore(like=like)
    began = 0 if at is None else int(at[0].step)
    checkpoints = Checkpoints(folder, every=1, keep=2, **options)

    def note(info):
        if options["asynchronous"] is False and rank == 0:
            (Path(folder).parent / "saved").write_text(str(info.n - 1))

    sys.stderr = open(os.devnull, "w")
    state = tfn.fit(step_of(plan), like, batch_of(plan), until=STEPS, checkpoints=checkpoints, callbacks=[note])
    return [tfn.digest(state).total, began, len(calls)]


def killed(folder, options, victim, at_call):
    """Whether the victim was killed. The other rank ends by itself, with an error, or is ended after some seconds."""
    children = start(2, train, (folder, options, victim, at_call))
    _, status = os.waitpid(children[victim][0], 0)
    other = children[1 - victim][0]
    ended, code = 0, 0
    for _ in range(100):
        ended, code = os.waitpid(other, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    if not ended:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    for _, read in children:
        os.close(read)
    if not os.WIFSIGNALED(status):
        assert os.waitstatus_to_exitcode(status) == 0, "a run failed by itself"
    elif ended:
        assert os.waitstatus_to_exitcode(code) in (1, 0), code  # 0: the victim had nothing left to do for it
    return os.WIFSIGNALED(status), bool(ended)


def campaign(kills, seed=0):
    r, counts = random.Random(seed), Counter()
    base = Path(tempfile.mkdtemp(prefix="kill-ranks-"))
    for name, options in WAYS.items():
        digests = on(2, train, f"{base}/one go/run", options, None, None)
        shutil.rmtree(base / "one go")
        for victim in (0, 1):
            calls, share = digests[victim][2], max(kills // 6, 1)
            for i in range(share):
                at_call = calls * i // share + r.randrange(max(calls // share, 1))
                here = base / "trial"
                here.mkdir()
                hit, ended = killed(f"{here}/run", options, victim, at_call)
                saved = int((here / "saved").read_text()) if (here / "saved").exists() else 0
                (digest, began, _), other = on(2, train, f"{here}/run", options, None, None)
                assert digest == other[0] == digests[0][0], (name, victim, at_call, "another end")
                assert began >= saved and began == other[1], (name, victim, at_call, began, saved, "was lost")
                left = sorted(p.name for p in (here / "run").iterdir())
                assert left == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"] or began == STEPS, left
                counts[f"{name}: rank {victim} killed"] += hit
                counts["the other rank ended by itself"] += hit and ended
                shutil.rmtree(here)
    shutil.rmtree(base)
    return counts


def call(case):
    """A campaign of so many kills with a seed; how many of them hit."""
    counts = campaign(*case)
    return sum(count for name, count in counts.items() if name.endswith("killed"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="about how many; default 40")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = campaign(options.kills, options.seed)
    for name, count in counts.items():
        print(f"{count:5}  {name}")
    print("every run ended with the bits of the run in one go")
    hits = sum(count for name, count in counts.items() if name.endswith("killed"))
    sys.exit(0 if hits >= options.kills // 2 else "too few of them hit")


if __name__ == "__main__":
    main()
