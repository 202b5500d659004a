"""Time the way to the end of the first step: imports, tracing, compiling; cold, warm, and from a file.

Every measurement is a process of its own; those that are compared take turns, round after round.

    python perf/first_second.py                              # every size, three rounds: about half an hour
    python perf/first_second.py --sizes mlp --repeat 1       # a few minutes
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import workloads as w

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "jax", "numpy")
SIZES = ("mlp", *w.SIZES)
# What is measured: its name, what the process does, and which compile cache it has.
ROWS = (
    ("`import torch`", "torch", "full"),
    ("`import trainfn`", "trainfn", "full"),
    ("`tfn.jit`, cold", "jit", "empty"),
    ("`tfn.jit`, warm", "jit", "full"),
    ("`tfn.load_step`", "file", "none"),
    ("`torch.compile` loop, cold", "loop", "empty"),
    ("`torch.compile` loop, warm", "loop", "full"),
    ("`jax.jit`, cold", "jax", "empty"),
    ("`jax.jit`, warm", "jax", "full"),
)


# --- in the measured process --------------------------------------------------------------------------------------


def workload(size: str) -> tuple[Any, Callable[..., Any], Any, Any]:
    """A model, its loss, a batch and targets."""
    import torch
    import torch.nn.functional as F

    if size == "mlp":
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        return model, F.cross_entropy, torch.randn(16, 32), torch.randint(0, 8, (16,))
    import gpt

    work = w.Work(w.SIZES[size], "fp32", True)
    x, y = next(work.torch_batches())
    return gpt.model(work), gpt.mean_loss, x, y


def trainfn_things(size: str) -> tuple[Any, Any, Any]:
    import trainfn as tfn

    model, _, x, y = workload(size)
    optimizer = tfn.optim.chain(
        tfn.optim.clip_by_global_norm(w.MAX_NORM),
        tfn.optim.adamw(w.LEARNING_RATE, *w.BETAS, w.EPS, weight_decay=w.WEIGHT_DECAY),
    )
    state = tfn.init(model, optimizer, storage="adopt")
    return tfn.train_step(lambda m, b: tfn.losses.cross_entropy(m(b[0]), b[1]), optimizer), state, (x, y)


def run_jit(size: str, path: str) -> float:
    import trainfn as tfn

    step, state, batch = trainfn_things(size)
    start = time.perf_counter()
    _, metrics = tfn.jit(step, donate=True)(state, batch)
    float(metrics["loss"].value)
    return time.perf_counter() - start


def run_save(size: str, path: str) -> float:
    import trainfn as tfn

    step, state, batch = trainfn_things(size)
    start = time.perf_counter()
    tfn.jit(step, donate=True).save(path, state, batch)
    return time.perf_counter() - start


def run_file(size: str, path: str) -> float:
    import trainfn as tfn

    _, state, batch = trainfn_things(size)
    start = time.perf_counter()
    _, metrics = tfn.load_step(path)(state, batch)
    float(metrics["loss"].value)
    return time.perf_counter() - start


def run_loop(size: str, path: str) -> float:
    import torch

    model, loss_function, x, y = workload(size)
    optimizer = torch.optim.AdamW(
        model.parameters(), w.LEARNING_RATE, w.BETAS, w.EPS, weight_decay=w.WEIGHT_DECAY, fused=True
    )
    start = time.perf_counter()
    loss = torch.compile(lambda x, y: loss_function(model(x), y), fullgraph=True)(x, y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), w.MAX_NORM)
    optimizer.step()
    float(loss)
    return time.perf_counter() - start


class _Done(Exception):
    pass


def run_jax(size: str, path: str) -> float:
    from peers import jax_optax

    start = time.perf_counter()

    def tick(loss: Any) -> None:
        float(loss)
        raise _Done

    with contextlib.suppress(_Done):
        jax_optax.train(w.Work(w.SIZES[size], "fp32", True), tick)
    return time.perf_counter() - start


def run_torch(size: str, path: str) -> float:
    start = time.perf_counter()
    import torch  # noqa: F401

    return time.perf_counter() - start


def run_trainfn(size: str, path: str) -> float:
    import torch  # noqa: F401

    start = time.perf_counter()
    import trainfn  # noqa: F401

    return time.perf_counter() - start


RUNS = {
    "torch": run_torch,
    "trainfn": run_trainfn,
    "jit": run_jit,
    "save": run_save,
    "file": run_file,
    "loop": run_loop,
    "jax": run_jax,
}


# --- in the process that measures ---------------------------------------------------------------------------------


def measured(what: str, size: str, path: Path, caches: Path, threads: int) -> tuple[float, float]:
    """Seconds of the part that is named, and of the whole process from its start to its end."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "PERF_CACHE": str(caches / "jax"),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(HERE / "first_second.py"), "--child", what, "--sizes", size, "--file", str(path)]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what}, {size}: the process failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - start


def table(size: str, repeat: int, threads: int) -> str:
    """The measurements of one size, as a table."""
    found: dict[str, list[tuple[float, float]]] = {}
    jax = size != "mlp" and importlib.util.find_spec("jax") is not None
    rows = [row for row in ROWS if jax or row[1] != "jax"]
    with tempfile.TemporaryDirectory() as folder:
        full, path = Path(folder, "full"), Path(folder, "saved.step")
        saving, _ = measured("save", size, path, Path(folder, "saving"), threads)
        for what in {what for _, what, cache in rows if cache == "full"} - {"torch", "trainfn"}:
            measured(what, size, path, full, threads)
        for i in range(repeat):
            for name, what, cache in rows:
                caches = full if cache == "full" else Path(folder, f"{what}-{i}")
                found.setdefault(name, []).append(measured(what, size, path, caches, threads))
        megabytes = path.stat().st_size / 1e6
    lines = [f"### {size}", "", "| | median, s | min, s | whole process, median | min |", "|---|---:|---:|---:|---:|"]
    for name, pairs in found.items():
        part, whole = zip(*pairs, strict=True)
        numbers = (statistics.median(part), min(part), statistics.median(whole), min(whole))
        lines.append(f"| {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    return "\n".join([*lines, "", f"The file: {megabytes:.1f} MB, made in {saving:.1f} s with an empty cache."])


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def heading(repeat: int, threads: int) -> str:
    versions = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return (
        f"## To the end of the first step, {datetime.date.today()}\n\n{processor()}, {os.cpu_count()} cores, threads:"
        f" {threads}; Python {platform.python_version()}, {', '.join(versions)}; {repeat} processes each.\n\nThe first"
        " two columns: what the row names; of the others, from the first call to the end of the first step. A whole"
        " process also starts Python, imports, and builds the model and its first state.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="mlp,tiny", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--repeat", type=int, default=3, help="processes for each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--file", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = given.sizes.split(",")
    if unknown := [size for size in sizes if size not in SIZES]:
        parser.error(f"--sizes {','.join(unknown)}: there are {', '.join(SIZES)}")
    if given.child:
        print(json.dumps(RUNS[given.child](sizes[0], given.file)))
        return
    print(heading(given.repeat, given.threads))
    for size in sizes:
        print(table(size, given.repeat, given.threads), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
