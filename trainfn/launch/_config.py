"""Turn a configuration file into the variables that ``accelerate launch`` would export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainfn._text import nearest
from trainfn.launch._fields import text

# Keys of the machine, the launcher and TPUs, which the program that starts the processes reads.
MACHINE = {
    *("compute_environment", "debug", "downcast_bf16", "enable_cpu_affinity", "gpu_ids", "machine_rank"),
    *("main_process_ip", "main_process_port", "main_training_function", "num_machines", "num_processes"),
    *("rdzv_backend", "same_network", "use_cpu", "tpu_env", "tpu_name", "tpu_zone", "tpu_use_cluster"),
    *("tpu_use_sudo", "tpu_vm", "command_file", "commands", "mpirun_config"),
    *("deepspeed_hostfile", "deepspeed_inclusion_filter", "deepspeed_exclusion_filter"),
    *("deepspeed_multinode_launcher",),
}
_SWITCHES = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED",
    "MEGATRON_LM": "ACCELERATE_USE_MEGATRON_LM",
}
_SECTIONS = {  # the prefix of their keys, which may be left out, and of the variables
    "fsdp_config": ("fsdp_", "FSDP_"),
    "parallelism_config": ("parallelism_config_", "PARALLELISM_CONFIG_"),
    "dynamo_config": ("dynamo_", "ACCELERATE_DYNAMO_"),
    "fp8_config": ("fp8_", "ACCELERATE_FP8_"),
    "megatron_lm_config": ("megatron_lm_", "MEGATRON_LM_"),
    "deepspeed_config": ("deepspeed_", "ACCELERATE_DEEPSPEED_"),
}
_RENAMED = {
    "FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "FSDP_BACKWARD_PREFETCH_POLICY": "FSDP_BACKWARD_PREFETCH",  # its name until 2023; Accelerate drops it
    "ACCELERATE_DEEPSPEED_ZERO3_INIT_FLAG": "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "ACCELERATE_DEEPSPEED_GRADIENT_ACCUMULATION_STEPS": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_DEEPSPEED_GRADIENT_CLIPPING": "ACCELERATE_GRADIENT_CLIPPING",
}


def exported(path: str | Path) -> dict[str, str]:
    """Return the variables of an Accelerate configuration; those of a DeepSpeed JSON name its path.

    Raises:
        ValueError: If the file does not exist, holds no fields, or has an unknown key at its top level.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"settings(config={str(path)!r}): there is no such file. `accelerate config` writes one.")
    if path.suffix == ".json":
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    else:
        import yaml

        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(
            f"settings(config={str(path)!r}): the file holds a {type(content).__name__}, not fields. Write it by"
            " `accelerate config`."
        )
    if path.suffix == ".json" and "distributed_type" not in content:
        return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    return _variables(content, f"settings(config={str(path)!r})")


def _variables(content: Mapping[str, Any], call: str) -> dict[str, str]:
    out: dict[str, str] = {}
    known = {*MACHINE, *_SECTIONS, "mixed_precision", "distributed_type", "dynamo_backend", "fp16"}
    for key, value in content.items():
        if key not in known:
            raise ValueError(f"{call}: the field {key!r} is unknown.{nearest(key, known)}")
        if key in _SECTIONS:
            out |= _section(key, value or {})
    switch = _SWITCHES.get(str(content.get("distributed_type", "NO")))
    out |= {} if switch is None else {switch: "true"}
    out |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"} if content.get("parallelism_config") else {}
    precision = content.get("mixed_precision") or ("fp16" if content.get("fp16") else "no")
    out["ACCELERATE_MIXED_PRECISION"] = text(precision)
    if "dynamo_backend" in content:
        out["ACCELERATE_DYNAMO_BACKEND"] = text(content["dynamo_backend"])
    if content.get("use_cpu"):
        out["ACCELERATE_USE_CPU"] = "true"
    return out


def _section(name: str, fields: Mapping[str, Any]) -> dict[str, str]:
    written, prefix = _SECTIONS[name]
    variables = {
        prefix + key.removeprefix(written).upper(): text(value) for key, value in fields.items() if key not in MACHINE
    }
    return {_RENAMED.get(variable, variable): value for variable, value in variables.items()}
