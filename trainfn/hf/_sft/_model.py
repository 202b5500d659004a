"""What `SFTTrainer` is given by name: the model, its tokenizer, adapters; and arguments of another class or age."""

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
"""Arguments of old versions of `trl.SFTTrainer`, and the fields of `SFTConfig` that they became."""
GONE = ("dataset_batch_size", "num_of_sequences", "chars_per_token", "infinite")


def arguments(model: str | Path | nn.Module, args: transformers.TrainingArguments | None, old: Values) -> SFTConfig:
    """An `SFTConfig`, from whatever arguments were given.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If old and new ones disagree.
    """
    name = str(model) if isinstance(model, str | Path) else getattr(getattr(model, "config", None), "_name_or_path", "")
    made = SFTConfig(f"{Path(name).name or 'model'}-SFT") if args is None else _converted(args)
    if not old:
        return made
    made = copy.copy(made)
    for given, value in old.items():
        if given in GONE:
            warnings.warn(
                f"SFTTrainer({given}={value!r}) is of an old version of trl: leave it out, rows are counted exactly.",
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
            f"`SFTTrainer({given}={value!r})` and `SFTConfig({field}={held!r})` say different things. Write"
            f" `SFTConfig({field}=...)` alone."
        )
    warnings.warn(
        f"SFTTrainer({given}={value!r}) is of an old version of trl: write `SFTConfig({field}={value!r})`.",
        DeprecationWarning,
        stacklevel=4,
    )
    setattr(args, field, value)


def _converted(args: transformers.TrainingArguments) -> SFTConfig:
    """Other arguments with the fields that an `SFTConfig` adds; what they say stays, defaults and all."""
    if isinstance(args, SFTConfig):
        return args
    if not isinstance(args, transformers.TrainingArguments):
        raise TypeError(
            f"SFTTrainer(args={type(args).__name__}): `SFTConfig` is needed, or `TrainingArguments`. Is the order of"
            " the arguments right? It is SFTTrainer(model, args, data_collator, train_dataset)."
        )
    known = {name for name, field in SFTConfig.__dataclass_fields__.items() if field.init}
    fields: Values = {name: value for name, value in args.to_dict().items() if name in known}
    fields["hub_token"] = args.hub_token  # `to_dict` hides it
    return SFTConfig(**fields)


# --- the model --------------------------------------------------------------------------------------------------------


def model_of(
    model: str | Path | nn.Module,
    args: SFTConfig,
    quantization_config: QuantizationConfigMixin | None,
    peft_config: object | None,
) -> nn.Module:
    """The model itself, from a name or a folder; with adapters, if there are to be any.

    Raises:
        ValueError: If options are for a model that is loaded already.
        ImportError: If adapters need a package that is not installed.
    """
    options = dict(args.model_init_kwargs) if isinstance(args.model_init_kwargs, dict) else {}
    if isinstance(model, str | Path):
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        # Without a dtype, from_pretrained takes that of the file; master weights in half precision lose small updates.
        options = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, **options}
        model = AutoModelForCausalLM.from_pretrained(str(model), **options)
    elif options or quantization_config is not None:
        which = "SFTConfig(model_init_kwargs=...)" if options else "SFTTrainer(quantization_config=...)"
        raise ValueError(
            f"`{which}` is for loading a model, and {type(model).__name__} is loaded already. Pass its name,"
            " `SFTTrainer(model='name')`, or give the options to `from_pretrained`."
        )
    return model if peft_config is None else _adapted(model, args, peft_config)


def _adapted(model: nn.Module, args: SFTConfig, peft_config: object) -> nn.Module:
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            f"SFTTrainer(peft_config={type(peft_config).__name__}): adapters are those of the package peft, which is"
            " not installed. Run `pip install peft`, or leave `peft_config` out to train all parameters."
        )
    peft: Any = importlib.import_module("peft")
    if isinstance(model, peft.PeftModel):
        raise ValueError(
            "SFTTrainer(model=PeftModel, peft_config=...): the model has adapters already. Leave `peft_config` out."
        )
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with torch.random.fork_rng(devices=[]):  # adapters begin at random: the same ones for a seed
        torch.manual_seed(args.seed)
        return peft.get_peft_model(model, peft_config)


def balance_experts(model: nn.Module, args: SFTConfig) -> None:
    """A mixture of experts gives its load-balancing loss, unless its coefficient is 0."""
    get_text_config = getattr(getattr(model, "config", None), "get_text_config", None)
    text = None if get_text_config is None else get_text_config()
    if text is not None and getattr(text, "output_router_logits", None) is not None:
        text.output_router_logits = args.router_aux_loss_coef != 0
        text.router_aux_loss_coef = args.router_aux_loss_coef


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def tokenizer_of(model: nn.Module, args: SFTConfig, given: Processor | None) -> PreTrainedTokenizerBase:
    """The tokenizer, with the tokens and the template that the arguments name.

    Raises:
        ValueError: If there is none, or it lacks them.
        TypeError: If it is something else.
    """
    tokenizer = _loaded(model, args) if given is None else given
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"SFTTrainer(processing_class={type(tokenizer).__name__}): a tokenizer is needed; models with images are"
            " not trained here. Pass `processing_class=processor.tokenizer` for text alone."
        )
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(
                f"`SFTConfig({name}={token!r})` can't work: the tokenizer does not know it. Choose one that it knows,"
                f" or add it: `tokenizer.add_special_tokens({{{name!r}: {token!r}}})`, then"
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
            raise OSError("the model does not say where it comes from")
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"SFTTrainer(model={name or type(model).__name__!r}): no tokenizer was found there ({error}). Pass one:"
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
