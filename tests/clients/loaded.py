"""A package that subclasses the Trainer, loaded twice: on the Trainer of transformers, and on ours."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Generator
from types import ModuleType

import transformers
import transformers.trainer

import trainfn

_COPIES: dict[str, dict[str, ModuleType]] = {}


def _taken(name: str) -> dict[str, ModuleType]:
    """Take a package out of those that are loaded, and return its modules."""
    return {key: sys.modules.pop(key) for key in list(sys.modules) if key == name or key.startswith(name + ".")}


@contextlib.contextmanager
def on(kind: str, name: str) -> Generator[ModuleType]:
    """A package whose classes inherit from the Trainer of a kind: ``"transformers"`` or ``"trainfn"``.

    A user writes the assignment before the package is imported, as the guide says. Here it is undone after the block.
    """
    if kind == "transformers":
        yield importlib.import_module(name)
        return
    with warnings.catch_warnings():  # the package adds filters when it is imported
        yield from _on_ours(name)


def _on_ours(name: str) -> Generator[ModuleType]:
    plain, theirs = _taken(name), transformers.Trainer
    sys.modules.update(_COPIES.get(name, {}))
    transformers.Trainer = transformers.trainer.Trainer = trainfn.Trainer
    try:
        yield importlib.import_module(name)
    finally:
        transformers.Trainer = transformers.trainer.Trainer = theirs
        _COPIES[name] = _taken(name)
        sys.modules.update(plain)
