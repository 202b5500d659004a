"""The training loop: the core's steps, with the events of transformers around each."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Generator
from typing import cast

import torch
from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._callbacks._events import event
from trainfn.hf._checkpoints import _folders
from trainfn.hf._installed import attribute
from trainfn.hf._names import overridden
from trainfn.hf._optim._gradients import clear_gradients, with_gradients
from trainfn.hf._optim._resolve import advance, begin, steps_of, transform_of
from trainfn.hf._parallel import _parameters
from trainfn.hf._parallel._sharding import dealt
from trainfn.hf._reporting._logs import LossWindow
from trainfn.hf._run._actions import act, agree, trial_of
from trainfn.hf._run._data import Ended, Windows, arithmetic
from trainfn.hf._run._position import rows_of
from trainfn.hf._run._record import TrainingRun, newest_state, trained_of
from trainfn.hf._run._setup import align_tokens, is_quantized, new_model, smoother
from trainfn.hf._step import _manual
from trainfn.hf._step._halving import Halving
from trainfn.hf._step._look import Look
from trainfn.hf._step._loss import training_loss
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
    align_tokens(trainer)
    if trial is not None:
        trainer.label_smoother = smoother(trainer.args, trainer.model)
    if trainer.args.use_liger_kernel:  # it replaces layers for good; a second call changes nothing
        apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    loader = dealt(trainer._trainfn.world, trainer.get_train_dataloader())
    length = arithmetic(trainer.args, loader, trainer.num_examples(loader))
    windows = Windows(trainer, loader, length)
    losses = LossWindow(nan_inf_filter=trainer.args.logging_nan_inf_filter)
    requests = tfn.process.Requests(trainer._trainfn.world.ranks)
    acts = overridden(trainer, "_maybe_log_save_evaluate")
    run = TrainingRun(length, windows, losses, requests, ignore_keys_for_eval, acts_alone=acts)
    windows.ended, windows.begun = functools.partial(_end_epoch, trainer, run), Look(trainer)
    trainer.is_in_train, trainer._trainfn.run = True, run
    trainer.callback_handler.train_dataloader = loader
    try:
        with _surroundings(trainer, run):
            prepare(trainer, run)
            if folder is not None:
                _folders.resume(trainer, run, folder)
            _folders.set_aside(trainer)
            _announce(trainer, folder)
            with requests:
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
        stack.callback(run.frozen.release)
        stack.callback(clear_gradients, run)  # after an error in a step, too
        stack.enter_context(args.matmul_precision())
        if args.enable_jit_checkpoint:
            stack.enter_context(run.requests.termination())
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
    args, length, plan = trainer.args, run.length, trainer._trainfn.world.plan
    run.optimizer = begin(trainer, length.max_steps)
    # "adopt" shares the model's memory: parameters are held once, and the model has the newest ones.
    trainer.train_state = tfn.init(trained_of(trainer), transform_of(trainer), seed=args.seed, storage="adopt")
    run.frozen.see(trainer.model)
    if args.fp16:
        trainer.train_state = _loss_scale(trainer).init(trainer.train_state)
    if plan is not None:
        trainer.train_state = tfn.shard(trainer.train_state, plan)
        _parameters.see(trainer)
        _parameters.warn_of_callbacks(trainer)
    run.step = make_step(trainer, run)
    trainer._trainfn.latest = (-1, {})  # of an evaluation in this run
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


def make_step(trainer: TrainerLike, run: TrainingRun) -> Callable[..., tuple[tfn.TrainState, tfn.Metrics]]:
    """The step of a run, compiled where `compiles` says so, with the present options of the optimizer."""
    args, transform = trainer.args, transform_of(trainer)
    accumulate = 1 if run.length.accumulate == 1 and not args.auto_find_batch_size else "stream"
    compiled, _ = compiles(trainer)
    plan = trainer._trainfn.world.plan
    step = tfn.train_step(training_loss(trainer), transform, accumulate=accumulate, plan=plan)
    if not compiled and _manual.overrides(trainer):
        step = _manual.step(trainer, step)
    step = with_gradients(trainer, run, step, compiled, functools.partial(_before_update, trainer, run))
    if args.fp16:
        step = _loss_scale(trainer)(step)
    how: Values = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
    # "auto": batches of many lengths share a few graphs.
    how |= {
        "dynamic": "auto",
        **(trainer._trainfn.world.compile or {}),
    }
    made = tfn.jit(step, compile=compiled, donate=True, max_graphs=64, **how)
    return Halving(made) if args.auto_find_batch_size else made


def _loss_scale(trainer: TrainerLike) -> tfn.transforms.StepTransform:
    """A loss scale in the state of the step, so that float16 gradients neither vanish nor overflow."""
    if _manual.overrides(trainer):
        raise ValueError(
            "`TrainingArguments(fp16=True)` can't work with an overridden training_step: its backward pass does not"
            " apply the loss scale. Override compute_loss in place of training_step, or write `bf16=True`."
        )
    return tfn.transforms.dynamic_loss_scale(**trainer._trainfn.world.loss_scale)


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
    if is_quantized(trainer.model):
        return False, "the model is quantized, by kernels of another package; torch_compile=True compiles all the same"
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
            trainer._evaluate(trial_of(trainer), run.ignore_keys, skip_scheduler=True)
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
        output = trainer._finalize_training(trial_of(trainer), _rows(run), run.began)
        event(trainer, "on_train_end")
    return output


def _rows(run: TrainingRun) -> float:
    """The rows of all steps; of a stream, as many as full batches have."""
    length = run.length
    if length.num_examples is None:
        return length.max_steps * length.accumulate * rows_of(run.windows)
    return length.num_examples * length.max_steps / length.updates_per_epoch


def _changing(trainer: TrainerLike, run: TrainingRun) -> tfn.Step:
    """The step, which first applies the changes decided between steps, such as another learning rate."""

    def step(state: tfn.TrainState, batch: Batch | list[Batch], /) -> tuple[tfn.TrainState, tfn.Metrics]:
        for change in run.changes:
            state = change(state)
        run.changes.clear()
        run.frozen.keep()
        steps_of(trainer, run.optimizer)  # a function that a callback has set writes its first rate here
        if run.optimizer.stale():
            run.step = make_step(trainer, run)
        state = run.optimizer.pushed(state)
        return run.step(state, batch)

    step.plan = trainer._trainfn.world.plan  # type: ignore[attr-defined]
    return step


def _end_epoch(trainer: TrainerLike, run: TrainingRun) -> None:
    event(trainer, "on_epoch_end")
    agree(trainer, run)
    act(trainer, run)


def _after(trainer: TrainerLike, run: TrainingRun, info: tfn.StepInfo) -> None:
    """Fire the events of a completed step; then log, evaluate and save where due."""
    state, windows, length = trainer.state, run.windows, run.length
    run.saving.check()
    _parameters.follow_buffers(trainer)
    if not run.announced:
        _before_update(trainer, run)
    event(trainer, "on_optimizer_step")
    run.learning_rate = trainer._get_learning_rate()
    advance(trainer, run.optimizer, info.metrics)
    clear_gradients(run)
    state.global_step = info.n
    state.epoch = windows.epoch + windows.micro_done / length.micro_counted
    run.losses.add(info.metrics)
    run.announced = False
    event(trainer, "on_step_end")
    agree(trainer, run)
    if run.requests.terminated:
        trainer.control.should_save = trainer.control.should_training_stop = True
    act(trainer, run)


def _before_update(trainer: TrainerLike, run: TrainingRun) -> None:
    """Fire the events before an update: inside of the step where a callback may read gradients, and else after it."""
    for _ in range(trainer.current_gradient_accumulation_steps - 1):
        event(trainer, "on_substep_end")
    event(trainer, "on_pre_optimizer_step")
    run.announced = True
