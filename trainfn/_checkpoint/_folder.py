"""The checkpoints in the folder of a run: which there are, which are good, and which may be removed."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from trainfn._checkpoint import _disk, _leaves
from trainfn._checkpoint._format import Manifest
from trainfn._checkpoint._leaves import matched
from trainfn._checkpoint._read import filled, inspect, verify
from trainfn._compile._donate import check_alive
from trainfn._ranks._group import ALONE, Ranks
from trainfn._reached import settled_like
from trainfn._types import TrainState
from trainfn.errors import CheckpointError

STEP = "checkpoint-(?:0|[1-9][0-9]{0,18})"
_PLACE = re.compile(rf"({STEP})|\.({STEP})\.replaced")
T = TypeVar("T")


class Folder:
    """The folders ``checkpoint-<step>`` in a folder. Symbolic links are left out, for they may lead anywhere.

    Attributes:
        damaged: The steps whose files were read and found damaged, which their sizes alone don't show.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged: set[int] = set()

    def target(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.path / f"checkpoint-{step}"

    def places(self) -> dict[int, Path]:
        """The folder of every checkpoint by step, the newest first; none is opened."""
        steps: set[int] = set()
        if self.path.is_dir():
            with os.scandir(self.path) as entries:
                named = [(_PLACE.fullmatch(entry.name), entry) for entry in entries]
                steps = {
                    int((match[1] or match[2]).rpartition("-")[2])
                    for match, entry in named
                    if match and entry.is_dir(follow_symlinks=False)
                }
        found = {step: _disk.located(self.target(step)) for step in sorted(steps, reverse=True)}
        return {step: path for step, path in found.items() if not path.is_symlink()}

    def complete(self) -> dict[int, tuple[Path, Manifest]]:
        """The checkpoints with a valid manifest and files of the right sizes, the newest first."""
        found: dict[int, tuple[Path, Manifest]] = {}
        for step, path in self.places().items():
            manifest = self._attempt(step, lambda step=step, path=path: _inspect(step, path), [])
            if manifest is not None and step not in self.damaged:
                found[step] = path, manifest
        return found

    def after(self, step: int) -> int | None:
        """The first undamaged checkpoint of a later step."""
        for later, path in reversed(self.places().items()):
            if later > step and later not in self.damaged and self._attempt(later, lambda path=path: verify(path), []):
                return later
        return None

    def newest(self, ranks: Ranks = ALONE) -> Path | None:
        """The newest checkpoint whose checksums are all right; a warning names the damage of newer ones."""
        damages: list[str] = []
        for step, path in ranks.first(self.places).items():
            manifest = self._attempt(step, lambda at=step, p=path: ranks.first(lambda: _inspect(at, p)), damages)
            if manifest is not None and self._attempt(
                step, lambda p=path, m=manifest: ranks.agreed(lambda: verify(p, m, ranks)), damages
            ):
                _warn(damages, path, ranks)
                return path
        _warn(damages, None, ranks)
        return None

    def load(
        self, like: TrainState, step: int | None, ranks: Ranks = ALONE
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest undamaged state, or that of ``step``, and the ``extra`` that was saved with it.

        Each rank reads and checks the files that it needs. If one rank finds damage, all go to the next checkpoint.
        """
        check_alive(like)
        places = {at: path for at, path in ranks.first(self.places).items() if step in (None, at)}
        damages: list[str] = []
        for at, path in places.items():
            manifest = self._attempt(at, lambda at=at, path=path: ranks.first(lambda: _inspect(at, path)), damages)
            if manifest is None:
                continue
            state = self._attempt(at, _reader(path, manifest, like, ranks), damages)
            if state is not None:
                _warn(damages, path, ranks)
                return state, manifest.extra
        if damages:
            raise CheckpointError(
                f"{str(self.path)!r}: no checkpoint can be read:\n  "
                + "\n  ".join(damages)
                + "\nBring back a copy; or remove these folders to begin anew."
            )
        if step is not None:
            complete = ranks.first(lambda: sorted(self.complete()))
            steps = ", ".join(str(s) for s in complete) or "none"
            raise CheckpointError(
                f"{str(self.path)!r}: there is no checkpoint of step {step}; complete are: {steps}. Give `restore` one"
                " of these steps, or leave out `step` for the newest."
            )
        return None

    def _attempt(self, step: int, read: Callable[[], T], damages: list[str]) -> T | None:
        """The result of ``read``; None after an error, which is added to ``damages``."""
        try:
            return read()
        except CheckpointError as damage:
            self.damaged.add(step)
            damages.append(str(damage))
            return None


def _reader(path: Path, manifest: Manifest, like: TrainState, ranks: Ranks) -> Callable[[], TrainState]:
    """Return a function that reads a checkpoint into the structure of ``like``, or raise if it does not fit."""
    like = settled_like(like, manifest.tree)
    expected = _leaves.named(like, "restore(like)")
    sources = matched(f"restore({str(path)!r}, like=state)", manifest.tree, expected)
    return lambda: ranks.agreed(lambda: filled(path, manifest, like, expected, sources))


def _inspect(step: int, path: Path) -> Manifest:
    manifest = inspect(path)
    if manifest.step != step:
        raise CheckpointError(
            f"{str(path)!r}: the checkpoint is damaged: its manifest is of step {manifest.step}. If the folder was"
            f" renamed, give it its name back: `checkpoint-{manifest.step}`."
        )
    return manifest


def _warn(damages: list[str], chosen: Path | None, ranks: Ranks) -> None:
    if damages and ranks.rank == 0:
        instead = f"{str(chosen)!r} is used instead" if chosen is not None else "there is no earlier checkpoint"
        warnings.warn("\n  ".join([f"{instead}:", *damages]), stacklevel=4)


# --- which may be removed -----------------------------------------------------------------------------------------


def best_of(values: Mapping[int, float | None], mode: Literal["min", "max"]) -> set[int]:
    """The first step with the best value, as a set; it is empty if every value is missing or NaN.

    >>> best_of({10: 0.5, 20: float("nan"), 30: 0.7, 40: None}, "max")
    {30}
    """
    known = {step: value for step, value in values.items() if value is not None and value == value}
    return {(max if mode == "max" else min)(sorted(known), key=known.__getitem__)} if known else set()


def expired(
    steps: Iterable[int],
    protected: Collection[int] = (),
    *,
    keep: int,
    keep_every: int | None = None,
    total: bool = False,
) -> list[int]:
    """The steps whose checkpoints a rotation removes.

    Args:
        steps: The steps of all checkpoints.
        protected: Steps that stay in any case, such as the best one.
        keep: How many of the newest stay.
        keep_every: Multiples of it stay too.
        total: Whether the protected steps count among the ``keep``, as in the `save_total_limit` of transformers.

    >>> expired([10, 20, 30, 40, 50], {10}, keep=2)
    [20, 30]
    >>> expired([10, 20, 30, 40, 50], {10}, keep=2, total=True)
    [20, 30, 40]
    """
    steps = sorted(steps)
    rest = [step for step in steps if step not in protected] if total else steps
    count = max(keep - (len(steps) - len(rest)), 0)
    kept = {
        *protected,
        *rest[max(len(rest) - count, 0) :],
        *(step for step in steps if keep_every and step % keep_every == 0),
    }
    return [step for step in steps if step not in kept]
