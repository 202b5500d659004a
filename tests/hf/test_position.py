"""A run that goes on with other batches: after the same rows, and it says what differs."""

import contextlib
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

import trainfn as tfn
from tests.hf.models import gpt2, tokens
from trainfn import Trainer, TrainingArguments
from trainfn.hf._parallel._sharding import Dealt
from trainfn.hf._parallel._world import ALONE, World
from trainfn.hf._run._position import go_to, position, rows_of
from trainfn.hf._run._record import Record

ROWS = 12


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.WARNING, "trainfn")


@contextlib.contextmanager
def heard_by(name, caplog):
    """Hear a logger that does not pass its messages on."""
    logging.getLogger(name).addHandler(caplog.handler)
    try:
        yield
    finally:
        logging.getLogger(name).removeHandler(caplog.handler)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        return {"should_training_stop": state.global_step == self.step}


class Noting(Trainer):
    """Notes the rows that it is going to train on."""

    rows = tokens(ROWS)

    def _prepare_inputs(self, inputs):
        known = {tuple(row["input_ids"].tolist()): i for i, row in enumerate(self.rows)}
        assert len(known) == ROWS
        self.noted = [*getattr(self, "noted", []), *(known[tuple(row)] for row in inputs["input_ids"].tolist())]
        return super()._prepare_inputs(inputs)


class OwnLoader(Noting):
    def get_train_dataloader(self):
        size = self.args.per_device_train_batch_size
        return torch.utils.data.DataLoader(self.rows, size, shuffle=True, collate_fn=self.data_collator)


def trainer(kind, folder, size, accumulate, stop=None, **options):
    args = TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", log_level="warning", logging_strategy="no",
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, optim="sgd", **options,
    )  # fmt: skip
    return kind(gpt2(), args, train_dataset=kind.rows, callbacks=[Stop(stop)])


def gone_on(kind, folder, then, now, stop, **options):
    """The rows of the first epoch, of a run that was stopped and goes on in other batches: before that and after."""
    first = trainer(kind, folder, *then, stop, save_strategy="steps", save_steps=stop, **options)
    first.train()
    again = trainer(kind, folder, *now, save_strategy="no", **options)
    again.train(resume_from_checkpoint=True)
    return first.noted, again.noted[: ROWS - len(first.noted)]


@pytest.mark.parametrize("kind", [Noting, OwnLoader])
@pytest.mark.parametrize(
    ("then", "now", "stop", "told"),
    [
        ((4, 1), (2, 1), 1, r"write `per_device_train_batch_size=4`\."),
        ((2, 1), (4, 1), 2, r"an update has 4 rows .*\(4 x gradient_accumulation_steps=1\), and had 2 \(2 x 1\)"),
        ((2, 2), (4, 1), 2, None),
        ((2, 1), (2, 2), 2, r"an epoch has 3 updates, and had 6; .* has 9 updates, of which 2 are done; .*=1`\."),
        ((6, 1), (3, 1), 2, r"write `per_device_train_batch_size=6`"),
        ((6, 2), (2, 2), 1, r"write `per_device_train_batch_size=6`\."),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_no_row_comes_twice_or_is_left_out(kind, then, now, stop, told, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        before, after = gone_on(kind, tmp_path, then, now, stop)
    assert sorted(before + after) == list(range(ROWS))
    warned = [record.message for record in caplog.records if "resume_from_checkpoint" in record.message]
    assert len(warned) == (told is not None)
    assert told is None or re.search(told, warned[0]), warned


def test_rows_that_updates_do_not_divide_are_seen_again(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        before, after = gone_on(Noting, tmp_path, (3, 1), (2, 1), 1)
    assert set(before[:3]) & set(after) == {before[2]}
    assert "does not divide the 3 rows of this epoch that the checkpoint had seen; the last 1 of them" in caplog.text


def test_rows_in_groups_come_in_another_order(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        gone_on(Noting, tmp_path, (4, 1), (2, 1), 1, train_sampling_strategy="group_by_length")
    assert "grouped in another way; some of this epoch are seen again, and others not at all" in caplog.text


def place(size, accumulate, of, world=ALONE, loader=None):
    """Where a run stands, of so many rows a micro-batch and micro-batches an epoch."""
    config = SimpleNamespace(accelerator_config=SimpleNamespace(split_batches=False))
    who = SimpleNamespace(_trainfn=Record(world=world), args=config, state=SimpleNamespace(global_step=3))
    length = SimpleNamespace(
        micro_per_epoch=of, accumulate=accumulate, updates_per_epoch=-(-of // accumulate), max_steps=9
    )
    loader = loader if loader is not None else SimpleNamespace(batch_size=size)
    return SimpleNamespace(trainer=who, length=length, loader=loader, epoch=0, window=0, micro_done=0)


def test_an_epoch_that_was_done_is_done():
    windows = place(2, 1, 6)
    go_to(windows, {"epoch": 1, "micro": 2, "of": 2, "rows": 5, "accumulate": 1}, skip=True)
    assert (windows.epoch, windows.window) == (1, 6)


def test_checkpoints_without_sizes_and_skipping_nothing(caplog):
    windows = place(2, 2, 6)
    go_to(windows, {"epoch": 1, "micro": 4}, skip=True)
    assert (windows.epoch, windows.window) == (1, 2)
    go_to(windows, {"epoch": 1, "micro": 6}, skip=True)
    assert windows.window == 3
    windows = place(2, 2, 6)
    go_to(windows, {"epoch": 1, "micro": 4}, skip=False)
    assert (windows.epoch, windows.window) == (1, 0)
    assert not caplog.records


class Two(tfn.launch.Ranks):
    size = 2


class Second(Two):
    rank = 1


def test_what_two_ranks_write_for_the_batch_of_one(caplog):
    two = World(plan=tfn.Plan.replicated(), ranks=Two())
    then = position(place(6, 1, 2))
    go_to(place(2, 1, 6, two), {**then, "micro": 1}, skip=True)
    assert "for the same run, write `per_device_train_batch_size=3`." in caplog.text
    caplog.clear()
    go_to(place(2, 1, 6, two), {**then, "micro": 1, "rows": 5}, skip=True)
    assert "for the same run, write a number of processes that divides 5." in caplog.text
    caplog.clear()
    go_to(place(2, 1, 6, World(plan=tfn.Plan.replicated(), ranks=Second())), {**then, "micro": 1}, skip=True)
    assert not caplog.records  # rank 0 tells


def test_other_intervals_than_the_checkpoints_are_told(tmp_path, caplog):
    trainer(Noting, tmp_path, 2, 1, 2, save_strategy="steps", save_steps=2).train()
    again = trainer(Noting, tmp_path, 2, 1, 4, save_strategy="steps", save_steps=4)
    with heard_by("transformers", caplog):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "save_steps: 4 (from args) != 2" in caplog.text
    assert "per_device_train_batch_size" not in caplog.text
    assert again.state.save_steps == 4

    caplog.clear()
    with heard_by("transformers", caplog):
        trainer(Noting, tmp_path, 2, 1, 6, save_strategy="steps", save_steps=4).train(resume_from_checkpoint=True)
    assert "from args" not in caplog.text


def test_rows_of_somebody_elses_loader():
    two, rows = World(plan=tfn.Plan.replicated(), ranks=Two()), [0] * 9
    assert rows_of(place(0, 1, 1, loader=Dealt(two, torch.utils.data.DataLoader(rows, 3)))) == 6
    sampler = torch.utils.data.BatchSampler(range(9), 3, drop_last=False)
    assert rows_of(place(0, 1, 1, loader=torch.utils.data.DataLoader(rows, batch_sampler=sampler))) == 3
    assert rows_of(place(0, 1, 1, loader=Dealt(two, rows))) == 2  # batches


class Growing(torch.nn.Module):
    """Keeps the first number of each row that it is trained on, in a buffer that grows."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.register_buffer("seen", torch.empty(0))

    def forward(self, x, labels=None):
        out = self.linear(x).squeeze(-1)
        if self.training:
            self.seen = torch.cat([self.seen, x[:, 0].detach()])
        return {"loss": (out - labels).square().mean(), "logits": out}


def test_a_buffer_that_grows_is_in_the_model_in_checkpoints_and_in_a_resumed_run(tmp_path):
    rows = [{"x": torch.full((2,), float(i)), "labels": torch.tensor(1.0)} for i in range(8)]
    args = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, report_to="none", use_cpu=True, disable_tqdm=True, log_level="error",
        train_sampling_strategy="sequential", learning_rate=1e-3,
    )  # fmt: skip
    whole, resumed = Growing(), Growing()
    Trainer(whole, args, train_dataset=rows, eval_dataset=rows).train()
    assert whole.seen.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    Trainer(resumed, args, train_dataset=rows, eval_dataset=rows).train(str(tmp_path / "checkpoint-4"))
    assert torch.equal(resumed.seen, whole.seen) and torch.equal(resumed.linear.weight, whole.linear.weight)
    loaded = Growing()
    trainer = Trainer(loaded, args, train_dataset=rows)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert loaded.seen.tolist() == [0, 1, 2, 3]
