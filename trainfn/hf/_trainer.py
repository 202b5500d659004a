"""The facade: transformers' Trainer, its names and signatures, on the functional core."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput
from transformers.utils import can_return_loss, find_labels, logging

import trainfn as tfn
from trainfn.hf import _names
from trainfn.hf._arguments._convert import as_ours
from trainfn.hf._arguments._support import check_supported
from trainfn.hf._arguments._training import TrainingArguments
from trainfn.hf._callbacks._events import CallbackHandler, event, gather, with_defaults
from trainfn.hf._checkpoints._methods import Checkpointing
from trainfn.hf._evaluation import _evaluate, _prediction
from trainfn.hf._optim._methods import Optimizing
from trainfn.hf._parallel import _parameters
from trainfn.hf._parallel._layout import world_of
from trainfn.hf._reporting import _logs
from trainfn.hf._reporting._methods import Reporting
from trainfn.hf._reporting._trackers import tracker_callbacks
from trainfn.hf._run import _loop, _setup, _summary
from trainfn.hf._run._loading import Loading
from trainfn.hf._run._methods import Running
from trainfn.hf._run._record import Record
from trainfn.hf._step import _loss, _manual
from trainfn.hf._types import (
    Batch,
    Callback,
    Collator,
    Dataset,
    Datasets,
    Loader,
    Loss,
    LossFunction,
    MetricsFunction,
    Nested,
    Optimizer,
    Outputs,
    Processor,
    Scheduler,
    Trial,
    Values,
)

logger = logging.get_logger(__name__)


@_names.without_missing
class Trainer(Loading, Running, Optimizing, Checkpointing, Reporting):
    """Train, evaluate and predict with a model, as transformers' Trainer does; every method may be overridden.

    The step is `trainfn.train_step`: pure, the same update for every split into micro-batches, resumable to the bit.
    The model holds the newest parameters at all times, after errors and Ctrl-C too. Parameters that are sharded over
    ranks, as by ``fsdp="full_shard"``, it holds in evaluations, in a `whole_model` block, and after `train` or Ctrl-C.
    At other times it holds NaN in their place, and after an error the checkpoints have them.

    Constructing a Trainer draws nothing and changes nothing but ``model.config.use_cache``. `train` called again starts
    a new run from the current weights: step, schedule, optimizer state and data order begin anew. A subclass may use
    any private name but ``_trainfn``, under which a Trainer keeps its own values.

    Args:
        model: The model, which is called with the batches' entries as keywords. Or pass ``model_init``.
        args: The `TrainingArguments`, by default with ``output_dir="tmp_trainer"``.
        data_collator: Makes a batch of a list of rows; by default it pads if ``processing_class`` is a tokenizer.
        train_dataset: Rows to train on.
        eval_dataset: Rows to evaluate on; or a dict of datasets by name.
        processing_class: The tokenizer or processor, saved with the model.
        model_init: ``() -> model`` or ``(trial) -> model``, called for each run.
        compute_loss_func: ``(outputs, labels, num_items_in_batch) -> loss``.
        compute_metrics: ``EvalPrediction -> dict``.
        callbacks: Callbacks of transformers' kind, classes or instances.
        optimizers: A torch optimizer and a torch schedule to use in place of those that ``args`` name.
        optimizer_cls_and_kwargs: A torch optimizer class and its arguments.
        preprocess_logits_for_metrics: ``(logits, labels) -> logits``, before they are collected.
        tokenizer: The old name of ``processing_class``.
        callback: The old name of ``callbacks``.

    Raises:
        ValueError: If arguments contradict each other or can't be honoured; the message says what to write.

    >>> import tempfile, torch, transformers
    >>> from trainfn import Trainer, TrainingArguments
    >>> config = transformers.GPT2Config(
    ...     vocab_size=7, n_positions=4, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    >>> rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 8
    >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, use_cpu=True, disable_tqdm=True, log_level="error")
    >>> model = transformers.GPT2LMHeadModel(config)
    >>> Trainer(model, args, train_dataset=rows).train().global_step  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    2
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Warn of methods that are never called."""
        super().__init_subclass__(**options)
        _names.check_overrides(cls, Trainer)

    def __getattr__(self, name: str) -> Any:
        """Raise for a name that a Trainer lacks; a property's own error stays itself."""
        if _names.exists(type(self), name) or name in _names.NOT_CALLED:
            return object.__getattribute__(self, name)
        raise _names.absent(self, name)

    _signature_columns: list[str] | None

    # A step is captured with what it reads. The rest, such as the newest state and the logs, changes while it trains.
    _steps_read: ClassVar = frozenset(
        ("args", "model", "compute_loss_func", "label_smoother", "label_names", "_trainfn")
    )

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Collator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Datasets | None = None,
        processing_class: Processor | None = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: LossFunction | None = None,
        compute_metrics: MetricsFunction | None = None,
        callbacks: Sequence[Callback] | Callback | None = None,
        optimizers: tuple[Optimizer | None, Scheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[Callable[..., torch.optim.Optimizer], Values] | None = None,
        preprocess_logits_for_metrics: Callable[[Nested, Nested], Nested] | None = None,
        *,
        tokenizer: Processor | None = None,
        callback: Sequence[Callback] | Callback | None = None,
    ) -> None:
        self.args = as_ours(args if args is not None else TrainingArguments("tmp_trainer"))
        check_supported(self.args)
        _setup.check_liger(self.args)
        _setup.defaults(self, model_init)
        self.model = self.model_wrapped = _setup.first_model(self, model)
        self._trainfn = Record(world=world_of(self.args, self.model), given=optimizers)
        self.create_accelerator_and_postprocess()
        _setup.placed(self)
        self.processing_class = _setup.renamed("tokenizer", tokenizer, "processing_class", processing_class)
        self.data_collator = data_collator or _setup.default_collator(self.processing_class)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.label_names: list[str] = self.args.label_names or find_labels(type(self.model))
        self.can_return_loss = can_return_loss(type(self.model))
        self.label_smoother: Callable[..., Tensor] | None = _setup.smoother(self.args, self.model)
        self._validate_args()
        self.train_state: tfn.TrainState | None = None
        _logs.set_verbosity(self.args)
        given = with_defaults(gather(callbacks, callback), self.args, tracker_callbacks(self.args))
        self.callback_handler = CallbackHandler(given, self)
        if self.args.push_to_hub:
            self.init_hf_repo()
        _setup.set_use_cache(self.model, self.args)
        event(self, "on_init_end")

    # --- names that are kept --------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Processor | None:
        """The old name of `processing_class`."""
        return self.processing_class

    # --- loss and step --------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Loss | tuple[Loss, Outputs]:
        """The loss of a batch, a mean over ``num_items_in_batch`` labels; or an exact `trainfn.Mean`."""
        return _loss.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which losses are computed; an override may add to it."""
        stack = contextlib.ExitStack()
        stack.enter_context(self.autocast_smart_context_manager())
        return stack

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | None = None) -> Tensor:
        """One micro-batch forwards and backwards; only called if it is overridden."""
        return _manual.training_step(self, model, inputs, num_items_in_batch)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Trial | None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: True for the newest checkpoint in ``output_dir``, or a path.
            trial: The trial, if a hyperparameter search calls this.
            ignore_keys_for_eval: Outputs that evaluations leave out.

        Raises:
            ValueError: If there is no such checkpoint.
            trainfn.errors.CheckpointError: If the checkpoint is damaged or does not fit.
        """
        return _loop.train(self, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def summary(self) -> str:
        """Describe the run that `train` would make; print it before a long run."""
        return _summary.summary(self)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Datasets | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The loss and the metrics over a dataset; the loss does not depend on the batch size."""
        return _evaluate.evaluate(self, eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The predictions over a dataset, and the metrics if it has labels."""
        return _evaluate.predict(self, test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: Loader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Predict over a loader and compute the metrics: the part that `evaluate` and `predict` share."""
        return _evaluate.evaluation_loop(
            self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> _prediction.StepOutput:
        """Loss, logits and labels of one batch."""
        return _prediction.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)

    @contextlib.contextmanager
    def whole_model(self) -> Generator[nn.Module]:
        """The model with its full parameters, for the time of a block; all ranks must enter it.

        In a callback, sharded parameters are NaN outside of the block. Inside, the full parameters take their memory,
        and changes of sharded ones are lost afterwards. In one process it does nothing.
        """
        with _parameters.whole(self):
            yield self.model
