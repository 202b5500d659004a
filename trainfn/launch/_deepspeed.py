"""Turn a DeepSpeed configuration into a plan, field by field: the plan has its arithmetic, not its engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from trainfn._plan import Precision
from trainfn._text import nearest
from trainfn.launch._accelerate import Reading, shown
from trainfn.launch._fields import Fate, Field, is_true, text
from trainfn.launch._json import DeepSpeedJson

# The entry of DeepSpeed's JSON for each variable that Accelerate exports of its yaml.
_NAMES = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_optimization.stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "zero_optimization.offload_optimizer.nvme_path",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "zero_optimization.offload_param.nvme_path",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "moe_layer_cls_names",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}
_TUNING = "how DeepSpeed's own communication is cut up; the result is the same"
_YOURS = "is what you give the step"
_ENGINE = "Only the engine has it: `tfn.deepspeed.init(model, config=...)`."
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STATIC: list[tuple[str, Fate, str]] = [  # (pattern of names, fate, reason); the first that matches counts
    (r"^(train_batch_size|train_micro_batch_size_per_gpu)$", "ignored", f"the batch {_YOURS}"),
    (r"^zero3_init_flag$", "not needed", "`tfn.shard` splits a model that is on the meta device on the other ranks"),
    (r"stage3_gather_(16bit|fp16)_weights_on_model_save$", "not needed", "what is saved for users is full"),
    (r"^zero_optimization\.(offload_\w+)\.nvme_path$", "ignored", "nothing is on NVMe"),
    (
        r"^zero_optimization\.offload_\w+\.(pin_memory|buffer_\w+|fast_init|max_in_cpu|pipeline\w*)$",
        "not needed",
        _TUNING,
    ),
    (
        r"^zero_optimization\.(overlap_comm|contiguous_gradients|reduce_scatter|reduce_bucket_size|allgather_\w+|"
        r"sub_group_size|round_robin_gradients|stage3_\w+|ignore_unused_parameters|elastic_checkpoint|"
        r"load_from_fp32_weights|memory_efficient_linear|use_multi_rank_bucket_allreduce)$",
        "not needed",
        _TUNING,
    ),
    (r"^zero_(allow_untested_optimizer|force_ds_cpu_optimizer)$", "not needed", f"the optimizer {_YOURS}"),
    (r"^(prescale_gradients|gradient_predivide_factor)$", "not needed", "gradients are added up, and divided once"),
    (r"^communication_data_type$|^fp32_allreduce$", "not needed", "gradients are added up as float32"),
    (r"^(bf16|bfloat16)\.(?!enabled$)", "not needed", "parameters and sums of gradients are float32"),
    (r"^fp16\.(hysteresis|consecutive_hysteresis|min_loss_scale|auto_cast)", "ignored", "the scale is halved at once"),
    (
        r"^(steps_per_print|wall_clock_breakdown|dump_state|memory_breakdown|disable_allgather|flops_profiler|"
        r"comms_logger|monitor_config|tensorboard|wandb|csv_monitor|comet|checkpoint|aio|data_types|"
        r"use_data_before_expert_parallelism|seq_parallel_communication_data_type|graph_harvesting)(\.|$)",
        "ignored",
        "of DeepSpeed's engine only",
    ),
    (r"^activation_checkpointing(\.|$)", "ignored", "write `model.gradient_checkpointing_enable()`"),
    (
        r"^zero_optimization\.(zero_hpz_partition_size|zero_quantized_\w+|mics_\w+|zeropp_\w+|param_persistence\w*)$",
        "refused",
        f"a way of ZeRO++ or MiCS. {_ENGINE}",
    ),
    (
        r"^(moe\w*|pipeline|tensor_parallel|autotp\w*|sequence_parallel_size|sparse_attention|compression_training|"
        r"data_efficiency|curriculum_learning|hybrid_engine|elasticity|amp|progressive_layer_drop|autotuning|"
        r"eigenvalue|sparse_gradients|compile|quantize_training|nebula|weight_quantization)(\.|$)",
        "refused",
        _ENGINE,
    ),
]


class Entry(NamedTuple):
    """One value of the configuration, with its dotted name and the name that the user wrote."""

    name: str
    shown: str
    value: Any


class _Native:
    """The entries of a DeepSpeed configuration, and the plan that they make."""

    def __init__(self, reading: Reading, entries: list[Entry]) -> None:
        self.reading, self.entries = reading, entries
        self.values = {entry.name: entry.value for entry in entries}
        self.offload: list[str] = []

    def on(self, name: str) -> bool:
        return is_true(text(self.values.get(name, False)))

    def half(self) -> bool:
        """Whether anything is float16."""
        return self.on("fp16.enabled") or self.reading.rest.get("mixed_precision") == "fp16"

    def note(self, entry: Entry, fate: Fate, detail: str) -> None:
        self.reading.fields.append(Field(entry.shown, text(entry.value), fate, detail))

    def read(self) -> None:
        for entry in self.entries:
            handler = _HANDLERS.get(entry.name)
            if handler is not None:
                handler(self, entry)
            else:
                self.other(entry)
        if self.offload:
            self.reading.plan["offload"] = tuple(self.offload)

    def other(self, entry: Entry) -> None:
        if entry.name.startswith(("optimizer.", "scheduler.")):
            _chosen(self, entry)
            return
        found = next((row for row in _STATIC if re.search(row[0], entry.name)), None)
        harmless = text(entry.value) in ("false", "0", "None", "none", "auto") or (
            entry.name.endswith("_size") and entry.value == 1
        )
        if entry.name.startswith("fp16.") and not self.half():
            self.note(entry, "not needed", "nothing is float16")
        elif found is None:
            known = [name for name in (*_HANDLERS, *_NAMES.values(), "train_batch_size", "zero_optimization")]
            self.note(entry, "refused", f"the name is unknown.{nearest(entry.name, known)}")
        elif found[1] != "not needed" and harmless:
            self.note(entry, "not needed", "it asks for nothing")
        else:
            self.note(entry, found[1], found[2])


def read(reading: Reading, given: Mapping[str, Any] | None = None) -> None:
    """Map the exported DeepSpeed configuration, or a given one, onto the reading's plan."""
    entries = list(_entries(reading) if given is None else _named(DeepSpeedJson(given)))
    if given is None:
        _default_stage(reading, entries)
    _Native(reading, entries).read()


def configured(reading: Reading) -> dict[str, Any]:
    """Return the exported configuration as one JSON; a value of the file counts before Accelerate's own."""
    entries = list(_entries(reading))
    _default_stage(reading, entries)
    out = DeepSpeedJson({})
    for entry in entries:  # the entries of the file come last, and replace the others
        if out.get(entry.name) is None or entry.value not in ("auto", {}):
            out.put(entry.name, _value(entry.value))
    return out.content


def _value(written: Any) -> Any:
    """Return the value of a number or a flag that was exported as text."""
    try:
        return json.loads(written) if isinstance(written, str) else written
    except json.JSONDecodeError:
        return written


def _default_stage(reading: Reading, entries: list[Entry]) -> None:
    if not any(entry.name == "zero_optimization.stage" for entry in entries) and not reading.get(
        "ACCELERATE_DEEPSPEED_CONFIG_FILE"
    ):
        entries.append(Entry("zero_optimization.stage", "zero_stage", 2))  # Accelerate's default


def _entries(reading: Reading) -> Iterator[Entry]:
    file = reading.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file is not None:
        reading.note("ACCELERATE_DEEPSPEED_CONFIG_FILE", "mapped", "the fields below")
    for variable, name in _NAMES.items():
        if reading.env.get(variable) is not None and (reading.get(variable) or file is None):
            reading.seen.add(variable)
            yield Entry(name, shown(variable), reading.env[variable])
    if file is not None:
        call = f"settings(): deepspeed_config_file={file!r}"
        yield from _named(DeepSpeedJson.read(file, call))


def _named(config: DeepSpeedJson) -> Iterator[Entry]:
    return (Entry(name, name, value) for name, value in config.entries())


# --- the fields that a plan or a setting stands for ---------------------------------------------------------------


def _stage(native: _Native, entry: Entry) -> None:
    stage = int(entry.value) if text(entry.value) in ("0", "1", "2", "3") else None
    if stage is None:
        native.note(entry, "refused", "0, 1, 2 or 3.")
    elif stage == 0:
        native.reading.shard_by(replicate=-1)
        native.note(entry, "mapped", "Plan.replicated()")
    else:
        native.reading.shard_by(shard=-1, stage=stage)
        native.note(entry, "mapped", f"Plan.zero({stage})")


def _offload(what: str, stages: tuple[str, ...]) -> Callable[[_Native, Entry], None]:
    def handle(native: _Native, entry: Entry) -> None:
        device = text(entry.value).lower()
        if device in ("none", "false"):
            native.note(entry, "mapped", "Plan(offload=())")
        elif device == "nvme":
            native.note(entry, "refused", f'"cpu" or "none". {_ENGINE}')
        elif device not in ("cpu", "true"):
            native.note(entry, "refused", '"cpu" or "none".')
        elif text(native.values.get("zero_optimization.stage", 2)) not in stages:
            native.note(entry, "ignored", f"as DeepSpeed does: stage {' or '.join(stages)} offloads it")
        else:
            native.offload.append(what)
            native.note(entry, "mapped", f'Plan(offload=("{what}",))')

    return handle


def _half(name: str, dtype: torch.dtype) -> Callable[[_Native, Entry], None]:
    def handle(native: _Native, entry: Entry) -> None:
        launched = native.reading.rest.get("mixed_precision", "no")
        on = launched == name if entry.value == "auto" else is_true(text(entry.value))
        if on and launched not in ("no", name):
            native.note(entry, "refused", f"mixed_precision={launched} contradicts it. Leave one of them out.")
            return
        if on:
            native.reading.plan["precision"] = Precision(compute=dtype)
            native.reading.rest["mixed_precision"] = name
            if name == "fp16":
                native.reading.rest.setdefault("loss_scale", {})
        native.note(
            entry, "mapped", f"Plan(precision=Precision(compute={dtype}))" if on else "decided by mixed_precision"
        )

    return handle


def _scale(argument: str, convert: Callable[[Any], Any]) -> Callable[[_Native, Entry], None]:
    def handle(native: _Native, entry: Entry) -> None:
        if not native.half():
            native.note(entry, "not needed", "nothing is float16")
        else:
            scale = native.reading.rest.get("loss_scale") or {}
            native.reading.rest["loss_scale"] = {**scale, argument: convert(entry.value)}
            native.note(entry, "mapped", f"Launch.loss_scale: {argument}={convert(entry.value)}")

    return handle


def _loss_scale(native: _Native, entry: Entry) -> None:
    if entry.value in (0, "auto"):
        native.note(entry, "mapped", "a dynamic scale")
    else:
        native.note(entry, "refused", "the scale is dynamic. Write 0.")


def _number(argument: str, convert: Callable[[Any], Any], line: str) -> Callable[[_Native, Entry], None]:
    def handle(native: _Native, entry: Entry) -> None:
        if text(entry.value) in ("auto", "none", "None"):
            native.note(entry, "not needed", f"auto: it {_YOURS}")
            return
        number = convert(entry.value)
        native.reading.rest[argument] = number or None
        native.note(entry, "mapped", f"Launch.{argument}={number}: {line.format(number)}")

    return handle


def _chosen(native: _Native, entry: Entry) -> None:
    """Note an entry of an optimizer or a scheduler: the step has its own, so a number here would be lost."""
    section = entry.name.partition(".")[0]
    auto = all(
        value in ("auto", None, [])
        for name, value in native.values.items()
        if name.startswith(f"{section}.") and name not in (f"{section}.type", f"{section}.params.torch_adam")
    )
    if auto or entry.value == "auto":
        native.note(entry, "not needed", f"the {section} {_YOURS}")
    elif section == "optimizer":
        line = "`tfn.init(model, tfn.optim.adamw(3e-5))`, and `auto` here."
        native.note(entry, "refused", f"the optimizer {_YOURS}: {line}")
    else:
        line = "`tfn.optim.adamw(tfn.schedules.linear(...))`, and `auto` here."
        native.note(entry, "refused", f"a schedule is a function that the optimizer is given: {line}")


_HANDLERS: dict[str, Callable[[_Native, Entry], None]] = {
    "zero_optimization.stage": _stage,
    "zero_optimization.offload_optimizer.device": _offload("opt_state", ("1", "2", "3")),
    "zero_optimization.cpu_offload": _offload("opt_state", ("1", "2", "3")),
    "zero_optimization.offload_param.device": _offload("params", ("3",)),
    "bf16.enabled": _half("bf16", torch.bfloat16),
    "bfloat16.enabled": _half("bf16", torch.bfloat16),
    "fp16.enabled": _half("fp16", torch.float16),
    "fp16.loss_scale": _loss_scale,
    "fp16.initial_scale_power": _scale("initial", lambda power: 2.0 ** int(power)),
    "fp16.loss_scale_window": _scale("growth_interval", int),
    "gradient_accumulation_steps": _number("accumulate", int, "`tfn.train_step(accumulate={})`"),
    "gradient_clipping": _number("clip", float, "`tfn.optim.clip_by_global_norm({})`"),
}
