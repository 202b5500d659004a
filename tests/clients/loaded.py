"""A package that subclasses the Trainer, loaded twice: on the Trainer of transformers, and on ours."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType, SimpleNamespace

import transformers
import transformers.trainer

import trainfn


def _without(name: str) -> dict[str, ModuleType]:
    """Take a package out of those that are loaded, and return its modules."""
    return {key: sys.modules.pop(key) for key in list(sys.modules) if key == name or key.startswith(name + ".")}


@functools.cache
def on(kind: str, name: str, *names: str) -> SimpleNamespace:
    """Names of a package, whose classes inherit from the Trainer of a kind: ``"transformers"`` or ``"trainfn"``.

    A user writes the assignment before the package is imported, as the guide says.
    """
    plain = _without(name)
    theirs = transformers.Trainer
    try:
        if kind == "trainfn":
            transformers.Trainer = transformers.trainer.Trainer = trainfn.Trainer
        package = importlib.import_module(name)
        return SimpleNamespace(**{each: getattr(package, each) for each in names})  # packages load their parts late
    finally:
        transformers.Trainer = transformers.trainer.Trainer = theirs
        _without(name)
        sys.modules.update(plain)
