"""Torch's own generators around a step, which must neither use them nor change them."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainfn.errors import RandomnessError


class Found(NamedTuple):
    """The state of torch's generators: the CPU's, and those of the GPUs by seed and offset."""

    cpu: Tensor
    cuda: list[tuple[int, int]]


def found() -> Found:
    return Found(torch.default_generator.get_state(), _cuda())


def _cuda() -> list[tuple[int, int]]:
    """Neither copies nor waits. Empty while a CUDA graph is recorded: a generator then answers with an error."""
    if not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return []
    return [(g.initial_seed(), g.get_offset()) for g in torch.cuda.default_generators]


def restore(before: Found) -> None:
    torch.default_generator.set_state(before.cpu)
    if before.cuda and before.cuda != _cuda():
        for generator, (seed, offset) in zip(torch.cuda.default_generators, before.cuda, strict=True):
            generator.manual_seed(seed).set_offset(offset)


@contextlib.contextmanager
def restored() -> Generator[Found]:
    """Give torch's generators back as they were found."""
    before = found()
    try:
        yield before
    finally:
        restore(before)


def check_unused(before: Found) -> None:
    """Raise if torch's generators were drawn from, by the CPU's since it was seeded last."""
    cpu = torch.default_generator
    untouched = torch.Generator().manual_seed(cpu.initial_seed()).get_state()
    if not torch.equal(cpu.get_state(), untouched) or (before.cuda and before.cuda != _cuda()):
        raise RandomnessError(
            "this step drew from torch's global generator in a way that can't be rerouted to state.key. Such ways are"
            " `torch.ops.aten.rand` and other libraries' kernels. Draw before the step and pass the numbers in the"
            " batch."
        )


def moved(before: Found) -> bool:
    """Whether torch's generators were drawn from or seeded."""
    now: Any = found()
    return not torch.equal(now.cpu, before.cpu) or (bool(before.cuda) and before.cuda != now.cuda)
