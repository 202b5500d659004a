"""Small habits of scripts that were written for transformers."""

import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.hf.models import gpt2, tokens
from trainfn import Trainer, TrainingArguments
from trainfn.hf import EarlyStoppingCallback, Seq2SeqTrainingArguments
from trainfn.hf._arguments._convert import as_ours

OPTIONS = {
    "use_cpu": True, "disable_tqdm": True, "report_to": "none", "log_level": "error", "max_steps": 4,
    "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no",
}  # fmt: skip
SAVING = {"save_strategy": "steps", "save_steps": 1}


def arguments(folder, kind=TrainingArguments, **options):
    return kind(output_dir=str(folder), **{**OPTIONS, **options})


def made(args, **options):
    return Trainer(gpt2(), args, train_dataset=tokens(8), eval_dataset=tokens(4), **options)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_of_transformers_train_as_ours(tmp_path):
    theirs = arguments(tmp_path, transformers.TrainingArguments, learning_rate=1e-2)
    trainer, same = made(theirs), made(arguments(tmp_path, learning_rate=1e-2))
    trainer.train(), same.train()
    assert type(theirs) is transformers.TrainingArguments and isinstance(trainer.args, TrainingArguments)
    for name, tensor in same.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])


def test_a_subclass_of_their_arguments_keeps_what_it_adds(tmp_path):
    class Mine(transformers.TrainingArguments):
        beta = 0.5

        def twice(self):
            return 2 * self.beta

    args = made(arguments(tmp_path, Mine)).args
    assert isinstance(args, Mine) and isinstance(args, TrainingArguments)
    assert (type(args).__name__, args.twice(), args.beta) == ("Mine", 1.0, 0.5)
    assert args.activation_checkpointing is False and args.world_size == 1
    theirs = transformers.Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert isinstance(as_ours(theirs), Seq2SeqTrainingArguments)


def test_something_else_is_refused(tmp_path):
    with pytest.raises(
        TypeError, match=r"`Trainer\(args=\.\.\.\)` can't work: it is of type str.*Write `Trainer\(model"
    ):
        Trainer(gpt2(), str(tmp_path))


def test_two_precisions_of_an_evaluation_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"fp16_full_eval=True, bf16_full_eval=True\)` can't work.*Write `bf16_full"):
        arguments(tmp_path, fp16_full_eval=True, bf16_full_eval=True)


def test_the_best_checkpoint_needs_a_metric(tmp_path):
    args = arguments(tmp_path, save_strategy="best", eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match=r"save_strategy='best'\)` can't work: `args.metric_for_best_model` must be"):
        made(args)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0])
def test_no_limit_keeps_all_checkpoints_and_nothing_else(limit, tmp_path):
    made(arguments(tmp_path, **SAVING, save_total_limit=limit)).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]


def stopping(folder, patience, **options):
    """A Trainer that does not learn, and a list of its callback's count and patience when it begins to train."""
    stop = EarlyStoppingCallback(early_stopping_patience=patience)
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "learning_rate": 0.0}
    trainer, found = made(arguments(folder, **SAVING, **evaluating, **options), callbacks=[stop]), []

    class Look(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            held = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
            found.append((held.early_stopping_patience_counter, held.early_stopping_patience))

    trainer.add_callback(Look())
    return trainer, found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, (2, 9), id="the count of the checkpoint, the patience of the program"),
        pytest.param({"restore_callback_states_from_checkpoint": True}, (2, 7), id="both of the checkpoint"),
        pytest.param({"restore_callback_states_from_checkpoint": False}, (0, 9), id="both of the program"),
    ],
)
def test_states_of_callbacks_are_restored_as_the_arguments_say(options, expected, tmp_path):
    stopping(tmp_path, 7)[0].train()
    trainer, found = stopping(tmp_path, 9, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert found == [expected]


def test_a_pushed_model_has_its_arguments_as_json(tmp_path):
    trainer = made(arguments(tmp_path, **SAVING))
    trainer.save_model(str(tmp_path / "model"))
    written = json.loads((tmp_path / "model" / "training_args.json").read_text())
    assert written["learning_rate"] == 5e-05 and not list(Path(tmp_path).rglob("*.bin"))


# --- data -------------------------------------------------------------------------------------------------------------


class Epochs(torch.utils.data.BatchSampler):
    """A batch sampler that is given the epoch, as those of sentence-transformers."""

    def __init__(self):
        super().__init__(torch.utils.data.SequentialSampler(range(8)), 4, drop_last=False)
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_batch_samplers_are_given_the_epoch(tmp_path):
    sampler, rows = Epochs(), tokens(8)

    class Own(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(rows, batch_sampler=sampler, collate_fn=self.data_collator)

    Own(gpt2(), arguments(tmp_path, max_steps=-1, num_train_epochs=3), train_dataset=rows).train()
    assert sampler.epochs == [0, 1, 2]
    assert multiprocessing.active_children() == []


# --- what the tokenizer says ----------------------------------------------------------------------------------------


def tokenizer(**names):
    words = {name: n for n, name in enumerate(["<pad>", "<end>", "<first>", *"abcdefgh"])}
    made = Tokenizer(WordLevel(words, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def run_of(folder, model, rows, **options):
    args = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    held = options.pop("processing_class")
    made = Trainer(
        model, TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **args, **options), train_dataset=rows,
        processing_class=held, data_collator=transformers.default_data_collator,
    )  # fmt: skip
    made.train()
    return made


def test_the_tokenizers_special_tokens_are_in_the_model_that_was_trained(tmp_path):
    model, held = gpt2(), tokenizer(pad_token="<pad>", eos_token="<end>")
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id) == (None, 0, 0)
    trainer = run_of(tmp_path, model, tokens(), processing_class=held)
    trainer.save_model()
    for kind in (transformers.GPT2Config, transformers.GenerationConfig):
        saved = kind.from_pretrained(tmp_path)
        ends = saved.eos_token_id if isinstance(saved.eos_token_id, list) else [saved.eos_token_id]
        assert saved.pad_token_id == 0 and 1 in ends
        assert saved.bos_token_id == 0, "a token that the tokenizer lacks stays the model's"


@pytest.mark.parametrize(
    ("masked", "pad", "counted"), [(True, None, 10), (True, "<pad>", 10), (False, "<pad>", 9), (False, None, 24)]
)
def test_padding_is_not_counted(masked, pad, counted, tmp_path, caplog):
    ids = torch.tensor([[3, 4, 0, 0, 0, 0], [3, 4, 5, 0, 0, 0], [3, 4, 5, 0, 0, 0], [3, 0, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    mask[0, 2] = 1  # the mask goes before the padding token
    rows = [
        {"input_ids": x, "labels": x, **({"attention_mask": m} if masked else {})}
        for x, m in zip(ids, mask, strict=True)
    ]
    held = tokenizer(**({"pad_token": pad} if pad else {}))
    options = {"include_num_input_tokens_seen": "non_padding", "processing_class": held}
    with caplog.at_level(logging.WARNING, "trainfn"):
        assert run_of(tmp_path, gpt2(), rows, **options).state.num_input_tokens_seen == counted
    told = "no padding token is known, so all tokens are counted. Pass `processing_class=tokenizer`"
    assert (told in caplog.text) == (not masked and pad is None)
