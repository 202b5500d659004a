"""Kill a training run at every moment of its saves, resume it, and compare the bits of its end with a run in one go.

    python -m tests.checkpoint.kill_training --kills 200

A run is a forked child of this process, so that torch is imported once. It is killed with SIGKILL: at one call to the
disk, counted over the run, or at a random time. Half of the resumed runs are killed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

import trainfn as tfn
from trainfn._checkpoint import Checkpoints, _disk

STEPS = 8


class Way(NamedTuple):
    """How a run saves."""

    name: str
    every: int
    asynchronous: bool = False
    one_path: bool = False  # `tfn.save` over the last one, again and again


WAYS = (
    Way("sync, every step", 1),
    Way("async, every step", 1, asynchronous=True),
    Way("async, every second step", 2, asynchronous=True),
    Way("save over save", 1, one_path=True),
)


def train(way: Way, folder: Path, tell) -> str:
    """Resume what is in the folder, go on to the end, and return a digest of the last state's bits."""
    optimizer = tfn.optim.adamw(1e-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))
    average = tfn.transforms.ema(0.9)
    step = average(tfn.train_step(lambda m, x: tfn.losses.mse(m(x), torch.zeros(len(x), 2)), optimizer))
    step = tfn.jit(step, donate=True, compile=False)
    state = average.init(tfn.init(model, optimizer, seed=5))

    def batch(n: int) -> torch.Tensor:
        return torch.randn(6, 4, generator=torch.Generator().manual_seed(n))

    if way.one_path:
        if _disk.located(folder / "c").exists():
            state = tfn.restore(folder / "c", like=state)
        tell("resumed", int(state.step))
        for info in tfn.steps(step, state, batch, until=STEPS):
            state = info.state
            tfn.save(folder / "c", state)
            tell("saved", info.n)
        return digest(state)

    with Checkpoints(folder, every=way.every, keep=2, asynchronous=way.asynchronous) as checkpoints:
        found = checkpoints.restore(state)
        if found is not None:
            state, extra = found
            assert extra == {"n": int(state.step)}
        tell("resumed", int(state.step))
        previous = 0
        for info in tfn.steps(step, state, batch, until=STEPS):
            state = info.state
            checkpoints.check()
            if checkpoints.due(info.n):
                checkpoints.save(state, {"n": info.n})
                if previous or not way.asynchronous:
                    tell("saved", previous if way.asynchronous else info.n)
                previous = info.n
    if previous:
        tell("saved", previous)
    return digest(state)


def digest(state) -> str:
    found = hashlib.sha256()
    for name, leaf in tfn.tree.named_leaves(state).items():
        found.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}".encode())
        found.update(leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Told(NamedTuple):
    """What a child said before its end."""

    killed: bool
    resumed: int
    saved: int
    digest: str
    calls: int


def child(way: Way, folder: Path, *, at_call: int | None = None, after: float | None = None) -> Told:
    """One run in a process of its own, killed at a call to the disk, after some seconds, or not."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            calls = 0

            def tell(what: str, value: object) -> None:
                os.write(write, (json.dumps([what, value]) + "\n").encode())

            def hook(call: str, path: Path) -> None:
                nonlocal calls
                if calls == at_call:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1

            _disk.hook = hook
            tell("digest", train(way, folder, tell))
            tell("calls", calls)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    with open(read) as pipe:
        told = [json.loads(line) for line in pipe if line.endswith("\n")]
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status)
    if not killed and os.waitstatus_to_exitcode(status) != 0:
        raise AssertionError(f"a run failed by itself: {way.name}, {at_call=}, {after=}, in {folder}")
    values = {what: [value for name, value in told if name == what] for what, _ in told}
    last = lambda what, default: values.get(what, [default])[-1]  # noqa: E731
    return Told(killed, last("resumed", 0), last("saved", 0), last("digest", ""), last("calls", 0))


def trial(way: Way, folder: Path, expected: str, r: random.Random, **kill) -> int:
    """A run, killed once or twice and resumed to its end. Returns how often it was killed."""
    kills, saved = 0, 0
    while True:
        told = child(way, folder, **kill)
        # What was reported as saved was never lost, and nothing was run again that need not be.
        assert told.resumed >= saved or (told.killed and told.resumed == 0), (way.name, kill, told, saved)
        saved = max(saved, told.saved)
        kills += told.killed
        if not told.killed:
            break
        kill = {"at_call": r.randrange(60)} if kills == 1 and r.random() < 0.5 else {}
    assert told.digest == expected, f"{way.name}: another end after {kills} kills, in {folder}"
    if told.saved == 0:  # killed after its last save but before it had removed an older one: the next save would
        return kills
    left = sorted(path.name for path in folder.iterdir())
    names = ["c"] if way.one_path else [f"checkpoint-{STEPS - n}" for n in (way.every, 0)]
    assert left == names, (way.name, left)
    return kills


def campaign(kills: int, seed: int = 0) -> Counter[str]:
    """As many trials as asked for, spread over all calls of all ways to save, a quarter of them at random times."""
    r = random.Random(seed)
    counts: Counter[str] = Counter()
    base = Path(tempfile.mkdtemp(prefix="kill-training-"))
    for way in WAYS:
        (base / "one go").mkdir()
        began = time.perf_counter()
        one_go = child(way, base / "one go")
        seconds = time.perf_counter() - began
        shutil.rmtree(base / "one go")
        share = max(kills // len(WAYS), 1)
        timed = share // 4
        at = [{"at_call": one_go.calls * i // (share - timed)} for i in range(share - timed)]
        at += [{"after": r.uniform(0, seconds)} for _ in range(timed)]
        for kill in at:
            folder = base / "run"
            folder.mkdir()
            counts[f"{way.name}, {'at a call' if 'at_call' in kill else 'at a random time'}"] += trial(
                way, folder, one_go.digest, r, **kill
            )
            shutil.rmtree(folder)
    shutil.rmtree(base)
    return counts


def call(case: tuple[int, int]) -> int:
    """A campaign of so many kills with a seed; how many of them hit."""
    return campaign(*case).total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="about how many; default 200")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = campaign(options.kills, options.seed)
    for name, count in counts.items():
        print(f"{count:5}  {name}")
    print(f"{counts.total():5}  kills in all: every run ended with the bits of the run in one go")
    sys.exit(0 if counts.total() >= options.kills // 2 else "too few of them hit")


if __name__ == "__main__":
    main()
