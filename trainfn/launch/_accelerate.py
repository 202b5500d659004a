"""Read the variables that ``accelerate launch`` exports, into a plan and the settings beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainfn._plan import Precision
from trainfn._text import nearest
from trainfn.launch._fields import Fate, Field, is_true
from trainfn.launch._fsdp import VALID, strategy

_GATHERED = "every operation gathers the parameters that it uses, so no module is wrapped"
_PREFETCH = "no module is wrapped, so there is no next one to fetch"
_SENT = "`tfn.shard` sends rank 0's values, and on the other ranks a model may be on the meta device"
_V1, _V2 = "version 1 has fsdp_sharding_strategy", "version 2 has fsdp_reshard_after_forward"
_NOT_NEEDED = {
    "FSDP_AUTO_WRAP_POLICY": _GATHERED,
    "FSDP_TRANSFORMER_CLS_TO_WRAP": _GATHERED,
    "FSDP_MIN_NUM_PARAMS": _GATHERED,
    "FSDP_BACKWARD_PREFETCH": _PREFETCH,
    "FSDP_FORWARD_PREFETCH": _PREFETCH,
    "FSDP_USE_ORIG_PARAMS": "parameters are always the module's own",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": _SENT,
    "FSDP_SYNC_MODULE_STATES": _SENT,
    "PARALLELISM_CONFIG_CP_BACKEND": "there is one part of a sequence",
    "PARALLELISM_CONFIG_CP_COMM_STRATEGY": "there is one part of a sequence",
    "PARALLELISM_CONFIG_SP_BACKEND": "there is one part of a sequence",
    "PARALLELISM_CONFIG_SP_SEQ_LENGTH": "there is one part of a sequence",
    "PARALLELISM_CONFIG_SP_SEQ_LENGTH_IS_VARIABLE": "there is one part of a sequence",
    "PARALLELISM_CONFIG_SP_ATTN_IMPLEMENTATION": "there is one part of a sequence",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "`tfn.jit` never breaks a graph",
}
_SHOWN = {  # where the key of the yaml is not the variable's name
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_transformer_layer_cls_to_wrap",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "deepspeed_moe_layer_cls_names",
}
# Variables of the machine and of Accelerate itself, which `join` and Accelerate read.
_OWN = {
    *("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_TORCH_DEVICE"),
    *("ACCELERATE_LOG_LEVEL", "ACCELERATE_ENABLE_RICH", "ACCELERATE_DISABLE_RICH", "ACCELERATE_DEBUG_RDV_FILE"),
    *("ACCELERATE_BYPASS_DEVICE_MAP", "ACCELERATE_INIT_INCLUDE_BUFFERS", "ACCELERATE_CONFIG_DS_FIELDS"),
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    *("ACCELERATE_ALLOW_CP_STANDALONE", "ACCELERATE_USE_SAGEMAKER", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE"),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shown(variable: str) -> str:
    """Return the name that the user wrote for a variable.

    >>> shown("FSDP_STATE_DICT_TYPE"), shown("ACCELERATE_DYNAMO_BACKEND"), shown("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    ('fsdp_state_dict_type', 'dynamo_backend', 'zero_stage')
    """
    short = variable.removeprefix("ACCELERATE_DEEPSPEED_").removeprefix("ACCELERATE_")
    return _SHOWN.get(variable, short.lower())


class Reading:
    """The variables of a launcher, and the settings that were read from them.

    Attributes:
        env: Their values.
        nodes: The number of machines.
        plan: The arguments of the plan.
        rest: The arguments of `Launch` beside the plan.
        fields: The fate of each variable.
    """

    def __init__(self, env: Mapping[str, str], nodes: int = 1) -> None:
        self.env, self.nodes = env, nodes
        self.plan: dict[str, Any] = {"replicate": -1}
        self.rest: dict[str, Any] = {}
        self.fields: list[Field] = []
        self.seen: set[str] = set()

    def get(self, variable: str) -> str | None:
        """Return the value; None if the user gave none, in which case the launcher exports the word None."""
        value = self.env.get(variable)
        return None if value in (None, "", "None", "none") else value

    def shard_by(self, **arguments: Any) -> None:
        """Set the arguments by which the plan shards a state."""
        kept = {name: value for name, value in self.plan.items() if name in ("precision", "offload", "rules")}
        self.plan = {**kept, **arguments}

    def note(self, variable: str, fate: Fate, detail: str) -> None:
        """Record the fate of a variable."""
        self.seen.add(variable)
        self.fields.append(Field(shown(variable), self.env[variable], fate, detail))

    def unread(self, *prefixes: str) -> list[str]:
        """Return the variables with a value whose fate is not recorded yet."""
        return [
            name
            for name in sorted(self.env)
            if name.startswith(prefixes) and name not in self.seen | _OWN and self.get(name) is not None
        ]


def read(reading: Reading) -> None:
    """Read all variables but DeepSpeed's and the sizes of axes."""
    _megatron(reading)
    _precision(reading)
    _fsdp(reading)
    _compilation(reading)


def finish(reading: Reading) -> None:
    """Record the variables that were not read."""
    others = ("FSDP_SHARDING_STRATEGY", "FSDP_STATE_DICT_TYPE", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_OFFLOAD_PARAMS")
    known = {shown(variable) for variable in (*_NOT_NEEDED, *reading.seen, *others)}
    for name in reading.unread("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_"):
        off = _switched_off(reading, name)
        reading.note(name, "ignored", off or f"the name is unknown.{nearest(shown(name), known)}")


def _switched_off(reading: Reading, name: str) -> str | None:
    switches = {
        "FSDP_": "ACCELERATE_USE_FSDP",
        "PARALLELISM_CONFIG_": "ACCELERATE_USE_PARALLELISM_CONFIG",
        "ACCELERATE_DEEPSPEED_": "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_GRADIENT_": "ACCELERATE_USE_DEEPSPEED",
    }
    for prefix, switch in switches.items():
        if name.startswith(prefix) and not is_true(reading.env.get(switch)):
            return f"{switch} is not true"
    return None


def _megatron(reading: Reading) -> None:
    if is_true(reading.get("ACCELERATE_USE_MEGATRON_LM")):
        reading.note(
            "ACCELERATE_USE_MEGATRON_LM",
            "refused",
            "trainfn does not run Megatron-LM. For tensor parallelism, write `distributed_type: FSDP`,"
            " `fsdp_version: 2` and a `parallelism_config`.",
        )
        for name in reading.unread("MEGATRON_LM_"):
            reading.note(name, "ignored", "only Megatron-LM reads it")


# --- FSDP ---------------------------------------------------------------------------------------------------------


def _fsdp(reading: Reading) -> None:
    if not is_true(reading.get("ACCELERATE_USE_FSDP")):
        return
    version = reading.env.get("FSDP_VERSION", "1")
    if "FSDP_VERSION" in reading.env:
        reading.note("FSDP_VERSION", "mapped", f"how its other fields are read: {_V2 if version == '2' else _V1}")
    reading.shard_by(shard=-1, stage=3)
    (_fsdp_2 if version == "2" else _fsdp_1)(reading)
    _offload(reading)
    _state_dict(reading)
    _ignored_modules(reading)
    _recomputation(reading)
    _rest(reading, "FSDP_")


def _fsdp_1(reading: Reading) -> None:
    found = strategy(reading.get("FSDP_SHARDING_STRATEGY") or "FULL_SHARD", reading.nodes)
    fate: Fate = "refused" if found is None else "mapped"
    detail = VALID if found is None else found.detail
    if found is not None:
        reading.shard_by(**{name: getattr(found.plan, name) for name in ("replicate", "shard", "stage", "reshard")})
    if "FSDP_SHARDING_STRATEGY" in reading.env:
        reading.note("FSDP_SHARDING_STRATEGY", fate, detail)
    if reading.get("FSDP_RESHARD_AFTER_FORWARD") is not None:
        default = reading.env["FSDP_RESHARD_AFTER_FORWARD"].lower() == "true"  # the launcher's own
        reading.note("FSDP_RESHARD_AFTER_FORWARD", "not needed" if default else "ignored", _V1)


def _fsdp_2(reading: Reading) -> None:
    if reading.get("FSDP_RESHARD_AFTER_FORWARD") is not None:
        reshard = is_true(reading.env["FSDP_RESHARD_AFTER_FORWARD"])
        reading.plan["reshard"] = reshard
        reading.note("FSDP_RESHARD_AFTER_FORWARD", "mapped", f"Plan.fsdp(reshard={reshard})")
    if reading.get("FSDP_SHARDING_STRATEGY") is not None:
        default = reading.env["FSDP_SHARDING_STRATEGY"].upper() in ("FULL_SHARD", "1")  # the launcher's own
        reading.note("FSDP_SHARDING_STRATEGY", "not needed" if default else "ignored", _V2)


def _offload(reading: Reading) -> None:
    if is_true(reading.get("FSDP_OFFLOAD_PARAMS")):
        reading.plan["offload"] = ("opt_state", "params")
        reading.note("FSDP_OFFLOAD_PARAMS", "mapped", 'Plan(offload=("opt_state", "params"))')
    elif "FSDP_OFFLOAD_PARAMS" in reading.env:
        reading.note("FSDP_OFFLOAD_PARAMS", "mapped", "Plan(offload=())")


def _state_dict(reading: Reading) -> None:
    name = "FSDP_STATE_DICT_TYPE"
    kind = reading.get(name)
    if kind is None:
        return
    kinds = {"FULL_STATE_DICT": "full", "SHARDED_STATE_DICT": "sharded"}
    if kind.upper() in kinds:
        reading.rest["state_dict"] = kinds[kind.upper()]
        reading.note(name, "mapped", f'Launch.state_dict="{kinds[kind.upper()]}"')
    else:
        reading.note(name, "refused", "FULL_STATE_DICT, or SHARDED_STATE_DICT for a file of each rank's own part.")


def _ignored_modules(reading: Reading) -> None:
    pattern = reading.get("FSDP_IGNORED_MODULES")
    if pattern is not None:
        reading.plan["rules"] = ((rf"^(?:{pattern})\.", "replicate"),)
        reading.note("FSDP_IGNORED_MODULES", "mapped", f"Plan(rules={reading.plan['rules']}): full on every rank")


def _recomputation(reading: Reading) -> None:
    name = "FSDP_ACTIVATION_CHECKPOINTING"
    if name in reading.env:
        reading.rest["checkpointing"] = is_true(reading.get(name))
        then = ": `model.gradient_checkpointing_enable()`" if reading.rest["checkpointing"] else ""
        reading.note(name, "mapped", f"Launch.checkpointing={reading.rest['checkpointing']}{then}")
    name = "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"
    if name in reading.env:
        asked = is_true(reading.get(name))
        reading.note(name, "ignored" if asked else "not needed", "activations that are kept stay on the device")


def _rest(reading: Reading, prefix: str) -> None:
    for name in reading.unread(prefix):
        if name in _NOT_NEEDED:
            reading.note(name, "not needed", _NOT_NEEDED[name])


# --- axes, precision, compilation ---------------------------------------------------------------------------------


def parallelism(reading: Reading) -> None:
    """Read the sizes of the axes, if the configuration names them."""
    if not is_true(reading.get("ACCELERATE_USE_PARALLELISM_CONFIG")):
        return
    axes = {"DP_REPLICATE_SIZE": "replicate", "DP_SHARD_SIZE": "shard", "TP_SIZE": "tensor"}
    reading.plan.setdefault("stage", 3)
    for name, axis in axes.items():
        size = reading.get(f"PARALLELISM_CONFIG_{name}") or "1"
        reading.plan[axis] = int(size)
        more = ", with `rules=tfn.launch.tensor_rules(model)`" if axis == "tensor" and size != "1" else ""
        if f"PARALLELISM_CONFIG_{name}" in reading.env:
            reading.note(f"PARALLELISM_CONFIG_{name}", "mapped", f"Plan({axis}={size}){more}")
    for name, what in {"CP_SIZE": "context", "SP_SIZE": "sequence"}.items():
        variable = f"PARALLELISM_CONFIG_{name}"
        size = reading.get(variable)
        if size is not None and size != "1":
            line = f"Write `{variable.lower()}: 1`, and those ranks as `parallelism_config_dp_shard_size`."
            reading.note(variable, "refused", f"no plan splits sequences: there is no {what} parallelism. {line}")
        elif size is not None:
            reading.note(variable, "mapped", f"no {what} parallelism")
    _rest(reading, "PARALLELISM_CONFIG_")


def _precision(reading: Reading) -> None:
    variable = "ACCELERATE_MIXED_PRECISION"
    if variable not in reading.env and "NPROC" in reading.env and reading.get("MIXED_PRECISION"):
        variable = "MIXED_PRECISION"  # `notebook_launcher` exports it so, which Accelerate does not read
    given = reading.get(variable)
    if given is None:
        return
    name = given.lower()
    reading.rest["mixed_precision"] = name
    if name == "no":
        reading.note(variable, "mapped", "Plan(precision=Precision())")
    elif name in _DTYPES:
        reading.plan["precision"] = Precision(compute=_DTYPES[name])
        more = "; and `Launch.loss_scale`, for `tfn.transforms.dynamic_loss_scale`" if name == "fp16" else ""
        reading.rest["loss_scale"] = {} if name == "fp16" else None
        reading.note(
            variable,
            "mapped",
            f"Plan(precision=Precision(compute={_DTYPES[name]})): gradients are added up as float32{more}",
        )
    else:
        reading.note(variable, "refused", 'no plan computes in it. Write "bf16".')
        for fp8 in reading.unread("ACCELERATE_FP8_"):
            reading.note(fp8, "ignored", "only fp8 reads it")


def _compilation(reading: Reading) -> None:
    backend = reading.get("ACCELERATE_DYNAMO_BACKEND")
    asked = backend is not None and backend.lower() != "no"
    options: dict[str, Any] = {"backend": (backend or "").lower()}
    if "ACCELERATE_DYNAMO_BACKEND" in reading.env:
        detail = f"Launch.compile: `tfn.jit(step, backend={options['backend']!r})`" if asked else "Launch.compile=None"
        reading.note("ACCELERATE_DYNAMO_BACKEND", "mapped", detail)
    mode = reading.get("ACCELERATE_DYNAMO_MODE")
    if mode is not None:
        options |= {} if mode == "default" else {"mode": mode}
        reading.note("ACCELERATE_DYNAMO_MODE", "mapped", f"Launch.compile: mode={options.get('mode')!r}")
    dynamic = reading.get("ACCELERATE_DYNAMO_USE_DYNAMIC")
    if dynamic is not None:
        options |= {"dynamic": True} if is_true(dynamic) else {}
        detail = "dynamic=True" if is_true(dynamic) else "dynamic=None: for any size once a size has changed"
        reading.note("ACCELERATE_DYNAMO_USE_DYNAMIC", "mapped", f"Launch.compile: {detail}")
    regional = reading.get("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")
    if regional is not None:
        fate: Fate = "ignored" if asked and is_true(regional) else "not needed"
        reading.note("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", fate, "the step is compiled as one graph")
    _rest(reading, "ACCELERATE_DYNAMO_")
    if asked:
        reading.rest["compile"] = options
