"""GaLore and LOMO: bases that are made when they are due and kept in between, and steps as small as they claim."""

import itertools
import math

import pytest
import torch

import trainfn as tfn
from tests.helpers import MLP_NET, assert_close, assert_identical, generator
from trainfn import optim, tree

GAP = 3
SHAPES = {"tall.weight": (6, 4), "wide.weight": (3, 5), "bias": (4,), "conv.weight": (2, 2, 3), "scale": ()}


def tensors(seed, dtype=torch.float32):
    return {name: torch.randn(shape, generator=generator(seed)).to(dtype) for name, shape in SHAPES.items()}


def rule(kind="std", rank=2, **options):
    return optim.galore_adamw(0.1, rank=rank, update_proj_gap=GAP, proj_type=kind, **options)


def follow(optimizer, steps, update=None, dtype=torch.float32):
    """Parameters and state after each of the steps."""
    params = tensors(99, dtype)
    state = optimizer.init(params)
    for n in range(steps):
        updates, state = (update or optimizer.update)(tensors(n, dtype), state, params)
        params = tree.add(params, updates)
        yield params, state


# ------------------------------------------------------------------------------------------------------------ the bases


@pytest.mark.parametrize("kind", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("rank", [1, 2, 100])
def test_a_projection_onto_the_gradients_own_directions(kind, rank):
    """Right after a refresh, what is projected and back is the gradient's best approximation of that rank."""
    keep = optim.galore(optim.identity(), rank=rank, update_proj_gap=GAP, scale=1.0, proj_type=kind)
    params = tensors(0)
    updates, state = keep.update(params, keep.init(params), params)
    for name, p in params.items():
        u, s, vh = torch.linalg.svd(p, full_matrices=False) if p.dim() == 2 else (None, None, None)
        best = p if u is None else u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
        torch.testing.assert_close(updates[name], best)
    assert {x.shape[1] for x in state.left.values()} | {x.shape[0] for x in state.right.values()} <= {rank, 3, 4}


@pytest.mark.parametrize(
    ("kind", "left", "right"),
    [
        ("std", {"wide.weight"}, {"tall.weight"}),
        ("reverse_std", {"tall.weight"}, {"wide.weight"}),
        ("left", {"tall.weight", "wide.weight"}, set()),
        ("right", set(), {"tall.weight", "wide.weight"}),
        ("full", {"tall.weight", "wide.weight"}, {"tall.weight", "wide.weight"}),
    ],
)
def test_which_sides_have_a_basis(kind, left, right):
    state = rule(kind).init(tensors(0))[0]
    assert (set(state.left), set(state.right)) == (left, right)


def test_moments_are_as_small_as_the_projection():
    params = {"w": torch.ones(64, 8)}
    state = optim.galore_adamw(0.1, rank=2).init(params)[0]
    assert (state.right["w"].shape, state.inner.mu["w"].shape) == ((2, 8), (64, 2))
    assert state.inner.nu["w"].shape == (64, 2)


@pytest.mark.parametrize("kind", ["std", "full"])
def test_bases_change_when_they_are_due_and_only_then(kind):
    bases = [tree.leaves((state[0].left, state[0].right)) for _, state in follow(rule(kind), 3 * GAP)]
    changed = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(bases)]
    assert changed == [(n + 1) % GAP == 0 for n in range(len(changed))]


# ------------------------------------------------------------------------------------------------------- the whole step

NET, MATRICES = MLP_NET, 2
DATA = NET.batch(12)


def train(optimizer, steps=2 * GAP, state=None, accumulate=1, wrap=lambda step: step, **options):
    step = tfn.jit(wrap(tfn.train_step(NET.loss, optimizer, accumulate=accumulate)), **{"compile": False, **options})
    state = tfn.init(NET.module(0.0), optimizer, seed=0) if state is None else state
    for _ in range(steps):
        state, _ = step(state, DATA)
    return state


def decompositions(run):
    """How often one is computed, in compiled code too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::_linalg_svd")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_that_decomposes_only_when_it_is_due(backend):
    optimizer = optim.chain(optim.clip_by_global_norm(0.1), rule(weight_decay=0.1))
    step = tfn.jit(tfn.train_step(NET.loss, optimizer), backend=backend, donate=True, max_graphs=1)
    states = [tfn.init(NET.module(0.0), optimizer, seed=0)]
    counts = [decompositions(lambda: states.append(step(states.pop(), DATA)[0])) for _ in range(2 * GAP)]
    assert counts[1:] == [0, 0, MATRICES, 0, 0]  # the first call compiles as well
    assert (step.explain().graphs, step.explain().breaks) == (1, 0)
    assert_close(states[0].params, train(optimizer).params, 1e-5)


@pytest.mark.parametrize("optimizer", [rule(align=True), rule(), optim.lomo(0.1), optim.adalomo(0.1)])
def test_accumulation_and_clipping_are_those_of_any_optimizer(optimizer):
    optimizer = optim.chain(optim.clip_by_global_norm(0.1), optimizer)
    assert_close(train(optimizer, accumulate=3).params, train(optimizer).params, 1e-5)


@pytest.mark.parametrize("stop", [1, GAP - 1, GAP, GAP + 1])
def test_a_run_resumes_bit_for_bit_across_a_refresh(stop, tmp_path):
    optimizer, total = rule("full", align=True), 2 * GAP + 1
    tfn.save(tmp_path / "state", train(optimizer, stop))
    fresh = tfn.init(NET.module(0.0), optimizer, seed=5)
    assert_identical(
        train(optimizer, total - stop, tfn.restore(tmp_path / "state", like=fresh)), train(optimizer, total)
    )


def test_a_gradient_that_is_nan_is_no_error_of_the_decomposition():
    params = tensors(0)
    bad = {**params, "tall.weight": torch.full((6, 4), math.nan)}
    updates, _ = rule().update(bad, rule().init(params), params)
    assert updates["tall.weight"].isnan().all() and updates["wide.weight"].isfinite().all()


def test_a_skipped_step_leaves_the_bases_as_they_were():
    optimizer = rule()
    step = tfn.jit(tfn.transforms.skip_nonfinite()(tfn.train_step(NET.loss, optimizer)), compile=False)
    state, _ = step(tfn.init(NET.module(0.0), optimizer, seed=0), {**DATA, "x": DATA["x"] * math.inf})
    assert not any(x.any() for x in tree.leaves(state.opt_state))


# ------------------------------------------------------------------------------------------------------------ the signs


def turned(monkeypatch, seed):
    """Decompositions with other signs, which are as good."""
    svd, draw = torch.linalg.svd, generator(seed)

    def other(matrix, full_matrices):
        u, s, vh = svd(matrix, full_matrices=full_matrices)
        signs = torch.randint(2, s.shape, generator=draw) * 2.0 - 1.0
        return u * signs, s, vh * signs.unsqueeze(-1)

    monkeypatch.setattr(torch.linalg, "svd", other)


@pytest.mark.parametrize("kind", ["std", "full"])
def test_aligned_bases_make_the_signs_of_a_decomposition_irrelevant(kind, monkeypatch):
    """What the first basis is turned to, the next ones follow."""
    expected = [params for params, _ in follow(rule(kind, align=True), 3 * GAP)]
    plain = [params for params, _ in follow(rule(kind), 3 * GAP)]
    turned(monkeypatch, 3)
    for (params, _), wanted in zip(follow(rule(kind, align=True), 3 * GAP), expected, strict=True):
        assert_close(params, wanted)
    others = [params for params, _ in follow(rule(kind), 3 * GAP)]
    assert_close(others[GAP - 1], plain[GAP - 1])
    assert not torch.allclose(others[-1]["tall.weight"], plain[-1]["tall.weight"], atol=1e-3)


def test_without_a_first_moment_there_is_nothing_to_align(monkeypatch):
    optimizer = optim.galore_adafactor(0.1, rank=2, update_proj_gap=GAP)
    expected = [params for params, _ in follow(optimizer, 2 * GAP)]
    turned(monkeypatch, 3)
    for (params, _), wanted in zip(follow(optimizer, 2 * GAP), expected, strict=True):
        assert_close(params, wanted)


# ------------------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("targets", ["tall", lambda name, p: "tall" in name, {n: "tall" in n for n in SHAPES}])
def test_the_others_are_optimized_as_if_there_were_no_projection(targets):
    kept = {"wide.weight", "bias", "conv.weight", "scale"}
    chosen = [params for params, _ in follow(rule(targets=targets), GAP)][-1]
    nothing = [params for params, _ in follow(rule(targets=lambda name, p: False), GAP)][-1]
    everything = [params for params, _ in follow(rule(), GAP)][-1]
    assert {name for name in SHAPES if torch.equal(chosen[name], nothing[name])} == kept
    assert torch.equal(chosen["tall.weight"], everything["tall.weight"])
    assert rule(targets=targets).init(tensors(0))[0].right.keys() == {"tall.weight"}


def test_what_decays_is_chosen_apart():
    params, zeros = tensors(0), tree.zeros_like(tensors(0))
    optimizer = rule(weight_decay=0.5, mask="weight", targets="tall")
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for name, u in updates.items():
        torch.testing.assert_close(u, params[name] * (-0.05 if "weight" in name else 0.0))


@pytest.mark.parametrize("optimizer", [rule(), optim.galore_adafactor(0.1, rank=2, update_proj_gap=GAP)])
def test_bfloat16_is_float32_roughly(optimizer):
    low = [params for params, _ in follow(optimizer, 1, dtype=torch.bfloat16)][-1]
    high = [params for params, _ in follow(optimizer, 1)][-1]
    assert {x.dtype for x in low.values()} == {torch.bfloat16}
    for name, x in low.items():
        torch.testing.assert_close(x.float(), high[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.galore(optim.identity(), rank=0), r"`galore\(rank=0\)` can't work: it must be above 0"),
        (lambda: optim.galore(optim.identity(), update_proj_gap=-1), r"update_proj_gap=-1.*update_proj_gap=1"),
        (lambda: optim.galore(optim.identity(), scale=-0.1), r"`galore\(scale=-0.1\)`.*0 or more"),
        (lambda: rule("both"), r"`galore\(proj_type='both'\)` can't work.*\['std', 'reverse_std', 'left'"),
        (lambda: optim.galore_adamw(-1.0), r"`galore_adamw\(learning_rate=-1.0\)`"),
        (lambda: optim.galore_adamw(0.1, b2=1.0), r"`galore_adamw\(b2=1.0\)`"),
        (lambda: optim.galore_adafactor(0.1, b1=2.0), r"`galore_adafactor\(b1=2.0\)`"),
        (
            lambda: rule(targets="bias").init(tensors(0)),
            r"'bias' among its targets has the shape \[4\].*p.dim\(\) == 2",
        ),
        (lambda: rule(targets="attn").init(tensors(0)), r"`galore\(targets='attn'\)`.*none of the 5 parameter names"),
        (lambda: optim.lomo(-0.1), r"`lomo\(learning_rate=-0.1\)`"),
        (lambda: optim.lomo(0.1, clip_grad_norm=0.0), r"`lomo\(clip_grad_norm=0.0\)`.*above 0"),
        (lambda: optim.adalomo(0.1, clip_grad_value=-1.0), r"`adalomo\(clip_grad_value=-1.0\)`.*above 0"),
        (lambda: optim.adalomo(0.1, eps=-1.0), r"`adalomo\(eps=-1.0\)`"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------------------------------------- LOMO


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lomo_rounds_once(dtype):
    """Its parameters are those of float32 arithmetic, rounded: a step made in bfloat16 would round twice."""
    params, grads = ({"w": torch.randn(4096, generator=generator(n)).to(dtype)} for n in (0, 1))
    optimizer = optim.lomo(1e-3, weight_decay=0.1)
    new = tree.add(params, optimizer.update(grads, optimizer.init(params), params)[0])
    p, g = params["w"].float(), grads["w"].float()
    exact = (p * (1 - 1e-3 * 0.1) - 1e-3 * g).to(dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(new["w"], exact)
    else:
        assert (new["w"] == exact).float().mean() > 0.999  # all but those that the step makes many times smaller


@pytest.mark.parametrize("norm", [None, 1.0])
@pytest.mark.parametrize("value", [None, 0.5])
def test_both_bounds_look_at_the_gradients_as_they_come(norm, value):
    optimizer = optim.lomo(1.0, clip_grad_norm=norm, clip_grad_value=value)
    g = {"w": torch.tensor([3.0, 4.0, 0.1])}
    factor = 1.0 if norm is None else 1.0 / (float(g["w"].norm()) + 1e-6)
    expected = (g["w"] if value is None else g["w"].clamp(-0.5, 0.5)) * -factor
    torch.testing.assert_close(optimizer.update(g, optimizer.init(g), tree.zeros_like(g))[0]["w"], expected)


def test_adalomo_is_adafactor():
    ours, theirs = follow(optim.adalomo(0.1, weight_decay=0.1), 5), follow(optim.adafactor(0.1, weight_decay=0.1), 5)
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        assert_identical(a, b)
    assert not tree.leaves(optim.lomo(0.1).init(tensors(0)))  # LOMO has no state at all
