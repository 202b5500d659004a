"""The `accelerate.Accelerator` of a Trainer, made as transformers makes it, for the code of subclasses.

The Trainer itself never trains with it: the step sums the gradients of all ranks, and its plan shards the state.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Generator
from typing import TYPE_CHECKING, cast

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import nn

from trainfn.hf._types import TrainerLike, Values

if TYPE_CHECKING:
    from transformers.trainer_pt_utils import AcceleratorConfig

    from trainfn.hf._arguments._training import TrainingArguments

# A launcher sets these for Accelerate's own engines, which would wrap the model or ask for their packages.
_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
_VARIABLES = (*(f"ACCELERATE_USE_{engine}" for engine in _ENGINES), "ACCELERATE_DYNAMO_BACKEND")
_MADE_ALONE: list[bool] = []  # not empty if `state_alone` made the state


class RankAccelerator(accelerate.Accelerator):
    """An Accelerator of several ranks that moves a model to its device, and does not wrap it.

    A `DistributedDataParallel` of its own would sum gradients that the step sums.
    """

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Return the model on its device."""
        return super().prepare_model(model, device_placement, evaluation_mode=True)


def create(trainer: TrainerLike) -> None:
    """Make ``trainer.accelerator``, and the attributes that transformers makes with it."""
    args = trainer.args
    config: Values = cast("AcceleratorConfig", args.accelerator_config).to_dict()
    names = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking")
    # Without a seed, Accelerate takes torch's global one, which transformers sets to `args.seed`.
    seed: Values = {"data_seed": args.seed if args.data_seed is None else args.data_seed}
    data = DataLoaderConfiguration(**{name: config[name] for name in names}, **seed)
    options = trainer._build_accelerator_args(
        dataloader_config=data,
        fsdp_plugin=None,
        gradient_accumulation_plugin=_accumulation(trainer, config.get("gradient_accumulation_kwargs") or {}),
    )
    kind = accelerate.Accelerator if trainer._trainfn.world.plan is None else RankAccelerator
    with without(*_VARIABLES):
        _forget_another(args, str(options.get("mixed_precision") or "no"))
        trainer.accelerator = kind(**options)
    gathered, as_objects = trainer.accelerator.gather_for_metrics, args.eval_use_gather_object
    trainer.gather_function = functools.partial(gathered, use_gather_object=as_objects)
    # Whether an engine of Accelerate wraps the model. None does: the plan of the step shards it.
    trainer.is_deepspeed_enabled = trainer.is_fsdp_enabled = False


def _accumulation(trainer: TrainerLike, given: Values) -> GradientAccumulationPlugin:
    """The plugin that accumulates nothing, because the step does; ``num_steps`` is for the step."""
    args = trainer.args
    number = given.get("num_steps", args.gradient_accumulation_steps)
    if args.gradient_accumulation_steps not in (1, number):
        raise ValueError(
            f"`{type(args).__name__}(gradient_accumulation_steps={args.gradient_accumulation_steps})` can't work: The"
            f" `AcceleratorConfig`'s `num_steps` is set but is {number}. Leave `num_steps` out."
        )
    args.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = number
    options: Values = {**given, "num_steps": 1}
    return GradientAccumulationPlugin(**options)


def options_of(trainer: TrainerLike, given: Values) -> Values:
    """Return the keyword arguments of the Accelerator."""
    args = trainer.args
    ddp: Values = {
        name: value
        for name, value in (
            ("find_unused_parameters", args.ddp_find_unused_parameters),
            ("bucket_cap_mb", args.ddp_bucket_cap_mb),
            ("broadcast_buffers", args.ddp_broadcast_buffers),
        )
        if value is not None
    }
    handlers = [DistributedDataParallelKwargs(**ddp)]
    return {"mixed_precision": args.mixed_precision, "deepspeed_plugin": None, "kwargs_handlers": handlers, **given}


def _forget_another(args: TrainingArguments, precision: str) -> None:
    """Reset the part of Accelerate's state that another Trainer of this process made otherwise."""
    assert args.distributed_state is not None
    held = AcceleratorState._shared_state
    if held and (
        held.get("device") != args.distributed_state.device
        or held.get("distributed_type") != args.distributed_state.distributed_type
        or held.get("_mixed_precision") != precision
    ):
        AcceleratorState._reset_state()


def state_alone(device: torch.device) -> PartialState:
    """Return Accelerate's state of one process on a device, which is made unless it exists.

    A launcher's variables are hidden: for one process Accelerate would begin a process group.
    """
    held = PartialState._shared_state
    if held and held.get("device", device).type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    if not held:
        _MADE_ALONE.append(True)
    with without("LOCAL_RANK", "RANK", "WORLD_SIZE", *_VARIABLES):
        return PartialState(cpu=device.type == "cpu")


def forget_alone() -> None:
    """Reset the state that `state_alone` made, before the processes meet.

    A notebook makes its arguments in one process, and forks the ranks afterwards.
    """
    if _MADE_ALONE:
        _MADE_ALONE.clear()
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def without(*variables: str) -> Generator[None]:
    """Hide environment variables in a block."""
    before = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
