"""The Trainer's reports: the log history, the metrics of a split on screen and on disk, and the log level."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging as transformers_logging

import trainfn as tfn
from trainfn.hf._types import Metrics, TrainerLike, Values

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments

_package = logging.getLogger("trainfn")


def log(trainer: TrainerLike, logs: Metrics, start_time: float | None = None) -> None:
    """Add an entry to `state.log_history` and show it to the callbacks.

    Args:
        trainer: The Trainer.
        logs: Numbers, `tfn.Mean`s or tensors of one number, by name. ``epoch`` is added to it, and the number of tokens
            if they are counted.
        start_time: The time at which training began, for tokens per second.

    >>> import transformers, types
    >>> trainer = types.SimpleNamespace(
    ...     args=types.SimpleNamespace(include_num_input_tokens_seen="no"), control=None,
    ...     state=transformers.TrainerState(epoch=0.5, global_step=7),
    ...     callback_handler=types.SimpleNamespace(on_log=lambda args, state, control, logs: control))
    >>> log(trainer, {"loss": tfn.Mean(torch.tensor(6.0), torch.tensor(4.0))})
    >>> trainer.state.log_history
    [{'loss': 1.5, 'epoch': 0.5, 'step': 7}]
    """
    state = trainer.state
    if state.epoch is not None:
        logs["epoch"] = state.epoch
    if trainer.args.include_num_input_tokens_seen not in ("no", False):
        logs["num_input_tokens_seen"] = state.num_input_tokens_seen
        if start_time is not None:
            run = trainer._trainfn.run
            seen = state.num_input_tokens_seen - (0 if run is None else run.tokens_before)
            logs.update(speed_metrics("train", start_time, num_tokens=seen))
    plain = {name: _plain(value) for name, value in logs.items()}
    state.log_history.append({**plain, "step": state.global_step})
    trainer.control = trainer.callback_handler.on_log(trainer.args, state, trainer.control, plain)


def _plain(value: Any) -> Any:
    """Return a number, or a list of numbers, for JSON; waits for the device."""
    if isinstance(value, tfn.Mean):
        value = value.value
    if isinstance(value, Tensor | np.ndarray | np.generic):
        listed = value.tolist()
        return listed[0] if isinstance(listed, list) and len(listed) == 1 else listed
    return value


# --- the loss since the last log --------------------------------------------------------------------------------------


RUNNING = frozenset({"num_tokens"})  # counts over the run, which a log does not set to 0


class LossWindow:
    """The metrics of all steps since the last log, added up on the device; nothing waits until `take`.

    ``loss`` and the loss function's own metrics are exact means over the rows of all these steps; ``grad_norm`` and
    ``learning_rate`` are the last step's; ``num_tokens`` is the total of all steps of the run.

    Args:
        nan_inf_filter: Whether to leave steps with a NaN or infinite loss out of the mean
            (`TrainingArguments.logging_nan_inf_filter`). Their number is logged, with a warning, in both cases.

    >>> window = LossWindow()
    >>> for value in (1.0, 2.0, float("inf")):
    ...     window.add({"loss": tfn.Mean(torch.tensor(4 * value), torch.tensor(4.0))})
    >>> with warnings.catch_warnings(action="ignore"):
    ...     window.take(learning_rate=0.1)
    {'loss': 1.5, 'learning_rate': 0.1, 'nonfinite_steps': 1}
    >>> window.loss
    1.5
    """

    def __init__(self, *, nan_inf_filter: bool = True) -> None:
        self.nan_inf_filter = nan_inf_filter
        self.steps = 0
        self._sums: dict[str, tuple[Tensor, ...]] = {}  # total and weight; for the loss, also the number not finite
        self._run = (0.0, 0.0)  # total and weight of the loss until the last `take`
        self._warned = False

    def add(self, metrics: tfn.Metrics) -> None:
        """Add the metrics of one step."""
        self.steps += 1
        for name, mean in metrics.items():
            new = self._counted(mean) if name == "loss" else _wide(mean)
            if name in self._sums and name not in ("grad_norm", "learning_rate"):
                held = (part.to(new[0]) for part in self._sums[name])  # restored sums are on the CPU
                new = tuple(a + b for a, b in zip(held, new, strict=True))
            self._sums[name] = new

    def _counted(self, loss: tfn.Mean) -> tuple[Tensor, ...]:
        total, weight = _wide(loss)
        finite = torch.isfinite(total / weight)
        if self.nan_inf_filter:
            total, weight = (torch.where(finite, part, 0) for part in (total, weight))
        return total, weight, (~finite).to(total.dtype)

    def take(self, *, learning_rate: float | Tensor | None = None) -> dict[str, float]:
        """Return the window's numbers and start a new window; waits for the device once.

        Args:
            learning_rate: The learning rate to log, unless the step's metrics have one.
        """
        numbers = self._numbers()
        means = {name: int(parts[0]) if name in RUNNING else _divide(*parts[:2]) for name, parts in numbers.items()}
        order = [name for name in ("loss", "grad_norm") if name in means]
        logs = {name: means.pop(name) for name in order}
        if learning_rate is not None or "learning_rate" in means:
            logs["learning_rate"] = means.pop("learning_rate", float(learning_rate or 0.0))
        logs |= means
        if "loss" in numbers:
            total, weight, bad = numbers["loss"]
            self._run = self._run[0] + total, self._run[1] + weight
            if bad:
                logs["nonfinite_steps"] = int(bad)
                self._warn(int(bad))
        self.steps, self._sums = 0, {name: parts for name, parts in self._sums.items() if name in RUNNING}
        return logs

    def newest(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return the sum of the mean losses of the steps since the last log, as transformers keeps it, and the norm."""
        total, weight = self._sums.get("loss", (torch.zeros(()), torch.ones(())))[:2]
        norm = self._sums.get("grad_norm")
        return (total / weight * self.steps).to(device), None if norm is None else norm[0] / norm[1]

    @property
    def loss(self) -> float:
        """The mean loss of all steps so far, the ``train_loss`` of a run; waits for the device."""
        total, weight, *_ = self._numbers().get("loss", (0.0, 0.0))
        return _divide(self._run[0] + total, self._run[1] + weight)

    def _warn(self, bad: int) -> None:
        if self._warned:
            return
        self._warned = True
        done = "are left out of the logged loss" if self.nan_inf_filter else "make the logged loss NaN or infinite"
        warnings.warn(
            f"The loss of {bad} of the last {self.steps} steps was NaN or infinite; these steps {done} and are counted"
            ' as "nonfinite_steps". Lower the learning rate, or clip the gradient (`max_grad_norm=1.0`).',
            tfn.errors.NonFiniteWarning,
            stacklevel=3,
        )

    def _numbers(self) -> dict[str, list[float]]:
        sizes = {name: len(parts) for name, parts in self._sums.items()}
        if not sizes:
            return {}
        parts = [part for parts in self._sums.values() for part in parts]
        flat = iter(torch.stack([part.to(parts[-1]) for part in parts]).tolist())
        return {name: [next(flat) for _ in range(size)] for name, size in sizes.items()}

    def state_dict(self) -> Values:
        """Return the window's sums for JSON, so that a resumed run logs the same as an unbroken one.

        Waits for the device.
        """
        return {"sums": self._numbers(), "steps": self.steps, "run": list(self._run), "warned": self._warned}

    def load_state_dict(self, state: Values) -> None:
        """Restore the sums that `state_dict` returned."""
        self._sums = {name: tuple(torch.tensor(parts, dtype=torch.float64)) for name, parts in state["sums"].items()}
        self.steps, self._run, self._warned = state["steps"], (state["run"][0], state["run"][1]), state["warned"]


def _wide(mean: tfn.Mean) -> tuple[Tensor, Tensor]:
    """Return the total and the weight, each one number of float64."""
    total, weight = mean.wide()
    return total.sum(), weight.sum()


def _divide(total: float, weight: float) -> float:
    return total / weight if weight else math.nan


# --- metrics of a split -----------------------------------------------------------------------------------------------


def metrics_format(metrics: Metrics) -> Metrics:
    """Return metrics as text for people: times as h:mm:ss, memory in MB, operations in GF, 4 decimals.

    >>> metrics_format({"train_runtime": 61.257, "total_flos": 5 << 30, "eval_loss": 0.123456, "loss": 1})
    {'train_runtime': '0:01:01.25', 'total_flos': '5GF', 'eval_loss': 0.1235, 'loss': 1}
    """
    return {name: _shown(name, value) for name, value in metrics.items()}


def _shown(name: str, value: Any) -> object:
    if "_mem_" in name and isinstance(value, int):
        return f"{value >> 20}MB"
    if "_runtime" in name:
        seconds = int(value)
        return f"{datetime.timedelta(seconds=seconds)}.{int(abs(value - seconds) * 100):02d}"
    if name == "total_flos":
        return f"{int(value) >> 30}GF"
    return round(value, 4) if isinstance(value, float) else value


def log_metrics(trainer: TrainerLike, split: str, metrics: Metrics) -> None:
    """Print the metrics of a split, aligned, on the main process only.

    Args:
        trainer: The Trainer.
        split: ``"train"``, ``"eval"``, ``"test"`` or another name.
        metrics: The metrics that `train`, `evaluate` or `predict` returned.

    >>> import types
    >>> log_metrics(types.SimpleNamespace(is_world_process_zero=lambda: True), "eval", {"loss": 0.5, "accuracy": 1.0})
    ***** eval metrics *****
      accuracy = 1.0
      loss     = 0.5
    """
    if not trainer.is_world_process_zero():
        return
    shown = metrics_format(metrics)
    names, values = (max((len(str(x)) for x in each), default=0) for each in (shown, shown.values()))
    print(f"***** {split} metrics *****")
    for name in sorted(shown):
        print(f"  {name: <{names}} = {shown[name]!s:>{values}}")


def save_metrics(trainer: TrainerLike, split: str, metrics: Metrics, combined: bool = True) -> None:
    """Write the metrics to ``{split}_results.json`` in `output_dir`, on the main process only.

    Args:
        trainer: The Trainer.
        split: ``"train"``, ``"eval"``, ``"test"`` or another name.
        metrics: The metrics that `train`, `evaluate` or `predict` returned.
        combined: Whether to also update ``all_results.json`` with them.

    >>> import tempfile, types
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = types.SimpleNamespace(output_dir=folder)
    ...     trainer = types.SimpleNamespace(is_world_process_zero=lambda: True, args=args)
    ...     save_metrics(trainer, "eval", {"eval_loss": 0.5})
    ...     sorted(os.listdir(folder))
    ['all_results.json', 'eval_results.json']
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    plain = {name: _plain(value) for name, value in metrics.items()}
    _write(folder / f"{split}_results.json", plain)
    if combined:
        everything = folder / "all_results.json"
        before = json.loads(everything.read_text(encoding="utf-8")) if everything.exists() else {}
        _write(everything, {**before, **plain})


def _write(path: Path, metrics: Metrics) -> None:
    """Replace a file by a rename, so that neither a reader nor a kill leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"_{path.name}.{os.getpid()}")  # pushes to the Hub leave out names that begin with "_"
    beside.write_text(json.dumps(metrics, indent=4, sort_keys=True), encoding="utf-8")
    beside.replace(path)


def save_state(trainer: TrainerLike) -> None:
    """Write ``trainer_state.json`` to `output_dir`, on the main process only.

    >>> import tempfile, transformers, types
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_state(types.SimpleNamespace(is_world_process_zero=lambda: True, state=transformers.TrainerState(),
    ...         args=types.SimpleNamespace(output_dir=folder)))
    ...     os.listdir(folder)
    ['trainer_state.json']
    """
    if trainer.is_world_process_zero():
        Path(trainer.args.output_dir).mkdir(parents=True, exist_ok=True)
        trainer.state.save_to_json(os.path.join(trainer.args.output_dir, "trainer_state.json"))


# --- the log level ----------------------------------------------------------------------------------------------------


class _WhereNobodyListens(logging.StreamHandler[TextIO]):
    """Writes to stderr until the program sets up its own logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.stream = sys.stderr  # looked up for each record: notebooks and tests replace it
            super().emit(record)


def set_verbosity(args: TrainingArguments) -> int:
    """Set the level of this package's and of transformers' loggers to that of this process; return it.

    The root logger and its handlers belong to the program and stay as they are. With ``"passive"``, the level of
    transformers stays as it is, and that of `trainfn` in the main process is ``INFO``.

    Args:
        args: The `TrainingArguments`: `log_level`, `log_level_replica`, `log_on_each_node`.

    >>> import types
    >>> before = transformers_logging.get_verbosity()
    >>> args = types.SimpleNamespace(log_level="error", should_log=True, get_process_log_level=lambda: 40)
    >>> set_verbosity(args), logging.getLogger("trainfn").level
    (40, 40)
    >>> transformers_logging.set_verbosity(before)
    """
    level = int(args.get_process_log_level())
    transformers_logging.set_verbosity(level)
    _package.setLevel(logging.INFO if args.log_level == "passive" and args.should_log else level)
    if not any(isinstance(handler, _WhereNobodyListens) for handler in _package.handlers):
        _package.addHandler(_WhereNobodyListens())
    return level
