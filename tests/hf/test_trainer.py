"""The Trainer trains as it says: the same for every split, as a loop written by hand, and on after any stop."""

import logging
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.optimization import Adafactor, AdafactorSchedule

import trainfn as tfn
from tests.helpers import assert_close, assert_identical
from tests.hf.models import HEADS, gpt2, llama, mixtral, seeded, tokens
from trainfn.hf import Trainer, TrainerCallback, TrainingArguments
from trainfn.hf._installed import attribute
from trainfn.hf._step._additive import SplitDependentLossWarning

pytestmark = pytest.mark.usefixtures("untouched_rng")
QUIET = {
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
    "lr_scheduler_type": "constant",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
}


def arguments(folder, **options):
    return TrainingArguments(str(folder), **{**QUIET, **options})


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(folder, model, data, kind=Trainer, **options):
    trainer = kind(model, arguments(folder, **options), train_dataset=data)
    trainer.train()
    return trainer


def trained_with(model, folder, data, *, optimizers, **options):
    trainer = Trainer(model, arguments(folder, **options), train_dataset=data, optimizers=optimizers)
    trainer.train()
    return trainer


def theirs(model, folder, data, **options):
    """transformers' own Trainer, which seeds the global generators."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    made, others = options.pop("optimizers", (None, None)), {**QUIET, **options}
    arguments = transformers.TrainingArguments(str(folder), **others)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=made)
    trainer.train()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    return trainer


SGD = {"optim": "sgd", "num_train_epochs": 1, "train_sampling_strategy": "sequential"}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("size", "accumulate"), [(1, 12), (3, 4), (4, 3), (5, 3)])
def test_every_split_gives_the_update_of_the_whole_batch(head, size, accumulate, tmp_path):
    make, data = HEADS[head]
    whole = trained(tmp_path, make(), data(), per_device_train_batch_size=12, **SGD)
    split = trained(
        tmp_path, make(), data(), per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, **SGD
    )
    assert whole.state.global_step == split.state.global_step == 1
    assert_close(parameters(split.model), parameters(whole.model), 2e-6)


@pytest.mark.parametrize("head", HEADS)
def test_the_update_is_that_of_a_loop_written_by_hand(head, tmp_path):
    make, data = HEADS[head]
    model, rows = make(), data()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    twin = make().train()
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        twin(**batch).loss.backward()
        optimizer.step()
    trained(tmp_path, model, rows, per_device_train_batch_size=12, **{**SGD, "num_train_epochs": 3})
    assert_close(parameters(model), parameters(twin), 2e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_twenty_steps_are_those_of_transformers_where_theirs_are_right(accumulate, tmp_path):
    """A causal language model whose head counts its labels."""
    options = {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": accumulate, "max_steps": 20,
        "train_sampling_strategy": "sequential", "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
        "warmup_steps": 4, "weight_decay": 0.1, "max_grad_norm": 1.0, "logging_strategy": "steps", "logging_steps": 1,
    }  # fmt: skip
    data = tokens(24)
    ours = trained(tmp_path, llama(), data, **options)
    reference = theirs(llama(), tmp_path, data, **options)
    assert_close(parameters(ours.model), parameters(reference.model), 1e-6)
    for mine, other in zip(ours.state.log_history[:-1], reference.state.log_history[:-1], strict=True):
        assert mine.keys() == other.keys()
        for name in ("loss", "grad_norm", "learning_rate", "epoch", "step"):
            assert mine[name] == pytest.approx(other[name], rel=2e-5), name


# --- resume -------------------------------------------------------------------------------------------------------


def run(folder, until=None, resume=None, callbacks=(), **options):
    options = {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 3,
        "save_strategy": "steps", "save_steps": 1, "logging_strategy": "steps", "logging_steps": 2,
        "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", **options,
    }  # fmt: skip
    trainer = Trainer(
        gpt2(0.2), arguments(folder, **options), train_dataset=tokens(14), callbacks=[StopAt(until), *callbacks]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        return {"should_training_stop": state.global_step == self.step}


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_a_run_that_stops_anywhere_resumes_bit_for_bit(strategy, tmp_path):
    """With dropout, in the middle of epochs and at their ends, with windows of unequal size."""
    whole = run(tmp_path / "whole", train_sampling_strategy=strategy)
    assert whole.state.global_step == 9  # 5 micro-batches an epoch: windows of 2, 2 and 1
    for stop in range(1, 9):
        folder = tmp_path / str(stop)
        run(folder, stop, train_sampling_strategy=strategy)
        again = run(folder, resume=True, train_sampling_strategy=strategy)
        assert_identical(again.train_state, whole.train_state)
        assert_identical(parameters(again.model), parameters(whole.model))
        mine, other = ([{**log, "train_runtime": 0} for log in t.state.log_history] for t in (again, whole))
        for a, b in zip(mine[:-1], other[:-1], strict=True):
            assert a == b


def test_resuming_a_finished_run_does_nothing(tmp_path):
    done = run(tmp_path)
    again = run(tmp_path, resume=True)
    assert again.state.global_step == done.state.global_step == 9
    assert_identical(again.train_state, done.train_state)
    assert not (tmp_path / "checkpoint-10").exists()


def test_an_older_checkpoint_can_be_resumed_from_and_the_later_ones_are_kept_aside(tmp_path):
    whole = run(tmp_path)
    again = run(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert_identical(again.train_state, whole.train_state)
    assert sorted(p.name for p in (tmp_path / "superseded").iterdir()) == [f"checkpoint-{n}" for n in range(5, 10)]
    assert (tmp_path / "checkpoint-9").is_dir()


def test_a_checkpoint_is_what_transformers_reads(tmp_path):
    trainer = run(tmp_path)
    folder = tmp_path / "checkpoint-9"
    state = transformers.TrainerState.load_from_json(str(folder / "trainer_state.json"))
    assert state.global_step == 9 and state.max_steps == 9 and state.epoch == 3.0
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert_identical(parameters(model), parameters(trainer.model))


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_checkpoint_of_transformers_is_resumed_from(optim, tmp_path):
    """Moments included: they are read as tensors, not unpickled."""
    options = {"per_device_train_batch_size": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
               "optim": optim, "train_sampling_strategy": "sequential", "weight_decay": 0.1, "learning_rate": 1e-2,
               "lr_scheduler_type": "linear"}  # fmt: skip
    data = tokens(16)
    reference = theirs(llama(), tmp_path, data, **options)
    trainer = Trainer(llama(), arguments(tmp_path, **options), train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert_close(parameters(trainer.model), parameters(reference.model), 1e-6)


@pytest.mark.parametrize(
    ("asked", "match"),
    [(True, r"no valid checkpoint found in output directory"), ("nowhere", r"there is no such folder")],
)
def test_there_must_be_something_to_go_on_from(asked, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, resume=asked)


# --- the best -----------------------------------------------------------------------------------------------------


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    values = iter([3.0, 1.0, 2.0])
    trainer = Trainer(
        gpt2(), arguments(tmp_path, num_train_epochs=3, eval_strategy="epoch", save_strategy="epoch",
                          save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="mine",
                          greater_is_better=False),
        train_dataset=tokens(), eval_dataset=tokens(4), compute_metrics=lambda _: {"mine": next(values)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == 1.0 and trainer.state.best_global_step == 4
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    best = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-4")
    assert_identical(parameters(trainer.model), parameters(best))


# --- overrides ----------------------------------------------------------------------------------------------------

WEIGHTS = torch.tensor([1.0, 2.0, 3.0])


class OldSignature(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.get("logits")
        loss = nn.CrossEntropyLoss()(logits.view(-1, self.model.config.num_labels), labels.view(-1))
        return (loss, outputs) if return_outputs else loss


class NewSignature(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class Exact(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = tfn.losses.cross_entropy(outputs.logits, labels, class_weights=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


class OwnStep(Trainer):
    """Keeps a list in Python, as many do."""

    losses = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses = [*(self.losses or []), float(loss)]
        return loss


class OwnBackward(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("kind", [OldSignature, NewSignature, Exact, OwnStep, OwnBackward])
def test_overrides_are_called_and_split_exactly(kind, tmp_path):
    make, data = HEADS["bert classes"]
    whole = trained(tmp_path, make(), data(), kind, per_device_train_batch_size=12, **SGD)
    split = trained(tmp_path, make(), data(), kind, per_device_train_batch_size=5, gradient_accumulation_steps=3, **SGD)
    assert_close(parameters(split.model), parameters(whole.model), 2e-6)
    reference = trained(tmp_path, make(), data(), per_device_train_batch_size=12, **SGD)
    same = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole.model.parameters(), reference.model.parameters()))  # noqa: B905
    assert same == (kind is not Exact)
    if kind is OwnStep:
        assert len(split.losses) == 3


def decay(model):
    return 0.1 * sum(p.square().sum() for p in model.parameters())


class AddsBackward(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        decay(model).backward()
        return loss


class AddsBackwardBefore(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        decay(model).backward()
        return super().training_step(model, inputs, num_items_in_batch)


class AddsToTheLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False):
        return model(**inputs).loss + decay(model)


@pytest.mark.parametrize("kind", [AddsBackward, AddsBackwardBefore])
@pytest.mark.parametrize("head", ["bert classes", "gpt2"])
@pytest.mark.parametrize(("size", "accumulate"), [(12, 1), (5, 3)])
def test_a_backward_pass_beside_that_of_the_step_is_of_a_mean_too(kind, head, size, accumulate, tmp_path):
    make, data = HEADS[head]
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, **SGD}
    beside = trained(tmp_path, make(), data(), kind, **options)
    within = trained(tmp_path, make(), data(), AddsToTheLoss, per_device_train_batch_size=12, **SGD)
    assert_close(parameters(beside.model), parameters(within.model), 2e-6)


class Weighted(Trainer):
    """The spec's own: a weighted mean, whose weights only it knows."""

    def compute_loss(self, model, inputs, return_outputs=False):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.CrossEntropyLoss(weight=WEIGHTS)(outputs.get("logits"), labels)
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_depends_on_the_split_is_reported(tmp_path):
    make, data = HEADS["bert classes"]
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, **SGD}
    model = make()
    with torch.no_grad():
        model.classifier.weight.mul_(500)  # rows of unequal losses
    with pytest.warns(SplitDependentLossWarning, match=r"together is not the mean of .*tfn\.Mean\.of\(values, weights"):
        trained(tmp_path, model, data(), Weighted, **options)
    with pytest.warns(SplitDependentLossWarning, match="mixture of experts"):
        trained(tmp_path, mixtral(), tokens(), **options)


def test_a_loss_function_of_ones_own(tmp_path):
    def summed(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    make, data = HEADS["bert classes"]
    results = []
    for size, accumulate in ((12, 1), (5, 3)):
        options = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, **SGD)
        trainer = Trainer(make(), options, train_dataset=data(), compute_loss_func=summed)
        trainer.train()
        results.append(parameters(trainer.model))
    reference = trained(tmp_path, make(), data(), per_device_train_batch_size=12, **SGD)
    assert_close(results[1], results[0], 2e-6)
    assert_close(results[0], parameters(reference.model), 2e-6)


def test_label_smoothing_splits_exactly(tmp_path):
    for head in ("bert classes", "llama", "t5"):
        make, data = HEADS[head]
        options = {**SGD, "label_smoothing_factor": 0.1}
        whole = trained(tmp_path, make(), data(), per_device_train_batch_size=12, **options)
        split = trained(
            tmp_path, make(), data(), per_device_train_batch_size=5, gradient_accumulation_steps=3, **options
        )
        assert_close(parameters(split.model), parameters(whole.model), 2e-6)


def test_a_misspelt_override_is_reported():
    with pytest.warns(UserWarning, match=r"Custom\.compute_losss is never called\. Did you mean .*`compute_loss`"):

        class Custom(Trainer):
            def compute_losss(self, model, inputs):
                pass


def test_every_hook_is_called(tmp_path):
    called = set()

    def watched(name):
        def method(self, *args, **kwargs):
            called.add(name)
            return getattr(super(Watched, self), name)(*args, **kwargs)

        return method

    names = [
        "get_train_dataloader", "get_eval_dataloader", "get_test_dataloader", "log", "create_optimizer",
        "create_scheduler", "create_optimizer_and_scheduler", "compute_loss", "prediction_step", "evaluation_loop",
        "evaluate", "predict", "save_model", "_save_checkpoint", "_prepare_inputs", "_set_signature_columns_if_needed",
    ]  # fmt: skip
    Watched = type("Watched", (Trainer,), {name: watched(name) for name in names})
    trainer = Watched(
        gpt2(), arguments(tmp_path, num_train_epochs=1, eval_strategy="epoch", save_strategy="epoch"),
        train_dataset=tokens(), eval_dataset=tokens(4),
    )  # fmt: skip
    trainer.train()
    trainer.predict(tokens(4))
    trainer.save_model()
    assert called == set(names)


def test_somebody_elses_dataloader_resumes_too(tmp_path):
    class Own(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=4, shuffle=True)

    def go(folder, stop=None, resume=None):
        options = arguments(folder, num_train_epochs=2, save_strategy="steps", save_steps=1, optim="sgd")
        trainer = Own(gpt2(0.2), options, train_dataset=tokens(), callbacks=[StopAt(stop)])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = go(tmp_path / "whole")
    for stop in (1, 3, 4):
        go(tmp_path / str(stop), stop)
        assert_identical(parameters(go(tmp_path / str(stop), resume=True).model), parameters(whole.model))


# --- nothing left behind ------------------------------------------------------------------------------------------


def hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training, type(m)) for m in model.modules()]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(error, tmp_path):
    class Raises(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if error is not None and state.global_step == 2:
                raise error("now")

    model = gpt2(0.1)
    before = hooks(model)
    options = arguments(tmp_path, max_steps=3, neftune_noise_alpha=5.0, optim="sgd", full_determinism=True)
    trainer = Trainer(model, options, train_dataset=tokens(), callbacks=[Raises()])
    if error is None:
        trainer.train()
    else:
        with pytest.raises(error):
            trainer.train()
    assert hooks(model) == before and not trainer.is_in_train
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(p.grad is None for p in model.parameters())
    assert_identical(parameters(model), dict(trainer.train_state.params))  # the last complete step's
    assert trainer.state.global_step == (3 if error is None else 2)


def test_train_again_is_a_new_run_from_the_weights_as_they_are(tmp_path):
    def make(model):
        return Trainer(model, arguments(tmp_path, max_steps=3, optim="adamw_torch"), train_dataset=tokens())

    model = gpt2()
    trainer = make(model)
    trainer.train()
    fresh = gpt2()
    fresh.load_state_dict(model.state_dict())
    trainer.train()
    other = make(fresh)
    other.train()
    assert_identical(parameters(model), parameters(fresh))
    assert trainer.state.global_step == 3


def test_constructing_changes_nothing(tmp_path):
    model = gpt2()
    before, modes = parameters(model), hooks(model)
    Trainer(model, arguments(tmp_path), train_dataset=tokens())
    assert_identical(parameters(model), before)
    assert hooks(model) == modes


def test_neftune_changes_training_and_follows_the_seed(tmp_path):
    plain = trained(tmp_path, gpt2(), tokens(), max_steps=2, optim="sgd")
    one = trained(tmp_path, gpt2(), tokens(), max_steps=2, optim="sgd", neftune_noise_alpha=5.0)
    two = trained(tmp_path, gpt2(), tokens(), max_steps=2, optim="sgd", neftune_noise_alpha=5.0)
    assert_identical(parameters(one.model), parameters(two.model))
    assert not torch.equal(one.model.transformer.wte.weight, plain.model.transformer.wte.weight)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = trained(tmp_path, llama(), tokens(), max_steps=2, optim="sgd")
    less = trained(tmp_path, llama(), tokens(), max_steps=2, optim="sgd", activation_checkpointing=True)
    assert_close(parameters(less.model), parameters(plain.model), 1e-6)
    assert not attribute(less.model, "is_activation_checkpointing", "is_gradient_checkpointing")


@pytest.mark.slow
def test_a_compiled_run_is_the_eager_one(tmp_path):
    options = {"max_steps": 2, "optim": "sgd", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    eager = trained(tmp_path, llama(), tokens(), **options)
    compiled = trained(tmp_path, llama(), tokens(), torch_compile=True, torch_compile_backend="aot_eager", **options)
    assert compiled._trainfn.run.step.explain().breaks == 0 and compiled._trainfn.run.step.explain().graphs == 2
    assert_close(parameters(compiled.model), parameters(eager.model), 1e-6)


@pytest.mark.slow
def test_ragged_batches_do_not_compile_forever(tmp_path):
    """One exact graph, one for any length, and one for what torch treats apart."""
    data = [{name: x[: 2 + i % 5] for name, x in row.items()} for i, row in enumerate(tokens(20))]
    options = arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=1, optim="sgd", torch_compile=True,
                        torch_compile_backend="aot_eager", train_sampling_strategy="sequential")  # fmt: skip
    trainer = Trainer(llama(), options, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 20 and trainer._trainfn.run.step.explain().graphs <= 3


def test_the_summary_says_what_will_happen(tmp_path):
    options = arguments(
        tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=2, num_train_epochs=2.5,
        optim="adamw_torch", learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=0.1, save_strategy="steps",
        save_steps=3,
    )  # fmt: skip
    said = Trainer(gpt2(), options, train_dataset=tokens(13)).summary()
    for part in ("13 per epoch", "5 rows x 2 micro-batches = 10 rows per update", "5 in 2.5 epochs of 2",
                 "the last of an epoch has 1 micro-batch", "adamw_torch, cosine schedule from 0.001", "every 3 updates",
                 "eager: on a CPU"):  # fmt: skip
        assert part in said, said


def test_plateau_follows_the_metric(tmp_path):
    trainer = Trainer(
        gpt2(), arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, optim="sgd", learning_rate=1.0,
                          lr_scheduler_type="reduce_lr_on_plateau", logging_strategy="steps", logging_steps=1,
                          lr_scheduler_kwargs={"factor": 0.5, "patience": 0}),
        train_dataset=tokens(), eval_dataset=tokens(4), compute_metrics=lambda _: {"loss": 1.0},
    )  # fmt: skip
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == [1.0, 1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda f: Trainer(args=arguments(f)), ValueError, r"exactly one of the two gives the model"),
        (lambda f: Trainer(..., arguments(f)), ValueError, r"`\.\.\.` is a placeholder"),
        (lambda f: Trainer("bert", arguments(f)), TypeError, r"the model is a str, and a torch\.nn\.Module"),
        (
            lambda f: Trainer(gpt2(), arguments(f)).train(),
            ValueError, r"`Trainer\(train_dataset=None\)` can't work: .*train_dataset=dataset",
        ),
        (lambda f: Trainer(gpt2(), arguments(f)).evaluate(), ValueError, r"eval_dataset"),
        (
            lambda f: Trainer(gpt2(), arguments(f), train_dataset=iter([])).train(),
            (ValueError, TypeError), r"max_steps|once",
        ),
        (
            lambda f: Trainer(gpt2(), arguments(f, max_steps=1), train_dataset=[{"input_ids": torch.ones(3).long()}]
                              ).train(), ValueError, r"returned no loss",
        ),
        (
            lambda f: Trainer(model := gpt2(), arguments(f, max_steps=1), train_dataset=tokens(),
                              optimizers=(torch.optim.ASGD(model.parameters()), None)).train(),
            ValueError, r"ASGD.*can't be part of a pure step",
        ),
        (
            lambda f: Trainer(gpt2(), arguments(f, dataloader_drop_last=True), train_dataset=tokens(3)).train(),
            ValueError,
            r"\(per_device_train_batch_size=8, dataloader_drop_last=True\)` can't work: the training set has 3 rows",
        ),
        (
            lambda f: Trainer(gpt2(), arguments(f, dataloader_drop_last=True)).evaluate(tokens(3)),
            ValueError,
            r"\(per_device_eval_batch_size=8, dataloader_drop_last=True\)` can't work: the evaluation set has 3 rows",
        ),
        (lambda f: Trainer(gpt2(), arguments(f), train_dataset=[]).train(), ValueError, r"training set has no rows"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(make, error, match, tmp_path):
    with pytest.raises(error, match=match):
        make(tmp_path)


def test_torch_optimizers_and_schedules_are_taken(tmp_path):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=5, train_sampling_strategy="sequential"), train_dataset=tokens(),
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    twin = llama()
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    both = (other, torch.optim.lr_scheduler.LambdaLR(other, lambda n: 1 / (n + 1)))
    theirs(twin, tmp_path, tokens(), optimizers=both, max_steps=5, train_sampling_strategy="sequential")
    assert_close(parameters(model), parameters(twin), 1e-6)


@pytest.mark.parametrize(
    ("warmup", "scaled", "tolerance"), [(False, False, 1e-7), (True, False, 1e-7), (True, True, 1e-3)]
)
def test_the_rates_that_adafactor_computes_are_shown(warmup, scaled, tolerance, tmp_path):
    logs, shown = [], []
    for train in (trained_with, theirs):
        model = llama()
        optimizer = Adafactor(
            model.parameters(), lr=None, relative_step=True, warmup_init=warmup, scale_parameter=scaled
        )
        both = optimizer, AdafactorSchedule(optimizer)
        options = {
            "max_steps": 4,
            "logging_strategy": "steps",
            "logging_steps": 1,
            "train_sampling_strategy": "sequential",
        }
        trainer = train(model, tmp_path, tokens(), optimizers=both, **options)
        logs.append([entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry])
        shown.append(float(trainer.optimizer.state_dict()["param_groups"][0]["lr"]))
    assert logs[0] == pytest.approx(logs[1], rel=tolerance)  # the size of a parameter is that after the update
    assert shown[0] == pytest.approx(shown[1], rel=tolerance) and shown[0] > 0


def test_tokens_and_operations_are_counted(tmp_path):
    trainer = trained(tmp_path, gpt2(), tokens(), num_train_epochs=1, include_num_input_tokens_seen="all", optim="sgd")
    assert trainer.state.num_input_tokens_seen == 12 * 6
    assert trainer.state.total_flos > 0 and math.isfinite(trainer.state.total_flos)


# --- memory, search, signals --------------------------------------------------------------------------------------


class Small(nn.Module):
    """A model that has memory for two rows."""

    def __init__(self):
        super().__init__()
        self.inner = llama()
        self.config = self.inner.config
        self.sizes = []

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_micro_batches_are_cut_until_they_fit(tmp_path):
    model = Small()
    found = trained(tmp_path, model, tokens(), per_device_train_batch_size=8, auto_find_batch_size=True, **SGD)
    plain = trained(tmp_path, llama(), tokens(), per_device_train_batch_size=8, **SGD)
    assert max(model.sizes[-3:]) <= 2 and found.state.global_step == plain.state.global_step == 2
    assert_close(parameters(model.inner), parameters(plain.model), 2e-6)
    with pytest.raises(torch.OutOfMemoryError):
        trained(tmp_path, Small(), tokens(), per_device_train_batch_size=8, **SGD)


def test_hyperparameter_search(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, optim="sgd")
    trainer = Trainer(model_init=llama, args=options, train_dataset=tokens(), eval_dataset=tokens(6))
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-5, 0.5])},
        n_trials=2,
        sampler=optuna.samplers.GridSampler({"learning_rate": [1e-5, 0.5]}, seed=0),
    )
    assert best.hyperparameters == {"learning_rate": 0.5} and trainer.args is options
    assert sorted(p.name for p in tmp_path.glob("run-*")) == ["run-0", "run-1"]
    with pytest.raises(ValueError, match=r"'learning_rat' is not a field of TrainingArguments.*learning_rate"):
        trainer.hyperparameter_search(lambda trial: {"learning_rat": 1.0}, n_trials=1)
    with pytest.raises(ValueError, match=r"can't work without `model_init`.*Write `Trainer\(model_init="):
        Trainer(llama(), options).hyperparameter_search()
    with pytest.raises(ValueError, match=r"backend='ray'"):
        trainer.hyperparameter_search(backend="ray")
    with pytest.raises(ValueError, match=r"train\(trial=\.\.\.\)` can't work.*`trainer\.hyperparameter_search"):
        trainer.train(trial={"learning_rate": 1.0})


def test_sigterm_saves_and_stops(tmp_path):
    class Terminates(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    options = arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=100, enable_jit_checkpoint=True)
    trainer = Trainer(llama(), options, train_dataset=tokens(), callbacks=[Terminates()])
    trainer.train()
    assert trainer.state.global_step == 2 and (tmp_path / "checkpoint-2").is_dir()
    assert signal.getsignal(signal.SIGTERM) is before


# --- 16 bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_sixteen_bits_train_close_to_float32_and_resume(kind, tmp_path):
    options = {"optim": "sgd", "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    exact = trained(tmp_path, llama(), tokens(), **options)
    low = trained(tmp_path / "a", llama(), tokens(), **{kind: True}, **options, save_strategy="steps", save_steps=2)
    assert all(p.dtype == torch.float32 for p in low.model.parameters())
    assert_close(parameters(low.model), parameters(exact.model), 2e-2)
    again = Trainer(
        llama(), arguments(tmp_path / "a", **{kind: True}, **options, save_strategy="steps"), train_dataset=tokens()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_identical(again.train_state, low.train_state)
    assert ("loss_scale" in low.train_state.extra) == (kind == "fp16")


def test_an_overflow_of_float16_is_skipped_and_lowers_the_scale(tmp_path):
    class Large(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, False, num_items_in_batch) * 1e30

    model = llama()
    before = parameters(model)
    trainer = trained(tmp_path, model, tokens(), Large, fp16=True, optim="sgd", max_steps=2)
    assert trainer.state.global_step == 2
    assert trainer.train_state.extra["loss_scale"]["scale"] == 2.0**14
    assert_identical(parameters(model), before)


def test_float16_needs_a_step_that_knows_of_its_scale(tmp_path):
    with pytest.raises(ValueError, match=r"overridden training_step.*Override compute_loss"):
        trained(tmp_path, llama(), tokens(), OwnStep, fp16=True, max_steps=1)


# --- what a review found --------------------------------------------------------------------------------------------


def with_evaluation(folder, *callbacks, model=None, metrics=None, data=None, **options):
    options = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "optim": "sgd", **options}
    return Trainer(
        model or gpt2(), arguments(folder, **options), train_dataset=data or tokens(8), eval_dataset=tokens(4),
        compute_metrics=metrics, callbacks=list(callbacks),
    )  # fmt: skip


class StopsAtTheEpochsEnd(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        return {"should_training_stop": True}


def test_a_stop_at_an_epochs_end_is_at_once(tmp_path):
    trainer = with_evaluation(tmp_path, StopsAtTheEpochsEnd(), eval_strategy="epoch", save_strategy="epoch")
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.epoch == 1.0
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_an_epochs_end_that_was_cut_off_is_made_up_for(tmp_path):
    """The checkpoint is of the epoch's last step, before its log and evaluation."""
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "epoch", "logging_strategy": "epoch"}
    whole = with_evaluation(tmp_path / "a", **options)
    whole.train()
    with_evaluation(tmp_path / "b", StopAt(4), **options).train()
    again = with_evaluation(tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    told = [
        [(log["step"], log.get("loss"), log.get("eval_loss")) for log in t.state.log_history] for t in (again, whole)
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize("own", [False, True])
def test_a_resumed_plateau_keeps_the_rate_it_had_decided(own, tmp_path):
    options = {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3,
        "lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.1},
        "logging_strategy": "steps", "logging_steps": 1,
    }  # fmt: skip

    def make(folder, *callbacks):
        values = iter([1.0, 2.0, 3.0]) if not (folder / "checkpoint-6").exists() else iter([3.0])
        model = gpt2()
        trainer = with_evaluation(folder, *callbacks, model=model, metrics=lambda _: {"loss": next(values)}, **options)
        if own:
            trainer.optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return trainer

    whole = make(tmp_path / "a")
    whole.train()
    make(tmp_path / "b", StopAt(6)).train()
    again = make(tmp_path / "b")
    again.train(resume_from_checkpoint=True)
    assert_identical(again.train_state, whole.train_state)
    rates = [log["learning_rate"] for log in whole.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([0.1] * 6 + [0.01] * 2)


def test_the_best_of_weights_alone_is_loaded(tmp_path):
    trainer = with_evaluation(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        save_only_model=True, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    best = transformers.GPT2LMHeadModel.from_pretrained(trainer.state.best_model_checkpoint)
    assert_identical(parameters(trainer.model), parameters(best))


@pytest.mark.parametrize(("limit", "kept"), [(1, [4, 10]), (2, [4, 10]), (3, [4, 8, 10]), (None, [2, 4, 6, 8, 10])])
def test_weights_alone_are_rotated_and_the_best_is_kept(limit, kept, tmp_path):
    values = iter([2.0, 1.0, 3.0, 4.0, 5.0])
    trainer = with_evaluation(
        tmp_path, metrics=lambda _: {"loss": next(values)}, max_steps=10, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, save_only_model=True, save_total_limit=limit,
        metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    (tmp_path / "checkpoint-mine").mkdir()
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    names = {p.name for p in tmp_path.glob("checkpoint-*")}
    assert names == {"checkpoint-mine", *(f"checkpoint-{n}" for n in kept)}


def test_another_save_is_not_the_best(tmp_path):
    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return {"should_save": state.global_step in (3, 4)}

    values = iter([1.0, 2.0, 3.0, 4.0])
    trainer = with_evaluation(
        tmp_path, Saves(), metrics=lambda _: {"loss": next(values)}, max_steps=6, eval_strategy="steps", eval_steps=2,
        save_strategy="best", metric_for_best_model="loss", greater_is_better=False, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_only_a_checkpoint_that_was_written_is_the_best(tmp_path):
    values = iter([2.0, 1.0, 3.0, 4.0])
    trainer = with_evaluation(
        tmp_path, metrics=lambda _: {"loss": next(values)}, max_steps=12, eval_strategy="steps", eval_steps=3,
        save_strategy="steps", save_steps=2, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 6 and trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    values = iter([1.0, 2.0, 3.0, 4.0])
    trainer.train()
    assert trainer.state.best_global_step == 3 and trainer.state.best_model_checkpoint is None


def test_a_checkpoint_that_an_epochs_evaluation_finds_best_is_named(tmp_path):
    values = iter([1.0, 2.0])
    trainer = with_evaluation(
        tmp_path, metrics=lambda _: {"loss": next(values)}, num_train_epochs=2, eval_strategy="epoch",
        save_strategy="steps", save_steps=1, metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()  # the checkpoint of the epoch's last step is older than the epoch's evaluation
    best = trainer.state.best_global_step
    assert 0 < best < trainer.state.global_step
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")


def test_a_stream_knows_its_epoch(tmp_path):
    epochs = []

    class Rows(torch.utils.data.IterableDataset):
        def set_epoch(self, epoch):
            epochs.append(epoch)

        def __iter__(self):
            return iter(tokens(4))

    with_evaluation(tmp_path, data=Rows(), max_steps=4).train()
    assert epochs == [0, 1]


def test_an_evaluation_reads_a_stream_with_one_worker_which_is_reported_once(tmp_path, caplog):
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tokens(8))

    made = arguments(tmp_path, dataloader_num_workers=2, dataloader_prefetch_factor=4)
    trainer = Trainer(gpt2(), made, train_dataset=Rows(), eval_dataset=Rows())
    with caplog.at_level(logging.WARNING, "trainfn"):
        loaders = trainer.get_train_dataloader(), trainer.get_eval_dataloader(), trainer.get_eval_dataloader()
    assert [(loader.num_workers, loader.prefetch) for loader in loaders] == [(2, 4), (1, 4), (1, 4)]
    assert caplog.text.count("an evaluation reads an iterable dataset with one worker") == 1
    assert trainer.evaluate()["eval_loss"] == Trainer(gpt2(), made).evaluate(tokens(8))["eval_loss"]


def test_trying_a_head_out_leaves_its_statistics_alone(tmp_path):
    class Normed(Small):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, input_ids, attention_mask=None, labels=None):
            outputs = self.inner(input_ids=input_ids, labels=labels)
            return {"loss": outputs.loss + 0 * self.norm(input_ids.float()).sum()}

    model = seeded(Normed)
    trained(tmp_path, model, tokens(), per_device_train_batch_size=2, max_steps=3, optim="sgd")
    assert model.norm.num_batches_tracked == 3


def test_a_loss_that_one_row_does_not_have_is_no_business_of_the_check(tmp_path):
    class Pairs(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            logits = model(input_ids=inputs["input_ids"]).logits
            return logits.view(-1, 2, *logits.shape[1:]).square().mean()

    trained(tmp_path, llama(), tokens(8), Pairs, per_device_train_batch_size=2, gradient_accumulation_steps=2, **SGD)


def test_another_accumulation_continues_with_the_same_rows(tmp_path):
    options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2, "optim": "sgd"}
    with_evaluation(tmp_path, StopAt(2), **options).train()  # two of four micro-batches
    seen = []

    class Watches(Trainer):
        def _prepare_inputs(self, inputs):
            seen.append(inputs["input_ids"].tolist())
            return super()._prepare_inputs(inputs)

    made = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, **options)
    trainer = Watches(gpt2(), made, train_dataset=tokens(8))
    trainer.train(resume_from_checkpoint=True)
    assert seen == [batch["input_ids"].tolist() for batch in list(trainer.get_train_dataloader())[2:]]
