"""The engine, and the handle on it that plays the state."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from trainfn import random
from trainfn._types import Schedule, Transform
from trainfn.deepspeed._config import Config, resolved
from trainfn.errors import DonatedStateError

Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclasses.dataclass(eq=False)
class Run:
    """The data that all handles on one engine share.

    ``generation`` numbers the handle that is valid; ``halfway`` is true from a step's first backward pass to its end.
    """

    engine: Any
    key: Tensor
    schedule: Schedule | None
    modes: list[tuple[nn.Module, bool]]
    ends: contextlib.ExitStack
    generation: int = 0
    halfway: bool = False

    @property
    def group(self) -> Any:
        """The ranks that have rows of their own."""
        return self.engine.seq_data_parallel_group

    def set_mode(self, training: bool) -> None:
        """Put the module in training or eval mode; a module that was in eval mode at `init` stays so."""
        for module, mode in self.modes:
            module.training = training and mode

    def handle(self) -> EngineState:
        """Return a new handle, which is the only valid one from now on."""
        self.generation += 1
        self.halfway = False
        step = torch.full((), self.engine.global_steps, dtype=torch.int64, device=self.engine.device)
        return EngineState(step, self, self.generation)


@dataclasses.dataclass(frozen=True, eq=False)
class EngineState:
    """A handle on a DeepSpeed engine after so many steps; it can be used once.

    Attributes:
        step: Completed steps, ``int64[]``.
    """

    step: Tensor
    _run: Run = dataclasses.field(repr=False)
    _generation: int = dataclasses.field(repr=False)

    @property
    def engine(self) -> Any:
        """The ``deepspeed.DeepSpeedEngine``.

        Raises:
            DonatedStateError: If a later state exists.
        """
        return alive(self, "state.engine").engine

    def __repr__(self) -> str:
        stale = "" if self._generation == self._run.generation else ", used"
        return f"EngineState({type(self._run.engine.module).__name__}, step={int(self.step)}{stale})"

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(
            "a state of tfn.deepspeed is a handle on an engine that works in place. It can't be copied, pickled,"
            " replaced or saved as other states are. Keep one with `tfn.deepspeed.save(path, state)`, and go back to it"
            " with `state = tfn.deepspeed.restore(path, state)`."
        )

    __copy__ = __deepcopy__ = __reduce__ = _replace = _refuse


def run_of(state: object, call: str) -> Run:
    """Return the run of a state; the state may have been used."""
    if not isinstance(state, EngineState):
        raise TypeError(
            f"{call} got a value of type {type(state).__name__} for the state. Make one first:"
            " `state = tfn.deepspeed.init(model, config=...)`."
        )
    return state._run


def intact(state: object, call: str) -> Run:
    """Return the run of a state, unless a step has failed halfway; the state may have been used."""
    run = run_of(state, call)
    if run.halfway:
        raise DonatedStateError(
            f"{call}: a step failed halfway and left the engine with part of its gradients. Resume from a checkpoint"
            " with a new engine: `state = tfn.deepspeed.restore(path, tfn.deepspeed.init(model, config=...))`."
        )
    return run


def alive(state: object, call: str) -> Run:
    """Return the run of a state that has not been used."""
    run = intact(state, call)
    assert isinstance(state, EngineState)
    if state._generation != run.generation:
        raise DonatedStateError(
            f"{call}: this state, of step {int(state.step)}, has been used: the engine works in place and has moved on."
            " Use the newest one, `state, metrics = step(state, batch)`, or resume from a checkpoint,"
            " `state = tfn.deepspeed.restore(path, state)`."
        )
    return run


def init(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Factory | None = None,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    values: Mapping[str, Any] | None = None,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> EngineState:
    """Start a DeepSpeed engine on a module, and return the first state.

    The engine takes the module: it is moved, cast and, by stage 3, sharded in place. A process group that does not
    exist yet is made: gloo on the CPU, DeepSpeed's choice elsewhere. Entries that the configuration leaves out have
    DeepSpeed's defaults. One of them clips at 1.0: write ``"gradient_clipping": 0.0`` for none.

    Args:
        model: Any module but a pipeline; for stage 3 it may have been built under ``deepspeed.zero.Init``.
        optimizer: A ``torch.optim`` optimizer of the module's parameters, or a function from parameters to one. By
            default, the configuration's ``optimizer`` section.
        config: A DeepSpeed configuration: a dict or the path of a json. By default, what ``accelerate launch``
            exported.
        values: The values of ``"auto"`` entries, by DeepSpeed's dotted names; see `autos`. Entries that the
            configuration does not have are added, such as ``{"gradient_accumulation_steps": 4}``.
        schedule: From the number of completed updates to the learning rate of all parameter groups; by default the
            configuration's ``scheduler`` section, or a constant rate.
        seed: For dropout and all other randomness of a step; 64 bits.

    Raises:
        ImportError: If DeepSpeed is not installed.
        TypeError: If ``model`` or ``optimizer`` is of another kind.
        ValueError: If the configuration is incomplete or contradicts the arguments.

    >>> config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}
    >>> optimizer = lambda params: torch.optim.AdamW(params, lr=1e-3)
    >>> init(torch.nn.Linear(2, 1), optimizer, config=config)  # doctest: +SKIP
    EngineState(Linear, step=0)
    """
    deepspeed = package()
    _check(model, optimizer, deepspeed)
    complete = _with_optimizer(resolved(config, values or {}, model), optimizer, schedule)
    ends = _joined(deepspeed)
    modes = [(m, m.training or not model.training) for m in model.modules()]
    learned = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=learned, config=complete)
    key = random.key(seed, device=engine.device)
    return Run(engine, key, schedule, modes, ends).handle()


def package() -> Any:
    """Import DeepSpeed and return it."""
    try:
        return importlib.import_module("deepspeed")
    except ImportError as error:
        raise ImportError(
            f"tfn.deepspeed needs the DeepSpeed package ({error}). Run `pip install 'trainfn[deepspeed]'`, or on a"
            " machine without CUDA `DS_BUILD_OPS=0 pip install deepspeed`."
        ) from error


def _check(model: object, optimizer: object, deepspeed: Any) -> None:
    if isinstance(optimizer, Transform):
        raise TypeError(
            "init(model, optimizer): DeepSpeed's engine can't run a trainfn transform; it updates its own shards. Give"
            " it a torch optimizer, `lambda params: torch.optim.AdamW(params, lr=1e-3)`, or an `optimizer` section in"
            " the configuration. Clipping is `gradient_clipping` there, a schedule `schedule=`."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"init(model, ...) takes an nn.Module, not {type(model).__name__}.")
    if isinstance(model, deepspeed.PipelineModule):
        raise TypeError(
            "init(model, ...) got a PipelineModule, whose engine has its own loop. Call"
            " `deepspeed.initialize(...)[0].train_batch()` yourself."
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer) and not callable(optimizer):
        raise TypeError(
            f"init(model, optimizer): {type(optimizer).__name__} is not a torch optimizer. Write `lambda params:"
            " torch.optim.AdamW(params, lr=1e-3)`."
        )


def _with_optimizer(config: Config, optimizer: object, schedule: object) -> Config:
    if (optimizer is None) == ("optimizer" not in config):
        both = "is in the configuration and among the arguments" if optimizer is not None else "is missing"
        raise ValueError(
            f"init(model, ...): the optimizer {both}. Give one: `tfn.deepspeed.init(model, lambda params:"
            ' torch.optim.AdamW(params, lr=1e-3), config=...)`, or `"optimizer": {"type": "AdamW", "params": {"lr":'
            " 1e-3}}` in the configuration."
        )
    if schedule is not None and "scheduler" in config:
        raise ValueError(
            "init(model, schedule=...): the configuration has a scheduler too. Leave one of them out, such as the"
            f" configuration's `scheduler` section ({config['scheduler'].get('type')})."
        )
    if optimizer is not None:  # the user's choice, which DeepSpeed refuses with ZeRO or offload without these entries
        config.setdefault("zero_allow_untested_optimizer", True)
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def _joined(deepspeed: Any) -> contextlib.ExitStack:
    """Make the process group if there is none; return the exit stack that undoes it."""
    dist, ends = torch.distributed, contextlib.ExitStack()
    if not dist.is_initialized():
        if getattr(deepspeed.comm.comm, "cdb", None) is not None:
            raise ValueError(
                "init(model, ...): DeepSpeed keeps the process group of its first engine, and that one has ended, with"
                " `tfn.deepspeed.close`. For several engines in one process make the group yourself, before the first"
                " `init`: `torch.distributed.init_process_group('gloo')` on CPUs; `close` leaves it."
            )
        accelerator = deepspeed.accelerator.get_accelerator()
        backend = "gloo" if accelerator.device_name() == "cpu" else accelerator.communication_backend_name()
        if "WORLD_SIZE" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False)
        ends.callback(dist.destroy_process_group)
    ranks, launched = dist.get_world_size(), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks < launched:
        raise ValueError(
            f"init(model, ...): {launched} processes were launched, and this one's process group has {ranks}: each"
            " would train alone. Make a group of all of them before, on CPUs by"
            " `torch.distributed.init_process_group('gloo')`; or make no group, and `init` makes it."
        )
    if ranks == 1 and "LOCAL_RANK" not in os.environ:  # DeepSpeed reads it in every step, launcher or not
        os.environ["LOCAL_RANK"] = "0"
        ends.callback(os.environ.pop, "LOCAL_RANK", None)
    return ends


def close(state: EngineState) -> None:
    """Shut the engine down, and the process group if `init` made it; every rank calls it, at the end.

    Without it, processes may abort when Python exits. After it, another engine needs a process group of your own.

    >>> close(state)  # doctest: +SKIP
    """
    run = run_of(state, "close(state)")
    run.generation += 1
    torch.distributed.barrier()  # no data, once a run: no rank may still be in a collective of the engine
    run.engine.destroy()
    run.ends.close()
