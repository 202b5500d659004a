"""What launchers export, field by field, and the processes that they start."""

import contextlib
import io
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig, T5Config

import trainfn as tfn
from tests.helpers import long
from tests.processes import LAUNCHERS, ended, printed, torchrun
from trainfn.__main__ import main
from trainfn.launch._config import exported
from trainfn.launch._settings import fields_of, read_environment

CONFIGS = Path(__file__).parent / "accelerate_configs"  # as the documentation of transformers has them
BF16, FP16 = (tfn.Precision(compute=dtype) for dtype in (torch.bfloat16, torch.float16))
FSDP = {"ACCELERATE_USE_FSDP": "true"}
FSDP2 = {**FSDP, "FSDP_VERSION": "2"}
AXES = {**FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
DYNAMO = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
DS = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture
def env(monkeypatch):
    """Give this process the variables of a launcher, and no others; and an Accelerate that was not asked before."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    for name in os.environ:
        if name.startswith(LAUNCHERS) or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)

    def give(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


def read(variables, nodes=1):
    return read_environment(variables, nodes, "native" if "ACCELERATE_USE_DEEPSPEED" in variables else None)


def fates(reading):
    return {field.name: field.fate for field in reading.fields}


# --- every field -------------------------------------------------------------------------------------------------

PLANS = [  # variables, the field that is mapped, arguments of the plan
    ({}, None, {"replicate": -1}),
    ({"ACCELERATE_MIXED_PRECISION": "no"}, "mixed_precision", {"replicate": -1}),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision", {"precision": BF16}),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision", {"precision": FP16}),
    ({"MIXED_PRECISION": "bf16", "NPROC": "2"}, "mixed_precision", {"precision": BF16}),
    (FSDP, None, {"shard": -1, "stage": 3}),
    ({**FSDP, "FSDP_VERSION": "1"}, "fsdp_version", {"shard": -1, "stage": 3}),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, "fsdp_sharding_strategy", {"shard": -1, "stage": 3}),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "1"}, "fsdp_sharding_strategy", {"shard": -1, "stage": 3}),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "2"}, "fsdp_sharding_strategy", {"shard": -1, "stage": 3, "reshard": False}),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "shard_grad_op"}, "fsdp_sharding_strategy", {"stage": 3, "reshard": False}),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "fsdp_sharding_strategy", {"replicate": -1}),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "fsdp_sharding_strategy", {"replicate": 4, "shard": -1}),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "5"}, "fsdp_sharding_strategy", {"replicate": 4, "reshard": False}),
    ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params", {"offload": ("opt_state", "params")}),
    ({**FSDP, "FSDP_OFFLOAD_PARAMS": "false"}, "fsdp_offload_params", {"shard": -1}),
    (
        {**FSDP, "FSDP_IGNORED_MODULES": "head"},
        "fsdp_ignored_modules",
        {"rules": ((r"^(?:head)\.", "replicate"),)},
    ),
    ({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "true"}, "fsdp_reshard_after_forward", {"stage": 3, "reshard": True}),
    ({**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward", {"stage": 3, "reshard": False}),
    ({**AXES, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, "parallelism_config_dp_replicate_size", {"replicate": 2}),
    ({**AXES, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}, "parallelism_config_dp_shard_size", {"shard": 4, "stage": 3}),
    ({**AXES, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size", {"tensor": 2}),
    ({**AXES, "PARALLELISM_CONFIG_CP_SIZE": "1"}, "parallelism_config_cp_size", {"shard": 1}),
    ({**AXES, "PARALLELISM_CONFIG_SP_SIZE": "1"}, "parallelism_config_sp_size", {"shard": 1}),
    (DS, "zero_stage", {"shard": -1, "stage": 2}),
    ({**DS, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage", {"replicate": -1}),
    ({**DS, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage", {"shard": -1, "stage": 1}),
    ({**DS, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage", {"shard": -1, "stage": 3}),
    ({**DS, "ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision", {"stage": 2, "precision": BF16}),
    (
        {**DS, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        "offload_optimizer_device",
        {"offload": ("opt_state",)},
    ),
    (
        {**DS, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
        "offload_param_device",
        {"offload": ("params",)},
    ),
]


@pytest.mark.parametrize(("variables", "field", "plan"), PLANS)
def test_what_a_plan_is_read_from(variables, field, plan):
    reading = read(variables, nodes=4)
    assert plan.items() <= reading.plan.items()
    assert field is None or fates(reading)[field] == "mapped"
    assert isinstance(tfn.Plan(**reading.plan), tfn.Plan)


BESIDE = [  # variables, fields, what `Launch` has
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision", {"mixed_precision": "fp16", "loss_scale": {}}),
    ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, "dynamo_backend", {}),
    (DYNAMO, "dynamo_backend", {"compile": {"backend": "inductor"}}),
    ({**DYNAMO, "ACCELERATE_DYNAMO_MODE": "default"}, "dynamo_mode", {"compile": {"backend": "inductor"}}),
    (
        {**DYNAMO, "ACCELERATE_DYNAMO_MODE": "max-autotune"},
        "dynamo_mode",
        {"compile": {"backend": "inductor", "mode": "max-autotune"}},
    ),
    (
        {**DYNAMO, "ACCELERATE_DYNAMO_USE_DYNAMIC": "True"},
        "dynamo_use_dynamic",
        {"compile": {"backend": "inductor", "dynamic": True}},
    ),
    ({**DYNAMO, "ACCELERATE_DYNAMO_USE_DYNAMIC": "False"}, "dynamo_use_dynamic", {"compile": {"backend": "inductor"}}),
    ({**FSDP, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "fsdp_state_dict_type", {"state_dict": "full"}),
    ({**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type", {"state_dict": "sharded"}),
    ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing", {"checkpointing": True}),
    ({**DS, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps", {"accumulate": 4}),
    ({**DS, "ACCELERATE_GRADIENT_CLIPPING": "0.7"}, "gradient_clipping", {"clip": 0.7}),
]


@pytest.mark.parametrize(("variables", "field", "rest"), BESIDE)
def test_what_is_read_beside_the_plan(variables, field, rest):
    reading = read(variables)
    assert {name: value for name, value in reading.rest.items() if name in rest} == rest
    assert ("compile" in reading.rest) == ("compile" in rest)
    assert fates(reading)[field] == "mapped"


OTHERS = [  # variables, the field, what becomes of it, why
    ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, "fsdp_auto_wrap_policy", "not needed", "gathers"),
    ({**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "B"}, "fsdp_transformer_layer_cls_to_wrap", "not needed", "gathers"),
    ({**FSDP, "FSDP_MIN_NUM_PARAMS": "100"}, "fsdp_min_num_params", "not needed", "gathers"),
    ({**FSDP, "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE"}, "fsdp_backward_prefetch", "not needed", "no next one"),
    ({**FSDP, "FSDP_FORWARD_PREFETCH": "true"}, "fsdp_forward_prefetch", "not needed", "no next one"),
    ({**FSDP, "FSDP_USE_ORIG_PARAMS": "false"}, "fsdp_use_orig_params", "not needed", "module's own"),
    ({**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading", "not needed", "meta"),
    ({**FSDP, "FSDP_SYNC_MODULE_STATES": "true"}, "fsdp_sync_module_states", "not needed", "rank 0"),
    ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward", "ignored", "version 1"),
    ({**FSDP2, "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, "fsdp_sharding_strategy", "not needed", "version 2"),
    ({**FSDP2, "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "fsdp_sharding_strategy", "ignored", "version 2"),
    (
        {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"},
        "fsdp_activation_checkpointing_offload",
        "ignored",
        "on the device",
    ),
    ({**FSDP, "FSDP_SHARDING_STRATEGY": "HALF"}, "fsdp_sharding_strategy", "refused", "one of FULL_SHARD"),
    ({**FSDP, "FSDP_STATE_DICT_TYPE": "LOCAL_STATE_DICT"}, "fsdp_state_dict_type", "refused", "SHARDED_STATE_DICT"),
    ({**FSDP, "FSDP_USE_ORIG_PARAM": "true"}, "fsdp_use_orig_param", "ignored", "'fsdp_use_orig_params'"),
    ({"FSDP_VERSION": "2"}, "fsdp_version", "ignored", "ACCELERATE_USE_FSDP is not true"),
    ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size", "ignored", "is not true"),
    ({**AXES, "PARALLELISM_CONFIG_CP_SIZE": "2"}, "parallelism_config_cp_size", "refused", "no context parallelism"),
    ({**AXES, "PARALLELISM_CONFIG_SP_SIZE": "2"}, "parallelism_config_sp_size", "refused", "no sequence parallelism"),
    *(
        ({**AXES, f"PARALLELISM_CONFIG_{name}": "x"}, f"parallelism_config_{name.lower()}", "not needed", "one part")
        for name in (
            *("CP_BACKEND", "CP_COMM_STRATEGY", "SP_BACKEND", "SP_SEQ_LENGTH", "SP_SEQ_LENGTH_IS_VARIABLE"),
            "SP_ATTN_IMPLEMENTATION",
        )
    ),
    ({**DYNAMO, "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}, "dynamo_use_fullgraph", "not needed", "never breaks"),
    (
        {**DYNAMO, "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "True"},
        "dynamo_use_regional_compilation",
        "ignored",
        "compiled as one graph",
    ),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision", "refused", '"bf16"'),
    ({"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_TP_DEGREE": "2"}, "use_megatron_lm", "refused", "Megatron"),
    ({"ACCELERATE_WHAT": "1"}, "what", "ignored", "the name is unknown"),
    ({**DS, "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag", "not needed", "meta device"),
    ({**DS, "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}, "zero3_save_16bit_model", "not needed", "full"),
    ({**DS, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device", "ignored", "stage 3"),
    ({**DS, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device", "refused", "engine"),
    ({**DS, "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Moe"}, "deepspeed_moe_layer_cls_names", "refused", "engine"),
    ({**DS, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, "zero_stage", "refused", "0, 1, 2 or 3"),
    ({**DS, "ACCELERATE_GRADIENT_CLIPPING": "auto"}, "gradient_clipping", "not needed", "what you give"),
]


@pytest.mark.parametrize(("variables", "field", "fate", "why"), OTHERS)
def test_what_is_not_mapped_says_why(variables, field, fate, why):
    found = {f.name: f for f in read(variables).fields}[field]
    assert found.fate == fate and why in found.detail


def test_what_is_not_honoured_is_a_warning_and_what_is_refused_an_error(env):
    env(**FSDP, FSDP_RESHARD_AFTER_FORWARD="false")
    with pytest.warns(UserWarning, match="not honoured: fsdp_reshard_after_forward=false"):
        launch = tfn.launch.settings()
    assert launch.plan.stage == 3 and (launch.rank, launch.world) == (0, 1)
    assert "fsdp_reshard_after_forward  false  ignored" in str(launch)
    env(ACCELERATE_MIXED_PRECISION="fp8", FSDP_SHARDING_STRATEGY="HALF")
    with pytest.raises(ValueError, match=r"can't be honoured. mixed_precision=fp8.*fsdp_sharding_strategy=HALF"):
        tfn.launch.settings()


def test_a_plan_alone_says_what_it_does_not_hold(env):
    env(ACCELERATE_MIXED_PRECISION="fp16", **DYNAMO)
    with pytest.warns(UserWarning, match=r"tfn.jit\(step, \*\*launch.compile\).*dynamic_loss_scale"):
        assert tfn.launch.plan().precision == FP16
    assert tfn.launch.settings().compile == {"backend": "inductor"}


def test_sizes_that_are_not_the_number_of_processes(env):
    env(**AXES, PARALLELISM_CONFIG_DP_SHARD_SIZE="2")
    with pytest.raises(ValueError, match="is for 2 ranks or a multiple, and there is 1 process"):
        tfn.launch.settings()


# --- DeepSpeed's json --------------------------------------------------------------------------------------------

ZERO3 = {  # as in the documentation of transformers
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def zero(tmp_path, **changes):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**ZERO3, **changes}))
    return path


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("full_shard", tfn.Plan.fsdp()),
        ("2", tfn.Plan.fsdp(reshard=False)),
        ("NO_SHARD", tfn.Plan.replicated()),
        ("HYBRID_SHARD", tfn.Plan.fsdp(replicate=3)),
        ("5", tfn.Plan.fsdp(replicate=3, reshard=False)),
    ],
)
def test_strategies_of_fsdp(name, plan):
    assert tfn.launch.fsdp_plan(name, nodes=3) == plan


def test_a_strategy_that_fsdp_does_not_have():
    with pytest.raises(ValueError, match=r"fsdp_plan\('6'\): that is not a strategy. Write one of FULL_SHARD, "):
        tfn.launch.fsdp_plan("6")


def test_the_usual_zero_3_json(env, tmp_path, capsys):
    with pytest.warns(UserWarning, match="not honoured: steps_per_print=2000"):
        launch = tfn.launch.settings(config=zero(tmp_path), deepspeed="native")
    assert (launch.plan.shard, launch.plan.stage, launch.plan.offload) == (-1, 3, ("opt_state", "params"))
    assert (launch.clip, launch.accumulate, launch.mixed_precision) == (None, None, "no")
    assert capsys.readouterr().out == f"{launch}\n"
    fates = {field.name: field.fate for field in launch.fields}
    assert len(fates) == 33 and set(fates.values()) == {"mapped", "not needed", "ignored"}


DS_FIELDS = [  # changes of the json, a field, what becomes of it, why
    ({"bf16": {"enabled": True}}, "bf16.enabled", "mapped", "bfloat16"),
    ({"fp16": {"enabled": True, "loss_scale": 0}}, "fp16.enabled", "mapped", "float16"),
    ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.loss_scale", "refused", "Write 0"),
    ({"fp16": {"enabled": True, "hysteresis": 2}}, "fp16.hysteresis", "ignored", "at once"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, "optimizer.params.lr", "refused", "tfn.optim.adamw"),
    ({"scheduler": {"type": "WarmupLR", "params": {"n": 1}}}, "scheduler.params.n", "refused", "tfn.schedules"),
    ({"train_batch_size": 32}, "train_batch_size", "ignored", "the batch"),
    ({"gradient_clipping": 0.7}, "gradient_clipping", "mapped", "clip_by_global_norm(0.7)"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "mapped", "accumulate=2"),
    ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing.cpu_checkpointing", "ignored",
     "gradient_checkpointing_enable"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero_optimization.cpu_offload", "mapped", "opt_state"),
    ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_optimization.zero_hpz_partition_size", "refused",
     r"ZeRO++"),
    ({"zero_optimization": {"zero_quantized_weights": False}}, "zero_optimization.zero_quantized_weights",
     "not needed", "asks for nothing"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size", "refused", "tfn.deepspeed"),
    ({"compression_training": {"a": {"b": 1}}}, "compression_training.a.b", "refused", "tfn.deepspeed"),
    ({"gradient_cliping": 1.0}, "gradient_cliping", "refused", "Did you mean 'gradient_clipping'?"),
    ({"zero_allow_untested_optimizer": True}, "zero_allow_untested_optimizer", "not needed", "optimizer"),
    ({"communication_data_type": "fp32"}, "communication_data_type", "not needed", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "field", "fate", "why"), DS_FIELDS)
def test_fields_of_deepspeeds_json(tmp_path, changes, field, fate, why):
    found = {f.name: f for f in fields_of(zero(tmp_path, **changes))}[field]
    assert found.fate == fate and why in found.detail


def test_a_dict_in_the_place_of_a_file(env, capsys):
    given = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.7}
    launch = tfn.launch.settings(config=given, deepspeed="native", quiet=True)
    assert (launch.plan, launch.clip) == (tfn.Plan.zero(3), 0.7) and capsys.readouterr().out == ""
    assert tfn.launch.settings(config={"steps_per_print": 1}, deepspeed="native", quiet=True).plan.stage == 0
    env(**DS, ACCELERATE_DEEPSPEED_ZERO_STAGE="1", ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_GRADIENT_CLIPPING="1")
    launch = tfn.launch.settings(config=given, deepspeed="native", quiet=True)
    assert (launch.plan, launch.clip) == (tfn.Plan.zero(3, precision=BF16), 0.7)
    env(ACCELERATE_USE_FSDP="true")
    with pytest.raises(ValueError, match=r"config=\{...\}\): that is one of DeepSpeed, and .*FSDP.*Leave one out"):
        tfn.launch.settings(config=given, deepspeed="native")


def test_what_a_launcher_knows_of_deepspeed(env, tmp_path):
    assert tfn.launch.deepspeed_config() is None
    env(**DS, ACCELERATE_GRADIENT_CLIPPING="0.7", ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu")
    zero_2 = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert tfn.launch.deepspeed_config() == {"gradient_clipping": 0.7, "zero_optimization": zero_2}
    env(ACCELERATE_DEEPSPEED_CONFIG_FILE=str(zero(tmp_path)), ACCELERATE_DEEPSPEED_ZERO_STAGE="1")
    assert tfn.launch.deepspeed_config() == {**ZERO3, "gradient_clipping": 0.7}  # where the file says auto


def test_float16_of_deepspeed_comes_with_a_loss_scale(env, tmp_path):
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "loss_scale_window": 500}
    with pytest.warns(UserWarning, match="not honoured"):
        launch = tfn.launch.settings(config=zero(tmp_path, fp16=fp16), deepspeed="native")
    assert launch.plan.precision == FP16
    tfn.transforms.dynamic_loss_scale(**launch.loss_scale)
    assert launch.loss_scale == {"initial": 1024.0, "growth_interval": 500}


def test_a_precision_that_the_launcher_contradicts(tmp_path):
    path = zero(tmp_path, bf16={"enabled": True})
    variables = {**DS, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), "ACCELERATE_MIXED_PRECISION": "fp16"}
    found = {f.name: f for f in read(variables).fields}["bf16.enabled"]
    assert found.fate == "refused" and "mixed_precision=fp16 contradicts it" in found.detail


def test_deepspeed_is_an_explicit_choice(env, tmp_path):
    with pytest.raises(ValueError, match=r"there is no DeepSpeed configuration"):
        tfn.launch.settings(deepspeed="native")
    with pytest.raises(ValueError, match=r"deepspeed='engine'.*tfn.deepspeed.init\(model\)"):
        tfn.launch.settings(deepspeed="engine")
    with pytest.raises(ValueError, match=r'one of DeepSpeed.*settings\(deepspeed="native"\)'):
        tfn.launch.settings(config=zero(tmp_path))
    env(**DS, ACCELERATE_DEEPSPEED_CONFIG_FILE="nowhere.json")
    with pytest.raises(ValueError, match=r"deepspeed_config_file='nowhere.json': there is no such file"):
        tfn.launch.settings(deepspeed="native")
    for content, said in (("{", "is not valid JSON"), ("[]", "the JSON is a list")):
        (tmp_path / "bad.json").write_text(content)
        env(ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "bad.json"))
        with pytest.raises(ValueError, match=said):
            tfn.launch.settings(deepspeed="native")


# --- configuration files -----------------------------------------------------------------------------------------


def adapted(name, tmp_path):
    """A yaml of the documentation, with its machine fields changed to two processes of this one."""
    fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    fields |= {"num_machines": 1, "num_processes": 2, "main_process_port": free_port()}
    fields.pop("main_process_ip", None)
    if name == "deepspeed_file":
        fields["deepspeed_config"]["deepspeed_config_file"] = str(zero(tmp_path, steps_per_print="auto"))
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def free_port():
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed_file", "deepspeed"])
def test_a_file_is_read_as_the_launcher_reads_it(name, tmp_path, env):
    """Accelerate's own code says what the launcher exports; nothing of it is unknown here."""
    path = adapted(name, tmp_path)
    with contextlib.redirect_stderr(io.StringIO()):
        args, defaults, _ = _validate_launch_command(
            launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
        )
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    launched = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    by_launcher = read({name: value for name, value in launched.items() if name.startswith(LAUNCHERS)})
    by_file = read(exported(path))
    assert by_launcher.plan == by_file.plan
    assert "refused" not in fates(by_launcher).values()
    assert not [f for f in by_launcher.fields if "the name is unknown" in f.detail]
    rest = {"state_dict": "full", "checkpointing": False} | by_file.rest  # the launcher writes its defaults
    assert {"state_dict": "full", "checkpointing": False} | by_launcher.rest == rest


def test_a_file_for_torchrun(env, tmp_path):
    launch = tfn.launch.settings(config=adapted("fsdp", tmp_path))
    assert launch.plan == tfn.Plan.fsdp(precision=BF16)
    assert {f.name: f.fate for f in launch.fields}["fsdp_backward_prefetch"] == "not needed"  # its old name in the file
    env(ACCELERATE_MIXED_PRECISION="no")
    with pytest.raises(ValueError, match=r"`accelerate launch` has a configuration already.*--config_file"):
        tfn.launch.settings(config=adapted("fsdp", tmp_path))


def test_a_file_that_is_not_valid(env, tmp_path):
    with pytest.raises(ValueError, match=r"there is no such file. `accelerate config` writes one"):
        tfn.launch.settings(config=tmp_path / "none.yaml")
    (tmp_path / "text.yaml").write_text("just text")
    with pytest.raises(ValueError, match="holds a str"):
        tfn.launch.settings(config=tmp_path / "text.yaml")
    (tmp_path / "typo.yaml").write_text("mixed_precison: bf16\ndistributed_type: 'NO'\n")
    with pytest.raises(ValueError, match=r"the field 'mixed_precison' is unknown. Did you mean 'mixed_precision'"):
        tfn.launch.settings(config=tmp_path / "typo.yaml")


# --- tensor parallelism ------------------------------------------------------------------------------------------


def test_rules_of_transformers_models_name_parameters():
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    plan = tfn.Plan(tensor=2, rules=tfn.launch.tensor_rules(model))
    rules = {name: plan.rule(name) for name, _ in model.named_parameters()}
    assert rules["model.layers.1.self_attn.q_proj.weight"] == rules["model.layers.0.mlp.up_proj.weight"] == "columns"
    assert rules["model.layers.1.self_attn.o_proj.weight"] == rules["model.layers.0.mlp.down_proj.weight"] == "rows"
    assert rules["lm_head.weight"] is rules["model.norm.weight"] is None


def test_models_without_rules_are_named():
    for config in (T5Config(), GPT2Config()):
        with pytest.raises(ValueError, match=r"no `base_model_tp_plan`.*c_attn, can't be split by columns"):
            tfn.launch.tensor_rules(config)
    with pytest.raises(ValueError, match=r"MixtralConfig.*'layers.*' can't be done: a plan splits columns and rows"):
        tfn.launch.tensor_rules(MixtralConfig())


# --- processes that do not find each other -----------------------------------------------------------------------


def test_a_rank_that_is_alone_says_so(env):
    env(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    env(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with pytest.raises(RuntimeError, match=r"rank 0 of 2 did not find the others .*Launch with `accelerate launch"):
        tfn.launch.join(timeout=1.0)
    with pytest.raises(RuntimeError, match=r"2 processes were launched .* believes that it is alone"):
        tfn.Plan.replicated().shape(tfn.Plan().world)
    with pytest.raises(ValueError, match="a number of seconds above 0"):
        tfn.launch.join(timeout=0)


def test_accelerate_launch_that_started_one_of_several(env):
    """`accelerate launch --cpu --num_processes 2` starts one, and exports where the others would be."""
    env(ACCELERATE_USE_CPU="True", ACCELERATE_MIXED_PRECISION="no", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    with pytest.raises(RuntimeError, match=r"asked for several processes and has started one.*--multi_gpu"):
        tfn.launch.join()


# --- real launches: two processes on CPUs ------------------------------------------------------------------------

QUIET = {"PYTHONWARNINGS": "ignore"}


def stand_in(tmp_path):
    """`accelerate launch` insists on the package, of which a native plan uses nothing: an empty one will do."""
    for file in ("deepspeed/__init__.py", "deepspeed/launcher/__init__.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "deepspeed/launcher/runner.py").write_text("DEEPSPEED_ENVIRONMENT_NAME = '.deepspeed_env'\n")
    (tmp_path / "deepspeed-0.0.dist-info").mkdir()
    (tmp_path / "deepspeed-0.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0\n")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        long("ddp", "replicate=-1, shard=1, tensor=1, stage=0"),
        ("fsdp", "replicate=1, shard=-1, tensor=1, stage=3"),
        long("deepspeed_file", "replicate=1, shard=-1, tensor=1, stage=3"),
        long("deepspeed", "replicate=1, shard=-1, tensor=1, stage=2"),
    ],
)
def test_the_files_of_the_documentation_train_as_one_process(name, plan, tmp_path):
    """`trainfn test` launches by `accelerate launch`, and compares two ranks with one."""
    variables = stand_in(tmp_path) if "deepspeed" in name else {}
    text = printed("-m", "trainfn", "test", "--config_file", adapted(name, tmp_path), **QUIET, **variables)
    assert f"Launch(rank 0 of 2, cpu:0, Plan({plan}))" in text
    assert "trainfn test: success. 2 ranks on cpu: the numbers of one process, apart by at most fp32" in text


SCRIPT = """
import sys, torch, trainfn as tfn

launch = tfn.launch.settings(timeout=60)
optimizer = tfn.optim.sgd(0.1)
state = tfn.shard(tfn.init(torch.nn.Linear(2, 1), optimizer), launch.plan)
step = tfn.train_step(lambda model, x: tfn.Mean.of(model(x) ** 2), optimizer, plan=launch.plan)

def batches(n):
    if n == 2 and launch.rank == 1:
        raise ValueError("these rows are bad")
    return torch.ones(2, 2)

for info in tfn.steps(step, state, batches, until=4):
    print(f"rank {launch.rank} has done step {info.n}", flush=True)
"""


@pytest.mark.slow
def test_torchrun_needs_no_variables_and_a_rank_that_raises_ends_the_others(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    status, out, err = ended(*torchrun(2), tmp_path / "script.py", **QUIET)
    assert status == 1
    assert "rank 0 has done step 2" in out and "has done step 3" not in out
    assert "ValueError: these rows are bad" in err and "trainfn: rank 1 of 2, before step 3, raised" in err
    waited = "rank 0 of 2, before step 3, was waiting for another rank, which has ended: rank 1: ValueError: these rows"
    assert waited in err or "Signal 15 (SIGTERM)" in err  # the launcher may be faster


NOTEBOOK = """
import sys, time, torch, trainfn as tfn
from accelerate import PartialState, debug_launcher, notebook_launcher
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

print(tfn.launch.settings())  # in a cell before: one process, and nothing is in the way of the launch

def train(rank_1):
    if rank_1 == "accelerate":
        PartialState()  # without GPUs and ACCELERATE_USE_CPU, each believes that it is alone
    launch = tfn.launch.settings(timeout=3.0)
    launch = tfn.launch.settings(timeout=3.0)  # once is as good as twice
    optimizer = tfn.optim.sgd(0.1)
    torch.manual_seed(launch.rank)
    state = tfn.shard(tfn.init(torch.nn.Linear(2, 1), optimizer), launch.plan)
    step = tfn.train_step(lambda model, x: tfn.Mean.of(model(x) ** 2), optimizer, plan=launch.plan)
    def batches(n):
        if rank_1 == "raises" and launch.rank == 1 and n == 1:
            raise ValueError("these rows are bad")
        if rank_1 == "waits" and launch.rank == 1 and n == 1:
            time.sleep(20)
        return torch.ones(2, 2)
    losses = [info.metrics["loss"].value.item() for info in tfn.steps(step, state, batches, until=2)]
    if launch.rank == 0:
        print("PRECISION", launch.plan.precision.compute, "LOSSES", len(losses), flush=True)

def met_before(rank, port):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    train("trains")

print("RUN other launchers", flush=True)
debug_launcher(train, ("trains",))
torch.multiprocessing.start_processes(met_before, (int(sys.argv[1]) - 1,), nprocs=2, start_method="fork")
for port, rank_1 in enumerate(["trains", "raises", "waits", "accelerate"], start=int(sys.argv[1])):
    start = time.time()
    print("RUN", rank_1, flush=True)
    try:
        notebook_launcher(train, (rank_1,), num_processes=2, use_port=str(port), mixed_precision="bf16")
    except ChildFailedError as error:
        print("FAILED", error, flush=True)
    print("SECONDS", int(time.time() - start), flush=True)
"""


@pytest.mark.slow
def test_notebook_launcher_and_how_its_ranks_end(tmp_path):
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    text = printed(tmp_path / "notebook.py", free_port(), **QUIET)
    before, others, trains, raises, waits, accelerate = text.split("RUN ")
    assert "Launch(1 process, cpu" in before
    assert others.count("PRECISION None LOSSES 2") == 2  # of `debug_launcher`, and of a group made without a launcher
    assert "PRECISION torch.bfloat16 LOSSES 2" in trains and "FAILED" not in trains
    assert "ValueError: these rows are bad" in raises  # told by rank 1, or by rank 0 that waited for it
    assert "rank 1 of 2, before step 2, raised this" in raises or "which has ended: rank 1: ValueError" in raises
    assert "trainfn: rank 0 of 2, before step 2, waited for the other ranks in vain" in waits
    assert "Accelerate, which was asked first, found 1 on cpu: each would train alone" in accelerate
    assert all(int(part.split("SECONDS ")[1].split()[0]) < 15 for part in (raises, waits, accelerate))


def test_the_command_names_what_the_launcher_drops(tmp_path, monkeypatch, capfd):
    path = adapted("fsdp", tmp_path)
    path.write_text(path.read_text().replace("fsdp_use_orig_params", "fsdp_use_orig_parms"))
    launched = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: launched.append(command) or FakeDone())
    assert main(["test", "--config_file", str(path), "--num_processes", "2"]) == 3
    said = "fsdp_use_orig_parms=true (the name is unknown. Did you mean 'fsdp_use_orig_params'?)"
    assert said in capfd.readouterr().err
    assert launched[0][1:] == [
        *("-m", "accelerate.commands.launch", "--config_file", str(path), "--num_processes", "2"),
        *("--module", "trainfn.launch._selftest"),
    ]


def test_the_command_names_a_file_that_does_not_exist(tmp_path, capsys):
    assert main(["test", "--config_file", str(tmp_path / "none.yaml")]) == 2
    assert "there is no such file. `accelerate config` writes one" in capsys.readouterr().err


class FakeDone:
    returncode = 3
