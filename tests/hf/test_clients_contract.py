"""What packages that subclass the Trainer count on; `tests/clients/` has the packages themselves."""

import dataclasses
import pickle

import pytest
import torch
import transformers
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from tests.hf.models import llama, tokens
from trainfn.hf import Trainer, TrainingArguments

QUIET = {
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error",
    "max_steps": 2, "per_device_train_batch_size": 4,
}  # fmt: skip


@dataclasses.dataclass
class OfPackage(transformers.TrainingArguments):
    beta: float = 0.1


def test_arguments_of_a_package_are_pickled_as_its_own(tmp_path):
    made = Trainer(llama(), OfPackage(str(tmp_path), beta=0.5, **QUIET), train_dataset=tokens())
    assert isinstance(made.args, TrainingArguments) and isinstance(made.args, OfPackage)
    again = pickle.loads(pickle.dumps(made.args))
    assert type(again) is OfPackage and again.beta == 0.5 and again.max_steps == 2


def test_an_evaluation_without_rows_is_empty_where_a_subclass_evaluates_otherwise(tmp_path):
    class Judged(Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return DataLoader([])

        def evaluation_loop(self, *args, **options):
            found = super().evaluation_loop(*args, **options)
            return EvalLoopOutput(None, None, {**found.metrics, "eval_score": 1.0}, 0)

    class Plain(Trainer):
        get_eval_dataloader = Judged.get_eval_dataloader

    args = TrainingArguments(str(tmp_path), **QUIET)
    assert Judged(llama(), args, train_dataset=tokens()).evaluate()["eval_score"] == 1.0
    with pytest.raises(ValueError, match="the dataset gave no batch"):
        Plain(llama(), args, train_dataset=tokens()).evaluate()


@pytest.mark.parametrize("manual", [False, True])
def test_an_override_prepares_each_batch_once(manual, tmp_path):
    seen = []

    class Prepares(Trainer):
        def _prepare_inputs(self, inputs):
            seen.append(len(inputs))
            return super()._prepare_inputs(inputs)

    class Steps(Prepares):
        def training_step(self, *args, **options):
            return super().training_step(*args, **options)

    kind = Steps if manual else Prepares
    kind(llama(), TrainingArguments(str(tmp_path), **QUIET), train_dataset=tokens()).train()
    assert len(seen) == 2


def test_a_loader_with_a_sampler_of_a_subclass(tmp_path):
    class Backwards(Trainer):
        def get_train_dataloader(self):
            return self._get_dataloader(
                self.train_dataset, "Training", 3, sampler_fn=lambda rows: list(reversed(range(12)))
            )

    made = Backwards(llama(), TrainingArguments(str(tmp_path), **QUIET), train_dataset=tokens())
    batches = list(made.get_train_dataloader())
    assert len(batches) == 4
    rows = torch.stack([row["input_ids"] for row in tokens()])
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), rows.flip(0))


def test_the_accelerators_order_follows_the_runs_seed(tmp_path):
    made = Trainer(llama(), TrainingArguments(str(tmp_path), seed=7, **QUIET), train_dataset=tokens())
    assert made.accelerator.dataloader_config.data_seed == 7
