"""trainfn: training as a pure function, compiled whole, with a thin driver around it.

::

    nn.Module ──init──▶ TrainState ─┐                              pure, one compiled program
                           ▲        ├─▶ step(state, batch) ─▶ (state', metrics)
    batches ───────────────┼────────┘         │                   │
                           │                  gradients ▸ sum ▸ ÷ weight ▸ optimizer ▸ add
              restore(path, like=state)                           │
                           │                                      ▼
    checkpoint ◀───────── save ◀──── callbacks(StepInfo) ◀──── steps(): a generator; fit() loops over it

Reading order: `_types.py` (the vocabulary), `_step.py` (the step), `_run/_fit.py` (the loop).
"""

import importlib as _importlib

from trainfn import callbacks as callbacks
from trainfn import data as data
from trainfn import errors as errors
from trainfn import losses as losses
from trainfn import metrics as metrics
from trainfn import optim as optim
from trainfn import process as process
from trainfn import random as random
from trainfn import schedules as schedules
from trainfn import transforms as transforms
from trainfn import tree as tree
from trainfn._adapt import adapt as adapt
from trainfn._checkpoint import Checkpoints as Checkpoints
from trainfn._checkpoint import Manifest as Manifest
from trainfn._checkpoint import manifest as manifest
from trainfn._checkpoint import restore as restore
from trainfn._checkpoint import save as save
from trainfn._compile import Buckets as Buckets
from trainfn._compile import Compiled as Compiled
from trainfn._compile import LoadedStep as LoadedStep
from trainfn._compile import Report as Report
from trainfn._compile import jit as jit
from trainfn._compile import load_step as load_step
from trainfn._compose import one_step as one_step
from trainfn._grad import value_and_grad as value_and_grad
from trainfn._keyed import keyed as keyed
from trainfn._module import export as export
from trainfn._module import init as init
from trainfn._plan import Plan as Plan
from trainfn._plan import Precision as Precision
from trainfn._plan import gather as gather
from trainfn._plan import shard as shard
from trainfn._run._evaluate import evaluate as evaluate
from trainfn._run._fit import fit as fit
from trainfn._run._fit import steps as steps
from trainfn._run._replay import replay as replay
from trainfn._step import TrainStep as TrainStep
from trainfn._step import accumulate as accumulate
from trainfn._step import eval_step as eval_step
from trainfn._step import train_step as train_step
from trainfn._types import Callback as Callback
from trainfn._types import Gradients as Gradients
from trainfn._types import Mean as Mean
from trainfn._types import Metrics as Metrics
from trainfn._types import Schedule as Schedule
from trainfn._types import Step as Step
from trainfn._types import StepInfo as StepInfo
from trainfn._types import Stop as Stop
from trainfn._types import TrainState as TrainState
from trainfn._types import Transform as Transform
from trainfn._value import Diff as Diff
from trainfn._value import Digest as Digest
from trainfn._value import diff as diff
from trainfn._value import digest as digest
from trainfn._value import fork as fork
from trainfn.tree import copy as copy

# `launch` reads what a launcher exports, by Accelerate; the names of transformers' Trainer live in `trainfn.hf`, which
# needs transformers; `testing` needs hypothesis. They and `deepspeed` are imported when they are first used, so that
# `import trainfn` stays light.
_LAZY = ("deepspeed", "hf", "launch", "testing")
_HF = (
    *("Trainer", "TrainingArguments", "Seq2SeqTrainer", "Seq2SeqTrainingArguments", "SFTTrainer", "SFTConfig"),
    *("TrainerCallback", "TrainerControl", "TrainerState", "EarlyStoppingCallback", "ProgressCallback"),
    *("PrinterCallback", "EvalPrediction", "HfArgumentParser", "IntervalStrategy", "SchedulerType"),
    *("DataCollatorForLanguageModeling", "DataCollatorForSeq2Seq", "DataCollatorForTokenClassification"),
    *("DataCollatorWithPadding", "default_data_collator"),
    *("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"),
    *("AutoModelForSequenceClassification", "AutoModelForTokenClassification"),
)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return _importlib.import_module(f"trainfn.{name}")
    if name in _HF:
        return getattr(_importlib.import_module("trainfn.hf"), name)
    raise AttributeError(f"module 'trainfn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_HF})


__version__ = "0.1.0"
