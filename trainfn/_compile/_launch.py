"""A whole compiled step as one launch of a CUDA graph, accumulation included.

The graph reads and writes fixed addresses. A donated state has them already: its parameters and moments are overwritten
in place. What comes back fresh (the batch, the step count, the metrics) is copied in before the launch, and out after.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor

from trainfn._compile._outside import environment
from trainfn._compile._structure import Function, Leaves, Structure, flatten

_WARM = 2  # calls before the recording: the first compiles, the second lets libraries allocate what they need
_MOST = 2  # recordings; each keeps its state's memory alive
_SMALL = 4096  # numbers: outputs up to this size leave the graph together


class Recorder(Protocol):
    """Records a function's kernels, so that they can be launched again: `CudaRecorder`, or a test's own."""

    def record(self, fn: Callable[[], Any]) -> Any:
        """Run the function, and return what it returned."""
        ...

    def launch(self) -> None:
        """Run its kernels again."""
        ...


class CudaRecorder:
    """One `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def record(self, fn: Callable[[], Any]) -> Any:
        """Capture; nothing is computed yet."""
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            return fn()

    def launch(self) -> None:
        """Replay."""
        self.graph.replay()


class Launches:
    """A step, launched as a whole from its third call with a state on.

    Args:
        run: The compiled step.
        programs: Its programs, which know what it read from outside.
        donate: Whether states are donated; if not, each call copies the state in and out.
        recorder: Makes what records the kernels.
    """

    def __init__(
        self,
        run: Function,
        programs: Sequence[Any],
        *,
        donate: bool,
        recorder: Callable[[], Recorder] = CudaRecorder,
        device: str = "cuda",
    ) -> None:
        self.run, self.programs, self.donate = run, programs, donate
        self.recorder, self.device = recorder, device
        self._calls: dict[Hashable, int] = {}
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()

    def __call__(self, state: Any, *rest: Any) -> Any:
        """Run the step."""
        leaves, form = flatten((state, *rest))
        if not all(isinstance(x, Tensor) and x.device.type == self.device and not _overlaps(x) for x in leaves):
            return self.run(state, *rest)
        donated = form.children[0].places(False) if self.donate else []  # type: ignore[union-attr]
        fixed = [x for x, yes in zip(leaves, donated, strict=False) if yes]
        key = (form, tuple((x.shape, x.dtype, x.stride()) for x in leaves), tuple(map(id, fixed)), environment())
        found = self._recordings.get(key)
        if found is not None and found.valid(fixed):
            self._recordings.move_to_end(key)
            return found.launch(state, leaves)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= _WARM:
            return self.run(state, *rest)
        if any(self._needs_the_host(entry) for program in self.programs for entry in program.entries()):
            return self.run(state, *rest)
        self._calls[key] = 0
        made = Recording(self, form, leaves, donated)
        self._recordings[key] = made
        while len(self._recordings) > _MOST:
            self._recordings.popitem(last=False)
        return made.launch(state, leaves)

    def _needs_the_host(self, entry: Any) -> bool:
        """Whether a condition is read on the host, or a constant is copied from there: a recording can do neither."""
        return entry.trace.reads_host or any(x.device.type != self.device for x in entry.constants)


def _overlaps(x: Tensor) -> bool:
    """Whether several numbers of a tensor are one in memory, as after `expand`."""
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


def _twin(x: Tensor) -> Tensor:
    """A copy with the same strides: others would be another kind of argument."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


class Recording:
    """The kernels of one step on one state's memory."""

    def __init__(self, launches: Launches, form: Structure, leaves: Leaves, donated: list[bool]) -> None:
        self.form = form
        every = [*donated, *[False] * (len(leaves) - len(donated))]
        self.fixed = [x for x, yes in zip(leaves, every, strict=True) if yes]
        self._moving = [i for i, yes in enumerate(every) if not yes]
        given = list(leaves)
        for i in self._moving:
            given[i] = _twin(leaves[i])
        self._inputs = [given[i] for i in self._moving]
        self._recorder = launches.recorder()
        self._entries = [entry for program in launches.programs for entry in program.entries()]
        self._out, self._flat = self._recorder.record(lambda: self._recorded(launches.run, given))

    def _recorded(self, run: Function, given: Leaves) -> tuple[Any, dict[Any, Tensor]]:
        """Run, and put the small outputs of each dtype side by side."""
        new, self._result = flatten(run(*self.form.build(iter(given))))
        places = {id(x): i for i, x in enumerate(self.fixed)}
        self._places = [places.get(id(x), -1) if isinstance(x, Tensor) else -1 for x in new]
        small: dict[Any, list[int]] = {}
        for i, x in enumerate(new):
            if self._places[i] < 0 and type(x) is Tensor and x.numel() <= _SMALL:
                small.setdefault(x.dtype, []).append(i)
        self._small = small
        return new, {dtype: torch.cat([new[i].reshape(-1) for i in at]) for dtype, at in small.items()}

    def valid(self, fixed: Leaves) -> bool:
        """Return whether this is the recorded memory, and nothing that was fixed by the capture has changed."""
        same = len(fixed) == len(self.fixed) and all(map(is_, fixed, self.fixed))
        return same and all(entry.outside.unchanged() or not entry.outside.changes() for entry in self._entries)

    def launch(self, state: Any, leaves: Leaves) -> Any:
        """Copy in, launch, copy out."""
        torch._foreach_copy_(self._inputs, [leaves[i] for i in self._moving])
        self._recorder.launch()
        new = list(self._out)
        for dtype, at in self._small.items():
            parts = self._flat[dtype].clone().split([self._out[i].numel() for i in at])
            for i, part in zip(at, parts, strict=True):
                new[i] = part.view(self._out[i].shape)
        for i, place in enumerate(self._places):
            if place >= 0:
                new[i] = self.fixed[place]
            elif new[i] is self._out[i] and isinstance(new[i], Tensor):
                new[i] = new[i].clone()
        if self.fixed:
            self.form.children[0].retire(state)  # type: ignore[union-attr]
        return self._result.build(iter(new))
