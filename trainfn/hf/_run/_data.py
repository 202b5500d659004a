"""Loaders, and which micro-batches each update sees."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, TypeGuard, TypeVar, cast

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers.trainer_utils import RemoveColumnsCollator
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._callbacks._events import event
from trainfn.hf._parallel._sharding import dealt
from trainfn.hf._types import Batch, Collator, Dataset, Loader, Nested, SizedDataset, TrainerLike, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

logger = logging.get_logger(__name__)
T = TypeVar("T")


def train_loader(trainer: TrainerLike) -> Loader:
    """One epoch of micro-batches, or this rank's rows of each; those of other epochs are in another order."""
    args, dataset = trainer.args, trainer.train_dataset
    if dataset is None:
        raise ValueError("Trainer: training needs `train_dataset=`.")
    seed = args.seed if args.data_seed is None else args.data_seed
    dataset, collate = prepared(trainer, dataset, "training")
    last = "drop" if args.dataloader_drop_last else "short"
    size = together(trainer, args.train_batch_size)
    _check_enough(trainer, dataset, "training", "per_device_train_batch_size", last, size)
    if not _is_sized(dataset):
        stream = tfn.data.stream(dataset, size, last=last, seed=seed, collate=collate, **_reader(args))
        return dealt(trainer._trainfn.world, stream)
    n = len(dataset)
    strategy = str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))
    if strategy == "group_by_length":
        sampler = tfn.data.grouped_by_length(lengths(trainer, dataset), size, seed=seed, last=last)
    elif strategy == "sequential":
        sampler = tfn.data.sequential(n, size, last=last)
    else:
        sampler = tfn.data.shuffled(n, size, seed=seed, last=last)
    loader = tfn.data.loader(dataset, sampler, collate=collate, epochs=1, **_workers(args))
    return dealt(trainer._trainfn.world, loader)


def eval_loader(trainer: TrainerLike, dataset: Dataset, description: str) -> Loader:
    """A dataset's batches in its own order, or this rank's rows of each."""
    args = trainer.args
    size = together(trainer, args.eval_batch_size)
    dataset, collate = prepared(trainer, dataset, description)
    last = "drop" if args.dataloader_drop_last and _is_sized(dataset) else "short"
    _check_enough(trainer, dataset, description, "per_device_eval_batch_size", last, size)
    world = trainer._trainfn.world
    if not _is_sized(dataset):
        return dealt(world, tfn.data.stream(dataset, size, last=last, collate=collate, **_reader(args)))
    sampler = tfn.data.sequential(len(dataset), size, last=last)
    return dealt(world, tfn.data.loader(dataset, sampler, collate=collate, epochs=1, **_workers(args)))


def together(trainer: TrainerLike, size: int) -> int:
    """The rows of a micro-batch on all ranks, of which each has ``size``; or ``size``, if that is to be split."""
    split = getattr(trainer.args.accelerator_config, "split_batches", False)
    return size if split else size * trainer._trainfn.world.parts


def _is_sized(dataset: Dataset) -> TypeGuard[SizedDataset]:
    return hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def _check_enough(trainer: TrainerLike, dataset: Dataset, description: str, name: str, last: str, size: int) -> None:
    """Raise if there is no batch of ``size`` rows, in the words of the arguments; ``name`` is the one for its rows."""
    ranks = trainer._trainfn.world.parts
    rows = len(dataset) if isinstance(dataset, Sized) else None
    if rows == 0:
        raise ValueError(f"Trainer: the {description} set has no rows.")
    if rows is not None and last == "drop" and rows < size:
        given, on = getattr(trainer.args, name), f" on {ranks} ranks" if ranks > 1 else ""
        raise ValueError(
            f"TrainingArguments({name}={given}, dataloader_drop_last=True){on}: the {description} set has"
            f" {rows} row{'s' if rows > 1 else ''}, fewer than a batch, and all are dropped. Write"
            f" `dataloader_drop_last=False`, or a {name} of at most {max(rows // ranks, 1)}."
        )


def _workers(args: TrainingArguments) -> Values:
    workers = args.dataloader_num_workers
    return {"num_workers": workers, "prefetch": args.dataloader_prefetch_factor if workers else None}


def _reader(args: TrainingArguments) -> Values:
    """The same for a stream, which one worker reads, or none."""
    options = _workers(args)
    if options["num_workers"] > 1:
        logger.warning_once(
            f"TrainingArguments(dataloader_num_workers={options['num_workers']}): an iterable dataset is read by one"
            " worker, for with more its order would depend on them. For more, give a dataset with rows by number."
        )
    return {**options, "num_workers": min(options["num_workers"], 1)}


def prepared(trainer: TrainerLike, dataset: Dataset, description: str) -> tuple[Dataset, Collator]:
    """The dataset and the collator, without the columns that the model does not take."""
    collate = trainer.data_collator
    if not trainer.args.remove_unused_columns:
        return dataset, collate
    trainer._set_signature_columns_if_needed()
    wanted = trainer._signature_columns or []
    if not isinstance(dataset, datasets.Dataset):
        name = type(trainer.model).__name__
        return dataset, RemoveColumnsCollator(collate, wanted, logger, description=description, model_name=name)
    unused = [column for column in dataset.column_names if column not in wanted]
    if len(unused) == len(dataset.column_names):
        raise ValueError(
            f"Trainer: none of the {description} set's columns {unused} is an argument of"
            f" {type(trainer.model).__name__}.forward ({', '.join(wanted)}). Tokenize it first:"
            " `dataset.map(lambda row: tokenizer(row['text']))`; or keep them all, `remove_unused_columns=False`."
        )
    return dataset.remove_columns(unused), collate


def lengths(trainer: TrainerLike, dataset: SizedDataset) -> np.ndarray:
    """The length of each row, from its column or from the input ids."""
    column = trainer.args.length_column_name
    if isinstance(dataset, datasets.Dataset) and column in dataset.column_names:
        return np.asarray(dataset[column])
    name = str((getattr(trainer.processing_class, "model_input_names", None) or ["input_ids"])[0])
    if name not in dataset[0]:
        raise ValueError(
            f"Trainer: grouping by length needs the column {column!r} or {name!r}; a row has {sorted(dataset[0])}. Say"
            ' which one it is: `TrainingArguments(length_column_name="...")`.'
        )
    return np.asarray([len(dataset[i][name]) for i in range(len(dataset))])


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
        micro_per_epoch: Micro-batches in an epoch, or None if nobody knows.
        accumulate: Micro-batches of an update; the last one of an epoch may have fewer.
        max_steps: Updates in all.
        epochs: Epochs begun.
        num_examples: Rows in an epoch.
    """

    micro_per_epoch: int | None
    accumulate: int
    max_steps: int
    epochs: int
    num_examples: int | None

    @property
    def updates_per_epoch(self) -> int:
        """Updates in an epoch; all of them, if it has no end that is known."""
        if self.micro_per_epoch is None:
            return self.max_steps
        return max(math.ceil(self.micro_per_epoch / self.accumulate), 1)

    @property
    def micro_counted(self) -> int:
        """Micro-batches by which the epoch's fraction is counted."""
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
                "Trainer: this train_dataset has no length, so the end of training is unknown. Say"
                " `TrainingArguments(max_steps=1000)`."
            )
        return Length(None, accumulate, args.max_steps, 2**62, None)
    updates = max(math.ceil(micro / accumulate), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    return Length(micro, accumulate, steps, math.ceil(steps / updates), num_examples)


class Ended(Exception):
    """There is no further window: the epochs are over, or somebody said stop between two steps."""


class Windows:
    """The micro-batches of each update, from wherever the run stands; fires what happens before a step.

    Args:
        trainer: Its `_prepare_inputs` is applied to each micro-batch.
        loader: From `get_train_dataloader`.
        length: Of the run.
        ended: What belongs to the end of an epoch.
    """

    def __init__(
        self, trainer: TrainerLike, loader: Loader, length: Length, ended: Callable[[], None] = lambda: None
    ) -> None:
        self.trainer, self.loader, self.length, self.ended = trainer, loader, length, ended
        self.epoch = self.window = 0
        self.micro_done = 0  # in this epoch
        self.first: Batch = {}  # micro-batch of the newest window
        self.counted = [0.0, 0.0]  # operations and tokens that only this rank knows of

    def start(self, step: int) -> Iterator[Batch | list[Batch] | Iterator[Batch]]:
        """The windows from ``(epoch, window)`` on; ``step`` only says that the run has come there."""
        trainer, length = self.trainer, self.length
        while self.epoch < length.epochs:
            if self.window < length.updates_per_epoch:  # else the epoch is done, but for its end
                event(trainer, "on_epoch_begin")
            self.micro_done = min(self.window * length.accumulate, length.micro_counted)
            with contextlib.closing(self._micro(self.epoch, self.micro_done)) as micro:
                while window := list(_take(micro, length.accumulate)):
                    self.window += 1
                    self.micro_done += len(window)
                    event(trainer, "on_step_begin")
                    self.first = window[0]
                    yield self._given(window)
                    if trainer.control.should_epoch_stop or trainer.control.should_training_stop:
                        break
            if self.micro_done == 0:
                logger.warning("Trainer: this epoch has not a single batch; training stops here.")
                break
            self.end_epoch()
            if trainer.control.should_training_stop:
                break
        raise Ended

    def _given(self, window: list[Batch]) -> Batch | list[Batch] | Iterator[Batch]:
        if self.length.accumulate == 1 and not self.trainer.args.auto_find_batch_size:
            return window[0]
        # On ranks a stream: each is asked whether it has rows for a micro-batch.
        return window if self.trainer._trainfn.world.plan is None else iter(window)

    def end_epoch(self) -> None:
        """What belongs to the end of an epoch; what is saved there begins with the next one."""
        self.epoch, self.window = self.epoch + 1, 0
        self.ended()

    def _micro(self, epoch: int, first: int) -> Generator[Batch]:
        loader = self.loader
        if isinstance(loader, tfn.data.Loader):
            assert self.length.micro_per_epoch is not None
            begin = epoch * self.length.micro_per_epoch
            endless = dataclasses.replace(loader, epochs=None)
            batches = _limited(endless.start(begin + first), self.length.micro_per_epoch - first)
        elif isinstance(loader, tfn.data.Stream):
            batches = dataclasses.replace(loader, first_epoch=epoch).start(first)
        else:
            seed = self.trainer.args.seed
            batches = _seeded(loader, seed if seed is not None else 0, epoch, first)
        for batch in batches:
            if isinstance(batch, tfn.data.NoRows):
                size = self.trainer._trainfn.world.parts
                raise TypeError(
                    f"Trainer.train() on {size} ranks: the loader has no batch for this one where"
                    " others have, and no tensor to make one of no rows of. Return tensors from the collator:"
                    ' `{"input_ids": ..., "labels": ...}`.'
                )
            inputs = self.trainer._prepare_inputs(batch)
            self._count(inputs)
            yield inputs

    def _count(self, inputs: Batch) -> None:
        """Floating-point operations and, where asked for, tokens."""
        trainer = self.trainer
        given = trainer.args.include_num_input_tokens_seen
        kind, counted = str(getattr(given, "value", given)), self.counted
        counted[0] += float(trainer.floating_point_ops(inputs))
        tokens = inputs.get(getattr(trainer.model, "main_input_name", "input_ids"))
        if kind != "no" and isinstance(tokens, torch.Tensor):
            mask = inputs.get("attention_mask") if kind == "non_padding" else None
            counted[1] += int(mask.sum()) if mask is not None else tokens.numel()
        if trainer._trainfn.world.plan is None:
            self.take_counts(counted)

    def take_counts(self, counted: list[float]) -> None:
        """Add what all ranks have counted since the last time to the Trainer's state."""
        self.trainer.state.total_flos += counted[0]
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


def _seeded(loader: Loader, seed: int, epoch: int, skip: int) -> Generator[Batch]:
    """One epoch of somebody else's loader, whose order and augmentation follow from (seed, epoch).

    It draws from the global generators, which are lent to it for each batch and given back.
    """
    for shuffles in (loader, getattr(loader, "sampler", None)):  # a `DistributedSampler`, say
        if callable(set_epoch := getattr(shuffles, "set_epoch", None)):
            set_epoch(epoch)
    if isinstance(own := getattr(loader, "generator", None), torch.Generator):
        own.manual_seed(_number(seed, epoch))
    lent = _Generators(seed, epoch)
    with lent:
        batches = iter(loader)
    for n in range(2**62):
        with lent:
            try:
                batch = next(batches)
            except StopIteration:
                return
        if n >= skip:
            yield batch


def _number(seed: int, epoch: int) -> int:
    return int(tfn.random.fold_in(tfn.random.key(seed), epoch)[0]) % 2**32


class _Generators:
    """States of the global generators, put in place for a block."""

    def __init__(self, seed: int, epoch: int) -> None:
        number = _number(seed, epoch)
        with tfn.process.generators_kept():
            torch.default_generator.manual_seed(number)  # `torch.manual_seed` reseeds those of devices too
            np.random.seed(number)
            random.seed(number)
            self._mine = tfn.process.Generators.now()

    def __enter__(self) -> None:
        self._theirs = tfn.process.Generators.now()
        self._mine.restore()

    def __exit__(self, *_: object) -> None:
        self._mine = tfn.process.Generators.now()
        self._theirs.restore()


def prepared_inputs(trainer: TrainerLike, inputs: Batch) -> Batch:
    """A collator's batch as a plain dict of tensors on the device."""
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"Trainer: the data collator returned a {type(inputs).__name__}, and the model is called with keywords."
            ' Return a dict: `{"input_ids": ..., "labels": ...}`.'
        )
    device = trainer.args.device
    return {name: _moved(value, device) for name, value in inputs.items()}


def _moved(value: Nested, device: torch.device) -> Nested:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value).to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value
