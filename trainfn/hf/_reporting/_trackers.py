"""`report_to`: the logs go to Accelerate's trackers, under the names of transformers.

The callbacks of transformers serve the trackers that Accelerate lacks: azure_ml, codecarbon, dagshub, flyte, kubeflow
and neptune.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import transformers
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, rewrite_logs
from transformers.trainer_callback import ExportableState

from trainfn.hf._types import Metrics, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

Tracker: TypeAlias = str | GeneralTracker
Reported: TypeAlias = Tracker | Sequence[Tracker | None] | None

# The packages of trackers that are not named like their package.
_PACKAGES = {"comet_ml": ("comet_ml",), "tensorboard": ("tensorboard", "tensorboardX")}
# How a tracker resumes a run: the argument for the run's id, the attribute that holds it, and further arguments.
_CONTINUE: dict[str, tuple[str, str, Values]] = {
    "wandb": ("id", "id", {"resume": "allow"}),
    "mlflow": ("run_id", "info.run_id", {}),
    "trackio": ("name", "name", {"resume": "allow"}),
    "comet_ml": ("experiment_key", "id", {}),
    "swanlab": ("id", "public.run_id", {"resume": "allow"}),
    "aim": ("run_hash", "hash", {}),
    "clearml": ("continue_last_task", "id", {}),
}
_SENT = int | float | str
_RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}


def tracker_callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """Return the callbacks that `report_to` asks for.

    Args:
        args: The `TrainingArguments`: `report_to`, `run_name`, `project`, `output_dir`,
            `trackio_space_id`, `trackio_bucket_id` and, if it has one, `logging_dir`.

    Raises:
        ImportError: If a package is missing.
        ValueError: If there is no tracker of a name.

    >>> import types
    >>> tracker_callbacks(types.SimpleNamespace(report_to="none"))
    []
    """
    wanted = names(args.report_to)
    ours = [each for each in wanted if isinstance(each, GeneralTracker) or each in LOGGER_TYPE_TO_CLASS]
    theirs: list[TrainerCallback] = [INTEGRATION_TO_CALLBACK[str(each)]() for each in wanted if each not in ours]
    if not ours:
        return theirs
    spaces = {
        "space_id": getattr(args, "trackio_space_id", None),
        "bucket_id": getattr(args, "trackio_bucket_id", None),
    }
    tracker = TrackerCallback(
        ours,
        logging_dir=logging_dir(args),
        project=_project(args),
        run_name=args.run_name,
        options={"trackio": {name: value for name, value in spaces.items() if value is not None}},
    )
    return [tracker, *theirs]


def names(report_to: Reported) -> list[Tracker]:
    """Return `report_to` as a list of trackers, each known and installed.

    Args:
        report_to: ``"all"`` (the installed ones), ``"none"``, a name, a `GeneralTracker`, or a list of these.

    Raises:
        ImportError: If a package is missing.
        ValueError: If there is no tracker of a name.

    >>> names(["none"]), names(None)
    ([], [])
    """
    given = cast("list[Tracker | None]", list(report_to) if isinstance(report_to, list | tuple) else [report_to])
    wanted: list[Tracker] = []
    for each in given:
        every = [str(tracker.value) for tracker in get_available_trackers()] if each == "all" else [each]
        wanted += [name for name in every if name not in (None, "none", *wanted)]
    for each in wanted:
        if not isinstance(each, GeneralTracker):
            _check_installed(each)
    return wanted


def logging_dir(args: TrainingArguments) -> str:
    """Return the folder of trackers that write files: `args.logging_dir`, or ``runs/<date>_<host>`` in `output_dir`."""
    given = getattr(args, "logging_dir", None) or os.environ.get("TENSORBOARD_LOGGING_DIR")
    if given:
        return str(Path(given).expanduser())
    now = datetime.datetime.now().strftime("%b%d_%H-%M-%S")
    return os.path.join(args.output_dir, "runs", f"{now}_{socket.gethostname()}")


class TrackerCallback(TrainerCallback, ExportableState):
    """Sends each log to trackers: ``eval_loss`` as ``eval/loss``, ``test_x`` as ``test/x``, all else as ``train/x``.

    The trackers start with the training and finish with it. The ids of their runs are part of the callback's state, so
    a resumed training logs to the same runs.

    Args:
        trackers: Names that `accelerate.tracking` knows, or instances of its `GeneralTracker`.
        logging_dir: The folder for trackers that write files.
        project: The name under which a tracker groups runs.
        run_name: The run's own name.
        options: Other arguments of a tracker's class, by the tracker's name.

    Raises:
        ImportError: If a package is missing.
        ValueError: If there is no tracker of a name.

    >>> TrackerCallback([], logging_dir="runs/one").state()["attributes"]
    {'logging_dir': 'runs/one', 'run_ids': {}}
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        *,
        logging_dir: str = "runs",
        project: str = "huggingface",
        run_name: str | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.names = names(list(trackers))
        self.logging_dir, self.project, self.run_name = logging_dir, project, run_name
        self.options = dict(options or {})
        self.run_ids: dict[str, str] = {}
        self.trackers: list[GeneralTracker] = []

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Start the trackers, or resume their runs; log the arguments to new runs."""
        if not state.is_world_process_zero:
            return
        if state.global_step > 0:
            self._start_all(state)
            return
        self.run_ids = {}  # a training from step 0 is a new run
        self._start_all(state)
        for tracker in self.trackers:
            tracker.store_init_configuration(_configuration(args, model))

    def on_log(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Metrics | None = None,
        **kwargs: Any,
    ) -> None:
        """Send the numbers and texts of a log.

        Outside of a training, such as in an evaluation of a trained model, the run is resumed for this one log.
        """
        if not state.is_world_process_zero:
            return
        between = not self.trackers
        if between:
            self._start_all(state)
        values = {name: value for name, value in rewrite_logs(logs or {}).items() if isinstance(value, _SENT)}
        for tracker in self.trackers:
            tracker.log(values, step=state.global_step)
        if between:
            self.finish()

    def on_train_end(
        self, args: transformers.TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the runs."""
        self.finish()

    def finish(self) -> None:
        """Finish the runs that have started."""
        for tracker in self.trackers:
            tracker.finish()
        self.trackers = []

    def state(self) -> Values:
        """Return the ids of the runs and their folder."""
        named = [name for name in self.names if isinstance(name, str)]
        attributes = {"logging_dir": self.logging_dir, "run_ids": dict(self.run_ids)}
        return {"args": {"trackers": named}, "attributes": attributes}

    def _start_all(self, state: TrainerState) -> None:
        self.finish()
        folder = Path(self.logging_dir, *([state.trial_name] if state.trial_name else []))
        for each in self.names:
            tracker = self._made(each, folder, state.global_step) if isinstance(each, str) else each
            tracker.start()
            self.trackers.append(tracker)
            self._remember(tracker)

    def _made(self, name: str, folder: Path, step: int) -> GeneralTracker:
        """Return a new tracker; if the id of its run is known, it resumes that run."""
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        options = self._options(name, step)
        if name == "tensorboard":  # it joins its two arguments into the folder that it writes to
            return kind(folder.name, str(folder.parent), **options)
        if kind.requires_logging_directory:
            return kind(self.project, str(folder), **options)
        return kind(self.project, **options)

    def _options(self, name: str, step: int) -> Values:
        options: Values = dict(self.options.get(name, {}))
        if self.run_name is not None and name in _RUN_NAME:
            options[_RUN_NAME[name]] = self.run_name
        if name == "tensorboard" and step > 0:
            options["purge_step"] = step + 1  # hides the logs of an interrupted run after its last checkpoint
        if name == "dvclive" and step > 0:
            options["resume"] = True
        if name in self.run_ids:
            argument, _, more = _CONTINUE[name]
            options |= {argument: self.run_ids[name], **more}
        return options

    def _remember(self, tracker: GeneralTracker) -> None:
        name = str(getattr(tracker, "name", ""))
        if name not in _CONTINUE:
            return
        found: Any = getattr(tracker, "tracker", None)
        for part in _CONTINUE[name][1].split("."):
            found = getattr(found, part, None)
        if isinstance(found, str):
            self.run_ids[name] = found


def _project(args: TrainingArguments) -> str:
    return os.environ.get("WANDB_PROJECT") or getattr(args, "project", None) or "huggingface"


def _configuration(args: transformers.TrainingArguments, model: nn.Module | None) -> Values:
    """Return the arguments without secrets, and the numbers and texts of the model's configuration."""
    config = getattr(model, "config", None)
    described: Values = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    model_values = {f"model/{name}": value for name, value in described.items() if isinstance(value, _SENT)}
    return {**model_values, **args.to_sanitized_dict()}


def _check_installed(name: str) -> None:
    if name not in LOGGER_TYPE_TO_CLASS and name not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(sorted({*LOGGER_TYPE_TO_CLASS, *INTEGRATION_TO_CALLBACK}))
        raise ValueError(
            f"`TrainingArguments(report_to={name!r})`: there is no such tracker. There are {known}; register another"
            ' with `accelerate.tracking.register_tracker_class(Mine)`, or write `report_to="none"`.'
        )
    if not _is_built_in(name) or name not in LOGGER_TYPE_TO_CLASS:
        return  # a user's own class, or a callback of transformers, which looks for its package itself
    packages = _PACKAGES.get(name, (name,))
    if not any(importlib.util.find_spec(package) for package in packages):
        raise ImportError(
            f"`TrainingArguments(report_to={name!r})` needs the package {packages[0]}, which is not installed. Run"
            f' `pip install {packages[0]}`, or write `report_to="none"`.',
            name=packages[0],
        )


def _is_built_in(name: str) -> bool:
    return getattr(LOGGER_TYPE_TO_CLASS.get(name), "__module__", "") == GeneralTracker.__module__
