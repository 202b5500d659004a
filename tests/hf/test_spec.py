"""The documentation's snippets, with the import changed and tiny models and rows of our own."""

import logging
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, default_data_collator

import trainfn
from tests.hf.models import bert, classes, gpt2, tokens

pytestmark = pytest.mark.usefixtures("untouched_rng")


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def parts():
    """What the snippets take for granted."""
    return {
        "model": bert(BertForSequenceClassification, num_labels=3),
        "dataset": {"train": classes(), "test": classes(6)},
        "data_collator": default_data_collator,
        "compute_metrics": lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    }


def small(**options):
    return {"use_cpu": True, "disable_tqdm": True, "log_level": "error", **options}


# --- the first example --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["eval_strategy", "evaluation_strategy"])
@pytest.mark.parametrize("names", ["processing_class", "tokenizer"])
def test_the_first_example(spelling, names, parts):
    from trainfn import Trainer, TrainingArguments

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        training_args = TrainingArguments(
            output_dir="your-model",
            learning_rate=2e-5,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            num_train_epochs=2,
            weight_decay=0.01,
            **{spelling: "epoch"},
            save_strategy="epoch",
            load_best_model_at_end=True,
            **small(),
        )
        trainer = Trainer(
            model=parts["model"],
            args=training_args,
            train_dataset=parts["dataset"]["train"],
            eval_dataset=parts["dataset"]["test"],
            **{names: None},
            data_collator=parts["data_collator"],
            compute_metrics=parts["compute_metrics"],
        )
    old = [w for w in caught if issubclass(w.category, DeprecationWarning) and "evaluation_strategy" in str(w.message)]
    assert len(old) == (spelling == "evaluation_strategy")
    trainer.train()
    assert [log["epoch"] for log in trainer.state.log_history if "eval_accuracy" in log] == [1.0, 2.0]
    assert trainer.state.best_model_checkpoint is not None

    # resume from latest checkpoint
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    # resume from specific checkpoint saved in output directory
    trainer.train(resume_from_checkpoint="your-model/checkpoint-1")
    assert trainer.state.global_step == 2


def test_two_values_for_one_thing_are_an_error():
    from trainfn import Trainer, TrainingArguments

    with pytest.raises(ValueError, match=r"evaluation_strategy.*eval_strategy"):
        TrainingArguments("x", evaluation_strategy="epoch", eval_strategy="steps")
    with pytest.raises(ValueError, match=r"two names for one thing"):
        Trainer(gpt2(), TrainingArguments("x", **small()), processing_class=1, tokenizer=2)
    with pytest.raises(TypeError, match=r"hug_strategy.*hub_strategy"):
        TrainingArguments("x", hug_strategy="all_checkpoints")


# --- logging ------------------------------------------------------------------------------------------------------


def test_logging(capsys):
    import datasets
    import transformers

    from trainfn import TrainingArguments

    before = datasets.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    training_args = TrainingArguments("x", use_cpu=True)
    logger = logging.getLogger("my_app")
    handler = logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        log_level = training_args.get_process_log_level()
        assert log_level == logging.INFO  # as the text says
        logger.setLevel(log_level)
        datasets.utils.logging.set_verbosity(log_level)
        transformers.utils.logging.set_verbosity(log_level)
        logger.info("one line")
        assert "one line" in capsys.readouterr().out
    finally:
        logger.removeHandler(handler)
        datasets.utils.logging.set_verbosity(before[0])
        transformers.utils.logging.set_verbosity(before[1])


# --- a loss of one's own ------------------------------------------------------------------------------------------


def test_a_weighted_loss_in_the_old_signature(parts):
    from trainfn import Trainer, TrainingArguments

    class CustomTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            labels = inputs.pop("labels")
            # forward pass
            outputs = model(**inputs)
            logits = outputs.get("logits")
            # compute custom loss for 3 labels with different weights
            loss_fct = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], device=model.device))
            loss = loss_fct(logits.view(-1, self.model.config.num_labels), labels.view(-1))
            return (loss, outputs) if return_outputs else loss

    args = TrainingArguments("x", max_steps=2, save_strategy="no", **small())
    before = parts["model"].classifier.weight.detach().clone()
    CustomTrainer(parts["model"], args, train_dataset=parts["dataset"]["train"]).train()
    assert not torch.equal(parts["model"].classifier.weight, before)


def test_a_weighted_loss_in_the_new_signature(parts):
    """As corrected: the text itself has seven errors, and its method is misspelt."""
    from trainfn import Trainer, TrainingArguments

    class CustomTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            logits = outputs.get("logits")
            w = torch.tensor([1.0, 2.0, 3.0], device=model.device)
            reduction = "sum" if num_items_in_batch is not None else "mean"
            loss = nn.functional.cross_entropy(
                logits.view(-1, self.model.config.num_labels), labels.view(-1), weight=w, reduction=reduction
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    args = TrainingArguments("x", max_steps=2, gradient_accumulation_steps=2, save_strategy="no", **small())
    CustomTrainer(parts["model"], args, train_dataset=parts["dataset"]["train"]).train()


# --- callbacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["callback", "callbacks"])
def test_early_stopping(name, parts):
    from trainfn import Trainer, TrainerCallback, TrainingArguments

    class EarlyStoppingCallback(TrainerCallback):
        def __init__(self, num_steps=10):
            self.num_steps = num_steps

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step >= self.num_steps:
                return {"should_training_stop": True}
            else:
                return {}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trainer = Trainer(
            model=parts["model"],
            args=TrainingArguments("x", num_train_epochs=20, save_strategy="no", **small()),
            train_dataset=parts["dataset"]["train"],
            eval_dataset=parts["dataset"]["test"],
            data_collator=parts["data_collator"],
            compute_metrics=parts["compute_metrics"],
            **{name: [EarlyStoppingCallback()]},
        )
    trainer.train()
    assert trainer.state.global_step == 10


# --- features -----------------------------------------------------------------------------------------------------


def test_torch_compile():
    from trainfn import Trainer, TrainingArguments

    training_args = TrainingArguments(
        torch_compile=True,
        torch_compile_backend="aot_eager",  # the text has "inductor", which takes a minute
        torch_compile_mode=None,
        per_device_train_batch_size=4,
        max_steps=2,
        save_strategy="no",
        **small(),
    )
    trainer = Trainer(gpt2(), training_args, train_dataset=tokens())
    trainer.train()
    report = trainer._trainfn.run.step.explain()
    assert (report.graphs, report.breaks) == (1, 0)


def test_neftune():
    from trainfn import Trainer, TrainingArguments

    training_args = TrainingArguments("x", neftune_noise_alpha=0.1, max_steps=1, save_strategy="no", **small())
    model = gpt2()
    Trainer(model, args=training_args, train_dataset=tokens()).train()
    assert not any(m._forward_hooks for m in model.modules())


def test_dots_stand_for_what_is_left_out():
    from trainfn import Trainer, TrainingArguments

    assert TrainingArguments(..., neftune_noise_alpha=0.1).neftune_noise_alpha == 0.1
    with pytest.raises(ValueError, match=r"`\.\.\.` is a placeholder"):
        Trainer(..., args=TrainingArguments("x", **small()))


def test_liger_needs_its_package():
    from trainfn import Trainer, TrainingArguments

    with pytest.raises(ImportError, match=r"use_liger_kernel=True.*`pip install liger-kernel`"):
        Trainer(gpt2(), TrainingArguments("x", use_liger_kernel=True, max_steps=1, **small()), train_dataset=tokens())


def test_liger_gets_its_arguments(monkeypatch):
    """A stand-in for the package, whose kernels need a GPU: it notes what it is called with."""
    from trainfn import Trainer, TrainingArguments
    from trainfn.hf._run import _loop, _setup

    called = []
    monkeypatch.setattr(_setup, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(_loop, "apply_liger_kernel", lambda model, config: called.append((model, config)))
    config = {"rope": True, "cross_entropy": True, "rms_norm": False, "swiglu": True}
    options = {"use_liger_kernel": True, "liger_kernel_config": config, "max_steps": 1, "save_strategy": "no"}
    model = gpt2()
    Trainer(model, TrainingArguments("x", **options, **small()), train_dataset=tokens()).train()
    assert called == [(model, config)]


def test_every_name_of_the_text_can_be_imported():
    for name in (
        "Trainer", "TrainingArguments", "TrainerCallback", "Seq2SeqTrainer", "Seq2SeqTrainingArguments", "AutoConfig",
        "AutoTokenizer", "AutoModelForCausalLM", "EarlyStoppingCallback", "EvalPrediction",
    ):  # fmt: skip
        assert getattr(trainfn, name) is not None and name in dir(trainfn)
