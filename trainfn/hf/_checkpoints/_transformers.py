"""Resume from a checkpoint that transformers wrote."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging

import trainfn as tfn
from trainfn.errors import shortened
from trainfn.hf._optim._named import decay_names
from trainfn.hf._run._record import newest_state
from trainfn.hf._types import OptState, TrainerLike

logger = logging.get_logger(__name__)


def load_optimizer(trainer: TrainerLike, n: int, folder: str) -> None:
    """Take the step and Adam's moments from a checkpoint that transformers wrote; no code in a pickle is run."""
    fresh = newest_state(trainer)
    opt_state = counted(fresh.opt_state, n)
    moments = adam_moments(trainer.model, Path(folder) / "optimizer.pt")
    filled = opt_state if moments is None else with_moments(opt_state, *moments)
    trainer.train_state = fresh._replace(opt_state=opt_state if filled is None else filled)
    if moments is None or filled is None:
        logger.warning(
            f"{folder} was written by transformers. This run resumes its weights, step, schedule and data position. Its"
            " optimizer.pt is not one of Adam for this model, so the optimizer's state starts anew."
        )


def load_weights(model: nn.Module, folder: str) -> None:
    """Load the safetensors files of a folder, one or several, into a model.

    Raises:
        trainfn.errors.CheckpointError: If the files are missing, or do not fit.
    """
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


def adam_moments(model: nn.Module, file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Return the moments in an ``optimizer.pt`` of transformers by parameter name; None if it has no such moments.

    The file is read with ``weights_only=True``, which allows tensors, numbers and plain containers, and no code.
    """
    if not file.is_file():
        return None
    try:
        saved = torch.load(file, weights_only=True, map_location="cpu")["state"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError):
        return None
    trained, decayed = [n for n, p in model.named_parameters() if p.requires_grad], decay_names(model)
    # transformers numbers the parameters group by group: first those with weight decay, then the others.
    names = [*(n for n in trained if n in decayed), *(n for n in trained if n not in decayed)]
    shapes = {n: p.shape for n, p in model.named_parameters()}
    if len(saved) != len(names) or not all({"exp_avg", "exp_avg_sq"} <= set(entry) for entry in saved.values()):
        return None
    mu, nu = ({n: saved[i][key] for i, n in enumerate(names)} for key in ("exp_avg", "exp_avg_sq"))
    return (mu, nu) if all(mu[n].shape == nu[n].shape == shapes[n] for n in names) else None


def with_moments(opt_state: OptState, mu: dict[str, Tensor], nu: dict[str, Tensor]) -> OptState | None:
    """Return an optimizer's state with Adam's moments in it; None if it has no moments of these parameters."""
    if isinstance(opt_state, tuple) and {"mu", "nu"} <= set(getattr(opt_state, "_fields", ())):
        state: OptState = opt_state
        if state.mu.keys() != mu.keys():
            return None
        return state._replace(
            mu={n: x.clone().copy_(mu[n]) for n, x in state.mu.items()},
            nu={n: x.clone().copy_(nu[n]) for n, x in state.nu.items()},
        )
    if isinstance(opt_state, tuple):
        parts: list[OptState] = list(opt_state)
        found = [with_moments(part, mu, nu) for part in parts]
        if all(part is None for part in found):
            return None
        items = [old if new is None else new for old, new in zip(parts, found, strict=True)]
        return type(opt_state)(*items) if hasattr(opt_state, "_fields") else tuple(items)
    return None
