"""Tiny models, their rows and their collators, for tests of evaluation and prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import trainfn.hf

VOCAB = 20


def tokenizer():
    """Words w3 .. w19, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


class Rows(torch.utils.data.Dataset):
    """A torch dataset of dicts."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, n):
        return self.rows[n]


class Stream(torch.utils.data.IterableDataset):
    """The same rows, of unknown number."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def ids(n, low=2):
    generator = torch.Generator().manual_seed(n)
    length = low + n * 3 % 5
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def bert_config(**options):
    return BertConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **options
    )


def built(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)


def t5(**options):
    config = T5Config(
        vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, **options
    )
    model = built(T5ForConditionalGeneration, config)
    model.generation_config.max_length = 20  # or `generate` warns that nobody said
    return model


class Case(NamedTuple):
    """A model and the rows it takes: ``row(n)`` is a dict."""

    model: Callable[[], Any]
    row: Callable[[int], dict[str, Any]]
    collator: Callable[[], Any] = lambda: DataCollatorWithPadding(tokenizer())

    def rows(self, count):
        return [self.row(n) for n in range(count)]


def token_labels(n):
    """Unequally many labels count in a row; in some rows none does."""
    return [-100 if (n + t) % 3 == 0 or n % 4 == 3 else (n + t) % 3 for t in range(len(ids(n)))]


CASES = {
    "single label": Case(
        lambda: built(BertForSequenceClassification, bert_config(num_labels=3)),
        lambda n: {"input_ids": ids(n), "labels": n % 3},
    ),
    "multi label": Case(
        lambda: built(
            BertForSequenceClassification, bert_config(num_labels=3, problem_type="multi_label_classification")
        ),
        lambda n: {"input_ids": ids(n), "labels": [float(n % 2), 1.0, float(n % 3 == 0)]},
    ),
    "regression": Case(
        lambda: built(BertForSequenceClassification, bert_config(num_labels=1)),
        lambda n: {"input_ids": ids(n), "labels": n / 7},
    ),
    "hidden states": Case(
        lambda: built(BertForSequenceClassification, bert_config(num_labels=3, output_hidden_states=True)),
        lambda n: {"input_ids": ids(n), "labels": n % 3},
    ),
    "tokens": Case(
        lambda: built(BertForTokenClassification, bert_config(num_labels=3)),
        lambda n: {"input_ids": ids(n), "labels": token_labels(n)},
        lambda: DataCollatorForTokenClassification(tokenizer()),
    ),
    "causal": Case(
        lambda: built(
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                pad_token_id=0,
            ),
        ),
        lambda n: {"input_ids": ids(n), "labels": ids(n)},
        lambda: DataCollatorForTokenClassification(tokenizer()),
    ),
    "gpt2": Case(
        lambda: built(
            GPT2LMHeadModel,
            GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1),
        ),
        lambda n: {"input_ids": ids(n), "labels": ids(n)},
        lambda: DataCollatorForTokenClassification(tokenizer()),
    ),
    "seq2seq": Case(
        t5,
        lambda n: {"input_ids": ids(n), "labels": ids(n + 1)},
        lambda: DataCollatorForSeq2Seq(tokenizer()),
    ),
}


def trainer(library, case, tmp_path, name="Trainer", **options):
    """``library.Trainer`` for a case; keywords that are fields of the arguments go there."""
    kind = getattr(library, name)
    kind_of_args = library.Seq2SeqTrainingArguments
    fields = {field.name for field in dataclasses.fields(kind_of_args)}
    given = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    given |= {key: options.pop(key) for key in list(options) if key in fields}
    options.setdefault("data_collator", case.collator())
    options.setdefault("callbacks", [])
    made = options.pop("model", None) or case.model()
    built = kind(made, kind_of_args(str(tmp_path), **given), **options)
    built.remove_callback(transformers.PrinterCallback)
    return built


def ours(case, tmp_path, **options):
    """Our Trainer for a case."""
    return trainer(trainfn.hf, case, tmp_path, **options)


def theirs(case, tmp_path, **options):
    """The Trainer of transformers for a case."""
    return trainer(transformers, case, tmp_path, **options)
