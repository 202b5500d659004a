"""Loaders: of trainfn by default, and of torch where a subclass gives a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import datasets
import numpy as np
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data import Sampler as TorchSampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import RemoveColumnsCollator
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._names import overridden
from trainfn.hf._parallel._sharding import Own, Parted, Share, dealt
from trainfn.hf._types import Collator, Dataset, Loader, SizedDataset, TrainerLike, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

logger = logging.get_logger(__name__)


def train_loader(trainer: TrainerLike) -> Loader:
    """One epoch of micro-batches, or of this rank's rows. Each epoch has its own order, unless it is sequential."""
    if trainer.train_dataset is None:
        raise ValueError(
            "`Trainer(train_dataset=None)` can't work: training needs rows. Write"
            " `Trainer(model, args, train_dataset=dataset)`."
        )
    return trainer._get_dataloader(
        trainer.train_dataset, "training", trainer.args.train_batch_size, trainer._get_train_sampler, is_training=True
    )


def eval_loader(trainer: TrainerLike, dataset: Dataset, description: str) -> Loader:
    """A dataset's batches in its own order, or this rank's rows of each."""
    return trainer._get_dataloader(dataset, description, trainer.args.eval_batch_size, trainer._get_eval_sampler)


def dataloader(
    trainer: TrainerLike,
    dataset: Dataset,
    description: str,
    batch_size: int,
    sampler_fn: Callable[[Dataset], Iterable[Any] | None] | None = None,
    *,
    is_training: bool = False,
) -> Loader:
    """The loader of a dataset: ours, or torch's with a sampler that a subclass gives.

    Args:
        trainer: The Trainer.
        dataset: The rows.
        description: "training", "evaluation" or "test".
        batch_size: Rows on one rank.
        sampler_fn: ``dataset -> sampler``; it is called if it is not the Trainer's own method.
        is_training: Whether the rows are shuffled as the arguments say.
    """
    dataset, collate = prepared(trainer, dataset, description)
    ours = (overridden(trainer, "_get_train_sampler"), overridden(trainer, "_get_eval_sampler"))
    name = getattr(sampler_fn, "__name__", "")
    given = sampler_fn is not None and (name not in _SAMPLERS or ours[_SAMPLERS.index(name)])
    if given and not isinstance(dataset, IterableDataset):
        assert sampler_fn is not None
        sampler = sampler_fn(dataset)
        if sampler is not None:
            return _with_sampler(trainer, dataset, sampler, batch_size, collate)
    if is_training and trainer.args.data_order == "transformers" and _is_sized(dataset):
        return _order_of_transformers(trainer, dataset, batch_size, collate)
    size = together(trainer, batch_size)
    return (
        _training(trainer, dataset, size, collate)
        if is_training
        else _eval(trainer, dataset, size, collate, description)
    )


_SAMPLERS = ("_get_train_sampler", "_get_eval_sampler")


def _order_of_transformers(trainer: TrainerLike, dataset: SizedDataset, batch_size: int, collate: Collator) -> Loader:
    """The loader that Accelerate makes of a `RandomSampler`: a permutation for each seed and epoch.

    Each rank has the batches that it has there, too: whole ones in turn, or with ``split_batches`` a part of each. With
    ``even_batches``, the last ones are filled with the first rows.
    """
    args, world = trainer.args, trainer._trainfn.world
    seed = args.seed if args.data_seed is None else args.data_seed
    ordered = SequentialSampler(dataset)
    if _strategy(args) != "sequential":
        ordered = SeedableRandomSampler(dataset, data_seed=seed)
    batches = BatchSampler(ordered, batch_size, args.dataloader_drop_last)
    if world.plan is None:
        return _of_torch(trainer, dataset, collate, batch_sampler=batches)
    split, even = _splits(trainer), getattr(args.accelerator_config, "even_batches", True)
    mine = BatchSamplerShard(batches, world.parts, world.part, split_batches=split, even_batches=even)
    loader = _of_torch(trainer, dataset, collate, batch_sampler=mine)
    return cast("Loader", Parted(world, loader, split=split) if even else Own(world, loader, split=split))


def _with_sampler(
    trainer: TrainerLike, dataset: Dataset, sampler: Iterable[Any], batch_size: int, collate: Collator
) -> Loader:
    """A loader of torch with a sampler of single rows, or of batches."""
    args, world = trainer.args, trainer._trainfn.world
    how: Values = {"batch_size": batch_size, "sampler": sampler, "drop_last": args.dataloader_drop_last}
    if isinstance(sampler, BatchSampler) or (hasattr(sampler, "batch_size") and hasattr(sampler, "drop_last")):
        how = {"batch_sampler": sampler}
    if world.plan is None or not _splits(trainer):
        return dealt(world, _of_torch(trainer, dataset, collate, **how))
    loader = _of_torch(trainer, dataset, Share(world, collate), **how)
    return cast("Loader", Parted(world, loader, split=True))


def _of_torch(trainer: TrainerLike, dataset: Dataset, collate: Collator, **how: Any) -> DataLoader[Any]:
    workers = trainer.args.dataloader_num_workers
    factor = trainer.args.dataloader_prefetch_factor if workers else None
    return DataLoader(cast("Any", dataset), collate_fn=collate, num_workers=workers, prefetch_factor=factor, **how)


def _training(trainer: TrainerLike, dataset: Dataset, size: int, collate: Collator) -> Loader:
    args = trainer.args
    seed = args.seed if args.data_seed is None else args.data_seed
    last = "drop" if args.dataloader_drop_last else "short"
    _check_enough(trainer, dataset, "training", "per_device_train_batch_size", last, size)
    if not _is_sized(dataset):
        stream = tfn.data.stream(dataset, size, last=last, seed=seed, collate=collate, **_workers(args))
        return dealt(trainer._trainfn.world, stream)
    n = len(dataset)
    strategy = _strategy(args)
    if strategy == "group_by_length":
        sampler = tfn.data.grouped_by_length(lengths(trainer, dataset), size, seed=seed, last=last)
    elif strategy == "sequential":
        sampler = tfn.data.sequential(n, size, last=last)
    else:
        sampler = tfn.data.shuffled(n, size, seed=seed, last=last)
    loader = tfn.data.loader(dataset, sampler, collate=collate, epochs=1, **_workers(args))
    return dealt(trainer._trainfn.world, loader)


def _eval(trainer: TrainerLike, dataset: Dataset, size: int, collate: Collator, description: str) -> Loader:
    args, world = trainer.args, trainer._trainfn.world
    last = "drop" if args.dataloader_drop_last and _is_sized(dataset) else "short"
    _check_enough(trainer, dataset, description, "per_device_eval_batch_size", last, size)
    if not _is_sized(dataset):
        return dealt(world, tfn.data.stream(dataset, size, last=last, collate=collate, **_reader(args)))
    sampler = tfn.data.sequential(len(dataset), size, last=last)
    return dealt(world, tfn.data.loader(dataset, sampler, collate=collate, epochs=1, **_workers(args)))


def together(trainer: TrainerLike, size: int) -> int:
    """The rows of a micro-batch on all ranks: ``size`` for each rank, or ``size`` in all with ``split_batches``."""
    return size if _splits(trainer) else size * trainer._trainfn.world.parts


def _splits(trainer: TrainerLike) -> bool:
    return bool(getattr(trainer.args.accelerator_config, "split_batches", False))


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
    """The options of an evaluation's stream, which one worker reads in the order of the dataset, and each row once."""
    options = _workers(args)
    if options["num_workers"] > 1:
        logger.warning_once(
            f"`TrainingArguments(dataloader_num_workers={options['num_workers']})`: an evaluation reads an iterable"
            " dataset with one worker, in its own order. Pass a dataset with rows by number to read it with more."
        )
    return {**options, "num_workers": min(options["num_workers"], 1)}


def prepared(trainer: TrainerLike, dataset: Dataset, description: str) -> tuple[Dataset, Collator]:
    """The dataset and the collator, without the columns that the model does not take."""
    if isinstance(dataset, datasets.Dataset):
        return trainer._remove_unused_columns(dataset, description), trainer.data_collator
    return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description)


def collator_of_columns(trainer: TrainerLike, collate: Collator, description: str | None) -> Collator:
    """A collator that leaves out what the model does not take."""
    if not trainer.args.remove_unused_columns:
        return collate
    trainer._set_signature_columns_if_needed()
    wanted, name = trainer._signature_columns or [], type(trainer.model).__name__
    return RemoveColumnsCollator(collate, wanted, logger, description=description, model_name=name)


def used_columns(trainer: TrainerLike, dataset: datasets.Dataset, description: str | None) -> datasets.Dataset:
    """A dataset of Hugging Face without the columns that the model does not take.

    Raises:
        ValueError: If none is left.
    """
    if not trainer.args.remove_unused_columns:
        return dataset
    trainer._set_signature_columns_if_needed()
    wanted = trainer._signature_columns or []
    unused = [column for column in dataset.column_names if column not in wanted]
    if len(unused) == len(dataset.column_names):
        raise ValueError(
            f"Trainer: none of the {description} set's columns {unused} is an argument of"
            f" {type(trainer.model).__name__}.forward ({', '.join(wanted)}). Tokenize the set:"
            " write `dataset.map(lambda row: tokenizer(row['text']))`; or keep all columns: write"
            " `remove_unused_columns=False`."
        )
    return dataset.remove_columns(unused)


def torch_sampler(trainer: TrainerLike, dataset: Dataset | None) -> TorchSampler[int] | None:
    """A sampler of torch for training, as transformers makes it; only a subclass that asks for it gets one."""
    dataset = trainer.train_dataset if dataset is None else dataset
    if dataset is None or not _is_sized(dataset):
        return None
    strategy = _strategy(trainer.args)
    if strategy == "group_by_length":
        args = trainer.args
        found = lengths(trainer, dataset).tolist()
        return LengthGroupedSampler(
            args.train_batch_size * args.gradient_accumulation_steps, cast("Any", dataset), found
        )
    return SequentialSampler(dataset) if strategy == "sequential" else RandomSampler(dataset)


def _strategy(args: TrainingArguments) -> str:
    return str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))


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
