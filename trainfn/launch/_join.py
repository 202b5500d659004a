"""The processes that a launcher has started find each other, and leave without noise."""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from trainfn._ranks._errors import explain, launched
from trainfn.launch._fields import is_true

_HOW = (
    "`accelerate launch --multi_gpu --num_processes N script.py`, with a configuration file, or `torchrun"
    " --nproc_per_node N script.py`: on CPUs too"
)


def join(*, timeout: float = 1800.0) -> torch.device:
    """Bring the processes of a launcher together, and return the device of this one.

    Accelerate makes the group, so that its own state fits. The backend is gloo on CPUs, and NCCL with gloo on NVIDIA
    GPUs. In one process, or at a second call, nothing happens. The process leaves the group when it ends.

    Args:
        timeout: Seconds to wait for another rank, here and in every step, before that is an error.

    Raises:
        RuntimeError: If the processes don't find each other, or each would train alone, or a launcher started one
            process where several were asked for.

    >>> join().type in ("cpu", "cuda", "mps", "xpu")
    True
    """
    return meet(timeout=timeout, cpu=is_true(os.environ.get("ACCELERATE_USE_CPU")))


def meet(*, timeout: float, cpu: bool) -> torch.device:
    """Do the work of `join`, on CPUs if ``cpu`` or if the machine has no accelerator."""
    world = launched()
    cpu = cpu or not _accelerated()
    if world == 1:
        _check_alone()
        return torch.device("cpu") if cpu else torch.accelerator.current_accelerator() or torch.device("cpu")
    if torch.distributed.is_initialized() and "WORLD_SIZE" not in os.environ:
        return torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())  # of the user
    if not timeout > 0:
        raise ValueError(f"join(timeout={timeout!r}): write a number of seconds above 0.")
    state = _met(world, cpu, timedelta(seconds=timeout))
    if state.num_processes != world or torch.distributed.get_world_size() != world:
        raise RuntimeError(
            f"join(): {world} processes were launched (WORLD_SIZE={world}), and Accelerate, which was asked first,"
            f" found {state.num_processes} on {state.device}: each would train alone. Call"
            " `tfn.launch.settings()` before `Accelerator()` or `PartialState()`; or, on a machine without GPUs, launch"
            " with ACCELERATE_USE_CPU=true."
        )
    _end_quietly()
    return state.device


def _accelerated() -> bool:
    """Whether there is a device that several processes can work on together."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is not None and (device.type != "mps" or launched() == 1)


def _check_alone() -> None:
    """Raise if ``accelerate launch`` started one process instead of several, as it does silently without GPUs."""
    env = os.environ
    asked = "ACCELERATE_USE_CPU" in env and "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env
    if asked and "RANK" not in env and "LOCAL_RANK" not in env:
        raise RuntimeError(
            "join(): `accelerate launch` was asked for several processes and has started one: without `--multi_gpu`,"
            f" FSDP or DeepSpeed it starts no more, unless by mpirun. Launch with {_HOW}. For one process, write"
            " `--num_processes 1`."
        )


def _met(world: int, cpu: bool, timeout: timedelta) -> Any:
    from accelerate import PartialState
    from accelerate.utils import InitProcessGroupKwargs

    try:
        if cpu:
            return PartialState(cpu=cpu, **InitProcessGroupKwargs(backend="gloo", timeout=timeout).to_kwargs())
        if torch.cuda.is_available() and not torch.distributed.is_initialized():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
        return PartialState()
    except (RuntimeError, ValueError, KeyError) as error:  # torch's DistError is a RuntimeError
        PartialState._reset_state()
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RuntimeError(
            f"join(timeout={timeout.total_seconds():g}): rank {os.environ.get('RANK', '?')} of {world} did not find the"
            f" others at MASTER_ADDR:MASTER_PORT={where}: {error}. All {world} have to be started, within the timeout,"
            f" with the same address and a free port. Launch with {_HOW}."
        ) from error


# --- the end ------------------------------------------------------------------------------------------------------


class _Ending:
    """It replaces `sys.excepthook`, names the rank of an error that ends this process, and leaves the group."""

    def __init__(self, before: Any) -> None:
        self.before, self.failed = before, False

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Explain, then print as before."""
        self.failed = True
        explain(error)
        self.before(kind, error, trace)

    def leave(self) -> None:
        """Leave the group. After an error this is skipped: the ranks may wait for each other here."""
        if not self.failed and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _end_quietly() -> None:
    if not isinstance(sys.excepthook, _Ending):
        ending = _Ending(sys.excepthook)
        sys.excepthook = ending
        atexit.register(ending.leave)
