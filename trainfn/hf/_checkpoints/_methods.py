"""The methods of a Trainer that save and load."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from trainfn.hf._checkpoints import _folders, _parts
from trainfn.hf._run._record import current_run
from trainfn.hf._types import Metrics, TrainerLike, Trial, Values


class Checkpointing:
    """The part of `Trainer` that saves and loads."""

    # --- saving -------------------------------------------------------------------------------------------------------

    def save_model(self: TrainerLike, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, the tokenizer and the arguments, so that ``from_pretrained`` reads them.

        On several ranks all must call it, in callbacks too, because sharded parameters are gathered. Rank 0 writes. An
        override is called for each checkpoint too, with ``_internal_call=True``.
        """
        _folders.save_model(self, output_dir or str(_folders.output_dir(self)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save(self: TrainerLike, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the model's files; the main process calls this, while the model holds its full parameters."""
        _folders.write_model(self, output_dir or str(_folders.output_dir(self)), state_dict)

    def _save_checkpoint(self: TrainerLike, model: nn.Module, trial: Trial | None = None) -> None:
        """Save ``checkpoint-{global_step}``, in the background."""
        if trial is None:
            self.store_flos()
        saving = current_run(self).saving
        folder = saving.save()
        if self.args.push_to_hub:
            saving.wait()
            self._push_from_checkpoint(str(folder))

    def _save_optimizer_and_scheduler(self: TrainerLike, output_dir: str) -> None:
        """Write nothing: the optimizer and the schedule are in the state. An override adds files to the checkpoint."""

    def _save_rng_state(self: TrainerLike, output_dir: str) -> None:
        """Write nothing: the key of all random draws is in the state. An override adds files to the checkpoint."""

    def _get_output_dir(self: TrainerLike, trial: Trial | None) -> str:
        """Return the folder of the run: ``args.output_dir``, or one in it for each trial of a search."""
        return _folders.folder_of(self, trial)

    def _tune_save_checkpoint(self: TrainerLike, checkpoint_dir: str) -> None:
        """Save the model and the trainer's state in ``checkpoint_dir/checkpoint-{global_step}``."""
        _parts.save_for_tune(self, checkpoint_dir)

    def _determine_best_metric(self: TrainerLike, metrics: Metrics, trial: Trial | None) -> bool:
        """Whether these metrics are the best so far; if so, they are noted in ``state``."""
        return _folders.note_best(self, metrics)

    # --- loading ------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self: TrainerLike, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint's weights into the model; a run that resumes calls this first."""
        _parts.load_weights(self, resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self: TrainerLike, checkpoint: str | None) -> None:
        """Take the optimizer's state, and that of the schedule, from the checkpoint that a run resumes from."""
        _parts.load_optimizer(self)

    def _load_rng_state(self: TrainerLike, checkpoint: str | None) -> None:
        """Take the key of all random draws from the checkpoint that a run resumes from."""
        _parts.load_key(self)

    def _load_callback_state(self: TrainerLike) -> None:
        """Restore the callbacks' states of the checkpoint.

        With ``restore_callback_states_from_checkpoint=True`` their arguments are the checkpoint's too. With False, if
        that is written, no state is restored.
        """
        if getattr(self.args, "restores_callbacks", True):
            states, replace = (
                cast("Values", self.state.stateful_callbacks),
                self.args.restore_callback_states_from_checkpoint,
            )
            self.callback_handler.load_states(states, replace=replace)

    def _load_best_model(self: TrainerLike) -> None:
        """Load the weights of the best checkpoint into the model."""
        _folders.load_best(self)
