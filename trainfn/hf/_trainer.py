"""The facade: transformers' Trainer, its names and signatures, on the functional core."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PredictionOutput, TrainOutput
from transformers.utils import can_return_loss, find_labels, logging

import trainfn as tfn
from trainfn.hf._arguments._support import check_supported
from trainfn.hf._arguments._training import TrainingArguments
from trainfn.hf._callbacks import _events as _callbacks
from trainfn.hf._checkpoints import _folders as _checkpoints
from trainfn.hf._evaluation import _loop as _evaluation
from trainfn.hf._evaluation import _prediction
from trainfn.hf._optim import _resolve as _optimization
from trainfn.hf._parallel import _parameters as _whole
from trainfn.hf._parallel._layout import world_of
from trainfn.hf._reporting._methods import Reporting, _hub, _logs
from trainfn.hf._reporting._trackers import tracker_callbacks
from trainfn.hf._run import _data, _search, _setup, _summary
from trainfn.hf._run import _loop as _train
from trainfn.hf._step import _loss, _manual

logger = logging.get_logger(__name__)


class Trainer(Reporting):
    """Train, evaluate and predict with a model, as transformers' Trainer does; every method may be overridden.

    The step is `trainfn.train_step`: pure, the same update for every split into micro-batches, resumable to the bit.
    The model holds the newest parameters at all times, after errors and Ctrl-C too. Those that are split over ranks, as
    by ``fsdp="full_shard"``, it holds in evaluations, in a `whole_model` block, and after `train`, by Ctrl-C too; else
    they are NaN there, and after an error the checkpoints have them. Constructing a Trainer draws nothing and changes
    nothing but ``model.config.use_cache``. `train` called again starts a new run from the weights
    as they are: step, schedule, optimizer state and data order begin anew.

    Args:
        model: What is called with the batches' entries as keywords; or ``model_init``, called for each run.
        args: See `TrainingArguments`; by default those with ``output_dir="tmp_trainer"``.
        data_collator: Makes a batch of a list of rows; by default it pads if ``processing_class`` is a tokenizer.
        train_dataset: Rows to train on.
        eval_dataset: Rows to evaluate on; or a dict of such by name.
        processing_class: The tokenizer or processor, saved with the model.
        model_init: ``() -> model`` or ``(trial) -> model``.
        compute_loss_func: ``(outputs, labels, num_items_in_batch) -> loss``.
        compute_metrics: ``EvalPrediction -> dict``.
        callbacks: Callbacks of transformers' kind, classes or instances.
        optimizers: A torch optimizer and a torch schedule to use in place of those that ``args`` name.
        optimizer_cls_and_kwargs: A torch optimizer class and its arguments.
        preprocess_logits_for_metrics: ``(logits, labels) -> logits``, before they are collected.
        tokenizer: The old name of ``processing_class``.
        callback: The old name of ``callbacks``.

    Raises:
        ValueError: If arguments contradict each other or ask for what can't be done, saying what to write.

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
        """Report an override whose name is nearly that of a method."""
        super().__init_subclass__(**options)
        _setup.report_misspelt(cls, Trainer)

    # What a step looks at: the rest, such as the newest state and the logs, changes while it trains.
    _steps_read: ClassVar = frozenset(("args", "model", "compute_loss_func", "label_smoother", "label_names", "_world"))

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: Sequence[Any] | Any | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        *,
        tokenizer: Any = None,
        callback: Any = None,
    ) -> None:
        self.args = args if args is not None else TrainingArguments("tmp_trainer")
        check_supported(self.args)
        _setup.check_liger(self.args)
        self._device = self.args.device
        self.model_init = model_init
        self.model = _setup.first_model(model, model_init, self.args)
        self._world = world_of(self.args, self.model)
        self.processing_class = _setup.renamed("tokenizer", tokenizer, "processing_class", processing_class)
        self.data_collator = data_collator or _setup.default_collator(self.processing_class)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self._given_optimizers = optimizers
        self.label_names = self.args.label_names or find_labels(type(self.model))
        self.can_return_loss = can_return_loss(type(self.model))
        self.label_smoother = _setup.smoother(self.args, self.model)
        self._fresh()
        _logs.set_verbosity(self.args)
        trackers = tracker_callbacks(self.args)
        given = _callbacks.gather(callbacks, callback)
        self.callback_handler = _callbacks.CallbackHandler(_callbacks.with_defaults(given, self.args, trackers), self)
        self.hub_model_id: str | None = None
        self.push_in_progress: Any = None
        if self.args.push_to_hub:
            _hub.init_repo(self)
        _setup.set_use_cache(self.model, self.args)
        self._event("on_init_end")

    def _fresh(self) -> None:
        """What a run fills in."""
        self.state, self.control = TrainerState(), TrainerControl()
        self.train_state: tfn.TrainState | None = None
        self.is_in_train = False
        self._signature_columns: list[str] | None = None
        self._train_dataloader: Any = None
        self._saving: Any = None
        self._latest_metrics: tuple[int, dict[str, Any]] = (-1, {})
        self._restored_losses: dict[str, Any] | None = None
        self._trial: Any = None
        self._terminated = self._interrupted = False
        self._held = tfn.process.Pending()  # Ctrl-C on this rank, of which the others have not heard
        self._sigterm = tfn.process.Pending()
        self._released = False  # whether the model's values are split over ranks, and not in it
        self._counted: list[float] = [0.0, 0]  # operations and tokens that only this rank knows of
        self._began = time.time()
        self._parameter_count: int | None = None
        self._shifts: bool | None = None  # whether the model's loss shifts labels, once it is known

    def _new_model(self) -> None:
        self.model = _setup.made_model(self.model_init, self.args, self._trial)
        self._shifts = self._parameter_count = self._signature_columns = None  # of another model
        _setup.set_use_cache(self.model, self.args)

    # --- names that are kept --------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The old name of `processing_class`."""
        return self.processing_class

    @property
    def model_wrapped(self) -> nn.Module:
        """The model: nothing is wrapped here."""
        return self.model

    @property
    def place_model_on_device(self) -> bool:
        """Whether the model is moved to ``args.device``."""
        return True

    # --- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """One epoch of micro-batches; any iterable of dicts will do."""
        return _data.train_loader(self)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches of ``eval_dataset``, by default the Trainer's; a string names one in a dict."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(eval_dataset, str):
            dataset = self.eval_dataset[eval_dataset]
        if dataset is None:
            raise ValueError("Trainer: evaluation needs an `eval_dataset`.")
        return _data.eval_loader(self, dataset, "evaluation")

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The batches of ``test_dataset``."""
        return _data.eval_loader(self, test_dataset, "test")

    def num_examples(self, dataloader: Any) -> int | None:
        """The rows of a loader's dataset, if it has a length."""
        dataset = getattr(dataloader, "dataset", None)
        return len(dataset) if hasattr(dataset, "__len__") else None  # type: ignore[arg-type]

    def _set_signature_columns_if_needed(self) -> None:
        """Fill in ``_signature_columns``: the names that the model takes, and those of labels."""
        if self._signature_columns is None:
            self._signature_columns = [*_setup.arguments_of(self.model), *{"label", "label_ids", *self.label_names}]

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """A collator's batch as a dict of tensors on the device."""
        return _data.prepared_inputs(self, inputs)

    # --- loss and step --------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of a batch, a mean over ``num_items_in_batch`` labels; or an exact `trainfn.Mean`."""
        return _loss.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def _loss_metrics(self, inputs: dict[str, Any], outputs: Any) -> dict[str, tfn.Mean]:
        """What is logged with the loss of a batch: part of the step, so nothing in it may wait for the device."""
        return {}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """One micro-batch forwards and backwards; only called if it is overridden."""
        return _manual.training_step(self, model, inputs, num_items_in_batch)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Set up the schedule, then the optimizer."""
        _optimization.create(self, num_training_steps)

    def create_optimizer(self) -> Any:
        """The optimizer: a transform of `trainfn.optim`; an override may return a torch optimizer."""
        return _optimization.create_optimizer(self)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule, of `trainfn.schedules`; an override may return a torch schedule."""
        return _optimization.create_scheduler(self, num_training_steps)

    def get_learning_rates(self) -> list[float]:
        """The learning rate of the newest step."""
        return [_optimization.learning_rate(self)]

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: True for the newest one in ``output_dir``, or a path.
            trial: Of a hyper-parameter search.
            ignore_keys_for_eval: Outputs that evaluations leave out.

        Raises:
            ValueError: If there is no such checkpoint.
            trainfn.errors.CheckpointError: If it is damaged or does not fit.
        """
        return _train.train(self, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def hyperparameter_search(self, *args: Any, **options: Any) -> Any:
        """Train with other arguments again and again; see `trainfn.hf._run._search.hyperparameter_search`."""
        return _search.hyperparameter_search(self, *args, **options)

    def summary(self) -> str:
        """Describe the run that `train` would make; print it before a long run."""
        return _summary.summary(self)

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss and the metrics over a dataset; the loss does not depend on the batch size."""
        return _evaluation.evaluate(self, eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The predictions over a dataset, and the metrics if it has labels."""
        return _evaluation.predict(self, test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """What `evaluate` and `predict` share."""
        return _evaluation.evaluation_loop(
            self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Loss, logits and labels of one batch."""
        return _prediction.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)

    def _eval_model(self, model: nn.Module) -> nn.Module:
        """What evaluations call: the model, or something that stands for it."""
        return model

    def _evaluate(self, ignore_keys: list[str] | None) -> dict[str, Any]:
        """An evaluation during training."""
        metrics = self.evaluate(ignore_keys=ignore_keys)
        self._latest_metrics = self.state.global_step, metrics
        if self._trial is not None:
            _search.report(self, metrics)
        _optimization.after_evaluation(self, metrics)
        return metrics

    # --- events -------------------------------------------------------------------------------------------------------

    def _event(self, name: str, **given: Any) -> None:
        self.control = getattr(self.callback_handler, name)(self.args, self.state, self.control, **given)

    def _end_epoch(self) -> None:
        self._event("on_epoch_end")
        _train.agree(self)
        _train.maybe_log_save_evaluate(self)

    @contextlib.contextmanager
    def whole_model(self) -> Generator[nn.Module]:
        """The model with all its values, for the time of a block; all ranks must enter it.

        In a callback, parameters that are split over ranks are NaN outside of it. It takes the memory of the whole
        parameters; what is written to those that are split is lost. In one process it does nothing.
        """
        with _whole.whole(self):
            yield self.model

    # --- saving -------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, the tokenizer and the arguments, so that ``from_pretrained`` reads them.

        On several ranks all must call it, in callbacks too: parameters that are split come together. Rank 0 writes.
        """
        self._save(output_dir or self._output_dir())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save(self, output_dir: str) -> None:
        _checkpoints.save_model(self, output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Save ``checkpoint-{global_step}``, in the background."""
        folder = self._saving.save()
        if self.args.push_to_hub:
            self._saving.wait()
            _hub.push_from_checkpoint(self, str(folder))

    def _output_dir(self) -> str:
        return _search.folder(self, str(Path(self.args.output_dir or "trainer_output")))

    def _state_dict(self) -> dict[str, Any]:
        return _checkpoints.state_dict(self)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """An estimate for a batch: six operations for each token and parameter that is no embedding."""
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if not isinstance(tokens, Tensor) or not hasattr(self.model, "num_parameters"):
            return 0
        if self._parameter_count is None:
            self._parameter_count = int(self.model.num_parameters(exclude_embeddings=True))  # type: ignore[operator]
        return 6 * tokens.numel() * self._parameter_count


for _method in (Trainer.training_step, Trainer.create_scheduler):
    _method.not_overridden = True  # type: ignore[attr-defined]  # so that what is overridden can be told
