"""Every loss is a row of LOSSES and obeys every law below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trainfn as tfn
import trainfn.testing as tt
from tests.helpers import quick
from trainfn import losses
from trainfn._types import Mean

Case = dict[str, Tensor]
TIME, CLASSES, DIM = 3, 5, 4


class Row(NamedTuple):
    """A loss as a function of shared tensors (differentiated), rows (``x`` differentiated), and weights."""

    make: Callable[[torch.Generator, int], tuple[Case, Case]]
    loss: Callable[..., Mean]  # (shared, rows, **weights) -> Mean
    reference: Callable[[Case, Case], Tensor]  # the value, by torch
    weights: tuple[int, ...] | None = ()  # their shape beyond the row; None: the loss takes none
    additive: bool = True


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=g, dtype=torch.float64)


def labels(g: torch.Generator, *shape: int) -> Tensor:
    """Class indices, some of them ignored but not the first."""
    y = torch.randint(0, CLASSES, shape, generator=g)
    y = torch.where(torch.rand(shape, generator=g) < 0.3, -100, y)
    y.view(-1)[:2] = 1  # the second, too: the first token of a row is never predicted
    return y


def indices(g: torch.Generator, n: int) -> tuple[Case, Case]:
    shared = {"cw": torch.rand(CLASSES, generator=g, dtype=torch.float64) + 0.1}
    return shared, {"x": randn(g, n, TIME, CLASSES), "y": labels(g, n, TIME)}


def probabilities(g: torch.Generator, n: int) -> tuple[Case, Case]:
    shared, rows = indices(g, n)
    return shared, {"x": rows["x"], "y": randn(g, n, TIME, CLASSES).softmax(-1)}


def regression(g: torch.Generator, n: int) -> tuple[Case, Case]:
    return {}, {"x": randn(g, n, DIM), "y": randn(g, n, DIM)}


def binary(g: torch.Generator, n: int) -> tuple[Case, Case]:
    rows = {"x": randn(g, n, DIM), "y": torch.rand(n, DIM, generator=g, dtype=torch.float64)}
    return {"pw": torch.rand(DIM, generator=g, dtype=torch.float64) * 3}, rows


def linear(g: torch.Generator, n: int) -> tuple[Case, Case]:
    shared = {"weight": randn(g, CLASSES, DIM), "bias": randn(g, CLASSES)}
    return shared, {"x": randn(g, n, TIME, DIM), "y": labels(g, n, TIME)}


def pairs(g: torch.Generator, n: int) -> tuple[Case, Case]:
    rows = {"x": randn(g, n, DIM), "y": randn(g, n, DIM), "own": randn(g, n, 6, DIM)}
    return {"others": randn(g, 6, DIM)}, rows


def cross_entropy(weighted: bool = False, **options: float) -> dict[str, Callable[..., Mean]]:
    """`losses.cross_entropy` and torch's, which has the classes second."""

    def loss(shared: Case, rows: Case, **kw: Tensor) -> Mean:
        cw = shared["cw"].detach() if weighted else None
        return losses.cross_entropy(rows["x"], rows["y"], class_weights=cw, **options, **kw)

    def reference(shared: Case, rows: Case) -> Tensor:
        cw = shared["cw"].detach() if weighted else None
        y = rows["y"].movedim(-1, 1) if rows["y"].is_floating_point() else rows["y"]
        return F.cross_entropy(rows["x"].movedim(-1, 1), y, weight=cw, **options)

    return {"loss": loss, "reference": reference}


def elementwise(name: str, torch_name: str, **options: float) -> dict[str, Callable[..., Mean]]:
    return {
        "loss": lambda s, r, **kw: getattr(losses, name)(r["x"], r["y"], **options, **kw),
        "reference": lambda s, r: getattr(F, torch_name)(r["x"], r["y"], **options),
    }


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def nce_reference(shared: Case, rows: Case) -> Tensor:
    s = unit(rows["x"]) @ unit(rows["y"]).T / 0.5
    return -(s.diag() - s.logsumexp(1)).mean()


def nce_symmetric(shared: Case, rows: Case) -> Tensor:
    return (nce_reference({}, rows) + nce_reference({}, {"x": rows["y"], "y": rows["x"]})) / 2


def nce_negatives(shared: Case, rows: Case, negatives: Tensor) -> Tensor:
    q, k, o = unit(rows["x"]), unit(rows["y"]), unit(negatives)
    own, others = (q * k).sum(-1) / 0.5, (q[:, None] * o).sum(-1) / 0.5
    return -(own - torch.logaddexp(own, others.logsumexp(1))).mean()


def next_token_reference(shared: Case, rows: Case) -> Tensor:
    x, y = rows["x"][:, :-1].flatten(0, 1), rows["y"][:, 1:].flatten()
    return F.cross_entropy(x, y, label_smoothing=0.1)


def linear_reference(shared: Case, rows: Case, **options: float) -> Tensor:
    logits = rows["x"] @ shared["weight"].T + shared["bias"]
    return F.cross_entropy(logits.flatten(0, 1), rows["y"].flatten(), **options)


def linear_loss(shared: Case, rows: Case, label_smoothing: float = 0.0, **kw: Tensor) -> Mean:
    options = {"bias": shared["bias"], "chunk_size": 4, "label_smoothing": label_smoothing}
    return losses.linear_cross_entropy(rows["x"], shared["weight"], rows["y"], **options, **kw)


def bce_reference(shared: Case, rows: Case) -> Tensor:
    y = rows["y"] * 0.9 + 0.05
    return F.binary_cross_entropy_with_logits(rows["x"], y, pos_weight=shared["pw"].detach())


def bce(shared: Case, rows: Case, **kw: Tensor) -> Mean:
    pos_weight = shared["pw"].detach()
    return losses.binary_cross_entropy(rows["x"], rows["y"], pos_weight=pos_weight, label_smoothing=0.1, **kw)


def kl_reference(shared: Case, rows: Case) -> Tensor:
    x, y = rows["x"].flatten(0, 1), rows["y"].flatten(0, 1)
    return F.kl_div(x.log_softmax(-1), y, reduction="batchmean")


def nce(symmetric: bool = False) -> Callable[..., Mean]:
    return lambda s, r: losses.info_nce(r["x"], r["y"], temperature=0.5, symmetric=symmetric)


PLAIN, SOFT, T = indices, probabilities, (TIME,)
LOSSES: dict[str, Row] = {
    "cross_entropy": Row(PLAIN, **cross_entropy(), weights=T),
    "cross_entropy-smooth": Row(PLAIN, **cross_entropy(label_smoothing=0.3), weights=T),
    "cross_entropy-classes": Row(PLAIN, **cross_entropy(True), weights=T),
    "cross_entropy-both": Row(PLAIN, **cross_entropy(True, label_smoothing=0.3), weights=T),
    "cross_entropy-soft": Row(SOFT, **cross_entropy(), weights=T),
    "cross_entropy-soft-both": Row(SOFT, **cross_entropy(True, label_smoothing=0.3), weights=T),
    "next_token": Row(
        PLAIN,
        lambda s, r, **kw: losses.next_token(r["x"], r["y"], label_smoothing=0.1, **kw),
        next_token_reference,
        weights=None,  # they move with the tokens; see test_next_token_weights
    ),
    "linear_cross_entropy": Row(linear, linear_loss, linear_reference, T),
    "linear_cross_entropy-smooth": Row(
        linear,
        lambda s, r, **kw: linear_loss(s, r, label_smoothing=0.3, **kw),
        lambda s, r: linear_reference(s, r, label_smoothing=0.3),
        T,
    ),
    "kl": Row(SOFT, lambda s, r, **kw: losses.kl(r["x"], r["y"], **kw), kl_reference, T),
    "binary_cross_entropy": Row(binary, bce, bce_reference, (DIM,)),
    "binary_cross_entropy-plain": Row(
        binary, **elementwise("binary_cross_entropy", "binary_cross_entropy_with_logits"), weights=(DIM,)
    ),
    "mse": Row(regression, **elementwise("mse", "mse_loss"), weights=(DIM,)),
    "mae": Row(regression, **elementwise("mae", "l1_loss"), weights=(DIM,)),
    "huber": Row(regression, **elementwise("huber", "huber_loss", delta=0.7), weights=(DIM,)),
    "info_nce": Row(pairs, nce(), nce_reference, None, additive=False),
    "info_nce-symmetric": Row(pairs, nce(symmetric=True), nce_symmetric, None, additive=False),
    "info_nce-shared": Row(
        pairs,
        lambda s, r: losses.info_nce(r["x"], r["y"], temperature=0.5, negatives=s["others"]),
        lambda s, r: nce_negatives(s, r, s["others"]),
        None,
    ),
    "info_nce-own": Row(
        pairs,
        lambda s, r: losses.info_nce(r["x"], r["y"], temperature=0.5, negatives=r["own"]),
        lambda s, r: nce_negatives(s, r, r["own"]),
        None,
    ),
}
EVERY = pytest.mark.parametrize("row", LOSSES.values(), ids=LOSSES)
ADDITIVE = {name: row for name, row in LOSSES.items() if row.additive}
COUPLED = {name: row for name, row in LOSSES.items() if not row.additive}
WEIGHTED = {name: row for name, row in LOSSES.items() if row.weights is not None}

seeds, sizes = st.integers(0, 2**31 - 1), st.integers(2, 7)
some = settings(max_examples=25, deadline=None)


def make(row: Row, seed: int, n: int, dtype: torch.dtype = torch.float64) -> tuple[Case, Case]:
    cast = {torch.float64: dtype}
    cases = row.make(torch.Generator().manual_seed(seed), n)
    shared, rows = ({k: v.to(cast.get(v.dtype, v.dtype)) for k, v in case.items()} for case in cases)
    return shared, rows


def draw_weights(row: Row, seed: int, n: int) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    assert row.weights is not None
    return torch.randint(0, 4, (n, *row.weights), generator=g)


def grads(fn: Callable[[Case, Case], Tensor], shared: Case, rows: Case) -> tuple[Tensor, Case]:
    """A scalar and its gradients by the shared tensors and ``x``; zero where it doesn't depend on them."""
    shared = {k: v.detach().requires_grad_() for k, v in shared.items()}
    rows = {**rows, "x": rows["x"].detach().requires_grad_()}
    out = fn(shared, rows)
    inputs = {**shared, "x": rows["x"]}
    found = torch.autograd.grad(out, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return out.detach(), dict(zip(inputs, found, strict=True))


def total(row: Row, **weights: Tensor) -> Callable[[Case, Case], Tensor]:
    return lambda shared, rows: row.loss(shared, rows, **weights).total


def assert_close(a: object, b: object, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@EVERY
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 2e-7), (torch.float32, 2e-5)], ids=["f64", "f32"])
@some
@given(seed=seeds, n=sizes)
def test_matches_torch(row: Row, dtype: torch.dtype, tol: float, seed: int, n: int) -> None:
    # In float64 too the weight is a float32, which limits the value when class weights are summed.
    shared, rows = make(row, seed, n, dtype)
    ours = grads(lambda s, r: row.loss(s, r).value, shared, rows)
    assert_close(ours, grads(row.reference, shared, rows), tol)
    mean = row.loss(shared, rows)
    assert mean.total.dtype == dtype and mean.weight.dtype == torch.float32
    assert mean.total.shape == mean.weight.shape == ()


def subject(row: Row, dtype: torch.dtype = torch.float64) -> tuple[Callable[..., Mean], Case, Case]:
    """The row as a loss of a model: the shared tensors and a factor of ``x`` learn. With a batch to draw rows from."""
    shared, rows = make(row, 0, 8, dtype)
    learned = {k: v for k, v in shared.items() if k not in ("cw", "pw")}  # weights are constants

    def loss(p: Case, batch: Case) -> Mean:
        return row.loss({**shared, **{k: p[k] for k in learned}}, {**batch, "x": batch["x"] * p["factor"]})

    return loss, {**learned, "factor": torch.ones((), dtype=dtype)}, rows


LAWS = {
    "additive": tt.check_row_additive,
    "accumulation": tt.check_accumulation_invariant,
    "ranks": tt.check_rank_invariant,
    "order": tt.check_permutation_invariant,
    "slope": tt.check_gradients,
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("row", ADDITIVE.values(), ids=ADDITIVE)
def test_laws(row: Row, law: Callable[..., None]) -> None:
    law(*subject(row), tolerance=1e-3 if law is tt.check_gradients else 1e-6)


@pytest.mark.parametrize("name", [n for n in ADDITIVE if LOSSES[n].make in (indices, linear)])
def test_padding_counts_for_nothing(name: str) -> None:
    tt.check_padding_invariant(*subject(LOSSES[name]), tolerance=1e-6)


@pytest.mark.parametrize("law", [tt.check_permutation_invariant, tt.check_gradients])
@pytest.mark.parametrize("row", COUPLED.values(), ids=COUPLED)
def test_coupled_rows_keep_the_other_laws(row: Row, law: Callable[..., None]) -> None:
    loss, params, rows = subject(row)
    law(loss, params, tt.batches(rows, rows=(2, 6)))
    with pytest.raises(tt.LawViolation, match=r"in-batch negatives"):
        tt.check_row_additive(loss, params, rows)


def take(rows: Case, index: Tensor) -> Case:
    return {k: v[index] for k, v in rows.items()}


@pytest.mark.parametrize("row", WEIGHTED.values(), ids=WEIGHTED)
@some
@given(seed=seeds, n=sizes)
def test_weights_are_repetitions(row: Row, seed: int, n: int) -> None:
    """A weight of k is the same as k copies, and of 0 as leaving it out."""
    shared, rows = make(row, seed, n)
    weights = draw_weights(row, seed, n)
    flat = {k: v.flatten(0, len(row.weights or ())) for k, v in rows.items()}
    if row.make is binary:  # what is repeated is an element, and pos_weight would no longer line up
        shared = {k: torch.ones(()) for k in shared}
    copies = {k: v.repeat_interleave(weights.flatten(), 0) for k, v in flat.items()}
    assert_close(tuple(row.loss(shared, rows, weights=weights)), tuple(row.loss(shared, copies)), 1e-6)
    mask = weights > 1
    kept = {k: v[mask.flatten()] for k, v in flat.items()}
    assert_close(tuple(row.loss(shared, rows, weights=mask)), tuple(row.loss(shared, kept)), 1e-6)


@pytest.mark.parametrize("row", WEIGHTED.values(), ids=WEIGHTED)
def test_masked_batch_is_nothing(row: Row) -> None:
    shared, rows = make(row, 0, 4)
    nothing = torch.zeros_like(draw_weights(row, 0, 4), dtype=torch.bool)
    mean = row.loss(shared, rows, weights=nothing)
    assert mean.total == 0 and mean.weight == 0
    assert all((g == 0).all() for g in grads(total(row, weights=nothing), shared, rows)[1].values())


@pytest.mark.parametrize("name", [n for n in LOSSES if LOSSES[n].make in (indices, linear)])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_ignored_batch_is_nothing(name: str, ignore_index: int) -> None:
    row = LOSSES[name]
    shared, rows = make(row, 0, 4)
    rows = {**rows, "y": torch.full_like(rows["y"], ignore_index)}
    kw = {"ignore_index": ignore_index} if ignore_index != -100 else {}
    mean = row.loss(shared, rows, **kw)
    assert mean.total == 0 and mean.weight == 0
    found = grads(lambda s, r: row.loss(s, r, **kw).total, shared, rows)[1]
    assert all((g == 0).all() for g in found.values())


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_sum_in_32(row: Row, dtype: torch.dtype) -> None:
    shared, rows = make(row, 0, 6, dtype)
    mean = row.loss(shared, rows)
    assert mean.total.dtype == mean.weight.dtype == torch.float32
    exact = row.loss(*({k: v.float() if v.is_floating_point() else v for k, v in c.items()} for c in (shared, rows)))
    tol = 2e-2 if row.make is linear else 1e-5  # its logits are rounded to 16 bits, as any layer's output
    assert_close(mean.total, exact.total, tol)
    found = grads(total(row), shared, rows)[1]
    assert all(g.dtype == dtype and g.isfinite().all() for g in found.values())


@EVERY
@pytest.mark.parametrize("sign", [1e4, -1e4])
def test_extreme_outputs_are_finite(row: Row, sign: float) -> None:
    shared, rows = make(row, 0, 6, torch.float32)
    rows = {**rows, "x": torch.where(rows["x"] > 0, sign, -sign)}
    out, found = grads(total(row), shared, rows)
    assert out.isfinite() and all(g.isfinite().all() for g in found.values())


@EVERY
def test_compiled_is_eager_and_compiles_once(row: Row) -> None:
    """The loss and its gradient in one graph, the backward pass inside it."""

    def step(shared: Case, rows: Case, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Case]:
        with torch.enable_grad():
            out, found = grads(total(row, **weights), shared, rows)
        return out, row.loss(shared, rows, **weights).weight, found

    weights = {} if row.weights is None else {"weights": draw_weights(row, 0, 5)}
    compiled = quick(lambda case, weights: step(*case, weights))
    for seed in (0, 1):
        case = make(row, seed, 5, torch.float32)
        assert_close(compiled(case, weights), step(*case, weights), 1e-6)
    assert (compiled.explain().graphs, compiled.explain().traces) == (1, 1)


@pytest.mark.parametrize("how", ["number", "stream", "compiled"])
def test_in_batch_negatives_of_a_split_batch_are_a_warning(how: str) -> None:
    def loss(p: Any, b: Any) -> Mean:
        return tfn.losses.info_nce(b * p["w"], b, temperature=0.5)

    sgd, b = tfn.optim.sgd(0.1), torch.eye(4)
    state = tfn.init({"w": torch.ones(4)}, sgd)
    step = tfn.train_step(loss, sgd, accumulate="stream" if how == "stream" else 2)
    step = tfn.jit(step, backend="eager") if how == "compiled" else step
    tfn.train_step(loss, sgd)(state, b)  # a whole batch is no reason to warn
    with pytest.warns(tfn.errors.SplitWarning, match=r"sees 2 rows of a batch that is split.*`negatives=`"):
        step(state, list(b.chunk(2)) if how == "stream" else b)
