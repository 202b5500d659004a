"""The methods of a Trainer that report: callbacks, logs, files of metrics, the Hub."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from huggingface_hub import CommitInfo
from transformers import TrainerCallback

from trainfn.hf._reporting import _hub, _logs
from trainfn.hf._reporting._trackers import TrackerCallback
from trainfn.hf._types import Callback, Metrics, TrainerLike


class Reporting:
    """The part of `Trainer` that reports."""

    def log(self: TrainerLike, logs: Metrics, start_time: float | None = None) -> None:
        """Add a dict of numbers to the history, and show it to the callbacks."""
        _logs.log(self, logs, start_time)

    def log_metrics(self: TrainerLike, split: str, metrics: Metrics) -> None:
        """Print metrics, aligned."""
        _logs.log_metrics(self, split, metrics)

    def save_metrics(self: TrainerLike, split: str, metrics: Metrics, combined: bool = True) -> None:
        """Write metrics to ``{split}_results.json``, and to ``all_results.json``."""
        _logs.save_metrics(self, split, metrics, combined)

    def metrics_format(self, metrics: Metrics) -> Metrics:
        """Return metrics as text for people."""
        return _logs.metrics_format(metrics)

    def save_state(self: TrainerLike) -> None:
        """Write ``trainer_state.json``."""
        _logs.save_state(self)

    def add_callback(self: TrainerLike, callback: Callback) -> None:
        """Add a callback, a class or an instance."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self: TrainerLike, callback: Callback) -> TrainerCallback | None:
        """Remove a callback and return it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self: TrainerLike, callback: Callback) -> None:
        """Remove a callback."""
        self.callback_handler.remove_callback(callback)

    def push_to_hub(
        self: TrainerLike, commit_message: str = "End of training", blocking: bool = True, **options: Any
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the model and upload it, with a model card."""
        return _hub.push_to_hub(self, commit_message, blocking, **options)

    def end(self: TrainerLike) -> None:
        """Finish the trackers' runs, and wait for uploads."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrackerCallback):
                callback.finish()
        if self.args.push_to_hub:
            self._finish_current_push()

    def init_hf_repo(self: TrainerLike, token: str | None = None, private: bool | None = None) -> None:
        """Make the model's repository on the Hub, unless it exists."""
        _hub.init_repo(self, token, private)

    def _push_from_checkpoint(self: TrainerLike, checkpoint_folder: str) -> None:
        """Upload in the background what ``hub_strategy`` asks for, after a checkpoint."""
        _hub.push_from_checkpoint(self, checkpoint_folder)

    def _finish_current_push(self: TrainerLike) -> None:
        """Wait for uploads, and repeat those that failed."""
        _hub.finish(self)

    def create_model_card(self: TrainerLike, **options: Any) -> None:
        """Write a model card, ``README.md``, to the output folder."""
        _hub.create_model_card(self, **options)

    def is_world_process_zero(self: TrainerLike) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.args.process_index == 0

    def is_local_process_zero(self: TrainerLike) -> bool:
        """Whether this process is the first on its machine."""
        return self.args.local_process_index == 0
