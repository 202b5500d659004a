#!/usr/bin/env python
"""Fine-tune a model to classify texts, or pairs of texts: a task of GLUE, another dataset, or your own files.

    python examples/pytorch/text-classification/run_glue.py --model_name_or_path google-bert/bert-base-cased \
        --task_name mrpc --do_train --do_eval --output_dir /tmp/mrpc

    ... --train_file train.csv --validation_file validation.csv     # your own: a column `label`, and one or two of text

Run it with -h for all options. Without --overwrite_output_dir it resumes from the last checkpoint in --output_dir.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import set_seed

from trainfn import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared
from shared import option

TEXTS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


@dataclass
class RunArguments(TrainingArguments):
    """How to train."""

    overwrite_output_dir: bool = option(False, "Begin anew, even if there are files or checkpoints in the folder.")


@dataclass
class ModelArguments(shared.ModelArguments):
    """The model to fine-tune."""

    ignore_mismatched_sizes: bool = option(False, "Take a model with another number of labels; its head begins anew.")


@dataclass
class DataArguments(shared.DataArguments):
    """The data."""

    task_name: str | None = option(None, f"A task of GLUE: {', '.join(TEXTS)}.")
    max_seq_length: int = option(128, "Tokens after which a row is cut off.")
    pad_to_max_length: bool = option(True, "Pad all rows to --max_seq_length; if not, to the longest of their batch.")

    def __post_init__(self) -> None:
        if self.task_name is None:
            return
        self.task_name = self.task_name.lower()
        if self.task_name not in TEXTS:
            raise ValueError(f"`--task_name {self.task_name}`: the tasks of GLUE are {', '.join(TEXTS)}.")
        self.dataset_name, self.dataset_config_name = "nyu-mll/glue", self.task_name


# --- data -----------------------------------------------------------------------------------------------------------


def label_names(raw: DatasetDict) -> list[Any] | None:
    """Return the classes; None if the labels are numbers of a regression."""
    labelled = next((rows for rows in raw.values() if "label" in rows.column_names), None)
    if labelled is None:
        raise ValueError(f"The data have no column `label`, but {raw.column_names}. Rename the one that holds it.")
    feature = labelled.features["label"]
    if getattr(feature, "names", None):
        return feature.names
    return None if "float" in feature.dtype else sorted(labelled.unique("label"))


def text_columns(rows: Dataset, task: str | None) -> tuple[str, ...]:
    """The one or two columns that the model is to read."""
    if task is not None:
        return TEXTS[task]
    texts = [name for name, feature in rows.features.items() if name != "label" and "string" in str(feature.dtype)]
    if not texts:
        raise ValueError(f"The data have no column of text, but {rows.column_names}.")
    return ("sentence1", "sentence2") if {"sentence1", "sentence2"} <= {*texts} else tuple(texts[:2])


def encoder(tokenizer: Any, texts: tuple[str, ...], ids: dict[Any, int] | None, data: DataArguments) -> Callable:
    """The function that turns rows of text into rows of numbers."""
    length = min(data.max_seq_length, tokenizer.model_max_length)
    padding = "max_length" if data.pad_to_max_length else False

    def number(label: Any) -> int:
        if label not in ids:
            raise ValueError(f"A row to evaluate on has the label {label!r}, and those to train on have {list(ids)}.")
        return ids[label]

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = dict(tokenizer(*(batch[name] for name in texts), padding=padding, max_length=length, truncation=True))
        if "label" in batch:
            encoded["labels"] = [number(x) for x in batch["label"]] if ids else batch["label"]
        return encoded

    return encode


def class_ids(raw: DatasetDict, names: list[Any], known: dict[str, int]) -> tuple[dict[Any, int], dict[int, str]]:
    """From a value in the column `label` to a class, and from a class to its name.

    A model that was fine-tuned for the same classes keeps its numbers for them.
    """
    texts = [str(name) for name in names]
    numbers = known if set(known) == set(texts) else {text: i for i, text in enumerate(texts)}
    counted = any(getattr(rows.features.get("label"), "names", None) for rows in raw.values())
    ids = {(i if counted else name): numbers[str(name)] for i, name in enumerate(names)}
    return ids, {i: text for text, i in numbers.items()}


# --- metrics --------------------------------------------------------------------------------------------------------


def metrics_of(task: str | None, regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """The metrics that GLUE reports for a task; else the accuracy, or the mean squared error."""

    def accuracy(guess: Any, truth: Any) -> float:
        return (guess == truth).mean()

    measures: dict[str, Callable[[Any, Any], Any]] = {"accuracy": accuracy}
    if task in ("mrpc", "qqp", "cola"):
        sklearn = shared.required("sklearn.metrics", "scikit-learn", f"The metric of {task}")
        f1 = {"accuracy": accuracy, "f1": lambda guess, truth: sklearn.f1_score(truth, guess)}
        matthews = {"matthews_correlation": lambda guess, truth: sklearn.matthews_corrcoef(truth, guess)}
        measures = matthews if task == "cola" else f1
    elif task == "stsb":
        stats = shared.required("scipy.stats", "scipy", "The metric of stsb")
        measures = {"pearson": lambda guess, truth: stats.pearsonr(guess, truth)[0]}
        measures["spearmanr"] = lambda guess, truth: stats.spearmanr(guess, truth)[0]
    elif regression:
        measures = {"mse": lambda guess, truth: ((guess - truth) ** 2).mean()}

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        guess = predicted(prediction.predictions, regression)
        result = {name: float(measure(guess, prediction.label_ids)) for name, measure in measures.items()}
        return {**result, "combined_score": float(np.mean(list(result.values())))} if len(result) > 1 else result

    return compute


def predicted(logits: Any, regression: bool) -> np.ndarray:
    logits = logits[0] if isinstance(logits, tuple) else logits
    return np.squeeze(logits, -1) if regression else np.argmax(logits, -1)


# --- the run ----------------------------------------------------------------------------------------------------------


def evaluate(trainer: Trainer, sets: dict[str, Dataset]) -> None:
    """The metrics of each set; those of a second one end in ``_mm``."""
    everything: dict[str, Any] = {}
    for name, rows in sets.items():
        suffix = "_mm" if name.endswith("mismatched") else ""
        metrics = {**trainer.evaluate(rows), "eval_samples": len(rows)}
        everything |= {f"{key}{suffix}": value for key, value in metrics.items()}
    trainer.log_metrics("eval", everything)
    trainer.save_metrics("eval", everything)


def predict(trainer: Trainer, sets: dict[str, Dataset], task: str | None) -> None:
    """The predictions for each set, in ``predict_results_{task}.txt``."""
    names = trainer.model.config.id2label
    for name, rows in sets.items():
        output = trainer.predict(rows, metric_key_prefix="predict")
        shared.record(trainer, "predict", output.metrics, len(rows))
        regression = trainer.model.config.num_labels == 1
        guesses = predicted(output.predictions, regression)
        texts = [f"{guess:.3f}" if regression else names[int(guess)] for guess in guesses]
        if trainer.is_world_process_zero():
            ending = "".join(f"_{part}" for part in (task, "mm" if name.endswith("mismatched") else None) if part)
            lines = ["index\tprediction", *(f"{i}\t{text}" for i, text in enumerate(texts))]
            Path(trainer.args.output_dir, f"predict_results{ending}.txt").write_text("\n".join(lines) + "\n")


def model_for(names: list[Any] | None, known: Callable, args: ModelArguments) -> tuple[Any, Any, dict | None]:
    """The tokenizer, the model with a head for these classes, and the classes' numbers."""
    loading, source = args.loading(), args.model_name_or_path
    config, ids = AutoConfig.from_pretrained(args.config_name or source, **loading), None
    if names is None:
        config.num_labels, config.problem_type = 1, "regression"
    else:
        ids, config.id2label = known(names, config.label2id)
        config.label2id = {name: i for i, name in config.id2label.items()}
    use_fast = args.use_fast_tokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or source, use_fast=use_fast, **loading)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, config=config, ignore_mismatched_sizes=args.ignore_mismatched_sizes, **loading
    )
    return tokenizer, model, ids


def main() -> None:
    model_args, data, args = shared.parsed(ModelArguments, DataArguments, RunArguments)
    resume = shared.resume_point(args)
    set_seed(args.seed)  # of a new head
    raw = shared.load(data, cache_dir=model_args.cache_dir, token=model_args.token)
    names = label_names(raw)
    compute = metrics_of(data.task_name, names is None)  # early: a missing package is an error
    tokenizer, model, ids = model_for(names, functools.partial(class_ids, raw), model_args)
    encode = encoder(tokenizer, text_columns(next(iter(raw.values())), data.task_name), ids, data)

    def prepared(split: str, flag: str, most: int | None) -> Dataset:
        cut = shared.rows(raw, split, flag, most)
        if split.startswith("test") and "label" in cut.column_names:
            cut = cut.remove_columns("label")  # those of GLUE are all -1
        left = ["label"] if "label" in cut.column_names else None
        return cut.map(encode, batched=True, remove_columns=left, desc=f"Tokenizing {split}", **shared.mapping(data))

    kinds = ("_matched", "_mismatched") if data.task_name == "mnli" else ("",)
    train = prepared("train", "--do_train", data.max_train_samples) if args.do_train else None
    checks, tests = (
        {f"{split}{kind}": prepared(f"{split}{kind}", flag, most) for kind in kinds} if wanted else {}
        for split, flag, most, wanted in (
            ("validation", "--do_eval", data.max_eval_samples, args.do_eval or args.eval_strategy != "no"),
            ("test", "--do_predict", data.max_predict_samples, args.do_predict),
        )
    )
    trainer = Trainer(
        model,
        args,
        default_data_collator if data.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=next(iter(checks.values()), None),
        processing_class=tokenizer,
        compute_metrics=compute,
    )
    if args.do_train:
        shared.train(trainer, resume)
    if args.do_eval:
        evaluate(trainer, checks)
    if args.do_predict:
        predict(trainer, tests, data.task_name)
    card = {"language": "en"} if data.task_name else {}
    shared.share(trainer, data, finetuned_from=model_args.model_name_or_path, **card)


def _mp_fn(index: int) -> None:
    """Run the script; `xla_spawn.py` calls this in each process."""
    main()


if __name__ == "__main__":
    main()
