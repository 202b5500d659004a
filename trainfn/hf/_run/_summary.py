"""The description of a run before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainfn.hf._parallel._world import World
from trainfn.hf._run._data import Length, arithmetic, together
from trainfn.hf._run._loop import compiles
from trainfn.hf._types import TrainerLike

if TYPE_CHECKING:
    from trainfn.hf._arguments._training import TrainingArguments


def summary(trainer: TrainerLike) -> str:
    """Describe the resolved run: rows, batches, updates, the schedule, and when it logs, evaluates and saves."""
    args, run = trainer.args, trainer._trainfn.run
    loader = trainer.get_train_dataloader() if run is None else run.windows.loader
    length = arithmetic(args, loader, trainer.num_examples(loader))
    compiled, why = compiles(trainer)
    world, size = trainer._trainfn.world, together(trainer, args.train_batch_size)
    each = f"{size // world.parts} rows{f' x {world.parts} ranks' if world.parts > 1 else ''}"
    rows = "unknown" if length.num_examples is None else f"{length.num_examples:,}"
    lines = {
        "rows": f"{rows} per epoch",
        "batch": f"{each} x {length.accumulate} micro-batches = {size * length.accumulate} rows per update; the split"
        " changes nothing but memory",
        **({} if world.plan is None else {"ranks": _layout(world)}),
        "updates": f"{length.max_steps:,}" + _per_epoch(length, args),
        "optimizer": f"{_value(args.optim)}, {_value(args.lr_scheduler_type)} schedule from {args.learning_rate:g},"
        f" {args.get_warmup_steps(length.max_steps)} updates of warm-up",
        "clipping": f"global norm {args.max_grad_norm:g}" if args.max_grad_norm > 0 else "none",
        "log": _every(args.logging_strategy, args.logging_steps, length),
        "evaluate": _every(args.eval_strategy, args.eval_steps or args.logging_steps, length),
        "save": _every(args.save_strategy, args.save_steps, length)
        + (f", the newest {args.save_total_limit} kept" if args.save_total_limit else ""),
        "step": f"{'compiled' if compiled else 'eager'}: {why}",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _layout(world: World) -> str:
    plan = world.plan
    assert plan is not None
    axes = ", ".join(f"{axis}={size}" for axis, size in plan.shape(world.ranks.size).items())
    split = {0: "nothing", 1: "the optimizer state", 2: "optimizer state and gradients", 3: "parameters, too"}
    what = split[plan.stage] if plan.shape(world.ranks.size)["shard"] > 1 else "nothing"
    return f"{world.ranks.size} processes, {axes}; sharded: {what}"


def _per_epoch(length: Length, args: TrainingArguments) -> str:
    if length.micro_per_epoch is None:
        return ", as max_steps says"
    epochs = length.max_steps / length.updates_per_epoch
    short = length.micro_per_epoch % length.accumulate
    last = f"; the last of an epoch has {short} micro-batch{'es' if short > 1 else ''}" if short else ""
    return f" in {epochs:g} epochs of {length.updates_per_epoch:,}{last}"


def _every(strategy: str, steps: float | None, length: Length) -> str:
    strategy = _value(strategy)
    if strategy != "steps" or steps is None:
        return {"no": "never", "epoch": "after every epoch", "best": "whenever an evaluation is the best"}.get(
            strategy, strategy
        )
    every = steps if steps >= 1 else -(-length.max_steps * steps // 1)
    return f"every {every:g} updates" + (" (more than there are)" if every > length.max_steps else "")


def _value(name: str) -> str:
    return str(getattr(name, "value", name))
