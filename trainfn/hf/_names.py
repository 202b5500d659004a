"""The names of transformers' Trainer that a subclass may override, and the line to write for each of the others."""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import NoReturn, TypeVar

from trainfn.errors import nearest

T = TypeVar("T")
_CHECKED: weakref.WeakSet[type] = weakref.WeakSet()  # the classes of which `check_overrides` has warned
_RANKS = "Pass `TrainingArguments(fsdp=...)` or `parallelism_config=...`: the step sums the gradients of all ranks"
_LOOP = "Override `train`, or write a callback with `on_step_begin`, `on_step_end` or `on_epoch_end`"
_GRADIENTS = (
    "Write `TrainingArguments(max_grad_norm=...)`, or return a chain of `trainfn.optim` from `create_optimizer`"
)
_SCALE = "Override `_save_optimizer_and_scheduler` or `_load_optimizer_and_scheduler`: the loss scale is in the state"
_SEQUENCES = "Write `parallelism_config=ParallelismConfig(dp_shard_size=...)`: no sequence is split over ranks"

NOT_CALLED: dict[str, str] = {
    "_inner_training_loop": _LOOP,
    "_run_epoch": _LOOP,
    "_init_training_state": _LOOP,
    "_prepare_for_training": _LOOP,
    "set_initial_training_values": "Write `TrainingArguments(max_steps=...)` or `num_train_epochs=...`",
    "_clip_grad_norm": _GRADIENTS,
    "_get_grad_norm": "Override `log`, and read or change `logs['grad_norm']`",
    "_defer_fsdp_gradient_reduction": _RANKS,
    "_sync_replicated_trainable_parameters": _RANKS,
    "_has_mixed_mesh_grads": _RANKS,
    "_mixed_mesh_grad_norm": _RANKS,
    "_prepare_context_parallel_inputs": _SEQUENCES,
    "_wrap_model": "Pass the wrapped model, `Trainer(wrapped, args)`: nothing is wrapped here",
    "_update_auto_batch_size": "Leave it out: `auto_find_batch_size=True` cuts micro-batches, and the batch size stays",
    "_save_scaler": _SCALE,
    "_load_scaler": _SCALE,
    "_issue_warnings_after_load": "Override `_load_from_checkpoint`: weights that do not fit the model are an error",
    "_tune_save_checkpoint": "Override `_save_checkpoint`: no search runs with Ray Tune here",
    # of older releases, in which these were methods
    "_nested_gather": "Write `self.accelerator.gather_for_metrics(tensors)`",
    "_pad_across_processes": "Write `self.accelerator.pad_across_processes(tensor)`",
    "_activate_neftune": "Write `TrainingArguments(neftune_noise_alpha=5.0)`",
    "_deactivate_neftune": "Write `TrainingArguments(neftune_noise_alpha=5.0)`: the run's end removes the noise",
    "_rotate_checkpoints": "Write `TrainingArguments(save_total_limit=...)`",
    "_sorted_checkpoints": "Write `transformers.trainer_utils.sort_checkpoints(output_dir)`",
    "propagate_args_to_deepspeed": "Write `TrainingArguments(deepspeed=...)`: its `auto` values are filled in",
    "torch_jit_model_eval": "Write `TrainingArguments(torch_compile=True)`",
    "ipex_optimize_model": "Leave it out: Intel's extension has become part of torch",
    "prediction_loop": "Override `evaluation_loop`",
    "_add_sm_patterns_to_gitignore": "Leave it out: SageMaker's patterns are not written",
}
"""The methods that are never called here, each with the line to write instead."""


class Missing:
    """A name of transformers' Trainer that a Trainer here lacks; reading it raises the remedy.

    A descriptor, and not only `Trainer.__getattr__`, because `super().name` asks the class.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: object, kind: type) -> NoReturn:
        raise AttributeError(f"`{kind.__name__}.{self.name}` does not exist here. {NOT_CALLED[self.name]}.")


def without_missing(cls: type[T]) -> type[T]:
    """Give a class the remedies of the names that it lacks; a decorator."""
    for name in NOT_CALLED:
        if not hasattr(cls, name):
            setattr(cls, name, Missing(name))
    return cls


def exists(cls: type, name: str) -> bool:
    """Whether a class has a name, and not only its remedy."""
    return not isinstance(inspect.getattr_static(cls, name, Missing(name)), Missing)


def overridden(owner: object, name: str) -> bool:
    """Whether a method of an object, or of a class, is not this package's own."""
    found = inspect.getattr_static(owner, name)
    function = getattr(found, "__func__", getattr(found, "fget", found))
    # `functools.wraps` copies `__module__` from the method that a patch replaces, and not the globals.
    module = getattr(function, "__globals__", {}).get("__name__", getattr(function, "__module__", ""))
    return not str(module).startswith("trainfn.hf.")


def check_overrides(cls: type, base: type) -> None:
    """Warn of methods of a new subclass that are never called: names of `NOT_CALLED`, and misspelt ones."""
    known = [name for name in dir(base) if not name.startswith("__")]
    for kind in cls.__mro__:
        if issubclass(base, kind) or kind in _CHECKED or kind.__module__.startswith("trainfn.hf."):
            continue
        _CHECKED.add(kind)
        for name, value in vars(kind).items():
            if name in NOT_CALLED and not isinstance(value, Missing):
                warnings.warn(f"`{kind.__name__}.{name}` is never called here. {NOT_CALLED[name]}.", stacklevel=3)
            elif not name.startswith("__") and name not in known and callable(value) and kind is cls:
                near = [other for other in known if abs(len(other) - len(name)) <= 1]
                if hint := nearest(name, near, "Did you mean to override `{}`?", likeness=0.9):
                    warnings.warn(f"{cls.__name__}.{name} is never called. {hint}", stacklevel=3)


def absent(owner: object, name: str) -> AttributeError:
    """Return the error for an attribute that a Trainer lacks, with the nearest name."""
    near = nearest(
        name, [each for each in dir(type(owner)) if exists(type(owner), each)], "Did you mean `{}`?", likeness=0.8
    )
    remedy = near or f"Set it in `__init__`: `self.{name} = ...`."
    return AttributeError(f"`{type(owner).__name__}` has no attribute {name!r}. {remedy}", name=name, obj=owner)


def table(ours: type, theirs: type) -> dict[str, tuple[str, str]]:
    """Return, for each method of transformers' Trainer, what happens to an override, and the line to write instead.

    >>> import transformers
    >>> from trainfn.hf import Trainer
    >>> table(Trainer, transformers.Trainer)["evaluate"]
    ('called', '')
    """
    rows: dict[str, tuple[str, str]] = {}
    for name in sorted({name for name in dir(theirs) if not name.startswith("__")} | set(NOT_CALLED)):
        if name in NOT_CALLED:
            there = "there, but an override is not called" if exists(ours, name) else "not there"
            rows[name] = there, NOT_CALLED[name]
        else:
            rows[name] = ("called" if exists(ours, name) else "unknown"), ""
    return rows
