"""`Trainer.evaluate` and `Trainer.predict`: those of transformers, and right for every batch size."""

import copy
import math
import random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trainfn as tfn
import trainfn.hf
from tests.hf.evaluation_cases import CASES, Rows, Stream, ours, theirs, tokenizer

EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
TOKENS, SINGLE = CASES["tokens"], CASES["single label"]
COUNT = 7


def leaves(tree):
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, tuple | list) else [tree]


def same(a, b):
    assert len(leaves(a)) == len(leaves(b))
    for mine, other in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype


def argmax(logits, labels):
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(prediction):
    kept = prediction.label_ids != -100
    return {"accuracy": (prediction.predictions == prediction.label_ids)[kept].mean()}


# ---- as transformers ----


@EACH_CASE
@pytest.mark.parametrize("size", [1, 3, 8])
def test_predictions_are_those_of_transformers(case, size, tmp_path):
    options = {"per_device_eval_batch_size": size, "eval_accumulation_steps": 2}
    mine = ours(case, tmp_path, **options).predict(case.rows(COUNT))
    other = theirs(case, tmp_path, **options).predict(case.rows(COUNT))
    same(mine.predictions, other.predictions)
    same(mine.label_ids, other.label_ids)
    assert set(mine.metrics) == set(other.metrics) - {"test_model_preparation_time"}
    if size >= COUNT and case is not CASES["gpt2"]:  # they divide its loss by labels that it does not predict
        assert mine.metrics["test_loss"] == pytest.approx(other.metrics["test_loss"], rel=1e-6)


@EACH_CASE
def test_the_loss_does_not_depend_on_the_batch_size(case, tmp_path):
    losses = [
        ours(case, tmp_path, per_device_eval_batch_size=size).evaluate(case.rows(COUNT))["eval_loss"]
        for size in (1, 2, 5, 7, 8)
    ]
    whole = case.model().eval()(**case.collator()(case.rows(COUNT))).loss.item()
    np.testing.assert_allclose(losses, whole, rtol=2e-6)


@settings(max_examples=15)
@given(rows=st.lists(st.lists(st.sampled_from([-100, 0, 1, 2]), min_size=1, max_size=6), min_size=1, max_size=8))
def test_ragged_masked_tokens_weigh_the_same_in_any_batch(rows, tmp_path_factory):
    rows = [{"input_ids": [3 + t for t in range(len(labels))], "labels": labels} for labels in [*rows, [1]]]
    trainer = ours(TOKENS, tmp_path_factory.getbasetemp())
    losses = []
    for size in (1, 2, 3, len(rows)):
        trainer.args.per_device_eval_batch_size = size
        losses.append(trainer.evaluate(rows)["eval_loss"])
    np.testing.assert_allclose(losses, losses[-1], rtol=2e-6)


def test_the_ragged_batches_of_transformers_do_depend_on_it(tmp_path):
    """So the test above tests something."""
    losses = {
        theirs(TOKENS, tmp_path, per_device_eval_batch_size=size).evaluate(TOKENS.rows(COUNT))["eval_loss"]
        for size in (2, 5)
    }
    assert max(losses) - min(losses) > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("case", [TOKENS, CASES["causal"], CASES["seq2seq"]], ids=["tokens", "causal", "seq2seq"])
def test_label_smoothing(case, smoothing, tmp_path):
    options = {"label_smoothing_factor": smoothing}
    if case is CASES["seq2seq"]:  # the labels are taken away, and T5 needs something to decode
        options["data_collator"] = transformers.DataCollatorForSeq2Seq(tokenizer(), model=case.model())
    whole = theirs(case, tmp_path, **options).evaluate(case.rows(COUNT))["eval_loss"]
    mine = ours(case, tmp_path, per_device_eval_batch_size=2, **options).evaluate(case.rows(COUNT))["eval_loss"]
    assert mine == pytest.approx(whole, rel=2e-6)


def test_compute_loss_func(tmp_path):
    def summed(outputs, labels, num_items_in_batch=None):
        return (
            3
            * nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
            / (num_items_in_batch)
        )

    options = {"compute_loss_func": summed}
    whole = theirs(TOKENS, tmp_path, **options).evaluate(TOKENS.rows(COUNT))["eval_loss"]
    mine = ours(TOKENS, tmp_path, per_device_eval_batch_size=2, **options).evaluate(TOKENS.rows(COUNT))["eval_loss"]
    assert mine == pytest.approx(whole, rel=2e-6)


@pytest.mark.parametrize("library", [theirs, ours])
def test_metrics_of_predictions_inputs_and_losses(library, tmp_path):
    seen = []

    def compute_metrics(prediction):
        predictions, labels, inputs, losses = prediction
        seen.append((predictions, labels, inputs))
        assert losses.shape == (COUNT,)
        return {"accuracy": accuracy(prediction)["accuracy"], "eval_named": np.float32(2), "tensor": torch.tensor(3)}

    trainer = library(
        TOKENS,
        tmp_path,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=argmax,
        include_for_metrics=["inputs", "loss"],
        per_device_eval_batch_size=3,
    )
    metrics = trainer.evaluate(TOKENS.rows(COUNT))
    predictions, labels, inputs = seen[0]
    assert predictions.shape == labels.shape == inputs.shape == (COUNT, 6)
    assert (labels[0] == [-100, 1, -100, -100, -100, -100]).all() or (labels[0][2:] == -100).all()
    assert metrics["eval_accuracy"] == ((predictions == labels) & (labels != -100)).sum() / (labels != -100).sum()
    assert (metrics["eval_named"], metrics["eval_tensor"]) == (2.0, 3)
    assert all(isinstance(value, int | float) for value in metrics.values())


@pytest.mark.parametrize("library", [theirs, ours])
def test_batch_eval_metrics(library, tmp_path):
    calls, right = [], []

    def compute_metrics(prediction, compute_result):
        calls.append((len(prediction.predictions), sorted(prediction.inputs), compute_result))
        right.extend((prediction.predictions.argmax(-1) == prediction.label_ids).tolist())
        return {"accuracy": np.mean(right)} if compute_result else None

    options = {"batch_eval_metrics": True, "include_for_metrics": ["inputs"], "per_device_eval_batch_size": 3}
    trainer = library(SINGLE, tmp_path, compute_metrics=compute_metrics, **options)
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(SINGLE.rows(COUNT)), "Evaluation")
    names = ["attention_mask", "input_ids", "labels"]
    assert calls == [(3, names, False), (3, names, False), (1, names, True)]
    assert output.metrics["eval_accuracy"] == np.mean(right)
    assert output.predictions is None
    assert output.label_ids is None
    assert trainer.predict(SINGLE.rows(COUNT)).predictions.shape == (COUNT, 3)


@pytest.mark.parametrize("size", [2, 3])
def test_batches_may_stay_apart(size, tmp_path):
    options = {"eval_do_concat_batches": False, "per_device_eval_batch_size": size, "eval_accumulation_steps": 2}
    mine = ours(TOKENS, tmp_path, **options).predict(TOKENS.rows(COUNT))
    other = theirs(TOKENS, tmp_path, **options).predict(TOKENS.rows(COUNT))
    assert isinstance(mine.predictions, list)
    same(mine.predictions, other.predictions)
    same(mine.label_ids, other.label_ids)


def test_accumulation_steps_move_outputs_to_the_host(tmp_path, monkeypatch):
    moved = []
    container = transformers.trainer_pt_utils.EvalLoopContainer
    move = container.to_cpu_and_numpy
    monkeypatch.setattr(container, "to_cpu_and_numpy", lambda self: moved.append(len(self.tensors or ())) or move(self))
    ours(SINGLE, tmp_path, per_device_eval_batch_size=1, eval_accumulation_steps=2).predict(SINGLE.rows(COUNT))
    assert max(moved) == 2


# ---- datasets ----


@pytest.mark.parametrize("wrap", [list, Rows, Stream, datasets.Dataset.from_list], ids=["list", "map", "stream", "hf"])
def test_every_kind_of_dataset(wrap, tmp_path):
    trainer = ours(SINGLE, tmp_path, per_device_eval_batch_size=3)
    output = trainer.predict(wrap(SINGLE.rows(COUNT)))
    assert output.predictions.shape == (COUNT, 3)
    metrics = trainer.evaluate(wrap(SINGLE.rows(COUNT)))
    assert metrics["eval_loss"] == output.metrics["test_loss"]
    assert metrics["eval_samples_per_second"] > metrics["eval_steps_per_second"] > 0


def test_datasets_by_name(tmp_path):
    both = {"en": SINGLE.rows(3), "de": SINGLE.rows(5)}
    trainer = ours(SINGLE, tmp_path, eval_dataset=both)
    metrics = trainer.evaluate()
    other = theirs(SINGLE, tmp_path, eval_dataset=both).evaluate()
    assert set(metrics) == {key for key in other if not key.endswith("preparation_time")}
    assert trainer.evaluate("de")["eval_loss"] == metrics["eval_de_loss"] != metrics["eval_en_loss"]
    assert trainer.evaluate({"x": both["en"]}, metric_key_prefix="val")["val_x_loss"] == metrics["eval_en_loss"]
    with pytest.raises(ValueError, match=r"evaluate\('fr'\)`: a string names one .* which has \['de', 'en'\]"):
        trainer.evaluate("fr")


@pytest.mark.parametrize("call", ["evaluate", "predict"])
@pytest.mark.parametrize("wrap", [Rows, Stream], ids=["map", "stream"])
def test_an_empty_dataset_is_refused(call, wrap, tmp_path):
    with pytest.raises(ValueError, match=rf"`trainer.{call}\(...\)`: the dataset gave no batch"):
        getattr(ours(SINGLE, tmp_path), call)(wrap([]))


@pytest.mark.parametrize("library", [theirs, ours])
def test_rows_without_labels_have_no_loss_and_no_metrics(library, tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in SINGLE.rows(COUNT)]
    trainer = library(SINGLE, tmp_path, compute_metrics=accuracy)
    output = trainer.predict(rows)
    assert output.predictions.shape == (COUNT, 3)
    assert output.label_ids is None
    assert set(output.metrics) - {"test_model_preparation_time"} == {
        "test_runtime",
        "test_samples_per_second",
        "test_steps_per_second",
    }


def test_loss_only(tmp_path):
    trainer = ours(SINGLE, tmp_path, prediction_loss_only=True, compute_metrics=accuracy)
    output = trainer.predict(SINGLE.rows(COUNT))
    assert output.predictions is None
    assert "test_loss" in output.metrics
    assert "test_accuracy" not in output.metrics


# ---- prediction_step and its overrides ----


@EACH_CASE
@pytest.mark.parametrize("loss_only", [False, True])
def test_prediction_step_is_that_of_transformers(case, loss_only, tmp_path):
    mine, other = ours(case, tmp_path), theirs(case, tmp_path)
    batch = case.collator()(case.rows(4))
    for model in (mine.model, other.model):
        model.eval()
    results = [t.prediction_step(t.model, dict(batch), loss_only) for t in (mine, other)]
    if case is not CASES["gpt2"]:
        torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][0].shape == ()
    for part, expected in zip(results[0][1:], results[1][1:], strict=True):
        assert (part is None) == (expected is None) == loss_only
        if not loss_only:
            same(part, expected)


def test_ignored_outputs_are_left_out(tmp_path):
    trainer = ours(CASES["hidden states"], tmp_path)
    assert isinstance(trainer.predict(SINGLE.rows(2), ignore_keys=["hidden_states"]).predictions, np.ndarray)


class Halved(trainfn.hf.Trainer):
    """Hands on another loss than the one it got, so its weight is had from the labels."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss / 2, logits, labels


class Raised(trainfn.hf.Trainer):
    """Changes the loss it got in place; or under inference mode, where nobody counts changes."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.inference_mode(len(inputs["labels"]) > 2):
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            loss += 1
            return loss, logits, labels


class Passed(trainfn.hf.Trainer):
    """Hands on the same loss, which remembers its weight."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        step = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self.seen = getattr(self, "seen", 0) + 1
        return step


class PerRow(trainfn.hf.Trainer):
    """One loss a row."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return inputs["labels"].ne(-100).sum(-1).float(), None, None


class Number(trainfn.hf.Trainer):
    """No tensors at all."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return 2.5, None, None


def test_overrides_of_prediction_step_are_weighed(tmp_path, monkeypatch):
    rows = TOKENS.rows(COUNT)
    whole = ours(TOKENS, tmp_path).evaluate(rows)["eval_loss"]
    counted = np.mean([sum(label != -100 for label in row["labels"]) for row in rows])
    expected = {Halved: whole / 2, Passed: whole, Raised: whole + 1, PerRow: counted, Number: 2.5}
    for kind, loss in expected.items():
        monkeypatch.setattr(trainfn.hf, "Own", kind, raising=False)
        for size in (1, 3, 8):
            trainer = ours(TOKENS, tmp_path, name="Own", per_device_eval_batch_size=size)
            assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss, rel=1e-5), kind


class OldLoss(trainfn.hf.Trainer):
    """`compute_loss` as it was written for transformers 4; it pops the labels."""

    def compute_loss(self, model, inputs, return_outputs=False):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = 10 * nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


def test_compute_loss_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setattr(trainfn.hf, "Own", OldLoss, raising=False)
    whole = ours(TOKENS, tmp_path).predict(TOKENS.rows(COUNT))
    for size in (1, 3):
        mine = ours(TOKENS, tmp_path, name="Own", per_device_eval_batch_size=size).predict(TOKENS.rows(COUNT))
        assert mine.metrics["test_loss"] == pytest.approx(10 * whole.metrics["test_loss"], rel=1e-5)
        same(mine.label_ids, whole.label_ids)


class Plain(nn.Module):
    """A model that has never heard of transformers, nor of labels."""

    def __init__(self):
        super().__init__()
        self.score = nn.Embedding(20, 3)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.score(input_ids)}


def test_a_plain_module_with_a_loss_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(trainfn.hf, "Own", OldLoss, raising=False)
    torch.manual_seed(0)
    model, rows, results = Plain(), TOKENS.rows(COUNT), []
    for size in (2, 8):
        options = {"model": model, "label_names": ["labels"], "per_device_eval_batch_size": size}
        results.append(ours(TOKENS, tmp_path, name="Own", **options).predict(rows))
    assert results[0].metrics["test_loss"] == pytest.approx(results[1].metrics["test_loss"], rel=1e-6)
    together, apart = results[1].predictions, results[0].predictions  # the second is padded to the longest of its two
    kept = apart != -100
    same(apart[kept], together[kept])


# ---- numbers that are none ----


def test_losses_that_are_not_finite_are_reported(tmp_path):
    model = SINGLE.model()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[5] = math.nan
    rows = [{"input_ids": [3], "labels": 0}, {"input_ids": [5], "labels": 0}, {"input_ids": [4], "labels": 1}]
    trainer = ours(SINGLE, tmp_path, model=model, per_device_eval_batch_size=1)
    with pytest.warns(tfn.errors.NonFiniteWarning, match=r"`eval_loss` is nan: the loss of 1 of 3 batches was NaN"):
        assert math.isnan(trainer.evaluate(rows)["eval_loss"])


def test_no_mean_of_nothing(tmp_path):
    rows = [{"input_ids": [3, 4], "labels": [-100, -100]}]
    with pytest.warns(tfn.errors.NonFiniteWarning, match=r"no label of 1 batches counts \(all are -100\)"):
        ours(TOKENS, tmp_path).evaluate(rows)


def test_metrics_must_be_a_dict(tmp_path):
    trainer = ours(SINGLE, tmp_path, compute_metrics=lambda prediction: 0.5)
    with pytest.raises(TypeError, match=r"compute_metrics\(...\) returned 0.5, but metrics are a dict .* `return \{"):
        trainer.evaluate(SINGLE.rows(2))


class OddCache:
    """Grows with each token, as a cache of keys and values does, and is not a tensor."""

    def __init__(self, keys):
        self.keys = keys


class Caching(nn.Module):
    """A classifier that hands out its caches, by whatever name and in whatever wrapping."""

    def __init__(self, wrap, **config):
        super().__init__()
        self.table, self.wrap = nn.Embedding(20, 3), wrap
        if config:
            self.config = transformers.PretrainedConfig(**config)

    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask[..., None]
        logits = (self.table(input_ids) * mask).sum(1) / mask.sum(1)
        given = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return self.wrap(given, logits, input_ids.float())


def named(*keys):
    return lambda loss, logits, ids: {**loss, "logits": logits, **{key: OddCache(ids) for key in keys}, "last": logits}


WRAPPED = {
    "a dict": named("memory_of_keys"),
    "two of them": named("cache", "past_key_values", "states"),
    "a tuple": lambda loss, logits, ids: (*loss.values(), logits, OddCache(ids), logits),
    "nested": lambda loss, logits, ids: {**loss, "logits": logits, "state": (ids, {"at": 3}), "last": logits},
    "of transformers": lambda loss, logits, ids: {
        **loss,
        "logits": logits,
        "memory": transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache()),
        "last": logits,
    },
}


@pytest.mark.parametrize("config", [{}, {"use_cache": True}, {"keys_to_ignore_at_inference": ["mems"]}])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_is_no_tensor_is_left_out_under_any_name(wrap, config, tmp_path):
    plain = ours(SINGLE, tmp_path, model=Caching(named(), **config), label_names=["labels"])
    caching = Caching(wrap, **config)
    caching.load_state_dict(plain.model.state_dict())
    trainer = ours(SINGLE, tmp_path, model=caching, label_names=["labels"], per_device_eval_batch_size=2)
    for rows in (SINGLE.rows(5), [{"input_ids": row["input_ids"]} for row in SINGLE.rows(5)]):
        expected = plain.predict(rows)
        for ignored in (None, ["nothing"]):
            found = trainer.predict(rows, ignore_keys=ignored)
            assert len(found.predictions) == len(expected.predictions) == 2
            np.testing.assert_allclose(found.predictions, expected.predictions, rtol=1e-5)
    assert trainer.evaluate(SINGLE.rows(5))["eval_loss"] == pytest.approx(
        plain.evaluate(SINGLE.rows(5))["eval_loss"], rel=1e-6
    )


def test_what_is_left_out_is_reported_once(tmp_path, caplog):
    trainer = ours(SINGLE, tmp_path, model=Caching(named("strange_cache")), label_names=["labels"])
    with caplog.at_level("WARNING", "trainfn.hf"):
        trainer.predict(SINGLE.rows(3))
        trainer.predict(SINGLE.rows(3))
    (record,) = caplog.records
    assert "output 'strange_cache' holds a OddCache, which is not a tensor, so it is left out" in record.getMessage()


def test_a_cache_of_tensors_is_known_by_its_name(tmp_path):
    def wrap(loss, logits, ids):
        return {**loss, "logits": logits, "past_key_values": ((ids, ids),), "cache": ids}

    model = Caching(wrap)
    model.config = SimpleNamespace(use_cache=True)  # that names nothing to ignore
    trainer = ours(SINGLE, tmp_path, model=model, label_names=["labels"])
    assert trainer.predict(SINGLE.rows(3)).predictions.shape == (3, 3)


def test_what_a_user_makes_of_outputs_must_be_tensors(tmp_path):
    trainer = ours(SINGLE, tmp_path, preprocess_logits_for_metrics=lambda logits, labels: object())
    with pytest.raises(TypeError, match=r"was given a object, which can't be concatenated. .*`forward`, `predict"):
        trainer.predict(SINGLE.rows(2))


def test_a_missing_main_input_is_named(tmp_path):
    trainer = ours(SINGLE, tmp_path, include_for_metrics=["inputs"], compute_metrics=accuracy)
    trainer.model.main_input_name = "pixel_values"
    with pytest.raises(ValueError, match=r"main input is 'pixel_values', but the batch has only \['attention_mask'"):
        trainer.evaluate(SINGLE.rows(2))


# ---- what is left as it was ----


class Recorder(transformers.TrainerCallback):
    def __init__(self):
        self.calls = []

    def on_prediction_step(self, args, state, control, **kwargs):
        self.calls.append("step")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.calls.append(("evaluate", sorted(metrics)))
        metrics.clear()  # as the notebook's progress bar takes some out

    def on_predict(self, args, state, control, metrics, **kwargs):
        self.calls.append(("predict", sorted(metrics)))
        metrics.clear()

    def on_log(self, args, state, control, logs, **kwargs):
        self.calls.append("log")


def test_events_and_keys(tmp_path):
    recorder = Recorder()
    trainer = ours(SINGLE, tmp_path, callbacks=[recorder], per_device_eval_batch_size=4)
    trainer.state.epoch = 1.5
    metrics = trainer.evaluate(SINGLE.rows(COUNT))
    keys = ["epoch", "eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"]
    assert sorted(metrics) == keys
    assert recorder.calls == ["step", "step", "log", ("evaluate", keys)]
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]
    recorder.calls.clear()
    output = trainer.predict(SINGLE.rows(COUNT))
    keys = [key.replace("eval", "test") for key in keys[1:]]
    assert sorted(output.metrics) == keys
    assert recorder.calls == ["step", "step", ("predict", keys)]
    assert len(trainer.state.log_history) == 1


def untouched(model):
    modes = [module.training for module in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    tensors = [(t.dtype, t.data_ptr(), t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    return modes, hooks, tensors


@pytest.mark.parametrize("precision", [{}, {"bf16_full_eval": True}, {"fp16_full_eval": True}], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_generators_are_left_as_found(precision, fails, tmp_path, untouched_rng):
    class Failing(Recorder):
        def on_prediction_step(self, args, state, control, model, **kwargs):
            assert not any(module.training for module in model.modules())
            if precision:
                assert all(p.dtype != torch.float32 for p in model.parameters())
            np.random.rand()
            random.random()
            torch.rand(())
            if fails:
                raise KeyboardInterrupt

    trainer = ours(SINGLE, tmp_path, callbacks=[Failing()], **precision)
    trainer.model.train()
    trainer.model.classifier.eval()
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    before = untouched(trainer.model)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            trainer.evaluate(SINGLE.rows(3))
    else:
        dtype = {"bf16_full_eval": torch.bfloat16, "fp16_full_eval": torch.float16}.get(
            next(iter(precision), ""), torch.float32
        )
        narrow = copy.deepcopy(trainer.model).to(dtype).eval()
        batch = SINGLE.collator()(SINGLE.rows(3))
        with torch.no_grad():
            expected = narrow(**{"labels" if name == "label" else name: x for name, x in batch.items()}).loss.item()
        loss = trainer.evaluate(SINGLE.rows(3))["eval_loss"]
        assert loss == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 4e-3)  # half an ulp of bfloat16
    after = untouched(trainer.model)
    assert before[:2] == after[:2]
    for old, new in zip(before[2], after[2], strict=True):
        assert old[:2] == new[:2]
        assert torch.equal(old[2], new[2])
    assert torch.is_grad_enabled()


def test_schedule_free_optimizers_show_their_averages(tmp_path):
    class Averaging:
        def __init__(self):
            self.param_groups, self.calls = [{"train_mode": True}], []

        def eval(self):
            self.calls.append("eval")

        def train(self):
            self.calls.append("train")

    trainer = ours(SINGLE, tmp_path)
    trainer.optimizer = Averaging()
    trainer.evaluate(SINGLE.rows(2))
    assert trainer.optimizer.calls == ["eval", "train"]


def test_mixed_precision_gives_predictions_in_float32(tmp_path):
    trainer = ours(SINGLE, tmp_path, bf16=True)
    output = trainer.predict(SINGLE.rows(3))
    exact = ours(SINGLE, tmp_path).predict(SINGLE.rows(3))
    assert output.predictions.dtype == np.float32
    np.testing.assert_allclose(output.predictions, exact.predictions, atol=0.02)
    assert (output.predictions != exact.predictions).any()


def test_training_does_not_notice_evaluations(tmp_path):
    rows, trained = TOKENS.rows(COUNT), []
    for strategy in ("no", "steps"):
        options = {"eval_strategy": strategy, "eval_steps": 1, "num_train_epochs": 2, "save_strategy": "no"}
        options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "learning_rate": 0.01}
        trainer = ours(TOKENS, tmp_path / strategy, train_dataset=rows, eval_dataset=rows, **options)
        trainer.train()
        trained.append([p.detach().clone() for p in trainer.model.parameters()])
        logs = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logs) == 8
    assert logs[-1] < logs[0]
    assert trainer.evaluate()["eval_loss"] == logs[-1]
    for a, b in zip(*trained, strict=True):
        assert torch.equal(a, b)
