"""Every field of `TrainingArguments`: its reader, or the reason why it is refused or changes nothing."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import transformers
from transformers.trainer_pt_utils import AcceleratorConfig

from trainfn.hf._optim._named import check_optimizer, parse_optim_args

Arguments: TypeAlias = transformers.TrainingArguments


class Refused(NamedTuple):
    """Values of a field that can't be honoured.

    Attributes:
        field: The name of the field.
        bad: ``(value, args) -> bool``, True for the values that are refused.
        why: The reason.
        write: The text that says what to write instead.
    """

    field: str
    bad: Callable[[Any, Arguments], bool]
    why: str
    write: str


def check_supported(args: Arguments) -> None:
    """Raise for arguments that trainfn can't honour, and warn once of arguments that change nothing here.

    Raises:
        ValueError: If a field asks for something that this library doesn't have, with what to write instead.

    >>> from trainfn.hf import TrainingArguments
    >>> check_supported(TrainingArguments(use_cpu=True))
    """
    for rule in REFUSED:
        if rule.field not in type(args).__dataclass_fields__:  # of a newer or an older version of transformers
            continue
        value = getattr(args, rule.field)
        if rule.bad(value, args):
            raise ValueError(f"`{type(args).__name__}({rule.field}={value!r})` can't work: {rule.why}. {rule.write}.")
    name = str(getattr(args.optim, "value", args.optim))
    check_optimizer(name)
    parse_optim_args(name, args.optim_args)
    if name.startswith("galore_adamw_8bit"):
        warnings.warn(
            f"`{type(args).__name__}(optim={name!r})`: the moments are not quantized here, and take four times the"
            f" memory of 8 bits. Write `optim={name.replace('_8bit', '')!r}`, whose name says so.",
            UserWarning,
            stacklevel=2,
        )
    idle = [name for name in IGNORED if _is_set(args, name)]
    if idle:
        listed = "; ".join(f"`{name}` ({IGNORED[name]})" for name in idle)
        warnings.warn(
            f"`{type(args).__name__}`: these arguments change nothing here: {listed}. Leave them out.",
            UserWarning,
            stacklevel=2,
        )


def _is_set(args: Arguments, name: str) -> bool:
    field = type(args).__dataclass_fields__.get(name)
    if field is None:  # of the sequence-to-sequence arguments, or of another version of transformers
        return False
    value = getattr(args, name)
    if isinstance(value, AcceleratorConfig):  # `split_batches` and `num_steps` are used
        more = (value.gradient_accumulation_kwargs or {}).keys() - {"num_steps"}
        rest = dataclasses.replace(value, split_batches=False, gradient_accumulation_kwargs=None)
        if getattr(args, "data_order", None) == "transformers":
            rest = dataclasses.replace(rest, even_batches=True)  # this order reads it
        return bool(more) or rest != AcceleratorConfig()
    return value != (field.default if field.default_factory is dataclasses.MISSING else field.default_factory())


def _truthy(value: object, args: Arguments) -> bool:
    return bool(value)


def _on_cpu(value: object, args: Arguments) -> bool:
    return bool(value) and args.device.type != "cuda"


def _configured(value: object, args: Arguments) -> bool:
    return isinstance(value, AcceleratorConfig) and bool(value.use_configured_state)


RECOMPUTING = {"use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"} | {
    "every_n_layers",
    "offload",
}
"""The keys of `gradient_checkpointing_kwargs`: those of `torch.utils.checkpoint`, and those of transformers."""

REFUSED: tuple[Refused, ...] = (
    Refused(
        "deepspeed",
        lambda value, args: bool(value) and (bool(args.fsdp) or args.parallelism_config is not None),
        "`fsdp` or `parallelism_config` is given too, and each of them says how the state is split",
        "Leave the others out, or `deepspeed`",
    ),
    Refused(
        "fsdp_config",
        lambda value, args: bool(value) and not args.fsdp,
        "it says how FSDP splits, and `fsdp` is not given",
        "Write `fsdp=True` beside it, or leave `fsdp_config` out",
    ),
    Refused(
        "accelerator_config",
        _configured,
        "`use_configured_state` takes an Accelerator of yours, and the Trainer makes its own",
        "Leave the key out; an override of `create_accelerator_and_postprocess` may set `self.accelerator`",
    ),
    Refused(
        "tf32",
        _on_cpu,
        "TF32 is a mode of NVIDIA's matrix units, and this device is not an NVIDIA GPU",
        "Leave `tf32` out",
    ),
    Refused(
        "optim_target_modules",
        lambda value, args: value is not None and not any(name in args.optim for name in ("galore", "apollo")),
        "it chooses the layers of GaLore, and this is another `optim`",
        "Leave `optim_target_modules` out, or write `optim='galore_adamw'`; a model's `requires_grad_(False)` freezes"
        " what should not train",
    ),
    Refused(
        "gradient_checkpointing_kwargs",
        lambda value, _: isinstance(value, dict) and not value.keys() <= RECOMPUTING,
        "it has keys that neither torch's checkpoint nor transformers knows",
        f"Write some of {', '.join(sorted(RECOMPUTING))}; `{{'every_n_layers': 2}}` recomputes every second layer",
    ),
    Refused(
        "gradient_checkpointing_kwargs",
        lambda value, args: isinstance(value, dict) and bool(value.get("offload")) and args.device.type == "cpu",
        "activations on a CPU are on the host already",
        "Leave `offload` out",
    ),
    Refused(
        "debug",
        _truthy,
        "its hooks on every layer can't be part of a compiled step",
        "Leave `debug` out; `trainfn.replay` repeats a part of a run, to look at every step",
    ),
    Refused(
        "skip_memory_metrics",
        lambda value, _: not value,
        "trainfn doesn't measure the memory of the process",
        "Leave it out; `torch.cuda.max_memory_allocated()` says how much a GPU has used",
    ),
    Refused(
        "torch_empty_cache_steps",
        lambda value, _: value is not None,
        "a step that is compiled whole plans its memory, and emptying the cache in between would undo that",
        "Leave `torch_empty_cache_steps` out; `gradient_accumulation_steps` and `activation_checkpointing` save memory",
    ),
    Refused(
        "data_order",
        lambda value, args: value not in ("trainfn", "transformers"),
        "there are two orders of the training rows",
        "Write `data_order='transformers'`, or leave it out",
    ),
    Refused(
        "data_order",
        lambda value, args: (
            value == "transformers"
            and str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)) == "group_by_length"
        ),
        "the order of grouped rows there follows from the global generator, and not from the seed alone",
        "Leave `train_sampling_strategy='group_by_length'` out while runs are compared",
    ),
    Refused(
        "train_sampling_strategy",
        lambda value, _: value == "batch_rebalance",
        "it moves rows between processes so that each has as many tokens, and here the rows of an update are divided in"
        " their order",
        "Write `train_sampling_strategy='group_by_length'`",
    ),
)

_DDP = "there is no DistributedDataParallel: the step itself sums the gradients of all ranks"
IGNORED: dict[str, str] = {
    "average_tokens_across_devices": "losses are always averaged over all tokens of all devices",
    "ddp_find_unused_parameters": _DDP,
    "ddp_bucket_cap_mb": _DDP,
    "ddp_broadcast_buffers": _DDP,
    "ddp_static_graph": _DDP,
    "eval_use_gather_object": "outputs of any shape are gathered",
    "accelerator_config": "only `split_batches` and `num_steps` are used; no row comes twice, and ranks read their own",
    "dataloader_persistent_workers": "trainfn.data keeps its workers as long as it needs them",
    "dataloader_multiprocessing_context": "trainfn.data starts its workers in its own way",
    "dataloader_in_order": "the order of the rows is a function of the seed, not of the workers' speed",
    "trackio_static_space_id": "no snapshot of a Space is made; `trackio.freeze(space_id)` after `train()` makes one",
    "sortish_sampler": "neither trainfn nor transformers reads it; `train_sampling_strategy` groups rows by length",
}

# The file under `hf/` that reads each field; after "as", the name under which it reads it, where that differs.
_READ: dict[str, tuple[str, ...]] = {
    "_run/_loop.py": (
        *("full_determinism", "auto_find_batch_size", "enable_jit_checkpoint", "fp16", "use_liger_kernel"),
        *("liger_kernel_config", "torch_compile", "torch_compile_backend", "torch_compile_mode", "eval_on_start"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "neftune_noise_alpha"),
        "logging_nan_inf_filter",
    ),
    "_run/_loop.py as matmul_precision": ("tf32",),
    "_run/_data.py": (*("num_train_epochs", "max_steps", "gradient_accumulation_steps"),),
    "_run/_loaders.py": (
        *("dataloader_num_workers", "dataloader_prefetch_factor", "remove_unused_columns", "train_sampling_strategy"),
        *("data_seed", "dataloader_drop_last", "length_column_name", "data_order"),
    ),
    "_run/_loaders.py as train_batch_size": ("per_device_train_batch_size",),
    "_run/_loaders.py as eval_batch_size": ("per_device_eval_batch_size",),
    "_run/_setup.py": ("seed", "label_smoothing_factor", "use_cache"),
    "_run/_setup.py as device": ("use_cpu",),
    "_step/_loss.py": ("bf16",),
    "_step/_modes.py": ("bf16_full_eval", "fp16_full_eval"),
    "_installed.py": ("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    "_optim/_named.py": (
        "learning_rate",
        *("optim", "optim_args", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"),
    ),
    "_optim/_resolve.py": ("weight_decay",),
    "_optim/_targets.py": ("optim_target_modules",),
    "_optim/_schedules.py": ("lr_scheduler_type", "lr_scheduler_kwargs"),
    "_optim/_schedules.py as get_warmup_steps": ("warmup_steps",),
    "_callbacks/_events.py": ("disable_tqdm",),
    "_callbacks/_events.py as DefaultFlowCallback": (
        *("logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "eval_delay"),
        "save_steps",
    ),
    "_reporting/_logs.py": ("include_num_input_tokens_seen",),
    "_reporting/_logs.py as get_process_log_level": ("log_level", "log_level_replica", "log_on_each_node"),
    "_reporting/_trackers.py": (
        *("output_dir", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
    ),
    "_reporting/_methods.py": ("push_to_hub",),
    "_reporting/_hub.py": (
        *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    ),
    "_evaluation/_evaluate.py": (
        *("prediction_loss_only", "eval_do_concat_batches", "eval_accumulation_steps", "include_for_metrics"),
        "batch_eval_metrics",
    ),
    "_evaluation/_prediction.py": ("label_names",),
    "_seq2seq.py": (*("predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config"),),
    "_checkpoints/_folders.py": (
        *("save_strategy", "save_total_limit", "save_only_model", "load_best_model_at_end", "metric_for_best_model"),
        *("greater_is_better", "ignore_data_skip"),
    ),
    "_checkpoints/_methods.py": ("restore_callback_states_from_checkpoint",),
    "_parallel/_layout.py": (
        *("fsdp", "deepspeed", "parallelism_config", "ddp_backend", "ddp_timeout", "save_on_each_node"),
    ),
    "_arguments/_training.py": ("legacy_arguments",),
}
USED: dict[str, str] = {
    **{field: file for file, fields in _READ.items() for field in fields},
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"), "nothing here: scripts read it"
    ),
    "dataloader_pin_memory": "nothing: no memory is pinned, so False is what happens, and True only asks for speed",
}
"""The reader of each field that works."""
