"""The law of a sampler: which rows a step sees is a function of the step, and an epoch covers the dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from trainfn.errors import shortened
from trainfn.testing._purity import generators_seeded
from trainfn.testing._violation import violation

_FAR = 1_000_003  # a step far from the others, asked for in between: an iterator could not go there and come back
_STEPS = 20  # looked at of a sampler without epochs
_CHANCE = 5  # fewer rows than this may be in the same order in several epochs by chance


def check_sampler(
    sampler: Any, *, rows: int | None = None, once: bool = True, drops: int | None = None, epochs: int = 3
) -> None:
    """Law: a sampler is a pure function of the step, and shows every row exactly once in each epoch.

    Steps are asked for in any order, twice, and with the global generators at other places. Rows of weight 0, which
    only fill a batch, do not count. A sampler that shuffles has another order in another epoch.

    Args:
        sampler: An object with ``indices(step) -> int64[batch]``, such as those of `trainfn.data`, and
            ``steps_per_epoch``; None there means that there are no epochs.
        rows: The rows of the dataset; by default ``sampler.num_rows``. The rows of a packed sampler are its packs.
        once: False for a sampler that draws with replacement.
        drops: The most rows that an epoch may leave out; by default fewer than a batch if ``sampler.last`` is
            ``"drop"`` or absent, and none otherwise.
        epochs: How many to look at; 1 for a sampler whose order, neither forwards nor backwards, is to stay.

    Raises:
        LawViolation: Naming the step or the epoch, and the rows.

    >>> import numpy as np
    >>> class Backwards:
    ...     num_rows, steps_per_epoch = 6, 3
    ...     def indices(self, step):
    ...         return 5 - (2 * step + np.arange(2)) % 6
    >>> check_sampler(Backwards())
    """
    if rows is None:
        packed = getattr(sampler, "packing", None) is not None
        rows = int(sampler.order.num_rows if packed else sampler.num_rows)
    per_epoch = sampler.steps_per_epoch
    seen = _seen(sampler, epochs * per_epoch if per_epoch else _STEPS)
    for step, indices in seen.items():
        _check_batch(step, indices, rows)
    if not per_epoch:
        return
    shown = [[_shown(sampler, n, seen[n]) for n in range(e * per_epoch, (e + 1) * per_epoch)] for e in range(epochs)]
    orders = [np.concatenate(batches) for batches in shown]
    if once:
        allowed = _drops(sampler, len(seen[0])) if drops is None else drops
        for epoch, order in enumerate(orders):
            _check_cover(epoch, order, rows, allowed)
    same = all(np.array_equal(order, orders[0]) for order in orders[1:])
    steady = len(np.unique(np.sign(np.diff(orders[0])))) <= 1  # forwards or backwards: not shuffled at all
    if same and epochs > 1 and len(orders[0]) >= _CHANCE and not steady:
        raise _wrong(
            "every epoch has the same order.",
            {"epochs": f"0 to {epochs - 1}", "order": _few(orders[0])},
            "it is shuffled once: the epoch plays no part in the seed (a forgotten `set_epoch`).",
            "derive the seed from (seed, epoch); `tfn.data.shuffled(rows, batch_size, seed=0)` does so;"
            " if one order is meant, say `epochs=1`",
        )


def _seen(sampler: Any, steps: int) -> dict[int, Any]:
    """The batches of the steps, asked for again backwards, with other steps in between."""
    with generators_seeded(1):
        seen = {n: _array(sampler.indices(n)) for n in range(steps)}
    with generators_seeded(2):
        for n in reversed(range(steps)):
            sampler.indices(_FAR)
            again = _array(sampler.indices(n))
            if not np.array_equal(again, seen[n]):
                raise _wrong(
                    f"asked again, step {n} has other rows.",
                    {"at first": _few(seen[n]), "then": _few(again)},
                    "the sampler is an iterator in disguise: it keeps a position or a generator, or draws from a global"
                    " one.",
                    "compute the rows from the seed and the step alone",
                )
    return seen


def _array(indices: Any) -> Any:
    return indices.cpu().numpy() if isinstance(indices, Tensor) else np.array(indices)


def _check_batch(step: int, indices: Any, rows: int) -> None:
    if indices.dtype != np.int64 or indices.ndim != 1:
        raise _wrong(
            "the rows of a step are not a list of row numbers.",
            {"step": str(step), "rows": f"{indices.dtype}{list(indices.shape)}, not int64[batch]"},
            "they were computed in floating point, or are nested." if indices.ndim else "a single row is not a batch.",
            "`np.arange(first, first + batch_size)`, or `.astype(np.int64)`",
        )
    outside = indices[(indices < 0) | (indices >= rows)]
    if len(outside):
        raise _wrong(
            "a row is not in the dataset.",
            {"step": str(step), "rows": f"{_few(outside)} of a dataset of {rows}"},
            "the last batch of an epoch runs over the end, rows are counted from 1, or an empty slot (-1) is left in.",
            "rows are 0 to num_rows - 1: drop, shorten or fill the last batch",
        )


def _shown(sampler: Any, step: int, indices: Any) -> Any:
    """The rows that count in a step."""
    return indices[np.asarray(sampler.weights(step)) > 0] if hasattr(sampler, "weights") else indices


def _drops(sampler: Any, batch_size: int) -> int:
    return batch_size - 1 if getattr(sampler, "last", "drop") == "drop" else 0


def _check_cover(epoch: int, order: Any, rows: int, drops: int) -> None:
    counts = np.bincount(order, minlength=rows)
    if (counts > 1).any():
        raise _wrong(
            "rows come more than once in an epoch.",
            {"epoch": str(epoch), "rows": _few(np.flatnonzero(counts > 1)), "never": _few(np.flatnonzero(counts == 0))},
            "it draws with replacement, or fills up the last batch with rows that count.",
            "permute the rows; give what fills a batch weight 0; if it is to draw with replacement, say `once=False`",
        )
    missing = np.flatnonzero(counts == 0)
    if len(missing) > drops:
        raise _wrong(
            "rows are left out of an epoch.",
            {"epoch": str(epoch), "rows": f"{_few(missing)}, {len(missing)} in all; {drops} may be"},
            "the last batch of the epoch, or of each group in it, is dropped; or a part of the dataset is never asked"
            " for.",
            'pad the last batch (`last="pad"`); if rows are to be dropped, say how many: `drops=`',
        )


def _few(rows: Any) -> str:
    return f"[{shortened(rows.tolist(), 8)}]"


def _wrong(headline: str, facts: dict[str, str], cause: str, fix: str) -> Exception:
    return violation("check_sampler", headline, facts, cause, fix)
