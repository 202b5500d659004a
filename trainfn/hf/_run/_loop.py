"""The training loop: the core's steps, with the events of transformers around each."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Generator
from typing import cast

import torch
from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import SaveStrategy, TrainOutput, speed_metrics
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._callbacks._events import DECISIONS, event
from trainfn.hf._checkpoints import _folders, _parts
from trainfn.hf._installed import attribute
from trainfn.hf._names import overridden
from trainfn.hf._optim._resolve import transform_of
from trainfn.hf._parallel import _parameters
from trainfn.hf._parallel._sharding import dealt
from trainfn.hf._parallel._world import World
from trainfn.hf._reporting._logs import LossWindow
from trainfn.hf._run._data import Ended, Windows, arithmetic
from trainfn.hf._run._record import TrainingRun, newest_state
from trainfn.hf._run._setup import new_model, smoother
from trainfn.hf._step import _manual
from trainfn.hf._step._additive import check_additive
from trainfn.hf._step._halving import Halving
from trainfn.hf._step._loss import find_shift, may_shift, training_loss
from trainfn.hf._step._modes import eval_mode, same_modes
from trainfn.hf._step._neftune import neftune
from trainfn.hf._types import Batch, TrainerLike, Trial, Values

logger = logging.get_logger(__name__)


def train(
    trainer: TrainerLike,
    resume_from_checkpoint: str | bool | None,
    trial: Trial | None,
    ignore_keys_for_eval: list[str] | None,
) -> TrainOutput:
    """Train from the beginning or from a checkpoint; see `Trainer.train`."""
    if trial is not None and trainer._trainfn.search is None:
        raise ValueError(
            "`trainer.train(trial=...)` can't work: only a search makes trials, and it calls `train` itself. Write"
            " `trainer.hyperparameter_search(...)`."
        )
    _parameters.check_whole(trainer)
    trainer._hp_search_setup(trial)
    folder = _folders.to_resume(trainer, resume_from_checkpoint)
    if trainer.model_init is not None:
        new_model(trainer)
    if trial is not None:
        trainer.label_smoother = smoother(trainer.args, trainer.model)
    if trainer.args.use_liger_kernel:  # it replaces layers for good; a second call changes nothing
        apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    loader = dealt(trainer._trainfn.world, trainer.get_train_dataloader())
    length = arithmetic(trainer.args, loader, trainer.num_examples(loader))
    windows = Windows(trainer, loader, length)
    losses = LossWindow(nan_inf_filter=trainer.args.logging_nan_inf_filter)
    acts = overridden(trainer, "_maybe_log_save_evaluate")
    run = TrainingRun(length, windows, losses, ignore_keys_for_eval, acts_alone=acts)
    windows.ended = functools.partial(_end_epoch, trainer, run)
    trainer.is_in_train, trainer._trainfn.run = True, run
    trainer.callback_handler.train_dataloader = loader
    try:
        with _surroundings(trainer, run):
            prepare(trainer, run)
            if folder is not None:
                _folders.resume(trainer, run, folder)
            _folders.set_aside(trainer)
            _announce(trainer, folder)
            with _holding_ctrl_c(run, trainer._trainfn.world):
                return _loop(trainer, run)
    except BaseException as error:
        if trainer._trainfn.released:
            error.add_note(
                "trainer.model has no values now: they were sharded over the ranks. The checkpoints have them."
            )
        raise
    finally:
        trainer.is_in_train = False
        trainer.end()


@contextlib.contextmanager
def _surroundings(trainer: TrainerLike, run: TrainingRun) -> Generator[None]:
    """Set up what holds for one run only, and undo it however the run ends."""
    args, model = trainer.args, trainer.model
    deterministic = torch.are_deterministic_algorithms_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(args.matmul_precision())
        if args.enable_jit_checkpoint:
            stack.enter_context(_saving_at_sigterm(run))
        if args.full_determinism:
            torch.use_deterministic_algorithms(True)
            stack.callback(torch.use_deterministic_algorithms, deterministic)
        if args.activation_checkpointing or trainer._trainfn.world.checkpointing:
            stack.enter_context(_recomputing(model, cast("Values", args.activation_checkpointing_kwargs or {})))
        if args.neftune_noise_alpha is not None:
            stack.enter_context(neftune(model, args.neftune_noise_alpha))
        stack.enter_context(same_modes(model))
        model.train()
        yield


@contextlib.contextmanager
def _saving_at_sigterm(run: TrainingRun) -> Generator[None]:
    """Note a SIGTERM, by which a cluster announces the end of a job. The run then saves and stops after the step."""
    with tfn.process.termination() as run.sigterm:
        yield


@contextlib.contextmanager
def _holding_ctrl_c(run: TrainingRun, world: World) -> Generator[None]:
    """On several ranks, hold Ctrl-C until all ranks know of it; a second one is raised at once.

    A rank that raised it at once would leave the others waiting in their next collective.
    """
    if world.plan is None:
        yield
        return
    with tfn.process.uninterrupted() as held:
        run.held = held
        try:
            yield
        finally:
            run.held = tfn.process.Pending()
    # For one that arrived after the last step. All ranks come here, so all of them raise or none does.
    if world.ranks.any([held.arrived])[0]:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _recomputing(model: nn.Module, options: Values) -> Generator[None]:
    """Let the model recompute its activations in the backward pass, for the time of a block."""
    if attribute(model, "is_activation_checkpointing", "is_gradient_checkpointing"):
        yield
        return
    options = dict(options)
    whole = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    enable = attribute(model, "activation_checkpointing_enable", "gradient_checkpointing_enable")
    if enable is None:
        raise ValueError(
            f"`TrainingArguments(activation_checkpointing=True)` can't work: {type(model).__name__} has no method"
            " `activation_checkpointing_enable`, which recomputes activations. Leave the argument out."
        )
    enable({"use_reentrant": False, **options}, **whole)
    try:
        yield
    finally:
        attribute(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()


def prepare(trainer: TrainerLike, run: TrainingRun) -> None:
    """Make the optimizer, the schedule, the first state and the step of a run, and an empty log."""
    args, length = trainer.args, run.length
    trainer._trainfn.rates = []
    trainer.create_optimizer_and_scheduler(num_training_steps=length.max_steps)
    transform = transform_of(trainer, length.max_steps)
    # "adopt" shares the model's memory: parameters are held once, and the model has the newest ones.
    trainer.train_state = tfn.init(trainer.model, transform, seed=args.seed, storage="adopt")
    plan = trainer._trainfn.world.plan
    alone = length.accumulate == 1 and not args.auto_find_batch_size
    accumulate = 1 if alone else "stream"
    compiled, _ = compiles(trainer)
    step = tfn.train_step(training_loss(trainer), transform, accumulate=accumulate, plan=plan)
    if not compiled and _manual.overrides(trainer):
        step = _manual.step(trainer, step)
    if args.fp16:
        step = _scaled(trainer, step)
    if plan is not None:
        trainer.train_state = tfn.shard(trainer.train_state, plan)
        _parameters.see(trainer)
        _parameters.warn_of_callbacks(trainer)
    how: Values = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
    # "auto": batches of many lengths share a few graphs.
    how |= {
        "dynamic": "auto",
        **(trainer._trainfn.world.compile or {}),
    }
    run.step = tfn.jit(step, compile=compiled, donate=True, max_graphs=64, **how)
    if args.auto_find_batch_size:
        run.step = Halving(run.step)
    search = trainer._trainfn.search
    trainer.state = TrainerState(
        is_hyper_param_search=search is not None,
        trial_name=None if search is None or trainer.hp_name is None else trainer.hp_name(search.trial),
        trial_params=None if search is None else dict(search.trial.params),
        max_steps=length.max_steps,
        num_train_epochs=min(length.epochs, 2**31),
        train_batch_size=args.train_batch_size,
        is_local_process_zero=trainer.is_local_process_zero(),
        is_world_process_zero=trainer.is_world_process_zero(),
    )
    trainer.state.compute_steps(args, length.max_steps)


def _scaled(trainer: TrainerLike, step: tfn.TrainStep) -> tfn.TrainStep:
    """The step with a loss scale in its state, so that float16 gradients neither vanish nor overflow."""
    if _manual.overrides(trainer):
        raise ValueError(
            "`TrainingArguments(fp16=True)` can't work with an overridden training_step: its backward pass does not"
            " apply the loss scale. Override compute_loss in place of training_step, or write `bf16=True`."
        )
    scaling = tfn.transforms.dynamic_loss_scale(**trainer._trainfn.world.loss_scale)
    trainer.train_state = scaling.init(newest_state(trainer))
    return scaling(step)


def compiles(trainer: TrainerLike) -> tuple[bool, str]:
    """Whether the step is compiled, and why."""
    args = trainer.args
    overrides = _manual.overrides(trainer)
    if overrides:
        return False, f"{', '.join(overrides)} is overridden, which runs Python between the parts of a step"
    if getattr(args, "torch_compile_given", True):
        return bool(args.torch_compile), "as torch_compile says"
    if trainer._trainfn.world.compile is not None:
        return True, "as the launcher's configuration says"
    if args.device.type == "cpu":
        return False, "on a CPU, compiling takes longer than most runs; torch_compile=True compiles all the same"
    return True, "by default on an accelerator; torch_compile=False runs the same step eagerly"


def _announce(trainer: TrainerLike, folder: str | None) -> None:
    logger.info("***** Running training *****")
    for line in trainer.summary().splitlines():
        logger.info(line)
    if folder is not None:
        logger.info(f"  Resuming from {folder}, after step {trainer.state.global_step}")


def _loop(trainer: TrainerLike, run: TrainingRun) -> TrainOutput:
    windows, first = run.windows, trainer.state.global_step
    run.began, run.tokens_before = time.time(), trainer.state.num_input_tokens_seen
    event(trainer, "on_train_begin")
    if trainer.args.eval_on_start and first == 0:
        with eval_mode(trainer.model):
            trainer._evaluate(_trial(trainer), run.ignore_keys, skip_scheduler=True)
    open_epoch = False
    with _folders.Saving(trainer, run) as saving:
        run.saving = saving
        step, until = _changing(trainer, run), run.length.max_steps
        stream = tfn.steps(step, newest_state(trainer), windows, until=until, nonfinite="continue")
        with contextlib.closing(stream), contextlib.suppress(Ended):  # type: ignore[type-var]
            for info in stream:
                trainer.train_state = info.state
                open_epoch = True
                _after(trainer, run, info)
                if trainer.control.should_training_stop:
                    break
        if open_epoch and windows.window:  # the loop was left inside or at the end of an epoch
            windows.end_epoch()
        run.first = first
        rows = (run.length.num_examples or 0) * run.length.max_steps / run.length.updates_per_epoch
        output = trainer._finalize_training(_trial(trainer), rows, run.began)
        event(trainer, "on_train_end")
    return output


def _changing(trainer: TrainerLike, run: TrainingRun) -> tfn.Step:
    """The step, which first applies the changes decided between steps, such as another learning rate."""
    world, windows = trainer._trainfn.world, run.windows
    looked = trainer.args.gradient_accumulation_steps == 1 and world.plan is None
    known = False

    def look() -> None:
        """Try out on the first rows whether the loss shifts labels, and whether it adds up over rows."""
        nonlocal looked, known
        with _parameters.whole(trainer):
            if not tfn.data.is_empty(windows.first):
                find_shift(trainer, windows.first)
                if not looked:
                    check_additive(trainer, windows.first)
        looked = True
        # A rank without rows can't try, and all ranks must compile the same step: so they share what they found.
        # It costs one or two gathers of a flag, until one rank knows or none ever can.
        found = [shifts for shifts in world.ranks.gathered(trainer._trainfn.shifts) if shifts is not None]
        trainer._trainfn.shifts = found[0] if found else None
        known = bool(found) or not any(world.ranks.gathered(may_shift(trainer, windows.first)))

    def step(state: tfn.TrainState, batch: Batch | list[Batch], /) -> tuple[tfn.TrainState, tfn.Metrics]:
        for change in run.changes:
            state = change(state)
        run.changes.clear()
        if not looked or not known:
            look()
        return run.step(state, batch)

    step.plan = world.plan  # type: ignore[attr-defined]
    return step


def _end_epoch(trainer: TrainerLike, run: TrainingRun) -> None:
    event(trainer, "on_epoch_end")
    agree(trainer, run)
    act(trainer, run)


def agree(trainer: TrainerLike, run: TrainingRun) -> None:
    """Set on all ranks the decisions that any rank has made, and add up the counts of all."""
    world = trainer._trainfn.world
    run.terminated |= run.sigterm.arrived
    if world.plan is None:
        return
    # A rank that saved or stopped alone would leave the others waiting in a collective. The cost is two small sums.
    control = trainer.control
    flags = [*(bool(getattr(control, name)) for name in DECISIONS), run.terminated, run.held.arrived]
    *found, run.terminated, run.interrupted = world.ranks.any(flags)
    for name, value in zip(DECISIONS, found, strict=True):
        setattr(control, name, value)
    run.windows.take_counts(world.sums(run.windows.counted))


def _after(trainer: TrainerLike, run: TrainingRun, info: tfn.StepInfo) -> None:
    """Fire the events of a completed step; then log, evaluate and save where due."""
    state, windows, length = trainer.state, run.windows, run.length
    run.saving.check()
    # The step is one function, so the events inside it are fired after it, in the order of transformers.
    for _ in range(windows.micro_done - (windows.window - 1) * length.accumulate - 1):
        event(trainer, "on_substep_end")
    event(trainer, "on_pre_optimizer_step")
    event(trainer, "on_optimizer_step")
    state.global_step = info.n
    state.epoch = windows.epoch + windows.micro_done / length.micro_counted
    run.losses.add(info.metrics)
    event(trainer, "on_step_end")
    agree(trainer, run)
    if run.terminated:
        trainer.control.should_save = trainer.control.should_training_stop = True
    act(trainer, run)


def _trial(trainer: TrainerLike) -> Trial | None:
    search = trainer._trainfn.search
    return None if search is None else search.trial


def act(trainer: TrainerLike, run: TrainingRun) -> None:
    """Log, evaluate and save, if the callbacks decided so. Then stop, if Ctrl-C was pressed on a rank.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed. All ranks raise it after the same step, with full parameters in the
            model.
    """
    control = trainer.control
    acted = control.should_log or control.should_evaluate or control.should_save
    if run.acts_alone:  # an override decides by itself when to log
        loss, norm = run.losses.newest(trainer.args.device)
        state, where = trainer.state, (run.ignore_keys, run.began)
        trainer._maybe_log_save_evaluate(loss, norm, trainer.model, _trial(trainer), state.epoch or 0.0, *where)
    else:
        maybe_log_save_evaluate(trainer, run)
    if acted:  # logs, evaluations and checkpoints fire events, in which callbacks decide again
        agree(trainer, run)
    if run.interrupted:
        _parameters.fill(trainer)
        raise KeyboardInterrupt


def maybe_log_save_evaluate(trainer: TrainerLike, run: TrainingRun, rate: float | None = None) -> None:
    """Log, evaluate and save, in this order, if the callbacks decided so."""
    control = trainer.control
    if control.should_log and run.losses.steps > 0:
        trainer.store_flos()
        trainer.log(run.losses.take(learning_rate=trainer._get_learning_rate() if rate is None else rate), run.began)
    if control.should_evaluate and not run.terminated:
        with eval_mode(trainer.model):  # until the next step, as in transformers; an override may log after `evaluate`
            metrics = trainer._evaluate(_trial(trainer), run.ignore_keys)
        better = trainer._determine_best_metric(metrics=metrics, trial=_trial(trainer))
        if trainer.args.save_strategy == SaveStrategy.BEST:
            control.should_save = control.should_save or better
    if control.should_save:
        trainer._save_checkpoint(trainer.model, trial=_trial(trainer))
        event(trainer, "on_save")


def finished(trainer: TrainerLike, run: TrainingRun, rows: float, began: float) -> TrainOutput:
    """Log the metrics of a run, load the best model if asked for, and return the run's output."""
    steps = trainer.state.global_step - run.first
    rows = rows * steps / max(run.length.max_steps, 1)
    metrics = speed_metrics("train", began, num_samples=rows, num_steps=steps)
    trainer.store_flos()
    metrics["total_flos"] = trainer.state.total_flos
    metrics["train_loss"] = run.losses.loss
    trainer.log(metrics)
    run.saving.wait()
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
        if overridden(trainer, "_load_best_model") and trainer._trainfn.world.plan is None:
            _parts.adopt_weights(trainer)
    _parameters.fill(trainer)
    return TrainOutput(trainer.state.global_step, metrics["train_loss"], metrics)
