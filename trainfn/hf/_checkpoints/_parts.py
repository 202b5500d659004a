"""The parts of a checkpoint, each of which a method of the Trainer loads; a subclass may load it otherwise."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from pathlib import Path

import torch
from torch import nn

import trainfn as tfn
from trainfn.hf._checkpoints import _adapters, _transformers
from trainfn.hf._optim._resolve import restore as restore_optimizer
from trainfn.hf._parallel._parameters import follow_buffers, see
from trainfn.hf._run._record import Restored, TrainingRun, current_run, newest_state
from trainfn.hf._types import TrainerLike, Values


def resume(trainer: TrainerLike, run: TrainingRun, folder: str, *, foreign: bool) -> tuple[Values, Values]:
    """Load all parts of a checkpoint; return the trainer's state in it, and the position in the data.

    A foreign checkpoint is one that transformers wrote. No code in a pickle is run.
    """
    if foreign:
        state = json.loads((Path(folder) / "trainer_state.json").read_text())
        n, updates = state["global_step"], max(1, run.length.updates_per_epoch)
        where: Values = {"epoch": n // updates, "micro": n % updates * run.length.accumulate}
        restored = Restored(folder, None, {"step": n})
    else:
        manifest = tfn.manifest(folder)
        like = grown(_adapters.without_base(newest_state(trainer), trainer.model, manifest.tree), manifest)
        extra = manifest.extra
        state, where, n = extra["trainer_state"], extra["position"], 0
        restored = Restored(folder, tfn.restore(folder, like=like), extra)
        run.losses.load_state_dict(extra["losses"])
    run.restored = restored
    try:
        with same_tensors(trainer.model):
            trainer._load_from_checkpoint(folder)
        trainer._load_optimizer_and_scheduler(folder)
        trainer._load_rng_state(folder)
    finally:
        run.restored = None
    mine, saved = newest_state(trainer), restored.state
    done = {"step": torch.full_like(mine.step, n)} if saved is None else {"step": saved.step, "extra": saved.extra}
    trainer.train_state = mine._replace(**done)
    return state, where


def load_weights(trainer: TrainerLike, folder: str, model: nn.Module | None = None) -> None:
    """Load the weights of a checkpoint: of the one that the run resumes from, or of any folder."""
    run = trainer._trainfn.run if trainer.is_in_train else None
    restored = None if run is None else run.restored
    if restored is not None and restored.state is not None and folder == restored.folder and model is None:
        place(trainer, restored.state)
    elif (Path(folder) / "manifest.json").exists():
        into = trainer.model if model is None else model
        like = grown(tfn.init(into, tfn.optim.identity(), storage="adopt"), tfn.manifest(folder))
        chosen = tfn.restore(folder, like=like, only="^model/")
        own = {name: tensor.detach() for name, tensor in into.named_parameters(remove_duplicate=False)}
        copy({**own, **dict(into.named_buffers(remove_duplicate=False))}, {**chosen.params, **chosen.buffers})
    else:
        _transformers.load_weights(trainer.model if model is None else model, folder)


def load_optimizer(trainer: TrainerLike) -> None:
    """Take the optimizer's state from the checkpoint that the run resumes from."""
    run = current_run(trainer)
    if (restored := run.restored) is None:
        raise RuntimeError(
            f"{type(trainer).__name__}._load_optimizer_and_scheduler(): no checkpoint is being loaded. Write"
            " `trainer.train(resume_from_checkpoint=folder)`, which calls it."
        )
    if restored.state is None:
        _transformers.load_optimizer(trainer, restored.extra["step"], restored.folder)
        return
    trainer.train_state = newest_state(trainer)._replace(opt_state=restored.state.opt_state)
    restore_optimizer(trainer, run.optimizer, restored.extra["optimizer"])


def load_key(trainer: TrainerLike) -> None:
    """Take the key of all random draws from the checkpoint that the run resumes from."""
    restored = current_run(trainer).restored
    if restored is not None and restored.state is not None:
        trainer.train_state = newest_state(trainer)._replace(key=restored.state.key)


def place(trainer: TrainerLike, saved: tfn.TrainState) -> None:
    """Take restored parameters and buffers; they are copied into the model's own memory."""
    mine = newest_state(trainer)
    if trainer._trainfn.world.plan is not None:
        trainer.train_state = mine._replace(params=saved.params, buffers={**mine.buffers, **saved.buffers})
        see(trainer)
        return
    copy({**mine.params, **mine.buffers}, {**saved.params, **saved.buffers})
    follow_buffers(trainer)


def grown(like: tfn.TrainState, manifest: tfn.Manifest) -> tfn.TrainState:
    """The state with buffers of the shapes that a checkpoint has: a buffer may have grown since the model was made."""
    saved = {name: manifest.tree.get(f"model/{name}") for name in like.buffers}
    shapes = {name: leaf.shape for name, leaf in saved.items() if leaf is not None}
    other = {name for name, shape in shapes.items() if shape != tuple(like.buffers[name].shape)}
    made = {name: like.buffers[name].new_zeros(shapes[name]) for name in other}
    return like._replace(buffers={**like.buffers, **made})


def copy(into: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Copy values into tensors by name, which keep their memory where they keep their shape."""
    with torch.no_grad():
        for name, tensor in values.items():
            if into[name].shape == tensor.shape:
                into[name].copy_(tensor)
            else:
                into[name].data = tensor


@contextlib.contextmanager
def same_tensors(model: nn.Module) -> Generator[None]:
    """Keep the model's own tensors, which the state shares, where a block puts others in their place; values stay."""
    kept = [(tensors, dict(tensors)) for m in model.modules() for tensors in (m._parameters, m._buffers)]
    try:
        yield
    finally:
        for tensors, mine in kept:
            for name, tensor in mine.items():
                new = tensors.get(name)
                if tensor is not None and new is not None and new is not tensor:
                    if tensor.shape != new.shape and not isinstance(tensor, nn.Parameter):
                        tensor.data = new.detach()  # a buffer that has grown
                    else:
                        tensor.detach().copy_(new)
                    tensors[name] = tensor  # type: ignore[assignment]


def save_for_tune(trainer: TrainerLike, folder: str) -> None:
    """Save the model and the trainer's state in ``folder/checkpoint-{global_step}``."""
    target = Path(folder) / f"checkpoint-{trainer.state.global_step}"
    trainer.save_model(str(target), _internal_call=True)
    if trainer.args.should_save:
        trainer.state.save_to_json(str(target / "trainer_state.json"))
