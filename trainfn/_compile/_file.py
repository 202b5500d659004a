"""`load_step`: a compiled step out of a file. No trace is made, and no compiler is asked."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from trainfn._compile import _file_describe as describe
from trainfn._compile import _file_format
from trainfn._compile._backend import Built, Settings
from trainfn._compile._buckets import Buckets
from trainfn._compile._donate import check_alive
from trainfn._compile._entry import Entry
from trainfn._compile._file_format import Description
from trainfn._compile._file_save import ARGUMENTS
from trainfn._compile._outside import ENVIRONMENT, Change, Outside
from trainfn._compile._program import Program
from trainfn._compile._report import Report
from trainfn._compile._structure import Arguments, Function, Leaves, Structure, flatten
from trainfn._compile._trace import Trace
from trainfn._reached import Unsettled, is_settled, late_names
from trainfn._step import TrainStep
from trainfn.errors import CheckpointError

_SETTINGS = Settings(compile=True, backend="inductor", mode=None, dynamic=None, options=None, max_graphs=1)


def load_step(path: str | os.PathLike[str]) -> LoadedStep:
    """Load a compiled step that ``tfn.jit(step).save(path, state, batch)`` wrote: it runs at once.

    The file is machine code, so load only files that you trust. It holds for the same torch, trainfn and kind of
    machine, and for states and batches of the same names, shapes, dtypes and devices.

    Values that the step read from outside its arguments are fixed as they were when it was saved. They are the numbers
    of a module or a closure, and the learning rate in an optimizer. Tensors among them are in the file. None of it can
    be compared.

    While a step runs on a CPU, other threads of Python wait: torch's runner keeps Python's lock.

    Args:
        path: The file.

    Raises:
        CheckpointError: If the file is damaged.
        FileNotFoundError: If there is none.
        ValueError: If it is for another version or machine; the message names what differs.

    >>> import trainfn as tfn
    >>> tfn.load_step("absent.step")
    Traceback (most recent call last):
    FileNotFoundError: tfn.load_step('absent.step'): there is no such file. `tfn.jit(step).save(...)` writes one.
    """
    began = time.perf_counter()
    header, members = _file_format.read_file(Path(path))
    step = LoadedStep(Path(path), header, members)
    step.seconds = time.perf_counter() - began
    return step


class LoadedStep:
    """A compiled step from a file: call it as the step itself. Made by `load_step`.

    Attributes:
        path: The file.
        plan: None: a file holds the step of one process.
        accumulate: Into how many micro-batches it splits a batch.
        signature: The arguments that the file holds for, by name, for each program.
        graphs: The hashes of the captured graphs; the same step, saved anywhere, has the same.
        seconds: What loading took.
    """

    def __init__(self, path: Path, header: Description, members: dict[str, bytes]) -> None:
        self.path, self.plan, self.seconds = path, None, 0.0
        self.accumulate, self._name = header["step"]["accumulate"], header["step"]["name"]
        self.buckets = None if header["buckets"] is None else Buckets(**header["buckets"])
        entries = [(part["name"], entry) for part in header["programs"] for entry in part["entries"]]
        self.graphs = [entry["graph"] for _, entry in entries]
        self.signature = [
            {"program": name, **{leaf: describe.text(kind) for leaf, kind in entry["leaves"].items()}}
            for name, entry in entries
        ]
        libraries = _Libraries(path, header["libraries"], members)
        constants = _constants(header["constants"], members)
        made = [_FromFile(part, header["environment"], libraries, constants, str(path)) for part in header["programs"]]
        self._programs = made
        self._run: Function = made[0]
        if len(made) == 2:
            self._run = TrainStep(gradients=made[0], update=made[1], accumulate=self.accumulate)

    def __call__(self, state: Any, batch: Any) -> Any:
        """Run the step."""
        check_alive(state)
        if self.buckets is not None:
            batch = self.buckets.apply(batch)
        with torch.no_grad():
            return self._run(state, batch)

    def explain(self) -> Report:
        """Graphs used so far, and the seconds that loading took."""
        return sum((program.report for program in self._programs), Report(seconds=self.seconds))

    def __repr__(self) -> str:
        programs = ", ".join(f"{program.name}: {len(program.saved)} graphs" for program in self._programs)
        return f"LoadedStep({str(self.path)!r}, {self._name}, {programs})"


class _Unwatched(Outside):
    """The file itself holds everything that a saved step read from outside."""

    def __init__(self) -> None:
        super().__init__([], None)

    def unchanged(self) -> bool:
        """Return True."""
        return True

    def changes(self) -> list[Change]:
        """Return nothing."""
        return []


class _FromFile(Program):
    """A program whose graphs are those of a file."""

    def __init__(
        self,
        saved: Mapping[str, Any],
        environment: Mapping[str, str],
        libraries: _Libraries,
        constants: Sequence[Tensor],
        path: str,
    ) -> None:
        super().__init__(_no_function, _SETTINGS, donate=saved["donate"], name=saved["name"])
        self.saved: list[Description] = saved["entries"]
        self._environment, self._libraries, self._constants, self._path = environment, libraries, constants, path

    def _made(self, args: Arguments, leaves: Leaves, changes: list[str]) -> Entry:
        """Find what the file has for arguments of a new kind."""
        self._check_environment()
        _, form = flatten(args)
        kinds = self._kinds(form, leaves)
        overwritten = form.children[0].places(False) if self.donate else []  # type: ignore[union-attr]
        arguments = describe.unordered(describe.containers(form, f"step(state, batch) of {self._path!r}"))
        fitting = [s for s in self.saved if describe.unordered(s["arguments"]) == arguments]
        saved = next((s for s in fitting if _serves(s, kinds, overwritten)), None)
        if saved is None:
            self._settle(args[0])
            raise self._misfit(form, kinds)
        self.report.graphs, self.report.nodes = self.report.graphs + 1, self.report.nodes + saved["nodes"]
        self.report.cache_hits += 1
        found = self._found(saved, list(kinds), args[0])
        run = _run(self._libraries.runner(saved["library"]), _strides(saved, found.inputs, leaves))
        return Entry(found, Built(run, None), _Unwatched(), form, donating=self.donate)

    def _settle(self, state: Any) -> None:
        """Ask for the counts that the saved step keeps of parameters which its loss does not reach."""
        late = late_names(name for entry in self.saved for name in entry["leaves"])
        if late and not is_settled(state.opt_state, late):
            raise Unsettled(late)

    def _found(self, saved: Mapping[str, Any], names: list[str], state: Any) -> Trace:
        """Return the trace, for arguments whose dicts may have another order."""
        places = [names.index(name) for name in saved["leaves"]]
        outputs = [describe.output_of(output) for output in saved["outputs"]]
        return Trace(
            graph=None,  # type: ignore[arg-type]
            constants=[self._constants[i] for i in saved["constants"]],
            inputs=[places[i] for i in saved["inputs"]],
            outputs=[o if o.kind != "input" else o._replace(place=places[o.place]) for o in outputs],
            structure=describe.structure_of(saved["result"], type(state)),
            key=saved["graph"],
            mode=None,
            sharded=False,
            reads_host=False,
        )

    def _kinds(self, form: Structure, leaves: Sequence[Any]) -> dict[str, Description]:
        names = describe.named(form, ARGUMENTS.get(self.name, ("state", "batch")))
        return dict(zip(names, map(describe.described, leaves), strict=True))

    def _check_environment(self) -> None:
        now = {name: repr(read()) for name, read in ENVIRONMENT.items()}
        for name, value in self._environment.items():
            if now.get(name) != value:
                raise ValueError(
                    f"step(state, batch) of {self._path!r}: {name} was {value} when the step was saved, and is"
                    f" {now.get(name)}. Set it back, or save the step again: `tfn.jit(step).save(path, state, batch)`."
                )

    def _misfit(self, form: Structure, kinds: dict[str, Description]) -> ValueError:
        nearest = max(self.saved, key=lambda s: sum(s["leaves"].get(name) == kind for name, kind in kinds.items()))
        known = nearest["leaves"]
        name = next((name for name in (*known, *kinds) if known.get(name) != kinds.get(name)), None)
        if name is None:
            there, here = nearest["arguments"], describe.containers(form, "step(state, batch)")
            what = f"its containers are {_differing(there, here)}"
        else:
            what = f"{name} is {describe.text(kinds.get(name))}, and was {describe.text(known.get(name))}"
        return ValueError(
            f"step(state, batch) of {self._path!r}: {what} when the step was saved. It holds for that alone: save it"
            " for these, too, `tfn.jit(step).save(path, state, batch)`, or call `tfn.jit(step)`."
        )


def _no_function(*_: object) -> NoReturn:
    raise AssertionError("a step from a file has no Python function")


def _serves(saved: Mapping[str, Any], kinds: Mapping[str, Any], overwritten: Sequence[bool]) -> bool:
    """Whether a saved graph is for such leaves. What it only reads may have other strides: it is copied."""
    known = saved["leaves"]
    if known.keys() != kinds.keys():
        return False
    kept = list(known)
    fixed = {kept[output["place"]] for output in saved["outputs"] if output["kind"] == "input"}
    fixed |= {name for name, yes in zip(kinds, overwritten, strict=False) if yes}
    for name, here in kinds.items():
        there = known[name]
        if there != here and (
            name in fixed or "stride" not in here or {**here, "stride": there.get("stride")} != there
        ):
            return False
    return True


def _strides(saved: Mapping[str, Any], inputs: Sequence[int], leaves: Sequence[Any]) -> dict[int, tuple[int, ...]]:
    """Return which inputs of the graph are copied first, and to which strides."""
    kinds = list(saved["leaves"].values())
    wanted = {place: tuple(kinds[i]["stride"]) for place, i in enumerate(saved["inputs"])}
    return {place: stride for place, stride in wanted.items() if leaves[inputs[place]].stride() != stride}


def _run(runner: Any, strides: dict[int, tuple[int, ...]]) -> Callable[..., Sequence[Tensor]]:
    if not strides:
        return lambda *inputs: runner.run(inputs)

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        return runner.run([_laid(x, strides[i]) if i in strides else x for i, x in enumerate(inputs)])

    return run


def _laid(x: Tensor, stride: Sequence[int]) -> Tensor:
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def _differing(there: object, here: object) -> str:
    """The first pair of containers that differ."""
    if isinstance(there, dict) and isinstance(here, dict) and there["kind"] == here["kind"]:
        pairs = zip(there["items"], here["items"], strict=False)
        inner = next((_differing(a, b) for a, b in pairs if a != b), None)
        return inner or f"a {here['kind']} of {len(here['items'])}, and were one of {len(there['items'])}"
    kinds = [x["kind"] if isinstance(x, dict) else x for x in (here, there)]
    return f"{kinds[0]}, and were {kinds[1]}"


# --- machine code -------------------------------------------------------------------------------------------------


class _Libraries:
    """The libraries of a file, loaded when the file is."""

    def __init__(self, path: Path, described: Sequence[Mapping[str, Any]], members: Mapping[str, bytes]) -> None:
        # The loader takes names of files. Kernels for a GPU are read at the first step, so the folder stays till then.
        folder = Path(tempfile.mkdtemp(prefix="trainfn-step-"))
        remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        on_gpu = False
        try:
            for name in [name for library in described for name in library["files"]]:
                (folder / name).write_bytes(members[name])
            self._runners = [_runner(folder, i, library["device"]) for i, library in enumerate(described)]
            on_gpu = any(library["device"] != "cpu" for library in described)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"tfn.load_step({str(path)!r}): this system can't load its machine code: {reason}. Save it again here:"
                " `tfn.jit(step).save(path, state, batch)`."
            ) from error
        finally:
            if not on_gpu:
                remove()

    def runner(self, number: int) -> Any:
        """Return what runs a library."""
        return self._runners[number]


def _runner(folder: Path, number: int, device: str) -> Any:
    aoti: Any = torch._C._aoti  # type: ignore[attr-defined]
    library = str(folder / f"{number}.wrapper.so")
    if device == "cpu":
        return aoti.AOTIModelContainerRunnerCpu(library, 1)
    return aoti.AOTIModelContainerRunnerCuda(library, 1, device, str(folder))


def _constants(described: Sequence[Mapping[str, Any]], members: Mapping[str, bytes]) -> list[Tensor]:
    if not described:
        return []
    from safetensors.torch import load

    values = load(members["constants.safetensors"])
    return [_laid(values[str(i)].to(kind["device"]), kind["stride"]) for i, kind in enumerate(described)]
