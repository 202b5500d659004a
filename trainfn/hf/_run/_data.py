"""Loaders, and which micro-batches each update sees."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._callbacks._events import event
from trainfn.hf._names import overridden
from trainfn.hf._run._foreign import Foreign
from trainfn.hf._run._loaders import together as together
from trainfn.hf._step._held import held
from trainfn.hf._step._terms import with_update
from trainfn.hf._types import Batch, Loader, Nested, TrainerLike

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

logger = logging.get_logger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
        micro_per_epoch: Micro-batches in an epoch, or None if the loader has no length.
        accumulate: Micro-batches of an update; the last update of an epoch may have fewer.
        max_steps: Updates in the whole run.
        epochs: Epochs that the run begins; the last one may stay incomplete.
        num_examples: Rows in an epoch, or None if their number is not known.
    """

    micro_per_epoch: int | None
    accumulate: int
    max_steps: int
    epochs: int
    num_examples: int | None

    @property
    def updates_per_epoch(self) -> int:
        """Updates in an epoch; ``max_steps``, if the length of an epoch is not known."""
        if self.micro_per_epoch is None:
            return self.max_steps
        return max(math.ceil(self.micro_per_epoch / self.accumulate), 1)

    @property
    def micro_counted(self) -> int:
        """Micro-batches that count as one epoch in the state's ``epoch``."""
        return self.micro_per_epoch or self.max_steps * self.accumulate


def arithmetic(args: TrainingArguments, loader: Loader, num_examples: int | None) -> Length:
    """The numbers of steps and epochs, from the arguments and the length of the loader."""
    try:
        micro = len(cast("Sized", loader))
    except TypeError:
        micro = None
    accumulate = args.gradient_accumulation_steps
    if micro is None:
        if args.max_steps <= 0:
            raise ValueError(
                f"`TrainingArguments(max_steps={args.max_steps})` can't work: this train_dataset has no length, so"
                " the end of training is not known. Write `max_steps=1000`."
            )
        # `max_steps` ends such a run, so the number of epochs must only be large enough.
        return Length(None, accumulate, args.max_steps, 2**62, None)
    updates = max(math.ceil(micro / accumulate), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    return Length(micro, accumulate, steps, math.ceil(steps / updates), num_examples)


class Ended(Exception):
    """There is no further window: the epochs are over, or a callback stopped the run between two steps."""


class Windows:
    """The micro-batches of each update, from the run's position on; it fires the events before each step.

    Args:
        trainer: The Trainer, whose `_prepare_inputs` is applied to each micro-batch.
        loader: The result of `get_train_dataloader`.
        length: The numbers of steps and epochs of the run.
        ended: A function that is called at the end of each epoch.
    """

    def __init__(
        self, trainer: TrainerLike, loader: Loader, length: Length, ended: Callable[[], None] = lambda: None
    ) -> None:
        self.trainer, self.loader, self.length, self.ended = trainer, loader, length, ended
        self.begun: Callable[[list[Batch]], None] = lambda window: None  # called before each step
        self.epoch = self.window = 0
        self.micro_done = 0  # in this epoch
        self.first: Batch = {}  # micro-batch of the newest window
        self.counted = [0.0, 0.0]  # operations and tokens of this rank that are not yet added up
        self.reading: tfn.data.Reading | Foreign | None = None  # the epoch that is being read, of a stream
        self.resumed: Nested = None  # the state of a stream that the next epoch resumes by

    def start(self, step: int) -> Iterator[Batch | list[Batch] | Iterator[Batch]]:
        """Yield the windows from ``(epoch, window)`` on; this position decides, and ``step`` is not read."""
        trainer, length = self.trainer, self.length
        while self.epoch < length.epochs:
            if self.window < length.updates_per_epoch:  # else the resumed epoch has only its end left
                event(trainer, "on_epoch_begin")
            self.micro_done = min(self.window * length.accumulate, length.micro_counted)
            with contextlib.closing(self._micro(self.epoch, self.micro_done)) as micro:
                while given := self._taken(micro):
                    self.window += 1
                    self.micro_done += len(given)
                    trainer.current_gradient_accumulation_steps = len(given)
                    event(trainer, "on_step_begin")
                    window = [self._prepared(batch) for batch in given]
                    self.first = window[0]
                    self.begun(window)
                    yield self._given(window)
                    if trainer.control.should_epoch_stop or trainer.control.should_training_stop:
                        break
            if self.micro_done == 0:
                logger.warning(
                    "Trainer.train(): the loader gave no batch in this epoch, so training stops here. Return a loader"
                    " that can be iterated again from `get_train_dataloader`, not a generator."
                )
                break
            self.end_epoch()
            if trainer.control.should_training_stop:
                break
        raise Ended

    def _taken(self, micro: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of the next update, as the loader gives them."""
        trainer, count = self.trainer, self.length.accumulate
        if not overridden(trainer, "get_batch_samples"):
            return list(_take(micro, count))
        # Its number is not needed: `_get_num_items_in_batch` is asked for each micro-batch alone.
        return list(trainer.get_batch_samples(micro, count, torch.device(trainer.args.device))[0])

    def _prepared(self, batch: Batch) -> Batch:
        """A micro-batch on the device. An overridden `training_step` calls `_prepare_inputs` by itself."""
        trainer = self.trainer
        own = overridden(trainer, "training_step") and overridden(trainer, "_prepare_inputs")
        inputs = prepared_inputs(trainer, batch) if own else trainer._prepare_inputs(batch)
        self._count(inputs)
        return inputs

    def _given(self, window: list[Batch]) -> Batch | list[Batch] | Iterator[Batch]:
        plan = self.trainer._trainfn.world.plan
        window = [held(micro) for micro in window]
        if self.length.accumulate == 1 and not self.trainer.args.auto_find_batch_size:
            return window[0] if plan is None else with_update(self.trainer, window)[0]
        window = with_update(self.trainer, window)
        # On several ranks an iterator: before each micro-batch all ranks ask each other whether any has rows left.
        return window if plan is None else iter(window)

    def end_epoch(self) -> None:
        """End the epoch. A checkpoint that is saved here resumes at the beginning of the next one."""
        self.epoch, self.window = self.epoch + 1, 0
        self.ended()

    def _micro(self, epoch: int, first: int) -> Generator[Batch]:
        loader, state, self.resumed = self.loader, self.resumed, None
        if isinstance(loader, tfn.data.Loader):
            assert self.length.micro_per_epoch is not None
            begin = epoch * self.length.micro_per_epoch
            endless = dataclasses.replace(loader, epochs=None)
            batches = _limited(endless.start(begin + first), self.length.micro_per_epoch - first)
        elif isinstance(loader, tfn.data.Stream):
            batches = self.reading = dataclasses.replace(loader, first_epoch=epoch).start(first, state)
        else:
            batches = self.reading = Foreign(loader, self.trainer.args.seed or 0, epoch, first, state)
        for batch in batches:
            if isinstance(batch, tfn.data.NoRows):
                size = self.trainer._trainfn.world.parts
                raise TypeError(
                    f"`trainer.train()` on {size} ranks can't work: this rank's loader has no batch where others have"
                    " one, and no tensor to make an empty batch from. Return tensors from the collator:"
                    ' `{"input_ids": ..., "labels": ...}`.'
                )
            yield batch

    def _count(self, inputs: Batch) -> None:
        """Count floating-point operations and tokens."""
        self.counted[0] += float(self.trainer.floating_point_ops(inputs))
        self.trainer._track_num_input_tokens(inputs)
        if self.trainer._trainfn.world.plan is None:
            self.take_counts(self.counted)

    def count_tokens(self, inputs: Batch) -> None:
        """Count tokens, with ``include_num_input_tokens_seen``."""
        if not isinstance(inputs, Mapping):
            return
        given = self.trainer.args.include_num_input_tokens_seen
        kind = str(getattr(given, "value", given))
        tokens = inputs.get(getattr(self.trainer.model, "main_input_name", "input_ids"))
        if kind != "no" and isinstance(tokens, torch.Tensor):
            mask = self._mask(inputs, tokens) if kind == "non_padding" else None
            self.counted[1] += int(mask.sum()) if mask is not None else tokens.numel()

    def _mask(self, inputs: Batch, tokens: torch.Tensor) -> torch.Tensor | None:
        """Where a batch has no padding: from its mask, or from the padding token; None if neither is known."""
        if inputs.get("attention_mask") is not None:
            return inputs["attention_mask"]
        pad = getattr(self.trainer.processing_class, "pad_token_id", None)
        if pad is not None:
            return tokens != pad
        logger.warning_once(
            "`TrainingArguments(include_num_input_tokens_seen='non_padding')`: batches have no `attention_mask`, and no"
            " padding token is known, so all tokens are counted. Pass `processing_class=tokenizer`."
        )
        return None

    def take_counts(self, counted: list[float]) -> None:
        """Add the operations and tokens of all ranks since the last call to those of the Trainer."""
        self.trainer.current_flos += counted[0]
        self.trainer.state.num_input_tokens_seen += int(counted[1])
        self.counted = [0.0, 0.0]


def _take(micro: Iterator[T], count: int) -> Iterator[T]:
    for _ in range(count):
        try:
            yield next(micro)
        except StopIteration:
            return


def _limited(batches: Iterator[T], count: int) -> Generator[T]:
    try:
        yield from _take(batches, count)
    finally:
        batches.close()  # type: ignore[attr-defined]


def prepared_inputs(trainer: TrainerLike, inputs: Batch) -> Batch:
    """A collator's batch with its tensors on the device; a mapping becomes a plain dict.

    Raises:
        TypeError: If the model would be called with something else than a mapping.
    """
    if not isinstance(inputs, Mapping):
        if overridden(trainer, "compute_loss") or overridden(trainer, "training_step"):
            return trainer._prepare_input(inputs)
        raise TypeError(
            f"`Trainer(data_collator=...)` can't work: the data collator returned a {type(inputs).__name__}, and the"
            ' model is called with keywords. Return a dict: `{"input_ids": ..., "labels": ...}`; or take the batch as'
            " it is in an override of `compute_loss`."
        )
    return {name: trainer._prepare_input(value) for name, value in inputs.items()}


def moved(value: Nested, device: torch.device) -> Nested:
    """Tensors, also those in dicts, lists, tuples and objects with ``to()``, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.as_tensor(value).to(device)
    if isinstance(value, Mapping):
        items = {name: moved(item, device) for name, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        parts = [moved(item, device) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    to: Callable[[torch.device], Nested] | None = getattr(value, "to", None)
    return to(device) if callable(to) and not isinstance(value, type | torch.nn.Module) else value
