"""A compiled step into a file: captured for given arguments, and compiled ahead of time to libraries."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainfn._compile import _file_describe as describe
from trainfn._compile import _file_format
from trainfn._compile._backend import Settings
from trainfn._compile._buckets import Buckets
from trainfn._compile._capture import Call, compiler_error
from trainfn._compile._donate import check_alive
from trainfn._compile._file_format import Description
from trainfn._compile._onefile import known_instructions
from trainfn._compile._outside import ENVIRONMENT
from trainfn._compile._program import Program
from trainfn._compile._structure import Arguments, Function, Leaves, Structure, flatten
from trainfn._compile._trace import Trace
from trainfn._marks import Again
from trainfn._step import TrainStep
from trainfn.errors import CaptureError

ARGUMENTS = {"gradients": ("state", "batch", "first_row"), "update": ("state", "gradients")}
_DEVICES = ("cpu", "cuda")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def save_step(
    path: Path, step: Any, programs: Sequence[Program], state: Any, batches: Sequence[Any], *, buckets: Buckets | None
) -> None:
    """Capture a step for given arguments, compile it, and write it to a file; see `Compiled.save`."""
    call, settings = f"step.save({str(path)!r}, state, batch)", programs[0].settings
    _check_settings(settings, getattr(step, "plan", None), call)
    check_alive(state)
    contents = _Contents(call)
    recorders = [_Recorder(program, contents) for program in programs]
    run: Function = recorders[0]
    if len(recorders) == 2:  # the gradients of a micro-batch, and the update
        run = dataclasses.replace(step, gradients=recorders[0], update=recorders[1])
    with torch.no_grad():
        for batch in batches:
            run(state, batch if buckets is None else buckets.apply(batch))
    name = type(step).__name__ if isinstance(step, TrainStep) else getattr(step, "__name__", "step")
    accumulate = getattr(step, "accumulate", 1)
    header = {
        "versions": _file_format.versions(),
        "machine": _file_format.machine(contents.devices),
        "features": _file_format.features(),
        "devices": sorted(contents.devices),
        "environment": {name: repr(read()) for name, read in ENVIRONMENT.items()},
        "step": {"name": name, "accumulate": accumulate},
        "buckets": None if buckets is None else _buckets_described(buckets),
        "mode": settings.mode,
        "options": {name: repr(value) for name, value in sorted((settings.options or {}).items())},
        "programs": [recorder.described() for recorder in recorders],
        "constants": contents.constants_described(),
        "libraries": contents.libraries,
    }
    _file_format.write_file(path, header, contents.members())
    if contents.devices != {"cpu"}:
        check_loads(path, call)


def check_loads(path: Path, call: str) -> None:
    """Load a file in a process of its own, and remove it if that fails.

    A library that torch has made for a GPU may end the process that loads it: seen with torch 2.11.

    Raises:
        CaptureError: If the process ended with an error.
    """
    program = f"import trainfn; trainfn.load_step({str(path)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 0:
        return
    Path(path).unlink(missing_ok=True)
    ended = (
        f"signal {-done.returncode}" if done.returncode < 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]
    )
    raise CaptureError(
        f"{call}: the library that torch {torch.__version__} made can't be loaded: the process that tried ended with"
        f" {ended}. No file was written. Call `tfn.jit(step)` in each process: its compile cache is on the disk."
    )


def _check_settings(settings: Settings, plan: Any, call: str) -> None:
    """Raise if a step's settings are not those of a file."""
    if plan is not None and plan.world > 1:
        # The runner keeps Python's lock while a collective waits. A thread of gloo that frees a tensor of Python's
        # waits for that lock, so that a run in ten hangs: seen with torch 2.13.
        raise ValueError(
            f"{call}: a file holds the step of one process, and this step's plan has {plan.world} ranks."
            " A run from a file would sometimes hang in a collective. Call `tfn.jit(step)` on each rank: its"
            " caches are on the disk."
        )
    if not settings.compile:
        raise ValueError(f"{call}: a file holds compiled code, and this step has compile=False. Write"
                         " `tfn.jit(step)`.")  # fmt: skip
    if settings.backend != "inductor":
        raise ValueError(
            f'{call}: torch\'s "inductor" makes the file, and this step has backend={settings.backend!r}. Leave that'
            " out: `tfn.jit(step)`."
        )
    if settings.dynamic:
        raise ValueError(
            f"{call}: a file holds exact sizes, and this step has dynamic={settings.dynamic!r}. Save `tfn.jit(step)`"
            " with a batch of each size, `step.save(path, state, small, large)`; or pad, `tfn.jit(step, buckets=...)`."
        )


def _buckets_described(buckets: Buckets) -> Description:
    return {"sizes": list(buckets.sizes), "pad": dict(buckets.pad), "dim": buckets.dim}


class _Contents:
    """The libraries and constants of a file, each once."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.libraries: list[Description] = []
        self.devices: set[str] = set()
        self._files: dict[str, bytes] = {}
        self._known: dict[Any, int] = {}
        self._constants: list[Tensor] = []

    def library(self, found: Trace, inputs: list[Tensor], settings: Settings) -> int:
        """Compile a graph, unless an equal one is there; return its number."""
        if found.key not in self._known:
            kinds = {x.device.type for x in inputs}
            if odd := kinds - set(_DEVICES):
                raise ValueError(
                    f"{self.call}: torch makes such files for CPUs and CUDA, and the state is on"
                    f" {', '.join(sorted(odd))}. Call `tfn.jit(step)` in each process."
                )
            self.devices |= kinds
            number = self._known[found.key] = len(self.libraries)
            device = next((str(x.device) for x in inputs if x.device.type == "cuda"), "cpu")
            files = {_renamed(file, number): file.read_bytes() for file in _compiled(found, inputs, settings)}
            self._files |= files
            self.libraries.append({"device": device, "files": list(files)})
        return self._known[found.key]

    def constant(self, value: Tensor) -> int:
        """Keep a constant; return its number."""
        number = next((i for i, known in enumerate(self._constants) if known is value), None)
        if number is None:
            number = len(self._constants)
            self._constants.append(value)
        return number

    def constants_described(self) -> list[Description]:
        """Describe the constants, in order."""
        return [{"device": str(x.device), "stride": list(x.stride())} for x in self._constants]

    def members(self) -> dict[str, bytes]:
        """Return every file."""
        if not self._constants:
            return self._files
        from safetensors.torch import save

        values = {str(i): x.detach().cpu().contiguous().clone() for i, x in enumerate(self._constants)}
        return {**self._files, "constants.safetensors": save(values)}


def _renamed(file: Path, number: int) -> str:
    """The library looks for its description beside itself, and for its kernels by their names."""
    known = {".so": f"{number}.wrapper.so", ".json": f"{number}.wrapper.json"}
    return known[file.suffix] if ".wrapper." in file.name else file.name


class _Captured(NamedTuple):
    """A program for one kind of arguments: its description, and what its graph returns, without values."""

    entry: Description
    found: Trace
    fakes: list[Tensor]


class _Recorder:
    """Stands for a program: captures it for whatever it is called with, and returns empty tensors."""

    def __init__(self, program: Program, contents: _Contents) -> None:
        self.program, self.contents = program, contents
        self._known: dict[str, _Captured] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, form = flatten(args)
        describe.check_plain(leaves, self.contents.call)
        arguments = describe.containers(form, self.contents.call)
        names = describe.named(form, ARGUMENTS.get(self.program.name, ("state", "batch")))
        kinds = dict(zip(names, map(describe.described, leaves), strict=True))
        key = repr((arguments, kinds))
        if key not in self._known:
            try:
                captured = self._captured(args, leaves, form)
            except Again as ask:
                return self(ask.prepared(args[0]), *args[1:])
            self._known[key] = captured._replace(entry={"arguments": arguments, "leaves": kinds, **captured.entry})
        return _result(self._known[key], leaves)

    def _captured(self, args: Arguments, leaves: Leaves, form: Structure) -> _Captured:
        call, contents = self.contents.call, self.contents
        donated = form.children[0].places(False) if self.program.donate else []  # type: ignore[union-attr]
        module = getattr(args[0], "module", None)
        found, _ = self.program.captured(Call(self.program.fn, args, leaves, form, donated, module, {}))
        output: Any = next(node for node in found.graph.graph.nodes if node.op == "output")
        fakes = [node.meta["val"] for node in output.args[0]]
        entry = {
            "graph": graph_hash(found),
            "nodes": sum(node.op.startswith("call") for node in found.graph.graph.nodes),
            "inputs": found.inputs,
            "constants": [contents.constant(x) for x in found.constants],
            "outputs": [describe.output_described(output, call) for output in found.outputs],
            "result": describe.containers(found.structure, call),
        }
        inputs = [leaves[i] for i in found.inputs] + found.constants
        library = contents.library(found, inputs, self.program.settings)
        return _Captured({**entry, "library": library}, found, fakes)

    def described(self) -> Description:
        """Describe the program, once it was called."""
        entries = [captured.entry for captured in self._known.values()]
        return {"name": self.program.name, "donate": self.program.donate, "entries": entries}


def _result(captured: _Captured, leaves: Sequence[Any]) -> Any:
    """Return the function's result, with empty tensors for those that it computes."""
    new: Leaves = []
    for output in captured.found.outputs:
        if output.kind == "graph":
            fake = captured.fakes[output.place]
            new.append(torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device))
        else:
            new.append(leaves[output.place] if output.kind == "input" else output.value)
    return captured.found.structure.build(iter(new))


def graph_hash(found: Trace) -> str:
    """Return the same text for the same graph in any process."""
    return hashlib.sha256(_ADDRESS.sub("", repr(found.key)).encode()).hexdigest()


# --- torch's compiler ---------------------------------------------------------------------------------------------


def _compiled(found: Trace, inputs: list[Tensor], settings: Settings) -> list[Path]:
    """Compile a graph ahead of time; return what the library consists of."""
    import torch._inductor as inductor

    wrapper = torch._TorchCompileInductorWrapper(settings.mode, settings.options, None)
    options = {**wrapper.config, "aot_inductor.package": True}
    options.pop("triton.cudagraphs", None)  # a library launches its kernels one by one
    try:
        with _quiet(), known_instructions():
            files: Any = inductor.aot_compile(found.graph, tuple(inputs), options=options)
    except Exception as error:
        raise compiler_error(error) from error
    wanted = (".wrapper.so", ".wrapper.json", ".cubin", ".hsaco")
    return [Path(file) for file in files if isinstance(file, str) and file.endswith(wanted)]


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without warnings about torch's own use of itself, and notes on which kernels go through its dispatcher."""
    log = logging.getLogger("torch._inductor.ir")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(before)
