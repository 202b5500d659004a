"""A loader of torch with a sampler of the caller's, as `Trainer._get_dataloader` of transformers makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.utils.data import DataLoader, IterableDataset

from trainfn.hf._run._data import prepared
from trainfn.hf._types import Dataset, Loader, TrainerLike, Values


def torch_loader(
    trainer: TrainerLike,
    dataset: Dataset,
    description: str,
    batch_size: int,
    sampler_fn: Callable[[Dataset], Iterable[int] | None] | None,
) -> Loader:
    """Return the batches of a dataset in the order of ``sampler_fn(dataset)``, or in its own."""
    args = trainer.args
    dataset, collate = prepared(trainer, dataset, description.lower())
    how: Values = {"batch_size": batch_size, "collate_fn": collate, "num_workers": args.dataloader_num_workers}
    if args.dataloader_num_workers:
        how["prefetch_factor"] = args.dataloader_prefetch_factor
    if not isinstance(dataset, IterableDataset):
        how["sampler"] = None if sampler_fn is None else sampler_fn(dataset)
        how["drop_last"] = args.dataloader_drop_last
    loader: Loader = trainer.accelerator.prepare(DataLoader(dataset, **how))  # type: ignore[arg-type]
    return loader
