"""The configuration of DeepSpeed's engine, of the user or of the launcher, with a value for every ``auto``."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from trainfn.launch import DeepSpeedJson

Config = dict[str, Any]

_SIZES = {  # DeepSpeed's own advice, in hidden sizes; without one, its defaults
    "zero_optimization.reduce_bucket_size": lambda hidden: hidden * hidden,
    "zero_optimization.stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "zero_optimization.stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
_GATHER = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def autos(config: Mapping[str, Any] | str | Path | None = None) -> list[str]:
    """Return the dotted names of the ``"auto"`` entries that `init` needs a value for.

    Args:
        config: See `init`.

    >>> autos({"gradient_clipping": "auto", "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}})
    ['gradient_clipping', 'optimizer.params.lr']
    """
    return _derived(_read(config), None).autos()


def resolved(config: Mapping[str, Any] | str | Path | None, values: Mapping[str, Any], model: nn.Module) -> Config:
    """Return the configuration with a value for every ``auto``.

    Raises:
        ValueError: If an ``auto`` is left, or a value contradicts the configuration.
    """
    read = _read(config)
    for name, value in values.items():
        _put(read, name, value)
    read = _derived(read, model)
    left, out = read.autos(), read.content
    if left:
        given = ", ".join(f'"{name}": …' for name in left)
        raise ValueError(
            f'init(model, config=...): {", ".join(left)} {"is" if len(left) == 1 else "are"} "auto", and no value'
            f" is given. Write `tfn.deepspeed.init(model, ..., values={{{given}}})`, or the number in the"
            " configuration."
        )
    if "train_batch_size" not in out and "train_micro_batch_size_per_gpu" not in out:
        raise ValueError(
            "init(model, config=...): the configuration has no batch size, by which DeepSpeed counts samples. Write"
            ' `tfn.deepspeed.init(model, ..., values={"train_micro_batch_size_per_gpu": 8})`.'
        )
    if read.get("fp16.enabled") and not read.get("zero_optimization.stage", 0):
        raise ValueError(
            "init(model, config=...): the configuration has fp16 at stage 0, where DeepSpeed divides gradients by a"
            " loss scale without multiplying the loss by it. The gradients would be too small. Write"
            ' `"zero_optimization": {"stage": 1}`, or bf16.'
        )
    if out.get("managed_gradient_accumulation") is False:
        raise ValueError(
            "init(model, config=...): managed_gradient_accumulation=false leaves the accumulation to you, but the step"
            " of trainfn does it. Leave the entry out and write gradient_accumulation_steps."
        )
    return out


def _read(config: Mapping[str, Any] | str | Path | None) -> DeepSpeedJson:
    if config is None:
        return DeepSpeedJson(_launched())
    shown = "..." if isinstance(config, Mapping) else repr(str(config))
    return DeepSpeedJson.read(config, f"init(model, config={shown})")


def _launched() -> Config:
    """Return the configuration that ``accelerate launch`` exported, as Accelerate itself reads it."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        raise ValueError(
            "init(model): without `config`, it takes the one that `accelerate launch` exports, but this process was not"
            " launched with one. Write `tfn.deepspeed.init(model, config='ds.json')`, or start the script by"
            " `accelerate launch --config_file deepspeed.yaml script.py`."
        )
    with warnings.catch_warnings():  # the import adds filters of its own
        from accelerate.utils import DeepSpeedPlugin

        warnings.filterwarnings("ignore", message="DeepSpeed Zero3 Init flag is only applicable")  # harmless
        plugin = DeepSpeedPlugin()
    config = copy.deepcopy(plugin.deepspeed_config)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for name in ("fp16", "bf16"):
        if precision == name:
            config.setdefault(name, {"enabled": True})
    return config


def _derived(config: DeepSpeedJson, model: nn.Module | None) -> DeepSpeedJson:
    """Return the configuration with the values that follow from others; without a model, some are left out."""
    if config.get("train_batch_size") == "auto":
        del config.content["train_batch_size"]  # DeepSpeed multiplies
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    for name in ("fp16", "bf16"):
        if precision is not None and config.get(f"{name}.enabled") == "auto":
            config.put(f"{name}.enabled", precision == name)
    hidden = None if model is None else _hidden_size(model)
    for name, size in _SIZES.items():
        if config.get(name) == "auto":
            del config.section("zero_optimization")[name.rpartition(".")[2]]
            if hidden is not None:
                config.put(name, size(hidden))
    if config.get(_GATHER) == "auto":
        config.put(_GATHER, False)  # `weights` gathers without it
    return config


def _hidden_size(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    sizes = getattr(config, "hidden_size", None) or max(getattr(config, "hidden_sizes", None) or [0])
    return sizes if isinstance(sizes, int) and sizes > 0 else None


def _put(config: DeepSpeedJson, name: str, value: Any) -> None:
    section = name.rpartition(".")[0]
    if section and not isinstance(config.get(section), dict):
        raise ValueError(
            f"init(model, values={{{name!r}: {value!r}}}): the configuration has no section {section!r}. Add it, or"
            " leave the value out."
        )
    written = config.get(name, "auto")
    if written not in ("auto", value):
        raise ValueError(
            f"init(model, values={{{name!r}: {value!r}}}): the configuration says {written!r}. Write the same value"
            ' there, or "auto".'
        )
    config.put(name, value)
