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
    from accelerate import Accelerator
    from torch.utils.data import IterableDataset
    from transformers.trainer_utils import EvalLoopOutput, HPSearchBackend, TrainerMemoryTracker, TrainOutput

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
    is_model_parallel: bool
    is_distributed_loading_by_transformers: bool
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    place_model_on_device: bool
    model_wrapped: nn.Module
    accelerator: Accelerator
    gather_function: Callable[..., Nested]
    current_flos: float
    neftune_noise_alpha: float | None
    hp_name: Callable[[Trial], str] | None
    hp_search_backend: HPSearchBackend | None
    deepspeed: object
    current_gradient_accumulation_steps: int
    hub_model_id: str | None
    push_in_progress: Pushes | None
    _train_batch_size: int
    _created_lr_scheduler: bool
    _memory_tracker: TrainerMemoryTracker

    @property
    def args(self) -> TrainingArguments: ...

    # --- the beginning, and counts --------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None: ...

    def _build_accelerator_args(self, **kwargs: Any) -> Values: ...

    def call_model_init(self, trial: Trial | None = None) -> nn.Module: ...

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None: ...

    def get_tp_size(self) -> int: ...

    def get_cp_size(self) -> int: ...

    def get_sp_size(self) -> int: ...

    def store_flos(self) -> None: ...

    def _track_num_input_tokens(self, inputs: Batch) -> None: ...

    def _hp_search_setup(self, trial: Trial | None) -> None: ...

    def _report_to_hp_search(self, trial: Trial | None, step: int, metrics: Metrics) -> None: ...

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
        sampler_fn: Callable[[Dataset], Nested] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Loader: ...

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Nested: ...

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Nested: ...

    def _remove_unused_columns(self, dataset: Nested, description: str | None = None) -> Nested: ...

    def _get_collator_with_removed_columns(
        self, data_collator: Collator, description: str | None = None
    ) -> Collator: ...

    def _prepare_input(self, data: Nested) -> Nested: ...

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]: ...

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | None: ...

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
    def get_optimizer_cls_and_kwargs(self) -> Callable[..., tuple[Callable[..., torch.optim.Optimizer], Values]]: ...

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

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Trial | None = None) -> TrainOutput: ...

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Trial | None,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None: ...

    def _evaluate(
        self, trial: Trial | None, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> Metrics: ...

    def _determine_best_metric(self, metrics: Metrics, trial: Trial | None) -> bool: ...

    def _finalize_training(self, trial: Trial | None, num_train_samples: float, start_time: float) -> TrainOutput: ...

    # --- reports and files ----------------------------------------------------------------------------------------

    def summary(self) -> str: ...

    def log(self, logs: Metrics, start_time: float | None = None) -> None: ...

    def end(self) -> None: ...

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...

    def create_model_card(self, **options: Any) -> None: ...

    def is_world_process_zero(self) -> bool: ...

    def is_local_process_zero(self) -> bool: ...

    def push_to_hub(self, commit_message: str = "End of training") -> object: ...

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None: ...

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None: ...

    def _finish_current_push(self) -> None: ...

    def _get_output_dir(self, trial: Trial | None) -> str: ...

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None: ...

    def _load_from_checkpoint(self, resume_from_checkpoint: str) -> None: ...

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None: ...

    def _load_rng_state(self, checkpoint: str | None) -> None: ...

    def _load_callback_state(self) -> None: ...

    def _load_best_model(self) -> None: ...

    def _save_checkpoint(self, model: nn.Module, trial: Trial | None = None) -> None: ...
