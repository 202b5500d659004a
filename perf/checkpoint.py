"""What saving and restoring a state cost, beside `torch.save`, `safetensors` and the disk itself.

The competitors write the same tensors to the same disk and take turns, round after round, so that whatever else the
machine does falls on all of them; ratios are taken within a round. A write counts until the bytes are on the disk
(fsync), a read begins with whatever the system still has in its memory.

    python perf/checkpoint.py             # at 1 GB: a few minutes
    python perf/checkpoint.py --mb 64     # seconds
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from step_time import machine, slug, version
from torch import Tensor

import trainfn as tfn
from trainfn._checkpoint import Checkpoints

HERE = Path(__file__).resolve().parent
LAYERS = 16


def a_state(megabytes: int, step: int = 0) -> tfn.TrainState:
    """A model with AdamW's moments: a third of the bytes each."""
    side = int((megabytes * 1e6 / 3 / 4 / LAYERS) ** 0.5)
    generator = torch.Generator().manual_seed(0)
    params = {f"layer{i}.weight": torch.randn(side, side, generator=generator) for i in range(LAYERS)}
    state = tfn.init(params, tfn.optim.adamw(1e-3), storage="adopt")
    return state._replace(step=torch.tensor(step))


def flushed(path: Path) -> None:
    """As the others are not done before their bytes are on the disk, `torch.save` is not either."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


class Bench:
    """Named times, taken in turns."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[[], object]) -> None:
        began = time.perf_counter()
        call()
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)


def raw_write(path: Path, tensors: dict[str, Tensor]) -> None:
    """The disk's own rate: the bytes and nothing else."""
    with open(path, "wb", buffering=0) as file:
        for tensor in tensors.values():
            view = tensor.reshape(-1).view(torch.uint8).numpy().data
            for i in range(0, len(view), 8 * 2**20):
                file.write(view[i : i + 8 * 2**20])
        os.fsync(file.fileno())


def raw_read(path: Path, tensors: dict[str, Tensor]) -> None:
    """And to read them into memory that is there already."""
    with open(path, "rb", buffering=0) as file:
        for tensor in tensors.values():
            view = tensor.reshape(-1).view(torch.uint8).numpy().data
            while len(view):
                view = view[file.readinto(view) :]


def throughput(state: tfn.TrainState, folder: Path, rounds: int) -> tuple[Bench, Bench]:
    tensors = {name: leaf for name, leaf in tfn.tree.named_leaves(state).items()}
    scratch = {name: torch.zeros_like(leaf) for name, leaf in tensors.items()}
    ours, pt, st, raw = folder / "ours", folder / "torch.pt", folder / "all.safetensors", folder / "raw"
    writes, reads = Bench(), Bench()

    def torch_save() -> None:
        torch.save(tensors, pt)
        flushed(pt)

    def library_save() -> None:
        safetensors.torch.save_file(tensors, st)
        flushed(st)

    def library_load() -> None:  # its tensors are views of the file until they are copied
        for name, value in safetensors.torch.load_file(st).items():
            scratch[name].copy_(value)

    write_turns = [
        ("the disk (write, fsync)", lambda: raw_write(raw, tensors)),
        ("torch.save, fsync", torch_save),
        ("safetensors.torch.save_file, fsync", library_save),
        ("trainfn.save", lambda: tfn.save(ours, state)),
    ]
    read_turns = [
        ("the disk (read)", lambda: raw_read(raw, scratch)),
        ("torch.load", lambda: torch.load(pt, weights_only=True)),
        ("safetensors.torch.load_file, copied", library_load),
        ("trainfn.restore", lambda: tfn.restore(ours, like=state)),
    ]
    for turn in range(rounds):
        for bench, turns in ((writes, write_turns), (reads, read_turns)):
            at = turn % len(turns)
            for name, call in turns[at:] + turns[:at]:  # no one always follows the same
                bench.time(name, call)
        progress(f"round {turn + 1} of {rounds}")
    return writes, reads


def stalls(state: tfn.TrainState, folder: Path, rounds: int) -> Bench:
    """How long `Checkpoints.save` keeps the training waiting."""
    bench = Bench()
    copies = tfn.copy(state)

    def memcpy() -> None:
        for a, b in zip(tfn.tree.leaves(copies), tfn.tree.leaves(state), strict=True):
            a.copy_(b)

    with (
        Checkpoints(folder / "async", keep=1) as behind,
        Checkpoints(folder / "sync", keep=1, asynchronous=False) as waiting,
    ):
        behind.save(state)  # the first takes its memory from the system
        behind.wait()
        for n in range(1, rounds + 1):
            now = state._replace(step=torch.tensor(n))
            bench.time("a copy in memory", memcpy)
            bench.time("asynchronous", lambda now=now: behind.save(now))
            behind.wait()
            bench.time("synchronous", lambda now=now: waiting.save(now))
    with Checkpoints(folder / "first") as first:
        bench.time("asynchronous, the first", lambda: first.save(state))
    return bench


def resumes(folder: Path, rounds: int) -> Bench:
    """From an open folder to a state, early and late in a run."""
    bench = Bench()
    runs = {}
    for step in (10, 10_000_000):
        runs[step] = Checkpoints(folder / f"at {step}")
        with runs[step] as checkpoints:
            checkpoints.save(a_state(10, step), {"seed": 3})
    like = a_state(10)
    for _ in range(rounds * 4):
        for step, checkpoints in runs.items():
            bench.time(f"at step {step:,}", lambda checkpoints=checkpoints: checkpoints.restore(like))
    return bench


def table(bench: Bench, base: str, nbytes: int | None) -> Iterator[str]:
    columns = ["", "median s", "min s", f"÷ {base}", *(["GB/s"] if nbytes else [])]
    yield f"| {' | '.join(columns)} |"
    yield "|---" + "|---:" * (len(columns) - 1) + "|"
    for name, seconds in bench.seconds.items():
        same = len(seconds) == len(bench.seconds[base])
        ratio = f"{bench.ratio(name, base):.2f}" if same else f"{bench.median(name) / bench.median(base):.2f}"
        rate = f" {nbytes / bench.median(name) / 1e9:.2f} |" if nbytes else ""
        yield f"| {name} | {bench.median(name):.4f} | {min(seconds):.4f} | {ratio} |{rate}"
    yield ""


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1000, help="size of the state; default 1000")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default a temporary one")
    parser.add_argument("--out", type=Path, help="default perf/results/<date>-checkpoint-<hardware>.md")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    load = os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="perf-checkpoint-", dir=options.folder))
    try:
        state = a_state(options.mb)
        nbytes = sum(leaf.nbytes for leaf in tfn.tree.leaves(state))
        writes, reads = throughput(state, folder, options.rounds)
        stall = stalls(state, folder, options.rounds)
        resume = resumes(folder, options.rounds)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
    lines = [
        f"# Checkpoints, {datetime.date.today():%Y-%m-%d}, {machine()}",
        "",
        f"`{shlex.join(['python', 'perf/checkpoint.py', *sys.argv[1:]])}`: a state of {nbytes / 1e9:.2f} GB in"
        f" {len(tfn.tree.leaves(state))} leaves, medians of {options.rounds} rounds, {torch.get_num_threads()} threads;"
        f" load average before the run {load:.1f}.",
        "",
        f"Python {platform.python_version()}, torch {version('torch')}, safetensors {version('safetensors')}. A write"
        " counts until it is on the disk; trainfn's hash all they write and read (SHA-256), the others' don't.",
        "",
        *("## Write", "", *table(writes, "the disk (write, fsync)", nbytes)),
        *("## Restore", "", "The files are in the system's memory.", "", *table(reads, "the disk (read)", nbytes)),
        *("## How long the training waits for a save", "", *table(stall, "a copy in memory", nbytes)),
        *("## Resume", "", "A state of 10 MB.", "", *table(resume, "at step 10", None)),
    ]
    out = options.out or HERE / "results" / f"{datetime.date.today():%Y%m%d}-checkpoint-{slug(machine())}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines))
    print("\n".join(lines))
    progress(f"written: {out}")


if __name__ == "__main__":
    main()
