"""Ranks report to each other between steps whether they have rows, the kind of their rows, and what they run.

Without it, a rank that runs out of rows, or runs something else, would leave the others waiting in a collective.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import optree
import torch
from torch import Tensor

from trainfn import tree
from trainfn._plan._apply import first_rows
from trainfn._plan._layout import Layout, rank
from trainfn._plan._no_rows import Idle, is_empty
from trainfn._ranks._group import ranks
from trainfn._types import Batch, TrainState

_ENDED, _EMPTY, _STREAM = "no more batches", "a batch of 0 rows", "a stream of micro-batches"


def plan_of(step: Any) -> Any:
    """The plan of a step, compiled or not; None if it runs in one process."""
    plan = getattr(getattr(step, "step", step), "plan", None)
    return None if plan is None or plan.world == 1 else plan


def divided(plan: Layout, batches: Any) -> tuple[Any, bool]:
    """A loader's part for this rank, and whether all ranks have equally many rows; other batches as they are."""
    if not hasattr(batches, "shard") or not hasattr(batches, "world") or getattr(batches, "own_shards", False):
        return batches, False
    if batches.world == 1:
        cut = getattr(batches, "sampler", batches)
        even = cut.last == "pad" or (cut.last == "drop" and cut.batch_size % plan.data_size == 0)
        return batches.shard(plan.data_rank, plan.data_size, even=even), even
    if (batches.rank, batches.world) == (plan.data_rank, plan.data_size):
        return batches, batches.even
    raise ValueError(
        f"steps(step, state, loader): the loader is part {batches.rank} of {batches.world}, and this rank has part"
        f" {plan.data_rank} of {plan.data_size} of the rows. Give the undivided loader: the plan divides it."
    )


def aligned(batches: Iterator[Batch], call: str, *, equal: bool = False, parts: int = 1) -> Iterator[Batch]:
    """This rank's batches, until no rank has any more; `Idle` ones where only other ranks have rows.

    Args:
        batches: The batches of this rank.
        call: The call that received them, for errors.
        equal: Whether ranks are known to have equally many batches, so that only the first is compared.
        parts: The number of parts of the rows: a warning if the rows of all ranks are the same.

    Raises:
        ValueError: On every rank, if they have batches of different kinds.
    """
    last: Any = None
    for i in itertools.count():
        batch = next(batches, None)
        if equal and i > 0:
            if batch is None:
                return
            yield batch
            continue
        kind = _kind(batch)
        compares = parts > 1 and i == 0 and not equal
        # A gather of about 100 bytes a rank, once a batch, but only once a run with a loader that divides evenly. A
        # rank must know that another one ended before it starts a step, which would wait for it.
        reports = ranks().gathered((kind, last is None, _digest(batch) if compares else None))
        kinds = [k for k, _, _ in reports]
        if set(kinds) == {_ENDED}:
            return
        _check_same(kinds, call)
        full = [r for r, k in enumerate(kinds) if k not in (_ENDED, _EMPTY)]
        if kinds[full[0] if full else 0] == _STREAM:
            yield iter(()) if batch is None else batch
            continue
        if compares and len({digest for _, _, digest in reports}) == 1 and rank() == 0:
            _warn_same(call, parts)
        if any(first and k in (_ENDED, _EMPTY) for k, first, _ in reports):
            last = _borrowed(batch, full, last)
        if kind in (_ENDED, _EMPTY):
            yield Idle(last)
        else:
            last = batch
            yield batch


def _kind(batch: Batch) -> str:
    if batch is None:
        return _ENDED
    if isinstance(batch, Iterator):
        return _STREAM
    if is_empty(batch):
        return _EMPTY
    leaves = {
        name: f"{str(x.dtype).removeprefix('torch.')}[{x.dim()} dimensions]" if isinstance(x, Tensor) else repr(x)
        for name, x in tree.named_leaves(batch).items()
    }
    return str(leaves) if len(leaves) > 1 or "" not in leaves else leaves[""]


def _digest(batch: Batch) -> str:
    """Return a digest of the beginning of every leaf."""
    leaves = [x.reshape(-1)[:1024].tolist() if isinstance(x, Tensor) else x for x in tree.leaves(batch)]
    return hashlib.sha256(repr(leaves).encode()).hexdigest()


def _warn_same(call: str, parts: int) -> None:
    warnings.warn(
        f"{call}: all ranks have the same rows in the first batch, so every row counts {parts} times. Give a"
        " `tfn.data.loader`, which is divided among the ranks; or each rank its own rows:"
        " `[x.tensor_split(plan.data_size)[plan.data_rank] for x in batches]`.",
        stacklevel=4,
    )


def _check_same(kinds: list[str], call: str) -> None:
    real = {k: r for r, k in reversed(list(enumerate(kinds))) if k not in (_ENDED, _EMPTY)}
    if len(real) > 1:
        lines = "".join(f"\n  rank {r}: {k}" for k, r in sorted(real.items(), key=lambda item: item[1]))
        raise ValueError(f"{call}: the ranks have batches of different kinds:{lines}")


def _borrowed(batch: Batch, full: list[int], last: Batch) -> Batch:
    """Return a batch of a rank that has one, for ranks that never had any."""
    if not full:
        raise ValueError("step(state, batch): no rank has a row, and none had one before: there is nothing to compute.")
    mine = tree.map(lambda x: x.cpu() if isinstance(x, Tensor) else x, batch) if rank() == full[0] else None
    # All bytes of one rank's batch, to all; only when a rank has no rows before it ever had any.
    theirs = ranks().gathered(mine)[full[0]]
    return theirs if last is None else last


def pieces_on(plan: Layout, state: TrainState, batch: Batch, accumulate: int | str) -> Iterator[tuple[Batch, Tensor]]:
    """Micro-batches of this rank, each with the place of its first row among the rows of all ranks.

    A batch that is cut here is this rank's part of the global batch, which is the parts of all ranks, one after the
    other. Each micro-batch of a stream is such a part. A rank with fewer rows than micro-batches is `Idle` in the rest.
    """
    if accumulate == "stream":
        before = torch.zeros((), dtype=torch.int64, device=state.step.device)
        for micro in aligned(iter(batch), "a stream of micro-batches"):
            first, rows = first_rows(plan, state, micro)
            yield micro, before + first
            before = before + rows
        return
    assert isinstance(accumulate, int)
    first, _ = first_rows(plan, state, batch)
    rows = 0 if isinstance(batch, Idle) else tree.row_count(batch)
    piece = batch
    for piece, row in tree.split(batch, min(accumulate, rows)) if rows else ():
        yield piece, first + row
    for _ in range(accumulate - min(accumulate, rows)):
        yield piece if isinstance(piece, Idle) else Idle(piece), first


def check_same_run(plan: Layout, state: TrainState, until: int | None) -> None:
    """Raise on every rank if the ranks are about to run different things.

    Raises:
        ValueError: Naming what differs, and how.
    """
    structure = str(optree.tree_structure(state))  # pyright: ignore[reportArgumentType]
    mine = {
        "step": int(state.step),
        "until": until,
        "key": state.key.tolist(),
        "plan": repr(plan),
        "parameters": len(state.params),
        "first parameters": str({n: (list(p.shape), str(p.dtype)) for n, p in list(state.params.items())[:4]}),
        "state's structure": structure if len(structure) < 400 else hashlib.sha256(structure.encode()).hexdigest(),
    }
    # About 1 KB a rank, once a run: ranks that run different steps would wait for each other until the timeout.
    reports = ranks().gathered(mine)
    for what in mine:
        if len({repr(theirs[what]) for theirs in reports}) > 1:
            each = "".join(f"\n  rank {r}: {theirs[what]}" for r, theirs in enumerate(reports))
            raise ValueError(
                f"steps(step, state, batches): the ranks are not about to run the same thing. Their {what}:{each}"
            )
