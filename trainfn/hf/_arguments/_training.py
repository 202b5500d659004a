"""`TrainingArguments`: transformers' own, with the old names, on any machine, and without side effects."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import os
from collections.abc import Generator, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from accelerate import PartialState
from transformers.training_args import ParallelMode

from trainfn.errors import nearest
from trainfn.hf._arguments._legacy import RULES, Collect, options, translate, warn
from trainfn.hf._installed import RENAMED, Arguments, same_names
from trainfn.hf._parallel import _layout
from trainfn.hf._parallel._accelerator import state_alone
from trainfn.hf._parallel._layout import is_joined
from trainfn.hf._types import Values

T = TypeVar("T")


class _NoArgument(AttributeError):
    """An unknown argument. The nearest name is looked up when the message is shown, because `hasattr` calls often."""

    def __init__(self, kind: str, wrong: str, known: Iterable[str]) -> None:
        super().__init__()
        self.kind, self.wrong, self.known = kind, wrong, known

    def __str__(self) -> str:
        near = nearest(self.wrong, self.known, "Did you mean `{}`?")
        return f"`{self.kind}` has no argument {self.wrong!r}. {near}".rstrip()


class _Named(type):
    """A class whose call takes old names and ``...``, and reports the nearest name of an unknown one.

    The metaclass does it, because a user's dataclass that inherits from ours has an ``__init__`` of its own.
    """

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:  # type: ignore[misc]
        """Make the arguments."""
        fields = _fields(cls)
        # A parser passes every field, so only in a call by hand is torch_compile=False a decision.
        by_hand = "torch_compile" in kwargs and "legacy_arguments" not in kwargs
        parsed = kwargs.pop("legacy_arguments", None)
        old = {name: kwargs[name] for name in kwargs if name in RULES and name not in fields}
        given = {name: value for name, value in kwargs.items() if name not in old}
        old = {name: value for name, value in old.items() if value is not None}  # None means "not given" there
        for name in given:
            if name not in fields:
                raise TypeError(
                    f"`{cls.__name__}({name}={given[name]!r})` can't work: there is no such argument."
                    f" {nearest(name, [*fields, *RULES], 'Did you mean `{}`?', otherwise='Leave it out.')}"
                )
        stated = given
        if parsed:  # a command line passes all fields, those that were not written with their defaults
            stated = {name: value for name, value in given.items() if value and value != _default(fields[name])}
        old |= parsed or {}
        made = type.__call__(cls, *(a for a in args if a is not ...), **translate(given, stated, old))
        made.__dict__["torch_compile_given"] = by_hand or bool(getattr(made, "torch_compile", False))
        # transformers restores no state by default; here False must be written, for a resumed run goes on as before.
        kept = "restore_callback_states_from_checkpoint"
        given_by_hand = kept in kwargs and "legacy_arguments" not in kwargs
        made.__dict__["restores_callbacks"] = bool(getattr(made, kept)) or not given_by_hand
        made.__dict__["_old"] = {name: value for name, value in old.items() if RULES[name].new is None}
        return made

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of ``__init__``, which a metaclass would hide."""
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def _fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _default(field: dataclasses.Field[Any]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _old_options(names: set[str]) -> Any:
    """The one field through which a parser learns the old names. It is None once the arguments are made."""
    metadata = {"help": argparse.SUPPRESS, "aliases": options(names), "action": Collect, "nargs": "?", "const": True}
    return dataclasses.field(default=None, repr=False, compare=False, kw_only=True, metadata=metadata)


@dataclasses.dataclass(repr=False)
class TrainingArguments(Arguments, metaclass=_Named):
    """The arguments of a `Trainer`: all fields of `transformers.TrainingArguments`, with their defaults.

    It differs from that class in these points:

    ========================= ==============================================================================
    here                      there
    ========================= ==============================================================================
    old names still work      ``evaluation_strategy``, ``no_cuda``, … are unknown
    no side effects           starts process groups, resets Accelerate's state, sets TF32 for all of torch; here the
                              processes find each other in `main_process_first` or `distributed_state`, or when a
                              Trainer is made
    ``bf16=True`` on a CPU    an error, unless ``use_cpu=True``
    ``log_level="info"``      ``"passive"``
    ``...`` for "defaults"    ``output_dir``
    one device                all GPUs of the machine, through ``DataParallel``
    ``deepspeed=`` is a plan  DeepSpeed's engine. ``"auto"`` is filled in as there, numbers that differ are an error;
                              gradients are clipped at ``max_grad_norm``, whether the configuration says so or not
    ========================= ==============================================================================

    Raises:
        TypeError: If a name is unknown; the nearest one is in the message.
        ValueError: If a value is impossible, or an old and a new name disagree.

    >>> TrainingArguments(learning_rate=2e-5, use_cpu=True).output_dir
    'trainer_output'
    """

    if TYPE_CHECKING:
        output_dir: str = "trainer_output"  # type: ignore[assignment]  # it is None until `__post_init__` only

    # The documentation of the Trainer promises INFO for the main process, and WARNING for the others. The
    # default in transformers, "passive", follows the level that the application has set, or else is WARNING.
    log_level: str = dataclasses.field(
        default="info",
        metadata=dict(transformers.TrainingArguments.__dataclass_fields__["log_level"].metadata),
    )
    data_order: str = dataclasses.field(
        default="trainfn",
        kw_only=True,
        metadata={"help": "The order of training rows: 'trainfn', or 'transformers' to compare runs loss by loss."},
    )
    legacy_arguments: str | None = _old_options(set(RULES))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass may have a field of its own with an old name; then the name is that field's."""
        super().__init_subclass__(**kwargs)
        own = set(RULES) & set(inspect.get_annotations(cls))
        if own:
            cls.legacy_arguments = _old_options(set(RULES) - own)
            cls.__annotations__["legacy_arguments"] = "str | None"

    def __getattr__(self, name: str) -> Any:
        """Read a field under its old name."""
        rule = RULES.get(name)
        if rule is None:
            raise _NoArgument(type(self).__name__, name, self.__dataclass_fields__)
        return getattr(self, rule.new) if rule.new else self.__dict__.get("_old", {}).get(name)

    def __post_init__(self) -> None:
        """Check and complete the fields."""
        same_names(self)
        if self.report_to is None:
            self.report_to = "none"
        if self.hub_token == "<HUB_TOKEN>":  # arguments that come from `to_dict`, which masks the token
            self.hub_token = None
        if self.torch_compile_mode is not None or self.torch_compile_backend is not None:
            self.torch_compile = True
        _allow_every_strategy(self)
        with _held_back(self):
            super().__post_init__()
        if self.torch_compile and self.torch_compile_backend is None:
            self.torch_compile_backend = "inductor"
        if self.bf16:
            self.mixed_precision = "bf16"
            _explain_bf16(self)

    @cached_property
    def _setup_devices(self) -> torch.device:
        # In transformers this joins the processes. Here it makes Accelerate's state of one process.
        device = self._found_device()
        if self.world_size == 1:
            vars(self)["distributed_state"] = state_alone(device)
        return device

    def _found_device(self) -> torch.device:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if self.use_cpu or accelerator is None or _flag("ACCELERATE_USE_CPU"):
            self._n_gpu = 0
            return torch.device("cpu")
        self._n_gpu = 1  # one process trains on one device; batch sizes are per device
        if accelerator.type == "mps":
            return accelerator
        return torch.device(accelerator.type, self.local_process_index)

    @property
    def distributed_state(self) -> PartialState:  # type: ignore[override]
        """Accelerate's state of the processes; if there are several, they join each other here."""
        _ = self.device
        if self.__dict__.get("distributed_state") is None:
            _layout.meet(self)
        return self.__dict__["distributed_state"]

    @distributed_state.setter
    def distributed_state(self, value: PartialState) -> None:
        vars(self)["distributed_state"] = value

    @property
    def world_size(self) -> int:
        """The number of processes, as their launcher set it in the environment."""
        return torch.distributed.get_world_size() if is_joined() else _integer("WORLD_SIZE", 1)

    @property
    def process_index(self) -> int:
        """The number of this process among all, as the launcher set it; 0 without one."""
        return torch.distributed.get_rank() if is_joined() else _integer("RANK", 0)

    @property
    def local_process_index(self) -> int:
        """The number of this process on its machine, as the launcher set it; 0 without one."""
        return _integer("LOCAL_RANK", max(self.local_rank, 0))

    @property
    def parallel_mode(self) -> ParallelMode:
        """``DISTRIBUTED`` if there are several processes; one process trains on one device."""
        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    def get_process_log_level(self) -> int:
        """The level for this process: ``log_level`` on the main process, ``log_level_replica`` on the others.

        With ``log_on_each_node`` every machine has a main process; otherwise one machine has it. ``"passive"`` leaves
        the level as the application set it.

        >>> TrainingArguments(use_cpu=True).get_process_log_level()  # logging.INFO
        20
        """
        name = self.log_level if self.should_log else self.log_level_replica
        if name == "passive":
            return transformers.logging.get_verbosity()
        return transformers.logging.get_log_levels_dict()[name]

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Generator[None]:
        """Let the main process run a block before the others; with one process it does nothing.

        The processes join each other here, if they have not done so before.

        Args:
            local: Whether each machine has a main process, or there is one in all.
            desc: A name for the block, for readers of the code.
        """
        first = (self.local_process_index if local else self.process_index) == 0
        joined = self.world_size > 1
        if joined and not is_joined():
            _layout.meet(self)
        # One barrier in all: the others enter it before the block, and the main process after it. The main process does
        # so after an error too, else the others would wait for ever.
        if joined and not first:
            torch.distributed.barrier()
        try:
            yield
        finally:
            if joined and first:
                torch.distributed.barrier()

    def set_training(self, *args: Any, **kwargs: Any) -> TrainingArguments:
        """Set the arguments of a training as in transformers, and renamed fields under both names."""
        before = {name: getattr(self, name) for name in RENAMED.values()}
        super().set_training(*args, **kwargs)
        for old, new in RENAMED.items():
            if getattr(self, new) == before[new]:  # a transformers that knows only the old name
                setattr(self, new, getattr(self, old))
        return self

    @contextlib.contextmanager
    def matmul_precision(self) -> Generator[None]:
        """Set TF32 to the field ``tf32`` for a block; None keeps torch's setting."""
        if self.tf32 is None:
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def to_dict(self) -> Values:
        """All fields as plain values, with tokens masked; ``TrainingArguments(**…)`` takes them."""
        fields = super().to_dict()
        ours = {"legacy_arguments": fields.get("legacy_arguments"), "data_order": "trainfn"}
        return {name: value for name, value in fields.items() if name not in ours or value != ours[name]}

    def __repr__(self) -> str:
        shown = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{shown})"

    __str__ = __repr__


@dataclasses.dataclass(repr=False)
class Seq2SeqTrainingArguments(TrainingArguments, transformers.Seq2SeqTrainingArguments):  # type: ignore[misc]
    """The arguments of a `Seq2SeqTrainer`: `TrainingArguments`, and how to generate.

    >>> Seq2SeqTrainingArguments(predict_with_generate=True, use_cpu=True).generation_max_length is None
    True
    """


def _allow_every_strategy(args: TrainingArguments) -> None:
    """Ask for FSDP's version 1 where transformers knows a strategy only there; here the versions are the same."""
    items = args.fsdp.split() if isinstance(args.fsdp, str) else args.fsdp if isinstance(args.fsdp, list) else []
    old = {"no_shard", "hybrid_shard", "hybrid_shard_zero2"} & {str(getattr(x, "value", x)).lower() for x in items}
    if old and (args.fsdp_config is None or isinstance(args.fsdp_config, dict)):
        args.fsdp_config = {"version": 1, **(args.fsdp_config or {})}


@contextlib.contextmanager
def _held_back(args: TrainingArguments) -> Generator[None]:
    """Hide fields from transformers' checks, where these would change torch or require a machine.

    For TF32 and torch.compile the checks set TF32 for the process, and DeepSpeed registers itself globally. On a CPU
    they refuse bf16, although torch's autocast supports it there.
    """
    neutral: Values = {"tf32": None, "torch_compile": False, "deepspeed": None}
    neutral |= {"torch_compile_mode": None, "torch_compile_backend": None}
    if args.fp16 and args.bf16:
        raise ValueError(
            f"`{type(args).__name__}(fp16=True, bf16=True)` can't work: a run has one of the two. Write `bf16=True`."
        )
    if args.fp16_full_eval and args.bf16_full_eval:
        raise ValueError(
            f"`{type(args).__name__}(fp16_full_eval=True, bf16_full_eval=True)` can't work: an evaluation has one of"
            " them. Write `bf16_full_eval=True`."
        )
    if args.device.type == "cpu":
        neutral |= {"bf16": False, "bf16_full_eval": False}
    # With `fsdp` the checks set the first for the whole process; where the second is set, they require the package.
    variables = ("FSDP_CPU_RAM_EFFICIENT_LOADING", "ACCELERATE_USE_DEEPSPEED")
    kept, before = {name: getattr(args, name) for name in neutral}, {name: os.environ.get(name) for name in variables}
    os.environ.pop(variables[1], None)
    for name, value in neutral.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)
        for name, text in before.items():
            if text is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = text


def _explain_bf16(args: TrainingArguments) -> None:
    if args.device.type == "cpu" and not args.use_cpu:
        warn(
            f"`{type(args).__name__}(bf16=True)`: there is no accelerator here, so the autocast to bfloat16 runs on"
            " the CPU, which is correct but seldom faster. Write `use_cpu=True` if you mean that, or `bf16=False`.",
            UserWarning,
        )


def _integer(variable: str, default: int) -> int:
    return int(os.environ.get(variable) or default)


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
