#!/usr/bin/env python
"""Fine-tune a sequence-to-sequence model to summarize: a dataset, or your own files.

    python examples/pytorch/summarization/run_summarization.py --model_name_or_path google-t5/t5-small \
        --dataset_name cnn_dailymail --dataset_config "3.0.0" --source_prefix "summarize: " \
        --do_train --do_eval --predict_with_generate --output_dir /tmp/tst-summarization

    ... --train_file train.jsonl --validation_file validation.jsonl --text_column text --summary_column summary

Run it with -h for all options. Without --overwrite_output_dir it resumes from the last checkpoint in --output_dir.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed

from trainfn import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared
from shared import option
from summaries import IGNORED, Rouge, tokenized


@dataclass
class RunArguments(Seq2SeqTrainingArguments):
    """How to train."""

    overwrite_output_dir: bool = option(False, "Begin anew, even if there are files or checkpoints in the folder.")


@dataclass
class ModelArguments(shared.ModelArguments):
    """The model to fine-tune."""

    resize_position_embeddings: bool | None = option(None, "Make room for --max_source_length in a model without it.")


@dataclass
class DataArguments(shared.DataArguments):
    """The data."""

    lang: str | None = option(None, "The language, for a tokenizer of many: ro_RO, say.")
    text_column: str | None = option(None, "The column with the texts.")
    summary_column: str | None = option(None, "The column with the summaries.")
    max_source_length: int = option(1024, "Tokens after which a text is cut off.")
    max_target_length: int = option(128, "Tokens after which a summary is cut off.")
    val_max_target_length: int | None = option(None, "The same in evaluation and generation; as in training.")
    pad_to_max_length: bool = option(False, "Pad all rows to these lengths; if not, to the longest of their batch.")
    num_beams: int | None = option(1, "Beams to generate with, unless --generation_num_beams is given.")
    ignore_pad_token_for_loss: bool = option(True, "Padding in the summaries does not count.")
    source_prefix: str = option("", "A text before each row, such as `summarize: `, which names the task for T5.")
    forced_bos_token: str | None = option(None, "The first token of a summary: the language, for mBART.")

    def __post_init__(self) -> None:
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length


def load_model(args: ModelArguments, data: DataArguments) -> tuple[Any, Any]:
    """Return the tokenizer and the model, with room for these texts."""
    loading, source = args.loading(), args.model_name_or_path
    config = AutoConfig.from_pretrained(args.config_name or source, **loading)
    use_fast = args.use_fast_tokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or source, use_fast=use_fast, **loading)
    model = AutoModelForSeq2SeqLM.from_pretrained(source, config=config, **loading)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    if data.lang is not None:
        _speak(model, tokenizer, data)
    if model.config.model_type == "t5" and not data.source_prefix:
        warnings.warn("T5 needs its task before each text: write `--source_prefix 'summarize: '`.", stacklevel=2)
    if model.config.decoder_start_token_id is None and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise ValueError(f"{source}: its configuration has no `decoder_start_token_id`, with which summaries begin.")
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and room < data.max_source_length:
        if args.resize_position_embeddings is False:
            raise ValueError(
                f"`--max_source_length {data.max_source_length}`: the model has {room} positions. Write"
                f" `--max_source_length {room}`, or `--resize_position_embeddings true`."
            )
        model.resize_position_embeddings(data.max_source_length)
    return tokenizer, model


def _speak(model: Any, tokenizer: Any, data: DataArguments) -> None:
    """Set the language that a model of many languages reads and writes."""
    if not hasattr(tokenizer, "src_lang"):
        raise ValueError(f"`--lang {data.lang}`: a {type(tokenizer).__name__} knows of no languages. Leave it out.")
    tokenizer.src_lang = tokenizer.tgt_lang = data.lang
    first = tokenizer.convert_tokens_to_ids(data.forced_bos_token or data.lang)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = first
    model.generation_config.forced_bos_token_id = first


def predict(trainer: Seq2SeqTrainer, rows: Dataset, rouge: Rouge | None) -> None:
    """The metrics of the test rows, and what the model writes, in ``generated_predictions.txt``."""
    output = trainer.predict(rows, metric_key_prefix="predict")
    shared.record(trainer, "predict", output.metrics, len(rows))
    if rouge is not None and trainer.is_world_process_zero():
        texts = rouge.text(output.predictions)
        Path(trainer.args.output_dir, "generated_predictions.txt").write_text("\n".join(texts), encoding="utf-8")


def main() -> None:
    model_args, data, args = shared.parsed(ModelArguments, DataArguments, RunArguments)
    resume = shared.resume_point(args)
    set_seed(args.seed)
    raw = shared.load(data, cache_dir=model_args.cache_dir, token=model_args.token)
    tokenizer, model = load_model(model_args, data)
    rouge = Rouge(tokenizer) if args.predict_with_generate else None
    args.generation_max_length = args.generation_max_length or data.val_max_target_length
    args.generation_num_beams = args.generation_num_beams or data.num_beams

    def prepared(split: str, flag: str, most: int | None, length: int) -> Dataset:
        return tokenized(shared.rows(raw, split, flag, most), tokenizer, data, length, f"Tokenizing {split}")

    train = check = None
    if args.do_train:
        train = prepared("train", "--do_train", data.max_train_samples, data.max_target_length)
    if args.do_eval or args.eval_strategy != "no":
        check = prepared("validation", "--do_eval", data.max_eval_samples, data.val_max_target_length)
    padding = IGNORED if data.ignore_pad_token_for_loss else tokenizer.pad_token_id
    trainer = Seq2SeqTrainer(
        model,
        args,
        DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=padding),
        train_dataset=train,
        eval_dataset=check,
        processing_class=tokenizer,
        compute_metrics=rouge,
    )
    if args.do_train:
        shared.train(trainer, resume)
    if args.do_eval:
        shared.record(trainer, "eval", trainer.evaluate(), len(check))
    if args.do_predict:
        rows = prepared("test", "--do_predict", data.max_predict_samples, data.val_max_target_length)
        predict(trainer, rows, rouge)
    card = {"language": data.lang} if data.lang else {}
    shared.share(trainer, data, finetuned_from=model_args.model_name_or_path, tags="summarization", **card)


def _mp_fn(index: int) -> None:
    """Run the script; `xla_spawn.py` calls this in each process."""
    main()


if __name__ == "__main__":
    main()
