"""The Hub: the model's repository, pushes in the background, the model card.

A push that fails during training is reported and made up for at the next one; it never ends the training. What the
user calls, `push_to_hub`, raises.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token
from transformers.modelcard import TrainingSummary
from transformers.trainer_utils import HubStrategy, IntervalStrategy

import trainfn as tfn
from trainfn.hf._callbacks._events import event
from trainfn.hf._types import TrainerLike, Values

_logger = logging.getLogger(__name__)
# Like transformers, and what a checkpoint is called while it is being written: it holds the optimizer's state.
IGNORED = ("_*", "checkpoint-*", ".*")
_ARGUMENTS = ("training_args.json", "training_args.bin")
# What a checkpoint has of the model; the rest, the optimizer's state above all, stays here.
_MODEL_FILES = (
    *("config.json", "generation_config.json", "pytorch_model.bin", "model.safetensors"),
    *("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"),
    *_ARGUMENTS,
)
_INDEXES = ("pytorch_model.bin.index.json", "model.safetensors.index.json")


class Upload(NamedTuple):
    """A folder to bring to the Hub.

    Attributes:
        folder: Here.
        message: Of the commit.
        path: There; None for the top of the repository.
        ignore: Patterns of what is left out.
    """

    folder: str
    message: str
    path: str | None = None
    ignore: tuple[str, ...] | None = None


def api() -> HfApi:
    """The client; its uploads in the background happen one after the other.

    >>> api().library_name
    'trainfn'
    """
    return HfApi(library_name="trainfn", library_version=tfn.__version__)


class Pushes:
    """The uploads of one repository: those under way, those that failed, those that are still to come.

    Args:
        client: From `api`.
        repo_id: The repository.
        token: For it; None for the one that is logged in.
        revision: The branch; None for the main one.

    >>> pushes = Pushes(api(), "me/model")
    >>> pushes.is_done(), pushes.failed
    (True, [])
    """

    def __init__(self, client: HfApi, repo_id: str, token: str | None = None, revision: str | None = None) -> None:
        self.client, self.repo_id, self.token, self.revision = client, repo_id, token, revision
        self.running: list[tuple[Upload, Future[CommitInfo | Future[CommitInfo]]]] = []
        self.failed: list[tuple[Upload, BaseException]] = []
        self.waiting: list[Upload] = []
        self.skipped: tuple[Path, list[Upload]] | None = None

    def is_done(self) -> bool:
        """Whether nothing is under way."""
        return all(future.done() for _, future in self.running)

    def uses(self, folder: str | os.PathLike[str]) -> bool:
        """Whether a folder is being uploaded, or is to be: whoever deletes checkpoints leaves it for now."""
        folder = os.path.abspath(folder)
        under_way = [upload for upload, future in self.running if not future.done()]
        skipped = self.skipped[1] if self.skipped else []
        return any(os.path.abspath(upload.folder) == folder for upload in [*under_way, *self.waiting, *skipped])

    def start(self, uploads: list[Upload]) -> None:
        """Upload in the background, after what failed before and is still here and not superseded."""
        targets = {upload.path for upload in uploads}
        owed = [upload for upload, _ in self.failed] + self.waiting
        self.failed, self.waiting, self.skipped = [], [], None
        again = {upload.path: upload for upload in owed if upload.path not in targets}
        for path in [path for path, upload in again.items() if not os.path.isdir(upload.folder)]:
            _logger.warning("%s is gone and will not be pushed to the Hub.", again.pop(path).folder)
        for upload in [*again.values(), *uploads]:
            self.running.append((upload, self.client.run_as_future(self._pushed, upload)))

    def _pushed(self, upload: Upload) -> CommitInfo | Future[CommitInfo]:
        """In the background: upload, and tell of a failure as soon as it is known."""
        try:
            return self.upload(upload)
        except Exception as error:
            _logger.warning(
                'The push "%s" to the Hub failed: %s: %s. The training goes on; the next push tries again.',
                *(upload.message, type(error).__name__, error),
            )
            raise

    def upload(
        self, upload: Upload, token: str | None = None, revision: str | None = None, **how: Any
    ) -> CommitInfo | Future[CommitInfo]:
        """Upload a folder."""
        return self.client.upload_folder(
            repo_id=self.repo_id,
            folder_path=upload.folder,
            path_in_repo=upload.path,
            commit_message=upload.message,
            token=token or self.token,
            revision=revision or self.revision,
            ignore_patterns=list(upload.ignore) if upload.ignore else None,
            **how,
        )

    def collect(self, *, wait: bool = False) -> list[tuple[Upload, BaseException]]:
        """Take note of what has ended; return what failed since the last time."""
        if wait:
            wait_for([future for _, future in self.running])
        ended = [(upload, future) for upload, future in self.running if future.done()]
        self.running = [pair for pair in self.running if pair not in ended]
        new = [(upload, error) for upload, future in ended if (error := future.exception()) is not None]
        self.failed += new
        return new

    def supersede_model(self) -> None:
        """Forget what is owed of the model; keep what is owed of checkpoints."""
        self.waiting += self.skipped[1] if self.skipped else []
        self.waiting = [upload for upload in self.waiting if upload.path is not None]
        self.failed = [(upload, error) for upload, error in self.failed if upload.path is not None]
        self.skipped = None

    def wait_until_done(self) -> None:
        """Wait for what is under way."""
        wait_for([future for _, future in self.running])


# --- functions of the Trainer -----------------------------------------------------------------------------------------


def init_repo(trainer: TrainerLike, token: str | None = None, private: bool | None = None) -> None:
    """Create the repository `args.hub_model_id`, by default that of `output_dir`'s name, unless it exists.

    Sets `trainer.hub_model_id` and `trainer.push_in_progress`, on the main process only.

    Args:
        trainer: The Trainer.
        token: In place of `args.hub_token`.
        private: In place of `args.hub_private_repo`.

    Raises:
        ValueError: If there is no token.
        RuntimeError: If the Hub refuses, or can't be reached.
    """
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    token = token or args.hub_token
    if token is None and get_token() is None:
        raise ValueError(
            "`Trainer(args=TrainingArguments(push_to_hub=True))` needs a token that may write to the Hub, and there is"
            ' none. Run `hf auth login`, set HF_TOKEN, or write `hub_token="hf_..."`; to train without the Hub,'
            " `push_to_hub=False`."
        )
    client, name = api(), args.hub_model_id or Path(args.output_dir).absolute().name
    private = args.hub_private_repo if private is None else private
    try:
        repo = client.create_repo(name, token=token, private=private, exist_ok=True)
    except Exception as error:
        raise RuntimeError(
            f"`Trainer(args=TrainingArguments(push_to_hub=True))` can't create the repository {name!r} on"
            f" {client.endpoint}: {type(error).__name__}: {error}. See that the token may write there, or name another"
            ' with `hub_model_id="me/my-model"`; to train without the Hub, `push_to_hub=False`.'
        ) from error
    trainer.hub_model_id = repo.repo_id
    trainer.push_in_progress = Pushes(client, repo.repo_id, token, args.hub_revision)


def push_to_hub(
    trainer: TrainerLike,
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **card: Any,
) -> CommitInfo | Future[CommitInfo] | None:
    """Save the model, write its card, and upload `output_dir` without the checkpoints.

    Args:
        trainer: The Trainer.
        commit_message: Of the commit.
        blocking: Whether to wait for the upload.
        token: In place of `args.hub_token`.
        revision: In place of `args.hub_revision`.
        private: Whether to make a new repository private.
        **card: For `create_model_card`.

    Returns:
        A `huggingface_hub.CommitInfo`, or a `Future` of one; None on all but the main process.

    Raises:
        ValueError: If there is no token.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses the upload.
    """
    event(trainer, "on_push_begin")
    if getattr(trainer, "push_in_progress", None) is None:  # `push_to_hub=False`, and now the user calls it
        init_repo(trainer, token=token, private=private)
    finish(trainer, model_follows=True)  # before the files that are being uploaded change
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    name = (trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute().name).split("/")[-1]
    tags = card.pop("tags", None)
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    tags += [tag for tag in getattr(trainer.model, "model_tags", None) or [] if tag not in tags]
    trainer.create_model_card(**{"model_name": name, "tags": tags or None, **card})
    upload = Upload(trainer.args.output_dir, commit_message or "End of training", ignore=IGNORED)
    assert trainer.push_in_progress is not None  # on the main process it has been made
    return trainer.push_in_progress.upload(upload, token, revision, run_as_future=not blocking)


def push_from_checkpoint(trainer: TrainerLike, folder: str | os.PathLike[str]) -> None:
    """After a checkpoint, upload in the background what `args.hub_strategy` asks for.

    ==================== =============================================================================
    ``end``              nothing
    ``every_save``       the model
    ``checkpoint``       the model, and the whole checkpoint as ``last-checkpoint``
    ``all_checkpoints``  the model, and the whole checkpoint as ``checkpoint-N``
    ==================== =============================================================================

    While an earlier push is under way this one is skipped, unless `args.hub_always_push`. What was skipped is not lost:
    with ``all_checkpoints`` the checkpoint goes with the next push, and `finish` pushes the last one. Nothing that goes
    wrong is raised.

    Args:
        trainer: The Trainer.
        folder: The checkpoint.

    >>> import types
    >>> push_from_checkpoint(types.SimpleNamespace(args=None), "checkpoint-10")  # there is no repository
    """
    args, pushes = trainer.args, getattr(trainer, "push_in_progress", None)
    if pushes is None or not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    _note(trainer, pushes.collect())
    uploads = _uploads(trainer, Path(folder))
    if args.hub_always_push or pushes.is_done():
        _begin(trainer, pushes, Path(folder), uploads)
        return
    pushes.skipped = Path(folder), uploads
    pushes.waiting += uploads[1:] if args.hub_strategy == HubStrategy.ALL_CHECKPOINTS else []


def finish(trainer: TrainerLike, *, model_follows: bool = False) -> None:
    """Wait for the pushes under way, then push what was skipped or failed. Nothing that goes wrong is raised.

    Args:
        trainer: The Trainer.
        model_follows: Whether the model is about to be pushed anyway, so that only checkpoints are owed.

    >>> import types
    >>> finish(types.SimpleNamespace(push_in_progress=None))
    """
    pushes: Pushes | None = getattr(trainer, "push_in_progress", None)
    if pushes is None:
        return
    if not pushes.is_done():
        _logger.info("Waiting for the pushes to the Hub that are under way.")
    _note(trainer, pushes.collect(wait=True))
    if model_follows:
        pushes.supersede_model()
    if pushes.skipped or pushes.failed or pushes.waiting:
        if pushes.skipped and pushes.skipped[0].is_dir():
            _begin(trainer, pushes, *pushes.skipped)
        else:
            pushes.start([])
        _note(trainer, pushes.collect(wait=True))


def create_model_card(trainer: TrainerLike, **card: Any) -> None:
    """Write ``README.md``: what the model is, its results and hyper-parameters. On the main process only.

    Args:
        trainer: The Trainer.
        **card: ``language``, ``license``, ``tags``, ``model_name``, ``finetuned_from``, ``tasks``, ``dataset_tags``,
            ``dataset``, ``dataset_args``, as `transformers.Trainer.create_model_card` has them.
    """
    if not trainer.is_world_process_zero():
        return
    path = Path(trainer.args.output_dir, "README.md")
    tags = card.pop("tags", None)
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    if path.exists():
        tags += [tag for tag in ModelCard.load(path).data.get("tags") or [] if tag not in tags]
    if not hasattr(trainer.model, "config"):  # from whose configuration it would be read
        card.setdefault("finetuned_from", "")
    summary = TrainingSummary.from_trainer(trainer, tags=tags or None, **card)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(summary.to_model_card(), encoding="utf-8")


def _begin(trainer: TrainerLike, pushes: Pushes, folder: Path, uploads: list[Upload]) -> None:
    event(trainer, "on_push_begin")
    try:
        _copy_model(trainer, folder)
        pushes.start(uploads)
    except Exception as error:  # a full disk, say: the checkpoint is written, and the training matters more
        _note(trainer, [(uploads[0], error)])
        _logger.warning('The push "%s" to the Hub could not be started: %r', uploads[0].message, error)


def _uploads(trainer: TrainerLike, folder: Path) -> list[Upload]:
    """What the strategy asks for: the model, and perhaps the checkpoint."""
    state, strategy = trainer.state, trainer.args.hub_strategy
    by_epoch = trainer.args.save_strategy == IntervalStrategy.EPOCH
    message = f"Training in progress, {f'epoch {int(state.epoch)}' if by_epoch else f'step {state.global_step}'}"
    uploads = [Upload(trainer.args.output_dir, message, ignore=IGNORED)]
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        path = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
        uploads.append(Upload(str(folder), f"{message}, checkpoint", path))
    return uploads


def _copy_model(trainer: TrainerLike, folder: Path) -> None:
    """Bring what a checkpoint has of the model to `output_dir`, which is what is uploaded."""
    files = [*_MODEL_FILES, *_INDEXES]
    for index in _INDEXES:
        if (folder / index).is_file():
            files += sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in files:
        if (folder / name).is_file():
            beside = Path(trainer.args.output_dir, f"_{name}")  # replaced whole: an upload may be reading
            shutil.copy(folder / name, beside)
            beside.replace(beside.with_name(name))
    if (processor := trainer.processing_class) is not None and hasattr(processor, "save_pretrained"):
        processor.save_pretrained(trainer.args.output_dir)
    if not any((folder / name).is_file() for name in _ARGUMENTS):
        torch.save(trainer.args, Path(trainer.args.output_dir, "training_args.bin"))


def _note(trainer: TrainerLike, failures: list[tuple[Upload, BaseException]]) -> None:
    """Failures become entries of the log history, and so of trainer_state.json."""
    state = trainer.state
    for upload, error in failures:
        entry: Values = {"hub_push": upload.message, "hub_error": f"{type(error).__name__}: {error}"}
        state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
