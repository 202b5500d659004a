"""The example scripts: every command of the documentation, on folders that stand for what it downloads."""

import functools
import json
import logging
import os
import runpy
import shlex
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from transformers.utils.logging import get_verbosity, set_verbosity

from tests.hf import hub_server
from tests.hf.script_folders import PAIRS, write_all, write_csv, write_jsonl

ROOT = Path(__file__).parents[2] / "examples/pytorch"
GLUE = ROOT / "text-classification/run_glue.py"
SUMMARIZE = ROOT / "summarization/run_summarization.py"
FUNCTIONAL = ROOT / "summarization/run_summarization_no_trainer.py"
MODEL = "--model_name_or_path google-t5/t5-small --source_prefix 'summarize: '"
NEWS = "--dataset_name cnn_dailymail --dataset_config '3.0.0'"
SMALL = "--max_train_samples 16 --max_eval_samples 5 --max_predict_samples 3"
SIZES = "--per_device_train_batch_size=4 --per_device_eval_batch_size=4"
QUIET = "--use_cpu --disable_tqdm true --log_level error"
SHORT = f"--num_train_epochs 1 --val_max_target_length 6 {QUIET}"
BERT = f"--model_name_or_path google-bert/bert-base-cased --max_seq_length 16 --num_train_epochs 1 {QUIET}"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_all(folder)
    return folder


@pytest.fixture(autouse=True)
def work(hub, tmp_path, monkeypatch):
    """The working directory: what stands for the Hub is in it, and nothing is asked of the network."""
    for path in hub.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub / "cache")
    silent, loud, ours = datasets.are_progress_bars_disabled(), get_verbosity(), logging.getLogger("trainfn").level
    datasets.disable_progress_bars()
    yield tmp_path
    set_verbosity(loud)
    logging.getLogger("trainfn").setLevel(ours)
    if not silent:
        datasets.enable_progress_bars()


@pytest.fixture
def run(monkeypatch):
    def run(script, *commands):
        arguments = shlex.split(" ".join(commands))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [str(script), *arguments])
            patch.setattr(sys, "path", [str(script.parent), *sys.path])  # as Python does for a script
            runpy.run_path(str(script), run_name="__main__")

    return run


def results(folder, split="all"):
    return json.loads(Path(folder, f"{split}_results.json").read_text())


def state(folder):
    return json.loads(Path(folder, "trainer_state.json").read_text())


def files(folder):
    return {path.name for path in Path(folder).iterdir()}


# --- run_summarization ------------------------------------------------------------------------------------------------


def test_summarization_trains_evaluates_and_predicts(run):
    run(SUMMARIZE, MODEL, NEWS, "--do_train --do_eval --do_predict --output_dir out --overwrite_output_dir",
        "--predict_with_generate --max_train_samples 50 --max_eval_samples 5 --max_predict_samples 3",
        SIZES, SHORT)  # fmt: skip
    kept = ["all_results.json", "train_results.json", "eval_results.json", "predict_results.json", "trainer_state.json"]
    kept += ["generated_predictions.txt", "README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert {*kept, "checkpoint-13"} <= files("out")
    assert results("out", "train")["train_samples"] == 50
    found = results("out", "eval")
    scores = {f"eval_{name}" for name in ("rouge1", "rouge2", "rougeL", "rougeLsum", "gen_len", "loss", "samples")}
    assert scores <= found.keys() and found["eval_samples"] == 5 and 0 < found["eval_gen_len"] <= 6
    assert results("out", "predict")["predict_samples"] == 3
    assert results("out").keys() >= {"train_loss", "eval_rouge1", "predict_rouge1"}
    assert len(Path("out/generated_predictions.txt").read_text().split("\n")) == 3
    card = Path("out/README.md").read_text()
    assert "cnn_dailymail" in card and "google-t5/t5-small" in card and "Rouge1" in card


def test_training_resumes_from_the_last_checkpoint_or_a_named_one(run, caplog):
    command = f"{MODEL} {NEWS} --do_train {SMALL} {SIZES} {QUIET} --save_steps 2 --output_dir /nowhere"
    command += " --lr_scheduler_type constant"
    run(SUMMARIZE, command, "--output_dir previous --max_steps 4")
    assert state("previous")["global_step"] == 4
    run(SUMMARIZE, command, "--output_dir previous --max_steps 6 --log_level info")
    assert "Resuming from previous/checkpoint-4" in caplog.text
    assert state("previous")["global_step"] == 6
    caplog.clear()

    run(SUMMARIZE, command, "--output_dir other --overwrite_output_dir --max_steps 6 --log_level info",
        "--resume_from_checkpoint previous/checkpoint-2")  # fmt: skip
    assert "Resuming from previous/checkpoint-2" in caplog.text
    assert Path("other/model.safetensors").read_bytes() == Path("previous/model.safetensors").read_bytes()

    caplog.clear()
    run(SUMMARIZE, command, "--output_dir previous --overwrite_output_dir --max_steps 2 --log_level info")
    assert "Resuming from" not in caplog.text
    assert state("previous")["global_step"] == 2


def test_a_folder_with_other_files_is_not_trained_into_unasked(run):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    command = f"{MODEL} {NEWS} --do_train {SMALL} {SIZES} {QUIET} --max_steps 1 --output_dir out"
    with pytest.raises(ValueError, match=r"there are files in it, and no checkpoint.*Write `--overwrite_output_dir`"):
        run(SUMMARIZE, command)
    run(SUMMARIZE, command, "--overwrite_output_dir")
    assert {"notes.txt", "model.safetensors"} <= files("out")


@pytest.mark.parametrize(("ending", "write"), [("csv", write_csv), ("jsonl", write_jsonl), ("json", write_jsonl)])
def test_summarization_of_files_of_ones_own(ending, write, run, work):
    write(
        work / f"a.{ending}",
        ["number", "body", "short"],
        [(i, *pair) for i, pair in enumerate([*PAIRS[:9], ("", "x")])],
    )
    write(work / f"b.{ending}", ["number", "body", "short"], [(i, *pair) for i, pair in enumerate(PAIRS[:4])])
    run(SUMMARIZE, MODEL, f"--train_file a.{ending} --validation_file b.{ending} --text_column body",
        "--summary_column short --do_train --do_eval --output_dir out --predict_with_generate",
        SIZES, SHORT)  # fmt: skip
    assert (results("out")["train_samples"], results("out")["eval_samples"]) == (9, 4)  # an empty text is left out


def test_all_arguments_may_stand_in_a_json_file(run, work):
    options = {
        "model_name_or_path": "google-t5/t5-small", "dataset_name": "cnn_dailymail", "dataset_config_name": "3.0.0",
        "source_prefix": "summarize: ", "do_train": True, "max_train_samples": 6, "output_dir": "out", "max_steps": 1,
        "use_cpu": True, "disable_tqdm": True, "log_level": "error", "pad_to_max_length": True,
        "max_source_length": 16, "max_target_length": 8, "overwrite_output_dir": True,
    }  # fmt: skip
    (work / "arguments.json").write_text(json.dumps(options))
    run(SUMMARIZE, "arguments.json")
    assert results("out")["train_samples"] == 6


@pytest.mark.parametrize("script", [GLUE, SUMMARIZE, FUNCTIONAL], ids=lambda script: script.stem)
def test_help(script, run, capsys):
    with pytest.raises(SystemExit) as ended:
        run(script, "-h")
    assert ended.value.code == 0
    assert os.access(script, os.X_OK)  # the documentation calls it without `python`
    printed = capsys.readouterr().out
    wanted = ("train", "eval") if script == FUNCTIONAL else ("train", "eval", "predict")
    assert all(f"--max_{split}_samples" in printed for split in wanted)


def test_xla_spawn_starts_it_in_its_way(run, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SUMMARIZE.parent), *sys.path])
    command = f"{MODEL} {NEWS} --do_train {SMALL} {SIZES} {QUIET} --max_steps 1 --output_dir out --tpu_num_cores 8"
    monkeypatch.setattr(sys, "argv", [str(SUMMARIZE), *shlex.split(command)])
    with pytest.warns(DeprecationWarning, match="tpu_num_cores"):
        runpy.run_path(str(SUMMARIZE))["_mp_fn"](0)
    assert results("out")["train_samples"] == 16


def test_the_model_is_shared_under_the_name_that_is_asked_for(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.modelcard.is_offline_mode", lambda: True)
    with hub_server.serving() as server, pytest.warns(DeprecationWarning, match="push_to_hub_model_id"):
        monkeypatch.setattr(
            "trainfn.hf._reporting._hub.api", lambda: huggingface_hub.HfApi(endpoint=server.url, token="hf_test")
        )
        run(SUMMARIZE, MODEL, NEWS, f"--do_train {SMALL} {SIZES} {QUIET} --max_steps 1 --output_dir out --push_to_hub",
            "--hub_token hf_test --push_to_hub_model_id finetuned-t5-cnn_dailymail")  # fmt: skip
    assert [*server.repos] == ["tester/finetuned-t5-cnn_dailymail"]
    assert {"README.md", "model.safetensors"} <= server.repos["tester/finetuned-t5-cnn_dailymail"].keys()


# --- what can't work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", r"Name a dataset, `--dataset_name cnn_dailymail`, or files"),
        ("--train_file a.txt", r"a\.txt: data files are \.csv, \.json or \.jsonl"),
        ("--train_file a.csv", r"`--do_eval` needs a validation split, and the data have \['train'\]"),
        (
            f"{NEWS} --text_column body",
            r"`--text_column body`: there is no such column in the data, which have article",
        ),
        (f"{NEWS} --lang ro_RO", r"`--lang ro_RO`: a .* knows of no languages"),
        (f"{NEWS} --debug underflow_overflow", r"debug=.* can't work"),
    ],
)
def test_what_cannot_work_in_summarization(options, message, run, work):
    write_csv(work / "a.csv", ["text", "summary"], PAIRS[:4])
    with pytest.raises(ValueError, match=message):
        run(SUMMARIZE, MODEL, options, f"--do_eval --output_dir out {SHORT}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task_name mrcp", r"`--task_name mrcp`: the tasks of GLUE are cola, mnli, mrpc"),
        (NEWS, r"The data have no column `label`"),
        ("--train_file a.csv --validation_file b.csv", r"A row to evaluate on has the label 'ugly'.*\['bad', 'good'\]"),
    ],
)
def test_what_cannot_work_in_glue(options, message, run, work):
    write_csv(work / "a.csv", ["text", "label"], [("w1", "good"), ("w2", "bad")])
    write_csv(work / "b.csv", ["text", "label"], [("w1", "ugly")])
    with pytest.raises(ValueError, match=message):
        run(GLUE, BERT, options, "--do_train --do_eval --output_dir out")


def test_what_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"needs rouge-score: `pip install 'trainfn\[scripts\]'`"):
        run(SUMMARIZE, MODEL, NEWS, f"--do_eval --predict_with_generate --output_dir out {SHORT}")


def test_t5_without_a_prefix_is_warned_about(run):
    with pytest.warns(UserWarning, match=r"--source_prefix 'summarize: '"):
        run(SUMMARIZE, "--model_name_or_path google-t5/t5-small", NEWS, SMALL, f"--do_eval --output_dir out {SHORT}")


# --- run_glue ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("mrpc", {"accuracy", "f1", "combined_score"}),
        ("cola", {"matthews_correlation"}),
        ("stsb", {"pearson", "spearmanr", "combined_score"}),
    ],
)
def test_glue(task, metrics, run):
    run(GLUE, BERT, f"--task_name {task} --do_train --do_eval --do_predict --per_device_train_batch_size 16",
        f"--learning_rate 5e-3 --output_dir {task}/ --overwrite_output_dir --max_predict_samples 7")  # fmt: skip
    assert {f"eval_{name}" for name in (*metrics, "loss", "samples")} <= results(task, "eval").keys()
    assert results(task)["train_samples"] == 24 and results(task)["predict_samples"] == 7
    header, *lines = Path(task, f"predict_results_{task}.txt").read_text().splitlines()
    assert header == "index\tprediction" and len(lines) == 7
    if task == "mrpc":
        assert {line.split("\t")[1] for line in lines} <= {"equivalent", "not_equivalent"}
        assert json.loads(Path(task, "config.json").read_text())["label2id"] == {"not_equivalent": 0, "equivalent": 1}


def test_glue_of_two_kinds(run):
    run(GLUE, BERT, "--task_name mnli --do_eval --do_predict --output_dir mnli --pad_to_max_length false")
    assert {"eval_accuracy", "eval_accuracy_mm", "eval_samples_mm"} <= results("mnli").keys()
    assert {"predict_results_mnli.txt", "predict_results_mnli_mm.txt"} <= files("mnli")


def test_a_model_that_knows_the_classes_keeps_its_numbers(run, hub, work):
    import shutil

    shutil.copytree(hub / "google-bert/bert-base-cased", work / "tuned")
    config = json.loads((work / "tuned/config.json").read_text())
    config |= {"label2id": {"good": 0, "bad": 1}, "id2label": {"0": "good", "1": "bad"}}
    (work / "tuned/config.json").write_text(json.dumps(config))
    write_csv(work / "a.csv", ["text", "label"], [(a, ["bad", "good"][i % 2]) for i, (a, _) in enumerate(PAIRS[:8])])
    write_jsonl(work / "b.jsonl", ["text"], [("w1 w2",), ("w3",)])
    run(GLUE, BERT, "--model_name_or_path tuned --train_file a.csv --validation_file a.csv --test_file b.jsonl",
        "--do_train --do_eval --do_predict --output_dir out")  # fmt: skip
    assert json.loads(Path("out/config.json").read_text())["label2id"] == {"good": 0, "bad": 1}
    assert "eval_accuracy" in results("out") and "predict_results.txt" in files("out")


# --- run_summarization_no_trainer -------------------------------------------------------------------------------------


def test_the_functional_script_trains_and_resumes(run, capsys):
    command = f"{MODEL} {NEWS} --max_train_samples 13 --max_eval_samples 5 --val_max_target_length 6 {SIZES}"
    command += " --learning_rate 1e-2 --gradient_accumulation_steps 2 --checkpointing_steps"
    run(FUNCTIONAL, command, "epoch --output_dir whole --num_train_epochs 3")
    assert {"checkpoint-2", "checkpoint-4", "checkpoint-6", "all_results.json", "tokenizer.json"} <= files("whole")
    found = results("whole")
    assert {"eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_rougeLsum", "eval_gen_len", "eval_loss"} <= found.keys()

    run(FUNCTIONAL, command, "2 --output_dir parts --max_train_steps 6 --resume_from_checkpoint whole/epoch_0",
        "--per_device_eval_batch_size 3")  # fmt: skip
    assert results("parts") == pytest.approx(found, rel=1e-6)
    assert Path("parts/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    capsys.readouterr()
    run(FUNCTIONAL, command, "2 --output_dir parts --max_train_steps 7")
    assert "resuming from parts/checkpoint-6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--checkpointing_steps often", r"`--checkpointing_steps often`: a number of updates from 1 on, or `epoch`"),
        ("--model_type t5", r"Name a model, `--model_name_or_path google-t5/t5-small`, or --model_type"),
    ],
)
def test_what_cannot_work_in_the_functional_script(options, message, run):
    with pytest.raises(ValueError, match=message):
        run(FUNCTIONAL, NEWS, options, "--output_dir out", "" if "model_type" in options else MODEL)


def test_the_functional_script_shares_the_model(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    command = f"{MODEL} {NEWS} --max_train_samples 4 --max_eval_samples 2 --val_max_target_length 6 {SIZES}"
    with hub_server.serving() as server:
        monkeypatch.setattr(huggingface_hub, "HfApi", functools.partial(huggingface_hub.HfApi, endpoint=server.url))
        run(FUNCTIONAL, command, "--max_train_steps 1 --checkpointing_steps 1 --output_dir out --push_to_hub",
            "--hub_token hf_test")  # fmt: skip
    assert [*server.repos] == ["tester/out"]
    pushed = server.repos["tester/out"].keys()
    assert {"model.safetensors", "all_results.json"} <= pushed and not [x for x in pushed if "checkpoint" in x]


def test_half_precision(run, work):
    """As in the documentation's torchrun command."""
    run(SUMMARIZE, MODEL, NEWS, f"--do_train --fp16 --max_steps 1 --output_dir out {SHORT}")
    assert (work / "out" / "train_results.json").exists()
