"""`SFTConfig`: the arguments of a run of `SFTTrainer`, with the fields and defaults of trl."""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers

from trainfn.hf._arguments._legacy import warn
from trainfn.hf._arguments._training import TrainingArguments
from trainfn.hf._types import Values


def _field(default: Any, says: str, **metadata: object) -> Any:
    return dataclasses.field(default=default, metadata={"help": says, **metadata})


@dataclasses.dataclass(repr=False)
class SFTConfig(TrainingArguments):
    """The arguments of a run of `SFTTrainer`: `TrainingArguments`, and those that prepare rows, with trl's defaults.

    ========================= ============================ ===========================================================
    field                     default                      meaning
    ========================= ============================ ===========================================================
    ``learning_rate``         2e-5                         5e-5 in `TrainingArguments`
    ``logging_steps``         10                           500 in `TrainingArguments`
    ``gradient_checkpointing`` True                        False in `TrainingArguments`
    ``bf16``                  True on an accelerator       False in `TrainingArguments`; a CPU run is float32 and warns
    ``max_length``            1024                         longer rows are cut; the length of packs
    ``dataset_text_field``    ``"text"``                   the column with the text
    ``packing``               False                        several rows in one, none of which sees another
    ``packing_strategy``      ``"bfd"``                    ``"bfd_split"`` keeps cut rests; ``"wrapped"`` cuts anywhere
    ``padding_free``          False                        a batch is one long row
    ``pad_to_multiple_of``    ``"auto"``                   64 where the step is compiled: few shapes
    ``completion_only_loss``  None                         learn completions only; by default if rows have one
    ``assistant_only_loss``   False                        learn the assistant's messages only
    ``loss_type``             ``"nll"``                    or ``"dft"``, https://arxiv.org/abs/2508.05629
    ========================= ============================ ===========================================================

    Raises:
        ValueError: If a value is invalid, or trainfn does not support it.

    >>> SFTConfig("runs/sft", use_cpu=True, max_length=512).learning_rate
    2e-05
    """

    _VALID_DICT_FIELDS = [*transformers.TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "dataset_kwargs"]  # noqa: RUF012

    learning_rate: float = _field(2e-5, "The initial learning rate.")
    logging_steps: float = _field(10, "Updates between two logs; below 1, a share of the run.")
    gradient_checkpointing: bool | None = _field(True, "Compute activations again in the backward pass: less memory.")
    bf16: bool | None = _field(  # type: ignore[assignment]
        None, "bfloat16 autocast; by default on an accelerator."
    )

    model_init_kwargs: Values | str | None = dataclasses.field(
        default=None, metadata={"help": "Keywords of `from_pretrained`, for a model's name."}
    )
    trust_remote_code: bool = _field(False, "Whether code that comes with a model may run.")
    router_aux_loss_coef: float | None = _field(
        None, "Weight of the load-balancing loss of a mixture of experts; by default that of the model's config."
    )
    chat_template_path: str | None = _field(None, "A Jinja file, or a tokenizer whose template to take.")

    dataset_text_field: str = _field("text", "The column with the text.")
    dataset_kwargs: Values | str | None = dataclasses.field(
        default=None, metadata={"help": "Only {'skip_prepare_dataset': True}."}
    )
    dataset_num_proc: int | None = _field(None, "Processes that prepare the rows.")
    eos_token: str | None = _field(None, "Ends a row; the tokenizer's own by default.")
    max_length: int | None = _field(1024, "Longer rows are cut; the length of packs.")
    truncation_mode: str = _field("keep_start", "The end of a long row to keep.", choices=["keep_start", "keep_end"])
    shuffle_dataset: bool = _field(False, "Whether to shuffle rows before they are packed.")
    packing: bool = _field(False, "Whether to put several rows in one.")
    packing_strategy: str = _field(
        "bfd", "How to put rows in one.", choices=["bfd", "bfd_split", "wrapped", "bfd-requeue"]
    )
    padding_free: bool = _field(False, "Whether a batch is one long row, without padding.")
    pad_to_multiple_of: int | str | None = _field("auto", "Pad to a multiple of this.")
    eval_packing: bool | None = _field(None, "Whether to pack the evaluation's rows; by default as `packing`.")

    completion_only_loss: bool | None = _field(None, "Learn completions only; by default where there are any.")
    assistant_only_loss: bool = _field(False, "Learn the assistant's messages only.")
    loss_type: str = _field("nll", "'nll' or 'dft'.")
    activation_offloading: bool = _field(False, "Not available: see `activation_checkpointing_kwargs`.")

    pad_token: str | None = _field(None, "Old: set `tokenizer.pad_token`.")
    max_seq_length: int | None = _field(None, "Old: write `max_length`.")

    def __post_init__(self) -> None:
        """Check and complete the fields."""
        if self.bf16 is None:
            self.bf16 = not self.fp16 and self.device.type != "cpu"  # type: ignore[assignment]
            if self.device.type == "cpu" and not self.use_cpu:
                warn(
                    "`SFTConfig()`: its default is bfloat16, but there is no accelerator, so this run is in float32."
                    " Write `use_cpu=True` for a run on the CPU, or `bf16=True` for bfloat16 on the CPU.",
                    UserWarning,
                )
        if self.max_seq_length is not None:
            _renamed(f"max_seq_length={self.max_seq_length!r}", f"max_length={self.max_seq_length!r}")
            self.max_length, self.max_seq_length = self.max_seq_length, None
        for (field, old), new in _RENAMED.items():
            if getattr(self, field) == old:
                _renamed(f"{field}={old!r}", f"{field}={new!r}")
                setattr(self, field, new)
        if isinstance(self.pad_to_multiple_of, str) and self.pad_to_multiple_of.isdigit():
            self.pad_to_multiple_of = int(self.pad_to_multiple_of)  # from a command line
        super().__post_init__()
        check(self)

    @property
    def packs_eval(self) -> bool:
        """Whether the evaluation's rows are packed."""
        return self.packing if self.eval_packing is None else self.eval_packing

    @property
    def masks(self) -> tuple[str, ...]:
        """The columns of rows of tokens that say which tokens are learnt."""
        completion = () if self.completion_only_loss is False else ("completion_mask",)
        return (*completion, "assistant_masks")

    @property
    def multiple_of(self) -> int:
        """The number of tokens of which the length of a batch is a multiple."""
        if self.pad_to_multiple_of == "auto":
            return 64 if self.torch_compile or self.device.type != "cpu" else 1
        return int(self.pad_to_multiple_of or 1)


def check(args: SFTConfig) -> None:
    """Raise if a value is invalid, or not supported together with another.

    Raises:
        ValueError: If one is.
    """
    for field, allowed in _CHOICES.items():
        _allowed(args, field, allowed)
    for field, others in (("max_length", (None,)), ("pad_to_multiple_of", (None, "auto"))):
        value = getattr(args, field)
        if value not in others and (not isinstance(value, int) or value < 1):
            _refuse(field, value, "it is a number of tokens, 1 or more", f"Write `{field}=1024`, or None")
    if args.max_length is None and (args.packing or args.packs_eval):
        _refuse("packing", True, "with `max_length=None`, packs have no length", "Write `max_length=1024`")
    for name in (args.dataset_kwargs or {}) if isinstance(args.dataset_kwargs, dict) else ():
        if name != "skip_prepare_dataset":
            _refuse("dataset_kwargs", args.dataset_kwargs, f"{name!r} is unknown", _KWARGS)
    if args.activation_offloading:
        _refuse("activation_offloading", True, "a compiled step has no hooks on single tensors", _OFFLOAD)
    if args.loss_type == "dft" and (args.use_liger_kernel or args.label_smoothing_factor):
        other = "use_liger_kernel" if args.use_liger_kernel else "label_smoothing_factor"
        _refuse("loss_type", "dft", f"`{other}` is another loss", f"Leave `{other}` out, or write `loss_type='nll'`")


_CHOICES = {
    "truncation_mode": ("keep_start", "keep_end"),
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "loss_type": ("nll", "dft"),
}
_RENAMED = {("packing_strategy", "bfd-requeue"): "bfd_split", ("loss_type", "chunked_nll"): "nll"}
"""The old values of fields in trl, and the same ones today."""
_KWARGS = "Leave it out, or write `dataset_kwargs={'skip_prepare_dataset': True}`"
_OFFLOAD = "Write `gradient_checkpointing_kwargs={'offload': True}`, which keeps activations on the host"


def _allowed(args: SFTConfig, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(args, field)
    if value not in allowed:
        _refuse(field, value, f"it is not one of {', '.join(map(repr, allowed))}", f"Write `{field}={allowed[0]!r}`")


def _refuse(field: str, value: object, why: str, write: str) -> None:
    raise ValueError(f"`SFTConfig({field}={value!r})` can't work: {why}. {write}.")


def _renamed(old: str, new: str) -> None:
    warn(f"`SFTConfig({old})` is of an old version of trl: write `{new}`.", DeprecationWarning)
