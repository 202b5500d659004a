"""The training loop: the core's steps, with the events of transformers around each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from typing import Any

import torch
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import SaveStrategy, TrainOutput, speed_metrics
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._callbacks._events import DECISIONS
from trainfn.hf._checkpoints import _folders as _checkpoints
from trainfn.hf._installed import attribute
from trainfn.hf._parallel import _parameters as _whole
from trainfn.hf._parallel._sharding import dealt
from trainfn.hf._parallel._world import World
from trainfn.hf._reporting._logs import LossWindow
from trainfn.hf._run import _data
from trainfn.hf._run._data import Ended, Run, Windows, take_counts
from trainfn.hf._run._setup import smoother
from trainfn.hf._step import _manual
from trainfn.hf._step._additive import check_additive
from trainfn.hf._step._halving import Halving
from trainfn.hf._step._loss import find_shift, may_shift, training_loss
from trainfn.hf._step._modes import same_modes
from trainfn.hf._step._neftune import neftune

logger = logging.get_logger(__name__)


def train(
    trainer: Any, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
) -> TrainOutput:
    """Train from the beginning or from a checkpoint, and return what `Trainer.train` promises."""
    if trial is not None and trainer._trial is None:
        raise ValueError("train(trial=...): trials are of `trainer.hyperparameter_search(...)`, which calls train.")
    _whole.check_whole(trainer)
    folder = _checkpoints.to_resume(trainer, resume_from_checkpoint)
    if trainer.model_init is not None:
        trainer._new_model()
    if trial is not None:
        trainer.label_smoother = smoother(trainer.args, trainer.model)
    if trainer.args.use_liger_kernel:  # it replaces layers of the model, for good; twice is the same as once
        apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    loader = dealt(trainer._world, trainer.get_train_dataloader())
    run = _data.arithmetic(trainer.args, loader, trainer.num_examples(loader))
    trainer._train_dataloader, trainer.is_in_train, trainer._run = loader, True, run
    trainer.callback_handler.train_dataloader = loader
    trainer._changes, trainer._controller_state, trainer._restored_losses = [], None, None
    trainer._interrupted = False
    windows = Windows(trainer, loader, run)
    try:
        with _surroundings(trainer):
            prepare(trainer, run)
            if folder is not None:
                _checkpoints.resume(trainer, folder, windows)
            _checkpoints.set_aside(trainer)
            _announce(trainer, run, folder)
            with _holding_ctrl_c(trainer):
                return _loop(trainer, run, windows, ignore_keys_for_eval)
    except BaseException as error:
        if trainer._released:
            error.add_note(
                "trainer.model has no values now: they were split over the ranks. The checkpoints have them."
            )
        raise
    finally:
        trainer.is_in_train, trainer._saving = False, None
        trainer.end()


@contextlib.contextmanager
def _surroundings(trainer: Any) -> Generator[None]:
    """What holds for a run and not after it, however it ends."""
    args, model = trainer.args, trainer.model
    deterministic = torch.are_deterministic_algorithms_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(args.matmul_precision())
        if args.enable_jit_checkpoint:
            stack.enter_context(_saving_at_sigterm(trainer))
        if args.full_determinism:
            torch.use_deterministic_algorithms(True)
            stack.callback(torch.use_deterministic_algorithms, deterministic)
        if args.activation_checkpointing or trainer._world.checkpointing:
            stack.enter_context(_recomputing(model, dict(args.activation_checkpointing_kwargs or {})))
        if args.neftune_noise_alpha is not None:
            stack.enter_context(neftune(model, args.neftune_noise_alpha))
        stack.enter_context(same_modes(model))
        model.train()
        yield


@contextlib.contextmanager
def _saving_at_sigterm(trainer: Any) -> Generator[None]:
    """Save and stop after the step at hand when a cluster says that the machine is about to go."""
    trainer._terminated = False
    with tfn.process.termination() as trainer._sigterm:
        yield


@contextlib.contextmanager
def _holding_ctrl_c(trainer: Any) -> Generator[None]:
    """On several ranks Ctrl-C waits until all have heard of it; a second one is raised at once."""
    if trainer._world.plan is None:
        yield
        return
    with tfn.process.uninterrupted() as held:
        trainer._held = held
        try:
            yield
        finally:
            trainer._held = tfn.process.Pending()
    if trainer._world.ranks.any([held.arrived])[0]:  # after the last step
        raise KeyboardInterrupt


@contextlib.contextmanager
def _recomputing(model: Any, options: dict[str, Any]) -> Generator[None]:
    """Blocks forget their activations and compute them again in the backward pass, for the time of a block."""
    if attribute(model, "is_activation_checkpointing", "is_gradient_checkpointing"):
        yield
        return
    whole = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    enable = attribute(model, "activation_checkpointing_enable", "gradient_checkpointing_enable")
    if enable is None:
        raise ValueError(
            f"`TrainingArguments(activation_checkpointing=True)`: {type(model).__name__} has no method"
            " `activation_checkpointing_enable`, so its blocks can't be computed again. Leave the argument out."
        )
    enable({"use_reentrant": False, **options}, **whole)
    try:
        yield
    finally:
        attribute(model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()


def prepare(trainer: Any, run: Run) -> None:
    """The optimizer, the schedule, the first state and the step; a fresh log."""
    args = trainer.args
    trainer.create_optimizer_and_scheduler(num_training_steps=run.max_steps)
    transform = trainer._transform
    trainer.train_state = tfn.init(trainer.model, transform, seed=args.seed, storage="adopt")
    plan = trainer._world.plan
    alone = run.accumulate == 1 and not args.auto_find_batch_size
    accumulate = 1 if alone else "stream"
    compiled, _ = compiles(trainer)
    step: Any = tfn.train_step(training_loss(trainer), transform, accumulate=accumulate, plan=plan)
    if not compiled and _manual.overrides(trainer):
        step = _manual.step(trainer, step)
    if args.fp16:
        step = _scaled(trainer, step)
    if plan is not None:
        trainer.train_state = tfn.shard(trainer.train_state, plan)
        _whole.see(trainer)
        _whole.warn_of_callbacks(trainer)
    how: dict[str, Any] = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
    how |= {"dynamic": "auto", **(trainer._world.compile or {})}  # rows of ragged length: a few graphs, not one each
    trainer._step = tfn.jit(step, compile=compiled, donate=True, max_graphs=64, **how)
    if args.auto_find_batch_size:
        trainer._step = Halving(trainer._step)
    trainer.state = TrainerState(
        is_hyper_param_search=trainer._trial is not None,
        trial_name=None if trainer._trial is None or trainer._hp_name is None else trainer._hp_name(trainer._trial),
        trial_params=None if trainer._trial is None else dict(trainer._trial.params),
        max_steps=run.max_steps,
        num_train_epochs=min(run.epochs, 2**31),
        train_batch_size=args.train_batch_size,
        is_local_process_zero=trainer.is_local_process_zero(),
        is_world_process_zero=trainer.is_world_process_zero(),
    )
    trainer.state.compute_steps(args, run.max_steps)


def _scaled(trainer: Any, step: Any) -> Any:
    """The step with a loss scale in its state: float16 gradients neither vanish nor overflow."""
    if _manual.overrides(trainer):
        raise ValueError(
            "TrainingArguments(fp16=True) with an overridden training_step: its backward pass knows nothing of the loss"
            " scale. Override compute_loss in place of training_step, or write `bf16=True`."
        )
    scaling = tfn.transforms.dynamic_loss_scale(**trainer._world.loss_scale)
    trainer.train_state = scaling.init(trainer.train_state)
    return scaling(step)


def compiles(trainer: Any) -> tuple[bool, str]:
    """Whether the step is compiled, and why."""
    args = trainer.args
    overrides = _manual.overrides(trainer)
    if overrides:
        return False, f"{', '.join(overrides)} is overridden, which runs Python between the parts of a step"
    if getattr(args, "torch_compile_given", True):
        return bool(args.torch_compile), "as torch_compile says"
    if trainer._world.compile is not None:
        return True, "as the launcher's configuration says"
    if args.device.type == "cpu":
        return False, "on a CPU compiling takes longer than most runs; torch_compile=True does it"
    return True, "by default on an accelerator; torch_compile=False runs the same step eagerly"


def _announce(trainer: Any, run: Run, folder: str | None) -> None:
    logger.info("***** Running training *****")
    for line in trainer.summary().splitlines():
        logger.info(line)
    if folder is not None:
        logger.info(f"  Going on from {folder}, after step {trainer.state.global_step}")


def _loop(trainer: Any, run: Run, windows: Windows, ignore_keys: list[str] | None) -> TrainOutput:
    began, first = time.time(), trainer.state.global_step
    trainer._losses = losses = LossWindow(nan_inf_filter=trainer.args.logging_nan_inf_filter)
    if trainer._restored_losses is not None:
        losses.load_state_dict(trainer._restored_losses)
    trainer._ignore_keys, trainer._began = ignore_keys, began
    trainer._event("on_train_begin")
    if trainer.args.eval_on_start and first == 0:
        trainer.evaluate(ignore_keys=ignore_keys)
    open_epoch = False
    with _checkpoints.Saving(trainer, windows) as saving:
        trainer._saving = saving
        step = _changing(trainer, windows)
        stream = tfn.steps(step, trainer.train_state, windows, until=run.max_steps, nonfinite="continue")
        with contextlib.closing(stream), contextlib.suppress(Ended):  # type: ignore[type-var]
            for info in stream:
                trainer.train_state = info.state
                open_epoch = True
                _after(trainer, run, windows, info)
                if trainer.control.should_training_stop:
                    break
        if open_epoch and windows.window:  # the stream was left inside or at the end of an epoch
            windows.end_epoch()
        output = _finished(trainer, run, began, first, losses)
        trainer._event("on_train_end")
    return output


def _changing(trainer: Any, windows: Windows) -> Any:
    """The step, after what was decided between the steps: another learning rate, say."""
    world: World = trainer._world
    looked = trainer.args.gradient_accumulation_steps == 1 and world.plan is None
    known = False

    def look() -> None:
        """Find out what the loss is like, of the first rows; ranks must believe the same."""
        nonlocal looked, known
        with _whole.whole(trainer):
            if not tfn.data.is_empty(windows.first):
                find_shift(trainer, windows.first)
                if not looked:
                    check_additive(trainer, windows.first)
        looked = True
        found = [shifts for shifts in world.ranks.gathered(trainer._shifts) if shifts is not None]
        trainer._shifts = found[0] if found else None
        known = bool(found) or not any(world.ranks.gathered(may_shift(trainer, windows.first)))

    def step(state: tfn.TrainState, batch: Any) -> tuple[tfn.TrainState, tfn.Metrics]:
        for change in trainer._changes:
            state = change(state)
        trainer._changes.clear()
        if not looked or not known:
            look()
        return trainer._step(state, batch)

    step.plan = world.plan  # type: ignore[attr-defined]
    return step


def agree(trainer: Any) -> None:
    """What any rank has decided, all have; and what each has counted is added up."""
    world: World = trainer._world
    trainer._terminated |= trainer._sigterm.arrived
    if world.plan is None:
        return
    control = trainer.control
    flags = [*(bool(getattr(control, name)) for name in DECISIONS), trainer._terminated, trainer._held.arrived]
    *found, trainer._terminated, trainer._interrupted = world.ranks.any(flags)
    for name, value in zip(DECISIONS, found, strict=True):
        setattr(control, name, value)
    take_counts(trainer, world.sums(trainer._counted))


def _after(trainer: Any, run: Run, windows: Windows, info: tfn.StepInfo) -> None:
    """The events of a step that is done, then the log, the evaluation and the checkpoint that are due."""
    state = trainer.state
    trainer._saving.check()
    for _ in range(windows.micro_done - (windows.window - 1) * run.accumulate - 1):
        trainer._event("on_substep_end")
    trainer._event("on_pre_optimizer_step")
    trainer._event("on_optimizer_step")
    state.global_step = info.n
    state.epoch = windows.epoch + windows.micro_done / run.micro_counted
    trainer._losses.add(info.metrics)
    trainer._event("on_step_end")
    agree(trainer)
    if trainer._terminated:
        trainer.control.should_save = trainer.control.should_training_stop = True
    maybe_log_save_evaluate(trainer)


def maybe_log_save_evaluate(trainer: Any) -> None:
    """Log, evaluate and save, in this order, if the callbacks decided so; then end, if Ctrl-C was pressed on a rank.

    Raises:
        KeyboardInterrupt: On all ranks after the same step, with all values in the model.
    """
    control = trainer.control
    acted = control.should_log or control.should_evaluate or control.should_save
    if control.should_log and trainer._losses.steps > 0:
        trainer.log(trainer._losses.take(learning_rate=trainer.get_learning_rates()[0]), trainer._began)
    if control.should_evaluate and not trainer._terminated:
        metrics = trainer._evaluate(trainer._ignore_keys)
        better = _checkpoints.note_best(trainer, metrics)
        if trainer.args.save_strategy == SaveStrategy.BEST:
            control.should_save = control.should_save or better
    if control.should_save:
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer._event("on_save")
    if acted:
        agree(trainer)
    if trainer._interrupted:
        _whole.fill(trainer)
        raise KeyboardInterrupt


def _finished(trainer: Any, run: Run, began: float, first: int, losses: Any) -> TrainOutput:
    steps = trainer.state.global_step - first
    rows = (run.num_examples or 0) * steps / run.updates_per_epoch
    metrics = speed_metrics("train", began, num_samples=rows, num_steps=steps)
    metrics["total_flos"] = trainer.state.total_flos
    metrics["train_loss"] = losses.loss
    trainer.log(metrics)
    trainer._saving.wait()
    _checkpoints.load_best(trainer)
    _whole.fill(trainer)
    return TrainOutput(trainer.state.global_step, metrics["train_loss"], metrics)
