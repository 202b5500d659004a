"""Tiny heads of transformers, and rows for them."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import trainfn as tfn
from trainfn.hf._optim._groups import Groups
from trainfn.hf._optim._named import clipping, cls_and_kwargs, decay_names

VOCAB, LENGTH = 11, 6


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def bert(kind, **options):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return seeded(lambda: kind(BertConfig(vocab_size=VOCAB, **sizes, **off, **options)))


def gpt2(dropout=0.0):
    sizes = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    off = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, **off)))


def llama(**options):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=8, **sizes, **options)
    return seeded(lambda: LlamaForCausalLM(config))


def mixtral():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=VOCAB, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True,
        router_aux_loss_coef=0.5, **sizes,
    )  # fmt: skip
    return seeded(lambda: MixtralForCausalLM(config))


def t5():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, **sizes)
    return seeded(lambda: T5ForConditionalGeneration(config))


def rows(count=12, seed=0):
    """Rows of one to six tokens, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (count, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
    return [{"input_ids": i * m, "attention_mask": m.long()} for i, m in zip(ids, mask, strict=True)]


def tokens(count=12):
    return [{**row, "labels": row["input_ids"].where(row["attention_mask"] == 1, -100)} for row in rows(count)]


def classes(count=12):
    return [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows(count))]


def numbers(count=12):
    return [{**row, "labels": torch.tensor(i / 4 - 1)} for i, row in enumerate(rows(count))]


def several(count=12):
    return [{**row, "labels": torch.tensor([i % 2, i % 3 == 0, 1.0])} for i, row in enumerate(rows(count))]


HEADS = {
    "bert classes": (lambda: bert(BertForSequenceClassification, num_labels=3), classes),
    "bert regression": (lambda: bert(BertForSequenceClassification, num_labels=1), numbers),
    "bert multi-label": (
        lambda: bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"),
        several,
    ),
    "bert tokens": (lambda: bert(BertForTokenClassification, num_labels=VOCAB), tokens),
    "gpt2": (gpt2, tokens),
    "llama": (llama, tokens),
    "t5": (t5, tokens),
}


def rule_of(args, model):
    """The update that the Trainer's arguments describe for a model: the transform of the optimizer that it makes."""
    decays = decay_names(model)
    named = dict(model.named_parameters())
    cls, options = cls_and_kwargs(args, model)
    groups = [
        {"params": [p for n, p in named.items() if n in decays], "weight_decay": args.weight_decay},
        {"params": [p for n, p in named.items() if n not in decays], "weight_decay": 0.0},
    ]
    return tfn.optim.chain(clipping(args), Groups(cls(groups, **options), named.items()).transform)
