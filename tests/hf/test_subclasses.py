"""A subclass may keep whatever it likes under private names of its own."""

import inspect
import re

import pytest
import torch
import transformers

import trainfn.hf
from tests.hf.models import gpt2, tokens
from trainfn import Trainer, TrainingArguments
from trainfn.hf import _names

# Names that a run needs in one form or another, those of trl's trainers, and some that everybody chooses.
TAKEN_ELSEWHERE = (
    *("_step", "_run", "_losses", "_device", "_ranks", "_counted", "_began", "_changes", "_trial", "_held", "_saving"),
    *("_fresh", "_event", "_rates", "_transform", "_shifts", "_released", "_objective", "_ignore_keys", "_new_model"),
    *("_terminated", "_interrupted", "_controller_state", "_manual_mean", "_hp_name", "_given_optimizers", "_windows"),
    *("_latest_metrics", "_restored_losses", "_train_dataloader", "_parameter_count", "_state_dict", "_output_dir"),
    *("_end_epoch", "_eval_model", "_loss_metrics", "_metrics", "_buffered_inputs", "_textual_logs", "_record"),
)


def arguments(folder, **options):
    return TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", log_level="error", max_steps=2,
        per_device_train_batch_size=2, logging_steps=1, **options,
    )  # fmt: skip


class Counting(Trainer):
    """Counts its micro-batches under every one of these names, before and after the Trainer is made."""

    def __init__(self, *args, **options):
        for name in TAKEN_ELSEWHERE:
            setattr(self, name, "before")
        super().__init__(*args, **options)
        assert {getattr(self, name) for name in TAKEN_ELSEWHERE} == {"before"}
        for name in TAKEN_ELSEWHERE:
            setattr(self, name, 0)

    def training_step(self, model, inputs, num_items_in_batch=None):
        for name in TAKEN_ELSEWHERE:
            setattr(self, name, getattr(self, name) + 1)
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_subclass_has_private_names_of_its_own(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    plain, own = (
        kind(gpt2(), arguments(tmp_path / kind.__name__, **options), train_dataset=tokens(8), eval_dataset=tokens(4))
        for kind in (Trainer, Counting)
    )
    plain.train()
    own.train()
    assert {name: getattr(own, name) for name in TAKEN_ELSEWHERE} == dict.fromkeys(TAKEN_ELSEWHERE, 2)
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (plain, own)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # one step is compiled whole, the other in parts
    own.train(resume_from_checkpoint=str(tmp_path / "Counting" / "checkpoint-1"))
    assert own._step == 3


def private(names):
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_an_instance_has_one_private_name_of_ours(tmp_path):
    during = []

    class Noting(Trainer):
        def log(self, logs, start_time=None):
            during.append(private(vars(self)))
            super().log(logs, start_time)

    trainer = Noting(gpt2(), arguments(tmp_path), train_dataset=tokens(8))
    before = private(vars(trainer))
    trainer.train()
    assert len(during) == 3
    theirs = set(re.findall(r"self\.(_\w+)", inspect.getsource(transformers.Trainer)))
    for names in (before, *during, private(vars(trainer))):
        assert names - theirs == {"_trainfn"}


@pytest.mark.parametrize("kind", ["Trainer", "Seq2SeqTrainer", "SFTTrainer"])
def test_private_methods_are_those_of_transformers(kind):
    ours, theirs = getattr(trainfn.hf, kind), private(dir(getattr(transformers, kind, transformers.Trainer)))
    assert {name for name in private(dir(ours)) - theirs if _names.exists(ours, name)} == {"_steps_read"}


def test_a_method_that_needs_a_run_says_so(tmp_path):
    trainer = Trainer(gpt2(), arguments(tmp_path), train_dataset=tokens(8))
    for _ in range(2):  # before a run, and after one
        with pytest.raises(RuntimeError, match=r"Trainer: this method needs a run.*`trainer.save_model\(folder\)`"):
            trainer._save_checkpoint(trainer.model)
        trainer.train()


def test_an_override_may_set_optimizer_and_schedule_by_itself(tmp_path):
    class Own(Trainer):
        def create_optimizer_and_scheduler(self, num_training_steps):
            self.optimizer = torch.optim.SGD(self.model.parameters(), 0.5)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.5**step)

    trainer = Own(gpt2(), arguments(tmp_path), train_dataset=tokens(8))
    trainer.train()
    assert [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log] == [0.5, 0.25]
