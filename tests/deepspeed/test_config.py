"""DeepSpeed configurations without `auto`: no DeepSpeed is needed for these."""

import json
import os
import types

import pytest

import trainfn as tfn
from tests.deepspeed.worker import AUTO, VALUES, config, net
from trainfn.deepspeed._config import resolved


@pytest.fixture
def unlaunched(monkeypatch):
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)


def test_every_auto_without_a_value_is_named(unlaunched):
    values = {name: value for name, value in VALUES.items() if name != "optimizer.params.lr"}
    with pytest.raises(ValueError, match=r'bf16\.enabled, optimizer\.params\.lr are "auto".*values=\{"bf16\.enabled"'):
        resolved(AUTO, values, net())
    assert tfn.deepspeed.autos(AUTO) == [
        *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16.enabled"),
        *("optimizer.params.lr", "optimizer.params.weight_decay"),
    ]


def test_autos_that_follow_from_others(unlaunched, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    model = net()
    model.config = types.SimpleNamespace(hidden_size=10)
    given = json.dumps(AUTO)
    out = resolved(AUTO, VALUES, model)
    assert json.dumps(AUTO) == given  # the user's dict is as it was
    assert "train_batch_size" not in out
    assert out["bf16"] == {"enabled": True}
    assert out["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 100,
        "stage3_prefetch_bucket_size": 90,
        "stage3_param_persistence_threshold": 100,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    small = resolved(AUTO, VALUES, net())["zero_optimization"]  # no hidden size: DeepSpeed's defaults
    assert small == {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}


def test_values_are_added_but_contradict_nothing(unlaunched):
    base = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}
    assert resolved(base, {"gradient_clipping": 0.5}, net())["gradient_clipping"] == 0.5
    with pytest.raises(ValueError, match=r"'train_micro_batch_size_per_gpu': 8.*the configuration says 4"):
        resolved(base, {"train_micro_batch_size_per_gpu": 8}, net())
    with pytest.raises(ValueError, match=r"has no section 'optimizer\.params'"):
        resolved(base, {"optimizer.params.lr": 1.0}, net())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"zero_optimization": {"stage": 1}}, r"no batch size.*train_micro_batch_size_per_gpu"),
        ({**config(0), "fp16": {"enabled": True}}, r"fp16 at stage 0.*\"stage\": 1"),
        (
            {**config(1), "managed_gradient_accumulation": False},
            r"managed_gradient_accumulation=false.*Leave the entry",
        ),
        ("/nonexistent.json", r"config='/nonexistent\.json'\): there is no such file"),
    ],
)
def test_configurations_that_are_refused(unlaunched, given, match):
    with pytest.raises(ValueError, match=match):
        resolved(given, {}, net())


def test_json_files(unlaunched, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config(1)))
    assert resolved(path, {}, net()) == resolved(str(path), {}, net()) == config(1)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="the JSON is a list"):
        resolved(path, {}, net())
    path.write_text("{")
    with pytest.raises(ValueError, match="that is not valid JSON"):
        resolved(path, {}, net())


def test_what_accelerate_launch_exported(unlaunched, monkeypatch):
    for name, value in {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "0.7",
    }.items():
        monkeypatch.setenv(name, value)
    assert tfn.deepspeed.autos() == ["train_micro_batch_size_per_gpu"]
    out = resolved(None, {"train_micro_batch_size_per_gpu": 4}, net())
    assert (out["gradient_clipping"], out["bf16"]) == (0.7, {"enabled": True})
    assert out["zero_optimization"]["stage"] == 2
    assert out["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
