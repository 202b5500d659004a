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
from transformers.training_args import ParallelMode

from trainfn.errors import nearest
from trainfn.hf._arguments._legacy import RULES, Collect, options, translate, warn
from trainfn.hf._installed import RENAMED, Arguments, same_names
from trainfn.hf._parallel import _layout
from trainfn.hf._parallel._layout import is_joined
from trainfn.hf._types import Values

T = TypeVar("T")


class _NoArgument(AttributeError):
    """Says the nearest name when it is shown: `hasattr` asks often, and looks at no message."""

    def __init__(self, kind: str, wrong: str, known: Iterable[str]) -> None:
        super().__init__()
        self.kind, self.wrong, self.known = kind, wrong, known

    def __str__(self) -> str:
        near = nearest(self.wrong, self.known, "Did you mean `{}`?")
        return f"`{self.kind}` has no argument {self.wrong!r}. {near}".rstrip()


class _Named(type):
    """Calling the class takes old names and ``...``, and tells the nearest name of an unknown one.

    In the metaclass, for a user's own dataclass on top of ours has an ``__init__`` of its own.
    """

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:  # type: ignore[misc]
        """Make the arguments."""
        fields = _fields(cls)
        # A parser gives every field; who writes torch_compile=False by hand means it.
        by_hand = "torch_compile" in kwargs and "legacy_arguments" not in kwargs
        parsed = kwargs.pop("legacy_arguments", None)
        old = {name: kwargs[name] for name in kwargs if name in RULES and name not in fields}
        given = {name: value for name, value in kwargs.items() if name not in old}
        old = {name: value for name, value in old.items() if value is not None}  # None was their "not given"
        for name in given:
            if name not in fields:
                raise TypeError(
                    f"`{cls.__name__}({name}={given[name]!r})` can't work: there is no such argument."
                    f" {nearest(name, [*fields, *RULES], 'Did you mean `{}`?', otherwise='Leave it out.')}"
                )
        stated = given
        if parsed:  # from a command line, where what was not written is there too, with its default
            stated = {name: value for name, value in given.items() if value and value != _default(fields[name])}
        old |= parsed or {}
        made = type.__call__(cls, *(a for a in args if a is not ...), **translate(given, stated, old))
        made.__dict__["torch_compile_given"] = by_hand or bool(getattr(made, "torch_compile", False))
        made.__dict__["_old"] = {name: value for name, value in old.items() if RULES[name].new is None}
        return made

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of ``__init__``, which a metaclass would hide."""
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def _fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _default(field: dataclasses.Field[Any]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _old_options(names: set[str]) -> Any:
    """The one field through which a parser learns of the old names. It is None but on the way in."""
    metadata = {"help": argparse.SUPPRESS, "aliases": options(names), "action": Collect, "nargs": "?", "const": True}
    return dataclasses.field(default=None, repr=False, compare=False, kw_only=True, metadata=metadata)


@dataclasses.dataclass(repr=False)
class TrainingArguments(Arguments, metaclass=_Named):
    """What a run of `Trainer` is to do: all fields of `transformers.TrainingArguments`, with their defaults.

    It differs in what making it needs and does:

    ========================= ==============================================================================
    here                      there
    ========================= ==============================================================================
    old names still work      ``evaluation_strategy``, ``no_cuda``, … are unknown
    no side effects           starts process groups, resets Accelerate's state, sets TF32 for all of torch; here the
                              processes find each other in `main_process_first`, or when a Trainer is made
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
    # default in transformers, "passive", follows whatever the application has set: WARNING if nothing.
    log_level: str = dataclasses.field(
        default="info",
        metadata=dict(transformers.TrainingArguments.__dataclass_fields__["log_level"].metadata),
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
        """Old names can be read, too."""
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
        # There, this is where processes are joined and the state of Accelerate is reset. Here it only looks.
        self.distributed_state = None
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if self.use_cpu or accelerator is None or _flag("ACCELERATE_USE_CPU"):
            self._n_gpu = 0
            return torch.device("cpu")
        self._n_gpu = 1  # one process trains on one device; batch sizes are per device
        if accelerator.type == "mps":
            return accelerator
        return torch.device(accelerator.type, self.local_process_index)

    @property
    def world_size(self) -> int:
        """The number of processes, as their launcher said in the environment."""
        return torch.distributed.get_world_size() if is_joined() else _integer("WORLD_SIZE", 1)

    @property
    def process_index(self) -> int:
        """The number of this process among all, as the launcher said; 0 without one."""
        return torch.distributed.get_rank() if is_joined() else _integer("RANK", 0)

    @property
    def local_process_index(self) -> int:
        """The number of this process on its machine, as the launcher said; 0 without one."""
        return _integer("LOCAL_RANK", max(self.local_rank, 0))

    @property
    def parallel_mode(self) -> ParallelMode:
        """``DISTRIBUTED`` if there are several processes; one process trains on one device."""
        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    def get_process_log_level(self) -> int:
        """The level for this process: ``log_level`` on the main process, ``log_level_replica`` on the others.

        With ``log_on_each_node`` every machine has a main process, else there is one in all. ``"passive"`` leaves
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
        """Have the others wait until the main process has gone through; for one process, nothing.

        The processes find each other here, if they have not yet.

        Args:
            local: Whether each machine has a main process, or there is one in all.
            desc: What is being done; for the reader of the code.
        """
        first = (self.local_process_index if local else self.process_index) == 0
        joined = self.world_size > 1
        if joined and not is_joined():
            _layout.meet(self)
        if joined and not first:
            torch.distributed.barrier()
        try:
            yield
        finally:
            if joined and first:
                torch.distributed.barrier()

    def set_training(self, *args: Any, **kwargs: Any) -> TrainingArguments:
        """As in transformers; what it sets has both names here, too."""
        before = {name: getattr(self, name) for name in RENAMED.values()}
        super().set_training(*args, **kwargs)
        for old, new in RENAMED.items():
            if getattr(self, new) == before[new]:  # a transformers that knows only the old name
                setattr(self, new, getattr(self, old))
        return self

    @contextlib.contextmanager
    def matmul_precision(self) -> Generator[None]:
        """TF32 as the field ``tf32`` says, for as long as a run lasts; None leaves torch's setting alone."""
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
        """All fields as plain values, tokens masked; what ``TrainingArguments(**…)`` takes."""
        fields = super().to_dict()
        return {name: value for name, value in fields.items() if name != "legacy_arguments"}

    def __repr__(self) -> str:
        shown = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{shown})"

    __str__ = __repr__


@dataclasses.dataclass(repr=False)
class Seq2SeqTrainingArguments(TrainingArguments, transformers.Seq2SeqTrainingArguments):  # type: ignore[misc]
    """What a run of `Seq2SeqTrainer` is to do: `TrainingArguments`, and how to generate.

    >>> Seq2SeqTrainingArguments(predict_with_generate=True, use_cpu=True).generation_max_length is None
    True
    """


def _allow_every_strategy(args: TrainingArguments) -> None:
    """Transformers knows some of FSDP's strategies in the words of its first version only; here they are all one."""
    items = args.fsdp.split() if isinstance(args.fsdp, str) else args.fsdp if isinstance(args.fsdp, list) else []
    old = {"no_shard", "hybrid_shard", "hybrid_shard_zero2"} & {str(getattr(x, "value", x)).lower() for x in items}
    if old and (args.fsdp_config is None or isinstance(args.fsdp_config, dict)):
        args.fsdp_config = {"version": 1, **(args.fsdp_config or {})}


@contextlib.contextmanager
def _held_back(args: TrainingArguments) -> Generator[None]:
    """Keep from transformers' checks the fields that make them change torch or require a machine.

    These are TF32 and torch.compile, which set TF32 for the process; DeepSpeed, which registers itself
    globally; and on a CPU bf16, which they refuse, although torch's autocast has it there.
    """
    neutral: Values = {"tf32": None, "torch_compile": False, "deepspeed": None}
    neutral |= {"torch_compile_mode": None, "torch_compile_backend": None}
    if args.fp16 and args.bf16:
        raise ValueError(
            f"`{type(args).__name__}(fp16=True, bf16=True)` can't work: it is the one or the other. Write `bf16=True`."
        )
    if args.device.type == "cpu":
        neutral |= {"bf16": False, "bf16_full_eval": False}
    # The first they set for all of the process, if there is `fsdp`; at the second they ask for the package.
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
            " the CPU, which is right but seldom faster. Write `use_cpu=True` if that is meant, or `bf16=False`.",
            UserWarning,
        )


def _integer(variable: str, default: int) -> int:
    return int(os.environ.get(variable) or default)


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
