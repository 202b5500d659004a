"""The table of every method of transformers' Trainer: whether an override is called, and what to write if it is not."""

import transformers

from trainfn.hf import Seq2SeqTrainer
from trainfn.hf._names import table

HEAD = """# Every method

This page is generated from the code that checks subclasses, and a test compares it with the installed transformers.

An override of a method is called where transformers calls it, with the same arguments. The others are never called
here. A class that overrides one of them gets a warning with the line to write instead. To read one that is not there is
an `AttributeError` with the same line. Any other missing attribute is an `AttributeError` with the nearest name.

`trainer.accelerator` is an `accelerate.Accelerator`, made as transformers makes it, for the code of subclasses. The
Trainer's own step does not use it. `is_fsdp_enabled` and `is_deepspeed_enabled` are False, because no engine of
Accelerate wraps the model: the plan of the step shards it. On several ranks `accelerator.prepare(model)` therefore
moves the model, and does not wrap it.

In a checkpoint, `save_model` and `_save` write the model's files if they are overridden. The state that a resumed run
needs is then in `state.safetensors` beside them.
"""


def page() -> str:
    """The whole page."""
    found = table(Seq2SeqTrainer, transformers.Seq2SeqTrainer)
    called = [name for name, (what, _) in found.items() if what == "called"]
    rows = [f"| `{name}` | {what} | {write}. |" for name, (what, write) in found.items() if write]
    listed = "\n".join(f"* `{name}`" for name in called)
    return (
        f"{HEAD}\n## Methods that are not called\n\n| method | here | write |\n|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n## Methods whose overrides are called\n\n{listed}\n"
    )
