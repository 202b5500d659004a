"""`TrainingArguments(deepspeed=)` and DeepSpeed files of launchers: filled in, checked, and run as a plan."""

import json
import os
import warnings

import pytest
import torch
from accelerate import PartialState

import trainfn as tfn
from tests.hf.models import gpt2, tokens
from trainfn import Trainer, TrainingArguments
from trainfn.hf._parallel import _deepspeed, _layout
from trainfn.hf._parallel._deepspeed import configuration

ADAM = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
RATES = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
DECAY = {"type": "WarmupDecayLR", "params": {**RATES, "total_num_steps": "auto"}}
AUTO = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto"),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto"),
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "optimizer": ADAM,
    "scheduler": DECAY,
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
}
DS = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher, an Accelerate that was not asked before, and a user who was told nothing."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(_layout, "_REPORTED", [])
    for name in os.environ:
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")) or name in ("WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name)


def arguments(**options):
    return TrainingArguments("out", use_cpu=True, log_level="error", report_to="none", disable_tqdm=True, **options)


def trained(folder, **options):
    args = arguments(save_strategy="no", learning_rate=1e-2, max_steps=2, **options)
    args.output_dir = str(folder)
    trainer = Trainer(gpt2(), args, train_dataset=tokens(8))
    trainer.train()
    return trainer


# --- filling in ---------------------------------------------------------------------------------------------------


def test_every_auto_takes_the_value_of_its_argument(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = arguments(
        deepspeed=AUTO, per_device_train_batch_size=4, gradient_accumulation_steps=3, max_grad_norm=0.5, bf16=True,
        learning_rate=1e-3, adam_beta1=0.8, adam_epsilon=1e-6, weight_decay=0.1, warmup_steps=0.1, max_steps=50,
    )  # fmt: skip
    found = configuration(args)
    assert found is not None
    assert found.filled == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "fp16.enabled": False,
        "bf16.enabled": True,
        "optimizer.params.lr": 1e-3,
        "optimizer.params.betas": [0.8, 0.999],
        "optimizer.params.eps": 1e-6,
        "optimizer.params.weight_decay": 0.1,
        "scheduler.params.warmup_min_lr": 0,
        "scheduler.params.warmup_max_lr": 1e-3,
        "scheduler.params.warmup_num_steps": 5,
        "scheduler.params.total_num_steps": 50,
    }
    assert found.rest == {
        "fp16": {"enabled": False, "loss_scale": 0},
        "bf16": {"enabled": True},
        "zero_optimization": AUTO["zero_optimization"],
    }
    assert args.deepspeed == AUTO  # as the user wrote it


def test_numbers_that_equal_the_arguments_are_fine():
    given = {
        **AUTO,
        "train_batch_size": 8,
        "gradient_clipping": 1,
        "optimizer": {"type": "Adam", "params": {"lr": "5e-5", "betas": [0.9, 0.999], "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7, "warmup_type": "linear"}},
    }
    found = configuration(arguments(deepspeed=given, lr_scheduler_type="constant_with_warmup", warmup_steps=7))
    assert found is not None and not found.notes
    cosine = {"warmup_num_steps": "auto", "total_num_steps": "auto", "warmup_min_ratio": 0, "cos_min_ratio": 0}
    given = {**AUTO, "scheduler": {"type": "WarmupCosineLR", "params": cosine}}
    found = configuration(arguments(deepspeed=given, lr_scheduler_type="cosine"))
    assert found is not None and "scheduler.params.total_num_steps" not in found.filled  # not known yet


def test_a_file_a_dict_and_a_line_of_json_are_one(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(AUTO))
    made = [configuration(arguments(deepspeed=d)) for d in (AUTO, str(tmp_path / "ds.json"), json.dumps(AUTO))]
    assert made[0] == made[1] == made[2] is not None
    assert configuration(arguments()) is None


def test_rows_that_are_split(monkeypatch):
    args = arguments(deepspeed=AUTO, per_device_train_batch_size=8, accelerator_config={"split_batches": True})
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = configuration(args)
    assert found is not None
    assert (found.filled["train_micro_batch_size_per_gpu"], found.filled["train_batch_size"]) == (4, 8)


# --- what differs -------------------------------------------------------------------------------------------------


def params(section, **changes):
    return {**section, "params": {**section["params"], **changes}}


DIFFERENT = [  # changes of the configuration, arguments, what is said
    ({"train_micro_batch_size_per_gpu": 4}, {}, r"per_gpu=4, per_device_train_batch_size=8: write `per_device_train"),
    ({"train_batch_size": 99}, {}, r"train_batch_size=99, and 1 process x 8 rows x .*=1 are 8: write `\"auto\"` there"),
    ({"gradient_accumulation_steps": 2}, {}, r"write `gradient_accumulation_steps=2`"),
    ({"gradient_clipping": 0.7}, {}, r"gradient_clipping=0.7, max_grad_norm=1.0: write `max_grad_norm=0.7`"),
    ({"bf16": {"enabled": True}}, {}, r"bf16.enabled=True, bf16=False: write `bf16=True`"),
    ({"fp16": {"enabled": False}}, {"fp16": True}, r"fp16.enabled=False, fp16=True: write `fp16=False`"),
    ({"optimizer": params(ADAM, lr=3e-5)}, {}, r"lr=3e-05, learning_rate=5e-05: write `learning_rate=3e-05`"),
    ({"optimizer": params(ADAM, betas=[0.9, 0.95])}, {}, r"betas=\[0.9, 0.95\], .*0.999\]: write `adam_beta1=..."),
    ({"optimizer": params(ADAM, eps=1e-6)}, {}, "write `adam_epsilon=1e-06`"),
    ({"optimizer": params(ADAM, weight_decay=0.1)}, {}, "write `weight_decay=0.1`"),
    ({"optimizer": params(ADAM, amsgrad=True)}, {}, "amsgrad=True, which AdamW of trainfn does not have: leave it out"),
    ({"optimizer": {"type": "Lamb"}}, {}, 'optimizer.type=\'Lamb\', which is not Adam: write "AdamW" there'),
    ({"optimizer": "Lamb"}, {}, "optimizer.type='Lamb', which is not Adam"),
    ({}, {"optim": "sgd"}, "optimizer.type='AdamW', optim='sgd': write `optim='adamw_torch'`"),
    ({"scheduler": {"type": "OneCycle"}}, {}, "type='OneCycle': leave `scheduler` out there, and write `lr_scheduler"),
    ({"scheduler": {"type": "WarmupLR"}}, {}, "lr_scheduler_type='linear': write `lr_scheduler_type='constant_with_w"),
    ({}, {"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine': write `lr_scheduler_type='linear'`"),
    ({}, {"lr_scheduler_kwargs": {"a": 1}}, r"lr_scheduler_kwargs=\{'a': 1\}: leave the latter out"),
    ({"scheduler": params(DECAY, warmup_min_lr=1e-6)}, {}, "but a schedule of trainfn starts from 0: write 0 there"),
    ({"scheduler": params(DECAY, warmup_max_lr=1e-3)}, {}, "warmup_max_lr=0.001, .*: write `learning_rate=0.001`"),
    ({"scheduler": params(DECAY, warmup_num_steps=9)}, {}, "warmup_steps=0: write `warmup_steps=9`"),
    ({"scheduler": params(DECAY, total_num_steps=9)}, {}, "max_steps=-1: write `max_steps=9`"),
    ({"scheduler": params(DECAY, warmup_type="log")}, {"warmup_steps": 2}, 'trainfn is linear: write "linear" there'),
    ({"scheduler": params(DECAY, decay=1)}, {}, "scheduler.params.decay=1, which trainfn does not know: leave it out"),
    ({"scheduler": {"type": "WarmupCosineLR"}}, {"lr_scheduler_type": "cosine"}, 'write `"cos_min_ratio": 0'),
    ({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_min_ratio": 0, "cos_min_ratio": 0.1}}},
     {"lr_scheduler_type": "cosine"}, "a cosine of trainfn ends at 0: write 0 there"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "options", "match"), DIFFERENT)
def test_what_differs_is_an_error_with_the_argument_to_write(changes, options, match):
    call = r"`TrainingArguments\(deepspeed=\{...\}\)` can't work: the configuration and the training arguments differ. "
    with pytest.raises(ValueError, match=f'{call}.*{match}.*that says "auto" takes the value of the argument'):
        configuration(arguments(deepspeed={**AUTO, **changes}, **options))


def test_one_error_for_all_that_differs():
    given = {**AUTO, "gradient_clipping": 0.7, "optimizer": params(ADAM, lr=1.0), "scheduler": {"type": "OneCycle"}}
    with pytest.raises(ValueError, match=r"OneCycle.*; gradient_clipping=0.7.*; optimizer.params.lr=1.0"):
        configuration(arguments(deepspeed=given))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("nowhere.json", r"deepspeed='nowhere.json'\)` can't work: there is no such file. Write the path"),
        ("{", r"deepspeed='\{'\)` can't work: that is not valid JSON"),
        (3, r"deepspeed=3\)` can't work: that is a int. Write the path of a DeepSpeed JSON, such as 'ds.json'"),
    ],
)
def test_a_configuration_that_is_not_valid(given, match):
    with pytest.raises(ValueError, match=match):
        configuration(arguments(deepspeed=given))


def test_a_file_that_holds_a_list(tmp_path):
    (tmp_path / "ds.json").write_text("[]")
    with pytest.raises(ValueError, match=r"the JSON is a list, not an object. Write `\{\"zero_optimization\""):
        configuration(arguments(deepspeed=str(tmp_path / "ds.json")))


def test_what_no_plan_can_do_is_refused_by_the_core():
    with pytest.raises(ValueError, match=r"zero_hpz_partition_size=8: a way of ZeRO\+\+.*tfn.deepspeed.init"):
        Trainer(gpt2(), arguments(deepspeed={"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}))


# --- one process, and what is told --------------------------------------------------------------------------------


def test_one_process_trains_the_same_and_is_reported_once(tmp_path, capsys):
    plain = trained(tmp_path, warmup_steps=1, weight_decay=0.1)
    capsys.readouterr()
    trainer = trained(tmp_path, warmup_steps=1, weight_decay=0.1, deepspeed=AUTO)
    assert trainer._trainfn.world.plan is None
    for one, other in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)
    said = capsys.readouterr().out
    assert "this run is native, with a plan of the same ZeRO stage. DeepSpeed's own engine is `tfn.deepspeed" in said
    assert "from the training arguments: train_batch_size=8, " in said
    assert "the warm-up is linear; DeepSpeed's, without" in said and "biases and norms don't decay" in said
    assert "zero_optimization.stage               3      mapped      Plan.zero(3)" in said
    Trainer(gpt2(), trainer.args)
    assert capsys.readouterr().out == ""


def test_the_clipping_of_the_trainer_is_reported_and_fields_of_the_engine_are_a_warning(capsys):
    with pytest.warns(UserWarning, match="not honoured: steps_per_print=2000"):
        Trainer(gpt2(), arguments(deepspeed={"zero_optimization": {"stage": 1}, "steps_per_print": 2000}))
    assert "gradients are clipped at max_grad_norm=1.0: there is no gradient_clipping" in capsys.readouterr().out


def test_the_loss_scale_of_the_configuration(tmp_path):
    half = {"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "loss_scale_window": 9}
    trainer = trained(tmp_path, fp16=True, deepspeed={**AUTO, "fp16": half})
    assert trainer._trainfn.world.loss_scale == {"initial": 16.0, "growth_interval": 9}


# --- launchers ----------------------------------------------------------------------------------------------------


def env(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_launchers_yaml_and_the_arguments_that_it_says(monkeypatch, capsys):
    """The documentation's, whose clipping is no default of the Trainer's."""
    env(
        monkeypatch, **DS, ACCELERATE_DEEPSPEED_ZERO_STAGE="2", ACCELERATE_GRADIENT_CLIPPING="0.7",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1", ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu",
        ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_DEEPSPEED_ZERO3_INIT="true",
    )  # fmt: skip
    args = arguments()
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true" and args.deepspeed_plugin is None
    trainer = Trainer(gpt2(), args)
    assert (args.max_grad_norm, args.gradient_accumulation_steps, args.bf16) == (0.7, 1, True)
    said = capsys.readouterr().out
    assert "the DeepSpeed configuration of `accelerate launch`: this run is native" in said
    assert "max_grad_norm=0.7, from the configuration of `accelerate launch`" in said
    assert "clipping   global norm 0.7" in trainer_summary(trainer)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ValueError, match=r"launch` can't work.*steps=2, .*: write `gradient_accumulation_steps=2`"):
        Trainer(gpt2(), arguments(gradient_accumulation_steps=4))


def trainer_summary(trainer):
    trainer.train_dataset = tokens(4)
    return trainer.summary()


def test_a_launchers_json_and_the_arguments(monkeypatch, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({**AUTO, "gradient_clipping": 0.7}))
    env(monkeypatch, **DS, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "ds.json"))
    with pytest.raises(ValueError, match=r"gradient_clipping=0.7, max_grad_norm=1.0: write `max_grad_norm=0.7`"):
        configuration(arguments())
    found = configuration(arguments(max_grad_norm=0.7))
    assert found is not None and found.rest["zero_optimization"]["stage"] == 3


def test_both_a_launchers_and_the_arguments_configuration(monkeypatch):
    env(monkeypatch, **DS, ACCELERATE_DEEPSPEED_ZERO_STAGE="3", ACCELERATE_DEEPSPEED_ZERO3_INIT="true")
    found = configuration(arguments(deepspeed=AUTO))
    assert found is not None and found.rest["zero3_init_flag"] is True
    other = {**AUTO, "zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match=r"stage=2, and the .*launch` says 3. Leave `deepspeed` out of the training"):
        configuration(arguments(deepspeed=other))
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    env(monkeypatch, ACCELERATE_USE_FSDP="true")
    with pytest.raises(ValueError, match=r"configured with FSDP: each says how the state is sharded. Leave one out"):
        Trainer(gpt2(), arguments(deepspeed=AUTO))


def test_fsdp_beside_a_launchers_deepspeed(monkeypatch):
    env(monkeypatch, **DS, ACCELERATE_DEEPSPEED_ZERO_STAGE="2")
    with pytest.raises(ValueError, match=r"arguments ask for .*'stage': 3.*launch` for .*'stage': 2.*Leave `fsdp`"):
        Trainer(gpt2(), arguments(fsdp=True))


def test_processes_meet_before_a_trainer_without_a_table(monkeypatch, capsys):
    env(monkeypatch, **DS)
    met = []
    monkeypatch.setattr(tfn.launch, "join", lambda **_: met.append(1) or torch.device("cpu"))
    _layout.meet(arguments())
    assert met == [1] and capsys.readouterr().out == ""


def test_the_package_is_not_asked_for(monkeypatch):
    env(monkeypatch, **DS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert arguments().deepspeed_plugin is None
    assert _deepspeed.configuration(arguments()) is not None
