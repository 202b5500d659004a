"""The methods of a Trainer around a run: the model and the Accelerator it begins with, its counts, its search."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import BestRun, TrainOutput

from trainfn.hf._optim import _resolve
from trainfn.hf._parallel import _accelerator
from trainfn.hf._run import _actions, _search, _setup
from trainfn.hf._run._record import current_run
from trainfn.hf._types import Batch, Metrics, Nested, TrainerLike, Trial, Values

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers.trainer_utils import HPSearchBackend, TrainerMemoryTracker

    from trainfn.hf._reporting._hub import Pushes
    from trainfn.hf._trainer import Trainer


class Running:
    """The part of `Trainer` that begins a run, counts, and searches; and the attributes that a Trainer begins with."""

    model_init: Callable[..., nn.Module] | None
    state: TrainerState
    control: TrainerControl
    accelerator: Accelerator
    gather_function: Callable[..., Nested]
    is_in_train: bool
    is_model_parallel: bool
    is_distributed_loading_by_transformers: bool
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    place_model_on_device: bool
    current_flos: float
    current_gradient_accumulation_steps: int
    neftune_noise_alpha: float | None
    hp_name: Callable[[Trial], str] | None
    hp_search_backend: HPSearchBackend | None
    deepspeed: object
    hub_model_id: str | None
    push_in_progress: Pushes | None
    _signature_columns: list[str] | None
    _train_batch_size: int
    _created_lr_scheduler: bool
    _memory_tracker: TrainerMemoryTracker

    # --- what a run begins with ---------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self: TrainerLike) -> None:
        """Make ``accelerator``, which is for the code of subclasses: the Trainer's own step does not use it."""
        _accelerator.create(self)

    def _build_accelerator_args(self: TrainerLike, **kwargs: Any) -> Values:
        """Return the keyword arguments of the Accelerator."""
        return _accelerator.options_of(self, kwargs)

    def _validate_args(self: TrainerLike) -> None:
        """Raise for arguments of the Trainer that can't work together."""
        _setup.validate(self)

    def call_model_init(self: TrainerLike, trial: Trial | None = None) -> nn.Module:
        """Return a new model of ``model_init``, which may take a trial."""
        return _setup.called(self.model_init, trial)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Move the model, unless it is spread over devices or its weights are packed."""
        _setup.move(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: object = None) -> nn.Module:
        """Return the model itself, because nothing is wrapped."""
        return model

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[object]:
        """Return a context that does nothing; an override's is entered around each loss."""
        return contextlib.nullcontext()

    # --- sizes and counts ---------------------------------------------------------------------------------------------

    def get_total_train_batch_size(self: TrainerLike, args: Any) -> int:
        """Return the number of rows of an update, of all ranks together."""
        parts = args.world_size // self.get_tp_size() // self.get_cp_size() // self.get_sp_size()
        return self._train_batch_size * args.gradient_accumulation_steps * parts

    def get_tp_size(self: TrainerLike) -> int:
        """Return the number of ranks that share each layer."""
        world = self._trainfn.world
        return 1 if world.plan is None else world.plan.shape(world.ranks.size)["tensor"]

    def get_cp_size(self) -> int:
        """Return 1, because no sequence is split over ranks."""
        return 1

    def get_sp_size(self) -> int:
        """Return 1, because no sequence is split over ranks."""
        return 1

    def floating_point_ops(self: TrainerLike, inputs: Batch) -> int:
        """An estimate for a batch: six operations for each token and parameter, without embeddings."""
        held: Values = inputs if isinstance(inputs, Mapping) else {}
        tokens = held.get(getattr(self.model, "main_input_name", "input_ids"))
        if not isinstance(tokens, Tensor) or not hasattr(self.model, "num_parameters"):
            return 0
        if self._trainfn.parameter_count is None:
            count = cast("Any", self.model).num_parameters
            self._trainfn.parameter_count = int(count(exclude_embeddings=True))
        return 6 * tokens.numel() * self._trainfn.parameter_count

    def store_flos(self: TrainerLike) -> None:
        """Add the operations since the last call, of all ranks, to ``state.total_flos``."""
        self.state.total_flos += self.current_flos
        self.current_flos = 0

    def _track_num_input_tokens(self: TrainerLike, inputs: Batch) -> None:
        """Count the tokens of a micro-batch, with ``include_num_input_tokens_seen``."""
        current_run(self).windows.count_tokens(inputs)

    # --- between steps, and at the end --------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(
        self: TrainerLike,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Trial | None,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Log, evaluate and save, in this order, if ``control`` says so."""
        _actions.maybe_log_save_evaluate(self, current_run(self), learning_rate)

    def _evaluate(
        self: TrainerLike, trial: Trial | None, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> Metrics:
        """Evaluate during training, and report to the search and to a schedule that follows a metric."""
        metrics = self.evaluate(ignore_keys=ignore_keys_for_eval)
        self._trainfn.latest = self.state.global_step, metrics
        self._report_to_hp_search(trial, self.state.global_step, metrics)
        if not skip_scheduler:
            _resolve.after_evaluation(self, metrics)
        return metrics

    def _finalize_training(
        self: TrainerLike, trial: Trial | None, num_train_samples: float, start_time: float
    ) -> TrainOutput:
        """Log the run's metrics, load the best model if asked for, and return the output of `train`."""
        return _actions.finished(self, current_run(self), num_train_samples, start_time)

    # --- search -------------------------------------------------------------------------------------------------------

    def hyperparameter_search(self: TrainerLike, *args: Any, **options: Any) -> BestRun | list[BestRun]:
        """Train one run for each trial, with its own arguments; see `trainfn.hf._run._search.hyperparameter_search`."""
        return _search.hyperparameter_search(cast("Trainer", self), *args, **options)

    def _hp_search_setup(self: TrainerLike, trial: Trial | None) -> None:
        """Give the Trainer the arguments of a trial; without a trial, nothing."""
        _search.setup(cast("Trainer", self), trial)

    def _report_to_hp_search(self: TrainerLike, trial: Trial | None, step: int, metrics: Metrics) -> None:
        """Report an evaluation to the trial, which may end the run."""
        _search.report(self, trial, step, metrics)
