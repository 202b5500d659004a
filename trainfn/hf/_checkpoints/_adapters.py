"""Adapters of the package peft: a checkpoint holds them, and not the model that they adapt."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging

import trainfn as tfn
from trainfn.errors import shortened
from trainfn.hf._types import Values

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"


def has_adapters(model: nn.Module) -> bool:
    """Whether peft saves this model as adapters: a `PeftModel`, or a model of transformers after `add_adapter`."""
    configs = getattr(model, "peft_config", None)
    mixed = type(model).__name__ == "PeftMixedModel"  # peft has no way to save one
    return isinstance(configs, dict) and bool(configs) and hasattr(model, "save_pretrained") and not mixed


def written_by(part: Any) -> dict[str, str | bytes]:
    """Return the files that the `save_pretrained` of an object writes, as contents by name."""
    with tempfile.TemporaryDirectory() as folder, _quietly():
        part.save_pretrained(folder)
        top = Path(folder)
        return {str(file.relative_to(top).as_posix()): file.read_bytes() for file in top.rglob("*") if file.is_file()}


@contextlib.contextmanager
def _quietly() -> Generator[None]:
    """Silence transformers in this block: it would log the name of a temporary folder."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def without_base(state: tfn.TrainState, model: nn.Module, kept: Mapping[str, object] | None = None) -> tfn.TrainState:
    """Return the state without the frozen parameters that are not of an adapter; those in ``kept`` stay.

    A run has them from the model that it begins with. Frozen parameters of adapters stay, and so do the model's own
    buffers, such as the statistics of a batch norm, which training changes.
    """
    if not has_adapters(model):
        return state
    configs: Values = model.peft_config  # type: ignore[assignment]
    frozen = {name for name, _ in model.named_parameters(remove_duplicate=False)} & state.buffers.keys()
    if kept is None:
        dropped = {name for name in frozen if configs.keys().isdisjoint(name.split("."))}
    else:
        dropped = {name for name in frozen if f"model/{name}" not in kept}
    return state._replace(buffers={name: value for name, value in state.buffers.items() if name not in dropped})


def load(model: nn.Module, folder: str) -> None:
    """Load the adapters that a folder holds into the adapters of the model, each into the one of its name.

    Raises:
        trainfn.errors.CheckpointError: If an adapter is missing in the model, or does not fit.
    """
    peft = importlib.import_module("peft")
    for name, place in _places(model, Path(folder)).items():
        # A model of transformers with adapters of its own lacks the prefix, which the file has all the same.
        found = {key.removeprefix(PREFIX): value for key, value in load_file(place / WEIGHTS).items()}
        own: dict[str, Tensor] = peft.get_peft_model_state_dict(model, adapter_name=name)
        expected = {key.removeprefix(PREFIX): value for key, value in own.items()}
        missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
        other = [key for key in expected.keys() & found.keys() if expected[key].shape != found[key].shape]
        if missing or unexpected or other:
            raise tfn.errors.CheckpointError(
                f"load({folder!r}): the adapter {name!r} does not fit the model's. Missing:"
                f" {shortened(sorted(missing)) or 'none'}; unexpected: {shortened(sorted(unexpected)) or 'none'}; of"
                f" another shape: {shortened(sorted(other)) or 'none'}. Make the adapter with the configuration in"
                f" {str(place / 'adapter_config.json')!r}."
            )
        prefix = PREFIX if any(key.startswith(PREFIX) for key in own) else ""
        peft.set_peft_model_state_dict(model, {prefix + key: x for key, x in found.items()}, adapter_name=name)


def _places(model: nn.Module, folder: Path) -> dict[str, Path]:
    """The folder of each adapter: that of ``default`` is the checkpoint's own, and others are below it."""
    configs: Values = model.peft_config  # type: ignore[assignment]
    places = {path.parent.name: path.parent for path in folder.glob(f"*/{WEIGHTS}")}
    if (folder / WEIGHTS).is_file():
        # One adapter alone fills the active one, under whatever name it was saved.
        places["default" if places or "default" in configs else active(model)] = folder
    unknown = sorted(places.keys() - configs.keys())
    if unknown:
        raise tfn.errors.CheckpointError(
            f"load({str(folder)!r}): the checkpoint has the adapters {sorted(places)}, and the model has"
            f" {sorted(configs)}. Add the others first: `model.add_adapter({unknown[0]!r}, config)`."
        )
    return places


def active(model: nn.Module) -> str:
    """The name of the adapter that is trained; the first one of several."""
    found = model.active_adapters
    names: list[str] = found() if callable(found) else found  # type: ignore[assignment]
    return names[0]


def in_folder(folder: str) -> bool:
    """Whether a folder holds adapters."""
    return (Path(folder) / WEIGHTS).is_file() or any(Path(folder).glob(f"*/{WEIGHTS}"))
