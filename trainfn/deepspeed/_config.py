"""From what the user or the launcher wrote to a DeepSpeed configuration without ``auto``."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

Config = dict[str, Any]

_SIZES = {  # DeepSpeed's own advice, in hidden sizes; without one, its defaults
    "zero_optimization.reduce_bucket_size": lambda hidden: hidden * hidden,
    "zero_optimization.stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "zero_optimization.stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
_GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def autos(config: Mapping[str, Any] | str | Path | None = None) -> list[str]:
    """The entries of a configuration that say ``"auto"`` and that `init` needs a value for, by their dotted names.

    Args:
        config: What `init` takes.

    >>> autos({"gradient_clipping": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}})
    ['gradient_clipping', 'optimizer.params.lr']
    """
    return _open(_derived(_read(config), None))


def resolved(config: Mapping[str, Any] | str | Path | None, values: Mapping[str, Any], model: nn.Module) -> Config:
    """The configuration with every ``auto`` replaced.

    Raises:
        ValueError: If an ``auto`` is left, or a value contradicts the configuration.
    """
    out = _read(config)
    for name, value in values.items():
        _put(out, name, value)
    out = _derived(out, model)
    left = _open(out)
    if left:
        given = ", ".join(f'"{name}": …' for name in left)
        raise ValueError(
            f'init(model, config=...): {", ".join(left)} {"is" if len(left) == 1 else "are"} "auto", and nothing here'
            f" says what that is. Write `tfn.deepspeed.init(model, ..., values={{{given}}})`, or the number in the"
            " configuration."
        )
    if "train_batch_size" not in out and "train_micro_batch_size_per_gpu" not in out:
        raise ValueError(
            "init(model, config=...): the configuration has no batch size, which DeepSpeed counts samples with. Write"
            ' `tfn.deepspeed.init(model, ..., values={"train_micro_batch_size_per_gpu": 8})`.'
        )
    if out.get("fp16", {}).get("enabled") and not out.get("zero_optimization", {}).get("stage", 0):
        raise ValueError(
            "init(model, config=...): fp16 at stage 0. DeepSpeed divides those gradients by a loss scale that it has"
            " not multiplied the loss by, so they come out too small. Write"
            ' `"zero_optimization": {"stage": 1}`, or bf16.'
        )
    if out.get("managed_gradient_accumulation") is False:
        raise ValueError(
            "init(model, config=...): managed_gradient_accumulation=false leaves the accumulation to you, and here the"
            " step does it. Leave the entry out and write gradient_accumulation_steps."
        )
    return out


def _read(config: Mapping[str, Any] | str | Path | None) -> Config:
    if config is None:
        return _launched()
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    path = Path(config)
    if not path.is_file():
        raise ValueError(
            f"init(model, config={str(config)!r}): there is no such file. Give the path of a DeepSpeed json, a dict, or"
            " nothing under `accelerate launch`."
        )
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"init(model, config={str(config)!r}): the file is no json: {error}.") from error
    if not isinstance(read, dict):
        raise ValueError(f"init(model, config={str(config)!r}): the json is a {type(read).__name__}, not an object.")
    return read


def _launched() -> Config:
    """What ``accelerate launch`` with a DeepSpeed yaml has exported, by Accelerate's own reading of it."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        raise ValueError(
            "init(model) without a config takes the one that `accelerate launch` exports, and this process was not"
            " launched with one. Write `tfn.deepspeed.init(model, config='ds.json')`, or start the script by"
            " `accelerate launch --config_file deepspeed.yaml script.py`."
        )
    with warnings.catch_warnings():  # what is imported adds filters of its own
        from accelerate.utils import DeepSpeedPlugin

        warnings.filterwarnings("ignore", message="DeepSpeed Zero3 Init flag is only applicable")  # nothing follows
        plugin = DeepSpeedPlugin()
    config = copy.deepcopy(plugin.deepspeed_config)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for name in ("fp16", "bf16"):
        if precision == name:
            config.setdefault(name, {"enabled": True})
    return config


def _derived(config: Config, model: nn.Module | None) -> Config:
    """With the values that follow from others; ``model=None``: only which they are."""
    if config.get("train_batch_size") == "auto":
        del config["train_batch_size"]  # DeepSpeed multiplies
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    for name in ("fp16", "bf16"):
        section = config.get(name)
        if precision is not None and isinstance(section, dict) and section.get("enabled") == "auto":
            section["enabled"] = precision == name
    zero = config.get("zero_optimization", {})
    hidden = None if model is None else _hidden_size(model)
    for name, size in _SIZES.items():
        key = name.rpartition(".")[2]
        if zero.get(key) == "auto":
            zero.pop(key)
            if hidden is not None:
                zero[key] = size(hidden)
    if zero.get(_GATHER.rpartition(".")[2]) == "auto":
        zero[_GATHER.rpartition(".")[2]] = False  # `weights` gathers without it
    return config


def _hidden_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    sizes = getattr(config, "hidden_size", None) or max(getattr(config, "hidden_sizes", None) or [0])
    return sizes if isinstance(sizes, int) and sizes > 0 else None


def _put(config: Config, name: str, value: Any) -> None:
    *path, key = name.split(".")
    section: Any = config
    for part in path:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise ValueError(
            f"init(model, values={{{name!r}: {value!r}}}): the configuration has no section {'.'.join(path)!r}. Add it,"
            " or leave the value out."
        )
    if section.get(key, "auto") not in ("auto", value):
        raise ValueError(
            f"init(model, values={{{name!r}: {value!r}}}): the configuration says {section[key]!r}. Make them agree, or"
            ' write "auto" there.'
        )
    section[key] = value


def _open(config: Config) -> list[str]:
    return [name for name, value in _entries(config, "") if value == "auto"]


def _entries(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
