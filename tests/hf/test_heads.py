"""The divisors of heads: the update and the evaluation are those of the whole batch, for every split.

The oracle is the head itself, called with all rows at once, and plain gradient descent on that.
"""

import copy
import warnings
from typing import ClassVar

import pytest
import torch
import transformers as tr
import transformers.image_transforms
import transformers.loss.loss_for_object_detection
from torch import nn

from tests.hf.models import bert, classes, seeded, tokens
from trainfn import Trainer, TrainingArguments
from trainfn.hf._step._additive import SplitDependentLossWarning

ROWS = 8
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {**SMALL, **DRY, "image_size": 8, "patch_size": 2, "num_channels": 3}
SPEECH = {
    **SMALL, "vocab_size": 12, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "layerdrop": 0.0,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0,
    "apply_spec_augment": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "final_dropout": 0.0, "ctc_zero_infinity": True,
}  # fmt: skip


def drawing():
    return torch.Generator().manual_seed(1)


def made(make):
    draw = drawing()
    return [make(i, draw) for i in range(ROWS)]


def questions():
    return made(
        lambda i, draw: {
            "input_ids": torch.randint(3, 11, (10,), generator=draw),
            "start_positions": 50 if i % 3 else 2,  # outside of the window, and so ignored
            "end_positions": 50 if i % 2 else 4,
        }
    )


def pairs(label):
    return [{**row, label: i % 2} for i, row in enumerate(tokens(ROWS))]


def sentences():
    return [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(tokens(ROWS))]


def choices():
    return made(lambda i, draw: {"input_ids": torch.randint(1, 11, (3, 5), generator=draw), "labels": i % 3})


def replaced():
    return [{**row, "labels": (row["input_ids"] % 2).long()} for row in tokens(ROWS)]


def utterances():
    def row(i, draw):
        n = int(torch.randint(1, 9, (), generator=draw))
        labels = torch.full((8,), -100)
        labels[:n] = torch.randint(1, 12, (n,), generator=draw)
        return {"input_values": torch.randn(400, generator=draw), "labels": labels}

    return made(row)


def spoken():
    def row(i, draw):
        labels = torch.randn(8, 4, generator=draw)
        labels[2 + i % 5 :] = -100.0
        return {"input_ids": torch.randint(4, 11, (5,), generator=draw), "labels": labels}

    return made(row)


def images(**more):
    def row(i, draw):
        values = {"pixel_values": torch.randn(3, 8, 8, generator=draw)}
        return {**values, **{name: make(i, draw) for name, make in more.items()}}

    return made(row)


def boxes(i, draw):
    n = 1 + i % 3
    return {
        "class_labels": torch.randint(0, 4, (n,), generator=draw),
        "boxes": torch.rand(n, 4, generator=draw) / 4 + 0.3,
    }


def in_lists(rows):
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    return {**batch, "labels": [row["labels"] for row in rows]}


def mask(i, draw):
    return torch.arange(16) < 3 + i


def segments(i, draw):
    return torch.where(torch.rand(8, 8, generator=draw) < 0.1 * i, 255, torch.randint(0, 4, (8, 8), generator=draw))


def speecht5():
    config = tr.SpeechT5Config(
        vocab_size=11, hidden_size=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4, reduction_factor=2,
        speech_decoder_prenet_units=8, speech_decoder_postnet_units=8, speech_decoder_postnet_layers=2,
        speech_decoder_prenet_dropout=0.0, speech_decoder_postnet_dropout=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, positional_dropout=0.0, encoder_layerdrop=0.0,
        decoder_layerdrop=0.0, use_guided_attention_loss=False,
    )  # fmt: skip
    model = rows_apart(lambda: tr.SpeechT5ForTextToSpeech(config))
    model.speecht5.decoder.prenet._consistent_dropout = lambda inputs, p: inputs
    return model


class InEvaluation(nn.BatchNorm1d):
    """A batch norm that does not see the other rows."""

    def train(self, mode=True):
        return nn.Module.train(self, False)


class InEvaluation2d(nn.BatchNorm2d):
    train = InEvaluation.train


def rows_apart(make):
    """A seeded model in which no row sees another, and no parameter is left out."""
    model = seeded(make)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__ = InEvaluation if isinstance(module, nn.BatchNorm1d) else InEvaluation2d
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in ("masked_spec_embed", "mid_position", "speaker_embeds")))
    return model


def yolos():
    config = tr.YolosConfig(**{**IMAGE, "image_size": [8, 8], "num_detection_tokens": 5, "num_labels": 4})
    return rows_apart(lambda: tr.YolosForObjectDetection(config))


def of(kind, config, sizes, **options):
    return lambda: rows_apart(lambda: kind(config(**{**sizes, **options})))


TEXT = {**SMALL, **DRY, "vocab_size": 11}
ALBERT = {**TEXT, "embedding_size": 8, "classifier_dropout_prob": 0.0}
ELECTRA = {**TEXT, "embedding_size": 8}
SEGFORMER = {
    "num_labels": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "num_attention_heads": [1] * 4,
    "decoder_hidden_size": 8, "hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0.0, "drop_path_rate": 0.0,
    "patch_sizes": [3, 3, 3, 3], "strides": [2, 2, 1, 1], "sr_ratios": [1] * 4,
}  # fmt: skip

# Each head with its rows, what collates them, and the names of its labels if transformers does not find them.
HEADS = {
    "questions": (lambda: bert(tr.BertForQuestionAnswering), questions, {}),
    "pretraining": (lambda: bert(tr.BertForPreTraining), lambda: pairs("next_sentence_label"), {}),
    "albert pretraining": (
        of(tr.AlbertForPreTraining, tr.AlbertConfig, ALBERT), lambda: pairs("sentence_order_label"), {}),
    "next sentence": (lambda: bert(tr.BertForNextSentencePrediction), sentences, {}),
    "masked words": (lambda: bert(tr.BertForMaskedLM), lambda: tokens(ROWS), {}),
    "multiple choice": (lambda: bert(tr.BertForMultipleChoice), choices, {}),
    "replaced tokens": (of(tr.ElectraForPreTraining, tr.ElectraConfig, ELECTRA), replaced, {}),
    "ctc mean": (of(tr.Wav2Vec2ForCTC, tr.Wav2Vec2Config, SPEECH, ctc_loss_reduction="mean"), utterances, {}),
    "ctc sum": (of(tr.Wav2Vec2ForCTC, tr.Wav2Vec2Config, SPEECH, ctc_loss_reduction="sum"), utterances, {}),
    "spectrograms": (speecht5, spoken, {"label_names": ["labels"]}),
    "masked image": (
        of(tr.ViTForMaskedImageModeling, tr.ViTConfig, IMAGE, encoder_stride=2),
        lambda: images(bool_masked_pos=mask), {"label_names": ["bool_masked_pos"]}),
    "autoencoder": (
        of(tr.ViTMAEForPreTraining, tr.ViTMAEConfig, IMAGE, decoder_hidden_size=8, decoder_num_hidden_layers=1,
           decoder_num_attention_heads=2, decoder_intermediate_size=16),
        lambda: images(noise=lambda i, draw: torch.rand(16, generator=draw)), {"label_names": ["pixel_values"]}),
    "segmentation": (
        of(tr.SegformerForSemanticSegmentation, tr.SegformerConfig, SEGFORMER), lambda: images(labels=segments), {}),
    "image classes": (
        of(tr.ViTForImageClassification, tr.ViTConfig, IMAGE, num_labels=3),
        lambda: images(labels=lambda i, draw: i % 3), {}),
    "boxes": (yolos, lambda: images(labels=boxes), {"collator": in_lists}),
}  # fmt: skip


def trainer(folder, head, size, accumulate):
    make, data, how = HEADS[head]
    rows = data()
    args = TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", log_level="error", save_strategy="no",
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, per_device_eval_batch_size=size,
        max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, logging_steps=1, remove_unused_columns=False,
        label_names=how.get("label_names"), train_sampling_strategy="sequential",
    )  # fmt: skip
    collate = how.get("collator", tr.default_data_collator)
    return Trainer(make(), args, collate, train_dataset=rows, eval_dataset=rows), collate(rows)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)])
def test_the_loss_of_a_head_is_that_of_all_rows(head, size, accumulate, tmp_path, monkeypatch):
    # transformers imports this function only where Pillow is installed, which it does not need.
    corners = tr.image_transforms.center_to_corners_format
    monkeypatch.setattr(tr.loss.loss_for_object_detection, "center_to_corners_format", corners, raising=False)
    made, batch = trainer(tmp_path, head, size, accumulate)
    model = copy.deepcopy(made.model).train()
    loss = model(**batch).loss
    loss.backward()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    update = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else -0.1 * p.grad.view(-1)
                        for p in model.parameters()])  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", SplitDependentLossWarning)
        assert made.evaluate()["eval_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        made.train()
    assert next(log["loss"] for log in made.state.log_history if "loss" in log) == pytest.approx(
        float(loss.detach()), rel=1e-5
    )
    moved = nn.utils.parameters_to_vector(made.model.parameters()).detach() - before
    assert float((moved - update).norm()) <= 1e-4 * float(update.norm())  # what float32 leaves of 1 + update


class Weighted(Trainer):
    """A mean with class weights, which only the loss knows."""

    calls = 0
    seen: ClassVar[list] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        Weighted.calls += 1
        self.seen.append(len(inputs["labels"]))
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels, torch.tensor([1.0, 5.0, 25.0]))
        return (loss, outputs) if return_outputs else loss


class Denoising(Trainer):
    """A mean over rows; noise and time are drawn for each row."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        Denoising.calls += 1
        x = inputs["x"]
        noise, time = torch.randn_like(x), torch.rand(len(x), 1)
        loss = ((model(x + time * noise) - noise) ** 2).mean()
        return (loss, None) if return_outputs else loss


class PerSequence(Trainer):
    """The labels are tokens, and the loss is a mean over rows."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        each = nn.functional.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none")
        counts = labels != -100
        loss = ((each * counts).sum(1) / counts.sum(1)).mean()
        return (loss, outputs) if return_outputs else loss


class Summed(PerSequence):
    """The loss is a sum."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="sum")
        return (loss, outputs) if return_outputs else loss


def options(folder, size, accumulate, **more):
    given = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, **more}
    return TrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, report_to="none", log_level="error", save_strategy="no",
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, per_device_eval_batch_size=size,
        logging_steps=1, train_sampling_strategy="sequential", remove_unused_columns=False, **given,
    )  # fmt: skip


def told(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if issubclass(w.category, SplitDependentLossWarning)]


def test_weights_of_a_loss_are_told_once_in_training_and_in_evaluation(tmp_path):
    make = lambda: bert(tr.BertForSequenceClassification, num_labels=3)  # noqa: E731
    rows = classes(8)
    for accumulate, act, said, calls in (
        (2, "train", "the split into 2 micro-batches changes the update", 2 + 2),
        (2, "evaluate", "per_device_eval_batch_size=4 changes the loss of an evaluation", 2 + 2),
        (1, "train", None, 1),
    ):
        trainer = Weighted(make(), options(tmp_path, 4, accumulate), train_dataset=rows, eval_dataset=rows)
        Weighted.calls, Weighted.seen = 0, []
        messages = told(getattr(trainer, act))
        assert (Weighted.calls, len(messages)) == (calls, said is not None)
        assert said is None or (said in messages[0] and "tfn.Mean.of(values, weights)" in messages[0])
        assert Weighted.seen == [4] * (accumulate if act == "train" else 2)  # a trial leaves no trace in them
        assert not told(trainer.evaluate if said else trainer.train)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_noise_of_each_row_is_no_false_alarm(accumulate, tmp_path):
    rows = made(lambda i, draw: {"x": torch.randn(4, generator=draw)})
    Denoising.calls = 0
    trainer = Denoising(nn.Linear(4, 4), options(tmp_path, 2, accumulate), train_dataset=rows)
    assert not told(trainer.train)
    assert Denoising.calls == (accumulate if accumulate == 1 else accumulate + 2)


@pytest.mark.parametrize("kind", [PerSequence, Summed])
@pytest.mark.parametrize(("size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_the_divisor_of_an_override_is_found(kind, size, accumulate, tmp_path):
    rows = [{**row, "labels": row["labels"].roll(i)} for i, row in enumerate(tokens(ROWS))]
    found = []
    for each in ((8, 1), (size, accumulate)):
        model = bert(tr.BertForTokenClassification, num_labels=11)
        trainer = kind(model, options(tmp_path, *each), train_dataset=rows, eval_dataset=rows)
        assert not told(lambda: found.append(trainer.evaluate()["eval_loss"]))  # noqa: B023
        assert not told(trainer.train)
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    torch.testing.assert_close(found[1], found[3], rtol=1e-5, atol=2e-6)


class Graphs(tr.PreTrainedModel):
    """Three questions for each graph; the nodes of all graphs of a batch lie in one tensor."""

    config_class = tr.PretrainedConfig

    def __init__(self):
        super().__init__(tr.PretrainedConfig())
        self.out = nn.Linear(4, 6)
        self.post_init()

    def forward(self, x, graph, labels=None):
        nodes = torch.zeros(int(graph.max()) + 1, 4).index_add(0, graph, x)
        logits = self.out(nodes).view(-1, 3, 2)
        return {"loss": nn.functional.cross_entropy(logits.reshape(-1, 2), labels.reshape(-1)), "logits": logits}


@pytest.mark.parametrize("act", ["train", "evaluate"])
def test_a_batch_that_cannot_be_cut_ends_no_run(act, tmp_path):
    draw = drawing()
    rows = [
        {"x": torch.randn(2 + i % 3, 4, generator=draw), "labels": torch.randint(0, 2, (3,), generator=draw)}
        for i in range(ROWS)
    ]

    def collate(rows):
        graph = torch.cat([torch.full((len(row["x"]),), i) for i, row in enumerate(rows)])
        labels = torch.stack([row["labels"] for row in rows])
        return {"x": torch.cat([row["x"] for row in rows]), "graph": graph, "labels": labels}

    trainer = Trainer(seeded(Graphs), options(tmp_path, 2, 2), collate, train_dataset=rows, eval_dataset=rows)
    assert not told(getattr(trainer, act))


@pytest.mark.parametrize("act", ["train", "evaluate"])
def test_rows_that_see_each_other_are_told(act, tmp_path):
    sizes = {**SMALL, "vocab_size": 11, "dropout": 0.0, "attention_dropout": 0.0}
    config = tr.CLIPConfig(
        text_config={**sizes, "max_position_embeddings": 8, "eos_token_id": 10, "bos_token_id": 9, "pad_token_id": 0},
        vision_config={**IMAGE, "dropout": 0.0}, projection_dim=8,
    )  # fmt: skip
    rows = images(input_ids=lambda i, draw: torch.randint(1, 11, (5,), generator=draw))
    collate = lambda rows: {**tr.default_data_collator(rows), "return_loss": True}  # noqa: E731
    model = seeded(lambda: tr.CLIPModel(config))
    trainer = Trainer(model, options(tmp_path, 4, 2), collate, train_dataset=rows, eval_dataset=rows)
    assert len(told(getattr(trainer, act))) == 1
