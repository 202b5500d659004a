"""What a Trainer is made of when it is constructed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import is_liger_kernel_available

from trainfn.errors import nearest


def report_misspelt(cls: type, base: type) -> None:
    """Warn of a method whose name is nearly that of one to override: it would never be called."""
    known = [name for name in dir(base) if not name.startswith("__")]
    for name, value in vars(cls).items():
        if name.startswith("__") or name in known or not callable(value):
            continue
        near = [other for other in known if abs(len(other) - len(name)) <= 1]
        if hint := nearest(name, near, "Did you mean to override `{}`?", likeness=0.9):
            warnings.warn(f"{cls.__name__}.{name} is never called. {hint}", stacklevel=3)


def first_model(model: Any, model_init: Callable[..., nn.Module] | None, args: Any) -> nn.Module:
    """The model to begin with: the one given, or a first one of ``model_init``."""
    if (model is None) == (model_init is None):
        raise ValueError("Trainer(model=..., model_init=...): give exactly one of the two.")
    if model is None:
        return made_model(model_init, args)
    if model is ...:
        raise ValueError("Trainer(...): `...` is a placeholder of the documentation. Give a model: Trainer(model).")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Trainer(model={type(model).__name__}): a torch.nn.Module is needed.")
    return model.to(args.device)


def made_model(model_init: Callable[..., nn.Module] | None, args: Any, trial: Any = None) -> nn.Module:
    """A model of ``model_init``, which may take a trial; seeded, and the global generator is given back."""
    assert model_init is not None
    takes = len(inspect.signature(model_init).parameters)
    if takes > 1:
        raise ValueError(f"Trainer(model_init=...): it takes {takes} arguments; it may take none, or a trial.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = model_init(trial) if takes else model_init()
    return model.to(args.device)


def smoother(args: Any, model: nn.Module) -> LabelSmoother | None:
    """Label smoothing, if it is asked for and means something."""
    if args.label_smoothing_factor == 0:
        return None
    if getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification":
        warnings.warn("Label smoothing means nothing for multi-label classification; it is left out.", stacklevel=3)
        return None
    return LabelSmoother(epsilon=args.label_smoothing_factor)


def set_use_cache(model: Any, args: Any) -> None:
    """Whether the model keeps keys and values, which training has no use for."""
    if getattr(model, "config", None) is not None:
        model.config.use_cache = args.use_cache


def check_liger(args: Any) -> None:
    """Raise now, and not when training begins, if the package is missing."""
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError(
            "TrainingArguments(use_liger_kernel=True) needs liger-kernel 0.3 or newer: `pip install liger-kernel`."
        )


def arguments_of(model: nn.Module) -> list[str]:
    """What a model's forward takes; that of the base model, under adapters."""
    inner: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    return list(inspect.signature(inner.forward).parameters)


def renamed(old: str, old_value: Any, new: str, new_value: Any) -> Any:
    """The value of an argument that has an old name too."""
    if old_value is None:
        return new_value
    if new_value is not None and new_value is not old_value:
        raise ValueError(f"Trainer({old}=..., {new}=...): two names for one thing, with two values. Give {new}= only.")
    warnings.warn(f"Trainer({old}=...) is now called `{new}=`.", DeprecationWarning, stacklevel=3)
    return old_value


def default_collator(processing_class: Any) -> Callable[[list[Any]], Any]:
    """It pads, if there is something to pad with."""
    if isinstance(processing_class, PreTrainedTokenizerBase | SequenceFeatureExtractor):
        return DataCollatorWithPadding(processing_class)  # type: ignore[arg-type]
    return default_data_collator
