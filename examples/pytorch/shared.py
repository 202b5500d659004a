"""Functions of all example scripts: the command line, the data files, the checkpoint to resume from, the results."""

import dataclasses
import importlib
import sys
from dataclasses import field
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from trainfn import HfArgumentParser

LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json"}


def option(default: Any, text: str, **more: Any) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass
class ModelArguments:
    """The model to fine-tune."""

    model_name_or_path: str = field(metadata={"help": "A folder, or a name on the Hub."})
    config_name: str | None = option(None, "The name of the configuration, if it is not the model's.")
    tokenizer_name: str | None = option(None, "The name of the tokenizer, if it is not the model's.")
    cache_dir: str | None = option(None, "The folder for downloads and prepared data.")
    use_fast_tokenizer: bool = option(True, "Use the tokenizers library.")
    model_revision: str = option("main", "Branch, tag or commit of the model.")
    token: str | None = option(None, "A token for private repositories; by default that of `hf auth login`.")
    trust_remote_code: bool = option(False, "Run code that the model's repository holds.")

    def loading(self) -> dict[str, Any]:
        """The arguments of every `from_pretrained`."""
        options = {"cache_dir": self.cache_dir, "revision": self.model_revision, "token": self.token}
        return {**options, "trust_remote_code": self.trust_remote_code}


@dataclasses.dataclass
class DataArguments:
    """The data, and the number of its rows."""

    dataset_name: str | None = option(None, "A dataset: a folder, or a name on the Hub.")
    dataset_config_name: str | None = option(None, "The configuration of the dataset.")
    train_file: str | None = option(None, "In place of a dataset: a .csv, .json or .jsonl file to train on.")
    validation_file: str | None = option(None, "The same, to evaluate on.")
    test_file: str | None = option(None, "The same, to predict.")
    overwrite_cache: bool = option(False, "Prepare the data again, even if it has been done before.")
    preprocessing_num_workers: int | None = option(None, "Processes that prepare the data.")
    max_train_samples: int | None = option(None, "Train on the first so many rows only.")
    max_eval_samples: int | None = option(None, "Evaluate on the first so many rows only.")
    max_predict_samples: int | None = option(None, "Predict the first so many rows only.")


def parsed(*kinds: type) -> tuple[Any, ...]:
    """The command line as dataclasses; or the one .json file that it names."""
    parser = HfArgumentParser(kinds)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def required(module: str, package: str, why: str) -> ModuleType:
    """Import a module that only the scripts need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{why} needs {package}: `pip install 'trainfn[scripts]'`.") from error


# --- data -----------------------------------------------------------------------------------------------------------


def load(data: Any, *, cache_dir: str | None = None, token: str | None = None) -> DatasetDict:
    """The dataset, or the files, that the command line names."""
    if data.dataset_name is not None:
        return load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=cache_dir, token=token)
    named = {"train": data.train_file, "validation": data.validation_file, "test": getattr(data, "test_file", None)}
    files = {split: file for split, file in named.items() if file is not None}
    if not files:
        raise ValueError(
            "There is nothing to train or evaluate on. Name a dataset, `--dataset_name cnn_dailymail`, or files,"
            " `--train_file train.csv --validation_file validation.csv`."
        )
    for file in files.values():
        if Path(file).suffix not in LOADERS:
            raise ValueError(f"{file}: data files are .csv, .json or .jsonl (one JSON object a line).")

    def read(file: str) -> Dataset:  # one by one: a test file need not have the labels' column
        kind = LOADERS[Path(file).suffix]
        return load_dataset(kind, data_files=file, split="train", cache_dir=cache_dir, token=token)

    return DatasetDict({split: read(file) for split, file in files.items()})


def rows(raw: DatasetDict, split: str, flag: str, most: int | None) -> Dataset:
    """Return the first rows of a split, which ``flag`` needs."""
    if split not in raw:
        file = f"--{split.partition('_')[0]}_file"
        raise ValueError(f"`{flag}` needs a {split} split, and the data have {sorted(raw)}. Add `{file} ...`.")
    return raw[split] if most is None else raw[split].select(range(min(most, len(raw[split]))))


def mapping(data: Any) -> dict[str, Any]:
    """Return the options of ``Dataset.map``."""
    return {"num_proc": data.preprocessing_num_workers, "load_from_cache_file": not data.overwrite_cache}


# --- a run of the Trainer ---------------------------------------------------------------------------------------------


def resume_point(args: Any) -> str | bool | None:
    """Return the checkpoint that was named, or True for the newest in the output folder, or None to begin.

    Raises:
        ValueError: If the folder has other files, and ``--overwrite_output_dir`` is not given.
    """
    asked, folder = args.resume_from_checkpoint, Path(args.output_dir)
    if asked:
        return True if str(asked).lower() == "true" else asked
    if not args.do_train or args.overwrite_output_dir or not folder.is_dir():
        return None
    if any(folder.glob("checkpoint-*")):
        return True
    if any(folder.iterdir()):
        raise ValueError(
            f"`--output_dir {folder}`: there are files in it, and no checkpoint to resume from. Write"
            " `--overwrite_output_dir` to train into it all the same, or name another folder."
        )
    return None


def record(trainer: Any, split: str, metrics: dict[str, Any], count: int) -> None:
    """Print the metrics of a split and write them to ``{split}_results.json`` and ``all_results.json``."""
    metrics = {**metrics, f"{split}_samples": count}
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def train(trainer: Any, resume: str | bool | None) -> None:
    """Train; save the model, the tokenizer, the metrics and the trainer's state in the output folder."""
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    record(trainer, "train", result.metrics, len(trainer.train_dataset))
    trainer.save_state()


def share(trainer: Any, data: DataArguments, **card: Any) -> None:
    """Write the model card, and push everything to the Hub if that was asked for."""
    name, config = data.dataset_name, data.dataset_config_name
    if name is not None:
        card |= {"dataset_tags": name, "dataset": f"{name} {config}" if config else name}
        card |= {"dataset_args": config} if config else {}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
