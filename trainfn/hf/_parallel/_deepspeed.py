"""A DeepSpeed configuration is completed from the training arguments and checked against them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainfn import launch as launchers
from trainfn.launch import DeepSpeedJson

Config = dict[str, Any]

_SECTIONS = ("optimizer", "scheduler")
_NUMBERS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
_ADAM = ("adamw_torch", "adamw_torch_fused")
# The values of Adam's other parameters that AdamW of trainfn can honour; None allows any.
_ADAM_PARAMS = {"torch_adam": None, "adam_w_mode": True, "bias_correction": True, "amsgrad": False}
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_RATES = ("warmup_min_lr", "warmup_max_lr")
_SCHEDULE_PARAMS = {
    "WarmupLR": ("warmup_num_steps", *_RATES),
    "WarmupDecayLR": ("warmup_num_steps", "total_num_steps", *_RATES),
    "WarmupCosineLR": ("warmup_num_steps", "total_num_steps", "warmup_min_ratio", "cos_min_ratio"),
}
_AUTO = '`"auto"` there'


class Wanted(NamedTuple):
    """The value that the arguments give an entry.

    Attributes:
        value: The value; None if the arguments leave it open.
        arguments: The arguments, as the user wrote them.
        write: The line to write for another value.
    """

    value: Any
    arguments: str
    write: str


class Configured(NamedTuple):
    """A configuration without a contradiction to the arguments.

    Attributes:
        rest: The entries that no argument has, for `trainfn.launch.settings`.
        filled: The entries that the arguments have, with their values.
        notes: The lines to print about it.
    """

    rest: Config
    filled: dict[str, Any]
    notes: list[str]


def configuration(args: Any) -> Configured | None:
    """Return the configuration of ``deepspeed=`` and of the launcher; None without one.

    An ``"auto"`` takes the value of the argument, as in transformers. A number must equal it.

    Raises:
        ValueError: If the configuration and the arguments differ, or name different optimizers or schedules.
    """
    own = None if not args.deepspeed else DeepSpeedJson.read(args.deepspeed, f"{_source(args)} can't work")
    theirs = launchers.deepspeed_config()
    if own is None and theirs is None:
        return None
    config = _merged(own or DeepSpeedJson({}), DeepSpeedJson(theirs or {}))
    notes = [] if theirs is None else _take(args)
    wanted, filled, wrong = _wanted(args), {}, _types(args, config)
    for name, value in config.entries():
        want = wanted.get(name)
        if want is None or value is None or str(value).lower() == "none":
            continue
        if value != "auto" and not _same(value, want.value):
            wrong.append(f"{name}={value!r}, {want.arguments}: write {want.write.format(value)}")
        elif want.value is not None:
            filled[name] = want.value
    if wrong:
        raise ValueError(
            f"{_source(args)} can't work: the configuration and the training arguments differ."
            f' {"; ".join(wrong)}. An entry that says "auto" takes the value of the argument.'
        )
    return Configured(_rest(config, filled), filled, notes + _differences(args, config))


def report(found: Configured, args: Any) -> None:
    """Print how the configuration is used; `trainfn.launch.settings` prints the table of its fields."""
    print(
        f"{_source(args)}: this run is native, with a plan of the same ZeRO stage. DeepSpeed's own engine is"
        " `tfn.deepspeed.init(model)`: see the guide `deepspeed.md`."
    )
    filled = ", ".join(f"{name}={value}" for name, value in found.filled.items())
    for line in ([f"from the training arguments: {filled}"] if filled else []) + found.notes:
        print(f"  {line}")


# --- reading ------------------------------------------------------------------------------------------------------


def _source(args: Any) -> str:
    if not args.deepspeed:
        return "the DeepSpeed configuration of `accelerate launch`"
    shown = "{...}" if isinstance(args.deepspeed, Mapping) else repr(args.deepspeed)
    return f"`{type(args).__name__}(deepspeed={shown})`"


def _merged(own: DeepSpeedJson, theirs: DeepSpeedJson) -> DeepSpeedJson:
    """Merge both configurations; an entry in both must have the same value.

    Raises:
        ValueError: If two values differ.
    """
    mine = dict(own.entries())
    for name, value in theirs.entries():
        if mine.get(name, "auto") in ("auto", {}):
            own.put(name, value)
        elif value not in ("auto", {}) and not _same(mine[name], value):
            raise ValueError(
                f"`deepspeed=` can't work: it has {name}={mine[name]!r}, and the DeepSpeed configuration of `accelerate"
                f" launch` says {value!r}. Leave `deepspeed` out of the training arguments, or start the script by"
                " torchrun."
            )
    return own


def _rest(config: DeepSpeedJson, filled: Mapping[str, Any]) -> Config:
    """Return the sections that the arguments don't replace."""
    content = config.content.items()
    rest = DeepSpeedJson({name: value for name, value in content if name not in (*_SECTIONS, *_NUMBERS)})
    for name in ("fp16.enabled", "bf16.enabled"):
        if name in filled:
            rest.put(name, filled[name])
    return rest.content


# --- the values of the arguments -----------------------------------------------------------------------------------


def _take(args: Any) -> list[str]:
    """Take the numbers of Accelerate's yaml for arguments at their default; return the lines to print."""
    fields: dict[str, Any] = type(args).__dataclass_fields__
    notes: list[str] = []
    for variable, name, kind in (
        ("ACCELERATE_GRADIENT_CLIPPING", "max_grad_norm", float),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", int),
    ):
        given = os.environ.get(variable, "auto").lower()
        if given not in ("auto", "none", "") and kind(given) != getattr(args, name) == fields[name].default:
            setattr(args, name, kind(given))
            notes.append(f"{name}={kind(given)}, from the configuration of `accelerate launch`")
    return notes


def _wanted(args: Any) -> dict[str, Wanted]:
    rows, steps, world = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    # With `split_batches`, the batch size of the arguments is that of all ranks together.
    split = world if getattr(args.accelerator_config, "split_batches", False) else 1
    together = rows * steps * world // split
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    betas = [args.adam_beta1, args.adam_beta2]
    total = args.max_steps if args.max_steps > 0 else None
    share = total is None and 0 < args.warmup_steps < 1  # a share of the number of steps, which is not known yet
    warmup = None if share else args.get_warmup_steps(args.max_steps)

    def by(name: str, value: Any = None) -> Wanted:
        return Wanted(
            getattr(args, name) if value is None else value, f"{name}={getattr(args, name)}", f"`{name}={{}}`"
        )

    def half(name: str) -> Wanted:
        on = bool(getattr(args, name)) or launched == name
        return Wanted(on, f"{name}={getattr(args, name)}", f"`{name}={{}}`")

    each = f"and {world} process{'es' if world > 1 else ''} x {rows // split} rows"
    zero = Wanted(0, "but a schedule of trainfn starts from 0", "0 there")
    return {
        "train_micro_batch_size_per_gpu": Wanted(
            rows // split,
            f"per_device_train_batch_size={rows}",
            "`per_device_train_batch_size={}`" if split == 1 else _AUTO,
        ),
        "gradient_accumulation_steps": by("gradient_accumulation_steps"),
        "train_batch_size": Wanted(together, f"{each} x gradient_accumulation_steps={steps} are {together}", _AUTO),
        "gradient_clipping": by("max_grad_norm", args.max_grad_norm or 0.0),
        "optimizer.params.lr": by("learning_rate"),
        "optimizer.params.betas": Wanted(betas, f"adam_beta1+adam_beta2={betas}", "`adam_beta1=..., adam_beta2=...`"),
        "optimizer.params.eps": by("adam_epsilon"),
        "optimizer.params.weight_decay": by("weight_decay"),
        "scheduler.params.warmup_max_lr": by("learning_rate"),
        "scheduler.params.warmup_min_lr": zero,
        "scheduler.params.warmup_min_ratio": zero,
        "scheduler.params.cos_min_ratio": zero._replace(arguments="but a cosine of trainfn ends at 0"),
        "scheduler.params.total_num_steps": Wanted(total, f"max_steps={args.max_steps}", "`max_steps={}`"),
        "scheduler.params.warmup_num_steps": Wanted(warmup, f"warmup_steps={args.warmup_steps}", "`warmup_steps={}`"),
        "fp16.enabled": half("fp16"),
        "bf16.enabled": half("bf16"),
    }


def _same(given: Any, value: Any) -> bool:
    if isinstance(given, list) and isinstance(value, list):
        return len(given) == len(value) and all(map(_same, given, value))
    one: Any = given
    try:
        return float(one) == float(value)  # True equals 1, and JSON reads a number such as 3e-5 in quotes as text
    except (TypeError, ValueError):
        return given == value


# --- optimizers and schedules -------------------------------------------------------------------------------------


def _types(args: Any, config: DeepSpeedJson) -> list[str]:
    """Return the contradictions between the arguments and the optimizer and scheduler of the configuration."""
    wrong: list[str] = []
    optimizer, scheduler = (config.section(name) for name in _SECTIONS)
    if optimizer:
        wrong += _optimizer(str(getattr(args.optim, "value", args.optim)), optimizer)
    if scheduler:
        wrong += _scheduler(args, scheduler)
    return wrong


def _optimizer(optim: str, section: Config) -> list[str]:
    kind, params = section.get("type"), section.get("params") or {}
    if kind not in ("Adam", "AdamW"):
        write = 'write "AdamW" there, or leave `optimizer` out there and write `optim=...`'
        return [f"optimizer.type={kind!r}, which is not Adam: {write}"]
    wrong: list[str] = []
    if optim not in _ADAM:
        wrong.append(
            f"optimizer.type={kind!r}, optim={optim!r}: write `optim='adamw_torch'`, or leave `optimizer` out there"
        )
    for name, value in params.items():
        known = name in ("lr", "betas", "eps", "weight_decay")
        if not known and (name not in _ADAM_PARAMS or _ADAM_PARAMS[name] not in (None, value)):
            wrong.append(f"optimizer.params.{name}={value!r}, which AdamW of trainfn does not have: leave it out")
    return wrong


def _scheduler(args: Any, section: Config) -> list[str]:
    kind, params = section.get("type"), section.get("params") or {}
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if kind not in _SCHEDULES:
        return [f"scheduler.type={kind!r}: leave `scheduler` out there, and write `lr_scheduler_type=...`"]
    wrong: list[str] = []
    if name != _SCHEDULES[kind]:
        wrong.append(
            f"scheduler.type={kind!r}, lr_scheduler_type={name!r}: write `lr_scheduler_type={_SCHEDULES[kind]!r}`, or"
            " leave `scheduler` out there"
        )
    if args.lr_scheduler_kwargs:
        wrong.append(f"scheduler.type={kind!r}, lr_scheduler_kwargs={args.lr_scheduler_kwargs}: leave the latter out")
    for param, value in params.items():
        if param == "warmup_type":
            if value != "linear" and args.warmup_steps:
                wrong.append(
                    f'scheduler.params.warmup_type={value!r}, but a warm-up of trainfn is linear: write "linear" there'
                )
        elif param not in _SCHEDULE_PARAMS[kind]:
            wrong.append(f"scheduler.params.{param}={value!r}, which trainfn does not know: leave it out")
    for param in ("warmup_min_ratio", "cos_min_ratio"):  # DeepSpeed's defaults are above 0
        if kind == "WarmupCosineLR" and param not in params:
            wrong.append(
                f'scheduler.params without {param}, which is above 0 by default in DeepSpeed: write `"{param}": 0`'
            )
    return wrong


def _differences(args: Any, config: DeepSpeedJson) -> list[str]:
    """Return the lines to print about numbers of the Trainer that differ from DeepSpeed's."""
    notes: list[str] = []
    params = config.section("scheduler").get("params") or {}
    if config.get("scheduler") and args.warmup_steps and "warmup_type" not in params:
        notes.append('the warm-up is linear; DeepSpeed\'s, without `"warmup_type": "linear"`, is logarithmic')
    if config.get("optimizer") and args.weight_decay:
        notes.append("biases and norms don't decay; DeepSpeed's optimizer lets all parameters decay")
    if args.deepspeed and config.get("gradient_clipping") is None and args.max_grad_norm:
        notes.append(f"gradients are clipped at max_grad_norm={args.max_grad_norm}: there is no gradient_clipping")
    return notes
