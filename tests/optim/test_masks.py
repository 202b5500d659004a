"""Masks, labels, clipping, and what a wrong argument is told."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trainfn as tfn
from trainfn import optim, tree

NAMES = st.lists(st.from_regex(r"[a-c]{1,3}\.(weight|bias)", fullmatch=True), unique=True, min_size=1, max_size=6)


def ones(*names):
    return {name: torch.ones(2) for name in names}


PARAMS = ones("fc.weight", "fc.bias", "ln1.weight", "lm_head.weight")


@given(NAMES, st.data())
@settings(deadline=None)
def test_masked_touches_the_selected_and_keeps_state_for_them_only(names, data):
    chosen = set(data.draw(st.lists(st.sampled_from(names), unique=True)))
    params = ones(*names)
    rule = optim.masked(optim.chain(optim.trace(0.5), optim.scale(3.0)), {n: n in chosen for n in names})
    updates, state = rule.update(params, rule.init(params), params)
    assert {name for name, u in updates.items() if u[0] == 3.0} == chosen
    assert list(updates) == names
    assert set(state.inner[0].trace) == chosen


@given(NAMES, st.data())
@settings(deadline=None)
def test_partition_is_each_rule_on_its_own_group(names, data):
    labels = {name: data.draw(st.sampled_from("ab")) for name in names}
    params = ones(*names)
    rules = {"a": optim.sgd(0.1, momentum=0.9), "b": optim.adamw(0.1)}
    rule = optim.partition(rules, labels)
    updates, state = rule.update(params, rule.init(params), params)
    for label, alone in rules.items():
        group = {name: p for name, p in params.items() if labels[name] == label}
        expected, inner = alone.update(group, alone.init(group), group)
        assert all(torch.equal(updates[name], u) for name, u in expected.items())
        assert tree.named_leaves(state.inner[label]).keys() == tree.named_leaves(inner).keys()


@pytest.mark.parametrize(
    ("mask", "selected"),
    [
        ("bias", {"fc.bias"}),
        (r"^(fc|lm_head)\.", {"fc.weight", "fc.bias", "lm_head.weight"}),
        (lambda name, p: name.startswith("ln"), {"ln1.weight"}),
        (None, set(PARAMS)),
    ],
)
def test_the_forms_of_a_mask(mask, selected):
    rule = optim.masked(optim.scale(0.0), mask)
    updates, _ = rule.update(PARAMS, rule.init(PARAMS), PARAMS)
    assert {name for name, u in updates.items() if u[0] == 0} == selected


def test_the_first_pattern_counts():
    rule = optim.partition(
        {"x": optim.scale(0.0), "y": optim.scale(2.0), "z": optim.identity()},
        [("fc.bias", "x"), ("fc", "y")],
        default="z",
    )
    updates, _ = rule.update(PARAMS, rule.init(PARAMS), PARAMS)
    assert [u[0].item() for u in updates.values()] == [2.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "shape", "decays"),
    [
        ("fc.weight", (2, 2), True),
        ("wte.weight", (2, 2), True),
        ("bert.embeddings.LayerNorm.weight", (2,), False),
        ("model.layers.0.input_layernorm.weight", (2,), False),
        ("blocks.0.ln1.weight", (2, 2), False),
        ("h.0.ln_f.weight", (2, 2), False),
        ("model.norm.weight", (2, 2), False),
        ("block.norm1.weight", (2, 2), False),
        ("q_norm.weight", (2, 2), False),
        ("attn.in_proj_bias", (2, 2), False),
        ("bn1.weight", (2, 2), False),
        ("temperature", (), False),
        ("normalizer_free.weight", (2, 2), True),
        ("kiln.weight", (2, 2), True),
    ],
)
def test_decay_mask(name, shape, decays):
    assert optim.decay_mask(name, torch.zeros(shape)) is decays


@pytest.mark.parametrize(
    ("name", "shape", "label"),
    [
        ("transformer.h.0.attn.c_attn.weight", (2, 2), "muon"),
        ("encoder.layer.0.multihead_attn.weight", (2, 2), "muon"),
        ("blocks.0.compose.weight", (2, 2), "muon"),
        ("transformer.wte.weight", (2, 2), "adamw"),
        ("model.embed_tokens.weight", (2, 2), "adamw"),
        ("bert.embeddings.word_embeddings.weight", (2, 2), "adamw"),
        ("tok_emb.weight", (2, 2), "adamw"),
        ("pos_embed", (2, 2), "adamw"),
        ("lm_head.weight", (2, 2), "adamw"),
        ("head.weight", (2, 2), "adamw"),
        ("classifier.weight", (2, 2), "adamw"),
        ("fc.bias", (2,), "adamw"),
        ("conv.weight", (2, 2, 3), "adamw"),
    ],
)
def test_muon_labels(name, shape, label):
    assert optim.muon_labels(name, torch.zeros(shape)) == label


def test_muon_labels_and_others_can_be_replaced():
    rule = optim.muon(0.1, labels=[("fc.weight", "muon"), ("", "adamw")], others=optim.scale(0.0))
    params = {name: torch.eye(2) for name in PARAMS}
    updates, _ = rule.update(params, rule.init(params), params)
    assert {name for name, u in updates.items() if u.abs().sum() > 0} == {"fc.weight"}


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clip_by_global_norm_is_torchs(max_norm):
    torch.manual_seed(0)
    grads = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.randn(())}
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for p, g in zip(theirs, grads.values(), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    ours, _ = optim.clip_by_global_norm(max_norm).update(grads, None, {})
    assert all(torch.equal(u, p.grad) for u, p in zip(ours.values(), theirs, strict=True))


@given(st.floats(0.01, 10.0), st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8))
@settings(deadline=None)
def test_bounds_hold(bound, numbers):
    updates = {"w": torch.tensor(numbers)}
    for clip, size in (
        (optim.clip_by_global_norm, lambda u: u.norm()),
        (optim.clip_by_value, lambda u: u.abs().max()),
        (optim.clip_by_block_rms, lambda u: u.square().mean().sqrt()),
    ):
        for limit in (bound, torch.tensor(bound)):
            assert size(clip(limit).update(updates, None, {})[0]["w"]) <= bound * (1 + 1e-5)


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in [(8, 8), (4, 16), (16, 4)]:
        values = torch.linalg.svdvals(optim.orthogonalize(torch.randn(shape)).float())
        assert 0.3 < values.min() <= values.max() < 1.4


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            optim.masked(optim.identity(), "fc.wieght"),
            r"`masked\(mask='fc.wieght'\)`.*none of the 4 parameter names.*nearest names are 'fc.weight'",
        ),
        (
            optim.adamw(0.1, mask="zzz"),
            r"mask='zzz'.*nearest names are 'fc.weight'.*Write a regular expression",
        ),
        (optim.masked(optim.identity(), {"fc.bias": True}), r"says nothing about 'fc.weight', 'ln1.weight'"),
        (optim.partition({"a": optim.identity()}, [("xyz", "a")], default="a"), "labels='xyz'.*nearest"),
        (optim.partition({"a": optim.identity()}, [("fc", "a")]), "2 of 4.*'ln1.weight'.*default=<label>"),
        (optim.partition({"a": optim.identity()}, {"fc.bias": "a"}), "says nothing about 'fc.weight'"),
        (
            optim.partition({"a": optim.identity()}, lambda n, p: "b"),
            r"label 'b'.*only for \['a'\].*'b': <a tr",
        ),
        (optim.scale_by_muon(), r"'fc.weight' has the shape \[2\].*`muon\(learning_rate\)`"),
    ],
)
def test_mistakes_in_names_are_explained(rule, message):
    with pytest.raises(ValueError, match=message):
        rule.init(PARAMS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.sgd(-0.1), r"`sgd\(learning_rate=-0.1\)` can't work.*`sgd\(learning_rate=0.1\)`"),
        (lambda: optim.sgd(0.1, momentum=1.0), r"`sgd\(momentum=1.0\)`.*in \[0, 1\)"),
        (lambda: optim.sgd(0.1, nesterov=True), r"nesterov=True, momentum=None.*momentum=0.9, nesterov=True"),
        (lambda: optim.sgd(0.1, momentum=0.9, dampening=0.1, nesterov=True), "undampened"),
        (lambda: optim.adam(0.1, b1=1.0), r"`adam\(b1=1.0\)`"),
        (lambda: optim.adam(0.1, b2=-0.1), r"`adam\(b2=-0.1\)`"),
        (lambda: optim.adamw(0.1, eps=-1.0), r"`adamw\(eps=-1.0\)`"),
        (lambda: optim.adamw(0.1, weight_decay=-0.1), r"`adamw\(weight_decay=-0.1\)`"),
        (lambda: optim.lion(0.1, b1=2.0), r"`lion\(b1=2.0\)`"),
        (lambda: optim.rmsprop(0.1, decay=1.5), r"`rmsprop\(decay=1.5\)`"),
        (lambda: optim.adagrad(0.1, initial=-1.0), r"`adagrad\(initial=-1.0\)`"),
        (lambda: optim.adafactor(-1.0), r"`adafactor\(learning_rate=-1.0\)`"),
        (
            lambda: optim.adafactor(0.1, warmup_init=True),
            r"adafactor\(0.1, warmup_init=True\).*a learning rate repl",
        ),
        (lambda: optim.muon(0.1, momentum=1.0), r"`muon\(momentum=1.0\)`"),
        (
            lambda: optim.muon(0.1, adjust="none"),
            r"`scale_by_shape\('none'\)`.*\['match_rms_adamw', 'original'\]",
        ),
        (lambda: optim.lookahead(optim.sgd(0.1), 0), "sync_period=0"),
        (lambda: optim.lookahead(optim.sgd(0.1), slow_step_size=1.5), "slow_step_size=1.5.*such as 0.5"),
        (lambda: optim.ema(1.0), r"`ema\(decay=1.0\)`"),
        (lambda: optim.clip_by_global_norm(0.0), r"`clip_by_global_norm\(max_norm=0.0\)`.*above 0"),
        (lambda: optim.clip_by_value(-1.0), r"`clip_by_value\(max_value=-1.0\)`"),
        (lambda: optim.clip_by_block_rms(0.0), r"`clip_by_block_rms\(threshold=0.0\)`"),
        (lambda: optim.add_decayed_weights(-0.1), r"`add_decayed_weights\(weight_decay=-0.1\)`"),
    ],
)
def test_numbers_out_of_range_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- freeze -------------------------------------------------------------------------------------------------------

SOME = [("a", "train"), ("b", "frozen")]


def frozen(rule=None):
    return optim.partition({"train": rule or optim.sgd(0.1), "frozen": optim.freeze()}, SOME)


AROUND = {
    "partition": frozen(),
    "clip before": optim.chain(optim.clip_by_global_norm(1e9), frozen()),
    "decay after": optim.chain(frozen(), optim.add_decayed_weights(0.3), optim.scale(3.0)),
    "momentum before": optim.chain(optim.trace(0.9), frozen()),
    "masked": optim.chain(optim.masked(optim.freeze(), "b"), optim.sgd(0.1)),
    "masked partition": optim.chain(optim.masked(frozen(), None), optim.scale(2.0)),
    "lookahead": optim.lookahead(frozen(), 1),
    "galore": optim.galore(frozen(), rank=1),
    "inject": optim.inject_hyperparams(lambda rate: frozen(optim.sgd(rate)))(rate=0.1),
    "nested": optim.partition(
        {"x": optim.chain(optim.scale(1.0), frozen()), "y": optim.sgd(0.1)}, [("c", "y")], default="x"
    ),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("grad", [100.0, float("inf"), float("nan")])
@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_parameters_keep_their_bits_whatever_is_around(name, grad, compiled):
    rule = AROUND[name]
    params = {"a": torch.ones(()), "b": torch.tensor([1.0, -0.0, 1e-30])}
    params |= {"c": torch.ones(())} if name == "nested" else {}

    def loss(p, x):
        return tfn.Mean.of(sum(v.sum() for n, v in p.items() if n != "b") * x + grad * p["b"].sum() * x)

    step = tfn.train_step(loss, rule)
    step = tfn.jit(step, backend="eager") if compiled else step
    state = tfn.init(params, rule)
    for _ in range(2):
        state, metrics = step(state, torch.ones(3))
    assert state.params["b"].view(torch.int32).equal(params["b"].view(torch.int32))
    assert all(torch.isfinite(p).all() and not p.equal(params[n]) for n, p in state.params.items() if n != "b")
    assert metrics["grad_norm"].value.item() == pytest.approx(math.sqrt(len(params) - 1))  # as torch, without `b`


def test_frozen_gradients_do_not_count_in_the_norm_of_a_clip_outside():
    a = torch.ones((), requires_grad=True)
    b = torch.ones(())  # requires no gradient
    (3 * a + 100 * b).backward()
    torch.nn.utils.clip_grad_norm_([a], 1.0)
    for rule in (
        optim.chain(optim.clip_by_global_norm(1.0), frozen(optim.scale(1.0))),
        optim.chain(optim.chain(optim.clip_by_global_norm(1.0)), optim.chain(frozen(optim.scale(1.0)))),
    ):
        params = {"a": torch.ones(()), "b": torch.ones(())}
        grads = {"a": torch.tensor(3.0), "b": torch.tensor(100.0)}
        updates, _ = rule.update(grads, rule.init(params), params)
        torch.testing.assert_close(updates["a"], a.grad)
        assert updates["b"] == 0


def test_nothing_is_kept_for_frozen_parameters():
    rule = frozen(optim.adam(0.1))
    state = rule.init({"a": torch.ones(2), "b": torch.ones(5)})
    assert all(x.numel() <= 2 for x in tree.leaves(state))


def test_a_label_without_a_transform_names_freeze():
    with pytest.raises(ValueError, match=r"`tfn\.optim\.freeze\(\)` leaves the parameters as they are"):
        optim.partition({"train": optim.sgd(0.1)}, SOME).init({"a": torch.ones(()), "b": torch.ones(())})
