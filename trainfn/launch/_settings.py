"""`settings` reads the configuration of a launcher; `plan` is the part of it that a step needs."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from trainfn._plan import Plan
from trainfn._plan._layout import Rule
from trainfn._ranks._errors import launched
from trainfn.launch import _accelerate, _deepspeed
from trainfn.launch._config import exported
from trainfn.launch._fields import Field, check, is_true, table
from trainfn.launch._join import meet

_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """The configuration of a launcher; print it to see the fate of each field.

    Attributes:
        plan: The plan for `trainfn.shard` and `trainfn.train_step`.
        device: The device of this process.
        rank: The number of this process; rank 0 writes files and prints lines.
        world: The number of processes.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; the plan computes in it already.
        loss_scale: With fp16, the arguments of `trainfn.transforms.dynamic_loss_scale`, which the step needs.
        compile: The arguments of `trainfn.jit`, if the configuration asks for compilation.
        state_dict: ``"full"`` if full parameters are saved, ``"sharded"`` if each rank writes its part.
        checkpointing: Whether activations are computed again instead of kept; the model must be set so.
        accumulate: The number of micro-batches, if a DeepSpeed configuration has one.
        clip: The global norm to clip gradients at, if a DeepSpeed configuration has one.
        fields: The fate of each field.

    >>> import torch, trainfn as tfn
    >>> print(Launch(plan=tfn.Plan(), device=torch.device("cpu")))
    Launch(1 process, cpu, Plan(replicate=1, shard=1, tensor=1, stage=0))
    """

    plan: Plan
    device: torch.device
    rank: int = 0
    world: int = 1
    mixed_precision: str = "no"
    loss_scale: dict[str, Any] | None = None
    compile: dict[str, Any] | None = None
    state_dict: Literal["full", "sharded"] = "full"
    checkpointing: bool = False
    accumulate: int | None = None
    clip: float | None = None
    fields: tuple[Field, ...] = ()

    def __str__(self) -> str:
        axes = ", ".join(f"{name}={getattr(self.plan, name)}" for name in ("replicate", "shard", "tensor", "stage"))
        who = "1 process" if self.world == 1 else f"rank {self.rank} of {self.world}"
        head = f"Launch({who}, {self.device}, Plan({axes}))"
        return f"{head}\n{table(self.fields)}" if self.fields else head


def settings(
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    deepspeed: Literal["native"] | None = None,
    rules: Sequence[tuple[str, Rule]] = (),
    timeout: float = 1800.0,
    quiet: bool = False,
) -> Launch:
    """Bring the processes of a launcher together, as `join` does, and read its configuration.

    A field that is not honoured is named in a warning, or is an error if the numbers would be others.

    Args:
        config: A file to read instead: an Accelerate yaml, or a DeepSpeed json, of a script that ``torchrun`` starts.
            ``accelerate launch`` exports the fields of its own file that it knows. Or a dict of DeepSpeed's fields,
            which replaces the launcher's DeepSpeed configuration; see `deepspeed_config`.
        deepspeed: The meaning of a DeepSpeed configuration. ``"native"`` is a plan that computes the same as its ZeRO
            stage; the fate of each field is printed. For the engine itself, `trainfn.deepspeed`, call `join` instead.
        rules: The rules of the plan, such as those of `tensor_rules`.
        timeout: See `join`.
        quiet: Whether to print nothing and warn of nothing; ``print(launch)`` shows the same.

    Raises:
        ValueError: If the configuration asks for what can't be honoured, or for sizes that are not the number of
            processes.
        RuntimeError: If the processes don't find each other; see `join`.

    >>> settings().plan.shape(world=1)
    {'replicate': 1, 'shard': 1, 'tensor': 1}
    >>> settings(config={"zero_optimization": {"stage": 3}}, deepspeed="native", quiet=True).plan.stage
    3
    """
    if deepspeed not in (None, "native"):
        raise ValueError(
            f'settings(deepspeed={deepspeed!r}): it is "native" or None. For the engine, write `tfn.launch.join()` and'
            " then `tfn.deepspeed.init(model)`."
        )
    env = _environment(config)
    device = meet(timeout=timeout, cpu=is_true(env.get("ACCELERATE_USE_CPU")))
    world = launched()
    rank = torch.distributed.get_rank() if world > 1 else 0
    nodes = max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    reading = read_environment(env, nodes, deepspeed, config if isinstance(config, Mapping) else None)
    check(reading.fields, "settings()")
    arguments: dict[str, Any] = {**reading.plan, "rules": (*rules, *reading.plan.get("rules", ()))}
    plan = Plan(**arguments)
    plan.shape(world)
    launch = Launch(plan=plan, device=device, rank=rank, world=world, fields=tuple(reading.fields), **reading.rest)
    if rank == 0 and not quiet:
        _report(launch, deepspeed)
    return launch


def plan(
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    deepspeed: Literal["native"] | None = None,
    rules: Sequence[tuple[str, Rule]] = (),
    timeout: float = 1800.0,
) -> Plan:
    """Return the plan of `settings`; warn if the configuration asks for more than a plan holds.

    Args:
        config: See `settings`.
        deepspeed: See `settings`.
        rules: See `settings`.
        timeout: See `settings`.

    Raises:
        ValueError: See `settings`.
        RuntimeError: See `settings`.

    >>> import torch, trainfn as tfn
    >>> plan = tfn.launch.plan()
    >>> optimizer = tfn.optim.sgd(0.1)
    >>> state = tfn.shard(tfn.init(torch.nn.Linear(2, 1), optimizer), plan)
    >>> step = tfn.train_step(lambda model, x: tfn.Mean.of(model(x) ** 2), optimizer, plan=plan)
    """
    launch = settings(config=config, deepspeed=deepspeed, rules=rules, timeout=timeout)
    beside = {
        "compile": "`tfn.jit(step, **launch.compile)`",
        "loss_scale": "`tfn.transforms.dynamic_loss_scale(**launch.loss_scale)`",
        "checkpointing": "`model.gradient_checkpointing_enable()`",
        "accumulate": "`tfn.train_step(..., accumulate=launch.accumulate)`",
        "clip": "`tfn.optim.clip_by_global_norm(launch.clip)`",
    }
    asked = [line for name, line in beside.items() if getattr(launch, name) not in (None, False, 1)]
    if asked and launch.rank == 0:
        warnings.warn(
            f"plan(): the configuration has settings that a plan does not hold. Write `launch = tfn.launch.settings()`,"
            f" and use them: {', '.join(asked)}.",
            stacklevel=2,
        )
    return launch.plan


def fields_of(config: str | Path) -> tuple[Field, ...]:
    """Return the fates that the fields of a configuration file would have; DeepSpeed's are read as a plan."""
    env = exported(config)
    return tuple(read_environment(env, 1, "native" if "ACCELERATE_USE_DEEPSPEED" in env else None).fields)


def deepspeed_config() -> dict[str, Any] | None:
    """Return the DeepSpeed configuration of ``accelerate launch``, as the fields of one JSON; None without one.

    Where a JSON and Accelerate's yaml both have a field, the value of the JSON counts, unless it is ``"auto"``.

    Raises:
        ValueError: If the JSON that the launcher was given is not valid.

    >>> deepspeed_config() is None
    True
    """
    env = _environment(None)
    asked = is_true(env.get("ACCELERATE_USE_DEEPSPEED"))
    return _deepspeed.configured(_accelerate.Reading(env)) if asked else None


def read_environment(
    env: Mapping[str, str], nodes: int, deepspeed: str | None, given: Mapping[str, Any] | None = None
) -> _accelerate.Reading:
    """Read all variables of a launcher; ``given`` replaces its DeepSpeed configuration."""
    reading = _accelerate.Reading(env, nodes)
    _accelerate.read(reading)
    _read_deepspeed(reading, deepspeed, given)
    _accelerate.parallelism(reading)
    _accelerate.finish(reading)
    return reading


def _environment(config: str | Path | Mapping[str, Any] | None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
    env |= {name: os.environ[name] for name in ("NPROC", "MIXED_PRECISION") if name in os.environ}
    if config is None:
        return env
    if isinstance(config, Mapping):
        return _without_deepspeed(env) | {"ACCELERATE_USE_DEEPSPEED": "true"}
    if "ACCELERATE_MIXED_PRECISION" in env:
        raise ValueError(
            f"settings(config={str(config)!r}): `accelerate launch` has a configuration already. Write `accelerate"
            f" launch --config_file {config} script.py`, or start the script by torchrun."
        )
    kept = {name: value for name, value in env.items() if name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")}
    return {**kept, **exported(config)}


def _without_deepspeed(env: Mapping[str, str]) -> dict[str, str]:
    others = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG": "a `parallelism_config`"}
    for variable, what in others.items():
        if is_true(env.get(variable)):
            raise ValueError(
                f"settings(config={{...}}): that is one of DeepSpeed, and `accelerate launch` was configured with"
                f" {what}: each says how the state is sharded. Leave one out, or start the script by torchrun."
            )
    prefixes = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_GRADIENT_")
    return {name: value for name, value in env.items() if not name.startswith(prefixes)}


def _read_deepspeed(reading: _accelerate.Reading, deepspeed: str | None, given: Mapping[str, Any] | None) -> None:
    asked = is_true(reading.get("ACCELERATE_USE_DEEPSPEED"))
    if asked and deepspeed is None:
        raise ValueError(
            "settings(): the configuration is one of DeepSpeed. For its engine, write `tfn.launch.join()` and then"
            " `tfn.deepspeed.init(model)`; for a plan of the same ZeRO stage,"
            ' `tfn.launch.settings(deepspeed="native")`.'
        )
    if deepspeed is not None and not asked:
        raise ValueError(
            f"settings(deepspeed={deepspeed!r}): there is no DeepSpeed configuration. Start the script by `accelerate"
            " launch` with one, or write `config=` with the path of a JSON or yaml; or leave `deepspeed` out."
        )
    if asked:
        _deepspeed.read(reading, given)


def _report(launch: Launch, deepspeed: str | None) -> None:
    if deepspeed is not None:
        print(launch)
    lost = [f"{field.name}={field.value} ({field.detail})" for field in launch.fields if field.fate == "ignored"]
    if lost:
        warnings.warn(f"settings(): fields of the configuration are not honoured: {'; '.join(lost)}.", stacklevel=3)
