"""Masks and labels: parameters chosen by name.

================================ ===============================================================
mask                             selects
================================ ===============================================================
``"norm|bias"``                  the names in which the regular expression occurs
``lambda name, p: p.dim() > 1``  the names for which it is true
``{"w": True, "b": False}``      what it says; every name must be there
``None``                         all
================================ ===============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from trainfn import tree
from trainfn._text import closest, shortened
from trainfn._types import Params

Mask: TypeAlias = str | Callable[[str, Tensor], bool] | Mapping[str, bool] | None
Labels: TypeAlias = Callable[[str, Tensor], str] | Mapping[str, str] | Sequence[tuple[str, str]]

NO_DECAY = r"bias$|(^|[._])(ln|layer_?norm|rms_?norm|group_?norm|batch_?norm|norm|bn)(_?\d+|_?[a-z])?([._]|$)"
"""What `decay_mask` leaves alone, by name."""


def decay_mask(name: str, param: Tensor) -> bool:
    """Whether weight decay is customary: for matrices, not for biases and the weights of norms.

    The usual ``mask`` of `adamw` and `add_decayed_weights`. True for tensors of two or more dimensions whose
    name does not match `NO_DECAY`.

    >>> import torch
    >>> decay_mask("fc.weight", torch.zeros(2, 2)), decay_mask("ln1.weight", torch.zeros(2))
    (True, False)
    """
    return param.dim() >= 2 and not tree.matches(name, NO_DECAY)


def select(call: str, mask: Mask, params: Params, argument: str = "mask") -> frozenset[str]:
    """The names that a mask selects; ``argument`` is what the call calls it.

    Raises:
        ValueError: If a pattern occurs in no name, or a dict misses one.
    """
    if mask is None:
        return frozenset(params)
    if isinstance(mask, str):
        names = frozenset(name for name in params if tree.matches(name, mask))
        if params and not names:
            raise ValueError(_no_match(call, argument, mask, params))
        return names
    if callable(mask):
        return frozenset(name for name, param in params.items() if mask(name, param))
    _require_names(call, argument, mask, params)
    return frozenset(name for name in params if mask[name])


def label(call: str, labels: Labels, default: str | None, params: Params) -> dict[str, str]:
    """The label of every name.

    Raises:
        ValueError: If a pattern occurs in no name, a dict misses one, or no pattern matches and there is no
            default.
    """
    if callable(labels):
        return {name: labels(name, param) for name, param in params.items()}
    if isinstance(labels, Mapping):
        if default is None:
            _require_names(call, "labels", labels, params)
        return {name: labels.get(name, default or "") for name in params}
    for pattern, _ in labels:
        if params and not any(tree.matches(name, pattern) for name in params):
            raise ValueError(_no_match(call, "labels", pattern, params))
    found = {name: [label for pattern, label in labels if tree.matches(name, pattern)] for name in params}
    unlabelled = [name for name, matching in found.items() if not matching]
    if unlabelled and default is None:
        raise ValueError(
            f"`{call}(labels={list(labels)!r})` leaves {len(unlabelled)} of {len(params)} parameters without"
            f" a label, among them {shortened(unlabelled)}. Add a pattern for them, or write `{call}(...,"
            " default=<label>)`."
        )
    return {name: matching[0] if matching else default or "" for name, matching in found.items()}


def _require_names(call: str, argument: str, given: Mapping[str, object], params: Params) -> None:
    missing = [name for name in params if name not in given]
    if missing:
        raise ValueError(
            f"`{call}({argument}=<dict of {len(given)} names>)` says nothing about {shortened(missing)}: it must"
            f" name every parameter, and it names {shortened(given)}. Add the missing names, or pass a pattern"
            " or a function of (name, tensor) instead."
        )


def _no_match(call: str, argument: str, pattern: str, params: Params) -> str:
    near = closest(pattern, params, 4, likeness=0.2) or params
    return (
        f"`{call}({argument}={pattern!r})`: the pattern occurs in none of the {len(params)} parameter names,"
        f" so it would do nothing. The nearest names are {shortened(near)}. Write a regular expression that"
        " occurs in one of them."
    )
