"""The types of this package: the values that go through a Trainer, and a Trainer as its helpers see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

import trainfn as tfn

if TYPE_CHECKING:  # the files that define these import this one
    from torch.utils.data import IterableDataset
    from transformers.trainer_utils import EvalLoopOutput

    from trainfn.hf._arguments._training import TrainingArguments
    from trainfn.hf._callbacks._events import CallbackHandler
    from trainfn.hf._reporting._hub import Pushes
    from trainfn.hf._run._record import Record

Values: TypeAlias = dict[str, Any]
"""Values of any kind by name: options of a call, the content of a JSON file, a row."""
Batch: TypeAlias = dict[str, Any]
"""A batch by name, as a collator returns it and a model takes it: tensors and other values."""
Row: TypeAlias = Mapping[str, Any]
"""One row of a dataset."""
Outputs: TypeAlias = Any
"""The outputs of a model: a `transformers.utils.ModelOutput`, a dict or a tuple."""
OptState: TypeAlias = Any
"""The state of an optimizer: named tuples of tensors, and of dicts of them by parameter."""
Loss: TypeAlias = Tensor | tfn.Mean
Nested: TypeAlias = Any
"""A tensor or an array; or tuples, lists and dicts of them."""
Metrics: TypeAlias = dict[str, Any]
"""Metrics by name, as they are logged: mostly numbers."""
Optimizer: TypeAlias = torch.optim.Optimizer | tfn.Transform
Scheduler: TypeAlias = "Steps | tfn.Schedule"
Callback: TypeAlias = TrainerCallback | type[TrainerCallback]
Collator: TypeAlias = Callable[[Any], Batch]  # of a list of rows
LossFunction: TypeAlias = Callable[..., Loss]
MetricsFunction: TypeAlias = Callable[..., Metrics]
LossMetrics: TypeAlias = Callable[[Batch, Outputs], dict[str, tfn.Mean]]
Processor: TypeAlias = (
    transformers.PreTrainedTokenizerBase
    | transformers.BaseImageProcessor
    | transformers.FeatureExtractionMixin
    | transformers.ProcessorMixin
)


class SizedDataset(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Dataset: TypeAlias = "SizedDataset | IterableDataset[Any]"
Datasets: TypeAlias = "Dataset | dict[str, Dataset]"
Loader: TypeAlias = Iterable[Any]
"""Batches; each pass over it is an epoch. Most have a length."""


class Steps(Protocol):
    """A scheduler of torch's kind, which writes rates into an optimizer's groups."""

    @property
    def step(self) -> Callable[..., object]: ...

    def get_last_lr(self) -> Sequence[float | Tensor]: ...


class Trial(Protocol):
    """A trial of optuna."""

    @property
    def number(self) -> int: ...

    @property
    def params(self) -> Values: ...

    def report(self, value: float, step: int) -> None: ...

    def should_prune(self) -> bool: ...


class TrainerLike(Protocol):
    """A Trainer, as the functions that do its work see it.

    A subclass may override the methods, so they are called on the Trainer and not as functions. Private values are in
    `_trainfn`, except under names of transformers' Trainer that subclasses use.
    """

    _trainfn: Record
    _signature_columns: list[str] | None
    model: nn.Module
    model_init: Callable[..., nn.Module] | None
    data_collator: Collator
    processing_class: Processor | None
    train_dataset: Dataset | None
    eval_dataset: Datasets | None
    compute_loss_func: LossFunction | None
    compute_metrics: MetricsFunction | None
    preprocess_logits_for_metrics: Callable[[Nested, Nested], Nested] | None
    optimizer: Optimizer | None
    optimizer_cls_and_kwargs: tuple[Callable[..., torch.optim.Optimizer], Values] | None
    lr_scheduler: Scheduler | None
    label_names: list[str]
    label_smoother: Callable[..., Tensor] | None
    can_return_loss: bool
    callback_handler: CallbackHandler
    state: TrainerState
    control: TrainerControl
    train_state: tfn.TrainState | None
    is_in_train: bool
    current_gradient_accumulation_steps: int
    hub_model_id: str | None
    push_in_progress: Pushes | None

    @property
    def args(self) -> TrainingArguments: ...

    # --- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Loader: ...

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> Loader: ...

    def get_test_dataloader(self, test_dataset: Dataset) -> Loader: ...

    def num_examples(self, dataloader: Loader) -> int | None: ...

    def floating_point_ops(self, inputs: Batch) -> int: ...

    def _prepare_inputs(self, inputs: Batch) -> Batch: ...

    def _get_dataloader(
        self,
        dataset: Dataset,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Dataset], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Loader: ...

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any: ...

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Any: ...

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any: ...

    def _get_collator_with_removed_columns(
        self, data_collator: Collator, description: str | None = None
    ) -> Collator: ...

    def _prepare_input(self, data: Any) -> Any: ...

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]: ...

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None: ...

    def _set_signature_columns_if_needed(self) -> None: ...

    # --- loss and step --------------------------------------------------------------------------------------------

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[Any]: ...

    @property
    def compute_loss(self) -> Callable[..., Loss | tuple[Loss, Outputs]]: ...

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | None = None) -> Tensor: ...

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None: ...

    # `trainfn.hf._optim` calls the first two as transformers does; overrides of older versions take fewer arguments.
    def create_optimizer(self) -> Optimizer | None: ...

    def create_scheduler(self, num_training_steps: int) -> Scheduler | None: ...

    @property
    def get_optimizer_cls_and_kwargs(self) -> Callable[..., tuple[Any, Values]]: ...

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]: ...

    def _get_learning_rate(self) -> float: ...

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Datasets | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]: ...

    def evaluation_loop(
        self,
        dataloader: Loader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput: ...

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Nested, Nested]: ...

    def _evaluate(self, ignore_keys: list[str] | None) -> Metrics: ...

    # --- reports and files ----------------------------------------------------------------------------------------

    def summary(self) -> str: ...

    def log(self, logs: Metrics, start_time: float | None = None) -> None: ...

    def end(self) -> None: ...

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...

    def create_model_card(self, **options: Any) -> None: ...

    def is_world_process_zero(self) -> bool: ...

    def is_local_process_zero(self) -> bool: ...

    def _save(self, output_dir: str) -> None: ...

    def _save_checkpoint(self, model: nn.Module, trial: Trial | None = None) -> None: ...
