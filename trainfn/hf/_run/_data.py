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
from trainfn.hf._step._terms import with_update
from trainfn.hf._types import Batch, Collator, Dataset, Loader, Nested, SizedDataset, TrainerLike, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

logger = logging.get_logger(__name__)
T = TypeVar("T")


def train_loader(trainer: TrainerLike) -> Loader:
    """One epoch of micro-batches, or of this rank's rows. Each epoch has its own order, unless it is sequential."""
    args, dataset = trainer.args, trainer.train_dataset
    if dataset is None:
        raise ValueError(
            "`Trainer(train_dataset=None)` can't work: training needs rows. Write"
            " `Trainer(model, args, train_dataset=dataset)`."
        )
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
    """The rows of a micro-batch on all ranks: ``size`` for each rank, or ``size`` in all with ``split_batches``."""
    split = getattr(trainer.args.accelerator_config, "split_batches", False)
    return size if split else size * trainer._trainfn.world.parts


def _is_sized(dataset: Dataset) -> TypeGuard[SizedDataset]:
    return hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def _check_enough(trainer: TrainerLike, dataset: Dataset, description: str, name: str, last: str, size: int) -> None:
    """Raise if a dataset has too few rows for one batch; ``name`` is the argument that set the batch size."""
    ranks = trainer._trainfn.world.parts
    rows = len(dataset) if isinstance(dataset, Sized) else None
    if rows == 0:
        raise ValueError(
            f"Trainer: the {description} set has no rows, so it gives no batch. Pass a dataset with at least one row."
        )
    if rows is not None and last == "drop" and rows < size:
        given, on = getattr(trainer.args, name), f" on {ranks} ranks" if ranks > 1 else ""
        raise ValueError(
            f"`TrainingArguments({name}={given}, dataloader_drop_last=True)`{on} can't work: the {description} set has"
            f" {rows} row{'s' if rows > 1 else ''}, fewer than one batch, and an incomplete batch is dropped. Write"
            f" `dataloader_drop_last=False`, or a {name} of at most {max(rows // ranks, 1)}."
        )


def _workers(args: TrainingArguments) -> Values:
    workers = args.dataloader_num_workers
    return {"num_workers": workers, "prefetch": args.dataloader_prefetch_factor if workers else None}


def _reader(args: TrainingArguments) -> Values:
    """The options of a stream, which at most one worker reads."""
    options = _workers(args)
    if options["num_workers"] > 1:
        logger.warning_once(
            f"`TrainingArguments(dataloader_num_workers={options['num_workers']})`: an iterable dataset is read by one"
            " worker, because its order would depend on the number of them. Write `dataloader_num_workers=1`, or pass"
            " a dataset with rows by number."
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
            f" {type(trainer.model).__name__}.forward ({', '.join(wanted)}). Tokenize the set:"
            " write `dataset.map(lambda row: tokenizer(row['text']))`; or keep all columns: write"
            " `remove_unused_columns=False`."
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
            "`TrainingArguments(train_sampling_strategy='group_by_length')` can't work: it needs the column"
            f" {column!r} or {name!r}, and a row has {sorted(dataset[0])}. Name the column with the lengths: write"
            ' `length_column_name="..."`.'
        )
    return np.asarray([len(dataset[i][name]) for i in range(len(dataset))])


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

    def start(self, step: int) -> Iterator[Batch | list[Batch] | Iterator[Batch]]:
        """Yield the windows from ``(epoch, window)`` on; this position decides, and ``step`` is not read."""
        trainer, length = self.trainer, self.length
        while self.epoch < length.epochs:
            if self.window < length.updates_per_epoch:  # else the resumed epoch has only its end left
                event(trainer, "on_epoch_begin")
            self.micro_done = min(self.window * length.accumulate, length.micro_counted)
            with contextlib.closing(self._micro(self.epoch, self.micro_done)) as micro:
                while window := list(_take(micro, length.accumulate)):
                    self.window += 1
                    self.micro_done += len(window)
                    event(trainer, "on_step_begin")
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

    def _given(self, window: list[Batch]) -> Batch | list[Batch] | Iterator[Batch]:
        plan = self.trainer._trainfn.world.plan
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
                    f"`trainer.train()` on {size} ranks can't work: this rank's loader has no batch where others have"
                    " one, and no tensor to make an empty batch from. Return tensors from the collator:"
                    ' `{"input_ids": ..., "labels": ...}`.'
                )
            inputs = self.trainer._prepare_inputs(batch)
            self._count(inputs)
            yield inputs

    def _count(self, inputs: Batch) -> None:
        """Count floating-point operations and tokens."""
        self.counted[0] += float(self.trainer.floating_point_ops(inputs))
        self.trainer._track_num_input_tokens(inputs)
        if self.trainer._trainfn.world.plan is None:
            self.take_counts(self.counted)

    def count_tokens(self, inputs: Batch) -> None:
        """Count tokens, with ``include_num_input_tokens_seen``."""
        given = self.trainer.args.include_num_input_tokens_seen
        kind = str(getattr(given, "value", given))
        tokens = inputs.get(getattr(self.trainer.model, "main_input_name", "input_ids"))
        if kind != "no" and isinstance(tokens, torch.Tensor):
            mask = inputs.get("attention_mask") if kind == "non_padding" else None
            self.counted[1] += int(mask.sum()) if mask is not None else tokens.numel()

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


def _seeded(loader: Loader, seed: int, epoch: int, skip: int) -> Generator[Batch]:
    """One epoch of a loader that is not trainfn's, whose order and augmentation follow from (seed, epoch).

    Such a loader draws from the global generators. For each batch they have its states, and afterwards their own.
    """
    parts = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset")]
    for shuffles in (loader, *parts, getattr(parts[1], "sampler", None)):  # a `DistributedSampler`, say
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
        if n >= skip:  # skipped batches are read too, so that the generators advance as in the first run
            yield batch


def _number(seed: int, epoch: int) -> int:
    return int(tfn.random.fold_in(tfn.random.key(seed), epoch)[0]) % 2**32


class _Generators:
    """A loader's states of the global generators, in place for the time of a block."""

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
            f"`Trainer(data_collator=...)` can't work: the data collator returned a {type(inputs).__name__}, and the"
            ' model is called with keywords. Return a dict: `{"input_ids": ..., "labels": ...}`.'
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
