#!/usr/bin/env python
"""Fine-tune a sequence-to-sequence model to summarize, with trainfn's functions in place of its Trainer.

    python examples/pytorch/summarization/run_summarization_no_trainer.py --model_name_or_path google-t5/t5-small \
        --dataset_name cnn_dailymail --dataset_config "3.0.0" --source_prefix "summarize: " \
        --output_dir ~/tmp/tst-summarization

`accelerate launch` and `torchrun` start it on several processes, too. With --checkpointing_steps, the same command
again resumes from the newest checkpoint. Everything happens in `main`: texts → batches → loss → optimizer → step →
fit → evaluate → ROUGE.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import CONFIG_MAPPING, set_seed

import trainfn as tfn
from trainfn import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1]))
import shared
from summaries import IGNORED, Rouge, tokenized

FIELDS = ("input_ids", "attention_mask", "labels")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def switch(text: str) -> bool:
    """``true`` or ``false`` on the command line."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument_group("model").add_argument
    add("--model_name_or_path", help="a folder, or a name on the Hub")
    add("--config_name", help="the name of the configuration, if it is not the model's")
    add("--tokenizer_name", help="the name of the tokenizer, if it is not the model's")
    add("--model_type", choices=list(CONFIG_MAPPING), metavar="TYPE", help="in place of a model: a new one, of a type")
    add("--use_slow_tokenizer", action="store_true", help="leave the tokenizers library alone")
    add("--trust_remote_code", action="store_true", help="run code that the model's repository holds")
    add = made.add_argument_group("data").add_argument
    add("--dataset_name", help="a folder, or a name on the Hub")
    add("--dataset_config_name", help="which configuration of the dataset")
    add("--train_file", help="in place of a dataset: a .csv, .json or .jsonl file to train on")
    add("--validation_file", help="the same, to evaluate on")
    add("--text_column", help="the column with the texts")
    add("--summary_column", help="the column with the summaries")
    add("--max_train_samples", type=int, help="train on the first so many rows only")
    add("--max_eval_samples", type=int, help="evaluate on the first so many rows only")
    add("--source_prefix", default="", help="a text before each row, such as `summarize: `, for T5")
    add("--max_source_length", type=int, default=1024, help="tokens after which a text is cut off")
    add("--max_target_length", type=int, default=128, help="tokens after which a summary is cut off")
    add("--val_max_target_length", type=int, help="the same in evaluation and generation")
    add("--pad_to_max_length", action="store_true", help="pad all rows to these lengths, not to their batch's longest")
    add("--ignore_pad_token_for_loss", type=switch, default=True, help="padding in the summaries does not count")
    add("--preprocessing_num_workers", type=int, help="processes that prepare the data")
    add("--overwrite_cache", action="store_true", help="prepare the data again")
    add("--num_beams", type=int, help="beams to generate with")
    add = made.add_argument_group("training").add_argument
    add("--per_device_train_batch_size", type=int, default=8, help="rows in a micro-batch (%(default)s)")
    add("--per_device_eval_batch_size", type=int, default=8, help="rows in a batch of the evaluation (%(default)s)")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per update (%(default)s)")
    add("--learning_rate", type=float, default=5e-5, help="the highest (%(default)s)")
    add("--weight_decay", type=float, default=0.0, help="of matrices (%(default)s)")
    add("--num_train_epochs", type=int, default=3, help="how often every row is seen (%(default)s)")
    add("--max_train_steps", type=int, help="updates in all, in place of epochs")
    add("--lr_scheduler_type", default="linear", choices=SCHEDULES, help="(%(default)s)")
    add("--num_warmup_steps", type=int, default=0, help="updates in which the rate rises (%(default)s)")
    add("--seed", type=int, default=42, help="of everything (%(default)s)")
    add = made.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True, help="where the model and the checkpoints go")
    add("--checkpointing_steps", metavar="N|epoch", help="save the state every N updates, or after each epoch")
    add("--resume_from_checkpoint", type=Path, help="resume from this one (and not from the newest in --output_dir)")
    add("--with_tracking", action="store_true", help="log to the trackers of Accelerate")
    add("--report_to", default="all", help="which: tensorboard, wandb, ... (%(default)s that are installed)")
    add("--push_to_hub", action="store_true", help="upload the model")
    add("--hub_model_id", help="the name of its repository; by default that of --output_dir")
    add("--hub_token", help="the token; by default that of `hf auth login`")
    return made


def check(args: argparse.Namespace) -> None:
    """Report early what can't work."""
    if args.model_name_or_path is None and (args.model_type is None or args.tokenizer_name is None):
        raise ValueError(
            "Name a model, `--model_name_or_path google-t5/t5-small`, or --model_type and --tokenizer_name."
        )
    steps = args.checkpointing_steps
    if steps not in (None, "epoch") and not (steps.isdecimal() and int(steps) > 0):
        raise ValueError(f"`--checkpointing_steps {steps}`: a number of updates from 1 on, or `epoch`.")


def load_model(args: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """The tokenizer and the model."""
    source, trust = args.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    fast = not args.use_slow_tokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or source, use_fast=fast, **trust)
    named = args.config_name or source
    config = AutoConfig.from_pretrained(named, **trust) if named else CONFIG_MAPPING[args.model_type]()
    if source is None:
        model = AutoModelForSeq2SeqLM.from_config(config, **trust)
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(source, config=config, **trust)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return tokenizer, model.to(device)


def schedule(args: argparse.Namespace, total: int) -> tfn.Schedule:
    make = getattr(tfn.schedules, args.lr_scheduler_type)
    if args.lr_scheduler_type == "constant":
        return make(args.learning_rate)
    length = () if args.lr_scheduler_type == "constant_with_warmup" else (total,)
    return make(args.learning_rate, *length, args.num_warmup_steps)


def folder_of(path: Path, updates: int) -> Path:
    """Return a checkpoint's folder; `step_N` and `epoch_N` are the names in scripts with Accelerate."""
    kind, _, number = path.name.partition("_")
    if path.is_dir() or kind not in ("step", "epoch") or not number.isdecimal():
        return path
    return path.with_name(f"checkpoint-{int(number) if kind == 'step' else (int(number) + 1) * updates}")


def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tfn.Mean:
    """Cross entropy in nats per token of the summaries; rows that fill up the last batch have weight 0."""
    inputs = {name: batch[name] for name in FIELDS}
    return tfn.losses.cross_entropy(model(**inputs).logits, batch["labels"], weights=batch["weights"][:, None])


def generate(model: Any, launch: Any, batches: Any, rows: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's text for each row, and the labels, padded to the longest; ranks take turns by batches."""
    mine = []
    for n in range(launch.rank, batches.steps, launch.world):
        batch = batches(n)
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            mine.append((n, model.generate(**inputs, **options).cpu(), batch["labels"]))
    everyone = [mine] * launch.world
    if launch.world > 1:
        torch.distributed.all_gather_object(everyone, mine)
    found = sorted((batch for theirs in everyone for batch in theirs), key=lambda batch: batch[0])
    written, labels = ([row for batch in found for row in batch[i]] for i in (1, 2))
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_value=IGNORED)
    return pad(written)[:rows].numpy(), pad(labels)[:rows].numpy()


def trackers(args: argparse.Namespace) -> Any:
    """`log(metrics, step)` for the trackers that are asked for."""
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=args.report_to, project_dir=args.output_dir)
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in vars(args).items()}
    accelerator.init_trackers("summarization_no_trainer", plain)
    return accelerator


def save(args: argparse.Namespace, model: Any, tokenizer: Any, results: dict[str, float]) -> None:
    """The model, the tokenizer and the results; on the Hub too, if that was asked for."""
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    (args.output_dir / "all_results.json").write_text(json.dumps(results, indent=4) + "\n")
    if args.push_to_hub:
        from huggingface_hub import HfApi

        hub = HfApi(token=args.hub_token)
        name = hub.create_repo(args.hub_model_id or args.output_dir.resolve().name, exist_ok=True).repo_id
        hub.upload_folder(repo_id=name, folder_path=args.output_dir, ignore_patterns=["checkpoint-*", ".*"])


def main() -> None:
    args = parser().parse_args()
    check(args)
    launch = tfn.launch.settings()  # the processes of a launcher find each other; one process alone does nothing
    set_seed(args.seed)
    tokenizer, model = load_model(args, launch.device)
    rouge, length = Rouge(tokenizer), args.val_max_target_length or args.max_target_length
    with PartialState().main_process_first():  # the others read the data that rank 0 has prepared
        raw = shared.load(args)
        train = shared.rows(raw, "train", "training", args.max_train_samples)
        train = tokenized(train, tokenizer, args, args.max_target_length, "Tokenizing train").select_columns(FIELDS)
        held_out = shared.rows(raw, "validation", "evaluation", args.max_eval_samples)
        held_out = tokenized(held_out, tokenizer, args, length, "Tokenizing validation").select_columns(FIELDS)

    filler = IGNORED if args.ignore_pad_token_for_loss else tokenizer.pad_token_id
    padding = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": filler}
    collate = tfn.data.pad_collate(padding, multiple_of=8)  # few shapes, few compilations
    parts = launch.plan.data_size  # over so many devices are the rows of a batch spread
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * parts
    order = tfn.data.shuffled(len(train), size, seed=args.seed, last="pad")
    in_order = tfn.data.sequential(len(held_out), args.per_device_eval_batch_size * parts, last="pad")
    batches = tfn.data.loader(train, order, collate=collate)  # `fit` and `evaluate` give each rank its rows
    checks = tfn.data.loader(held_out, in_order, collate=collate, epochs=1)
    updates = order.steps_per_epoch
    total = args.max_train_steps or args.num_train_epochs * updates

    rate = schedule(args, total)
    optimizer = tfn.optim.adamw(rate, weight_decay=args.weight_decay, mask=tfn.optim.decay_mask)
    state = tfn.init(model, optimizer, seed=args.seed)
    step = tfn.train_step(loss, optimizer, accumulate=args.gradient_accumulation_steps, plan=launch.plan)
    if launch.loss_scale is not None:  # float16
        scaling = tfn.transforms.dynamic_loss_scale(**launch.loss_scale)
        state, step = scaling.init(state), scaling(step)
    state = tfn.shard(state, launch.plan)
    if args.resume_from_checkpoint is not None:
        state = tfn.restore(folder_of(args.resume_from_checkpoint, updates), like=state)
    checkpoints = None
    if args.checkpointing_steps is not None:
        every = updates if args.checkpointing_steps == "epoch" else int(args.checkpointing_steps)
        checkpoints = tfn.Checkpoints(args.output_dir, every=every)  # `fit` resumes from the newest one
    evaluate = tfn.eval_step(loss, plan=launch.plan)
    evaluation = tfn.callbacks.evaluation(evaluate, checks, every=updates, then=[tfn.callbacks.log(1)])
    callbacks = [tfn.callbacks.progress(), evaluation]
    if args.with_tracking:
        accelerator = trackers(args)
        callbacks.append(lambda info: accelerator.log(tfn.callbacks.values(info.metrics), step=info.n))

    # On a CPU, compiling takes longer than most runs; `compile=True` is the same step.
    compiled = launch.device.type != "cpu" or launch.compile is not None
    step = tfn.jit(step, donate=True, compile=compiled, max_graphs=64, **(launch.compile or {}))
    state = tfn.fit(step, state, batches, until=total, callbacks=callbacks, checkpoints=checkpoints)

    metrics = tfn.callbacks.values(tfn.evaluate(evaluate, state, checks))
    model = tfn.export(state, model).eval()
    options = {"num_beams": args.num_beams} if args.num_beams else {}
    scores = rouge(generate(model, launch, checks, len(held_out), max_length=length, **options))
    results = {f"eval_{name}": value for name, value in {**scores, **metrics}.items()}
    if launch.rank == 0:
        print(json.dumps(results, indent=4))
        save(args, model, tokenizer, results)
    if args.with_tracking:
        accelerator.log(results, step=int(state.step))
        accelerator.end_training()


if __name__ == "__main__":
    main()
