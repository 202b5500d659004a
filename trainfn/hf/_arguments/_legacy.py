"""Names of training arguments that transformers renamed or dropped, and what to write today."""

from __future__ import annotations

import sys
import warnings
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from trainfn.hf._types import Values

Given: TypeAlias = Values


class Rule(NamedTuple):
    """The translation of an old name.

    Attributes:
        becomes: ``(value, all arguments given) -> new arguments``; empty where there is nothing to set.
        write: The text that says what to write, or why to leave it out.
        new: The field that is read under the old name; None where the old value itself is kept.
        kind: The type of the value on a command line.
    """

    becomes: Callable[[Any, Given], Given]
    write: Callable[[object], str]
    new: str | None = None
    kind: type = str


def _renamed(new: str, kind: type = str) -> Rule:
    return Rule(lambda value, given: {new: value}, lambda value: f"write `{new}={value!r}`", new, kind)


def _dropped(why: str, kind: type = bool) -> Rule:
    return Rule(lambda value, given: {}, lambda value: f"leave it out: {why}", None, kind)


def _set(new: str, value: object) -> Rule:
    """A switch that became one of the values of a field."""
    return Rule(
        lambda on, given: {new: value} if on else {},
        lambda on: f"write `{new}={value!r}`" if on else "leave it out: that is the default",
        None,
        bool,
    )


def _in(new: str, key: str, kind: type) -> Rule:
    """A name that became a key of a field."""
    return Rule(
        lambda value, given: {new: {**(given.get(new) or {}), key: value}},
        lambda value: f"write `{new}={ {key: value}!r}`",
        None,
        kind,
    )


def _repository(given: Given) -> Given:
    name = given.get("push_to_hub_model_id") or Path(given.get("output_dir") or "trainer_output").name
    organization = given.get("push_to_hub_organization")
    return {"hub_model_id": f"{organization}/{name}" if organization else name}


def _ratio(value: float | str, given: Given) -> Given:
    ratio = float(value)
    if not 0 <= ratio < 1:
        raise ValueError(
            f"`TrainingArguments(warmup_ratio={value!r})` can't work: it is the share of the run that warms up, in"
            " [0, 1). Write `warmup_steps=0.1` for a share, or `warmup_steps=100` for a number of steps."
        )
    return {"warmup_steps": ratio}


def _safetensors(value: object, given: Given) -> Given:
    if not value:
        raise ValueError(
            "`TrainingArguments(save_safetensors=False)` can't work: checkpoints are safetensors files, which hold"
            " numbers and no code. Leave it out; `torch.save(model.state_dict(), path)` writes a pickle."
        )
    return {}


_APEX = "mixed precision is torch's own autocast, so there is nothing to choose"
RULES: dict[str, Rule] = {
    "evaluation_strategy": _renamed("eval_strategy"),
    "per_gpu_train_batch_size": _renamed("per_device_train_batch_size", int),
    "per_gpu_eval_batch_size": _renamed("per_device_eval_batch_size", int),
    "push_to_hub_token": _renamed("hub_token"),
    "no_cuda": _renamed("use_cpu", bool),
    "torchdynamo": _renamed("torch_compile_backend"),
    "xpu_backend": _renamed("ddp_backend"),
    "push_to_hub_model_id": Rule(
        lambda value, given: _repository(given), lambda value: f"write `hub_model_id={value!r}`", "hub_model_id"
    ),
    "push_to_hub_organization": Rule(
        lambda value, given: _repository(given), lambda value: f"write `hub_model_id='{value}/<name>'`"
    ),
    "warmup_ratio": Rule(
        _ratio, lambda value: f"write `warmup_steps={value}`, where a number below 1 is a share", "warmup_steps", float
    ),
    "group_by_length": _set("train_sampling_strategy", "group_by_length"),
    "adafactor": _set("optim", "adafactor"),
    "include_inputs_for_metrics": _set("include_for_metrics", ["inputs"]),
    "include_tokens_per_second": _set("include_num_input_tokens_seen", "all"),
    "evaluate_during_training": _set("eval_strategy", "steps"),
    "dispatch_batches": _in("accelerator_config", "dispatch_batches", bool),
    "split_batches": _in("accelerator_config", "split_batches", bool),
    "fsdp_min_num_params": _in("fsdp_config", "min_num_params", int),
    "fsdp_transformer_layer_cls_to_wrap": _in("fsdp_config", "transformer_layer_cls_to_wrap", str),
    "overwrite_output_dir": _dropped("a run without `resume_from_checkpoint` starts anew in any folder"),
    "logging_dir": _dropped("TensorBoard writes to the environment variable TENSORBOARD_LOGGING_DIR", str),
    "save_safetensors": Rule(
        _safetensors, lambda value: "leave it out: checkpoints are always safetensors files", None, bool
    ),
    "half_precision_backend": _dropped(_APEX, str),
    "fp16_backend": _dropped(_APEX, str),
    "fp16_opt_level": _dropped(_APEX, str),
    "use_mps_device": _dropped("the accelerator of the machine is found and used by itself"),
    "use_ipex": _dropped("Intel's extension has become part of torch"),
    "jit_mode_eval": _dropped("the evaluation is compiled with `torch_compile=True`"),
    "tpu_num_cores": _dropped("the launcher knows the number of cores", int),
    "tpu_metrics_debug": _dropped("trainfn has no TPU metrics to print"),
    "mp_parameters": _dropped("it belongs to SageMaker's model parallelism, which transformers removed", str),
    "ray_scope": _dropped("pass `scope=` to `hyperparameter_search`", str),
    "past_index": _dropped("models return their own cache", int),
    "use_legacy_prediction_loop": _dropped("there is one prediction loop"),
}


def translate(given: Given, stated: Given, names: Given) -> Given:
    """Today's arguments for old ones, with one DeprecationWarning for each.

    Args:
        given: All arguments that were passed.
        stated: The arguments that the user wrote; on a command line all others are passed with their defaults.
        names: The old names, with their values.

    Raises:
        ValueError: If an old and a new name were given with different values.
    """
    everything = {**given, **names}
    for name, value in names.items():
        rule = RULES[name]
        for new, wanted in rule.becomes(value, everything).items():
            if new in stated and not _same(stated[new], wanted) and not isinstance(wanted, dict):
                raise ValueError(
                    f"`TrainingArguments({name}={value!r}, {new}={stated[new]!r})` can't work: {name} is the old"
                    f" name of {new}, and the two say different things. Write `{new}={stated[new]!r}` alone."
                )
            everything[new] = wanted
        warn(
            f"`TrainingArguments({name}={value!r})` is of an old version of transformers: {rule.write(value)}.",
            DeprecationWarning,
        )
    return {name: value for name, value in everything.items() if name not in names}


def _same(one: object, other: object) -> bool:
    return str(getattr(one, "value", one)) == str(getattr(other, "value", other))


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the user's line that made the arguments, not inside this package or a parser."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_MADE_BY):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


_MADE_BY = ("trainfn.hf.", "transformers.", "dataclasses")


class Collect(Action):
    """Collects the old options of a command line, as the user spelled them, in one dict."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: object, option_string: str | None = None
    ) -> None:
        """Add one option."""
        name = (option_string or "").lstrip("-").replace("-", "_")
        if name not in RULES:
            parser.error(f"{option_string} is not an option itself: it stands for the old names of others")
        old: Given = dict(getattr(namespace, self.dest) or {})
        setattr(namespace, self.dest, {**old, name: _parsed(parser, name, values)})


def _parsed(parser: ArgumentParser, name: str, value: object) -> object:
    kind = RULES[name].kind
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        if kind is bool:
            return words[str(value).lower()]  # an option without a value is True
        return value if value is True and kind is str else kind(value)
    except (KeyError, ValueError):
        parser.error(f"argument --{name}: {value!r} is not a valid {kind.__name__}")


def options(names: set[str]) -> list[str]:
    """The spellings of old names on a command line.

    >>> options({"no_cuda"})
    ['--no_cuda', '--no-cuda']
    """
    return [f"--{spelling}" for name in sorted(names) for spelling in dict.fromkeys((name, name.replace("_", "-")))]
