"""The parts of a Trainer that are made when it is constructed, and their checks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    default_data_collator,
)
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import TrainerMemoryTracker, align_special_tokens
from transformers.utils import is_liger_kernel_available

from trainfn.hf._step._counting import base_of
from trainfn.hf._types import Collator, Processor, TrainerLike, Trial

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

T = TypeVar("T")


def defaults(trainer: TrainerLike, model_init: Callable[..., nn.Module] | None) -> None:
    """Set the attributes that a Trainer begins with, under the names that transformers gives them."""
    args = trainer.args
    trainer.model_init = model_init
    trainer.state, trainer.control = TrainerState(), TrainerControl()
    trainer.is_in_train = trainer.is_model_parallel = trainer.is_distributed_loading_by_transformers = False
    trainer.place_model_on_device = True if args.place_model_on_device is None else args.place_model_on_device
    trainer._signature_columns = None  # subclasses of transformers' Trainer fill this in
    trainer._train_batch_size, trainer.current_flos = args.train_batch_size, 0
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    trainer._memory_tracker, trainer._created_lr_scheduler = TrainerMemoryTracker(args.skip_memory_metrics), False
    trainer.hp_name = trainer.hp_search_backend = trainer.deepspeed = None
    trainer.neftune_noise_alpha = args.neftune_noise_alpha
    trainer.hub_model_id = trainer.push_in_progress = None


def first_model(trainer: TrainerLike, model: nn.Module | None) -> nn.Module:
    """The first model: ``model``, or one that ``model_init`` makes."""
    model_init = trainer.model_init
    if (model is None) == (model_init is None):
        raise ValueError(
            "`Trainer(model=..., model_init=...)` can't work with both or neither: exactly one of the two gives the"
            " model. Write `Trainer(model)`, or `Trainer(model_init=lambda: MyModel(...))`."
        )
    if model is None:
        return made_model(trainer, None)
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
    return model


def align_tokens(trainer: TrainerLike) -> None:
    """Set the tokenizer's first, end and padding tokens in the model's configurations, where they differ.

    They are saved with the model, so the text that it generates later ends where training ended it.
    """
    held, configured = trainer.processing_class, getattr(trainer.model, "config", None)
    if isinstance(held, PreTrainedTokenizerBase | ProcessorMixin) and isinstance(configured, PreTrainedConfig):
        align_special_tokens(trainer.model, held)


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


def made_model(trainer: TrainerLike, trial: Trial | None) -> nn.Module:
    """A seeded model of `Trainer.call_model_init`; the global generator keeps its state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.args.seed)
        return trainer.call_model_init(trial)


def called(model_init: Callable[..., nn.Module] | None, trial: Trial | None) -> nn.Module:
    """The model that ``model_init`` returns; it may take a trial."""
    assert model_init is not None
    parameters = inspect.signature(model_init).parameters.values()
    takes = sum(each.kind not in (each.KEYWORD_ONLY, each.VAR_KEYWORD) for each in parameters)
    if takes > 1:
        raise ValueError(
            f"`Trainer(model_init=...)` can't work: the function has {takes} parameters, and it is called with"
            " nothing or a trial. Write `model_init=lambda: MyModel(...)`."
        )
    model: nn.Module | None = model_init(trial) if takes else model_init()
    if model is None:
        raise RuntimeError(
            "`Trainer(model_init=...)` can't work: model_init should not return None. Write `return model` at its end."
        )
    return model


def move(model: nn.Module, device: torch.device) -> None:
    """Move a model, unless it is spread over devices, or its weights are packed in a format that can't be moved."""
    packed = str(getattr(getattr(model, "quantization_method", None), "value", "")) == "bitsandbytes"
    if getattr(model, "hf_device_map", None) is None and not packed:
        model.to(device)


def placed(trainer: TrainerLike) -> None:
    """Move the model to its device, unless `place_model_on_device` is False."""
    if trainer.place_model_on_device:
        trainer._move_model_to_device(trainer.model, trainer.args.device)


def new_model(trainer: TrainerLike) -> None:
    """Give the Trainer a new model of its ``model_init``, and forget what was found out about the old one."""
    record = trainer._trainfn
    trial = None if record.search is None else record.search.trial
    trainer.model = trainer.model_wrapped = made_model(trainer, trial)
    placed(trainer)
    record.shifts = record.divisor = record.parameter_count = trainer._signature_columns = None
    record.examined, record.trials = False, 0
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


def validate(trainer: TrainerLike) -> None:
    """Raise for arguments of a Trainer that can't work together."""
    args = trainer.args
    best = "save_strategy='best'" if args.save_strategy == "best" else "load_best_model_at_end=True"
    if (args.save_strategy == "best" or args.load_best_model_at_end) and args.metric_for_best_model is None:
        raise ValueError(
            f"`TrainingArguments({best})` can't work: `args.metric_for_best_model` must be provided, for it says which"
            ' checkpoint is the best. Write `metric_for_best_model="loss"`.'
        )
