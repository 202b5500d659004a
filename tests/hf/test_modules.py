"""Nothing in a user's module is ignored by the Trainer: each kind of module trains as in torch's plain loop."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import trainfn as tfn
from tests.module_kinds import KINDS, by_hand, twins
from tests.test_module_kinds import ADAMW, STEPS, assert_equal_modules
from trainfn import Trainer, TrainerCallback, TrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore::trainfn.errors.UnreachedWarning")


def arguments(folder, **options):
    given = {"max_steps": STEPS, "save_strategy": "no", "max_grad_norm": 0.0, "logging_steps": 100, **options}
    given = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8, **given}
    return TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, report_to="none", log_level="error", **given)


class OfKind(Trainer):
    """A Trainer on the batches of a kind, with its loss."""

    def __init__(self, kind, model, args, **options):
        self.kind = kind
        super().__init__(model, args, **options)

    def get_train_dataloader(self):
        batches = [self.kind.batch(n) for n in range(STEPS)]
        return [batch if isinstance(batch, dict) else {"x": batch} for batch in batches]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.kind.loss(model, inputs if "task" in inputs else inputs["x"])


@pytest.mark.parametrize("name", KINDS)
def test_a_module_trains_as_in_torch(name, tmp_path):
    kind = KINDS[name]
    module, twin = twins(kind)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], **ADAMW)
    trainer = OfKind(kind, module, arguments(tmp_path), optimizers=(optimizer, None))
    trainer.train()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    assert_equal_modules(trainer.train_state, by_hand(kind, twin, torch.optim.AdamW(parameters, **ADAMW), STEPS))
    assert all(p.grad is None for p in module.parameters())


# --- freezing -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x=None, labels=None):
        y = self.head(torch.relu(self.body(x))).squeeze(-1)
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


def points(count=32):
    draw = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(3, generator=draw), "labels": torch.randn((), generator=draw)} for _ in range(count)]


class At(TrainerCallback):
    """Calls a function of the model before steps, and notes what moves."""

    def __init__(self, change):
        self.change, self.moved = change, []

    def on_train_begin(self, args, state, control, model=None, **rest):
        self.change(model, "begin")

    def on_step_begin(self, args, state, control, model=None, **rest):
        self.change(model, state.global_step)
        self.before = model.body.weight.detach().clone()

    def on_step_end(self, args, state, control, model=None, **rest):
        self.moved.append(not torch.equal(self.before, model.body.weight))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_frozen_at_the_begin_may_be_unfrozen(tmp_path, compiled):
    at = At(
        lambda model, n: model.body.requires_grad_(False) if n == "begin" else n == 2 and model.body.requires_grad_()
    )
    how = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    Trainer(Net(), arguments(tmp_path, max_steps=4, **how), train_dataset=points(), callbacks=[at]).train()
    assert at.moved == [False, False, True, True]


def test_what_the_optimizer_does_not_have_stays_frozen_and_is_named(tmp_path):
    model = Net()
    model.body.requires_grad_(False)
    at = At(lambda model, n: n in (2, 3) and model.body.requires_grad_())
    trainer = Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=points(), callbacks=[at])
    with pytest.warns(UserWarning, match=r"'body.weight' was frozen when `train` made the optimizer.*`on_train_begin`"):
        trainer.train()
    assert at.moved == [False] * 4 and model.body.weight.requires_grad
    assert model.body.weight.grad is None


# --- draws of NumPy and Python ------------------------------------------------------------------------------------


class Noisy(Net):
    """It mixes rows and adds noise, as SpecAugment and mixup do, by generators that are not torch's."""

    def forward(self, x=None, labels=None):
        if self.training:
            mix = float(np.random.beta(0.4, 0.4))
            x = mix * x + (1 - mix) * x.flip(0) + random.gauss(0, 0.1)
        return super().forward(x, labels)


def run(folder, resume=None, **options):
    given = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **options}
    trainer = Trainer(Noisy(), arguments(folder, **given), train_dataset=points())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_draws_of_numpy_and_python_are_the_same_twice_and_after_a_resume(tmp_path):
    once = tfn.digest(run(tmp_path / "a").train_state)
    np.random.rand(3), random.random()
    assert tfn.digest(run(tmp_path / "b").train_state) == once
    np.random.rand(3), random.random()
    assert tfn.digest(run(tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-2")).train_state) == once
    assert tfn.digest(run(tmp_path / "c", seed=1).train_state) != once
