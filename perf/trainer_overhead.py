"""What a step costs around the model: our Trainer and transformers', on a model so small that little else is left.

    python perf/trainer_overhead.py            # a minute; prints a table

Both train the same tiny Llama on the same rows with the same arguments (AdamW, clipping, a log every 50 steps), eagerly
on one CPU thread, in turns; a step is what is between two `on_step_end` events.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import warnings

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import trainfn.hf

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Clock(TrainerCallback):
    def __init__(self):
        self.at = []

    def on_step_end(self, args, state, control, **kwargs):
        self.at.append(time.perf_counter())


def steps(kind, arguments, count, accumulate):
    """Milliseconds of each step of a run, the first ones left out."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=16, **SIZES))
    ids = torch.randint(64, (4 * accumulate, 16))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = arguments(
            folder, max_steps=count, per_device_train_batch_size=4, gradient_accumulation_steps=accumulate,
            logging_steps=50, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, log_level="error",
        )  # fmt: skip
        kind(model, args, train_dataset=[{"input_ids": i, "labels": i} for i in ids], callbacks=[clock]).train()
    return [1e3 * (b - a) for a, b in zip(clock.at[10:], clock.at[11:], strict=False)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rivals = {
        "trainfn.Trainer": (trainfn.hf.Trainer, trainfn.hf.TrainingArguments),
        "transformers.Trainer": (transformers.Trainer, transformers.TrainingArguments),
    }
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {given.rounds} rounds of {given.steps} steps")
    for accumulate in (1, 4):
        found = {name: [] for name in rivals}
        for _ in range(given.rounds):
            for name, (kind, arguments) in rivals.items():
                found[name].append(steps(kind, arguments, given.steps, accumulate))
        ratios = [
            statistics.median(a) / statistics.median(b)
            for a, b in zip(found["trainfn.Trainer"], found["transformers.Trainer"], strict=True)
        ]
        for name, rounds in found.items():
            each = [x for one in rounds for x in one]
            numbers = f"median {statistics.median(each):.3f} ms  min {min(each):.3f} ms"
            print(f"{accumulate} micro-batch(es)  {name:22} {numbers}")
        print(f"{accumulate} micro-batch(es)  ratio of medians, median over rounds: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
