"""Whole runs of the Trainer beside transformers' own: whoever makes the optimizer, the same weights and rates."""

import copy
import warnings

import numpy as np
import optree
import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerCallback

import trainfn as tfn
from tests.hf.models import seeded
from trainfn.hf import Trainer, TrainingArguments
from trainfn.hf._optim import _schedules

LR = torch.optim.lr_scheduler
OURS, THEIRS = (Trainer, TrainingArguments), (transformers.Trainer, transformers.TrainingArguments)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(3, 1)

    def forward(self, x, labels=None):
        y = self.w(x).squeeze(-1)
        return {"logits": y} if labels is None else {"loss": ((y - labels) ** 2).mean(), "logits": y}


GENERATOR = torch.Generator().manual_seed(1)
ROWS = [{"x": torch.randn(3, generator=GENERATOR), "labels": torch.randn((), generator=GENERATOR)} for _ in range(16)]


def options(folder, **given):
    return {
        "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.1,
        "use_cpu": True, "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "log_level": "error",
        "train_sampling_strategy": "sequential", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps",
        "save_steps": 4, **given,
    }  # fmt: skip


class Writes(TrainerCallback):
    """Writes decay, betas or momentum after each step, and once the rate."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 * state.global_step
            if "betas" in group:
                group["betas"] = (0.5 + 0.01 * state.global_step, 0.9)
            else:
                group["momentum"] = 0.5 + 0.01 * state.global_step
            if state.global_step == 3:
                group["lr"] = 0.123


class Gradients(TrainerCallback):
    """Keeps the gradients that it sees, and changes them."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append([p.grad.clone() for p in model.parameters()])
        model.w.bias.grad *= 0.5
        if state.global_step == 2:
            model.w.weight.grad = None

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model.w.bias.grad is not None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model.w.bias.grad is None


def groups(model):
    return [
        {"params": [model.w.weight], "lr": 0.05, "weight_decay": 0.3},
        {"params": [model.w.bias], "weight_decay": 0.0},
    ]


def edited(kind):
    class Edited(kind):
        def create_optimizer(self, *args):
            super().create_optimizer(*args)
            self.optimizer.param_groups[0].update(lr=0.01, weight_decay=0.5)
            return self.optimizer

    return Edited


def own(kind):
    class Own(kind):
        def create_optimizer_and_scheduler(self, num_training_steps):
            self.create_optimizer()
            self.create_scheduler(num_training_steps)

        def create_optimizer(self):
            self.optimizer = torch.optim.AdamW(groups(self.model), lr=0.2)

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = LR.OneCycleLR(self.optimizer, max_lr=[0.1, 0.2], total_steps=num_training_steps + 1)

    return Own


def asked(kind):
    class Asked(kind):
        def get_decay_parameter_names(self, model):
            return ["w.bias"]

        def get_optimizer_cls_and_kwargs(self, args, model=None):
            assert model is self.model
            return torch.optim.SGD, {"lr": 0.3, "momentum": 0.8}

    return Asked


def optimizers(optimizer, schedule=None):
    def make(model):
        made = optimizer(model)
        return {"optimizers": (made, schedule(made) if schedule else None)}

    return make


CASES = {
    "super edited": {"kind": edited},
    "all overridden": {"kind": own},
    "asked": {"kind": asked, "weight_decay": 0.2},
    "groups": {"more": optimizers(lambda m: torch.optim.AdamW(groups(m), lr=0.2))},
    "class": {"more": lambda m: {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 0.05})}, "weight_decay": 0.1},
    "one cycle": {
        "more": optimizers(
            lambda m: torch.optim.SGD(groups(m), lr=0.2, momentum=0.9),
            lambda o: LR.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=9),
        )
    },
    "restarts": {
        "more": optimizers(
            lambda m: torch.optim.AdamW(groups(m), lr=0.2), lambda o: LR.CosineAnnealingWarmRestarts(o, 3)
        )
    },
    "sequence": {
        "more": optimizers(
            lambda m: torch.optim.RMSprop(groups(m), lr=0.02),
            lambda o: LR.SequentialLR(o, [LR.ConstantLR(o, 0.1, 2), LR.ExponentialLR(o, 0.9)], [2]),
        )
    },
    "plateau": {
        "more": optimizers(
            lambda m: torch.optim.SGD(groups(m), lr=0.2), lambda o: LR.ReduceLROnPlateau(o, patience=0, factor=0.5)
        ),
        "metric_for_best_model": "loss",
    },
    "greedy": {
        "lr_scheduler_type": "greedy",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        "metric_for_best_model": "loss",
    },
    "written": {
        "more": optimizers(lambda m: torch.optim.AdamW(groups(m), lr=0.2)),
        "calls": Writes,
        "lr_scheduler_type": "constant",
    },
    "written, momentum": {
        "more": optimizers(lambda m: torch.optim.SGD(groups(m), lr=0.2, momentum=0.5)),
        "calls": Writes,
    },
    "gradients": {"calls": Gradients, "gradient_accumulation_steps": 2},
    "gradients, not clipped": {"calls": Gradients, "max_grad_norm": 0.0},
}


def made(library, folder, *, kind=lambda kind: kind, more=lambda model: {}, calls=None, **given):
    (trainer, arguments), model = library, seeded(Line)
    called = [] if calls is None else [calls()]
    args = arguments(**options(folder, **given))
    return kind(trainer)(model, args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=called, **more(model))


def rates(trainer):
    return [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def seen(trainer):
    return [each.seen for each in trainer.callback_handler.callbacks if isinstance(each, Gradients)]


def trained(library, folder, resume=None, **case):
    with warnings.catch_warnings():
        # torch's SequentialLR, and callbacks of transformers' Trainer that set a gradient to None.
        warnings.filterwarnings("ignore", "The epoch parameter|The loss does not reach")
        trainer = made(library, folder, **case)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", CASES)
def test_weights_rates_and_gradients_are_those_of_transformers(name, tmp_path):
    theirs, mine = (trained(each, tmp_path / each[0].__module__, **CASES[name]) for each in (THEIRS, OURS))
    assert rates(mine) == pytest.approx(rates(theirs), rel=1e-12)
    torch.testing.assert_close(weights(mine), weights(theirs), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(seen(mine), seen(theirs), atol=1e-5, rtol=1e-5)
    assert isinstance(mine.optimizer, torch.optim.Optimizer)
    assert mine.get_learning_rates() == pytest.approx(theirs.get_learning_rates(), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_same_to_the_bit(name, tmp_path):
    case = {**CASES[name], "eval_steps": 4} if "metric_for_best_model" in CASES[name] else CASES[name]
    whole = trained(OURS, tmp_path, **case)
    again = trained(OURS, tmp_path, resume=str(tmp_path / "checkpoint-4"), **case)
    assert rates(again) == rates(whole)
    for a, b in zip(optree.tree_leaves(again.train_state), optree.tree_leaves(whole.train_state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["one cycle", "written", "written, momentum"])
def test_numbers_that_are_written_need_no_second_capture(name, tmp_path):
    case = {"eval_strategy": "no", "save_strategy": "no", **CASES[name]}
    eager = trained(OURS, tmp_path, **case)
    compiled = trained(OURS, tmp_path, torch_compile=True, torch_compile_backend="eager", **case)
    torch.testing.assert_close(weights(compiled), weights(eager), atol=2e-6, rtol=1e-5)


def test_an_option_that_is_in_the_captured_step_makes_another_one(tmp_path):
    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            optimizer.param_groups[0]["nesterov"] = state.global_step >= 2

    case = {
        "more": optimizers(lambda m: torch.optim.SGD(groups(m), lr=0.2, momentum=0.5)), "calls": Turns, "max_steps": 4,
        "eval_strategy": "no", "save_strategy": "no",
    }  # fmt: skip
    theirs = trained(THEIRS, tmp_path, **case)
    for more in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch.testing.assert_close(weights(trained(OURS, tmp_path, **case, **more)), weights(theirs))


def test_an_option_that_needs_memory_is_refused(tmp_path):
    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            optimizer.param_groups[0]["momentum"] = 0.9

    with pytest.raises(ValueError, match=r"\['momentum'\] = 0.9` can't work during a run.*before `trainer.train\(\)`"):
        trained(OURS, tmp_path, more=optimizers(lambda m: torch.optim.SGD(groups(m), lr=0.2)), calls=Late)


def test_a_second_run_starts_from_the_same_numbers(tmp_path):
    trainer = made(OURS, tmp_path, **CASES["one cycle"])
    first = weights(trainer)
    trainer.train()
    then = weights(trainer)
    trainer.model.load_state_dict(first)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer).values(), then.values(), strict=True))


def test_an_optimizer_that_is_set_before_the_run_is_used_and_kept(tmp_path):
    trainer = made(OURS, tmp_path)
    trainer.optimizer = torch.optim.SGD(groups(trainer.model), lr=0.5)
    trainer.train()
    assert trainer.optimizer.optimizer.param_groups[1]["initial_lr"] == 0.5
    trainer.train()
    assert rates(trainer)[0] == 0.05


def test_arguments_that_differ_at_a_resume_count(tmp_path):
    whole = trained(OURS, tmp_path, max_steps=8)
    again = trained(OURS, tmp_path, resume=str(tmp_path / "checkpoint-4"), learning_rate=0.2)
    assert rates(again)[4:] == pytest.approx([2 * rate for rate in rates(whole)[4:]])
    longer = trained(OURS, tmp_path, resume=str(tmp_path / "checkpoint-4"), max_steps=16, weight_decay=0.5)
    assert rates(longer)[4] == pytest.approx(0.1 * 12 / 16)
    assert longer.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_the_state_is_in_the_layout_of_torch(tmp_path):
    case = {**CASES["groups"], "max_steps": 3}
    mine, theirs = (trained(each, tmp_path, **case) for each in (OURS, THEIRS))
    found, expected = mine.optimizer.state_dict(), theirs.optimizer.state_dict()
    torch.testing.assert_close(found["state"], expected["state"], atol=1e-6, rtol=1e-5)
    assert [group.keys() for group in found["param_groups"]] == [group.keys() for group in expected["param_groups"]]
    assert mine.optimizer.state[mine.model.w.bias]["step"] == 3
    torch.optim.AdamW(groups(mine.model)).load_state_dict(found)


def test_a_state_is_loaded_in_a_callback(tmp_path):
    class Loads(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer.load_state_dict(copy.deepcopy(saved))

    case = {**CASES["groups"], "max_steps": 2}
    saved = trained(OURS, tmp_path, **case).optimizer.state_dict()
    again = trained(OURS, tmp_path, **case, calls=Loads)
    assert again.optimizer.state[again.model.w.bias]["step"] == 4
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, and this optimizer of \[1, 1\]"):
        again.optimizer.load_state_dict(torch.optim.AdamW(again.model.parameters()).state_dict())


def test_a_step_of_ones_own_is_an_error(tmp_path):
    optimizer = trained(OURS, tmp_path, max_steps=1).optimizer
    with pytest.raises(RuntimeError, match=r"`optimizer.step\(\)` can't work.*write into `optimizer.param_groups`"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"register_step_post_hook.*a callback with the method `on_optimizer_step`"):
        optimizer.register_step_post_hook(print)
    with pytest.raises(RuntimeError, match=r"register_step_pre_hook.*the method `on_pre_optimizer_step`"):
        optimizer.register_step_pre_hook(print)
    with pytest.raises(TypeError, match=r"deepcopy\(trainer.optimizer.state_dict\(\)\)"):
        copy.deepcopy(optimizer)
    optimizer.zero_grad()


def test_a_group_is_added_in_a_run(tmp_path):
    class Adds(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 2:
                optimizer.add_param_group({"params": [model.w.bias], "lr": 0.5})

    more = optimizers(lambda m: torch.optim.SGD([m.w.weight], lr=0.2, momentum=0.5))
    case = {"more": more, "calls": Adds, "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    mine, theirs = (trained(each, tmp_path, **case, save_strategy="no", max_steps=3) for each in (OURS, THEIRS))
    torch.testing.assert_close(weights(mine), weights(theirs))
    assert not torch.equal(mine.model.w.bias, seeded(Line).w.bias)


def test_hyperparameters_of_a_transform_are_in_its_group(tmp_path):
    def rule(learning_rate):
        return tfn.optim.sgd(learning_rate)

    transform = tfn.optim.inject_hyperparams(rule)(learning_rate=0.4)
    mine = trained(OURS, tmp_path, more=lambda m: {"optimizers": (transform, None)}, max_grad_norm=0.0)
    theirs = trained(
        THEIRS, tmp_path, more=optimizers(lambda m: torch.optim.SGD(m.parameters(), lr=0.4)), max_grad_norm=0.0
    )
    assert rates(mine) == pytest.approx(rates(theirs))
    torch.testing.assert_close(weights(mine), weights(theirs), atol=2e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------- parameters of a loss


def with_head(kind):
    class WithHead(kind):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.loss = {"a": seeded(lambda: nn.Sequential(self.model, nn.Linear(1, 1)))}
            self.scale = nn.Parameter(torch.ones(()))

        def own(self):
            return [*self.loss["a"][1].parameters(), self.scale]

        def get_optimizer_cls_and_kwargs(self, args, model=None):
            return torch.optim.AdamW, {"lr": 0.1, "params": [*self.model.parameters(), *self.own()]}

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            y = self.scale * self.loss["a"][1](model(x=inputs["x"])["logits"][:, None])[:, 0]
            loss = ((y - inputs["labels"]) ** 2).mean()
            return (loss, {"logits": y}) if return_outputs else loss

    return WithHead


class Clears(TrainerCallback):
    """Clears the gradients that transformers' Trainer adds up for ever, because its model does not have them."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.zero_grad()


def test_parameters_of_a_loss_are_trained_saved_and_resumed(tmp_path):
    case = {"kind": with_head, "eval_strategy": "no"}
    theirs = trained(THEIRS, tmp_path / "theirs", calls=Clears, **case)
    mine = trained(OURS, tmp_path / "mine", **case)
    torch.testing.assert_close(weights(mine), weights(theirs), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close([*mine.own()], [*theirs.own()], atol=2e-6, rtol=1e-5)
    assert {"loss.a.1.weight", "loss.a.1.bias", "w.weight"} < set(mine.train_state.params)
    assert type(mine.scale) is nn.Parameter
    again = trained(OURS, tmp_path / "mine", resume=str(tmp_path / "mine" / "checkpoint-4"), **case)
    assert all(torch.equal(a, b) for a, b in zip(again.own(), mine.own(), strict=True))
    compiled = trained(OURS, tmp_path / "c", torch_compile=True, torch_compile_backend="eager", **case)
    torch.testing.assert_close([*compiled.own()], [*mine.own()])


def test_a_parameter_that_nothing_holds_is_an_error(tmp_path):
    lost = nn.Parameter(torch.zeros(2))
    more = optimizers(lambda m: torch.optim.SGD([*m.parameters(), lost], lr=0.1))
    with pytest.raises(
        ValueError, match=r"a tensor of shape \[2\] in its groups is not a parameter of the model.*self.head ="
    ):
        trained(OURS, tmp_path, more=more)


class Recalls(LR.LRScheduler):
    """Its rate follows from numbers of NumPy, and from a dict by step."""

    def __init__(self, optimizer):
        self.factor, self.past = np.float32(1.0), {0: 1.0}
        super().__init__(optimizer)

    def get_lr(self):
        self.factor = np.float32(self.factor * 0.75)
        self.past[self.last_epoch] = 1.0
        return [float(base * self.factor) * len(self.past) for base in self.base_lrs]


def test_a_schedule_of_the_users_own_keeps_its_numbers(tmp_path):
    case = {"more": optimizers(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), Recalls)}
    whole = trained(OURS, tmp_path, **case)
    resumed = trained(OURS, tmp_path, resume=str(tmp_path / "checkpoint-4"), **case)
    assert rates(resumed) == rates(whole)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_a_value_of_a_schedule_that_a_checkpoint_cannot_hold_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(_schedules.logger, "warning_once", told.append)
    scheduler = Recalls(torch.optim.SGD([torch.zeros(1)], lr=1.0))
    _schedules.state_of(scheduler)
    assert told == []
    scheduler.past = {1, 2}
    _schedules.state_of(scheduler)
    assert "'past' is a set" in told[0]


def test_a_function_that_a_callback_sets_as_the_schedule_goes_on(tmp_path):
    class Sets(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.lr_scheduler = tfn.schedules.linear(0.5, 8)

    case = {"optim": "sgd", "save_strategy": "no", "lr_scheduler_type": "constant"}
    trainer = made(OURS, tmp_path, calls=Sets, **case)
    trainer.train()
    named = trained(OURS, tmp_path, **{**case, "lr_scheduler_type": "linear", "learning_rate": 0.5})
    torch.testing.assert_close(weights(trainer), weights(named), rtol=0, atol=1e-6)
    assert rates(trainer) == [0.5 * (1 - n / 8) for n in range(8)]


def test_a_schedule_over_the_shown_optimizer_steps_without_torchs_warning(tmp_path):
    class Sets(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            trainer.lr_scheduler = LR.StepLR(optimizer, 4)

    trainer = made(OURS, tmp_path, calls=Sets, save_strategy="no", learning_rate=1.0)
    trainer.train()
    assert rates(trainer) == pytest.approx([1.0] * 4 + [0.1] * 4)


class Failing(TrainerCallback):
    """Raises between the gradients and the update."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert all(parameter.grad is not None for parameter in model.parameters())
        raise FloatingPointError("seen")


def test_gradients_are_cleared_after_an_error(tmp_path):
    model = Line()
    trainer = Trainer(model, TrainingArguments(**options(tmp_path)), train_dataset=ROWS, eval_dataset=ROWS,
                      callbacks=[Failing()])  # fmt: skip
    with pytest.raises(FloatingPointError, match="seen"):
        trainer.train()
    assert all(parameter.grad is None for parameter in model.parameters())
