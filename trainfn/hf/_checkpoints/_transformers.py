"""Resume from a checkpoint that transformers wrote."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

import trainfn as tfn
from trainfn.errors import shortened
from trainfn.hf._checkpoints._adapters import has_adapters, in_folder, load
from trainfn.hf._optim._facade import RunOptimizer
from trainfn.hf._optim._moments import with_entries
from trainfn.hf._optim._schedules import as_scheduler, go_to
from trainfn.hf._run._record import current_run, newest_state
from trainfn.hf._types import OptState, TrainerLike, Values

logger = logging.get_logger(__name__)


def load_optimizer(trainer: TrainerLike, n: int, folder: str) -> None:
    """Take the optimizer's state from a checkpoint that transformers wrote, with schedules at step ``n``.

    No code in a pickle is run.
    """
    fresh = newest_state(trainer)
    opt_state, optimizer = counted(fresh.opt_state, n), current_run(trainer).optimizer
    moments = saved_moments(optimizer, Path(folder) / "optimizer.pt")
    if moments is None:
        logger.warning(
            f"{folder} was written by transformers. This run resumes its weights, step, schedule and data position. Its"
            " optimizer.pt is not one of this optimizer for this model, so the optimizer's state starts anew."
        )
    else:
        opt_state = with_entries(opt_state, moments)
    trainer.train_state = fresh._replace(opt_state=opt_state)
    go_to(as_scheduler(trainer.lr_scheduler, optimizer.optimizer), optimizer.optimizer, n)


def load_weights(model: nn.Module, folder: str) -> None:
    """Load the safetensors files of a folder, one or several, into a model; or the adapters that it holds.

    Raises:
        trainfn.errors.CheckpointError: If the files are missing, or do not fit.
    """
    if has_adapters(model) and in_folder(folder):
        load(model, folder)
        return
    index = Path(folder) / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    # An index from elsewhere must not name files outside of the folder.
    if any("/" in name or ".." in name for name in names) or not all((Path(folder) / n).is_file() for n in names):
        raise tfn.errors.CheckpointError(
            f"load({folder!r}): the folder has no manifest.json, and it lacks the safetensors files of a"
            " checkpoint of transformers. Files with pickles (pytorch_model.bin) are not read: save the model again"
            " with `model.save_pretrained(folder)`."
        )
    weights = {key: value for name in names for key, value in load_file(Path(folder) / name).items()}
    found = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [name for name in found.missing_keys if name not in tied]
    if missing or found.unexpected_keys:
        raise tfn.errors.CheckpointError(
            f"load({folder!r}): the weights do not fit the model. Missing: {shortened(missing) or 'none'};"
            f" unexpected: {shortened(found.unexpected_keys) or 'none'}."
        )


def counted(opt_state: OptState, n: int) -> OptState:
    """Return the optimizer's state with its step counters at ``n``, so that schedules resume from step ``n``."""
    return tfn.tree.map(lambda x: torch.full_like(x, n) if x.dtype == torch.int64 and x.dim() == 0 else x, opt_state)


def saved_moments(optimizer: RunOptimizer, file: Path) -> dict[str, Values] | None:
    """Return the moments in an ``optimizer.pt`` of transformers by parameter name; None if they do not fit.

    The file is read with ``weights_only=True``, which allows tensors, numbers and plain containers, and no code.
    """
    if not file.is_file():
        return None
    try:
        found = optimizer.entries_of(torch.load(file, weights_only=True, map_location="cpu"))
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, ValueError):
        return None
    return found if found and optimizer.fits(found) else None
