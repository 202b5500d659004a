"""The Hub: the model's repository, pushes in the background, the model card.

A push that fails during training is reported, and the next push tries again; it never ends the training.
`push_to_hub`, which the user calls, raises its errors.
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

from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token
from transformers.modelcard import TrainingSummary
from transformers.trainer_utils import HubStrategy, IntervalStrategy

import trainfn as tfn
from trainfn.hf._callbacks._events import event
from trainfn.hf._types import TrainerLike, Values

_logger = logging.getLogger(__name__)
# The patterns of transformers, and ".*", the names of unfinished checkpoints: they hold the optimizer's state.
IGNORED = ("_*", "checkpoint-*", ".*")
_ARGUMENTS = ("training_args.json", "training_args.bin")
# The files of a checkpoint that make up the model. The others, above all the optimizer's state, are not uploaded.
_MODEL_FILES = (
    *("config.json", "generation_config.json", "pytorch_model.bin", "model.safetensors"),
    *("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"),
    *_ARGUMENTS,
)
_INDEXES = ("pytorch_model.bin.index.json", "model.safetensors.index.json")


class Upload(NamedTuple):
    """A folder to upload to the Hub.

    Attributes:
        folder: The local folder.
        message: The message of the commit.
        path: The folder in the repository; None for its top.
        ignore: Patterns of the files to leave out.
    """

    folder: str
    message: str
    path: str | None = None
    ignore: tuple[str, ...] | None = None


def api() -> HfApi:
    """Return a client of the Hub; its uploads in the background happen one after the other.

    >>> api().library_name
    'trainfn'
    """
    return HfApi(library_name="trainfn", library_version=tfn.__version__)


class Pushes:
    """The uploads of one repository: running, failed and waiting ones.

    Args:
        client: The client, from `api`.
        repo_id: The repository.
        token: The token; None for the one of `hf auth login`.
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
        """Whether no upload is running."""
        return all(future.done() for _, future in self.running)

    def uses(self, folder: str | os.PathLike[str]) -> bool:
        """Whether an upload of a folder is running or waiting, so that the folder must not be removed yet."""
        folder = os.path.abspath(folder)
        under_way = [upload for upload, future in self.running if not future.done()]
        skipped = self.skipped[1] if self.skipped else []
        return any(os.path.abspath(upload.folder) == folder for upload in [*under_way, *self.waiting, *skipped])

    def start(self, uploads: list[Upload]) -> None:
        """Upload in the background; before, try again those that failed, unless a new one takes their place."""
        targets = {upload.path for upload in uploads}
        owed = [upload for upload, _ in self.failed] + self.waiting
        self.failed, self.waiting, self.skipped = [], [], None
        again = {upload.path: upload for upload in owed if upload.path not in targets}
        for path in [path for path, upload in again.items() if not os.path.isdir(upload.folder)]:
            _logger.warning("%s does not exist any more, so it is not pushed to the Hub.", again.pop(path).folder)
        for upload in [*again.values(), *uploads]:
            self.running.append((upload, self.client.run_as_future(self._pushed, upload)))

    def _pushed(self, upload: Upload) -> CommitInfo | Future[CommitInfo]:
        """Upload, in a thread, and log a failure at once."""
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
        """Drop the uploads that have ended; return those that failed since the last call."""
        if wait:
            wait_for([future for _, future in self.running])
        ended = [(upload, future) for upload, future in self.running if future.done()]
        self.running = [pair for pair in self.running if pair not in ended]
        new = [(upload, error) for upload, future in ended if (error := future.exception()) is not None]
        self.failed += new
        return new

    def supersede_model(self) -> None:
        """Drop the uploads of the model that failed or wait; keep those of checkpoints."""
        self.waiting += self.skipped[1] if self.skipped else []
        self.waiting = [upload for upload in self.waiting if upload.path is not None]
        self.failed = [(upload, error) for upload, error in self.failed if upload.path is not None]
        self.skipped = None

    def wait_until_done(self) -> None:
        """Wait for the running uploads."""
        wait_for([future for _, future in self.running])


# --- functions of the Trainer -----------------------------------------------------------------------------------------


def init_repo(trainer: TrainerLike, token: str | None = None, private: bool | None = None) -> None:
    """Create the repository `args.hub_model_id`, by default with the name of `output_dir`, unless it exists.

    It sets `trainer.hub_model_id` and `trainer.push_in_progress`, on the main process only.

    Args:
        trainer: The Trainer.
        token: The token in place of `args.hub_token`.
        private: The value in place of `args.hub_private_repo`.

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
            ' none. Run `hf auth login`, set HF_TOKEN, or write `hub_token="hf_..."`. To train without the Hub, write'
            " `push_to_hub=False`."
        )
    client, name = api(), args.hub_model_id or Path(args.output_dir).absolute().name
    private = args.hub_private_repo if private is None else private
    try:
        repo = client.create_repo(name, token=token, private=private, exist_ok=True)
    except Exception as error:
        raise RuntimeError(
            f"`Trainer(args=TrainingArguments(push_to_hub=True))` can't create the repository {name!r} on"
            f" {client.endpoint}: {type(error).__name__}: {error}. Check that the token may write there, or write"
            ' `hub_model_id="me/my-model"` for another repository. To train without the Hub, write `push_to_hub=False`.'
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
        commit_message: The message of the commit.
        blocking: Whether to wait for the upload.
        token: The token in place of `args.hub_token`.
        revision: The branch in place of `args.hub_revision`.
        private: Whether to make a new repository private.
        **card: The arguments of `create_model_card`.

    Returns:
        A `huggingface_hub.CommitInfo`, or a `Future` of one; None on all but the main process.

    Raises:
        ValueError: If there is no token.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses the upload.
    """
    event(trainer, "on_push_begin")
    if getattr(trainer, "push_in_progress", None) is None:  # the Trainer was made with `push_to_hub=False`
        trainer.init_hf_repo(token=token, private=private)
    # The files must not change while an earlier upload reads them.
    finish(trainer, model_follows=True)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    name = (trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute().name).split("/")[-1]
    tags = card.pop("tags", None)
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    tags += [tag for tag in getattr(trainer.model, "model_tags", None) or [] if tag not in tags]
    trainer.create_model_card(**{"model_name": name, "tags": tags or None, **card})
    upload = Upload(trainer.args.output_dir, commit_message or "End of training", ignore=IGNORED)
    assert trainer.push_in_progress is not None  # `init_repo` has made it on the main process
    return trainer.push_in_progress.upload(upload, token, revision, run_as_future=not blocking)


def push_from_checkpoint(trainer: TrainerLike, folder: str | os.PathLike[str]) -> None:
    """Upload in the background, after a checkpoint, the folders that `args.hub_strategy` asks for.

    ==================== =============================================================================
    ``end``              nothing
    ``every_save``       the model
    ``checkpoint``       the model, and the full checkpoint as ``last-checkpoint``
    ``all_checkpoints``  the model, and the full checkpoint as ``checkpoint-N``
    ==================== =============================================================================

    While an earlier push is running, this one is skipped, unless `args.hub_always_push`. A skipped one is not lost:
    with ``all_checkpoints`` the next push uploads its checkpoint too, and `finish` pushes the last one. A failure is
    logged, not raised.

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
    """Wait for the running pushes, then push those that were skipped or failed; a failure is logged, not raised.

    Args:
        trainer: The Trainer.
        model_follows: Whether the model is about to be pushed anyway, so that only checkpoints remain to be pushed.

    >>> import types
    >>> finish(types.SimpleNamespace(push_in_progress=None))
    """
    pushes: Pushes | None = getattr(trainer, "push_in_progress", None)
    if pushes is None:
        return
    if not pushes.is_done():
        _logger.info("Waiting for the running pushes to the Hub.")
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
    """Write ``README.md`` on the main process: the model, its results and its hyper-parameters.

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
    if not hasattr(trainer.model, "config"):  # transformers would read the name from the configuration
        card.setdefault("finetuned_from", "")
    summary = TrainingSummary.from_trainer(trainer, tags=tags or None, **card)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(summary.to_model_card(), encoding="utf-8")


def _begin(trainer: TrainerLike, pushes: Pushes, folder: Path, uploads: list[Upload]) -> None:
    event(trainer, "on_push_begin")
    try:
        _copy_model(trainer, folder)
        pushes.start(uploads)
    except Exception as error:  # such as a full disk: the checkpoint is written, so the training need not end
        _note(trainer, [(uploads[0], error)])
        _logger.warning('The push "%s" to the Hub could not be started: %r', uploads[0].message, error)


def _uploads(trainer: TrainerLike, folder: Path) -> list[Upload]:
    """Return the uploads that the strategy asks for: the model, and perhaps the checkpoint."""
    state, strategy = trainer.state, trainer.args.hub_strategy
    by_epoch = trainer.args.save_strategy == IntervalStrategy.EPOCH
    message = f"Training in progress, {f'epoch {int(state.epoch)}' if by_epoch else f'step {state.global_step}'}"
    uploads = [Upload(trainer.args.output_dir, message, ignore=IGNORED)]
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        path = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
        uploads.append(Upload(str(folder), f"{message}, checkpoint", path))
    return uploads


def _copy_model(trainer: TrainerLike, folder: Path) -> None:
    """Copy the model's files of a checkpoint to `output_dir`, which is uploaded."""
    files = [*_MODEL_FILES, *_INDEXES]
    for index in _INDEXES:
        if (folder / index).is_file():
            files += sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in files:
        if (folder / name).is_file():
            # Written beside and renamed: an upload may be reading the old file.
            beside = Path(trainer.args.output_dir, f"_{name}")
            shutil.copy(folder / name, beside)
            beside.replace(beside.with_name(name))
    if (processor := trainer.processing_class) is not None and hasattr(processor, "save_pretrained"):
        processor.save_pretrained(trainer.args.output_dir)
    if not any((folder / name).is_file() for name in _ARGUMENTS):
        Path(trainer.args.output_dir, _ARGUMENTS[0]).write_text(trainer.args.to_json_string() + "\n")


def _note(trainer: TrainerLike, failures: list[tuple[Upload, BaseException]]) -> None:
    """Add failures to the log history, and so to trainer_state.json."""
    state = trainer.state
    for upload, error in failures:
        entry: Values = {"hub_push": upload.message, "hub_error": f"{type(error).__name__}: {error}"}
        state.log_history.append({**entry, "epoch": state.epoch, "step": state.global_step})
