"""A DeepSpeed configuration beside the training arguments: filled in and checked, before the rest becomes a plan."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainfn import launch as launchers

Config = dict[str, Any]

_SECTIONS = ("optimizer", "scheduler")
_NUMBERS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
_ADAM = ("adamw_torch", "adamw_torch_fused")
_ADAM_PARAMS = {"torch_adam": None, "adam_w_mode": True, "bias_correction": True, "amsgrad": False}  # None: any
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_RATES = ("warmup_min_lr", "warmup_max_lr")
_SCHEDULE_PARAMS = {
    "WarmupLR": ("warmup_num_steps", *_RATES),
    "WarmupDecayLR": ("warmup_num_steps", "total_num_steps", *_RATES),
    "WarmupCosineLR": ("warmup_num_steps", "total_num_steps", "warmup_min_ratio", "cos_min_ratio"),
}
_AUTO = '`"auto"` there'


class Wanted(NamedTuple):
    """What an entry has to be.

    Attributes:
        value: By the arguments; None if they don't say.
        told: The arguments, and their values.
        write: What to write for another value.
    """

    value: Any
    told: str
    write: str


class Configured(NamedTuple):
    """A configuration that agrees with the arguments.

    Attributes:
        rest: What the arguments don't say; for `trainfn.launch.settings`.
        filled: The entries that the arguments say, with their values.
        notes: What is to be told.
    """

    rest: Config
    filled: dict[str, Any]
    notes: list[str]


def configuration(args: Any) -> Configured | None:
    """The configuration of ``deepspeed=`` and of the launcher, as far as a plan needs it; None without one.

    Every ``"auto"`` that the arguments have a value for takes it, as in transformers; a number has to be equal.

    Raises:
        ValueError: If the configuration and the arguments differ, or it asks for another optimizer or schedule.
    """
    own = None if not args.deepspeed else _read(args.deepspeed, type(args).__name__)
    theirs = launchers.deepspeed_config()
    if own is None and theirs is None:
        return None
    config = _merged(own or {}, theirs or {})
    notes = [] if theirs is None else _take(args)
    wanted, filled, wrong = _wanted(args), {}, _types(args, config)
    for name, value in _flat(config):
        want = wanted.get(name)
        if want is None or value is None or str(value).lower() == "none":
            continue
        if value != "auto" and not _same(value, want.value):
            wrong.append(f"{name}={value!r}, {want.told}: write {want.write.format(value)}")
        elif want.value is not None:
            filled[name] = want.value
    if wrong:
        raise ValueError(
            f"{_source(args)} can't work: the configuration and the training arguments differ."
            f' {"; ".join(wrong)}. An entry that says "auto" takes the argument\'s value.'
        )
    return Configured(_rest(config, filled), filled, notes + _differences(args, config))


def tell(found: Configured, args: Any) -> None:
    """Print what becomes of the configuration, all but the table of the plan's fields."""
    print(
        f"{_source(args)}: runs natively, as a plan of the same ZeRO stage. DeepSpeed's own engine is"
        ' `tfn.deepspeed.init(model)`: see the guide `deepspeed.md`.'
    )
    filled = ", ".join(f"{name}={value}" for name, value in found.filled.items())
    for line in ([f"as the training arguments say: {filled}"] if filled else []) + found.notes:
        print(f"  {line}")


# --- reading ------------------------------------------------------------------------------------------------------


def _source(args: Any) -> str:
    if not args.deepspeed:
        return "the DeepSpeed configuration of `accelerate launch`"
    shown = repr(args.deepspeed) if isinstance(args.deepspeed, str) else "{...}"
    return f"`{type(args).__name__}(deepspeed={shown})`"


def _read(given: Any, call: str) -> Config:
    """A dict, or one written as json, or the path of a file with one."""
    if isinstance(given, Mapping):
        return json.loads(json.dumps(given))  # a copy, in plain types
    if not isinstance(given, str | os.PathLike):
        raise ValueError(
            f"`{call}(deepspeed={given!r})` can't work: that is a {type(given).__name__}. Write"
            " `deepspeed='ds.json'`, the path of a DeepSpeed json, or a dict of its fields."
        )
    text = os.fspath(given)
    if not text.lstrip().startswith("{"):
        if not Path(text).is_file():
            raise ValueError(
                f"`{call}(deepspeed={text!r})` can't work: there is no such file. Write the path of a DeepSpeed json,"
                " or a dict of its fields."
            )
        text = Path(text).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`{call}(deepspeed={given!r})` can't work: it is no json: {error}. Write the fields as DeepSpeed's"
            ' documentation does: `{"zero_optimization": {"stage": 2}}`.'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"`{call}(deepspeed={given!r})` can't work: the json is a {type(content).__name__}, not an object. Write"
            ' `{"zero_optimization": {"stage": 2}}`.'
        )
    return content


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _put(config: Config, name: str, value: Any) -> None:
    *path, key = name.split(".")
    for part in path:
        if not isinstance(config.get(part), dict):
            config[part] = {}
        config = config[part]
    config[key] = value


def _merged(own: Config, theirs: Config) -> Config:
    """Both, if they agree wherever both say something."""
    mine = dict(_flat(own))
    for name, value in _flat(theirs):
        if mine.get(name, "auto") in ("auto", {}):
            _put(own, name, value)
        elif value not in ("auto", {}) and not _same(mine[name], value):
            raise ValueError(
                f"`deepspeed=` says {name}={mine[name]!r}, and the DeepSpeed configuration of `accelerate launch` says"
                f" {value!r}. Leave `deepspeed` out of the training arguments, or start the script by torchrun."
            )
    return own


def _rest(config: Config, filled: Mapping[str, Any]) -> Config:
    rest = {name: value for name, value in config.items() if name not in (*_SECTIONS, *_NUMBERS)}
    for name in ("fp16.enabled", "bf16.enabled"):
        if name in filled:
            _put(rest, name, filled[name])
    return rest


# --- what the arguments say ---------------------------------------------------------------------------------------


def _take(args: Any) -> list[str]:
    """Numbers of Accelerate's yaml, where the argument has its default."""
    fields: dict[str, Any] = type(args).__dataclass_fields__
    notes: list[str] = []
    for variable, name, kind in (
        ("ACCELERATE_GRADIENT_CLIPPING", "max_grad_norm", float),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", int),
    ):
        given = os.environ.get(variable, "auto").lower()
        if given not in ("auto", "none", "") and kind(given) != getattr(args, name) == fields[name].default:
            setattr(args, name, kind(given))
            notes.append(f"{name}={kind(given)}, as the configuration of `accelerate launch` says")
    return notes


def _wanted(args: Any) -> dict[str, Wanted]:
    rows, steps, world = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    split = world if getattr(args.accelerator_config, "split_batches", False) else 1  # then a batch is of all ranks
    whole = rows * steps * world // split
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    betas = [args.adam_beta1, args.adam_beta2]
    total = args.max_steps if args.max_steps > 0 else None
    share = total is None and 0 < args.warmup_steps < 1  # of a number that is not known yet
    warmup = None if share else args.get_warmup_steps(args.max_steps)

    def by(name: str, value: Any = None) -> Wanted:
        return Wanted(
            getattr(args, name) if value is None else value, f"{name}={getattr(args, name)}", f"`{name}={{}}`"
        )

    def half(name: str) -> Wanted:
        on = bool(getattr(args, name)) or launched == name
        return Wanted(on, f"{name}={getattr(args, name)}", f"`{name}={{}}`")

    each = f"and {world} process{'es' if world > 1 else ''} x {rows // split} rows"
    zero = Wanted(0, "and a schedule starts from 0 here", "0 there")
    return {
        "train_micro_batch_size_per_gpu": Wanted(
            rows // split,
            f"per_device_train_batch_size={rows}",
            "`per_device_train_batch_size={}`" if split == 1 else _AUTO,
        ),
        "gradient_accumulation_steps": by("gradient_accumulation_steps"),
        "train_batch_size": Wanted(whole, f"{each} x gradient_accumulation_steps={steps} are {whole}", _AUTO),
        "gradient_clipping": by("max_grad_norm", args.max_grad_norm or 0.0),
        "optimizer.params.lr": by("learning_rate"),
        "optimizer.params.betas": Wanted(betas, f"adam_beta1+adam_beta2={betas}", "`adam_beta1=..., adam_beta2=...`"),
        "optimizer.params.eps": by("adam_epsilon"),
        "optimizer.params.weight_decay": by("weight_decay"),
        "scheduler.params.warmup_max_lr": by("learning_rate"),
        "scheduler.params.warmup_min_lr": zero,
        "scheduler.params.warmup_min_ratio": zero,
        "scheduler.params.cos_min_ratio": zero._replace(told="and a cosine ends at 0 here"),
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
        return float(one) == float(value)  # True is 1, and "3e-5" a number that json took for text
    except (TypeError, ValueError):
        return given == value


# --- optimizers and schedules -------------------------------------------------------------------------------------


def _types(args: Any, config: Config) -> list[str]:
    """What is wrong with the choice of an optimizer and a schedule."""
    wrong: list[str] = []
    optimizer, scheduler = (_section(config, name) for name in _SECTIONS)
    if optimizer:
        wrong += _optimizer(str(getattr(args.optim, "value", args.optim)), optimizer)
    if scheduler:
        wrong += _scheduler(args, scheduler)
    return wrong


def _section(config: Config, name: str) -> Config:
    section = config.get(name) or {}
    return section if isinstance(section, dict) else {"type": section}


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
            wrong.append(f"optimizer.params.{name}={value!r}, which AdamW here doesn't have: leave it out")
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
                    f'scheduler.params.warmup_type={value!r}, and a warm-up is linear here: write "linear" there'
                )
        elif param not in _SCHEDULE_PARAMS[kind]:
            wrong.append(f"scheduler.params.{param}={value!r}, which is not known here: leave it out")
    for param in ("warmup_min_ratio", "cos_min_ratio"):  # their defaults are others
        if kind == "WarmupCosineLR" and param not in params:
            wrong.append(
                f'scheduler.params without {param}, which DeepSpeed takes for more than 0: write `"{param}": 0`'
            )
    return wrong


def _differences(args: Any, config: Config) -> list[str]:
    """Where the numbers are the Trainer's, not those that DeepSpeed would have in the same place."""
    notes: list[str] = []
    params = _section(config, "scheduler").get("params") or {}
    if config.get("scheduler") and args.warmup_steps and "warmup_type" not in params:
        notes.append('the warm-up is linear; DeepSpeed\'s, without `"warmup_type": "linear"`, is logarithmic')
    if config.get("optimizer") and args.weight_decay:
        notes.append("biases and norms don't decay; all that DeepSpeed's optimizer is given does")
    if args.deepspeed and "gradient_clipping" not in config and args.max_grad_norm:
        notes.append(f"gradients are clipped at max_grad_norm={args.max_grad_norm}: there is no gradient_clipping")
    return notes
