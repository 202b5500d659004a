"""`Seq2SeqTrainer`: generated predictions, as long as each call asks for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import DataCollatorForSeq2Seq, GenerationConfig

import trainfn.hf
from tests.hf.evaluation_cases import CASES, VOCAB, ids, t5, tokenizer
from tests.hf.evaluation_cases import ours as build_ours
from tests.hf.evaluation_cases import theirs as build_theirs
from trainfn.hf._run._setup import new_model
from trainfn.hf._seq2seq import pad_token

CASE = CASES["seq2seq"]
COUNT = 5
ROWS = CASE.rows(COUNT)


def ours(tmp_path, **options):
    options = {"predict_with_generate": True, "processing_class": tokenizer(), "name": "Seq2SeqTrainer", **options}
    return build_ours(CASE, tmp_path, **options)


def theirs(tmp_path, **options):
    options = {"predict_with_generate": True, "processing_class": tokenizer(), "name": "Seq2SeqTrainer", **options}
    return build_theirs(CASE, tmp_path, **options)


def by_hand(**gen_kwargs):
    """The tokens that the model generates, one row at a time."""
    model = t5().eval()
    return [model.generate(input_ids=torch.tensor([row["input_ids"]]), **gen_kwargs)[0].tolist() for row in ROWS]


def trimmed(tokens):
    return [np.trim_zeros(row[row != -100][1:], "b").tolist() for row in tokens]


def exact_match(prediction):
    predictions = np.where(prediction.predictions == -100, 0, prediction.predictions)
    labels = np.where(prediction.label_ids == -100, 0, prediction.label_ids)
    texts = tokenizer().batch_decode(predictions, skip_special_tokens=True)
    truths = tokenizer().batch_decode(labels, skip_special_tokens=True)
    return {"match": np.mean([a == b for a, b in zip(texts, truths, strict=True)]), "length": predictions.shape[-1]}


# ---- as transformers, where transformers pads to what was asked ----


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("gen_kwargs", [{}, {"num_beams": 2}, {"num_beams": 3, "length_penalty": 0.5}], ids=str)
def test_predictions_and_metrics_are_those_of_transformers(size, gen_kwargs, tmp_path):
    options = {"per_device_eval_batch_size": size, "compute_metrics": exact_match}
    mine = ours(tmp_path, **options).predict(ROWS, **gen_kwargs)
    other = theirs(tmp_path, **options).predict(ROWS, **gen_kwargs)
    np.testing.assert_array_equal(mine.predictions, other.predictions)
    np.testing.assert_array_equal(mine.label_ids, other.label_ids)
    assert mine.predictions.shape == (COUNT, 20)
    assert mine.metrics["test_match"] == other.metrics["test_match"]
    assert set(mine.metrics) == set(other.metrics) - {"test_model_preparation_time"}
    if size >= COUNT:
        assert mine.metrics["test_loss"] == pytest.approx(other.metrics["test_loss"], rel=1e-6)


def test_without_generation_it_is_a_trainer(tmp_path):
    mine = ours(tmp_path, predict_with_generate=False).predict(ROWS)
    other = theirs(tmp_path, predict_with_generate=False).predict(ROWS)
    for a, b in zip(mine.predictions, other.predictions, strict=True):
        np.testing.assert_array_equal(a, b)
    assert mine.metrics["test_loss"] == pytest.approx(other.metrics["test_loss"], rel=1e-6)


# ---- what each call asks for ----


@pytest.mark.parametrize(
    ("gen_kwargs", "width"),
    [
        ({"max_length": 9}, 9),
        ({"max_new_tokens": 6}, 7),
        ({"max_new_tokens": 6, "num_beams": 2}, 7),
        ({"max_length": 30}, 30),
        ({"max_length": None, "num_beams": None}, 20),
        ({"generation_config": GenerationConfig(max_new_tokens=7)}, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_call_gets_the_length_it_asks_for(gen_kwargs, width, size, tmp_path):
    trainer = ours(tmp_path, per_device_eval_batch_size=size, compute_metrics=exact_match)
    config = trainer.model.generation_config.to_dict()
    output = trainer.predict(ROWS, **gen_kwargs)
    assert output.predictions.shape == output.label_ids.shape == (COUNT, width)
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    assert trimmed(output.predictions) == trimmed([np.array(row) for row in by_hand(**given)])
    assert trainer.evaluate(ROWS, **gen_kwargs)["eval_length"] == width
    assert trainer.model.generation_config.to_dict() == config


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
def test_without_any_length_there_are_twenty_new_tokens(tmp_path):
    trainer = ours(tmp_path, per_device_eval_batch_size=2)
    trainer.model.generation_config.max_length = None
    output = trainer.predict(ROWS)
    assert output.predictions.shape == (COUNT, 21)
    assert trainer.model.generation_config.max_length is None


def test_the_length_of_a_call_outranks_the_config(tmp_path):
    config = GenerationConfig(max_new_tokens=9, decoder_start_token_id=0, pad_token_id=0)
    trainer = ours(tmp_path, generation_config=config)
    assert trainer.predict(ROWS).predictions.shape == (COUNT, 10)
    assert trainer.predict(ROWS, max_length=5).predictions.shape == (COUNT, 5)
    assert trainer.predict(ROWS, max_new_tokens=5).predictions.shape == (COUNT, 6)


def test_the_training_arguments_fill_in(tmp_path, monkeypatch):
    trainer = ours(tmp_path, generation_max_length=6, generation_num_beams=2)
    seen = []
    generate = trainer.model.generate
    monkeypatch.setattr(trainer.model, "generate", lambda **given: seen.append(given) or generate(**given))
    for gen_kwargs in ({}, {"max_length": 8}, {"max_new_tokens": 3}, {"num_beams": 1}):
        trainer.predict(ROWS, **gen_kwargs)
    pick = [{k: g[k] for k in ("max_length", "max_new_tokens", "num_beams") if k in g} for g in seen]
    assert pick == [
        {"max_length": 6, "num_beams": 2},
        {"max_length": 8, "num_beams": 2},
        {"max_new_tokens": 3, "num_beams": 2},
        {"max_length": 6, "num_beams": 1},
    ]
    assert all("labels" not in given for given in seen)
    assert trainer._gen_kwargs is None


def test_the_arguments_of_a_call_reach_every_dataset(tmp_path):
    trainer = ours(tmp_path, eval_dataset={"a": ROWS[:2], "b": ROWS[2:]}, compute_metrics=exact_match)
    metrics = trainer.evaluate(max_length=7)
    assert (metrics["eval_a_length"], metrics["eval_b_length"]) == (7, 7)


def test_labels_longer_than_asked_stay_whole(tmp_path):
    output = ours(tmp_path, per_device_eval_batch_size=1).predict(ROWS, max_length=4)
    longest = max(len(row["labels"]) for row in ROWS)
    assert output.label_ids.shape == (COUNT, longest)
    for row, labels in zip(ROWS, output.label_ids, strict=True):
        width = max(4, len(row["labels"]))
        assert labels.tolist() == (row["labels"] + [0] * (width - len(row["labels"])) + [-100] * (longest - width))


def test_rows_without_labels(tmp_path):
    output = ours(tmp_path).predict([{"input_ids": row["input_ids"]} for row in ROWS])
    assert output.predictions.shape == (COUNT, 20)
    assert output.label_ids is None
    assert "test_loss" not in output.metrics


@pytest.mark.parametrize("library", [theirs, ours])
def test_decoder_inputs_made_of_labels_are_not_shown(library, tmp_path):
    collator = DataCollatorForSeq2Seq(tokenizer(), model=t5())
    output = library(tmp_path, data_collator=collator).predict(ROWS)
    plain = ours(tmp_path).predict(ROWS)
    np.testing.assert_array_equal(output.predictions, plain.predictions)


@pytest.mark.parametrize("library", [theirs, ours])
def test_decoder_inputs_that_are_a_prompt_are_continued(library, tmp_path):
    def collate(rows):
        padded = transformers.DataCollatorWithPadding(tokenizer())(rows)
        return {**padded, "decoder_input_ids": torch.tensor([[0, 7, 9]] * len(rows))}

    trainer = library(tmp_path, data_collator=collate)
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    assert (trainer.predict(rows).predictions[:, :3] == [0, 7, 9]).all()


def test_prediction_step_takes_arguments_of_its_own(tmp_path):
    trainer = ours(tmp_path)
    loss, tokens, labels = trainer.prediction_step(trainer.model.eval(), CASE.collator()(ROWS), False, max_length=6)
    assert tokens.shape == labels.shape == (COUNT, 6)
    assert loss.shape == ()
    trainer.args.prediction_loss_only = True
    assert trainer.prediction_step(trainer.model, CASE.collator()(ROWS), False)[1:] == (None, None)


# ---- the loss ----


@pytest.mark.parametrize("generate", [False, True])
def test_the_loss_is_that_of_a_trainer(generate, tmp_path):
    """Label smoothing, `compute_loss_func` and `compute_loss` hold whether or not there is something to generate."""

    def tripled(outputs, labels, num_items_in_batch=None):
        total = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return 3 * total / num_items_in_batch

    collator = DataCollatorForSeq2Seq(tokenizer(), model=t5())
    options = {"data_collator": collator, "predict_with_generate": generate}
    plain = build_theirs(CASE, tmp_path).evaluate(ROWS)["eval_loss"]
    smooth = build_theirs(CASE, tmp_path, data_collator=collator, label_smoothing_factor=0.3)
    smooth = smooth.evaluate(ROWS)["eval_loss"]
    for size in (2, 8):
        options["per_device_eval_batch_size"] = size
        losses = [
            ours(tmp_path, **options).evaluate(ROWS),
            ours(tmp_path, **options, compute_loss_func=tripled).evaluate(ROWS),
            ours(tmp_path, **options, label_smoothing_factor=0.3).evaluate(ROWS),
        ]
        expected = [plain, 3 * plain, smooth]
        np.testing.assert_allclose([metrics["eval_loss"] for metrics in losses], expected, rtol=2e-6)


# ---- generation configs ----


def test_generation_config_of_the_arguments(tmp_path):
    config = GenerationConfig(max_length=11, num_beams=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    config.save_pretrained(tmp_path)
    for given in (config, str(tmp_path), tmp_path, tmp_path / "generation_config.json"):
        trainer = ours(tmp_path, generation_config=given)
        assert trainer.model.generation_config.max_length == 11
        assert trainer.model.generation_config is not config
        assert trainer.predict(ROWS).predictions.shape == (COUNT, 11)


def test_generation_config_survives_model_init(tmp_path):
    config = GenerationConfig(max_length=11, decoder_start_token_id=0, pad_token_id=0)
    args = trainfn.hf.Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", predict_with_generate=True, generation_config=config
    )
    trainer = trainfn.hf.Seq2SeqTrainer(
        model_init=lambda: t5(), args=args, data_collator=CASE.collator(), processing_class=tokenizer()
    )
    trainer.remove_callback(transformers.ProgressCallback)
    new_model(trainer)
    assert trainer.predict(ROWS).predictions.shape == (COUNT, 11)


def test_contradicting_generation_configs_are_refused(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.5}))
    with pytest.raises(ValueError, match=r"generation_config=.*its values contradict each other, and `save_model`"):
        trainfn.hf.Seq2SeqTrainer.load_generation_config(Path(path))


def test_other_generation_configs_are_refused():
    with pytest.raises(
        TypeError, match=r"generation_config=7\)` can't work: it is of type int.*=GenerationConfig\(max_length=64"
    ):
        trainfn.hf.Seq2SeqTrainer.load_generation_config(7)


def test_padding_needs_a_token(tmp_path):
    trainer = ours(tmp_path, processing_class=None)
    assert pad_token(trainer) == 0
    for config in (trainer.model.config, trainer.model.generation_config):
        config.pad_token_id = config.eos_token_id = None
    with pytest.raises(ValueError, match=r"neither the tokenizer nor the model has a pad .*pad_token_id = 0"):
        pad_token(trainer)
    trainer.model.generation_config.eos_token_id = [3, 4]
    assert pad_token(trainer) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails, tmp_path, untouched_rng):
    trainer = ours(tmp_path, compute_metrics=(lambda prediction: 1 / 0) if fails else exact_match)
    trainer.model.train()
    if fails:
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate(ROWS, do_sample=True, max_length=5)
    else:
        trainer.evaluate(ROWS, do_sample=True, max_length=5)
    assert all(module.training for module in trainer.model.modules())
    assert trainer._gen_kwargs is None
    assert (VOCAB, len(ids(1))) == (20, 5)
