"""Time one training step of trainfn and of its peers, side by side.

Each competitor has a process of its own. First all of them are started, one after the other, with empty compile
caches; then they take turns, a short burst of steps each, round after round. So whatever else the machine is doing
falls on all of them alike, and ratios are taken within a round.

    python perf/step_time.py                                   # everything: about an hour
    python perf/step_time.py --sizes tiny --dtypes fp32        # a few minutes
    python perf/step_time.py --sizes small --only trainfn,jax  # competitors whose name contains one of these
    python perf/step_time.py --device cuda --sizes gpt2 --dtypes bf16 --together 3   # on a GPU: 5 minutes
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from peers import PEERS
from workloads import DTYPES, SIZES, USUAL, Work

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "accelerate", "lightning", "jax", "optax", "numpy")
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # on the loss after equally many steps
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 operations a second


class Absent(Exception):
    """A competitor that can't take part, and why."""


class Competitor:
    """A worker process."""

    def __init__(self, name: str, size: str, dtype: str, caches: Path, options: argparse.Namespace) -> None:
        self.name, self.patience = name, options.patience
        self._log = tempfile.TemporaryFile("w+")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(options.threads),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "PERF_CACHE": str(caches / "jax"),
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), name, size, dtype, options.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        self._unread = b""
        try:
            self.imports: float = self._answer()["import_seconds"]
        except Absent:
            self.close()
            raise

    def steps(self, count: int) -> dict[str, Any]:
        """Have it do ``count`` steps: ``seconds`` and ``losses`` of each, and ``rss_mb``, the peak so far."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"step {count}\n".encode())
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self.patience
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise Absent(f"no answer within {self.patience:.0f} s (--patience)")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise Absent(f"its process ended with code {self._process.wait()}:\n{self._complaint()}")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            kind = "not installed" if answer["missing"] else "failed"
            raise Absent(f"{kind}: {answer['error']}" + ("" if answer["missing"] else f"\n{self._complaint()}"))
        return answer

    def _complaint(self) -> str:
        self._log.seek(0)
        return "".join(f"    | {line}" for line in self._log.readlines()[-12:])

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass
class Row:
    """What was measured of one competitor."""

    name: str
    imports: float = 0.0
    cold: float = 0.0
    warm: float = 0.0
    rss_mb: float = 0.0
    device_mb: float = 0.0
    rounds: list[list[float]] = dataclasses.field(default_factory=list)  # seconds per step; a burst's first is left out
    losses: list[float] = dataclasses.field(default_factory=list)  # every step's, from the first on
    alone: bool = False  # whether rounds of other rows were at other times

    @property
    def median(self) -> float:
        return statistics.median(second for burst in self.rounds for second in burst)

    @property
    def minimum(self) -> float:
        return min(second for burst in self.rounds for second in burst)

    def ratio(self, other: Row) -> float:
        """How many times as long as ``other``: the median over the rounds, each compared within itself."""
        if self.alone:
            return self.median / other.median
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def measure(names: list[str], size: str, dtype: str, options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """One table: the competitors that took part, and why the others did not."""
    plan = SIZES[size]
    rounds = options.rounds or plan.rounds
    rows: dict[str, Row] = {}
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        caches = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="step_time_")))
        field: dict[str, Competitor] = {}
        for name in names:
            begin = lambda name=name: Competitor(name, size, dtype, caches / name, options)  # noqa: E731
            try:
                row = Row(name)
                competitor = stack.enter_context(begin())
                first = competitor.steps(1)
                row.imports, row.cold = competitor.imports, first["seconds"][0]
                row.losses += first["losses"]
                with begin() as second:  # a new process that finds what the first one compiled
                    row.warm = second.steps(1)["seconds"][0]
                    row.rss_mb = second.steps(3)["rss_mb"]
                row.losses += competitor.steps(plan.warmup)["losses"]
            except Absent as reason:
                absent[name] = str(reason)
                progress(f"{size} {dtype} {name}: absent, {reason}")
                continue
            rows[name], field[name] = row, competitor
            progress(f"{size} {dtype} {name}: first step {row.cold:.1f} s cold, {row.warm:.1f} s warm")
        take_turns(field, rows, absent, rounds, plan.burst)
    return list(rows.values()), absent


def take_turns(
    field: dict[str, Competitor], rows: dict[str, Row], absent: dict[str, str], rounds: int, steps: int
) -> None:
    """Time bursts of steps, round after round."""
    for turn in range(rounds):
        order = list(field)
        if not order:
            return
        order = order[turn % len(order) :] + order[: turn % len(order)]  # no one always follows the same
        for name in order:
            try:
                burst = field[name].steps(steps)
            except Absent as reason:
                absent[name] = str(reason)
                del field[name], rows[name]
                continue
            rows[name].rounds.append(burst["seconds"][1:])  # the first finds the caches full of others' data
            rows[name].losses += burst["losses"]
            rows[name].device_mb = burst["device_mb"]


def measure_together(
    names: list[str], size: str, dtype: str, options: argparse.Namespace
) -> tuple[list[Row], dict[str, str]]:
    """The same by groups: those of a group compile at once, so that little of a rented machine's time is lost."""
    plan, rows, absent = SIZES[size], dict[str, Row](), dict[str, str]()
    for at in range(0, len(names), options.together):
        group = names[at : at + options.together]
        with contextlib.ExitStack() as stack:
            caches = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="step_time_")))
            field: dict[str, Competitor] = {}

            def enter(name: str) -> None:
                try:
                    competitor = stack.enter_context(Competitor(name, size, dtype, caches / name, options))  # noqa: B023
                    first, warm = competitor.steps(1), competitor.steps(plan.warmup)
                except Absent as reason:
                    absent[name] = str(reason)
                    progress(f"{size} {dtype} {name}: absent, {reason}")
                    return
                rows[name] = Row(name, competitor.imports, first["seconds"][0], rss_mb=warm["rss_mb"], alone=True)
                rows[name].losses += first["losses"] + warm["losses"]
                field[name] = competitor  # noqa: B023
                progress(f"{size} {dtype} {name}: first step {first['seconds'][0]:.1f} s")

            with ThreadPoolExecutor(len(group)) as pool:
                list(pool.map(enter, group))
            take_turns(field, rows, absent, options.rounds or plan.rounds, plan.burst)
            for name in field:
                progress(f"{size} {dtype} {name}: {rows[name].minimum * 1e3:.2f} to {rows[name].median * 1e3:.2f} ms")
    return [rows[name] for name in names if name in rows], absent


def gpu(device: str) -> str:
    """The accelerator in words."""
    if device != "cuda":
        return ""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip().splitlines()[0]
    return ""


def speeds(rows: list[Row], size: str, dtype: str, device: str) -> Iterator[str]:
    """What the rows are in tokens a second, and of what the hardware can do."""
    work, card = Work(SIZES[size], dtype, True), gpu(device)
    peak = next((peak for name, peak in PEAKS.items() if name in card), None)
    yield "| competitor | tokens/s | share of peak | peak memory GiB | first step s |"
    yield "|---|---:|---:|---:|---:|"
    for row in sorted(rows, key=lambda row: row.median):
        share = "" if peak is None else f"{work.flops / row.median / peak:.1%}"
        memory = f"{row.device_mb / 1024:.2f}"
        yield f"| {row.name} | {work.tokens / row.median:,.0f} | {share} | {memory} | {row.cold:.1f} |"
    yield ""


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(rows: list[Row], dtype: str) -> Iterator[str]:
    """The rows as Markdown, fastest first, with remarks on the losses."""
    peers = [row for row in rows if not row.name.startswith("trainfn")] or rows
    best = min(peers, key=lambda row: row.ratio(peers[0]))
    rows = sorted(rows, key=lambda row: row.ratio(best))
    columns = ["competitor", "median ms", f"÷ {best.name}", "min ms", "÷"]
    columns += ["first step s, cold", "warm", "imports s", "peak RSS MB", "last loss"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" + "|---:" * (len(columns) - 1) + "|"
    for row in rows:
        warm = "" if row.alone else f"{row.warm:.1f}"
        yield (
            f"| {row.name} | {row.median * 1e3:.2f} | {row.ratio(best):.2f}"
            f" | {row.minimum * 1e3:.2f} | {row.minimum / best.minimum:.2f}"
            f" | {row.cold:.1f} | {warm} | {row.imports:.1f} | {row.rss_mb:.0f} | {row.losses[-1]:.5f} |"
        )
    yield ""
    reference = next((row for row in rows if row.name == "torch-eager"), best)
    apart = {r.name: max(abs(a - b) for a, b in zip(r.losses, reference.losses, strict=True)) for r in rows}
    far = {name: gap for name, gap in apart.items() if not gap <= TOLERANCE[dtype]}
    steps = len(reference.losses)
    if far:
        listed = ", ".join(f"{name} by up to {gap:.2g}" for name, gap in far.items())
        yield f"**Losses differ** from {reference.name}'s within these {steps} steps: {listed}."
    else:
        yield f"All losses agree with {reference.name}'s at each of the {steps} steps, to {max(apart.values()):.1g}."


def machine() -> str:
    """The processor in words."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


def slug(text: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in text.replace("(R)", "")).lower().split()
    return "-".join(words)


def report(tables: list[str], options: argparse.Namespace, load: float) -> str:
    """What is written to ``perf/results``."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    hardware = ", ".join(filter(None, (gpu(options.device), machine())))
    return "\n".join(
        [
            f"# Step times, {datetime.date.today():%Y-%m-%d}, {hardware}",
            "",
            f"`{shlex.join(['python', 'perf/step_time.py', *sys.argv[1:]])}`, {options.threads} threads each,"
            f" load average before the run {load:.1f}.",
            "",
            f"Python {platform.python_version()}, {versions}. How to read this: [README](../README.md).",
            "",
            *tables,
        ]
    )


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def listed(allowed: dict[str, Any] | tuple[str, ...]) -> Any:
    """An argument type: words separated by commas, each one of those allowed."""

    def parse(text: str) -> list[str]:
        unknown = [word for word in text.split(",") if word not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(allowed)}")
        return text.split(",")

    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="competitors:\n" + "\n".join(f"  {name:22} {peer.about}" for name, peer in PEERS.items()),
    )
    add = functools.partial(parser.add_argument, metavar="A,B")
    add("--sizes", type=listed(SIZES), default=USUAL, help=f"of {', '.join(SIZES)}; default {', '.join(USUAL)}")
    add("--dtypes", type=listed(DTYPES), default=list(DTYPES), help=f"of {', '.join(DTYPES)}; default both")
    add("--only", type=lambda s: s.split(","), default=[""], help="those whose name contains one of these; default all")
    add = functools.partial(parser.add_argument, metavar="N")
    add("--rounds", type=int, help="bursts of each competitor; default by size, 8 to 15")
    add("--threads", type=int, default=os.cpu_count(), help="of each competitor (OMP_NUM_THREADS); default all cores")
    add("--patience", type=float, default=900, help="seconds after which a silent competitor is given up; default 900")
    add("--together", type=int, help="compile in groups of so many, without the columns `warm`; by default one by one")
    parser.add_argument("--device", default="cpu", help="of all competitors, such as cuda; default cpu")
    parser.add_argument("--out", type=Path, help="page to add to; default perf/results/<date>-<hardware>.md")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    names = [name for name, peer in PEERS.items() if any(part in name for part in options.only)]
    names = [name for name in names if options.device != "cpu" or PEERS[name].mode is None]
    if not names:
        sys.exit(f"--only {','.join(options.only)}: no such competitor; there are {', '.join(PEERS)}.")
    out = options.out or HERE / "results" / f"{datetime.date.today():%Y%m%d}-{slug(machine())}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    earlier = out.read_text() + "\n" if out.exists() else ""
    load = os.getloadavg()[0]
    tables: list[str] = []
    for size in options.sizes:
        for dtype in options.dtypes:
            rows, absent = (measure_together if options.together else measure)(names, size, dtype, options)
            lines = [f"## {size}, {dtype}", "", *(table(rows, dtype) if rows else ())]
            if rows and options.device != "cpu":
                lines += ["", *speeds(rows, size, dtype, options.device)]
            lines += [f"Absent: {name}, {reason}" for name, reason in absent.items()]
            tables.append("\n".join(lines) + "\n")
            print(tables[-1], flush=True)
            # After each table, so that an interrupted run leaves what it has; below what was measured earlier that day.
            out.write_text(earlier + report(tables, options, load))
    progress(f"written: {out}")


if __name__ == "__main__":
    main()
