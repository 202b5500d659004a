"""The attributes and containers of a subclass, kept while its loss is tried out."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Generator

import trainfn as tfn
from trainfn.hf._types import Nested, TrainerLike

_CONTAINERS = (dict, list, set, deque)
_OURS = {"_trainfn", "train_dataset", "eval_dataset"}
_LARGEST = 1000  # a longer list is not copied: it is data, or a loss adds to its end


@contextlib.contextmanager
def as_before(trainer: TrainerLike) -> Generator[None]:
    """Restore a subclass after a block: its attributes, the contents of its containers, and the global generators.

    Examples are a count of calls, and a list of metrics that its loss fills.
    """
    kinds = [kind for kind in type(trainer).__mro__ if not kind.__module__.startswith(("trainfn.", "builtins"))]
    found = [
        x
        for owner in (vars(trainer), *map(vars, kinds))
        for name, x in owner.items()
        if isinstance(x, _CONTAINERS) and len(x) <= _LARGEST and name not in _OURS and not name.startswith("__")
    ]
    long = [(x, len(x)) for x in vars(trainer).values() if type(x) is list and len(x) > _LARGEST]
    kept, attributes = [(x, _copied(x)) for x in found], dict(vars(trainer))
    try:
        with tfn.process.generators_kept():
            yield
    finally:
        for name in vars(trainer).keys() - attributes.keys():
            delattr(trainer, name)
        vars(trainer).update(attributes)
        for x, before in kept:
            _restore(x, before)
        for x, length in long:
            del x[length:]


def _copied(x: Nested) -> Nested:
    if not isinstance(x, _CONTAINERS) or len(x) > _LARGEST:
        return x
    made: Nested = copy.copy(x)
    if isinstance(made, dict):
        for name in made:
            made[name] = _copied(made[name])
    return made


def _restore(x: Nested, before: Nested) -> None:
    """Give a container the content that it had; the containers of a dict stay the same objects."""
    now = dict(x) if isinstance(x, dict) else {}
    x.clear()
    if not isinstance(x, dict):
        (x.update if isinstance(x, set) else x.extend)(before)
        return
    for name, value in before.items():
        same = now.get(name)
        if isinstance(value, _CONTAINERS) and type(same) is type(value) and same is not value:
            _restore(same, value)
            value = same
        x[name] = value
