"""The position of a run in its data, and the position at which a resumed run begins.

It is counted in micro-batches of all ranks, and their size is kept too. A run with other batch sizes resumes after the
same rows, and warns of what differs.
"""

from __future__ import annotations

from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._parallel._sharding import Dealt
from trainfn.hf._run._data import Windows, together
from trainfn.hf._types import Loader, Values

logger = logging.get_logger(__name__)


def position(windows: Windows) -> Values:
    """The position in the data, as a checkpoint keeps it.

    ===================== ===========================================================================================
    ``epoch``, ``micro``  completed epochs, and micro-batches of the next one, on all ranks together
    ``of``                micro-batches of an epoch, or None if the loader has no length
    ``rows``              rows of a micro-batch, on all ranks together; see `rows_of`
    ``accumulate``        micro-batches of an update
    ===================== ===========================================================================================
    """
    length = windows.length
    place = {"epoch": windows.epoch, "micro": windows.window and windows.micro_done}
    return {**place, "of": length.micro_per_epoch, "rows": rows_of(windows), "accumulate": length.accumulate}


def rows_of(windows: Windows) -> int:
    """The rows of a micro-batch on all ranks; for a loader without a ``batch_size``, each batch counts as one row."""
    loader = windows.loader
    if isinstance(loader, tfn.data.Loader):
        return loader.sampler.batch_size
    found = [getattr(each, "batch_size", None) for each in (loader, getattr(loader, "batch_sampler", None))]
    size = next((size for size in found if isinstance(size, int)), 1)
    return size * loader.world.parts if isinstance(loader, Dealt) else size


def go_to(windows: Windows, then: Values, *, skip: bool) -> None:
    """Resume the data after the rows that were seen, and warn of what differs.

    Args:
        windows: The windows of the new run.
        then: A checkpoint's `position`. Older checkpoints have no sizes; those of the new run stand in for them.
        skip: Whether to resume within the epoch, and not at its beginning.
    """
    length, rows = windows.length, rows_of(windows)
    then = {"of": length.micro_per_epoch, "rows": rows, "accumulate": length.accumulate, **then}
    windows.epoch, again = then["epoch"], 0
    if skip and then["of"] is not None and then["micro"] >= then["of"]:
        windows.window = length.updates_per_epoch
    elif skip:
        windows.window, again = divmod(then["micro"] * then["rows"], rows * length.accumulate)
    said = _sizes(windows, then, rows)
    if again:
        said.append(
            f"gradient_accumulation_steps={length.accumulate} with micro-batches of {rows} rows does not divide the"
            f" {then['micro'] * then['rows']} rows of this epoch that the checkpoint had seen; the last {again} of them"
            " are seen again"
        )
    if then["rows"] != rows and windows.window and not _same_order(windows.loader):
        said.append(
            "rows that are grouped by length are grouped in another way; some of this epoch are seen again, and others"
            " not at all"
        )
    if said and windows.trainer._trainfn.world.ranks.rank == 0:
        said += _remedy(windows, then, rows)
        logger.warning(f"`trainer.train(resume_from_checkpoint=...)`: {'; '.join(said)}.")


def _same_order(loader: Loader) -> bool:
    return not isinstance(loader, tfn.data.Loader) or loader.sampler.order.mixable


def _sizes(windows: Windows, then: Values, rows: int) -> list[str]:
    """The ways in which the updates differ from the checkpoint's: in their rows, or in their number."""
    length = windows.length
    was, now = then["rows"] * then["accumulate"], rows * length.accumulate
    before = None if then["of"] is None else max(-(-then["of"] // then["accumulate"]), 1)
    same = (then["rows"], then["accumulate"]) == (rows, length.accumulate)
    if same or (was == now and before in (None, length.updates_per_epoch)):
        return []
    said = [
        f"an update has {now} rows on all ranks together ({rows} x gradient_accumulation_steps={length.accumulate}),"
        f" and had {was} ({then['rows']} x {then['accumulate']})"
    ]
    if before is not None and length.micro_per_epoch is not None:
        said.append(f"an epoch has {length.updates_per_epoch} updates, and had {before}")
    done = windows.trainer.state.global_step
    return [*said, f"the learning rate's schedule has {length.max_steps} updates, of which {done} are done"]


def _remedy(windows: Windows, then: Values, rows: int) -> list[str]:
    """The arguments to write for the same run as the checkpoint's."""
    trainer, lines = windows.trainer, []
    ranks = together(trainer, 1)
    if then["rows"] != rows and then["rows"] % ranks == 0:
        lines.append(f"`per_device_train_batch_size={then['rows'] // ranks}`")
    elif then["rows"] != rows:
        lines.append(f"a number of processes that divides {then['rows']}")
    if then["accumulate"] != windows.length.accumulate:
        lines.append(f"`gradient_accumulation_steps={then['accumulate']}`")
    return [f"for the same run, write {' and '.join(lines)}"] if lines else []
