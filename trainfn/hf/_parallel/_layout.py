"""The plan of a run, from the launcher's configuration and the training arguments, which must agree."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator
from typing import Any

import torch
from torch import distributed

import trainfn as tfn
from trainfn import launch as launchers
from trainfn.hf._parallel import _deepspeed
from trainfn.hf._parallel._accelerator import forget_alone
from trainfn.hf._parallel._world import ALONE, World

_REPORTED: list[_deepspeed.Configured] = []  # those that another Trainer of this process has printed already


def world_of(args: Any, model: Any) -> World:
    """Bring the processes together, and return them with their plan; one process alone has no plan.

    Raises:
        ValueError: If the arguments can't be honoured, or contradict the launcher's configuration.
        RuntimeError: If the processes don't find each other.
    """
    # Read first, so that an error is raised on every rank before any rank waits for the others.
    deepspeed = _deepspeed.configuration(args)
    asked = bool(args.fsdp) or args.parallelism_config is not None or deepspeed is not None
    if args.world_size == 1 and not asked and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return ALONE
    launch = joined(args, deepspeed)
    _take_precision(args, launch)
    own = _of_arguments(args, _nodes(launch.world))
    plan = launch.plan if own is None else _consistent(own, launch)
    # The loss computes in 16 bits by `autocast`, as in one process. Parameters cast by the plan would give layer norms,
    # which autocast keeps in float32, rounded weights, and so other numbers.
    precision = dataclasses.replace(plan.precision, compute=None)
    rules = plan.rules if plan.tensor == 1 else (*plan.rules, *launchers.tensor_rules(model))
    plan = dataclasses.replace(plan, precision=precision, rules=rules)
    plan.shape(launch.world)
    config = args.fsdp_config or {}
    if launch.world > 1:
        _check_possible(args, launch)
    return World(
        plan=plan if launch.world > 1 else None,
        ranks=launchers.ranks(timeout=float(args.ddp_timeout)),
        compile=launch.compile,
        loss_scale=launch.loss_scale or {},
        checkpointing=launch.checkpointing or _true(config.get("activation_checkpointing")),
        sharded_files=launch.state_dict == "sharded"
        or str(config.get("state_dict_type", "")).upper() == "SHARDED_STATE_DICT",
    )


def meet(args: Any) -> None:
    """Bring the processes together."""
    if args.world_size > 1:
        forget_alone()
    with _on_cpu(args):
        device = launchers.join(timeout=float(args.ddp_timeout))
    backend = args.ddp_backend
    if backend is not None and args.world_size > 1 and backend not in _backends(device):
        raise ValueError(
            f"`{type(args).__name__}(ddp_backend={backend!r})` can't work: on {device.type}, the processes communicate"
            f" over {' and '.join(_backends(device))}. Leave `ddp_backend` out."
        )
    if args.world_size > 1:
        from accelerate import PartialState

        args.distributed_state = PartialState()


def joined(args: Any, deepspeed: _deepspeed.Configured | None) -> Any:
    """Bring the processes together; return the settings of the launcher or of a DeepSpeed configuration."""
    meet(args)
    given: dict[str, Any] = {}
    if deepspeed is not None:
        given = {"config": deepspeed.rest, "deepspeed": "native", "quiet": deepspeed in _REPORTED}
        if deepspeed not in _REPORTED and args.process_index == 0:
            _deepspeed.report(deepspeed, args)
        _REPORTED.append(deepspeed)
    with _on_cpu(args):
        return launchers.settings(timeout=float(args.ddp_timeout), **given)


@contextlib.contextmanager
def _on_cpu(args: Any) -> Generator[None]:
    """Let processes meet on CPUs in this block, if ``use_cpu=True``: `trainfn.launch` reads Accelerate's variable."""
    name, before = "ACCELERATE_USE_CPU", os.environ.get("ACCELERATE_USE_CPU")
    if args.device.type == "cpu" and args.world_size > 1:
        os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _backends(device: torch.device) -> tuple[str, ...]:
    return ("gloo",) if device.type == "cpu" else ("nccl", "gloo", "cpu:gloo,cuda:nccl")


def _nodes(world: int) -> int:
    return max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))


# --- the plan of the arguments ------------------------------------------------------------------------------------


def _of_arguments(args: Any, nodes: int) -> tfn.Plan | None:
    """Return the plan of ``fsdp``, ``fsdp_config`` and ``parallelism_config``; None without them."""
    plan = _fsdp(args, nodes) if args.fsdp else None
    parallel = args.parallelism_config
    if parallel is None:
        return plan
    for name in ("cp_size", "sp_size"):
        if (getattr(parallel, name, None) or 1) != 1:
            raise ValueError(
                f"`{type(args).__name__}(parallelism_config=ParallelismConfig({name}={getattr(parallel, name)}))`"
                " can't work: trainfn does not split a sequence over ranks. Write `dp_shard_size` in its place."
            )
    axes = {"replicate": "dp_replicate_size", "shard": "dp_shard_size", "tensor": "tp_size"}
    sizes = {axis: getattr(parallel, name) or 1 for axis, name in axes.items()}
    plan = tfn.Plan() if plan is None else plan
    return dataclasses.replace(plan, **sizes, stage=plan.stage or (3 if sizes["shard"] != 1 else 0))


def _fsdp(args: Any, nodes: int) -> tfn.Plan:
    config = args.fsdp_config or {}
    if config.get("xla"):
        raise ValueError(
            f"`{type(args).__name__}(fsdp_config={{'xla': True}})` can't work: FSDP of trainfn does not run on XLA."
            " Leave `xla` out."
        )
    given = config.get("reshard_after_forward", True)  # a flag of FSDP 2, or a strategy of FSDP 1
    try:
        plan = launchers.fsdp_plan(str(given), nodes)
    except ValueError:
        plan = tfn.Plan.fsdp(reshard=_true(given))
    offload = ("opt_state", "params") if _true(config.get("cpu_offload")) else ()
    return dataclasses.replace(plan, offload=offload)


def _true(value: Any) -> bool:
    return str(value).lower() in ("1", "true", "yes", "on")


def _consistent(own: tfn.Plan, launch: Any) -> tfn.Plan:
    """Return the plan of the arguments; raise if the launcher was configured with another one."""
    theirs, world = launch.plan, launch.world
    switches = (f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG"))
    configured = any(_true(os.environ.get(switch)) for switch in switches)
    if configured and _layout(own, world) != _layout(theirs, world):
        raise ValueError(
            f"the training arguments ask for {_layout(own, world)}, and the configuration of `accelerate launch` for"
            f" {_layout(theirs, world)}, but one run has one plan. Leave `fsdp`, `fsdp_config` and `parallelism_config`"
            " out of the training arguments, or start the script by torchrun."
        )
    return dataclasses.replace(own, precision=theirs.precision, rules=theirs.rules)


def _layout(plan: tfn.Plan, world: int) -> dict[str, Any]:
    return {**plan.shape(world), "stage": plan.stage, "reshard": plan.reshard, "offload": plan.offload}


def _take_precision(args: Any, launch: Any) -> None:
    """Take the mixed precision of the launcher, if the arguments do not name one."""
    mine = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    theirs = launch.mixed_precision
    if theirs == "no" or theirs == mine:
        return
    if mine != "no":
        raise ValueError(
            f"`{type(args).__name__}({mine}=True)` can't work: `accelerate launch` was configured with mixed_precision:"
            f" {theirs}. Leave `{mine}` out, or write `{theirs}=True`."
        )
    setattr(args, theirs, True)
    args.mixed_precision = theirs


def _check_possible(args: Any, launch: Any) -> None:
    """Raise if an argument can't work on several processes."""
    call = type(args).__name__
    if args.auto_find_batch_size:
        raise ValueError(
            f"`{call}(auto_find_batch_size=True)` can't work on {launch.world} processes: if one runs out of memory,"
            " the others wait for it without end. Write `gradient_accumulation_steps=2` and half the"
            " `per_device_train_batch_size`: the update is the same."
        )
    if args.save_on_each_node and _nodes(launch.world) > 1:
        raise ValueError(
            f"`{call}(save_on_each_node=True)` can't work: the ranks write one checkpoint together, on a disk that all"
            " machines share. Leave `save_on_each_node` out."
        )
    split = getattr(args.accelerator_config, "split_batches", False)
    if split:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            size, parts = getattr(args, name), launch.plan.data_size
            if size % parts:
                raise ValueError(
                    f"`{call}({name}={size}, accelerator_config={{'split_batches': True}})` can't work: {size} rows do"
                    f" not divide into {parts} equal parts. Write a multiple of {parts}, or leave `split_batches` out."
                )


def is_joined() -> bool:
    """Whether the processes have found each other."""
    return distributed.is_available() and distributed.is_initialized()
