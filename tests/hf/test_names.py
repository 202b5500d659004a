"""Every name of transformers' Trainer: an override is called as there, or a warning has the line to write instead."""

import inspect
import json
import warnings
from collections import Counter
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import trainfn.hf
from tests.hf.models import gpt2, tokens
from trainfn import Trainer, TrainingArguments
from trainfn.hf import _names

KINDS = pytest.mark.parametrize("kind", ["Trainer", "Seq2SeqTrainer"])


def arguments(folder, **options):
    given = {
        "use_cpu": True, "disable_tqdm": True, "report_to": "none", "log_level": "error", "max_steps": 4,
        "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**given, **options})


SAVING = {"save_strategy": "steps", "save_steps": 2}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


def made(kind, folder, **options):
    return kind(gpt2(), arguments(folder, **options), train_dataset=tokens(8), eval_dataset=tokens(4))


# --- the table --------------------------------------------------------------------------------------------------------


@KINDS
def test_every_name_of_the_installed_transformers_is_known(kind):
    found = _names.table(getattr(trainfn.hf, kind), getattr(transformers, kind))
    assert not {name for name, (what, _) in found.items() if what == "unknown"}


@KINDS
def test_signatures_are_those_of_transformers(kind):
    """What transformers passes, an override gets; and a call that works there works here."""
    theirs, ours = getattr(transformers, kind), getattr(trainfn.hf, kind)
    for name in sorted(set(dir(theirs)) - set(_names.NOT_CALLED)):
        method = inspect.getattr_static(theirs, name)
        if name.startswith("__") or not inspect.isfunction(method) or not _names.exists(ours, name):
            continue
        mine = inspect.signature(getattr(ours, name)).parameters
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in mine.values()):
            continue
        wanted = [each for each in inspect.signature(method).parameters if each != "self"]
        assert wanted == [each for each in mine if each != "self"][: len(wanted)], name


def test_a_method_that_is_called_has_no_line_to_write_instead():
    there = {name for name in _names.NOT_CALLED if _names.exists(trainfn.hf.Seq2SeqTrainer, name)}
    assert there == {"_wrap_model", "_tune_save_checkpoint", "_prepare_context_parallel_inputs"}


# --- overrides that are not called ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(_names.NOT_CALLED))
def test_an_override_that_is_not_called_is_warned_of_once(name):
    write = _names.NOT_CALLED[name]
    with pytest.warns(UserWarning, match=rf"`Mixin\.{name}` is never called here\. {write[:20]}") as caught:
        mixin = type("Mixin", (), {name: lambda self: None})
        once = type("Once", (mixin, Trainer), {})
        type("Again", (once,), {})
    assert len(caught) == 1


def test_a_name_that_is_missing_has_a_remedy(tmp_path):
    trainer = made(Trainer, tmp_path)
    with pytest.raises(AttributeError, match=r"`Trainer\._inner_training_loop` does not exist here\. Override `train`"):
        _ = trainer._inner_training_loop
    with pytest.raises(AttributeError, match=r"`Trainer` has no attribute 'evalute'\. Did you mean `evaluate`\?"):
        _ = trainer.evalute
    with pytest.raises(AttributeError, match=r"no attribute 'qqqq'\. Set it in `__init__`: `self\.qqqq = \.\.\.`"):
        _ = trainer.qqqq
    assert not hasattr(trainer, "_inner_training_loop") and not hasattr(Trainer, "_nested_gather")


def test_super_of_a_missing_name_has_the_remedy_too(tmp_path):
    with pytest.warns(UserWarning, match="_run_epoch` is never called here"):

        class Mine(Trainer):
            def _run_epoch(self):
                return super()._run_epoch()

    with pytest.raises(AttributeError, match=r"_run_epoch` does not exist here. Override `train`, or write a callback"):
        made(Mine, tmp_path)._run_epoch()


def test_the_error_of_a_property_stays_itself(tmp_path):
    class Mine(Trainer):
        @property
        def broken(self):
            return self.args.learning_rat

    with pytest.raises(AttributeError, match="no argument 'learning_rat'"):
        _ = made(Mine, tmp_path).broken


# --- overrides that are called ----------------------------------------------------------------------------------------

CALLED = {
    "create_accelerator_and_postprocess": 1, "_build_accelerator_args": 1, "_validate_args": 1,
    "_move_model_to_device": 1, "_hp_search_setup": 1, "_maybe_log_save_evaluate": 5, "_evaluate": 2,
    "_determine_best_metric": 2, "_save_checkpoint": 2, "save_model": 2, "_save": 2, "_save_rng_state": 2,
    "_save_optimizer_and_scheduler": 2, "_load_best_model": 1, "_finalize_training": 1, "_get_learning_rate": 4,
    "floating_point_ops": 4, "_track_num_input_tokens": 4, "_report_to_hp_search": 2,
}  # fmt: skip


def counting(names):
    counts, given = Counter(), {}

    def method(name):
        def called(self, *args, **options):
            counts[name] += 1
            given.setdefault(name, (args, options))
            return getattr(super(kind, self), name)(*args, **options)

        return called

    kind = type("Counting", (Trainer,), {name: method(name) for name in names})
    return kind, counts, given


def test_overrides_are_called_where_transformers_calls_them(tmp_path):
    kind, counts, given = counting([*CALLED, "_get_output_dir", "store_flos", "end"])
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    options = {**SAVING, **EVALUATING, **best, "include_num_input_tokens_seen": "all"}
    trainer = made(kind, tmp_path / "own", **options)
    trainer.train()
    # An epoch has 4 steps here, so `_maybe_log_save_evaluate` is called after each of them, and at its end.
    assert {name: counts[name] for name in CALLED} == CALLED
    assert counts["store_flos"] >= 4 and counts["_get_output_dir"] > 0
    assert given["save_model"] == ((str(tmp_path / "own" / "checkpoint-2"),), {"_internal_call": True})
    assert given["_save_optimizer_and_scheduler"] == ((str(tmp_path / "own" / "checkpoint-2"),), {})
    loss, norm, model, trial, epoch, ignored, began = given["_maybe_log_save_evaluate"][0]
    assert isinstance(loss, torch.Tensor) and model is trainer.model and (trial, ignored) == (None, None)
    first = trainer.state.log_history[0]
    assert float(loss) == pytest.approx(first["loss"]) and float(norm) == pytest.approx(first["grad_norm"])
    assert epoch == 0.25 and began == pytest.approx(trainer._trainfn.run.began)
    plain = made(Trainer, tmp_path / "plain", **options)
    plain.train()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])


def test_loading_is_called_part_by_part(tmp_path):
    made(Trainer, tmp_path, **SAVING).train()
    parts = ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state", "_load_callback_state")
    kind, counts, given = counting(parts)
    folder = str(tmp_path / "checkpoint-2")
    trainer = made(kind, tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=folder)
    assert counts == dict.fromkeys(parts, 1)
    assert {given[name][0] for name in parts[:3]} == {(folder,)}
    whole = made(Trainer, tmp_path / "whole")
    whole.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])


def test_a_part_that_an_override_does_not_load_begins_anew(tmp_path):
    class Fresh(Trainer):
        def _load_optimizer_and_scheduler(self, checkpoint):
            pass

    made(Trainer, tmp_path, **SAVING).train()
    trainer = made(Fresh, tmp_path, **SAVING)
    moments = []

    class Look(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            leaves = trainfn.tree.leaves(trainer.train_state.opt_state)
            moments.extend(float(x.abs().sum()) for x in leaves if x.dtype == torch.float32 and x.dim() > 0)

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert moments and set(moments) == {0.0}


def test_an_override_loads_the_weights_by_itself(tmp_path):
    class Own(Trainer):
        def _save(self, output_dir=None, state_dict=None):
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file({"mine": self.model.lm_head.weight.detach().clone()}, Path(output_dir, "mine.safetensors"))

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            loaded = load_file(Path(resume_from_checkpoint, "mine.safetensors"))["mine"]
            with torch.no_grad():
                for param in self.model.parameters():
                    param.fill_(7.0)
            self.model.transformer.wte.weight = self.model.lm_head.weight = torch.nn.Parameter(loaded)

    made(Own, tmp_path, **SAVING, max_steps=2).train()
    kept = load_file(tmp_path / "checkpoint-2" / "mine.safetensors")["mine"]
    trainer = made(Own, tmp_path, learning_rate=0.0, weight_decay=0.0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(trainer.model.lm_head.weight, kept)
    assert (trainer.model.transformer.ln_f.bias == 7.0).all()


@pytest.mark.parametrize("name", ["_save", "save_model"])
@pytest.mark.parametrize("options", [{}, {"save_only_model": True}])
def test_a_checkpoint_has_the_files_that_an_override_writes(name, options, tmp_path):
    def write(self, output_dir=None, *args, **given):
        folder = Path(output_dir, "1_Pooling")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps([self.state.global_step]))

    kind = type("Own", (Trainer,), {name: write})
    made(kind, tmp_path, **SAVING, **options).train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        assert json.loads((folder / "1_Pooling" / "config.json").read_text()) == [step]
        assert not (folder / "model.safetensors").exists() and (folder / "trainer_state.json").exists()
    if not options:
        again = made(kind, tmp_path, **SAVING)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert again.state.global_step == 4
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "superseded"]


def test_an_override_that_saves_more_keeps_the_rest(tmp_path):
    class More(Trainer):
        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir, state_dict)
            Path(output_dir, "more.txt").write_text("more")

    trainer = made(More, tmp_path, **SAVING)
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    assert (folder / "more.txt").exists()
    loaded = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, trainer.model.lm_head.weight)
    assert {"config.json", "training_args.json", "trainer_state.json"} <= {path.name for path in folder.iterdir()}


def test_each_trial_has_the_folder_that_an_override_names(tmp_path):
    class Own(Trainer):
        def _get_output_dir(self, trial):
            return str(tmp_path / ("alone" if trial is None else f"mine-{trial.number}"))

    args = arguments(tmp_path, **SAVING, **EVALUATING)
    trainer = Own(model_init=lambda: gpt2(), args=args, train_dataset=tokens(8), eval_dataset=tokens(4))
    pytest.importorskip("optuna", reason="the search needs optuna")
    trainer.hyperparameter_search(hp_space=lambda trial: {"seed": trial.suggest_int("seed", 1, 9)}, n_trials=2)
    assert (tmp_path / "mine-1" / "checkpoint-4").exists() and trainer.hp_search_backend is None


# --- the accelerator --------------------------------------------------------------------------------------------------


def test_the_accelerator_is_one_of_accelerate(tmp_path):
    trainer = made(Trainer, tmp_path)
    accelerator = trainer.accelerator
    assert type(accelerator) is accelerate.Accelerator
    assert (accelerator.device, accelerator.num_processes) == (torch.device("cpu"), 1)
    assert accelerator.is_main_process
    assert accelerator.unwrap_model(trainer.model) is trainer.model
    assert accelerator.gradient_accumulation_steps == 1 and accelerator.sync_gradients
    assert trainer.gather_function(torch.ones(2)).tolist() == [1.0, 1.0]
    assert accelerator.pad_across_processes(torch.ones(2)).tolist() == [1.0, 1.0]
    model, loader = accelerator.prepare(torch.nn.Linear(2, 1), torch.utils.data.DataLoader(range(4), batch_size=2))
    assert type(model) is torch.nn.Linear and [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
    with accelerator.autocast(), accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 2)).sum())
    assert model.weight.grad.tolist() == [[1.0, 1.0]]
    accelerator.log({"a": 1})
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    assert not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled
    assert trainer.args.distributed_state.num_processes == 1


def test_accelerates_logger_works_once_there_are_arguments(tmp_path, caplog):
    arguments(tmp_path)
    with caplog.at_level("INFO"):
        accelerate.logging.get_logger("tests").info("once")
    assert len([record for record in caplog.records if record.message.endswith("once")]) == 1


def test_a_training_step_may_call_its_backward(tmp_path):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    own, plain = made(Own, tmp_path), made(Trainer, tmp_path)
    own.train(), plain.train()
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(own.model.state_dict()[name], tensor)


@pytest.mark.parametrize("order", [("no", "bf16"), ("bf16", "no")])
def test_each_trainer_has_its_own_precision(order, tmp_path):
    for precision in order:
        trainer = made(Trainer, tmp_path, bf16=precision == "bf16")
        assert trainer.accelerator.mixed_precision == precision


def test_the_accelerator_is_configured_by_the_arguments(tmp_path):
    class Own(Trainer):
        def _build_accelerator_args(self, **kwargs):
            return {**super()._build_accelerator_args(**kwargs), "step_scheduler_with_optimizer": False}

    config = {"split_batches": True, "dispatch_batches": True, "even_batches": False}
    with warnings.catch_warnings(action="ignore"):
        trainer = made(Own, tmp_path, accelerator_config=config, ddp_bucket_cap_mb=3)
    made_with = trainer.accelerator.dataloader_config
    assert (made_with.split_batches, made_with.dispatch_batches, made_with.even_batches) == (True, True, False)
    assert trainer.accelerator.ddp_handler.bucket_cap_mb == 3
    assert not trainer.accelerator.step_scheduler_with_optimizer


def test_the_number_of_micro_batches_may_be_that_of_the_accelerator(tmp_path):
    config = {"gradient_accumulation_kwargs": {"num_steps": 2}}
    trainer = made(Trainer, tmp_path, accelerator_config=config)
    trainer.train()
    assert trainer.args.gradient_accumulation_steps == 2 and trainer.state.epoch == 2.0
    assert trainer.accelerator.gradient_accumulation_steps == 1
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=3\)` can't work.*Leave `num_steps` out"):
        made(Trainer, tmp_path, accelerator_config=config, gradient_accumulation_steps=3)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"])
def test_a_launchers_engine_is_not_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "true")
    trainer = made(Trainer, tmp_path)
    assert trainer.accelerator.distributed_type == accelerate.DistributedType.NO


# --- attributes -------------------------------------------------------------------------------------------------------


def test_attributes_of_transformers_are_there_and_may_be_set(tmp_path):
    theirs = transformers.Trainer(gpt2(), transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    ours = made(Trainer, tmp_path)
    names = {name for name in vars(theirs) if not name.startswith("_")}
    later = {"is_fsdp_xla_enabled", "is_fsdp_xla_v1_enabled", "is_fsdp_xla_v2_enabled", "model_accepts_loss_kwargs"}
    assert {name for name in names - later if not hasattr(ours, name)} == set()
    for name in names:
        setattr(ours, name, getattr(theirs, name))


def test_a_model_stays_where_the_user_puts_it(tmp_path):
    moved = []

    class Own(Trainer):
        def _move_model_to_device(self, model, device):
            moved.append(device)

    class Elsewhere(TrainingArguments):
        @property
        def place_model_on_device(self):
            return False

    made(Own, tmp_path)
    assert moved == [torch.device("cpu")]
    Own(gpt2(), Elsewhere(str(tmp_path), use_cpu=True, report_to="none", log_level="error"))
    assert len(moved) == 1
