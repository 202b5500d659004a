"""The checkpoints of a run: when to save, in the background, how many to keep, and which one to resume from."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from trainfn._checkpoint import _disk
from trainfn._checkpoint._contents import SHARD, Contents, contents_of
from trainfn._checkpoint._folder import STEP, Folder, best_of, expired
from trainfn._checkpoint._leaves import alike
from trainfn._checkpoint._snapshot import Gathered, Snapshot
from trainfn._checkpoint._write import explained, sweep, write
from trainfn._ranks import _group
from trainfn._ranks._group import ALONE, Ranks
from trainfn._text import nearest
from trainfn._types import TrainState
from trainfn.errors import CheckpointError


class Checkpoints:
    """The checkpoints of one run, ``folder/checkpoint-<step>``, each as `save` writes it.

    A ``with`` block waits at its end for the last write, and raises its error. The folder is locked from the first
    save, or the start of the ``with`` block, to the end. So two runs can't remove each other's checkpoints.

    In a job of several processes all of them make a `Checkpoints` of the same folder and call its methods together.
    Each writes and reads its part of a sharded state; rank 0 locks the folder and removes old checkpoints.

    Args:
        folder: The folder of the run, which is made if it does not exist.
        every: The number of steps from one save to the next, for `due`; None if only the last state is saved.
        keep: How many of the newest checkpoints are kept; None for all.
        keep_every: Checkpoints whose step it divides are kept too.
        best: The name of a metric; the checkpoint with its best value is kept too.
        mode: Whether the ``"min"`` or the ``"max"`` of the metric is best.
        asynchronous: Whether `save` returns as soon as it has copied the state to host memory, which takes the size
            of the state.
        resume: Whether the run resumes from the newest checkpoint. If not, the folder must have none.
        max_shard_size: Bytes above which the model is split into several files.
        full: Whether rank 0 writes the files that one process would write, as in `save`.
        model: Whether the module's tensors are in a file of their own, ``model.safetensors``. Without it, they are
            beside the rest of the state, and other files may hold the model.

    Raises:
        ValueError: If an argument is invalid, or ``resume=False`` finds checkpoints.

    >>> import tempfile, torch, trainfn as tfn
    >>> state = tfn.init(torch.nn.Linear(2, 1), tfn.optim.sgd(0.1))
    >>> with Checkpoints(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...     for n in range(4):
    ...         checkpoints.save(state._replace(step=torch.tensor(n)), {"note": n})
    >>> checkpoints.steps()
    [2, 3]
    >>> checkpoints.restore(like=state)
    (TrainState(Linear, step=3, params=2 tensors / 3 numbers), {'note': 3})
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int | None = None,
        keep: int | None = None,
        keep_every: int | None = None,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
        asynchronous: bool = True,
        resume: bool = True,
        max_shard_size: int = SHARD,
        full: bool = False,
        model: bool = True,
    ) -> None:
        counts = {"every": every, "keep": keep, "keep_every": keep_every, "max_shard_size": max_shard_size}
        for name, count in counts.items():
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(
                    f"Checkpoints(folder, {name}={count!r}): this is a count. Give a whole number from 1 on, or"
                    " leave it out."
                )
        if mode not in ("min", "max"):
            raise ValueError(
                f"Checkpoints(folder, mode={mode!r}): the best metric is the lowest or the highest. Write `mode='min'`"
                " or `mode='max'`."
            )
        self.folder, self.every, self.keep, self.keep_every = Path(folder), every, keep, keep_every
        self.best, self.asynchronous, self.max_shard_size, self.full = best, asynchronous, max_shard_size, full
        self.mode: Literal["min", "max"] = mode
        self.model = model
        self._found = Folder(self.folder)
        self._lock: _disk.Lock | None = None
        self._snapshot = Snapshot()
        # Two groups of the same ranks: exchanges of a write in the background must not mix with those of this thread.
        self._ranks, self._writers = ALONE, ALONE
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if not resume and (steps := self.steps()):
            raise ValueError(
                f"Checkpoints({str(folder)!r}, resume=False): there are checkpoints of a run here, the last of step"
                f" {steps[-1]}, and none is overwritten. Write `resume=True` to continue it, or give another folder."
            )

    # --- saving ---------------------------------------------------------------------------------------------------

    def due(self, n: int) -> bool:
        """Whether the state after ``n`` steps is to be saved."""
        return self.every is not None and n % self.every == 0

    def save(
        self,
        state: TrainState,
        extra: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, Any] | None = None,
        files: Mapping[str, str | bytes] | None = None,
        adopt: str | os.PathLike[str] | None = None,
        wait: bool = False,
    ) -> None:
        """Save the state as ``checkpoint-<its step>``, once the save before this one has ended.

        Args:
            state: May be changed or donated as soon as this returns.
            extra: What `restore` gives back beside the state; plain JSON.
            metrics: Numbers or `Mean`s, for ``best=``.
            files: Small files to put beside the others: their contents by name, which may begin with a folder's.
            adopt: A folder beside or in place of ``checkpoint-<its step>``, with files that the caller has written,
                such as the model's. It becomes the checkpoint. The module's tensors are in ``state.safetensors``.
            wait: Whether to return only when the checkpoint is on the disk.

        Raises:
            CheckpointError: If it can't be written, if the save before this one failed, or if another run saves here.
            TypeError: If ``extra`` is not plain JSON, or a leaf of the state can't be saved.
            ValueError: If there is a checkpoint of a later step, from which a run would resume; or a name in ``files``
                is invalid.
        """
        self.wait()
        ranks = self._job()
        state = alike(state, ranks)
        given = {"extra": extra, "metrics": metrics, "files": files, "adopt": None if adopt is None else Path(adopt)}
        contents = ranks.agreed(lambda: self._contents(state, given, ranks))
        if not self.asynchronous:
            self._write(contents, ranks)
            return
        contents = ranks.agreed(lambda: self._copied(contents))
        # Not a daemon thread, so Python waits for it when it exits. It computes nothing, so it draws no random number.
        self._thread = threading.Thread(target=self._run, args=(contents, self._writers), name="checkpoint")
        self._thread.start()
        if wait:
            self.wait()

    def _contents(self, state: TrainState, given: dict[str, Any], ranks: Ranks) -> Contents:
        call, metrics = "Checkpoints.save(state)", given["metrics"]
        how = {"max_shard_size": self.max_shard_size, "full": self.full, "model": self.model}
        contents = contents_of(state, call, ranks=ranks, **how, **given)
        if self.best is not None and metrics is not None and self.best not in metrics:
            near = nearest(self.best, metrics, likeness=0)
            raise ValueError(
                f"{call}: best={self.best!r} is not among the metrics {sorted(metrics)}.{near} Checkpoints can't be"
                f" compared without it: give `save` such a metric, or `Checkpoints` another `best=`."
            )
        if ranks.rank == 0:
            self._open(contents.nbytes)
            self._check_newest(contents.manifest.step)
        return contents

    def _copied(self, contents: Contents) -> Contents:
        """The same contents in host memory."""
        # Leaves are gathered here and not in the background: a collective there would mix with those of training.
        if not contents.full:
            return contents._replace(leaves=self._snapshot.take(contents.leaves))
        gathered = Gathered(contents.leaves, list(contents.leaves))
        try:
            held = self._snapshot.take(gathered) if contents.mine else {}
        finally:
            gathered.drain()
        return contents._replace(leaves=held, full=False)

    def _job(self) -> Ranks:
        """All processes of the job, also where they met after this object was made."""
        ranks = _group.ranks()
        if ranks is not self._ranks:
            folders = ranks.everyone(lambda: os.fspath(self.folder))
            if len(set(folders)) > 1:
                raise ValueError(
                    f"Checkpoints({folders[0]!r}): the ranks of one job save together, and they have different"
                    f" folders: {', '.join(map(repr, dict.fromkeys(folders)))}. Give all of them the same folder."
                )
            self._ranks, self._writers = ranks, ranks.another() if self.asynchronous else ranks
        return ranks

    def failed(self) -> bool:
        """Whether a write in the background has failed, as far as this rank knows; never waits."""
        return self._error is not None

    def check(self) -> None:
        """Raise the error of a write in the background, if it has failed; never waits for it."""
        if self._job().any([self.failed()])[0]:
            self.wait()

    def wait(self) -> None:
        """Wait for a write in the background, and raise its error if it failed."""
        self._settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _settle(self) -> None:
        """Wait for a write in the background; `check` and `wait` raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, contents: Contents, ranks: Ranks) -> None:
        try:
            self._write(contents, ranks)
        except BaseException as error:
            if not threading.main_thread().is_alive():
                raise  # no one can call `wait` any more: Python prints the error
            self._error = error

    def _write(self, contents: Contents, ranks: Ranks) -> None:
        step = contents.manifest.step
        write(self._found.target(step), contents, ranks, lambda: sweep(self.folder, STEP))
        self._found.damaged.discard(step)
        if self.keep is not None and ranks.rank == 0:
            self._rotate(step, self.keep)

    def _rotate(self, written: int, keep: int) -> None:
        """Remove the checkpoints that are not to be kept; never the one that was just written."""
        complete = self._found.complete()
        best = best_of({s: m.metrics.get(self.best) for s, (_, m) in complete.items()}, self.mode) if self.best else ()
        for step in expired(complete, {written, *best}, keep=keep, keep_every=self.keep_every):
            path, _ = complete[step]
            try:
                _disk.remove(path)
            except OSError as error:
                warnings.warn(
                    f"{str(path)!r} could not be removed, and is kept: {error}. Remove it by hand.", stacklevel=2
                )

    def _open(self, nbytes: int) -> None:
        if self._lock is None or not self._lock.held:
            try:
                _disk.make_folders(self.folder)
                self._lock = _disk.Lock(self.folder)
            except OSError as error:
                raise CheckpointError(explained(error, self.folder / "checkpoint", nbytes)) from error

    def _check_newest(self, step: int) -> None:
        later = self._found.after(step)
        if later is not None:
            raise ValueError(
                f"Checkpoints.save(state): the state is at step {step}, and {str(self.folder)!r} has a checkpoint of"
                f" step {later}, from which a run would resume. Give another folder, or remove the later checkpoints."
            )

    expired = staticmethod(expired)  # public, for programs that remove other folders by the same rule

    # --- restoring ------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints in the folder, in order."""
        self._settle()
        return self._job().first(lambda: sorted(self._found.complete()))

    def newest(self) -> Path | None:
        """The newest checkpoint whose checksums are all right; a warning names the damage of newer ones."""
        self._settle()
        return self._found.newest(self._job())

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """Restore the newest undamaged state and the ``extra`` that was saved with it; None if there is no checkpoint.

        Args:
            like: See `trainfn.restore`.
            step: The checkpoint to restore. By default the newest; if that is damaged, the one before, with a warning.

        Raises:
            CheckpointError: If the checkpoint does not fit ``like``; if all are damaged; or if that of ``step`` is
                damaged or does not exist.
        """
        self._settle()
        return self._found.load(like, step, self._job())

    # --- from beginning to end ------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Lock the folder."""
        self._job().first(lambda: self._open(0))
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for the last write; raise its error, or note it on the error that ends the block."""
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"A checkpoint was not written either: {failed}")
        finally:
            self._snapshot = Snapshot()  # frees host memory of the size of the state
            if self._lock is not None:
                self._lock.close()
