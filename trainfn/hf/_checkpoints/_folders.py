"""A Trainer's checkpoints: one folder ``checkpoint-N`` that trainfn resumes from and transformers can read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import operator
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import compare_trainer_and_checkpoint_args
from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._checkpoints import _adapters, _parts
from trainfn.hf._checkpoints._transformers import load_weights
from trainfn.hf._names import overridden
from trainfn.hf._optim._resolve import metric_name
from trainfn.hf._optim._resolve import saved as saved_optimizer
from trainfn.hf._parallel._parameters import plain, whole
from trainfn.hf._parallel._world import ALONE
from trainfn.hf._run._position import go_to, position
from trainfn.hf._run._record import TrainingRun, newest_state
from trainfn.hf._types import Metrics, Processor, TrainerLike, Trial, Values
from trainfn.launch import Ranks

logger = logging.get_logger(__name__)
_FOLDER = re.compile(r"checkpoint-(\d+)")
TRAINER_STATE, ARGUMENTS = "trainer_state.json", "training_args.json"
_LOADING = ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state")
_OWN = (
    "save_model",
    "_save",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
)  # methods that write into a checkpoint


def output_dir(trainer: TrainerLike) -> Path:
    """Return the folder of the Trainer's run, as `Trainer._get_output_dir` says."""
    search = trainer._trainfn.search
    return Path(trainer._get_output_dir(None if search is None else search.trial))


def folder_of(trainer: TrainerLike, trial: Trial | None) -> str:
    """Return ``args.output_dir``, or the folder in it of a trial."""
    folder = trainer.args.output_dir or "trainer_output"
    if trial is None:
        return folder
    return str(Path(folder, trainer.hp_name(trial) if trainer.hp_name is not None else f"run-{trial.number}"))


class Saving:
    """The saves of one run, as a context; its end waits for the last save.

    Args:
        trainer: The Trainer with the state to save.
        run: The run.
    """

    def __init__(self, trainer: TrainerLike, run: TrainingRun) -> None:
        self.trainer, self.run = trainer, run
        self.made: tfn.Checkpoints | None = None

    @property
    def store(self) -> tfn.Checkpoints:
        """The folder's checkpoints; it is looked at by the first save, for a run without saves may lack a folder."""
        if self.made is None:
            trainer, args = self.trainer, self.trainer.args
            best = metric_name(args) if args.load_best_model_at_end else None
            mode = "max" if args.greater_is_better else "min"
            # With sharded files each rank writes its part, and no rank writes a model.safetensors.
            full = not trainer._trainfn.world.sharded_files
            keep = args.save_total_limit or None  # 0 keeps all, as in transformers
            model = not _adapters.has_adapters(trainer.model)  # adapters are written by peft, and their model is not
            self.made = tfn.Checkpoints(output_dir(trainer), keep=keep, best=best, mode=mode, full=full, model=model)
        return self.made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.made is not None:
            self.made.__exit__(kind, error, trace)

    def check(self) -> None:
        """Raise the error of a save in the background, if it failed."""
        if self.made is not None:
            self.made.check()

    def wait(self) -> None:
        """Wait for the save in the background."""
        if self.made is not None:
            self.made.wait()

    def save(self) -> Path:
        """Save the present state in the background; return its folder. Every rank calls this."""
        trainer, run = self.trainer, self.run
        folder = output_dir(trainer) / f"checkpoint-{trainer.state.global_step}"
        run.saved = trainer.state.global_step
        _name_best(trainer)
        if trainer.push_in_progress is not None and trainer.args.save_total_limit:
            trainer.push_in_progress.wait_until_done()  # the rotation must not remove a folder during its upload
        ranks = trainer._trainfn.world.ranks
        if trainer.args.save_only_model:
            trainer.save_model(str(folder), _internal_call=True)
            if ranks.rank == 0:
                (folder / TRAINER_STATE).write_text(_text(state_dict(trainer)))
            ranks.first(lambda: _rotate(trainer, folder))  # one rank removes; the others wait, so none reads half
            return folder
        at, metrics = trainer._trainfn.latest
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        extra = {
            "trainer_state": state_dict(trainer),
            "position": position(run.windows),
            "losses": run.losses.state_dict(),
            "optimizer": saved_optimizer(trainer, run.optimizer),
        }
        current = numbers if at == trainer.state.global_step else None
        if self.store.best is not None and current is not None and self.store.best not in current:
            current = None
        self.wait()  # an override writes into the folder that the save before may be writing
        own = written_by_overrides(trainer, folder)
        with whole(trainer) if not self.store.model else contextlib.nullcontext():  # peft reads full parameters
            beside = files(trainer, with_model=own is None) if ranks.rank == 0 else None
        state = _adapters.without_base(newest_state(trainer), trainer.model)
        self.store.save(state, extra, metrics=current, files=beside, adopt=own)
        return folder


def written_by_overrides(trainer: TrainerLike, folder: Path) -> Path | None:
    """Let a subclass write its own files of a checkpoint; return their folder, or None if nothing is overridden.

    Every rank calls this. The folder has the checkpoint's own name, unless there is one of that name already.
    """
    names = [name for name in _OWN if overridden(trainer, name)]
    if not names:
        return None
    if trainer._trainfn.world.ranks.first(folder.exists):
        folder = folder.parent / f".{folder.name}.own" / folder.name
    trainer._trainfn.world.ranks.first(lambda: folder.mkdir(parents=True, exist_ok=True))
    if "save_model" in names:
        with whole(trainer):
            trainer.save_model(str(folder), _internal_call=True)
    else:
        save_model(trainer, str(folder))
    for name in names:
        if name not in ("save_model", "_save"):
            getattr(trainer, name)(str(folder))
    trainer._trainfn.world.ranks.wait()
    return folder


def _rotate(trainer: TrainerLike, written: Path) -> None:
    """Remove the oldest folders above ``save_total_limit``; the new folder and the best one stay, and count."""
    limit, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
    if not limit:
        return
    folders = _numbered(output_dir(trainer))
    protected = {step for step, path in folders.items() if path == written or (best and path == Path(best))}
    for path in map(folders.__getitem__, tfn.Checkpoints.expired(folders, protected, keep=limit, total=True)):
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning(f"{path} could not be removed and stays: {error}.")


def _numbered(folder: str | Path) -> dict[int, Path]:
    """Return the folders of checkpoints by their step, also those that transformers wrote."""
    found = {p: _FOLDER.fullmatch(p.name) for p in Path(folder).glob("checkpoint-*")}
    return {int(match[1]): path for path, match in found.items() if match}


def _text(state: Values) -> str:
    return json.dumps(state, indent=2, sort_keys=True) + "\n"


def files(trainer: TrainerLike, *, with_model: bool) -> dict[str, str | bytes]:
    """Return the files beside the state, for people and for transformers, as contents by name."""
    found: dict[str, str | bytes] = {TRAINER_STATE: _text(state_dict(trainer))}
    if not with_model:
        return found
    found[ARGUMENTS] = trainer.args.to_json_string() + "\n"
    adapted = _adapters.has_adapters(trainer.model)
    beside = trainer.model if adapted else getattr(trainer.model, "generation_config", None)
    for part in (trainer.processing_class, beside):
        if part is not None and hasattr(part, "save_pretrained"):
            found |= _adapters.written_by(part)
    return found


# --- resuming -----------------------------------------------------------------------------------------------------


def to_resume(trainer: TrainerLike, asked: str | bool | None) -> str | None:
    """Return the folder to resume from, or None for a new run; every rank calls this.

    Raises:
        ValueError: If no such folder exists.
    """
    if asked is None or asked is False:
        return None
    if asked is True:
        folder = last_checkpoint(str(output_dir(trainer)), trainer._trainfn.world.ranks)
        if folder is None:
            raise ValueError(
                f"`trainer.train(resume_from_checkpoint=True)`: no valid checkpoint found in output directory"
                f" ({output_dir(trainer)}). Write `trainer.train()` to begin a run, or pass the path of a checkpoint."
            )
        return folder
    if not trainer._trainfn.world.ranks.first(Path(asked).is_dir):
        raise ValueError(
            f"`trainer.train(resume_from_checkpoint={str(asked)!r})`: there is no such folder. Pass the path of a"
            " checkpoint, or `True` for the newest one in `output_dir`."
        )
    return str(asked)


def last_checkpoint(folder: str, ranks: Ranks = ALONE.ranks) -> str | None:
    """Return the newest complete checkpoint in a folder; None if there is not one.

    A checkpoint of trainfn is complete with a valid manifest, and one of transformers with its ``trainer_state.json``.
    """
    newest = tfn.Checkpoints(folder).newest()
    foreign = ranks.first(lambda: [p for p in _numbered(folder).values() if _is_foreign(p)])
    candidates = [*([newest] if newest else []), *foreign]
    found = max(candidates, key=lambda p: int(p.name.partition("-")[2]), default=None)
    return None if found is None else str(found)


def _is_foreign(folder: Path) -> bool:
    return not (folder / "manifest.json").exists() and (folder / TRAINER_STATE).exists()


def resume(trainer: TrainerLike, run: TrainingRun, folder: str) -> None:
    """Set the trainer's state, its model and the position in its data to those of a checkpoint.

    Raises:
        trainfn.errors.CheckpointError: If the checkpoint is damaged or does not fit.
    """
    with contextlib.ExitStack() as stack:
        if _is_foreign(Path(folder)) or any(overridden(trainer, name) for name in _LOADING):
            stack.enter_context(plain(trainer))
        state, where = _parts.resume(trainer, run, folder, foreign=_is_foreign(Path(folder)))
    fresh = trainer.state
    # A checkpoint of another version of transformers may have fields that this one's TrainerState lacks.
    known = {field.name for field in dataclasses.fields(TrainerState)}
    trainer.state = TrainerState(**{name: value for name, value in state.items() if name in known})
    if fresh.is_world_process_zero and trainer.state.train_batch_size:
        compare_trainer_and_checkpoint_args(trainer.args, trainer.state)
    for name in ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "train_batch_size"):
        setattr(trainer.state, name, getattr(fresh, name))  # from the arguments, never from the checkpoint
    trainer.state.is_local_process_zero = fresh.is_local_process_zero
    trainer.state.is_world_process_zero = fresh.is_world_process_zero
    trainer._load_callback_state()  # without its state, early stopping would begin to count from 0
    go_to(run.windows, where, skip=not trainer.args.ignore_data_skip)


def set_aside(trainer: TrainerLike) -> None:
    """Move checkpoints of later steps to another folder: this run does not resume from them.

    They are not removed, because they may be all that is left of a long run that was started again by mistake.
    """
    trainer._trainfn.world.ranks.first(lambda: _set_aside(trainer))


def _set_aside(trainer: TrainerLike) -> None:
    folder, step = output_dir(trainer), trainer.state.global_step
    later = [path for n, path in _numbered(folder).items() if n > step]
    if not later or trainer.args.save_strategy == "no":
        return
    aside = folder / "superseded"
    for n in range(2, 10**6):
        if not aside.exists():
            break
        aside = folder / f"superseded-{n}"
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    logger.warning(
        f"{folder} had checkpoints of later steps than {step}, from which this run does not resume. They were moved to"
        f" {aside}."
    )


# --- the best ------------------------------------------------------------------------------------------------------


def note_best(trainer: TrainerLike, metrics: Metrics) -> bool:
    """Whether these metrics are the best so far; if so, they are noted in the trainer's state.

    Raises:
        KeyError: If the metrics lack ``metric_for_best_model``.
    """
    name = metric_name(trainer.args)
    if name is None:
        return False
    if name not in metrics:
        raise KeyError(
            f"`TrainingArguments(metric_for_best_model={trainer.args.metric_for_best_model!r})`: {name!r} is not among"
            f" the evaluation's metrics {sorted(metrics)}. Write `metric_for_best_model=` one of these."
        )
    state, value = trainer.state, float(metrics[name])
    better = operator.gt if trainer.args.greater_is_better else operator.lt
    if math.isnan(value) or not (state.best_metric is None or better(value, state.best_metric)):
        return False
    state.best_metric, state.best_global_step = value, state.global_step
    _name_best(trainer)
    return True


def _name_best(trainer: TrainerLike) -> None:
    """Name the checkpoint of this step as the best one, once it is both the best and saved."""
    state, run = trainer.state, trainer._trainfn.run
    if run is not None and run.saved == state.global_step == state.best_global_step:
        state.best_model_checkpoint = str(output_dir(trainer) / f"checkpoint-{state.global_step}")


def load_best(trainer: TrainerLike) -> None:
    """Load the best checkpoint's weights into the model."""
    best = trainer.state.best_model_checkpoint
    if best is None:
        return
    if not Path(best).is_dir():
        logger.warning(f"load_best_model_at_end: {best} does not exist; the model keeps its last weights.")
        return
    logger.info(f"Loading the best model from {best} ({trainer.state.best_metric}).")
    if not (Path(best) / "manifest.json").exists():  # `save_only_model=True`, or a checkpoint of transformers
        with plain(trainer):
            load_weights(trainer.model, best)
        return
    manifest = tfn.manifest(best)
    like = _parts.grown(_adapters.without_base(newest_state(trainer), trainer.model, manifest.tree), manifest)
    _parts.place(trainer, tfn.restore(best, like=like, only="^model/"))


# --- the model alone -------------------------------------------------------------------------------------------------


def save_model(trainer: TrainerLike, folder: str) -> None:
    """Save the model, its tokenizer and the arguments, without pickles and without the state that only a resume needs.

    The main process writes. Every rank must call this while parameters are sharded, because they are gathered here.
    """
    with whole(trainer):
        if trainer.args.should_save:
            trainer._save(folder)
    if trainer.is_in_train:
        trainer._trainfn.world.ranks.wait()  # a barrier: no rank reads the folder, or ends, before it is written


def write_model(trainer: TrainerLike, folder: str, tensors: dict[str, Tensor] | None) -> None:
    """Write the model, with ``tensors`` in place of its own if they are given, its tokenizer, and the arguments."""
    target, model = Path(folder), trainer.model
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel) or _adapters.has_adapters(model):
        cast("PreTrainedModel", model).save_pretrained(folder, state_dict=tensors)
    elif tensors is not None:
        save_file({name: x.contiguous() for name, x in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    else:
        _save_module(model, target)
    collator = getattr(trainer.data_collator, "tokenizer", None)
    processor = collator if trainer.processing_class is None else trainer.processing_class
    if hasattr(processor, "save_pretrained"):
        cast("Processor", processor).save_pretrained(folder)
    (target / ARGUMENTS).write_text(trainer.args.to_json_string() + "\n")


def _save_module(model: nn.Module, target: Path) -> None:
    """Save a model without `save_pretrained`, under the names of its own tensors."""
    tfn.save(target / "model", tfn.init(model, tfn.optim.identity(), storage="adopt"))
    (target / "model" / "model.safetensors").rename(target / "model.safetensors")
    for file in (target / "model").iterdir():
        file.unlink()
    (target / "model").rmdir()


def state_dict(trainer: TrainerLike) -> Values:
    """Return the trainer's state as transformers writes it."""
    states = trainer.callback_handler.states(trainer.control)  # states in place of callbacks, as in the file
    trainer.state.stateful_callbacks = cast("list[TrainerCallback]", states)
    return dataclasses.asdict(trainer.state)
