"""`Trainer.evaluate` and `Trainer.predict`: the metrics of many batches, the same however the rows are cut.

The loss is one sum over all counted labels, divided once, so it does not depend on the batch size. An evaluation
restores the model's modes, its dtypes and the global generators, also after an error.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer, nested_detach
from transformers.trainer_utils import (
    EvalLoopOutput,
    PredictionOutput,
    denumpify_detensorize,
    has_length,
    speed_metrics,
)

import trainfn as tfn
from trainfn.hf import _names
from trainfn.hf._evaluation._concatenate import PADDING, check_tensors, merged
from trainfn.hf._evaluation._gather import all_batches, one_batch
from trainfn.hf._evaluation._prediction import gives_loss, mean_of
from trainfn.hf._evaluation._totals import Totals
from trainfn.hf._names import overridden
from trainfn.hf._parallel._sharding import dealt
from trainfn.hf._parallel._world import World
from trainfn.hf._run._data import prepared_inputs, together
from trainfn.hf._step._additive import examine, share_findings
from trainfn.hf._step._counting import find_shift, row_count, rule
from trainfn.hf._step._modes import as_found, eval_mode
from trainfn.hf._types import Batch, Dataset, Datasets, Loader, Metrics, Nested, TrainerLike

logger = logging.getLogger(__name__)
T = TypeVar("T")


def evaluate(
    trainer: TrainerLike,
    eval_dataset: Datasets | str | None = None,
    ignore_keys: list[str] | None = None,
    metric_key_prefix: str = "eval",
) -> dict[str, float]:
    """Return the metrics of a dataset: `eval_loss`, those of `compute_metrics`, the speed, and the epoch.

    Args:
        trainer: The trainer.
        eval_dataset: The dataset to evaluate instead of `trainer.eval_dataset`. The datasets of a dict are evaluated
            one by one, with their names in the keys: `eval_{name}_loss`. A string names one of the datasets of
            `trainer.eval_dataset`.
        ignore_keys: Names of model outputs to leave out of the predictions.
        metric_key_prefix: The prefix of the keys.

    Raises:
        ValueError: If the dataset is empty, or no dataset has that name.
    """
    given = eval_dataset is not None
    dataset = eval_dataset if given else trainer.eval_dataset
    if isinstance(dataset, dict):
        metrics: dict[str, float] = {}
        for name, part in cast("dict[str, Dataset]", dataset).items():
            prefix = f"{metric_key_prefix}_{name}"
            metrics |= trainer.evaluate(part if given else name, ignore_keys=ignore_keys, metric_key_prefix=prefix)
        return metrics
    if not overridden(trainer, "get_eval_dataloader"):
        _check_name(trainer, dataset)
        _check_rows(dataset, "evaluate")
    loader = trainer.get_eval_dataloader(dataset)
    start = time.time()
    # Only `compute_metrics` reads the predictions here; without it they would take memory for nothing.
    loss_only = True if trainer.compute_metrics is None else None
    output = trainer.evaluation_loop(loader, "Evaluation", loss_only, ignore_keys, metric_key_prefix)
    metrics = _with_speed(trainer, output, metric_key_prefix, start)
    # A broadcast from rank 0, once an evaluation. The measured times differ between ranks, and every rank must take
    # the same decisions (early stopping, the best checkpoint) from the same numbers.
    metrics = trainer._trainfn.world.ranks.first(lambda: metrics)
    with eval_mode(trainer.model):  # by which an override of `log` knows these logs from those of training
        trainer.log(metrics)
        if trainer.state.epoch is not None:  # `log` adds it; an override of `log` may not
            metrics.setdefault("epoch", trainer.state.epoch)
        # A copy: transformers' progress bar for notebooks pops keys from the metrics that it receives.
        shown = trainer.args, trainer.state, trainer.control, dict(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(*shown)
    return metrics


def predict(
    trainer: TrainerLike, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
) -> PredictionOutput:
    """Return the predictions, labels and metrics of a dataset; nothing is logged.

    Args:
        trainer: The trainer.
        test_dataset: The dataset to predict.
        ignore_keys: Names of model outputs to leave out of the predictions.
        metric_key_prefix: The prefix of the keys of the metrics.

    Raises:
        ValueError: If the dataset is empty.
    """
    _check_rows(test_dataset, "predict")
    loader = trainer.get_test_dataloader(test_dataset)
    start = time.time()
    output = trainer.evaluation_loop(loader, "Prediction", ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
    metrics = _with_speed(trainer, output, metric_key_prefix, start)
    metrics = trainer._trainfn.world.ranks.first(lambda: metrics)
    with eval_mode(trainer.model):
        shown = trainer.args, trainer.state, trainer.control, dict(metrics)
        trainer.control = trainer.callback_handler.on_predict(*shown)
    return PredictionOutput(output.predictions, output.label_ids, metrics)


def evaluation_loop(
    trainer: TrainerLike,
    dataloader: Loader,
    description: str,
    prediction_loss_only: bool | None = None,
    ignore_keys: list[str] | None = None,
    metric_key_prefix: str = "eval",
) -> EvalLoopOutput:
    """Run the loop that `evaluate` and `predict` share.

    Args:
        trainer: The trainer.
        dataloader: The batches; its length may be unknown.
        description: "Evaluation" or "Prediction".
        prediction_loss_only: Whether to keep no predictions; `None` stands for `args.prediction_loss_only`.
        ignore_keys: Names of model outputs to leave out of the predictions.
        metric_key_prefix: The prefix of the keys of the metrics.

    Raises:
        ValueError: If there is no batch.
        TypeError: If `compute_metrics` does not return a dict.
    """
    args = trainer.args
    loss_only = args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
    logger.info("***** Running %s, batch size %s *****", description, args.eval_batch_size)
    world = trainer._trainfn.world
    dataloader = dealt(world, dataloader)
    trainer.callback_handler.eval_dataloader = dataloader
    kept, totals, metrics = _Kept.empty(), Totals(), None
    places: list[int] = []  # the numbers of the batches of which this rank has rows
    with as_found(trainer):
        for step, (inputs, after) in enumerate(_with_next(dataloader)):
            if step == 0 and after is not None:
                _examine(trainer, [inputs, after])
            batch = None if _has_none(world, inputs) else _batch(trainer, inputs, loss_only, ignore_keys)
            totals = totals.plus(batch)
            trainer.control = trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
            if args.batch_eval_metrics:
                metrics = _batch_metrics(trainer, batch, inputs, after is None) or metrics
            if batch is not None and (not args.batch_eval_metrics or description == "Prediction"):
                kept.add(batch)
                places.append(step)
            if args.eval_accumulation_steps and (step + 1) % args.eval_accumulation_steps == 0:
                kept.to_host()
        totals = totals.of_all(world)
        if totals.batches == 0:
            if _names.overridden(trainer, "evaluation_loop"):  # it may have an evaluator of its own
                return EvalLoopOutput(None, None, {}, 0)  # type: ignore[arg-type]
            raise ValueError(_EMPTY.format(call="predict" if description == "Prediction" else "evaluate"))
        arrays = kept.arrays(world, places, concat=args.eval_do_concat_batches)
        if not args.batch_eval_metrics:
            metrics = _metrics(trainer, arrays)
    # The rows that were counted, because the dataset's length may be unknown. If the rows of a batch can't be counted,
    # the length of the dataset stands in.
    num_samples = totals.rows or trainer.num_examples(dataloader) or 0
    named = {**totals.finish(metric_key_prefix, sums=rule(trainer).sums), **_named(metrics or {}, metric_key_prefix)}
    return EvalLoopOutput(arrays.predictions, arrays.labels, named, num_samples)


_EMPTY = (
    "`trainer.{call}(...)`: the dataset gave no batch, so there is nothing to take a mean of. Pass a dataset with at "
    "least one row (an iterator can be used once; `dataloader_drop_last=True` drops a last batch that is not full)."
)


# ---- one batch ----


class _Batch(NamedTuple):
    """The values of a batch that are kept."""

    loss: tfn.Mean | None
    rows: int
    predictions: Nested = None
    labels: Nested = None
    inputs: Nested = None
    losses: Nested = None


def _batch(trainer: TrainerLike, inputs: Batch, loss_only: bool, ignore_keys: list[str] | None) -> _Batch:
    loss, predictions, labels = trainer.prediction_step(trainer.model, inputs, loss_only, ignore_keys=ignore_keys)
    mean = None if loss is None else mean_of(trainer, loss, inputs)
    rows = _rows(inputs)
    wanted = trainer.args.include_for_metrics
    losses = None if loss is None or "loss" not in wanted else _each_row(loss, rows)
    labels, predictions = nested_detach(labels), nested_detach(predictions)
    if predictions is not None and trainer.preprocess_logits_for_metrics is not None:
        predictions = trainer.preprocess_logits_for_metrics(predictions, labels)
    main = _main_input(trainer, inputs) if "inputs" in wanted else None
    return _Batch(mean, rows, predictions, labels, main, losses)


def _examine(trainer: TrainerLike, batches: list[Batch]) -> None:
    """Try out, before the first of several batches, what the loss is divided by; every rank calls this."""
    if trainer._trainfn.examined or overridden(trainer, "prediction_step"):
        return
    if not _has_none(trainer._trainfn.world, batches[0]) and gives_loss(trainer, batches[0]):
        # The override of `_prepare_inputs` is left out, because it is for batches that are evaluated.
        batches = [prepared_inputs(trainer, batch) for batch in batches]
        find_shift(trainer, batches[0])
        examine(trainer, batches, training=False)
    share_findings(trainer)


def _rows(inputs: Batch) -> int:
    try:
        return row_count(inputs)
    except TypeError:
        return 0


def _has_none(world: World, inputs: Batch) -> bool:
    """Whether this rank has no rows of a batch, of which other ranks have some."""
    return world.plan is not None and tfn.data.is_empty(inputs)


def _each_row(loss: Tensor | float, rows: int) -> Tensor:
    """Return the mean loss of a batch, once for each row: the losses of single rows are not known in general."""
    loss = torch.as_tensor(loss).detach()
    return loss if loss.numel() == rows and loss.dim() else loss.mean().repeat(rows)


def _main_input(trainer: TrainerLike, inputs: Batch) -> Tensor:
    name = getattr(trainer.model, "main_input_name", "input_ids")
    if name not in inputs:
        raise ValueError(
            f"`TrainingArguments(include_for_metrics=['inputs'])` can't work: the model's main input is {name!r}, but "
            f"the batch has only {sorted(inputs)}. Leave 'inputs' out, or set `model.main_input_name` to one of these."
        )
    return trainer._prepare_inputs({name: inputs[name]})[name]


def _with_next(batches: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Yield each batch and the one after it; None after the last."""
    ahead: list[T] = []
    for batch in batches:
        if ahead:
            yield ahead.pop(), batch
        ahead.append(batch)
    if ahead:
        yield ahead.pop(), None


# ---- all batches ----


class _Kept(NamedTuple):
    """The outputs of all batches: on the device, until `to_host` moves them."""

    predictions: Nested
    labels: Nested
    inputs: Nested
    losses: Nested

    @staticmethod
    def empty() -> _Kept:
        # Lists of batches, concatenated once: `do_nested_concat=True` would copy all rows so far at each batch.
        return _Kept(*(EvalLoopContainer(do_nested_concat=False, padding_index=PADDING) for _ in _Kept._fields))

    def add(self, batch: _Batch) -> None:
        for container, tree in zip(self, (batch.predictions, batch.labels, batch.inputs, batch.losses), strict=True):
            if tree is not None:
                check_tensors(tree)
                container.add(tree)

    def to_host(self) -> None:
        for container in self:
            container.to_cpu_and_numpy()

    def arrays(self, world: World, places: list[int], *, concat: bool) -> _Kept:
        """Return NumPy arrays of the rows of all ranks, or a list with one for each batch; `None` where none was kept.

        Every rank calls this. It gathers the bytes of all that is kept, once an evaluation.
        """
        each = all_batches(world, places, [container.get_arrays() for container in self])
        return _Kept(*(None if arrays is None else merged(arrays) if concat else arrays for arrays in each))


# ---- metrics ----


def _metrics(trainer: TrainerLike, arrays: _Kept) -> Metrics | None:
    if trainer.compute_metrics is None or arrays.predictions is None or arrays.labels is None:
        return None
    shown = EvalPrediction(arrays.predictions, arrays.labels, inputs=arrays.inputs, losses=arrays.losses)
    return _checked(trainer.compute_metrics(shown))


def _batch_metrics(trainer: TrainerLike, batch: _Batch | None, inputs: Batch, is_last: bool) -> Metrics | None:
    """Pass one batch to `compute_metrics`; return its result over all batches at the last one, else None."""
    if trainer.compute_metrics is None:
        return None
    given = inputs if "inputs" in trainer.args.include_for_metrics else None  # all inputs, as in transformers
    mine = None if batch is None else (batch.predictions, batch.labels, given, batch.losses)
    predictions, labels, given, losses = one_batch(trainer._trainfn.world, mine) or (None,) * 4
    if predictions is None or labels is None:
        return None
    shown = EvalPrediction(predictions, labels, inputs=given, losses=losses)
    metrics = trainer.compute_metrics(shown, compute_result=is_last)
    return _checked(metrics) if is_last else None


def _checked(metrics: object) -> Metrics:
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"compute_metrics(...) returned {metrics!r}, but metrics are a dict of names and numbers. "
            "Write `return {'accuracy': accuracy}`."
        )
    return cast("Metrics", denumpify_detensorize(dict(cast("Mapping[str, object]", metrics))))


def _named(metrics: Metrics, prefix: str) -> Metrics:
    return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in metrics.items()}


def _with_speed(trainer: TrainerLike, output: EvalLoopOutput, prefix: str, start: float) -> Metrics:
    """Add the speed to the metrics of a loop, in place; return them."""
    metrics, num_samples = output.metrics or {}, output.num_samples or 0
    steps = math.ceil(num_samples / together(trainer, trainer.args.eval_batch_size))
    metrics.update(speed_metrics(prefix, start, num_samples=num_samples, num_steps=steps))
    return metrics


def _check_rows(dataset: Datasets | str | None, call: str) -> None:
    """Raise if a dataset is known to be empty, before a loader raises a less helpful error.

    The loop itself finds out whether a dataset without a length is empty.
    """
    if not isinstance(dataset, str) and has_length(dataset) and len(dataset) == 0:
        raise ValueError(_EMPTY.format(call=call))


def _check_name(trainer: TrainerLike, dataset: Datasets | str | None) -> None:
    if not isinstance(dataset, str):
        return
    named = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
    if dataset not in named:
        known = sorted(cast("dict[str, Dataset]", named)) or "no names, because it is not a dict"
        raise ValueError(
            f"`trainer.evaluate({dataset!r})`: a string names one of the datasets in `eval_dataset`, which has "
            f"{known}. Pass the dataset itself, or write `Trainer(eval_dataset={{{dataset!r}: dataset}})`."
        )
