"""A working directory for the example scripts: folders that stand for models and datasets of the Hub."""

import csv
import json

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [f"w{i}" for i in range(20)]
SPECIAL = ["<pad>", "</s>", "<unk>"]
PAIRS = [(f"{WORDS[i % 20]} {WORDS[(i + 1) % 20]} {WORDS[(i * 7) % 20]}.", f"{WORDS[i % 20]} end.") for i in range(60)]


def tokenizer():
    words = {word: i for i, word in enumerate([*SPECIAL, *WORDS, ".", ":", "summarize", "end"])}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names)


def write_models(folder):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5Config(vocab_size=32, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertConfig(vocab_size=32, max_position_embeddings=64, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(t5).save_pretrained(folder / "google-t5/t5-small")
        BertModel(bert).save_pretrained(folder / "google-bert/bert-base-cased")
    tokenizer().save_pretrained(folder / "google-t5/t5-small")
    tokenizer().save_pretrained(folder / "google-bert/bert-base-cased")


def write_csv(path, names, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def write_jsonl(path, names, rows):
    path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))


def write_news(folder):
    """`cnn_dailymail`, configuration 3.0.0."""
    for split, rows in {"train": PAIRS, "validation": PAIRS[:8], "test": PAIRS[8:13]}.items():
        write_csv(folder / f"cnn_dailymail/{split}.csv", ["article", "highlights"], rows)
    files = "".join(f"  - split: {s}\n    path: {s}.csv\n" for s in ("train", "validation", "test"))
    card = f'---\nconfigs:\n- config_name: "3.0.0"\n  data_files:\n{files}---\n'
    (folder / "cnn_dailymail/README.md").write_text(card)


GLUE = {
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"], ("validation", "test")),
    "cola": (["sentence"], ["unacceptable", "acceptable"], ("validation", "test")),
    "stsb": (["sentence1", "sentence2"], None, ("validation", "test")),
    "mnli": (
        ["premise", "hypothesis"],
        ["entailment", "neutral", "contradiction"],
        ("validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
    ),
}


def write_glue(folder):
    """`nyu-mll/glue` with some of its tasks; the labels of the test rows are unknown, -1."""
    configs, infos = "", ""
    for task, (texts, names, others) in GLUE.items():
        label = "float32" if names is None else {"class_label": {"names": dict(enumerate(names))}}
        files = ""
        for split in ("train", *others):
            count = 24 if split == "train" else 9
            labels = [-1 if "test" in split else i % 5 / 2 if names is None else i % len(names) for i in range(count)]
            rows = [(*pair[: len(texts)], y, i) for i, (pair, y) in enumerate(zip(PAIRS, labels, strict=False))]
            write_csv(folder / f"nyu-mll/glue/{task}/{split}.csv", [*texts, "label", "idx"], rows)
            files += f"  - split: {split}\n    path: {task}/{split}.csv\n"
        configs += f"- config_name: {task}\n  data_files:\n{files}"
        features = [*({"name": name, "dtype": "string"} for name in texts), {"name": "label", "dtype": label}]
        features.append({"name": "idx", "dtype": "int32"})
        infos += f"- config_name: {task}\n  features: {json.dumps(features)}\n"
    (folder / "nyu-mll/glue/README.md").write_text(f"---\nconfigs:\n{configs}dataset_info:\n{infos}---\n")


def write_all(folder):
    write_models(folder)
    write_news(folder)
    write_glue(folder)
