"""DeepSpeed's own checkpoints, and plain weights.

A checkpoint of DeepSpeed is a folder of pickles, one or two for each rank, which only DeepSpeed reads. To load a pickle
is to run its code. `weights` gives tensors for safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainfn._types import StepInfo
from trainfn.deepspeed._engine import EngineState, alive, intact, package
from trainfn.errors import CheckpointError


def save(path: str | Path, state: EngineState) -> None:
    """Save a state with DeepSpeed's ``save_checkpoint``; every rank calls it.

    The folder gets a subfolder ``global_step<n>``, the file ``latest`` that names it, and ``zero_to_fp32.py``, which
    turns a checkpoint into plain float32 weights. The files are pickles.

    Args:
        path: The folder.
        state: It stays valid.

    >>> save("runs/ds", state)  # doctest: +SKIP
    """
    run = alive(state, "save(path, state)")
    run.engine.save_checkpoint(str(path), client_state={"trainfn_key": run.key.tolist()})


def restore(path: str | Path, state: EngineState, *, tag: str | None = None) -> EngineState:
    """Load a checkpoint of `save` into the engine, and return its state; every rank calls it.

    The files are pickles: load only files that you trust. The number of ranks and the stage must be those of the save,
    unless the configuration has ``"checkpoint": {"load_universal": true}``.

    Args:
        path: The folder given to `save`.
        state: A state of the same model, optimizer and configuration, for its engine. It is consumed, and may have been
            used before.
        tag: The name of the subfolder; by default the newest.

    Raises:
        CheckpointError: If there is no such checkpoint.

    >>> state = restore("runs/ds", state)  # doctest: +SKIP
    """
    run = intact(state, "restore(path, state)")
    name = tag if tag is not None else _latest(Path(path))
    if not (Path(path) / name).is_dir():
        raise CheckpointError(
            f"restore({str(path)!r}, state, tag={tag!r}): there is no checkpoint {name!r} in that folder, which has"
            f" {sorted(p.name for p in Path(path).iterdir() if p.is_dir()) if Path(path).is_dir() else 'nothing'}."
        )
    run.generation += 1
    loaded, kept = run.engine.load_checkpoint(str(path), tag=name)
    if loaded is None:
        raise CheckpointError(
            f"restore({str(path)!r}, state): DeepSpeed could not load {name!r}, and its output says why. Pass another"
            " checkpoint, `tag=...`."
        )
    if "trainfn_key" in kept:
        run.key = torch.tensor(kept["trainfn_key"], dtype=torch.int64, device=run.key.device)
    return run.handle()


def _latest(path: Path) -> str:
    for name in ("latest", "latest_universal"):
        if (path / name).is_file():
            return (path / name).read_text(encoding="utf-8").strip()
    raise CheckpointError(
        f"restore({str(path)!r}, state): there is no checkpoint of DeepSpeed in that folder, because it has no file"
        " `latest`. Pass the folder that `tfn.deepspeed.save` wrote, and a state of `tfn.deepspeed.init`."
    )


def saving(path: str | Path, *, every: int) -> Callable[[StepInfo], None]:
    """Return a callback for `trainfn.fit` that saves after each ``every``-th step, as `save` does.

    >>> fit(step, state, batches, until=100, callbacks=[saving("runs/ds", every=50)])  # doctest: +SKIP
    """

    def callback(info: StepInfo) -> None:
        if info.n % every == 0:
            print(f"trainfn: saving step {info.n} in {path}", file=sys.stderr)
            save(path, info.state)  # type: ignore[arg-type]  # a state of this engine

    return callback


def weights(state: EngineState) -> dict[str, Tensor]:
    """Return the module's full state dict on rank 0, on the CPU, and an empty dict elsewhere; every rank calls it.

    One gather of each parameter's bytes.

    Parameters are the optimizer's float32 ones, except at stage 0 with bf16, where DeepSpeed shows only the module's.
    Write them with ``model.save_pretrained(folder, state_dict=weights(state))``, or with safetensors' ``save_file``,
    which needs tied ones left out.

    Args:
        state: It stays valid.

    >>> weights(state)["weight"].dtype  # doctest: +SKIP
    torch.float32
    """
    run, deepspeed = alive(state, "weights(state)"), package()
    first = torch.distributed.get_rank() == 0
    out: dict[str, Tensor] = {}
    module = run.engine.module
    names = {id(tensor): name for name, tensor in module.named_parameters()}
    for name, parameter in module.named_parameters():
        master = deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        with deepspeed.zero.GatheredParameters([parameter], enabled=master is None and hasattr(parameter, "ds_id")):
            if first:
                out[name] = (parameter if master is None else master).detach().cpu().clone()
    if not first:
        return {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        tied = names.get(id(tensor))
        out[name] = out[tied] if tied is not None else tensor.detach().cpu().clone()
    return out
