"""The model, the tokenizer and the adapters that `SFTTrainer` loads, and arguments of other classes and versions."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trainfn.errors import nearest
from trainfn.hf._sft._config import SFTConfig, check
from trainfn.hf._types import Processor, Values

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin

OLD = {
    "dataset_text_field": "dataset_text_field",
    "max_seq_length": "max_length",
    **{name: name for name in ("packing", "eval_packing", "dataset_num_proc", "dataset_kwargs", "model_init_kwargs")},
    "neftune_noise_alpha": "neftune_noise_alpha",
}
"""Arguments of old versions of `trl.SFTTrainer`, and the fields of `SFTConfig` that replace them."""
GONE = ("dataset_batch_size", "num_of_sequences", "chars_per_token", "infinite")


def arguments(model: str | Path | nn.Module, args: transformers.TrainingArguments | None, old: Values) -> SFTConfig:
    """Return an `SFTConfig` from the given arguments, also from those of `TrainingArguments` and old versions.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an old and a new argument disagree.
    """
    name = str(model) if isinstance(model, str | Path) else getattr(getattr(model, "config", None), "_name_or_path", "")
    made = SFTConfig(f"{Path(name).name or 'model'}-SFT") if args is None else _converted(args)
    if not old:
        return made
    made = copy.copy(made)
    for given, value in old.items():
        if given in GONE:
            warnings.warn(
                f"SFTTrainer({given}={value!r}) is an argument of an old version of trl. Leave it out: rows are counted"
                " exactly.",
                DeprecationWarning,
                stacklevel=3,
            )
            continue
        if given not in OLD:
            raise TypeError(
                f"SFTTrainer({given}=...): there is no such argument."
                f" {_where(given) or nearest(given, [*_ARGUMENTS, *OLD], 'Did you mean `{}`?') or 'Leave it out.'}"
            )
        _set(made, given, value, stated=isinstance(args, SFTConfig))
    check(made)
    return made


_ARGUMENTS = ("model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "peft_config",
              "compute_loss_func", "compute_metrics", "callbacks", "optimizers", "formatting_func")  # fmt: skip


def _where(name: str) -> str:
    return f"It belongs to `SFTConfig({name}=...)`." if name in SFTConfig.__dataclass_fields__ else ""


def _set(args: SFTConfig, given: str, value: object, *, stated: bool) -> None:
    field = OLD[given]
    held, default = getattr(args, field), SFTConfig.__dataclass_fields__[field].default
    if stated and held not in (default, value):
        raise ValueError(
            f"`SFTTrainer({given}={value!r})` and `SFTConfig({field}={held!r})` have different values. Write"
            f" `SFTConfig({field}=...)` alone."
        )
    warnings.warn(
        f"SFTTrainer({given}={value!r}) is an argument of an old version of trl: write `SFTConfig({field}={value!r})`.",
        DeprecationWarning,
        stacklevel=4,
    )
    setattr(args, field, value)


def _converted(args: transformers.TrainingArguments) -> SFTConfig:
    """Return an `SFTConfig` with the values of other arguments, their defaults included."""
    if isinstance(args, SFTConfig):
        return args
    if not isinstance(args, transformers.TrainingArguments):
        raise TypeError(
            f"SFTTrainer(args={type(args).__name__}): an `SFTConfig` or `TrainingArguments` is needed. Check the order"
            " of the arguments: `SFTTrainer(model, args, data_collator, train_dataset)`."
        )
    known = {name for name, field in SFTConfig.__dataclass_fields__.items() if field.init}
    fields: Values = {name: value for name, value in args.to_dict().items() if name in known}
    # `to_dict` hides all tokens, `eos_token` too.
    fields |= {name: getattr(args, name) for name in fields if name.endswith("_token")}
    return SFTConfig(**fields)


# --- the model --------------------------------------------------------------------------------------------------------


def model_of(
    model: str | Path | nn.Module,
    args: SFTConfig,
    quantization_config: QuantizationConfigMixin | None,
    peft_config: object | None,
) -> nn.Module:
    """Return the model, loaded if it is a name or a folder; with adapters, if ``peft_config`` is given.

    Raises:
        ValueError: If options for loading are given with a loaded model.
        ImportError: If adapters need a package that is not installed.
    """
    options = dict(args.model_init_kwargs) if isinstance(args.model_init_kwargs, dict) else {}
    if isinstance(model, str | Path):
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        # Without a dtype, `from_pretrained` takes that of the file, and 16-bit parameters lose small updates.
        options = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, **options}
        model = AutoModelForCausalLM.from_pretrained(str(model), **options)
    elif options or quantization_config is not None:
        which = "SFTConfig(model_init_kwargs=...)" if options else "SFTTrainer(quantization_config=...)"
        raise ValueError(
            f"`{which}` is for loading a model, but {type(model).__name__} is loaded already. Pass its name,"
            " `SFTTrainer(model='name')`, or pass the options to `from_pretrained`."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"SFTTrainer(model={type(model).__name__}): a causal language model is needed, and this one has an encoder."
            " Load another: `AutoModelForCausalLM.from_pretrained(name)`; or train this one with `Seq2SeqTrainer`."
        )
    return model if peft_config is None else _adapted(model, args, peft_config)


def _adapted(model: nn.Module, args: SFTConfig, peft_config: object) -> nn.Module:
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            f"SFTTrainer(peft_config={type(peft_config).__name__}): adapters need the package peft, which is not"
            " installed. Run `pip install peft`, or leave `peft_config` out to train all parameters."
        )
    peft: Any = importlib.import_module("peft")
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(
            f"SFTTrainer(peft_config={type(peft_config).__name__}): a configuration of peft is needed. Write"
            " `peft_config=peft.LoraConfig(r=8, target_modules='all-linear')`."
        )
    if isinstance(model, peft.PeftModel):
        raise ValueError(
            "SFTTrainer(model=PeftModel, peft_config=...): the model has adapters already. Leave `peft_config` out."
        )
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with torch.random.fork_rng(devices=[]):  # adapters start at random values, which depend on the seed alone
        torch.manual_seed(args.seed)
        return peft.get_peft_model(model, peft_config)


def balance_experts(model: nn.Module, args: SFTConfig) -> float:
    """Let a mixture of experts return its load-balancing loss, and return the coefficient; 0 for a dense model.

    Raises:
        ValueError: If a dense model is given a coefficient.
    """
    text, given = _text_config(model), args.router_aux_loss_coef
    if not hasattr(text, "output_router_logits"):
        if given:
            raise ValueError(
                f"`SFTConfig(router_aux_loss_coef={given!r})` can't work with {type(model).__name__}: it is not a"
                " mixture of experts that returns its router's logits, so it has no auxiliary loss. Leave the argument"
                " out."
            )
        return 0.0
    assert text is not None
    coefficient = float(getattr(text, "router_aux_loss_coef", 0.0) if given is None else given)
    text.output_router_logits = coefficient != 0
    text.router_aux_loss_coef = coefficient
    return coefficient


def _text_config(model: nn.Module) -> transformers.PreTrainedConfig | None:
    """The configuration of the language model, which a model of images and text has inside its own."""
    get_text_config = getattr(getattr(model, "config", None), "get_text_config", None)
    return None if get_text_config is None else get_text_config()


def match_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> None:
    """Set the tokenizer's padding token, and an end token that the arguments name, in the model's configurations.

    Generation ends at any of several tokens, so a new end token is added to those of the generation's configuration.
    """
    text, generation = _text_config(model), getattr(model, "generation_config", None)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    for config in (text, generation):
        if config is not None:
            config.pad_token_id = pad
    if args.eos_token is None:
        return
    if text is not None:
        text.eos_token_id = end
    if generation is not None:
        held = generation.eos_token_id
        ends = [] if held is None else [held] if isinstance(held, int) else list(held)
        if end not in ends:
            generation.eos_token_id = [end, *ends]


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def tokenizer_of(model: nn.Module, args: SFTConfig, given: Processor | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with the tokens and the chat template of the arguments.

    Raises:
        ValueError: If no tokenizer is found, or it lacks these tokens.
        TypeError: If ``given`` is not a tokenizer.
    """
    tokenizer = _loaded(model, args) if given is None else given
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"SFTTrainer(processing_class={type(tokenizer).__name__}): a tokenizer is needed, because SFTTrainer trains"
            " on text alone. Pass `processing_class=processor.tokenizer`."
        )
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(
                f"`SFTConfig({name}={token!r})` can't work: the tokenizer does not know it. Name a token that it knows,"
                f" or add this one: `tokenizer.add_special_tokens({{{name!r}: {token!r}}})`, then"
                " `model.resize_token_embeddings(len(tokenizer))`."
            )
        setattr(tokenizer, name, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(
            "SFTTrainer: the tokenizer has no `pad_token` and no `eos_token`, so rows can't be padded. Write"
            " `tokenizer.pad_token = '<pad>'`, with a token that it knows."
        )
    if args.chat_template_path is not None:
        tokenizer.chat_template = _template(args.chat_template_path, tokenizer)
    return tokenizer


def _loaded(model: nn.Module, args: SFTConfig) -> PreTrainedTokenizerBase:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        if not name:
            raise OSError("the model's configuration has no name or path")
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"SFTTrainer(model={name or type(model).__name__!r}): no tokenizer was found for it ({error}). Pass one:"
            " `processing_class=AutoTokenizer.from_pretrained(name)`."
        ) from error


def _template(path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if path.endswith((".jinja", ".j2")) and Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    other = AutoTokenizer.from_pretrained(path)
    if not other.chat_template:
        raise ValueError(
            f"`SFTConfig(chat_template_path={path!r})` can't work: that tokenizer has no chat template. Name a Jinja"
            " file, `template.jinja`, or a tokenizer that has one."
        )
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in other.get_added_vocab() if token not in vocabulary and token in other.chat_template]
    if missing:
        raise ValueError(
            f"`SFTConfig(chat_template_path={path!r})` can't work: its template has the tokens {missing}, which this"
            " model lacks. Add them first: `tokenizer.add_tokens([...], special_tokens=True)`, then"
            " `model.resize_token_embeddings(len(tokenizer))`."
        )
    return str(other.chat_template)
