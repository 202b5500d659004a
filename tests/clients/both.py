"""One script on both Trainers: what each of them does, and a comparison."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import trainfn
from tests.helpers import assert_close

QUIET = {
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
    "learning_rate": 0.02,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 4,
    "train_sampling_strategy": "sequential",
}
KINDS = {
    "transformers": (transformers.Trainer, transformers.TrainingArguments),
    "trainfn": (trainfn.Trainer, trainfn.TrainingArguments),
}


def package(name: str) -> Any:
    """An optional package; the tests of a file are skipped without it."""
    return pytest.importorskip(name, reason=f"the package {name} is not installed; the extra `test` has it")


class Seeded:
    """A block that begins with all generators seeded, and leaves them as they were."""

    def __enter__(self) -> None:
        self.states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        transformers.set_seed(0)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.states[0])
        np.random.set_state(self.states[1])
        random.setstate(self.states[2])


def logged(trainer: transformers.Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_run(ours: Any, theirs: Any, keys: tuple[str, ...] = ("loss", "grad_norm"), tolerance: float = 1e-6):
    """Both have logged the same numbers after every step, and ended with the same weights."""
    for key in keys:
        mine, other = logged(ours, key), logged(theirs, key)
        assert other, f"transformers logged no {key}"
        assert mine == pytest.approx(other, rel=tolerance, abs=tolerance), key
    assert_close(weights(ours.model), weights(theirs.model), tolerance)
