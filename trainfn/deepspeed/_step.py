"""The step around the engine: exact sums in, one update out.

DeepSpeed averages gradients over ranks and micro-batches, with the same weight for each. So the step passes the loss of
a micro-batch as ``total * ranks / estimate``, without a division by the number of micro-batches. The engine then has
the gradient of all totals, divided by the estimate. With one micro-batch, the estimate is the weight over all ranks.
With several, it is the weight of the first one times their number; the exact weight divides the gradient once all
weights are known. That happens where the engine undoes its loss scale, before it clips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainfn import random, tree
from trainfn._grad import detached, exact
from trainfn._keyed import keyed
from trainfn._types import Batch, Loss, Mean, Metrics, Total
from trainfn.deepspeed._engine import EngineState, Run, alive

Step = Callable[[EngineState, Batch], tuple[EngineState, Metrics]]


class Model:
    """The model that a loss gets: calls go through the engine, attributes are the module's.

    Floating-point tensors that it is called with get the engine's precision.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._calls = engine, 0
        half = engine.fp16_enabled() or engine.bfloat16_enabled()
        self._dtype = engine.get_data_types()[0] if half else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        return self._engine(*(self._cast(x) for x in args), **{name: self._cast(x) for name, x in kwargs.items()})

    def _cast(self, x: Any) -> Any:
        cast = self._dtype is not None and isinstance(x, Tensor) and x.is_floating_point()
        return x.to(self._dtype) if cast else x

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.module, name)


def train_step(loss: Loss) -> Step:
    """Return the step ``(state, batch) -> (state, metrics)`` of a loss; the engine does the rest.

    Every rank calls it with its own rows; the global batch is the rows of all ranks, one rank after the other. The
    configuration's ``gradient_accumulation_steps`` is the number of micro-batches. The metrics are ``loss``, the loss
    function's own, and ``grad_norm``, all over the rows of all ranks. The norm is that of the mean gradient before
    clipping, if the configuration lets DeepSpeed compute it. Each rank has its own BatchNorm statistics.

    Args:
        loss: See `trainfn.value_and_grad`. It must call the model itself, not only parts of it.

    Raises:
        DonatedStateError: If the state has been used.
        ValueError: If a rank has fewer rows than micro-batches, or the loss does not call the model.

    >>> step = train_step(lambda model, x: tfn.Mean.of(model(x) ** 2))
    >>> state, metrics = step(state, torch.ones(3, 2))  # doctest: +SKIP
    """

    def step(state: EngineState, batch: Batch, /) -> tuple[EngineState, Metrics]:
        run = alive(state, "step(state, batch)")
        run.set_mode(True)
        sums = _Sums(run)
        pieces = _pieces(run, batch)
        key = random.fold_in(run.key, state.step)
        for number, (piece, first_row) in enumerate(pieces, 1):
            run.engine.set_gradient_accumulation_boundary(number == len(pieces))
            rows = tree.row_count(piece)
            with keyed(key, rows=rows, first_row=first_row), torch.enable_grad():
                mean, metrics = _forward(run, loss, piece, rows)
                run.halfway = True
                run.engine.backward(sums.share(mean, len(pieces)), scale_wrt_gas=False)
            sums.add({"loss": detached(mean), **{name: detached(metric) for name, metric in metrics.items()}})
        total = _over_ranks(run, sums.means)
        norm = _update(run, sums.rest(total["loss"].weight) if len(pieces) > 1 else 1.0)
        norms = {} if norm is None else {"grad_norm": Mean(norm, torch.ones_like(norm))}
        return run.handle(), {"loss": total.pop("loss"), **norms, **total}

    return step


def eval_step(loss: Loss) -> Callable[[EngineState, Batch], Metrics]:
    """Return the function ``(state, batch) -> metrics`` of a loss over the rows of all ranks, in eval mode.

    Every rank calls it as often as the others. The state stays valid.

    >>> step = eval_step(lambda model, x: tfn.Mean.of(model(x) ** 2))
    >>> step(state, torch.ones(3, 2))  # doctest: +SKIP
    {'loss': Mean(0.25 over weight 6)}
    """

    def evaluate_batch(state: EngineState, batch: Batch, before: Tensor | int = 0, /) -> Metrics:
        run = alive(state, "eval_step(state, batch)")
        run.set_mode(False)
        rows = tree.row_count(batch)
        first_row, _ = _rows(run, rows, int(before))
        key = random.fold_in(run.key, state.step)
        with torch.no_grad(), keyed(key, rows=rows, first_row=first_row):
            mean, metrics = exact(loss(Model(run.engine), batch), rows)
        return _over_ranks(run, {"loss": detached(mean), **{k: detached(m) for k, m in metrics.items()}})

    evaluate_batch.takes_first_row = True  # type: ignore[attr-defined]
    return evaluate_batch


def _pieces(run: Run, batch: Batch) -> list[tuple[Batch, int]]:
    """This rank's micro-batches, each with its first row in the global batch."""
    num = run.engine.gradient_accumulation_steps()
    first, fewest = _rows(run, tree.row_count(batch))
    if fewest < num:  # known to all ranks, so that none waits for the one that fails
        raise ValueError(
            f"step(state, batch): a rank has {fewest} rows, and gradient_accumulation_steps={num} needs at least one"
            f" each. Use batches of {num} rows or more on every rank, or"
            f' `values={{"gradient_accumulation_steps": {fewest}}}`.'
        )
    return [(piece, first + row) for piece, row in tree.split(batch, num)]


def _rows(run: Run, rows: int, before: int = 0) -> tuple[int, int]:
    """The number of this rank's first row among those of all ranks, and the smallest number of rows on any rank.

    ``before`` is the number of rows of this rank's earlier batches: those of all ranks come first.
    """
    dist = torch.distributed
    counts = torch.zeros(dist.get_world_size(run.group) + 1, dtype=torch.int64, device=run.engine.device)
    rank = dist.get_rank(run.group)
    counts[rank], counts[-1] = rows, before
    # 8 bytes a rank, once a batch, and one wait for the device: dropout is drawn by a row's number in the global batch.
    dist.all_reduce(counts, group=run.group)
    *known, earlier = counts.tolist()
    return earlier + sum(known[:rank]), min(known)


def _forward(run: Run, loss: Loss, piece: Batch, rows: int) -> tuple[Mean, Metrics]:
    model = Model(run.engine)
    mean, metrics = exact(loss(model, piece), rows)
    if isinstance(mean, Total):
        raise ValueError(
            "step(state, batch): the loss is a total of several means, and DeepSpeed's engine takes one backward pass"
            " for each micro-batch. Return one `tfn.Mean`, or train with `tfn.train_step` and a `tfn.Plan`."
        )
    if not mean.total.requires_grad:
        raise ValueError(
            "step(state, batch): the loss does not depend on any parameter. Compute it from the `model` argument: a"
            " module taken from outside the loss, `torch.no_grad()` or `.detach()` cuts the connection."
        )
    if model._calls < 1:
        raise ValueError(
            "step(state, batch): the loss did not call the model, only parts of it, and DeepSpeed's engine prepares the"
            " backward pass when it is called. Call `model(...)`, and move what is different into the module's"
            " `forward`."
        )
    return mean, metrics


class _Sums:
    """The means of the micro-batches so far, and the weight by which their gradients are divided for now."""

    def __init__(self, run: Run) -> None:
        self.run, self.means = run, dict[str, Mean]()
        self.estimate: Tensor | None = None

    def share(self, mean: Mean, pieces: int) -> Tensor:
        """The number that the engine differentiates for one micro-batch."""
        if self.estimate is None:
            weight = mean.weight.detach().double()
            # 8 bytes, once an update: gradients are divided by the weight of all ranks' rows.
            torch.distributed.all_reduce(weight, group=self.run.group)
            self.estimate = _or_one(weight) * pieces
        averaged = self.run.engine.gradient_average
        ranks = torch.distributed.get_world_size(self.run.group) if averaged else 1
        return mean.total.float() * (ranks / self.estimate).float()

    def add(self, means: Metrics) -> None:
        self.means = {name: self.means[name] + mean for name, mean in means.items()} if self.means else means

    def rest(self, weight: Tensor) -> float:
        """The number that the gradients are still to be divided by."""
        assert self.estimate is not None
        return float(_or_one(weight.double()) / self.estimate)


def _or_one(weight: Tensor) -> Tensor:
    return torch.where(weight == 0, torch.ones_like(weight), weight)  # with weight 0, the sums are 0 too


def _over_ranks(run: Run, means: Metrics) -> Metrics:
    """Return means over the rows of all ranks."""
    wide = torch.float32 if run.engine.device.type == "mps" else torch.float64
    parts = [part for mean in means.values() for part in mean]
    flat = torch.cat([part.to(wide).flatten() for part in parts])
    # An all-reduce of 16 bytes a metric, once a step: metrics are means over the rows of all ranks.
    torch.distributed.all_reduce(flat, group=run.group)
    sums = iter(flat.split([part.numel() for part in parts]))
    return {
        name: type(mean)(
            *(next(sums).view(part.shape).to(torch.promote_types(part.dtype, torch.float32)) for part in mean)
        )
        for name, mean in means.items()
    }


def _update(run: Run, divisor: float) -> Tensor | None:
    """Run a step of the engine on its gradients divided by ``divisor``; return their norm before clipping."""
    engine = run.engine
    optimizer = engine.optimizer
    _set_rate(run)
    if optimizer is engine.basic_optimizer:  # stage 0 in float32: the gradients are in `p.grad`, as in torch
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if divisor != 1.0:
            torch._foreach_div_(grads, divisor)
        norm = tree.global_norm(grads)
        engine.step()
        return norm
    scale = getattr(optimizer, "loss_scale", 1.0)
    if divisor == 1.0:
        engine.step()
    elif hasattr(optimizer, "loss_scale"):
        optimizer.loss_scale = scale * divisor
        engine.step()
        optimizer.loss_scale = scale * (optimizer.loss_scale / (scale * divisor))  # a dynamic scale may have moved
    else:  # stage 1 with bfloat16 parameters and float32 sums
        torch._foreach_div_(optimizer.fp32_groups_gradients_flat, divisor)
        engine.step()
    norm = engine.get_global_grad_norm()
    if type(optimizer).__name__ == "FP16_UnfusedOptimizer":  # only this class reports the scaled norm
        norm = norm / (scale * divisor)
    return None if norm is None else torch.as_tensor(norm, dtype=torch.float32, device=engine.device)


def _set_rate(run: Run) -> None:
    if run.schedule is None:
        return
    engine = run.engine
    done = torch.full((), engine.global_steps - engine.skipped_steps, dtype=torch.int64, device=engine.device)
    for group in engine.optimizer.param_groups:
        group["lr"] = float(run.schedule(done))
