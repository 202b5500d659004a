"""The position of a run in its data, and the position at which a resumed run begins.

It is counted in micro-batches of all ranks, and their size is kept too. A run with other batch sizes resumes after the
same rows, and warns of what differs.
"""

from __future__ import annotations

from transformers.utils import logging

import trainfn as tfn
from trainfn.hf._parallel._sharding import Dealt
from trainfn.hf._run._data import Windows, together
from trainfn.hf._run._foreign import owner_of_state
from trainfn.hf._types import Loader, Nested, Values

logger = logging.get_logger(__name__)


def position(windows: Windows) -> Values:
    """The position in the data, as a checkpoint keeps it.

    ===================== ===========================================================================================
    ``epoch``, ``micro``  completed epochs, and micro-batches of the next one, on all ranks together
    ``of``                micro-batches of an epoch, or None if the loader has no length
    ``rows``              rows of a micro-batch, on all ranks together; see `rows_of`
    ``accumulate``        micro-batches of an update
    ``readers``           workers that read a stream, or 1
    ``streams``           the state of each rank's stream, if it has one; see `_streams`
    ===================== ===========================================================================================
    """
    length = windows.length
    place = {"epoch": windows.epoch, "micro": windows.window and windows.micro_done}
    sizes = {"of": length.micro_per_epoch, "rows": rows_of(windows), "accumulate": length.accumulate}
    kept = {"readers": _readers(windows.loader), "streams": _streams(windows) if windows.window else None}
    return {**place, **sizes, **kept}


def _readers(loader: Loader) -> int:
    return max(loader.num_workers, 1) if isinstance(loader, tfn.data.Stream) else 1


def _streams(windows: Windows) -> list[Nested] | None:
    """The states of the ranks' streams after the rows that updates have seen; every rank calls this."""
    if windows.reading is None:
        return None
    state = windows.reading.state()
    if not _is_json(state):
        logger.warning_once(
            f"Trainer: the state of {type(windows.loader).__name__} is not plain JSON, so checkpoints don't hold it: a"
            " resumed run reads and drops the rows before. Return numbers, strings, lists and dicts with string keys"
            " from `state_dict()`."
        )
        state = None
    states = windows.trainer._trainfn.world.ranks.gathered(state)
    return None if any(each is None for each in states) else states


def _is_json(value: Nested) -> bool:
    """Whether a value comes back from a JSON file as it was."""
    if isinstance(value, dict):
        return all(type(name) is str and _is_json(item) for name, item in value.items())
    if type(value) is list:
        return all(map(_is_json, value))
    return value is None or type(value) in (bool, int, float, str)


def rows_of(windows: Windows) -> int:
    """The rows of a micro-batch on all ranks; for a loader without a ``batch_size``, each batch counts as one row."""
    loader = windows.loader
    if isinstance(loader, tfn.data.Loader):
        return loader.sampler.batch_size
    found = [getattr(each, "batch_size", None) for each in (loader, getattr(loader, "batch_sampler", None))]
    size = next((size for size in found if isinstance(size, int)), 1)
    return size * loader.shares if isinstance(loader, Dealt) else size


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
        windows.resumed = None if again else _fitting(windows, then)
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
    if (readers := then.get("readers", 1)) != _readers(windows.loader) and windows.window:
        said.append(
            f"{_readers(windows.loader)} workers give the rows of a stream in another order than {readers}; some of"
            " this epoch are seen again, others not at all"
        )
    if said and windows.trainer._trainfn.world.ranks.rank == 0:
        said += _remedy(windows, then, rows)
        logger.warning(f"`trainer.train(resume_from_checkpoint=...)`: {'; '.join(said)}.")


def _fitting(windows: Windows, then: Values) -> Nested:
    """The state of this rank's stream in a checkpoint, unless it is that of another number of ranks or workers."""
    ranks, loader = windows.trainer._trainfn.world.ranks, windows.loader
    states = then.get("streams") or []
    if len(states) != ranks.size:
        return None
    state = states[ranks.rank]
    if not isinstance(loader, tfn.data.Stream):
        return state if owner_of_state(loader) is not None else None
    readers, same = _readers(loader), then["rows"] == rows_of(windows)
    fits = tfn.data.has_state(loader.source) and len(state["readers"]) == readers and (same or readers == 1)
    return state if fits else None


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
    if then.get("readers", 1) != _readers(windows.loader):
        lines.append(f"`dataloader_num_workers={then['readers']}`")
    return [f"for the same run, write {' and '.join(lines)}"] if lines else []
