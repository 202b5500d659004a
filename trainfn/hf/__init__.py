"""transformers' Trainer, its arguments, callbacks and checkpoints, on the functional core.

::

    from trainfn import Trainer, TrainingArguments      # instead of: from transformers import ...

A `Trainer` is a facade: its methods have transformers' names and signatures, and delegate to functions in the folders
beside it. Begin with `_trainer.py` (the methods), `_types.py` (the part of a Trainer that functions use) and
`_run/_record.py` (its private record). Then read `_run/_loop.py` (the loop around `trainfn.steps`), `_step/_loss.py`
(the exact loss), `_run/_data.py`, `_checkpoints/` and `_evaluation/`.
"""

import importlib.util as _util

if _util.find_spec("transformers") is None or _util.find_spec("datasets") is None:
    raise ImportError("trainfn.hf needs transformers and datasets: `pip install 'trainfn[hf]'`.")

from transformers import AutoConfig as AutoConfig
from transformers import AutoModelForCausalLM as AutoModelForCausalLM
from transformers import AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM
from transformers import AutoModelForSequenceClassification as AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification as AutoModelForTokenClassification
from transformers import AutoTokenizer as AutoTokenizer
from transformers import DataCollatorForLanguageModeling as DataCollatorForLanguageModeling
from transformers import DataCollatorForSeq2Seq as DataCollatorForSeq2Seq
from transformers import DataCollatorForTokenClassification as DataCollatorForTokenClassification
from transformers import DataCollatorWithPadding as DataCollatorWithPadding
from transformers import EarlyStoppingCallback as EarlyStoppingCallback
from transformers import EvalPrediction as EvalPrediction
from transformers import HfArgumentParser as HfArgumentParser
from transformers import IntervalStrategy as IntervalStrategy
from transformers import PrinterCallback as PrinterCallback
from transformers import ProgressCallback as ProgressCallback
from transformers import SchedulerType as SchedulerType
from transformers import TrainerCallback as TrainerCallback
from transformers import TrainerControl as TrainerControl
from transformers import TrainerState as TrainerState
from transformers import default_data_collator as default_data_collator

from trainfn.hf._arguments._training import Seq2SeqTrainingArguments as Seq2SeqTrainingArguments
from trainfn.hf._arguments._training import TrainingArguments as TrainingArguments
from trainfn.hf._seq2seq import Seq2SeqTrainer as Seq2SeqTrainer
from trainfn.hf._sft._config import SFTConfig as SFTConfig
from trainfn.hf._sft._trainer import SFTTrainer as SFTTrainer
from trainfn.hf._trainer import Trainer as Trainer
