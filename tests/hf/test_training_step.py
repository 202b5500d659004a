"""Overrides that are written for transformers' training step, and the mode and outputs that overrides see."""

import contextlib
import functools
import itertools

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from tests.hf.models import HEADS
from trainfn import Trainer, TrainerCallback, TrainingArguments
from trainfn.hf._step import _manual

ROWS = [{"input_ids": torch.randint(3, 11, (6,), generator=torch.Generator().manual_seed(i)), "labels": i % 3}
        for i in range(16)]  # fmt: skip


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(3, 1)
        nn.init.constant_(self.w.weight, 0.5)

    def forward(self, x=None, labels=None):
        y = self.w(x).squeeze(-1)
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


def points(count=16):
    draw = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(3, generator=draw), "labels": torch.randn((), generator=draw)} for _ in range(count)]


def arguments(folder, **options):
    given = {"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "save_strategy": "no", **options}
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", log_level="error", **given)


class ByArguments(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.args.gradient_accumulation_steps
        loss.backward()
        return loss.detach()


class ByCurrent(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = nn.functional.cross_entropy(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])
        loss = loss / self.current_gradient_accumulation_steps
        loss.backward()
        return loss.detach()


class ByANumber(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch) / 4
        loss.backward()
        return loss.detach()


class ByANumberOfTheHead(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = 0.25 * model(**inputs).loss
        loss.backward()
        return loss.detach()


class Undivided(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs)
        loss.backward()
        return loss.detach()


class TheirOwn(Trainer):
    training_step = transformers.Trainer.training_step


def updated(kind, folder, **options):
    torch.manual_seed(0)
    model = HEADS["bert classes"][0]()
    options = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, **options}
    trainer = kind(model, arguments(folder, **options), train_dataset=ROWS)
    trainer.train()
    return nn.utils.parameters_to_vector(model.parameters()).detach(), trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("kind", [ByArguments, ByCurrent, ByANumber, ByANumberOfTheHead, Undivided, TheirOwn])
def test_a_training_step_may_divide_by_the_accumulation(kind, tmp_path):
    weights, loss = updated(Trainer, tmp_path, per_device_train_batch_size=16)
    own, own_loss = updated(kind, tmp_path, gradient_accumulation_steps=4)
    torch.testing.assert_close(own, weights, rtol=0, atol=1e-6)
    assert own_loss == pytest.approx(loss, rel=1e-6)


class WeightedByArguments(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).loss / 4 + sum(p.square().sum() for p in model.parameters()) / 2
        loss = loss / self.args.gradient_accumulation_steps
        loss.backward()
        return loss.detach()


class WeightedByCurrent(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).loss / 4
        loss = loss / getattr(self, "current_gradient_accumulation_steps", 1)
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("kind", [WeightedByArguments, WeightedByCurrent])
def test_a_weight_of_a_loss_is_not_taken_for_the_accumulation(kind, tmp_path):
    weights, loss = updated(kind, tmp_path, per_device_train_batch_size=16)
    own, own_loss = updated(kind, tmp_path, gradient_accumulation_steps=4)
    torch.testing.assert_close(own, weights, rtol=0, atol=1e-6)
    assert own_loss == pytest.approx(loss, rel=1e-6)


def test_a_division_that_is_only_guessed_is_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(_manual.logger, "warning_once", told.append)
    updated(ByANumber, tmp_path, gradient_accumulation_steps=4)
    assert told and all("which is undone" in text for text in told)
    told.clear()
    updated(ByArguments, tmp_path, gradient_accumulation_steps=4)
    assert not told


@pytest.mark.parametrize("draws", [False, True])
def test_a_trial_of_the_loss_leaves_no_trace(draws, tmp_path):
    class Counting(Trainer):
        calls, seen = 0, None

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.calls += 1
            self.seen = [*(self.seen or []), np.random.rand() if draws else 0.0]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    np.random.seed(0)
    trainer = Counting(
        HEADS["bert classes"][0](), arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2), train_dataset=ROWS
    )
    trainer.train()
    assert np.random.rand() == np.random.RandomState(0).rand()
    assert trainer.calls == len(trainer.seen)
    if not draws:  # a step that finds draws of NumPy calls the loss again, with draws of its own
        assert trainer.calls == 4


def test_a_trial_of_the_loss_adds_nothing_to_a_long_list(tmp_path):
    class Filling(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.losses.append(0.0)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = Filling(HEADS["bert classes"][0](), arguments(tmp_path), eval_dataset=ROWS)
    trainer.losses = [0.0] * 1500
    trainer.evaluate()
    assert len(trainer.losses) == 1500 + 2


def test_substeps_are_those_of_an_overrides_windows(tmp_path):
    class Varied(Trainer):
        asked = 0

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            self.asked += 1
            return list(itertools.islice(epoch_iterator, 1 if self.asked == 1 else 3)), None

    class Counts(TrainerCallback):
        substeps = 0

        def on_substep_end(self, args, state, control, **kwargs):
            self.substeps += 1

    counts = Counts()
    options = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    Varied(HEADS["bert classes"][0](), options, train_dataset=ROWS, callbacks=[counts]).train()
    assert counts.substeps == 0 + 2


def test_a_patch_with_the_methods_own_name_is_called(tmp_path):
    trainer = Trainer(HEADS["bert classes"][0](), arguments(tmp_path, max_steps=2), train_dataset=ROWS)
    calls, own = [], trainer.training_step

    @functools.wraps(own)
    def patched(*given, **options):
        calls.append(given)
        return own(*given, **options)

    trainer.training_step = patched
    trainer.train()
    assert len(calls) == 2


def test_the_numbers_of_micro_batches_are_back_after_a_step(tmp_path):
    trainer = ByArguments(
        HEADS["bert classes"][0](), arguments(tmp_path, gradient_accumulation_steps=4), train_dataset=ROWS
    )
    trainer.train()
    assert (trainer.args.gradient_accumulation_steps, trainer.current_gradient_accumulation_steps) == (4, 4)


def test_logs_of_an_evaluation_see_a_model_in_evaluation_mode(tmp_path):
    seen = []

    class Noting(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(("loss", model.training))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def log(self, logs, start_time=None):
            seen.append(("eval" if "eval_loss" in logs else "train", self.model.training))
            super().log(logs, start_time)

        def evaluate(self, *args, **options):
            metrics = super().evaluate(*args, **options)
            self.log({"eval_loss": 0.0})
            return metrics

    trainer = Noting(
        Linear(), arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1),
        train_dataset=points(), eval_dataset=points(4),
    )  # fmt: skip
    trainer.train()
    a_step = [("loss", True), ("train", True), ("loss", False), ("eval", False), ("eval", False)]
    assert seen == [*a_step, *a_step, ("train", True)]
    assert trainer.model.training  # as it was found


def test_outputs_are_asked_for_where_they_are_needed(tmp_path):
    asked = []

    class Noting(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            asked.append(return_outputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = Noting(Linear(), arguments(tmp_path), train_dataset=points(), eval_dataset=points(4))
    trainer.train()
    trainer.evaluate()
    assert asked == [False, True]


def test_a_callback_may_freeze(tmp_path):
    moved, before = [], []

    class Freeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **rest):
            if state.global_step == 2:
                model.bert.requires_grad_(False)
            before[:] = [model.get_input_embeddings().weight.detach().clone(), model.classifier.weight.detach().clone()]

        def on_step_end(self, args, state, control, model=None, **rest):
            now = model.get_input_embeddings().weight, model.classifier.weight
            moved.append([not torch.equal(a, b) for a, b in zip(before, now, strict=True)])

    Trainer(
        HEADS["bert classes"][0](), arguments(tmp_path, max_steps=4), train_dataset=ROWS, callbacks=[Freeze()]
    ).train()
    assert moved == [[True, True], [True, True], [False, True], [False, True]]


def test_a_context_of_an_override_surrounds_each_loss(tmp_path):
    entered = []

    class Own(Trainer):
        def compute_loss_context_manager(self):
            stack = super().compute_loss_context_manager()
            stack.callback(entered.append, "left")
            return stack

        def autocast_smart_context_manager(self, cache_enabled=True):
            entered.append("asked")
            return contextlib.nullcontext()

    trainer = Own(Linear(), arguments(tmp_path), train_dataset=points(), eval_dataset=points(4))
    trainer.train()
    trainer.evaluate()
    assert entered == ["asked", "left"] * 2
