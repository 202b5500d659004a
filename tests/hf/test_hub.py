"""The Hub: what each strategy uploads, that failures wait for the next push, and what is said without a token."""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import trainfn as tfn
from tests.hf import hub_server
from trainfn.hf._callbacks._events import CallbackHandler, with_defaults
from trainfn.hf._reporting import _hub

MODEL_FILES = ("config.json", "model.safetensors", "training_args.json")
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_server.serving() as server:
        monkeypatch.setattr(_hub, "api", lambda: HfApi(endpoint=server.url, library_name="trainfn"))
        yield server


class Pushed(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_push_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


class Trainer:
    """As much of a Trainer as the functions of `_hub` ask for."""

    def __init__(self, folder, *, model=None, process=0, **args):
        given = {"push_to_hub": True, "hub_token": "hf_test", "save_strategy": "steps", "disable_tqdm": True}
        self.args = TrainingArguments(str(folder / "my-model"), use_cpu=True, **{**given, **args})
        self.model = model or torch.nn.Linear(1, 1)
        self.state, self.control = TrainerState(epoch=1.0, global_step=1, max_steps=9), TrainerControl()
        self.processing_class = self.optimizer = self.lr_scheduler = self.hub_model_id = self.push_in_progress = None
        self.train_dataset = self.eval_dataset = None
        self.process, self.pushed = process, Pushed()
        self.callback_handler = CallbackHandler(with_defaults([self.pushed], self.args), self)

    def is_world_process_zero(self):
        return self.process == 0

    def save_model(self, output_dir=None, _internal_call=False):
        assert _internal_call, "`save_model` would push in its turn"
        Path(self.args.output_dir).mkdir(exist_ok=True)
        Path(self.args.output_dir, "model.safetensors").write_text(f"final {self.state.global_step}")

    def init_hf_repo(self, token=None, private=None):
        _hub.init_repo(self, token, private)

    def create_model_card(self, **card):
        _hub.create_model_card(self, **card)

    def checkpoint(self, step, **more):
        """What the training does at a save."""
        self.state.global_step, self.state.epoch = step, step / 2
        folder = Path(self.args.output_dir, f"checkpoint-{step}")
        folder.mkdir(parents=True)
        files = {"config.json": "{}", "model.safetensors": f"weights {step}", "optimizer.pt": "moments"}
        for name, text in {**files, "trainer_state.json": "{}", **more}.items():
            (folder / name).write_text(text)
        _hub.push_from_checkpoint(self, folder)
        return folder

    def wait(self):
        self.push_in_progress.wait_until_done()


@pytest.fixture
def trainer(tmp_path, hub):
    def make(**args):
        made = Trainer(tmp_path, **args)
        _hub.init_repo(made)
        return made

    return make


# --- the repository ---------------------------------------------------------------------------------------------------


def test_the_repository_is_called_like_the_output_folder(trainer, hub):
    made = trainer(hub_private_repo=True)
    assert made.hub_model_id == "tester/my-model"
    assert hub.created[0]["name"] == "my-model"
    assert hub.created[0].get("private", hub.created[0].get("visibility") == "private")
    _hub.init_repo(made)  # it exists, which is fine
    assert hub.tokens == {"Bearer hf_test"}


def test_the_repository_can_be_named(trainer):
    assert trainer(hub_model_id="crowd/other").hub_model_id == "crowd/other"


def test_only_the_main_process_talks_to_the_hub(trainer, hub):
    made = trainer(process=1)
    made.checkpoint(1)
    assert _hub.push_to_hub(made) is None
    _hub.create_model_card(made)
    assert hub.created == hub.commits == []
    assert not Path(made.args.output_dir, "README.md").exists()


def test_no_token_is_an_error_at_once_which_says_what_to_do(tmp_path, monkeypatch, hub):
    monkeypatch.setattr(_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"there is none\. Run `hf auth login`, set HF_TOKEN, or write `hub_token="):
        _hub.init_repo(Trainer(tmp_path, hub_token=None))
    assert hub.created == []


def test_the_token_that_is_logged_in_will_do(tmp_path, monkeypatch, hub):
    monkeypatch.setattr(_hub, "get_token", lambda: "hf_logged_in")
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: "hf_logged_in")
    _hub.init_repo(Trainer(tmp_path, hub_token=None))
    assert hub.tokens == {"Bearer hf_logged_in"}


def test_a_hub_that_refuses_is_an_error_at_once(tmp_path, hub):
    hub.refuses_repos = True
    with pytest.raises(RuntimeError, match=r"(?s)can't create the repository 'my-model' on http.*`push_to_hub=False`"):
        _hub.init_repo(Trainer(tmp_path))


def test_a_hub_that_is_not_there_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_hub, "api", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(RuntimeError, match=r"can't create the repository 'my-model' on http://127\.0\.0\.1:9"):
        _hub.init_repo(Trainer(tmp_path))


def test_the_endpoint_is_that_of_the_environment(tmp_path):
    with hub_server.serving() as hub:
        program = f"""
import types
from trainfn.hf._reporting import _hub
args = types.SimpleNamespace(hub_token="hf_x", hub_model_id=None, output_dir={str(tmp_path / "env")!r},
                             hub_private_repo=None, hub_revision=None)
trainer = types.SimpleNamespace(args=args, is_world_process_zero=lambda: True)
_hub.init_repo(trainer)
print(trainer.hub_model_id)
"""
        environment = {"HF_ENDPOINT": hub.url, "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True, text=True, env=environment, cwd=Path(tfn.__file__).parents[1], timeout=60,
        )  # fmt: skip
        assert done.stdout.strip() == "tester/env", done.stderr
        assert hub.created[0]["name"] == "env"


# --- the strategies ---------------------------------------------------------------------------------------------------

MODEL = [("Training in progress, step 2", MODEL_FILES), ("Training in progress, step 4", MODEL_FILES)]
WHOLE = ("config.json", "model.safetensors", "optimizer.pt", "trainer_state.json")
EXPECTED = {
    "end": [],
    "every_save": MODEL,
    "checkpoint": [
        MODEL[0],
        ("Training in progress, step 2, checkpoint", tuple(f"last-checkpoint/{name}" for name in WHOLE)),
        MODEL[1],
        ("Training in progress, step 4, checkpoint", tuple(f"last-checkpoint/{name}" for name in WHOLE)),
    ],
    "all_checkpoints": [
        MODEL[0],
        ("Training in progress, step 2, checkpoint", tuple(f"checkpoint-2/{name}" for name in WHOLE)),
        MODEL[1],
        ("Training in progress, step 4, checkpoint", tuple(f"checkpoint-4/{name}" for name in WHOLE)),
    ],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_uploads_this_and_nothing_else(trainer, hub, strategy):
    made = trainer(hub_strategy=strategy)
    for step in (2, 4):
        made.checkpoint(step)
        made.wait()
    _hub.finish(made)
    assert hub.commits == EXPECTED[strategy]
    files = hub.repos["tester/my-model"]
    if strategy != "end":
        assert files["model.safetensors"] == b"weights 4"
        assert ("optimizer.pt" in "".join(files)) == ("checkpoint" in strategy)
    assert made.pushed.steps == ([] if strategy == "end" else [2, 4])
    assert not made.state.log_history


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_calls_of_the_client(trainer, monkeypatch, strategy):
    made, calls = trainer(hub_strategy=strategy, hub_revision="exp"), []

    def upload_folder(**call):
        calls.append(call)
        return "a CommitInfo"

    monkeypatch.setattr(made.push_in_progress.client, "upload_folder", upload_folder)
    folder = made.checkpoint(2)
    made.wait()
    assert _hub.push_to_hub(made) == "a CommitInfo"
    same = {"repo_id": "tester/my-model", "token": "hf_test", "revision": "exp"}
    top = {
        **same,
        "folder_path": made.args.output_dir,
        "path_in_repo": None,
        "ignore_patterns": ["_*", "checkpoint-*", ".*"],
    }
    model = {**top, "commit_message": "Training in progress, step 2"}
    path = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}.get(strategy)
    checkpoint = {
        **same, "folder_path": str(folder), "path_in_repo": path, "ignore_patterns": None,
        "commit_message": "Training in progress, step 2, checkpoint",
    }  # fmt: skip
    end = {**top, "commit_message": "End of training", "run_as_future": False}
    assert calls == [*([] if strategy == "end" else [model]), *([checkpoint] if path else []), end]


def test_no_checkpoint_that_is_being_written_goes_with_the_model(trainer, hub):
    made = trainer()
    writing = Path(made.args.output_dir, ".checkpoint-9.writing-1")
    writing.mkdir(parents=True)
    for file in (writing / "state.safetensors", writing.with_name(".lock"), writing.with_name("_beside")):
        file.write_text("not for the Hub")
    made.checkpoint(2, **{"training_args.json": "{}"})
    made.wait()
    assert hub.commits[0].files == ("config.json", "model.safetensors", "training_args.json")


def test_a_run_that_saves_by_epoch_says_so(trainer, hub):
    made = trainer(save_strategy="epoch")
    made.checkpoint(4)
    made.wait()
    assert hub.commits[0].message == "Training in progress, epoch 2"


def test_shards_adapters_and_the_processing_class_go_with_the_model(trainer, hub):
    made = trainer()
    made.processing_class = SimpleNamespace(
        save_pretrained=lambda folder: Path(folder, "tokenizer.json").write_text("{}")
    )
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    shards = {"model-1.safetensors": "1", "model-2.safetensors": "2", "model.safetensors.index.json": index}
    made.checkpoint(2, **shards, **{"adapter_config.json": "{}", "training_args.bin": "args", "rng_state.pth": "rng"})
    made.wait()
    assert set(hub.commits[0].files) == {
        *MODEL_FILES[:2], "training_args.bin", *shards, "adapter_config.json", "tokenizer.json",
    }  # fmt: skip
    assert hub.repos["tester/my-model"]["training_args.bin"] == b"args"


# --- while one is under way -------------------------------------------------------------------------------------------


def test_a_push_is_skipped_while_one_is_under_way_and_the_last_is_made_up_for(trainer, hub):
    made = trainer()
    hub.gate.clear()
    made.checkpoint(1)
    made.checkpoint(2)
    folder = made.checkpoint(3)
    assert not made.push_in_progress.is_done()
    assert made.push_in_progress.uses(made.args.output_dir)
    assert not made.push_in_progress.uses(folder)  # only its copy of the model is uploaded
    hub.gate.set()
    _hub.finish(made)
    assert [commit.message for commit in hub.commits] == [f"Training in progress, step {n}" for n in (1, 3)]
    assert hub.repos["tester/my-model"]["model.safetensors"] == b"weights 3"


def test_every_checkpoint_gets_there_even_those_that_were_skipped(trainer, hub):
    made = trainer(hub_strategy="all_checkpoints")
    hub.gate.clear()
    folders = [made.checkpoint(n) for n in (1, 2, 3)]
    assert all(made.push_in_progress.uses(folder) for folder in folders)
    hub.gate.set()
    _hub.finish(made)
    kept = {name.split("/")[0] for name in hub.repos["tester/my-model"] if name.startswith("checkpoint-")}
    assert kept == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert not any(made.push_in_progress.uses(folder) for folder in folders)


def test_hub_always_push_skips_no_push(trainer, hub):
    made = trainer(hub_always_push=True)
    hub.gate.clear()
    for n in (1, 2, 3):
        made.checkpoint(n)
    hub.gate.set()
    made.wait()
    assert [commit.message for commit in hub.commits] == [f"Training in progress, step {n}" for n in (1, 2, 3)]


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_a_failed_push_is_reported_and_tried_again_and_never_raised(trainer, hub, caplog, strategy):
    made = trainer(hub_strategy=strategy)
    hub.broken = True
    with caplog.at_level(logging.WARNING, "trainfn"):
        made.checkpoint(2)
        made.wait()
    assert 'The push "Training in progress, step 2" to the Hub failed: HfHubHTTPError' in caplog.text
    assert "The training goes on; the next push tries again." in caplog.text
    hub.broken = False
    made.checkpoint(4)
    made.wait()
    told = made.state.log_history[0]
    assert (told["hub_push"], told["step"]) == ("Training in progress, step 2", 4)
    assert "the disk of the Hub is full" in told["hub_error"]
    json.dumps(made.state.log_history)
    assert hub.repos["tester/my-model"]["model.safetensors"] == b"weights 4"
    if strategy == "all_checkpoints":  # the one that failed is not superseded
        assert "checkpoint-2/model.safetensors" in hub.repos["tester/my-model"]


def test_what_failed_last_is_tried_again_at_the_end(trainer, hub):
    made = trainer()
    hub.broken = True
    made.checkpoint(2)
    made.wait()
    hub.broken = False
    _hub.finish(made)
    assert hub.commits == EXPECTED["every_save"][:1]
    assert made.push_in_progress.failed == []


def test_a_checkpoint_that_is_gone_is_not_tried_again(trainer, hub, caplog):
    made = trainer(hub_strategy="all_checkpoints")
    hub.broken = True
    folder = made.checkpoint(2)
    made.wait()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    hub.broken = False
    with caplog.at_level(logging.WARNING, "trainfn"):
        _hub.finish(made)
    assert f"{folder} does not exist any more, so it is not pushed" in caplog.text


def test_a_push_that_can_not_be_started_is_reported_too(trainer, hub, monkeypatch, caplog):
    made = trainer()
    monkeypatch.setattr("shutil.copy", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with caplog.at_level(logging.WARNING, "trainfn"):
        made.checkpoint(2)
    assert "could not be started" in caplog.text
    assert made.state.log_history[0]["hub_error"] == "OSError: no space left on device"
    assert hub.commits == []


# --- push_to_hub and the card -----------------------------------------------------------------------------------------


def test_push_to_hub_saves_the_model_writes_the_card_and_uploads_both(trainer, hub):
    made = trainer(push_to_hub=False)
    made.state.log_history += [{"loss": 0.5, "step": 1}, {"eval_loss": 0.25, "epoch": 1.0, "step": 1}]
    made.state.log_history.append({"train_runtime": 1.0, "train_loss": 0.5, "step": 1})
    made.checkpoint(2)
    made.push_in_progress.wait_until_done()
    made.model.model_tags = ["mine"]
    info = _hub.push_to_hub(made, "Done", tags="yours", license="mit")
    assert info.commit_message == "Done"
    assert hub.repos["tester/my-model"]["model.safetensors"] == b"final 2"
    card = hub.repos["tester/my-model"]["README.md"].decode()
    assert "license: mit" in card and "- yours\n- mine\n- generated_from_trainer" in card
    assert "# my-model" in card and "0.25" in card and "train_batch_size: 8" in card
    assert not any(name.startswith("checkpoint-2") for name in hub.repos["tester/my-model"])


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
@pytest.mark.parametrize("broken", [True, False])
def test_push_to_hub_waits_and_pushes_no_model_twice(trainer, hub, strategy, broken):
    made = trainer(hub_strategy=strategy)
    hub.broken = broken
    hub.gate.clear()
    made.checkpoint(2)
    made.checkpoint(4)  # skipped
    threading.Timer(0.2, hub.gate.set).start()
    if broken:
        made.wait()
        hub.broken = False
    _hub.push_to_hub(made)
    messages = [commit.message.removeprefix("Training in progress, ") for commit in hub.commits]
    last = {"checkpoint": ["step 4, checkpoint"]}.get(strategy, [])
    first = [] if broken else ["step 2", *(["step 2, checkpoint"] if last else [])]
    assert messages == [*first, *last, "End of training"]
    assert made.push_in_progress.is_done() and made.push_in_progress.failed == []


def test_push_to_hub_without_blocking_gives_a_future(trainer, hub):
    future = _hub.push_to_hub(trainer(), blocking=False, token="hf_other")
    assert future.result(20).commit_message == "End of training"
    assert "Bearer hf_other" in hub.tokens


def test_push_to_hub_creates_the_repository_if_there_is_none_yet(tmp_path, hub):
    made = Trainer(tmp_path, push_to_hub=False)
    _hub.push_to_hub(made, private=True)
    assert made.hub_model_id == "tester/my-model"
    assert hub.commits[0].files == ("README.md", "model.safetensors")


def test_what_the_user_calls_raises(trainer, hub):
    made = trainer()
    hub.broken = True
    with pytest.raises(Exception, match="the disk of the Hub is full"):
        _hub.push_to_hub(made)


def test_an_earlier_card_keeps_its_tags(trainer):
    made = trainer()
    _hub.create_model_card(made, tags=["first"])
    _hub.create_model_card(made, tags="second", finetuned_from="")
    assert "- second\n- first\n- generated_from_trainer" in Path(made.args.output_dir, "README.md").read_text()


def test_without_a_repository_there_is_nothing_to_push_or_to_wait_for(tmp_path):
    made = Trainer(tmp_path, push_to_hub=False)
    made.checkpoint(1)
    _hub.finish(made)
    assert made.push_in_progress is None
