"""The methods of a Trainer that are about its data."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sized
from typing import cast

import torch
from torch import Tensor, nn

from trainfn.hf._run import _data, _loaders, _setup
from trainfn.hf._step import _counting
from trainfn.hf._types import Batch, Collator, Dataset, Datasets, Loader, Nested, TrainerLike


class Loading:
    """How a Trainer reads rows and makes batches of them; every method may be overridden."""

    # A `training_step` that is written for transformers reads it. Here no loss is scaled by the accumulation.
    loss_is_scaled_for_ga: bool | None = None
    model_accepts_loss_kwargs: bool = False  # a head is not given the number of items

    def get_train_dataloader(self: TrainerLike) -> Loader:
        """One epoch of micro-batches; an override may return any iterable of dicts."""
        return _loaders.train_loader(self)

    def get_eval_dataloader(self: TrainerLike, eval_dataset: Dataset | str | None = None) -> Loader:
        """The batches of ``eval_dataset``, by default the Trainer's; a string names one in a dict."""
        dataset: Datasets | str | None = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(eval_dataset, str):
            dataset = cast("dict[str, Dataset]", self.eval_dataset)[eval_dataset]
        if dataset is None:
            raise ValueError(
                "`trainer.evaluate()` can't work: there is no evaluation set. Write `trainer.evaluate(dataset)`, or"
                " `Trainer(model, args, eval_dataset=dataset)`."
            )
        return _loaders.eval_loader(self, cast("Dataset", dataset), "evaluation")

    def get_test_dataloader(self: TrainerLike, test_dataset: Dataset) -> Loader:
        """The batches of ``test_dataset``."""
        return _loaders.eval_loader(self, test_dataset, "test")

    def num_examples(self: TrainerLike, dataloader: Loader) -> int | None:
        """The rows of a loader's dataset, if it has a length."""
        dataset = getattr(dataloader, "dataset", None)
        return len(dataset) if isinstance(dataset, Sized) else None

    def _get_dataloader(
        self: TrainerLike,
        dataset: Dataset,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Dataset], Nested] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Loader:
        """The loader of a dataset, with the sampler of ``sampler_fn`` if a subclass overrides that."""
        return _loaders.dataloader(self, dataset, description, batch_size, sampler_fn, is_training=is_training)

    def _get_train_sampler(self: TrainerLike, train_dataset: Dataset | None = None) -> Nested:
        """A sampler of torch; an override's is used in place of the order of `trainfn.data`."""
        return _loaders.torch_sampler(self, train_dataset)

    def _get_eval_sampler(self: TrainerLike, eval_dataset: Dataset) -> Nested:
        """None: evaluations take the rows in their order; an override may return a sampler of torch."""
        return None

    def _remove_unused_columns(self: TrainerLike, dataset: Nested, description: str | None = None) -> Nested:
        """A dataset of Hugging Face without the columns that the model does not take."""
        return _loaders.used_columns(self, dataset, description)

    def _get_collator_with_removed_columns(
        self: TrainerLike, data_collator: Collator, description: str | None = None
    ) -> Collator:
        """The collator for other datasets; it leaves out what the model does not take."""
        return _loaders.collator_of_columns(self, data_collator, description)

    def _set_signature_columns_if_needed(self: TrainerLike) -> None:
        """Fill in ``_signature_columns``: the names that the model takes, and those of labels."""
        if self._signature_columns is None:
            self._signature_columns = [*_setup.arguments_of(self.model), *{"label", "label_ids", *self.label_names}]

    def _prepare_input(self: TrainerLike, data: Nested) -> Nested:
        """A value of a batch on the device: a tensor, or dicts, lists and tuples of them."""
        return _data.moved(data, self.args.device)

    def _prepare_inputs(self: TrainerLike, inputs: Batch) -> Batch:
        """A collator's batch as a dict of tensors on the device."""
        return _data.prepared_inputs(self, inputs)

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: Batch
    ) -> tuple[Callable[[], contextlib.AbstractContextManager[object]], Batch]:
        """A context that does nothing, and the batch: no sequence is split over ranks."""
        return contextlib.nullcontext, inputs

    def get_batch_samples(
        self: TrainerLike, epoch_iterator: Iterator[Nested], num_batches: int, device: torch.device
    ) -> tuple[list[Nested], Tensor | None]:
        """The micro-batches of the next update, and the number of labels that they count."""
        samples = list(itertools.islice(epoch_iterator, num_batches))
        return samples, self._get_num_items_in_batch(samples, device)

    def _get_num_items_in_batch(self: TrainerLike, batch_samples: list[Nested], device: torch.device) -> Tensor | None:
        """The number that means over these micro-batches divide by; it is asked for each one alone."""
        counts = [_counting.rule(self).of(self, batch).to(device) for batch in batch_samples]
        return torch.stack(counts).sum() if counts else None
