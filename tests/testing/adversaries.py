"""Mistakes that people make, each with the law that catches it, and the same thing done right.

``law(wrong)`` raises a `LawViolation` whose text, on one line, matches ``match``: the probable cause, not the headline
alone. ``law(right, seed)`` holds for every seed. What is called ``right`` differs from ``wrong`` in the mistake only.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import trainfn as tfn
import trainfn.testing as tt
from tests.helpers import generator, seeded


class Adversary(NamedTuple):
    name: str
    law: Callable[..., Any]  # (wrong or right, seed=0)
    wrong: Any
    right: Any
    match: str


SGD = tfn.optim.sgd(0.1)
PLAIN = {"x": tt.floats(4), "y": tt.integers(0, 3)}
POSITIONS = {"x": tt.floats(2, 4), "y": tt.floats(2), "mask": tt.masks(2)}
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 5.0])


# --- losses -------------------------------------------------------------------------------------------------------


def of_loss(check: Callable[..., Any], model: Any = None, batches: Any = None, **options: Any) -> Callable[..., Any]:
    def law(loss: Any, seed: int = 0) -> None:
        check(loss, model, batches, seed=seed, **options)

    law.__name__ = check.__name__
    return law


def exact(model, b):
    return tfn.losses.cross_entropy(model(b["x"]), b["y"])


def summed(model, b):
    return F.cross_entropy(model(b["x"]), b["y"], reduction="sum", ignore_index=-100)


def two_pooled(model, b):
    return exact(model, b) + 0.1 * tfn.losses.mse(model(b["x"])[:, 0], b["x"][:, 0])


def two_added(model, b):
    near = tfn.losses.mse(model(b["x"])[:, 0], b["x"][:, 0])
    return tfn.losses.total({"exact": exact(model, b), "near": 0.1 * near})


def heads_pooled(model, b):
    return sum(tfn.losses.cross_entropy(head(b["x"]), b["y"]) for head in model)


def heads_in_chunks(model, b):
    """One loss, of which the rows come in chunks."""
    pairs = zip(b["x"].chunk(2), b["y"].chunk(2), strict=True)
    return sum((tfn.losses.cross_entropy(model[0](x) + model[1](x), y) for x, y in pairs), tfn.Mean.of(torch.zeros(0)))


TWO_HEADS = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])


def counted(b):
    return (b["y"] != -100).sum().float()


def bare_scalar(model, b):
    return F.cross_entropy(model(b["x"]), b["y"])


def mean_of_means(model, b):
    return tfn.Mean(summed(model, b) / counted(b).clamp(min=1), torch.ones(()))


def forgotten_ignore_index(model, b):
    return tfn.Mean(summed(model, b), torch.tensor(float(len(b["y"]))))


def divided_twice(model, b):
    return tfn.Mean(summed(model, b) / counted(b).clamp(min=1), counted(b))


def weight_does_not_count(model, b):
    return tfn.Mean(summed(model, b), torch.ones(()))


def zero_by_zero(model, b):
    mean = F.cross_entropy(model(b["x"]), b["y"])
    return tfn.Mean(mean * counted(b), counted(b))


def weighted_by_rows(model, b):
    loss = F.cross_entropy(model(b["x"]), b["y"], weight=CLASS_WEIGHTS)
    return tfn.Mean(loss * len(b["y"]), torch.tensor(float(len(b["y"]))))


def weighted_by_weights(model, b):
    return tfn.Mean.of(F.cross_entropy(model(b["x"]), b["y"], reduction="none"), CLASS_WEIGHTS[b["y"]])


def tokens_by_row(model, b):
    values, mask = (model(b["x"])[..., 0] - b["y"]) ** 2, b["mask"].float()
    return tfn.Mean.of((values * mask).sum(1) / mask.sum(1).clamp(min=1))


def tokens(model, b):
    return tfn.Mean.of((model(b["x"])[..., 0] - b["y"]) ** 2, b["mask"])


def mask_not_in_the_weight(model, b):
    values = (model(b["x"])[..., 0] - b["y"]) ** 2
    return tfn.Mean((values * b["mask"]).sum(), torch.tensor(float(values.numel())))


def pooled(model, b):
    return tfn.losses.mse(model(b["x"].mean(1))[:, 0], b["y"])


def pooled_with_mask(model, b):
    mask = b["mask"].float()[..., None]
    return tfn.losses.mse(model((b["x"] * mask).sum(1) / mask.sum(1).clamp(min=1))[:, 0], b["y"])


def contrastive(model, b):
    h = model(b["x"])
    return tfn.Mean.of(F.cross_entropy(h @ h.T, torch.arange(len(h)), reduction="none"))


def contrastive_in_the_row(model, b):
    return tfn.Mean.of(F.cross_entropy(model(b["x"]) @ torch.eye(3), b["y"], reduction="none"))


def hard_examples(model, b):
    values = F.cross_entropy(model(b["x"]), b["y"], reduction="none")
    return tfn.Mean.of(values.topk((len(values) + 1) // 2).values)


def index_as_weight(model, b):
    values = F.mse_loss(model(b["x"]), b["x"][:, :3], reduction="none").mean(1)
    return tfn.Mean.of(values, torch.arange(len(values)).float())


def field_as_weight(model, b):
    return tfn.Mean.of(F.mse_loss(model(b["x"]), b["x"][:, :3], reduction="none").mean(1), b["x"][:, 3] ** 2)


def paired_with_neighbour(model, b):
    return tfn.losses.mse(model(b["x"]), model(b["x"].roll(1, 0)).detach() * b["x"][:, :1])


def by_layer(make: Callable[[], nn.Module]) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), make(), nn.Linear(5, 3)))


def normalizes(model: nn.Module, seed: int = 0) -> None:
    tt.check_row_additive(exact, model, PLAIN, seed=seed)


def reconstructed(p, b):
    return tfn.losses.mse(b["x"] * p["scale"] + p["shift"], b["x"].roll(1, 1))


def detached(p, b):
    return reconstructed({**p, "scale": p["scale"].detach()}, b)


def half_detached(p, b):
    return reconstructed({**p, "scale": 0.5 * p["scale"] + 0.5 * p["scale"].detach()}, b)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x


class WronglySquared(Squared):
    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class RightlySquared(Squared):
    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def with_function(function: Any) -> Callable[..., tfn.Mean]:
    return lambda p, b: tfn.Mean.of(function.apply(b["x"] * p["scale"] + p["shift"]))


def scale_and_shift():
    return {"scale": torch.full((4,), 0.5), "shift": torch.zeros(())}


additive = of_loss(tt.check_row_additive)
accumulates = of_loss(tt.check_accumulation_invariant, None, tt.batches(rows=(2, 3)))
spreads = of_loss(tt.check_rank_invariant, None, PLAIN)
spreads_padded = of_loss(tt.check_rank_invariant, None, PLAIN, pad={"y": -100})
pads_rows = of_loss(tt.check_padding_invariant)
pads_masked_rows = of_loss(tt.check_padding_invariant, None, POSITIONS)
pads_positions = of_loss(tt.check_padding_invariant, None, POSITIONS, pad={"x": 0, "y": 0, "mask": 0}, dim=1)
pads_pool = of_loss(
    tt.check_padding_invariant,
    None,
    {"x": tt.floats(2, 4), "y": tt.floats(), "mask": tt.masks(2)},
    pad={"x": 0, "mask": 0},
    dim=1,
)
permutes = of_loss(tt.check_permutation_invariant, None, tt.batches(PLAIN, rows=(2, 3)))
differentiates = of_loss(tt.check_gradients, scale_and_shift(), PLAIN)

LOSSES = [
    Adversary("mean of means", additive, mean_of_means, exact, "its weight a constant.* a mean of means"),
    Adversary("bare scalar", accumulates, bare_scalar, exact, "returns a bare scalar.* a mean of means"),
    Adversary("loss divided twice", additive, divided_twice, exact, "The loss is divided twice"),
    Adversary("weight that does not count", additive, weight_does_not_count, exact, "the weight does not count"),
    Adversary("0 / 0 inside the loss", accumulates, zero_by_zero, exact, "nothing to count.* 0 / 0 inside the loss"),
    Adversary("two losses pooled by +", additive, two_pooled, two_added, "adds their totals and their weights"),
    Adversary("two heads pooled by +", of_loss(tt.check_row_additive, TWO_HEADS, PLAIN), heads_pooled, heads_in_chunks,
              "adds their totals and their weights"),
    Adversary("forgotten ignore_index", pads_rows, forgotten_ignore_index, exact, "`ignore_index` or the mask"),
    Adversary("forgotten ignore_index, on ranks", spreads_padded, forgotten_ignore_index, exact, "padded with count"),
    Adversary(
        "weighted cross entropy averaged over rows",
        of_loss(tt.check_row_additive, None, PLAIN),
        weighted_by_rows,
        weighted_by_weights,
        "normalized by something of the whole batch, such as the sum of its weights",
    ),
    Adversary("tokens averaged by row", pads_masked_rows, tokens_by_row, tokens, "does not leave out what is padding"),
    Adversary("mask not in the weight", pads_positions, mask_not_in_the_weight, tokens, "in the weight, or in both"),
    Adversary("mean pooling over padding", pads_pool, pooled, pooled_with_mask, "does not leave out what is padding"),
    Adversary("BatchNorm", normalizes, by_layer(lambda: nn.BatchNorm1d(5)), by_layer(lambda: nn.LayerNorm(5)),
              "'1' normalizes by statistics of the rows"),
    Adversary("in-batch negatives", of_loss(tt.check_row_additive, None, PLAIN), contrastive, contrastive_in_the_row,
              "depends on the other rows: in-batch negatives"),
    Adversary("hard examples of the batch", spreads, hard_examples, exact, "a top-k or a sort across rows"),
    Adversary("row index as a weight", permutes, index_as_weight, field_as_weight, "a row's index plays a part"),
    Adversary("rows paired with their neighbours", permutes, paired_with_neighbour, exact, "pairs of neighbours"),
    Adversary("detach in the loss", differentiates, detached, reconstructed, "Here no gradient arrives at all"),
    Adversary("half detached", differentiates, half_detached, reconstructed, "on the way from this parameter"),
    Adversary("wrong custom backward", differentiates, with_function(WronglySquared), with_function(RightlySquared),
              "a wrong `backward` of a custom autograd function"),
]  # fmt: skip


# --- loops that are not ours --------------------------------------------------------------------------------------


def by_hand(divide: Callable[[list[torch.Tensor], list[int], int], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Gradient accumulation as it is written: one number per row, so the gradient is that of their mean."""

    def update(ranks):
        sums = [[micro.sum() for micro in rank] for rank in ranks]
        counts = [[len(micro) for micro in rank] for rank in ranks]
        return divide(sums, counts)

    return update


def by_items(sums, counts):
    return sum(itertools.chain(*sums)) / sum(itertools.chain(*counts))


def by_micro_batches(sums, counts):
    means = [s / n for s, n in zip(itertools.chain(*sums), itertools.chain(*counts), strict=True)]
    return sum(means) / len(means)


def num_items_ignored(sums, counts):
    """The trainer leaves the division to the model, which gets `num_items_in_batch` and does not look at it."""
    return sum(s / n for s, n in zip(itertools.chain(*sums), itertools.chain(*counts), strict=True))


def by_ranks(sums, counts):
    """DDP averages over ranks, whatever they hold."""
    means = [sum(s) / sum(n) for s, n in zip(sums, counts, strict=True)]
    return sum(means) / len(means)


def splits(update: Any, seed: int = 0) -> None:
    tt.check_split_invariant(update, {"x": tt.floats()}, ranks=3, seed=seed)


def of_x(divide):
    update = by_hand(divide)
    return lambda ranks: update([[micro["x"] for micro in rank] for rank in ranks])


LOOPS = [
    Adversary("loop averages micro-batches", splits, of_x(by_micro_batches), of_x(by_items), "averaged before"),
    Adversary("num_items_in_batch ignored", splits, of_x(num_items_ignored), of_x(by_items), "counted wrongly"),
    Adversary("ranks averaged alike", splits, of_x(by_ranks), of_x(by_items), "a mean of means"),
]


# --- functions ----------------------------------------------------------------------------------------------------


def equivariant(fn: Any, seed: int = 0) -> None:
    tt.check_equivariant(fn, torch.randn(4, 4, generator=generator(seed)))


def scales(fn: Any, seed: int = 0) -> None:
    tt.check_equivariant(fn, torch.randn(4, 4, generator=generator(seed)), lambda x: 3 * x)


FUNCTIONS = [
    Adversary("BatchNorm looks across rows", equivariant, by_layer(lambda: nn.BatchNorm1d(5)),
              by_layer(lambda: nn.LayerNorm(5)), "the function looks across rows"),
    Adversary("cumulative sum over rows", equivariant, lambda x: x.cumsum(0), lambda x: x.cumsum(1), "a row's place"),
    Adversary("not homogeneous", scales, lambda x: x.relu() + 1, torch.relu, "singles out what the action moves"),
]  # fmt: skip


# --- steps --------------------------------------------------------------------------------------------------------


def squares(p, b):
    return tfn.losses.mse(b["x"] @ p["w"], b["y"])


base = tfn.train_step(squares, SGD)


def rows(seed: int) -> dict[str, torch.Tensor]:
    x = torch.randn(4, 3, generator=generator(seed))
    return {"x": x, "y": x.sum(1) + 0.1 * torch.randn(4, generator=generator(seed + 1))}


def start(seed: int, optimizer: tfn.Transform = SGD) -> tfn.TrainState:
    return tfn.init({"w": torch.randn(3, generator=generator(seed + 2))}, optimizer, seed=seed)


def of_step(check: Callable[..., Any], state: Callable[[int], Any] = start, **options: Any) -> Callable[..., Any]:
    def law(step: Any, seed: int = 0) -> None:
        check(step, state(seed), rows(seed), **options)

    law.__name__ = check.__name__
    return law


def writes_state(state, batch):
    new, metrics = base(state, batch)
    state.params["w"].copy_(new.params["w"])
    return new, metrics


def writes_batch(state, batch):
    batch["x"].div_(batch["x"].norm())
    return base(state, batch)


def scales_batch(state, batch):
    return base(state, {**batch, "x": batch["x"] / batch["x"].norm()})


def numpy_in_the_step(state, batch):  # in a loss it is an error at once
    return base(state, {**batch, "x": batch["x"] * float(np.random.rand())})


def keyed_in_the_loss(p, b):
    return squares(p, {**b, "x": b["x"] * torch.rand(len(b["x"]), 1)})


def noisy(state, batch):
    new, metrics = base(state, batch)
    return new._replace(params={"w": new.params["w"] + torch.randn(3)}), metrics


def noisy_by_key(state, batch):
    new, metrics = base(state, batch)
    noise = tfn.random.normal(tfn.random.fold_in(state.key, state.step), (3,))
    return new._replace(params={"w": new.params["w"] + noise}), metrics


def reseeds(state, batch):
    random.seed(0)
    return base(state, batch)


class CountsCalls:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, state, batch):
        self.calls += 1
        return base(state, batch)


def collecting(log: list[Any]) -> Any:
    def loss(p, b):
        mean = squares(p, b)
        log.append(mean.total.detach())
        return mean

    return tfn.train_step(loss, SGD)


class CountsForwards(nn.Module):
    """A layer that remembers how often it ran; as a buffer it would be part of the state."""

    def __init__(self, as_buffer: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64)) if as_buffer else setattr(self, "seen", 0)

    def forward(self, x):
        self.seen += 1
        return x @ self.w


def module_is_pure(module: nn.Module, seed: int = 0) -> None:
    step = tfn.train_step(lambda model, b: tfn.losses.mse(model(b["x"]), b["y"]), SGD)
    tt.check_pure(step, tfn.init(module, SGD, seed=seed), rows(seed))


def dropped(p, b):
    return squares({"w": F.dropout(p["w"].expand(len(b["x"]), 3)).mean(0)}, b)


dropout = tfn.train_step(dropped, SGD)


def same_dropout_in_every_step(state, batch):
    new, metrics = dropout(state._replace(step=torch.zeros_like(state.step)), batch)
    return new._replace(step=state.step + 1), metrics


def takes_item(state, batch):
    new, metrics = base(state, batch)
    scale = min(1.0, 1.0 / metrics["loss"].value.item())
    return new._replace(params=tfn.tree.lerp(state.params, new.params, scale)), metrics


def takes_no_item(state, batch):
    new, metrics = base(state, batch)
    scale = (1.0 / metrics["loss"].value).clamp(max=1.0)
    w = state.params["w"]
    return new._replace(params={"w": w + scale * (new.params["w"] - w)}), metrics


def boolean_indexing(p, b):
    keep = b["y"] > 0
    return squares(p, {"x": b["x"][keep], "y": b["y"][keep]})


def masked(p, b):
    return tfn.Mean.of((b["x"] @ p["w"] - b["y"]) ** 2, b["y"] > 0)


def branches(state, batch):
    new, metrics = base(state, batch)
    return (new if metrics["grad_norm"].total < 100 else state._replace(step=new.step)), metrics


def selects(state, batch):
    new, metrics = base(state, batch)
    return tfn.tree.where(metrics["grad_norm"].total < 100, new, state._replace(step=new.step)), metrics


class Anneals:
    """A factor that is halved in every step, in a Python variable: another program for each."""

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, state, batch):
        self.factor *= 0.5
        new, metrics = base(state, batch)
        return new._replace(params=tfn.tree.lerp(state.params, new.params, self.factor)), metrics


def anneals(state, batch):
    new, metrics = base(state, batch)
    w = state.params["w"]
    return new._replace(params={"w": w + 0.5**new.step * (new.params["w"] - w)}), metrics


CALLS = np.zeros(1)


def reads_an_array_that_it_changes(p, b):
    CALLS[0] += 1
    return squares(p, {**b, "x": b["x"] * float(CALLS[0])})


class KeepsOldParams:
    """Adds momentum by the parameters of the step before, which a donating step has overwritten by then."""

    def __init__(self) -> None:
        self.before: Any = None

    def __call__(self, state, batch):
        new, metrics = base(state, batch)
        before = state.params["w"] if self.before is None or int(state.step) == 0 else self.before
        self.before = state.params["w"]
        return new._replace(params={"w": new.params["w"] + 0.5 * (state.params["w"] - before)}), metrics


def averaged(source: str) -> Any:
    def step(state, batch):
        new, metrics = base(state, batch)
        params = {"old": state, "new": new}[source].params
        return new._replace(extra={"ema": tfn.tree.lerp(state.extra["ema"], params, 0.1)}), metrics

    return step


def agrees_with_ema(step: Any, seed: int = 0) -> None:
    average = tfn.transforms.ema(0.9)
    tt.check_agrees(step, average(base), average.init(start(seed)), [rows(seed), rows(seed + 3), rows(seed + 6)])


def returns(change: Callable[[Any, Any], Any]) -> Any:
    def step(state, batch):
        new, metrics = base(state, batch)
        return change(new, metrics)

    return step


def widened(new, metrics):
    return new._replace(params={"w": new.params["w"].double() * 0.999}), metrics


def not_widened(new, metrics):
    return new._replace(params={"w": new.params["w"] * 0.999}), metrics


def python_number(new, metrics):
    return new._replace(step=int(new.step)), metrics


def with_a_leaf(new, metrics):
    return new._replace(extra={"best": metrics["loss"].value}), metrics


def same(new, metrics):
    return new, metrics


def divided_metric(new, metrics):
    return new, {**metrics, "loss": metrics["loss"].value}


def undivided_metric(new, metrics):
    return new, {**metrics, "half": tfn.Mean.of(metrics["loss"].value / 2)}


def forgets_to_count(state, batch):
    new, metrics = base(state, batch)
    return new._replace(step=state.step), metrics


pure, stable = of_step(tt.check_pure), of_step(tt.check_dtype_stable)
deterministic = of_step(tt.check_deterministic)
on_device = of_step(tt.check_no_host_sync)
one_graph = of_step(tt.check_single_graph)

STEPS = [
    Adversary("in-place mutation of the state", pure, writes_state, base, "writes into the state it was given"),
    Adversary("in-place mutation of the batch", pure, writes_batch, scales_batch, "writes into the batch"),
    Adversary("NumPy in the step", pure, numpy_in_the_step, tfn.train_step(keyed_in_the_loss, SGD),
              "NumPy's global generator.* draws from a global generator"),
    Adversary("NumPy in the step, by its bits", deterministic, numpy_in_the_step,
              tfn.train_step(keyed_in_the_loss, SGD), "draws from a global generator"),
    Adversary("noise from the global generator", deterministic, noisy, noisy_by_key, "draws from a global generator"),
    Adversary("reseeding", pure, reseeds, base, "Python's `random`.* or reseeds it"),
    Adversary("counter of calls", pure, CountsCalls(), base, "calls: 1 became 2.* counts or collects"),
    Adversary("losses collected in a list", pure, collecting([]), base, "a list of 1 became .* counts or collects"),
    Adversary("module counts its calls", module_is_pure, CountsForwards(False), CountsForwards(True),
              "the attributes of 'the module'.* changes the module that the state was made from"),
    Adversary("dropout not keyed by step", of_step(tt.check_keyed), same_dropout_in_every_step, dropout,
              "from `state.key` alone"),
    Adversary("item in the step", on_device, takes_item, takes_no_item, r"Tensor\.item\(\) at .*taken out of a tensor"),
    Adversary("boolean indexing", on_device, tfn.train_step(boolean_indexing, SGD), tfn.train_step(masked, SGD),
              r"index(_put)? at .* a shape depends on values \(boolean indexing"),
    Adversary("branch on a tensor", one_graph, branches, selects, "adversaries.py.*torch.where"),
    Adversary("factor in a Python variable", one_graph, Anneals(), anneals, "not a single graph.*writes step.factor"),
    Adversary("array changed in place", of_step(tt.check_eager_equals_compiled, backend="eager"),
              tfn.train_step(reads_an_array_that_it_changes, SGD), base, "frozen when the step was traced"),
    Adversary("stale donated state", of_step(tt.check_donation), KeepsOldParams(), base,
              "keeps a tensor of its state elsewhere"),
    Adversary("EMA of the wrong tree", agrees_with_ema, averaged("old"), averaged("new"), "one step behind.*old state"),
    Adversary("float64 in the step", stable, returns(widened), returns(not_widened), "float64.* widened a leaf"),
    Adversary("Python number in the state", stable, returns(python_number), returns(same), "a Python number"),
    Adversary("leaf added by the step", stable, returns(with_a_leaf), returns(same), "absent became.* leaf was added"),
    Adversary("divided metric", stable, returns(divided_metric), returns(undivided_metric),
              "'loss': is a Tensor.* a metric was divided"),
    Adversary("step that does not count", stable, forgets_to_count, base, "0 became 0.* the old one's `step`"),
]  # fmt: skip


# --- optimizers and schedules -------------------------------------------------------------------------------------

LR, DECAY = 0.1, 0.5


def random_params(seed: int) -> dict[str, torch.Tensor]:
    made = generator(seed)
    return {"layer.weight": torch.randn(3, 4, generator=made), "layer.bias": torch.randn(3, generator=made)}


def transforms(make: Any, seed: int = 0) -> None:
    """Made anew each time, since what a wrong optimizer keeps outside of its state would stay."""
    tt.check_transform(make(), random_params(seed))


def like(reference: Any) -> Callable[..., Any]:
    def law(make: Any, seed: int = 0) -> None:
        tt.check_transform(make(), random_params(seed), reference=reference, steps=4)

    law.__name__ = "check_transform"
    return law


def rule(update: Callable[[Any, Any, Any], Any], init: Callable[[Any], Any] = lambda params: {}) -> Any:
    """An optimizer by one formula for a leaf, without state of its own."""

    def whole(grads, state, params):
        return {name: update(g, state, params[name]) for name, g in grads.items()}, state

    return lambda: tfn.Transform(init, whole)


sgd = rule(lambda g, state, p: -LR * g)
normalized = rule(lambda g, state, p: -LR * g / (g.norm() + 1e-8))


def python_count() -> tfn.Transform:
    def update(grads, state, params):
        return tfn.tree.mul(grads, -LR / (state["count"] + 1)), {"count": state["count"] + 1}

    return tfn.Transform(lambda params: {"count": 0}, update)


def tensor_count() -> tfn.Transform:
    def update(grads, state, params):
        return tfn.tree.mul(grads, -LR / (state["count"] + 1)), {"count": state["count"] + 1}

    return tfn.Transform(lambda params: {"count": torch.zeros((), dtype=torch.int64)}, update)


def slow_weights(start: Callable[[Any], Any]) -> Callable[[], tfn.Transform]:
    def update(grads, state, params):
        slow = tfn.tree.lerp(state["slow"], params, 0.1)
        return tfn.tree.mul(tfn.tree.sub(slow, params), LR), {"slow": slow}

    return lambda: tfn.Transform(lambda params: {"slow": start(params)}, update)


def momentum(decay: float = 0.9) -> tfn.Transform:
    def update(grads, state, params):
        moment = tfn.tree.add(tfn.tree.mul(state, decay), grads)
        return tfn.tree.mul(moment, -LR), moment

    return tfn.Transform(tfn.tree.zeros_like, update)


def momentum_in_a_closure() -> tfn.Transform:
    moment: dict[str, Any] = {}

    def update(grads, state, params):
        for name, g in grads.items():
            moment[name] = 0.9 * moment.get(name, torch.zeros_like(g)) + g
        return tfn.tree.mul(dict(moment), -LR), state

    return tfn.Transform(lambda params: {}, update)


def widening() -> tfn.Transform:
    return rule(lambda g, state, p: -LR * g.double())()


def adam_like(corrected: bool, decay: str = "") -> Callable[[], tfn.Transform]:
    """Adam written by hand; ``decay`` is where weight decay comes in, if it does."""

    def init(params):
        zeros = tfn.tree.zeros_like
        return {"m": zeros(params), "v": zeros(params), "count": torch.zeros((), dtype=torch.int64)}

    def update(grads, state, params):
        if decay == "in the gradient":
            grads = tfn.tree.add(grads, tfn.tree.mul(params, DECAY))
        count = state["count"] + 1
        m = tfn.tree.lerp(state["m"], grads, 0.1)
        v = tfn.tree.lerp(state["v"], tfn.tree.map(torch.square, grads), 0.001)
        one, two = (1 - 0.9**count, 1 - 0.999**count) if corrected else (1.0, 1.0)
        ours = tfn.tree.map(lambda a, b: -LR * (a / one) / ((b / two).sqrt() + 1e-8), m, v)
        if decay == "first":
            ours = tfn.tree.sub(ours, tfn.tree.mul(params, LR * DECAY))
        if decay == "last":
            ours = tfn.tree.sub(tfn.tree.mul(tfn.tree.add(params, ours), 1 - LR * DECAY), params)
        return ours, {"m": m, "v": v, "count": count}

    return lambda: tfn.Transform(init, update)


def mutating() -> tfn.Transform:
    return tfn.Transform(
        lambda params: {}, lambda grads, state, params: (tfn.tree.map(lambda g: g.mul_(-LR), grads), state)
    )


like_sgd = like(lambda params: torch.optim.SGD(params, LR))
like_momentum = like(lambda params: torch.optim.SGD(params, LR, momentum=0.9))
like_adam = like(lambda params: torch.optim.Adam(params, LR))
like_adamw = like(lambda params: torch.optim.AdamW(params, LR, weight_decay=DECAY))


def of_schedule(reference: Any = None) -> Callable[..., Any]:
    def law(schedule: Any, seed: int = 0) -> None:
        tt.check_schedule(schedule, total_steps=10 + seed % 10, reference=reference)

    law.__name__ = "check_schedule"
    return law


def warm(n):
    return (torch.as_tensor(n) / 5.0).clamp(max=1.0)


def counting() -> Any:
    calls = [0]

    def schedule(n):
        calls[0] += 1
        return torch.ones(()) * 0.5 ** calls[0]

    return schedule


scheduled = of_schedule()
like_warm = of_schedule(lambda n: min(1.0, n / 5))

OPTIMIZERS = [
    Adversary("optimizer changes its arguments", transforms, mutating, sgd, "an in-place operation"),
    Adversary("optimizer counts in Python", transforms, python_count, tensor_count, "a Python number in the state"),
    Adversary("state shares the parameters' memory", transforms, slow_weights(dict), slow_weights(tfn.tree.copy),
              "a leaf starts as the parameter itself"),
    Adversary("moment kept in a closure", transforms, momentum_in_a_closure, momentum, "is kept in a Python variable"),
    Adversary("0 / 0 in the optimizer", transforms, rule(lambda g, state, p: -LR * g / g.norm()), normalized, "0 / 0"),
    Adversary("float64 in the optimizer", transforms, widening, sgd, "float64.* a leaf was widened"),
    Adversary("sign", like_sgd, rule(lambda g, state, p: LR * g), sgd, "the sign: it climbs"),
    Adversary("forgotten bias correction", like_adam, adam_like(False), adam_like(True), "bias correction is forg"),
    Adversary("weight decay in the gradient", like_adamw, adam_like(True, "in the gradient"), adam_like(True, "first"),
              "the first step points elsewhere: weight decay"),
    Adversary("weight decay after the step", like_adamw, adam_like(True, "last"), adam_like(True, "first"),
              "the first step points elsewhere: weight decay"),
    Adversary("another decay of the moment", like_momentum, lambda: momentum(0.8), momentum, "with another decay"),
    Adversary("schedule returns a Python float", scheduled, lambda n: min(1.0, float(n) / 5), warm, "a Python number"),
    Adversary("warm-up divides by 0", scheduled, lambda n: warm(n) * (n / n), warm, "a division by 0"),
    Adversary("schedule branches in Python", scheduled, lambda n: n / 5 if n < 5 else torch.ones(()), warm,
              "it branches on the step"),
    Adversary("schedule counts its calls", scheduled, counting(), warm, "it writes calls.* counts its calls"),
    Adversary("schedule a step late", like_warm, lambda n: warm((n - 1).clamp(min=0)), warm, "it runs a step late"),
    Adversary("schedule a step early", like_warm, lambda n: warm(n + 1), warm, "it runs a step early"),
    Adversary("another warm-up", like_warm, lambda n: warm(n * 2), warm, "another shape, warm-up or total"),
]  # fmt: skip


# --- runs ---------------------------------------------------------------------------------------------------------

ADAM = tfn.optim.adam(0.1)


def resumes(make_run: Any, seed: int = 0) -> None:
    tt.check_resume_bitexact(lambda: make_run(seed), steps=4)


def run_of(
    batches: Callable[[int], Any], optimizer: Callable[[], tfn.Transform] = lambda: ADAM
) -> Callable[[int], tuple[Any, Any, Any]]:
    def make_run(seed: int) -> tuple[Any, Any, Any]:
        made = optimizer()
        return tfn.train_step(squares, made), start(seed, made), batches(seed)

    return make_run


def by_step(seed: int) -> Any:
    return lambda n: rows(seed + 10 * n)


def as_a_list(seed: int) -> Any:
    return [rows(seed + 10 * n) for n in range(8)]


def skipping_one(seed: int) -> Any:
    """Goes on one batch too far: the one that was on its way when the run stopped is gone."""
    batch, late = by_step(seed), list[int]()

    def read(n: int) -> Any:
        late[:] = late or [int(n > 0)]
        return batch(n + late[0])

    return read


SHARED = torch.Generator()  # stands for the global one, which no test of ours may touch


def by_chance(seed: int) -> Any:
    return lambda n: {"x": torch.randn(4, 3, generator=SHARED), "y": torch.ones(4)}


def by_key(seed: int) -> Any:
    return lambda n: {"x": tfn.random.normal(tfn.random.fold_in(tfn.random.key(seed), n), (4, 3)), "y": torch.ones(4)}


def count_in_a_closure() -> tfn.Transform:
    count = [0]

    def update(grads, state, params):
        count[0] += 1
        return tfn.tree.mul(grads, -LR / count[0]), state

    return tfn.Transform(lambda params: {}, update)


def saved(extra: Any, seed: int = 0) -> None:
    tt.check_roundtrip(start(seed)._replace(extra={"best": extra}))


RUNS = [
    Adversary("list of batches begins anew", resumes, run_of(as_a_list), run_of(by_step), "how far an iterator ran"),
    Adversary("batches from a global generator", resumes, run_of(by_chance), run_of(by_key), "on a global generator"),
    Adversary("resume skips a batch", resumes, run_of(skipping_one), run_of(by_step),
              "step 1 saw the batch of step 2.* how far an iterator ran"),
    Adversary("moment lost", resumes, run_of(by_step, momentum_in_a_closure), run_of(by_step, momentum),
              "an average or a moment kept elsewhere"),
    Adversary("optimizer's count lost", resumes, run_of(by_step, count_in_a_closure), run_of(by_step, tensor_count),
              "a Python counter"),
    Adversary("number in a saved state", saved, 3.0, torch.tensor(3.0), "a leaf is not a tensor"),
]  # fmt: skip


# --- samplers --------------------------------------------------------------------------------------------------------


class ShuffledSampler:
    """Every row once an epoch, each epoch in another order. The mistakes change one method."""

    num_rows, batch, steps_per_epoch = 12, 4, 3

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)

    def indices(self, step):
        epoch, n = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[n * self.batch : (n + 1) * self.batch]


class RepeatsRows(ShuffledSampler):
    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).integers(0, self.num_rows, self.num_rows)


class ShuffledOnce(ShuffledSampler):
    def order(self, epoch):
        return super().order(0)


class Iterates(ShuffledSampler):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.rng = np.random.default_rng(seed)

    def order(self, epoch):
        return self.rng.permutation(self.num_rows)


class DrawsGlobally(ShuffledSampler):
    def order(self, epoch):
        return np.random.permutation(self.num_rows)


class CountsFromOne(ShuffledSampler):
    def order(self, epoch):
        return super().order(epoch) + 1


class InFloatingPoint(ShuffledSampler):
    def order(self, epoch):
        return super().order(epoch) * 1.0


class LeavesOutAPart(ShuffledSampler):
    def order(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(2 * self.batch)

    steps_per_epoch = 2


def sampled(make: Any, seed: int = 0) -> None:
    tt.check_sampler(make(seed))


SAMPLERS = [
    Adversary("sampler repeats rows", sampled, RepeatsRows, ShuffledSampler, "draws with replacement"),
    Adversary("shuffled once for all", sampled, ShuffledOnce, ShuffledSampler, "the epoch plays no part"),
    Adversary("sampler with a generator of its own", sampled, Iterates, ShuffledSampler, "an iterator in disguise"),
    Adversary("sampler from the global generator", sampled, DrawsGlobally, ShuffledSampler, "draws from a global one"),
    Adversary("rows counted from 1", sampled, CountsFromOne, ShuffledSampler, "rows are counted from 1"),
    Adversary("rows in floating point", sampled, InFloatingPoint, ShuffledSampler, "computed in floating point"),
    Adversary("rows never asked for", sampled, LeavesOutAPart, ShuffledSampler, "a part of the dataset is never"),
]

ADVERSARIES = [*LOSSES, *LOOPS, *FUNCTIONS, *STEPS, *OPTIMIZERS, *RUNS, *SAMPLERS]
