"""The Trainer on any device, beside transformers' own. See `device.py` for how to choose one."""

import random

import numpy as np
import pytest
import torch
import transformers
from transformers import BertForSequenceClassification

from tests.device import ACCELERATOR, BACKEND, DEVICE, both_ways, exact_products, on_an_accelerator, on_cuda
from tests.hf.models import HEADS, bert, gpt2, llama, tokens
from trainfn import hf

QUIET = {
    "use_cpu": not ACCELERATOR,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
}
COMPILED = {"torch_compile": True, "torch_compile_backend": BACKEND}
WHOLE = {"per_device_train_batch_size": 8}  # all rows in each batch: each library shuffles in its own way
EACH_WAY = pytest.mark.parametrize("compile", [False, both_ways(True)], ids=["eager", "compiled"])


@pytest.fixture(autouse=True)
def float32_and_its_own_generators():
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    with exact_products():
        yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def made(library, folder, model, rows, **options):
    given = {name: options.pop(name) for name in ("eval_dataset", "compute_metrics", "callbacks") if name in options}
    arguments = library.TrainingArguments(str(folder), **{**QUIET, **options})
    return library.Trainer(model, arguments, train_dataset=rows, **given)


def trained(folder, model, rows, library=hf, resume=None, **options):
    trainer = made(library, folder, model, rows, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def way(compile):
    return COMPILED if compile else {"torch_compile": False}


@EACH_WAY
@pytest.mark.parametrize(
    "head", [head for head in HEADS if head != "gpt2"]
)  # theirs counts labels that GPT-2 shifts away
def test_losses_equal_those_of_transformers(head, compile, tmp_path):
    make, rows = HEADS[head]
    ours = trained(tmp_path / "ours", make(), rows(8), **WHOLE, **way(compile))
    theirs = trained(tmp_path / "theirs", make(), rows(8), transformers, **WHOLE)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    assert ours.model.device.type == DEVICE.type


class Doubled(hf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        return (2 * out.loss, out) if return_outputs else 2 * out.loss


@pytest.mark.parametrize("kind", [hf.Trainer, Doubled])
def test_a_run_is_captured_once(kind, tmp_path):
    """By default on an accelerator."""
    options = {} if ACCELERATOR else COMPILED
    arguments = hf.TrainingArguments(str(tmp_path), **{**QUIET, **options})
    trainer = kind(llama(), arguments, train_dataset=tokens(24))
    trainer.train()
    report = trainer._trainfn.run.step.explain()
    assert (report.traces, report.graphs, report.breaks) == (1, 1, 0)


@EACH_WAY
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=on_an_accelerator)])
def test_mixed_precision(precision, compile, tmp_path):
    if not ACCELERATOR:
        pytest.skip("on a CPU `tests/hf/test_trainer.py` has it")
    options = {precision: True, **WHOLE}
    ours = trained(tmp_path / "ours", llama(), tokens(8), **options, **way(compile))
    theirs = trained(tmp_path / "theirs", llama(), tokens(8), transformers, **options)
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-2)


def test_compiled_equals_eager_with_dropout(tmp_path):
    eager = trained(tmp_path, gpt2(0.2), tokens(24), torch_compile=False)
    compiled = trained(tmp_path, gpt2(0.2), tokens(24), **COMPILED)
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)


@on_cuda
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_modes_of_the_compiler(mode, accumulation, tmp_path):
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    plain = trained(tmp_path, gpt2(0.2), tokens(24), torch_compile=False, **options)
    other = trained(tmp_path, gpt2(0.2), tokens(24), torch_compile=True, torch_compile_mode=mode, **options)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-4)


@EACH_WAY
def test_accumulation_equals_the_whole_batch(compile, tmp_path):
    whole = trained(tmp_path, llama(), tokens(24), **way(compile))
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    pieces = trained(tmp_path, llama(), tokens(24), **options, **way(compile))
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-3)


@EACH_WAY
def test_a_run_resumes_bit_for_bit(compile, tmp_path):
    options = {"max_steps": 8, **way(compile)}
    whole = trained(tmp_path / "whole", gpt2(0.2), tokens(24), **options)
    options |= {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path / "parts", gpt2(0.2), tokens(24), **options)
    rest = trained(
        tmp_path / "parts", gpt2(0.2), tokens(24), resume=str(tmp_path / "parts" / "checkpoint-3"), **options
    )
    for (name, a), b in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@EACH_WAY
def test_evaluation_equals_that_of_transformers(compile, tmp_path):
    make, rows = HEADS["bert classes"]
    numbers, options = [], {"eval_dataset": rows(10), "compute_metrics": correct}
    for library in (hf, transformers):
        more = way(compile) if library is hf else {}
        trainer = trained(tmp_path / library.__name__, make(), rows(8), library, **WHOLE, **options, **more)
        told, predicted = trainer.evaluate(), trainer.predict(rows(10))
        numbers.append(([told["eval_loss"], told["eval_correct"]], predicted.predictions))
    (ours, predictions), (theirs, others) = numbers
    assert ours == pytest.approx(theirs, rel=1e-4)
    np.testing.assert_allclose(predictions, others, atol=1e-3)


def correct(prediction):
    return {"correct": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@EACH_WAY
def test_gradient_checkpointing_changes_no_number(compile, tmp_path):
    plain = trained(tmp_path, llama(), tokens(24), **way(compile))
    other = trained(tmp_path, llama(), tokens(24), gradient_checkpointing=True, **way(compile))
    assert losses(other) == pytest.approx(losses(plain), rel=1e-4)


OPTIMIZERS = {
    "adamw_torch_fused": {},
    "adafactor": {},
    "lion_32bit": {},
    "galore_adamw": {"optim_target_modules": ["attn", "mlp"], "optim_args": "rank=2,update_proj_gap=3"},
    "lomo": {},
    "adalomo": {},
}


@EACH_WAY
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_name(name, compile, tmp_path):
    options = {"optim": name, "learning_rate": 1e-3, "max_steps": 4, **OPTIMIZERS[name]}
    trainer = trained(tmp_path, llama(), tokens(24), **options, **way(compile))
    assert all(np.isfinite(losses(trainer))) and len(losses(trainer)) == 4


@on_an_accelerator
def test_batches_of_many_lengths(tmp_path):
    """By default: each length is a graph of its own."""
    ragged = [{k: v[: int(row["attention_mask"].sum())] for k, v in row.items()} for row in tokens(24)]
    rows = [{**row, "labels": i % 3} for i, row in enumerate(ragged)]
    model = bert(BertForSequenceClassification, num_labels=3)
    trainer = trained(tmp_path, model, rows, per_device_train_batch_size=1, max_steps=12)
    assert all(np.isfinite(losses(trainer)))
    assert 1 < trainer._trainfn.run.step.explain().graphs <= 6


class Hungry(torch.nn.Module):
    """More than eight rows are too many for any memory."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 1)

    def forward(self, x, labels=None):
        if x.shape[0] > 8:
            torch.empty(1 << 50, dtype=torch.uint8, device=x.device)
        return {"loss": ((self.inner(x).squeeze(-1) - labels) ** 2).mean()}


@on_cuda
def test_memory_that_runs_out_halves_the_batch(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(1.0)} for _ in range(64)]
    options = {"per_device_train_batch_size": 32, "auto_find_batch_size": True, "torch_compile": False}
    assert len(losses(trained(tmp_path, Hungry(), rows, **options))) == 6
