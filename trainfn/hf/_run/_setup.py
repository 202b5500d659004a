"""The parts of a Trainer that are made when it is constructed, and their checks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase, default_data_collator
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import is_liger_kernel_available

from trainfn.errors import nearest
from trainfn.hf._step._counting import base_of
from trainfn.hf._types import Collator, Processor, TrainerLike, Trial

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

T = TypeVar("T")


def report_misspelt(cls: type, base: type) -> None:
    """Warn of a method whose name is nearly that of a method to override: it would never be called."""
    known = [name for name in dir(base) if not name.startswith("__")]
    for name, value in vars(cls).items():
        if name.startswith("__") or name in known or not callable(value):
            continue
        near = [other for other in known if abs(len(other) - len(name)) <= 1]
        if hint := nearest(name, near, "Did you mean to override `{}`?", likeness=0.9):
            warnings.warn(f"{cls.__name__}.{name} is never called. {hint}", stacklevel=3)


def first_model(
    model: nn.Module | None, model_init: Callable[..., nn.Module] | None, args: TrainingArguments
) -> nn.Module:
    """The first model: ``model``, or one that ``model_init`` makes."""
    if (model is None) == (model_init is None):
        raise ValueError(
            "`Trainer(model=..., model_init=...)` can't work with both or neither: exactly one of the two gives the"
            " model. Write `Trainer(model)`, or `Trainer(model_init=lambda: MyModel(...))`."
        )
    if model is None:
        return made_model(model_init, args)
    if model is ...:
        raise ValueError(
            "`Trainer(...)` can't work: `...` is a placeholder of the documentation. Write `Trainer(model)`."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`Trainer(model)` can't work: the model is a {type(model).__name__}, and a torch.nn.Module is needed."
            " Pass the module itself, not its name: `Trainer(AutoModelForCausalLM.from_pretrained(name))`."
        )
    check_quantized(model)
    return model.to(args.device)


def is_quantized(model: nn.Module) -> bool:
    """Whether layers of the model hold quantized weights, which can't be trained."""
    held = {type(parameter).__module__.partition(".")[0] for parameter in model.parameters()}
    return bool(getattr(base_of(model), "is_quantized", False)) or "bitsandbytes" in held


def check_quantized(model: nn.Module) -> None:
    """Raise if a quantized model has no adapters to train: only its norms and embeddings would learn.

    Raises:
        ValueError: If it has none, and its quantization does not train weights itself.
    """
    trains = getattr(getattr(model, "hf_quantizer", None), "is_qat_trainable", False)
    if getattr(model, "is_quantized", False) and not hasattr(model, "peft_config") and not trains:
        raise ValueError(
            f"`Trainer(model)` can't work: this {type(model).__name__} is quantized, and quantized weights can't be"
            " trained. Add adapters: `SFTTrainer(..., peft_config=peft.LoraConfig(...))`, or"
            " `peft.get_peft_model(model, config)`."
        )


def made_model(
    model_init: Callable[..., nn.Module] | None, args: TrainingArguments, trial: Trial | None = None
) -> nn.Module:
    """A seeded model of ``model_init``, which may take a trial; the global generator keeps its state."""
    assert model_init is not None
    takes = len(inspect.signature(model_init).parameters)
    if takes > 1:
        raise ValueError(
            f"`Trainer(model_init=...)` can't work: the function has {takes} parameters, and it is called with"
            " nothing or a trial. Write `model_init=lambda: MyModel(...)`."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = model_init(trial) if takes else model_init()
    return model.to(args.device)


def new_model(trainer: TrainerLike) -> None:
    """Give the Trainer a new model of its ``model_init``, and forget what was found out about the old one."""
    record = trainer._trainfn
    trial = None if record.search is None else record.search.trial
    trainer.model = made_model(trainer.model_init, trainer.args, trial)
    record.shifts = record.parameter_count = trainer._signature_columns = None
    set_use_cache(trainer.model, trainer.args)


def smoother(args: TrainingArguments, model: nn.Module) -> LabelSmoother | None:
    """The label smoother, or None if nothing is to be smoothed."""
    if args.label_smoothing_factor == 0:
        return None
    if getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification":
        warnings.warn(
            f"`TrainingArguments(label_smoothing_factor={args.label_smoothing_factor})`: label smoothing has no"
            " meaning for multi-label classification, so it is not applied. Leave it out.",
            stacklevel=3,
        )
        return None
    return LabelSmoother(epsilon=args.label_smoothing_factor)


def set_use_cache(model: nn.Module, args: TrainingArguments) -> None:
    """Set whether the model keeps a cache of keys and values, which training does not need."""
    config: PreTrainedConfig | None = getattr(model, "config", None)
    if config is not None:
        config.use_cache = args.use_cache


def check_liger(args: TrainingArguments) -> None:
    """Raise at construction, and not when training begins, if liger-kernel is missing."""
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError(
            "`TrainingArguments(use_liger_kernel=True)` needs liger-kernel 0.3 or newer."
            " Run `pip install liger-kernel`."
        )


def arguments_of(model: nn.Module) -> list[str]:
    """The names that a model's forward takes; with adapters, those of the base model."""
    return list(inspect.signature(base_of(model).forward).parameters)


def renamed(old: str, old_value: T | None, new: str, new_value: T | None) -> T | None:
    """The value of an argument that also has an old name."""
    if old_value is None:
        return new_value
    if new_value is not None and new_value is not old_value:
        raise ValueError(
            f"`Trainer({old}=..., {new}=...)` can't work: these are two names for one thing, with two values. Write"
            f" `{new}=...` alone."
        )
    warnings.warn(
        f"`Trainer({old}=...)` is the old name of `{new}`. Write `Trainer({new}=...)`.",
        DeprecationWarning,
        stacklevel=3,
    )
    return old_value


def default_collator(processing_class: Processor | None) -> Collator:
    """The default collator, which pads if there is a tokenizer or feature extractor to pad with."""
    if isinstance(processing_class, PreTrainedTokenizerBase | SequenceFeatureExtractor):
        return DataCollatorWithPadding(processing_class)  # type: ignore[arg-type]
    return default_data_collator
