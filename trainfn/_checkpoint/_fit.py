"""Which leaf of a checkpoint goes where in a state; and what does not fit, said so that it can be put right."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from trainfn._checkpoint._format import DTYPES, Leaf
from trainfn._text import closest, nearest, shortened
from trainfn.errors import CheckpointError

Only = str | Collection[str] | Callable[[str], bool] | None
Rename = Mapping[str, str] | Callable[[str], str] | None
_SHOWN = 20


def fit(
    call: str,
    found: Mapping[str, Leaf],
    like: Mapping[str, Tensor],
    *,
    strict: bool = True,
    only: Only = None,
    rename: Rename = None,
) -> dict[str, str]:
    """The checkpoint's own name of each leaf of the state that is to be filled.

    Raises:
        CheckpointError: Naming each leaf that does not fit, where ``strict``; or if none does.
        ValueError: If ``only`` or ``rename`` choose nothing, or two leaves for one name.
    """
    sources = _renamed(call, found, rename)
    chosen = _chosen(call, only, [*like, *(name for name in sources if name not in like)])
    have = {name: found[sources[name]] for name in chosen if name in sources}
    problems = {name: why for name in chosen if (why := _problem(name, have.get(name), like.get(name)))}
    fitting = {name: sources[name] for name in chosen if name not in problems}
    if problems and (strict or not fitting):
        raise CheckpointError(_refusal(call, problems, have, like, nothing=not fitting))
    if problems:
        warnings.warn(
            f"{call}: {len(fitting)} leaves restored; these were not, and are as in `like`:\n  "
            + shortened(problems.values(), _SHOWN, str, "\n  "),
            stacklevel=3,
        )
    return fitting


def _problem(name: str, have: Leaf | None, want: Tensor | None) -> str | None:
    if have is None:
        return f"missing in the checkpoint: {name}"
    if want is None:
        return f"not in the state: {name}"
    if have.shape != tuple(want.shape):
        return f"shape of {name}: {list(have.shape)} in the checkpoint, {list(want.shape)} in the state"
    if DTYPES[have.dtype] != want.dtype:
        return f"dtype of {name}: {DTYPES[have.dtype]} in the checkpoint, {want.dtype} in the state"
    return None


def _refusal(
    call: str, problems: dict[str, str], have: Mapping[str, Any], like: Mapping[str, Any], *, nothing: bool
) -> str:
    missing = [name for name in problems if name not in have]
    unexpected = [name for name in problems if name not in like]
    for name in missing[:_SHOWN]:
        problems[name] += nearest(name, unexpected[:500], " (nearest there: {})", likeness=0.6)
    if nothing:
        return (
            f"{call}: no leaf of the checkpoint fits the state:\n  "
            + shortened(problems.values(), _SHOWN, str, "\n  ")
            + '\nNames can be changed as they are read: `rename={"old prefix": "new prefix"}`.'
        )
    return (
        f"{call}: the checkpoint does not fit the state:\n  "
        + shortened(problems.values(), _SHOWN, str, "\n  ")
        + "\nBuild `like` with the model and optimizer that wrote it. Or take a part of it, explicitly:\n"
        "  tfn.restore(path, like=state, strict=False)              # all that fits\n"
        '  tfn.restore(path, like=state, only=r"^model/")           # leaves whose name matches: the weights\n'
        '  tfn.restore(path, like=state, rename={"old": "new"})     # prefixes of names'
    )


def _renamed(call: str, found: Iterable[str], rename: Rename) -> dict[str, str]:
    """The checkpoint's own names, by what they are called in the state."""
    if rename is None:
        return {name: name for name in found}
    change = rename if callable(rename) else _prefixes(rename)
    sources: dict[str, str] = {}
    changed = False
    for name in found:
        new = change(name)
        if new in sources:
            raise ValueError(f"{call}: rename= calls both {sources[new]!r} and {name!r} {new!r}.")
        sources[new] = name
        changed |= new != name
    if not changed:
        names = shortened(sources, 3, str)
        raise ValueError(f"{call}: rename= changes no name. There are {names}; a key is the beginning of one.")
    return sources


def _prefixes(rename: Mapping[str, str]) -> Callable[[str], str]:
    """``{"encoder.": "body."}`` is for ``model/encoder.weight`` and for ``opt_state/0/mu/encoder.weight`` alike."""
    patterns = [(re.compile(rf"(^|/){re.escape(old)}"), new) for old, new in rename.items()]

    def change(name: str) -> str:
        for pattern, new in patterns:
            if pattern.search(name):
                return pattern.sub(lambda match, new=new: match[1] + new, name)
        return name

    return change


def _chosen(call: str, only: Only, names: list[str]) -> list[str]:
    if only is None:
        return names
    if isinstance(only, str):
        choose = re.compile(only).search
    elif callable(only):
        choose = only
    else:
        unknown = sorted(set(only) - set(names))
        if unknown:
            near = ", ".join(closest(unknown[0], names, 3, likeness=0.3))
            raise ValueError(f"{call}: only= names {unknown[0]!r}, which is in neither. Near it: {near}.")
        choose = set(only).__contains__
    chosen = [name for name in names if choose(name)]
    if not chosen:
        raise ValueError(f"{call}: only= chooses none of the {len(names)} leaves: {shortened(names, 3, str)}.")
    return chosen
