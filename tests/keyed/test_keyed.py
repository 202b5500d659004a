"""Torch's random functions inside a step: keyed, or refused; never the global generator's."""

import inspect
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import trainfn as tfn
from tests.helpers import assert_close, assert_identical, generator, seeded
from trainfn._keyed import HANDLERS, Randomness, draws
from trainfn._keyed._composites import COMPOSITES
from trainfn.errors import RandomnessError

pytestmark = pytest.mark.usefixtures("untouched_rng")

KEY = tfn.random.key(0)
X = torch.randn(6, 4, 8, generator=generator(0))
P = torch.full((6, 50), 0.3)
SYMMETRIC = torch.arange(1.0, 10.0).diag()
LOGITS = torch.log(torch.tensor([0.1, 0.2, 0.7]))


def empty(*shape, **kwargs):
    return torch.empty(*shape, **kwargs)


MHA = seeded(lambda: nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True))
LAYER = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True))
LSTM = seeded(lambda: nn.LSTM(8, 8))
DISTRIBUTIONS = torch.distributions

# What it draws, as a function of nothing.
DRAWS = {
    "dropout": lambda: F.dropout(X, 0.5),
    "dropout in place": lambda: F.dropout(X.clone(), 0.5, inplace=True),
    "dropout1d": lambda: F.dropout1d(X, 0.5),
    "dropout2d": lambda: F.dropout2d(X.view(6, 4, 4, 2), 0.5),
    "dropout3d": lambda: F.dropout3d(X.view(6, 4, 2, 2, 2), 0.5),
    "alpha_dropout": lambda: F.alpha_dropout(X, 0.5, training=True),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(X, 0.5, training=True),
    "torch.dropout": lambda: torch.dropout(X, 0.5, True),
    "torch.dropout_": lambda: torch.dropout_(X.clone(), 0.5, True),
    "torch.alpha_dropout": lambda: torch.alpha_dropout(X, 0.5, True),
    "torch.alpha_dropout_": lambda: torch.alpha_dropout_(X.clone(), 0.5, True),
    "torch.feature_dropout": lambda: torch.feature_dropout(X, 0.5, True),
    "torch.feature_dropout_": lambda: torch.feature_dropout_(X.clone(), 0.5, True),
    "torch.feature_alpha_dropout": lambda: torch.feature_alpha_dropout(X, 0.5, True),
    "torch.feature_alpha_dropout_": lambda: torch.feature_alpha_dropout_(X.clone(), 0.5, True),
    "nn.Dropout": lambda: nn.Dropout(0.5)(X),
    "nn.AlphaDropout": lambda: nn.AlphaDropout(0.5)(X),
    "rrelu": lambda: F.rrelu(X, training=True),
    "rrelu_": lambda: F.rrelu_(X.clone(), training=True),
    "torch.rrelu": lambda: torch.rrelu(X, training=True),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    "MultiheadAttention": lambda: MHA(X, X, X)[0],
    "MultiheadAttention without weights": lambda: MHA(X, X, X, need_weights=False)[0],
    "TransformerEncoderLayer": lambda: LAYER(X),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "gumbel_softmax hard": lambda: F.gumbel_softmax(X, hard=True),
    "rand": lambda: torch.rand(3, 4),
    "rand of a tuple": lambda: torch.rand((3, 4), dtype=torch.float64),
    "rand of a size=": lambda: torch.rand(size=(3, 4)),
    "randn": lambda: torch.randn([3, 4]),
    "rand_like": lambda: torch.rand_like(X),
    "randn_like": lambda: torch.randn_like(X, dtype=torch.float64),
    "randint": lambda: torch.randint(100, (9,)),
    "randint of two": lambda: torch.randint(10, 1000, (9,), dtype=torch.int32),
    "randint by name": lambda: torch.randint(low=3, high=1000, size=(9,)),
    "randint_like": lambda: torch.randint_like(X, 1000),
    "randint_like of two": lambda: torch.randint_like(X, 10, 1000),
    "randint_like by name": lambda: torch.randint_like(X, high=1000),
    "randperm": lambda: torch.randperm(20),
    "bernoulli": lambda: torch.bernoulli(P),
    "bernoulli of p": lambda: torch.bernoulli(P, 0.5),
    "Tensor.bernoulli": lambda: P.bernoulli(),
    "normal": lambda: torch.normal(0.0, 1.0, (5,)),
    "normal by name": lambda: torch.normal(mean=0.0, std=1.0, size=(5,)),
    "normal of a mean": lambda: torch.normal(X),
    "normal of a std": lambda: torch.normal(0.0, X.abs()),
    "normal of both": lambda: torch.normal(X, X.abs()),
    "multinomial": lambda: torch.multinomial(P, 3),
    "multinomial replaced": lambda: P.multinomial(3, replacement=True),
    "uniform_": lambda: empty(9).uniform_(-1, 1),
    "uniform_ by name": lambda: empty(9).uniform_(to=3),
    "normal_": lambda: empty(9).normal_(1, 2),
    "bernoulli_": lambda: empty(90).bernoulli_(0.3),
    "bernoulli_ of a tensor": lambda: empty(6, 50).bernoulli_(P),
    "exponential_": lambda: empty(9).exponential_(2),
    "log_normal_": lambda: empty(9).log_normal_(),
    "cauchy_": lambda: empty(9).cauchy_(),
    "geometric_": lambda: empty(90).geometric_(0.2),
    "random_": lambda: empty(9).random_(),
    "random_ to": lambda: empty(9, dtype=torch.int64).random_(1000),
    "random_ from to": lambda: empty(9, dtype=torch.int64).random_(-1000, 1000),
    **{
        f"nn.init.{name}": lambda name=name: getattr(nn.init, name)(empty(6, 8))
        for name in ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_")
    },
    "nn.init.trunc_normal_": lambda: nn.init.trunc_normal_(empty(6, 8)),
    "nn.init.orthogonal_": lambda: nn.init.orthogonal_(empty(6, 8)),
    "nn.init.sparse_": lambda: nn.init.sparse_(empty(6, 8), 0.5),
    "svd_lowrank": lambda: torch.svd_lowrank(X, q=2)[0],
    "svd_lowrank of a parameter": lambda: torch.svd_lowrank(nn.Parameter(X), q=2)[0].detach(),
    "pca_lowrank": lambda: torch.pca_lowrank(X, q=2)[0],
    "pca_lowrank of a parameter": lambda: torch.pca_lowrank(nn.Parameter(X), q=2)[0].detach(),
    "lobpcg": lambda: torch.lobpcg(SYMMETRIC, k=1, niter=1)[1],
    "lobpcg of a parameter": lambda: torch.lobpcg(nn.Parameter(SYMMETRIC), k=1, niter=1)[1].detach(),
    "a distance of the user's": lambda: F.triplet_margin_with_distance_loss(
        X, X, X, distance_function=lambda a, b: torch.rand(6), reduction="none"
    ),
    "Normal": lambda: DISTRIBUTIONS.Normal(0.0, 1.0).sample((5,)),
    "Normal, reparametrized": lambda: DISTRIBUTIONS.Normal(X, 1.0).rsample(),
    "Uniform": lambda: DISTRIBUTIONS.Uniform(torch.zeros(5), 1.0).sample(),
    "Bernoulli": lambda: DISTRIBUTIONS.Bernoulli(P).sample(),
    "Categorical": lambda: DISTRIBUTIONS.Categorical(P).sample((4,)),
    "Exponential": lambda: DISTRIBUTIONS.Exponential(torch.ones(5)).sample(),
}
# They look at what they drew, or torch looks at what they got: that can't be captured.
UNCAPTURED = {"nn.init.trunc_normal_", "lobpcg", "lobpcg of a parameter"}
EACH = pytest.mark.parametrize("draw", [pytest.param(f, id=name) for name, f in DRAWS.items()])


def under(key, draw, **kwargs):
    with tfn.keyed(key, **kwargs):
        return draw()


@EACH
def test_a_draw_is_a_function_of_the_key(draw):
    """Repeatable whatever the global generator holds, another with another key, and twice in a row not the same."""
    one = under(KEY, draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        assert_identical(under(KEY, draw), one)
        ours = torch.get_rng_state()
        torch.manual_seed(1234)
        assert torch.equal(torch.get_rng_state(), ours)
    others = [under(key, draw) for key in tfn.random.split(KEY, 3)]
    assert not all(torch.equal(one, other) for other in others)
    many = under(KEY, lambda: [draw() for _ in range(4)])
    assert torch.equal(many[0], one) and not all(torch.equal(one, other) for other in many[1:])


@EACH
def test_a_draw_has_the_shape_and_dtype_of_torchs(draw):
    keyed = under(KEY, draw)
    with torch.random.fork_rng(devices=[]):
        theirs = draw()
    assert (keyed.shape, keyed.dtype, keyed.device) == (theirs.shape, theirs.dtype, theirs.device)


def captured(function, *args, mode="fake"):
    """The function as a graph of kernels: what `trainfn.jit` compiles."""
    with torch.autograd.set_multithreading_enabled(False), torch.no_grad():
        return make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*args)


def drawing(graph):
    """The kernels of a graph that draw from torch's own generator."""
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function" and draws(n.target, n.args, n.kwargs)]


@pytest.fixture
def unvalidated():
    """Distributions don't look at their arguments' values."""
    torch.distributions.Distribution.set_default_validate_args(False)
    yield
    torch.distributions.Distribution.set_default_validate_args(True)


@pytest.mark.parametrize("draw", [pytest.param(f, id=n) for n, f in DRAWS.items() if n not in UNCAPTURED])
def test_captured_draws_are_the_eager_ones(draw, unvalidated):
    def twice(key):
        with tfn.keyed(key):
            return draw(), draw()

    graph = captured(twice, KEY)
    assert drawing(graph) == []
    for key in (KEY, tfn.random.key(1)):
        assert_identical(graph(key), twice(key))


def noisy_grads(key, x, w, reentrant):
    """Gradients through two blocks that draw, checkpointed or not (None)."""

    def block(x):
        y = F.dropout(x @ w, 0.5).unsqueeze(1)
        return F.scaled_dot_product_attention(y, y, y, dropout_p=0.3).sum((1, 2)).sin()

    def run(x):
        return block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)

    with torch.enable_grad(), tfn.keyed(key, rows=len(x)):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = run(run(x))
        if reentrant:  # torch allows no `grad` of it
            y.sum().backward()
            return x.grad, w.grad
        return torch.autograd.grad(y.sum(), [x, w])


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("mode", ["eager", "fake", "symbolic"])
def test_a_checkpointed_block_draws_again_what_it_drew(reentrant, mode):
    w = torch.randn(8, 8, generator=generator(4))
    run = noisy_grads
    if mode != "eager":
        graph = captured(lambda key, x, w: noisy_grads(key, x, w, reentrant), KEY, X, w, mode=mode)
        assert drawing(graph) == []
        run = lambda key, x, w, _: graph(key, x, w)  # noqa: E731
    for key in (KEY, tfn.random.key(1)):
        assert_identical(run(key, X, w, reentrant), noisy_grads(key, X, w, None))


def test_a_captured_draw_fits_other_sizes():
    def dropped(key, x):
        with tfn.keyed(key, rows=x.shape[0]):
            return F.dropout(x, 0.5), torch.rand(x.shape[0], 2), torch.randn_like(x)

    graph = captured(dropped, KEY, X, mode="symbolic")
    for rows in (6, 5, 9):
        x = torch.ones(rows, 4, 8)
        assert_identical(graph(KEY, x), dropped(KEY, x))


@pytest.mark.parametrize("rows", [0, 3])
def test_the_number_of_draws_has_no_bound(rows):
    """The first keys are made at once, the others one by one: by the same rule."""
    drawn = under(KEY, lambda: [torch.rand(3) for _ in range(70)], rows=rows)
    for number, one in enumerate(drawn, start=1):
        key = tfn.random.fold_in(KEY, number)
        assert torch.equal(one, tfn.random.uniform(key if rows else tfn.random.fold_in(key, 0), (3,)))


def test_random_methods_change_their_tensor_and_return_it():
    for fill in ("uniform_", "normal_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "random_"):
        x = torch.full((50,), 7.25)
        assert under(KEY, getattr(x, fill)) is x and (x != 7.25).any(), fill
    for function in (F.dropout, F.alpha_dropout, F.feature_alpha_dropout):
        x = X.clone()
        assert under(KEY, lambda f=function, x=x: f(x, 0.5, True, True)) is x and not torch.equal(x, X)
    for function in (torch.dropout_, torch.alpha_dropout_, torch.feature_dropout_, torch.feature_alpha_dropout_):
        x = X.clone()
        assert under(KEY, lambda f=function, x=x: f(x, 0.5, True)) is x and not torch.equal(x, X)


# --- distributions ------------------------------------------------------------------------------------------------

BIG = torch.ones(200, 500)
N = BIG.numel()


def within(share, p, n=N):
    """4.5 deviations of a share of n."""
    assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n), (share, p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_p_and_keeps_the_mean(p):
    y = under(KEY, lambda: F.dropout(BIG, p))
    within((y == 0).double().mean().item(), p)
    assert torch.equal(y.unique(), torch.tensor([0.0, 1.0 / (1.0 - p)]))
    assert torch.equal(under(KEY, lambda: F.dropout(BIG * math.inf, p)).isnan(), torch.zeros_like(BIG).bool())
    assert under(KEY, lambda: F.dropout(BIG, 1.0)).abs().max() == 0
    for off in (
        lambda: F.dropout(BIG, 0.0),
        lambda: F.dropout(BIG, p, training=False),
        lambda: nn.Dropout(p).eval()(BIG),
    ):
        assert torch.equal(under(KEY, off), BIG)
    assert under(KEY, lambda: F.dropout(BIG.bfloat16(), p)).dtype == torch.bfloat16


def test_the_gradient_of_dropout_is_its_mask():
    x = torch.randn(40, 50, generator=generator(1)).requires_grad_()
    y = under(KEY, lambda: F.dropout(x, 0.4))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, (y != 0).float() / 0.6)


def test_channels_drop_whole():
    for function, shape in (
        (F.dropout1d, (40, 50, 6)),
        (F.dropout2d, (40, 50, 3, 2)),
        (F.dropout3d, (40, 50, 3, 2, 1)),
    ):
        y = under(KEY, lambda f=function, s=shape: f(torch.ones(s), 0.3)).flatten(2)
        assert (y == y[..., :1]).all()
        within((y[..., 0] == 0).double().mean().item(), 0.3, 2000)
    unbatched = under(KEY, lambda: F.dropout2d(torch.ones(50, 3, 2), 0.5))
    assert unbatched.shape == (50, 3, 2) and (unbatched == unbatched[:, :1, :1]).all()


def test_alpha_dropout_keeps_mean_and_deviation():
    x = torch.randn(200, 500, generator=generator(2))
    for function in (F.alpha_dropout, F.feature_alpha_dropout):
        y = under(KEY, lambda f=function: f(x, 0.3, training=True))
        assert abs(y.mean()) < 0.02 and abs(y.std() - 1) < 0.02
        assert torch.equal(under(KEY, lambda f=function: f(x, 0.3)), x)


def gap(x, cdf):
    p = cdf(x.double().flatten().sort().values)
    steps = torch.arange(len(p) + 1, dtype=torch.float64) / len(p)
    return max((steps[1:] - p).max().item(), (p - steps[:-1]).max().item()) * math.sqrt(len(p))


@pytest.mark.parametrize(
    ("draw", "cdf"),
    [
        (lambda: torch.rand(N), lambda x: x),
        (lambda: torch.randn(N), torch.special.ndtr),
        (lambda: torch.normal(1.0, 2.0, (N,)), lambda x: torch.special.ndtr((x - 1) / 2)),
        (lambda: empty(N).uniform_(-1, 3), lambda x: (x + 1) / 4),
        (lambda: empty(N).normal_(1, 2), lambda x: torch.special.ndtr((x - 1) / 2)),
        (lambda: empty(N).exponential_(2), lambda x: 1 - torch.exp(-2 * x)),
        (lambda: empty(N).log_normal_(1, 2), lambda x: torch.special.ndtr((x.log() - 1) / 2)),
        (lambda: empty(N).cauchy_(1, 2), lambda x: torch.atan((x - 1) / 2) / math.pi + 0.5),
        (lambda: nn.init.kaiming_uniform_(empty(200, 500)), lambda x: x / (2 * math.sqrt(6 / 500)) + 0.5),
        (lambda: nn.init.normal_(empty(N), 1, 2), lambda x: torch.special.ndtr((x - 1) / 2)),
        (lambda: nn.init.uniform_(empty(N), -1, 3), lambda x: (x + 1) / 4),
    ],
)
def test_continuous_draws_have_their_distribution(draw, cdf):
    """Kolmogorov and Smirnov's statistic exceeds 1.95 by chance once in 1000."""
    assert gap(under(KEY, draw), cdf) < 1.95


def test_discrete_draws_have_their_distribution():
    def shares(x, n):
        return [(x == i).double().mean().item() for i in range(n)]

    within(under(KEY, lambda: torch.bernoulli(BIG * 0.3)).mean().item(), 0.3)
    within(under(KEY, lambda: empty(N).bernoulli_(0.3)).mean().item(), 0.3)
    p = LOGITS.exp()
    for draw in (
        lambda: torch.multinomial(p, N, replacement=True),
        lambda: torch.multinomial(p.expand(N, 3), 1),
        lambda: F.gumbel_softmax(LOGITS.expand(N, 3), hard=True).argmax(-1),
        lambda: DISTRIBUTIONS.Categorical(p).sample((N,)),
    ):
        for share, expected in zip(shares(under(KEY, draw), 3), p.tolist(), strict=True):
            within(share, expected)
    for share in shares(under(KEY, lambda: torch.randint(5, (N,))), 5):
        within(share, 0.2)
    geometric = under(KEY, lambda: empty(N).geometric_(0.25))
    for i in range(4):
        within((geometric == i + 1).double().mean().item(), 0.25 * 0.75**i)
    slopes = under(KEY, lambda: F.rrelu(-BIG, 0.2, 0.6, training=True)).neg()
    assert gap(slopes, lambda x: (x - 0.2) / 0.4) < 1.95
    assert torch.equal(under(KEY, lambda: F.rrelu(-BIG, 0.2, 0.6)), -BIG * 0.4)


def test_samples_without_replacement_differ_and_follow_the_weights():
    picked = under(KEY, lambda: torch.multinomial(LOGITS.exp().expand(N, 3), 2))
    assert (picked[:, 0] != picked[:, 1]).all()
    for i, p in enumerate(LOGITS.exp().tolist()):
        within((picked[:, 0] == i).double().mean().item(), p)
    never = under(KEY, lambda: torch.multinomial(torch.tensor([0.0, 1.0, 1.0]).expand(N, 3), 2))
    assert (never != 0).all()
    for _ in range(3):
        assert sorted(under(KEY, lambda: torch.randperm(30)).tolist()) == list(range(30))


def test_ranges_of_random_integers():
    for dtype in (torch.uint8, torch.int8, torch.int64):
        x = under(KEY, lambda d=dtype: empty(5000, dtype=d).random_())
        assert x.dtype == dtype and x.min() >= 0 and x.max() > 0.99 * torch.iinfo(dtype).max
    x = under(KEY, lambda: empty(5000).random_())
    assert x.min() >= 0 and x.max() <= 2**24 and x.max() > 0.99 * 2**24  # the integers that float32 holds
    x = under(KEY, lambda: empty(5000, dtype=torch.int64).random_(-3, 3))
    assert set(x.tolist()) == {-3, -2, -1, 0, 1, 2}


# --- attention ----------------------------------------------------------------------------------------------------

Q, K, V = (torch.randn(2, 4, n, 8, generator=generator(n)) for n in (5, 7, 7))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.rand(5, 7, generator=generator(0)) > 0.3},
        {"attn_mask": torch.randn(2, 1, 5, 7, generator=generator(1))},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_attention_with_dropout_is_torchs_attention_but_for_the_mask(kwargs):
    """A vanishing dropout must give torch's own result; fp32 rounding of another order of the same sums."""
    k, v = (K[:, :2], V[:, :2]) if kwargs.get("enable_gqa") else (K, V)
    got = under(KEY, lambda: F.scaled_dot_product_attention(Q, k, v, dropout_p=1e-9, **kwargs))
    assert_close(got, F.scaled_dot_product_attention(Q, k, v, **kwargs), 1e-6)
    off = under(KEY, lambda: F.scaled_dot_product_attention(Q, k, v, dropout_p=0.0, **kwargs))
    assert torch.equal(off, F.scaled_dot_product_attention(Q, k, v, **kwargs))


def test_attention_drops_weights_not_outputs():
    """With the identity as values the outputs are the weights: a share p of them is 0, the others are scaled up."""
    q = torch.randn(40, 1, 50, 8, generator=generator(3))
    eye = torch.eye(50).expand(40, 1, 50, 50)
    weights = F.scaled_dot_product_attention(q, q, eye)
    y = under(KEY, lambda: F.scaled_dot_product_attention(q, q, eye, dropout_p=0.3))
    dropped = y == 0
    within(dropped.double().mean().item(), 0.3)
    assert_close(y[~dropped], weights[~dropped] / 0.7, 1e-6)


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [lambda n: F.dropout(torch.ones(n, 4, 3), 0.5), lambda n: torch.rand(2 * n, 3)])
def test_a_row_draws_the_same_wherever_the_batch_is_cut(draw):
    whole = under(KEY, lambda: draw(6), rows=6)
    parts = [under(KEY, lambda n=n: draw(n), rows=n, first_row=first) for first, n in ((0, 1), (1, 3), (4, 2))]
    assert torch.equal(torch.cat(parts), whole)
    tensor_rows = under(KEY, lambda: draw(3), rows=3, first_row=torch.tensor(1))
    assert torch.equal(tensor_rows, parts[1])


def test_what_has_no_rows_draws_anew_in_each_piece():
    draws = [under(KEY, lambda: torch.rand(7), rows=3, first_row=first) for first in (0, 3, 6)]
    assert len({tuple(d.tolist()) for d in draws}) == 3
    orders = [under(KEY, lambda: torch.randperm(9), rows=3, first_row=first) for first in (0, 3, 6)]
    assert len({tuple(d.tolist()) for d in orders}) == 3


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: torch.rand(3, generator=g),
        lambda g: torch.randn(3, generator=g),
        lambda g: torch.randint(5, (3,), generator=g),
        lambda g: torch.randperm(3, generator=g),
        lambda g: torch.bernoulli(P, generator=g),
        lambda g: torch.normal(0.0, 1.0, (3,), generator=g),
        lambda g: torch.multinomial(P, 2, generator=g),
        lambda g: empty(3).uniform_(generator=g),
        lambda g: empty(3).normal_(generator=g),
        lambda g: empty(3).random_(generator=g),
        lambda g: nn.init.uniform_(empty(3), generator=g),
        lambda g: nn.init.kaiming_uniform_(empty(3, 3), generator=g),
    ],
)
def test_a_generator_is_refused(draw):
    with pytest.raises(
        RandomnessError, match=r"`generator=` inside a step: a generator is state outside the TrainState"
    ):
        under(KEY, lambda: draw(generator(0)))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: nn.LSTM(8, 8, 2, dropout=0.5)(X), r"`nn\.LSTM\(dropout=\.\.\.\)` inside a step draws from the global"),
        (
            lambda: nn.GRU(8, 8, 2, dropout=0.5)(X),
            r"`nn\.GRU\(dropout=\.\.\.\)`.*Use one layer per module with nn\.Dropout",
        ),
        (lambda: nn.RNN(8, 8, 2, dropout=0.5)(X), r"`nn\.RNN\(dropout=\.\.\.\)`"),
        (lambda: nn.RNN(8, 8, 2, dropout=0.5, nonlinearity="relu")(X), r"`nn\.RNN\(dropout=\.\.\.\)`"),
        (lambda: torch.poisson(P), r"`torch\.poisson`.*pass it in the batch, keyed with `trainfn\.random`"),
        (lambda: torch.binomial(P, P), r"`torch\.binomial`"),
        (lambda: DISTRIBUTIONS.Poisson(P).sample(), r"`torch\.poisson`"),
        (lambda: DISTRIBUTIONS.Gamma(P, P).sample(), "Gamma, Beta and Dirichlet"),
        (lambda: DISTRIBUTIONS.Beta(P, P).sample(), "Dirichlet"),
        (lambda: DISTRIBUTIONS.Dirichlet(P).sample(), "Dirichlet"),
        (
            lambda: nn.FractionalMaxPool2d(2, output_size=2)(X.view(6, 4, 4, 2)),
            r"fractional_max_pool2d.*Use F\.max_pool2d",
        ),
        (lambda: F.fractional_max_pool2d(X.view(6, 4, 4, 2), 2, output_size=2), "fractional_max_pool2d"),
        (
            lambda: F.fractional_max_pool3d(X.view(3, 2, 4, 4, 2), 2, output_size=1, return_indices=True),
            "fractional_max",
        ),
        (lambda: torch.native_dropout(X, 0.5, True), r"`torch\.native_dropout`.*Use F\.dropout"),
    ],
)
def test_what_cannot_be_keyed_is_refused(draw, message):
    with torch.random.fork_rng(devices=[]), pytest.raises(RandomnessError, match=message):
        under(KEY, draw)


@pytest.mark.parametrize("made", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_without_dropout_run(made):
    for module in (seeded(lambda: made(8, 8, 2)), seeded(lambda: made(8, 8, 2, dropout=0.5)).eval()):
        assert torch.equal(under(KEY, lambda m=module: m(X)[0]), module(X)[0])


def test_a_library_that_draws_behind_torchs_functions_is_found_out():
    """Whatever reaches the generator without passing a function of torch: the block says so when it ends."""
    with torch.random.fork_rng(devices=[]), pytest.raises(RandomnessError, match="drew from torch's global generator"):
        under(KEY, lambda: torch.ops.aten.rand([3]))


# --- completeness -------------------------------------------------------------------------------------------------

# Variants of kernels that only torch itself calls, below a function that is handled.
INTERNAL = re.compile(r"^_|^miopen_|^cudnn_|^rrelu_with_noise")
# Run the keyed functions further down: seen to be so by `test_a_draw_is_a_function_of_the_key`.
PASS_DOWN = {"kaiming_normal_", "orthogonal_", "sparse_", "trunc_normal_", "xavier_normal_", "xavier_uniform_"}


def nondeterministic():
    """The names of all kernels that torch itself marks as drawing from a generator."""
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if hasattr(packet, "overloads") and any(
            torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags for overload in packet.overloads()
        ):
            yield name


def test_every_random_function_of_torch_is_keyed_or_refused():
    names = sorted(nondeterministic())
    assert len(names) > 40 and "bernoulli" in names
    found = {
        f"{space.__name__}.{name}": function
        for name in names
        for space in (torch, Tensor, F)
        if callable(function := getattr(space, name, None)) and not INTERNAL.match(name)
    }
    assert len(found) > 30
    assert [name for name, f in found.items() if f not in HANDLERS and f not in COMPOSITES] == []


def names_of(code):
    """All names that a function's code uses, inner functions included."""
    inner = [names_of(c) for c in code.co_consts if inspect.iscode(c)]
    return set(code.co_names).union(*inner)


def reaches_a_draw(function, drawing, seen):
    """Whether a Python function of torch, or one that it calls, calls a random function."""
    function = inspect.unwrap(function)
    if function in seen or not inspect.isfunction(function) or not function.__module__.startswith("torch"):
        return False
    seen.add(function)
    names = names_of(function.__code__)
    if names & drawing:
        return True
    spaces = (function.__globals__, vars(torch), vars(F), vars(nn.init))
    called = [next((space[name] for space in spaces if name in space), None) for name in names]
    return any(reaches_a_draw(f, drawing, seen) for f in called if inspect.isfunction(f) and f is not handled_by_torch)


handled_by_torch = torch.overrides.handle_torch_function


def python_functions():
    """The functions of torch in Python that torch hands to a mode as a whole: inside, the mode is off."""
    every = {f for functions in torch.overrides.get_overridable_functions().values() for f in functions}
    initializers = {f for name, f in vars(nn.init).items() if name.endswith("_") and inspect.isfunction(f)}
    offered = {f for f in initializers if "handle_torch_function" in names_of(inspect.unwrap(f).__code__)}
    return sorted((f for f in every | offered if inspect.isfunction(inspect.unwrap(f))), key=lambda f: f.__qualname__)


def test_every_python_function_of_torch_that_draws_is_keyed_or_refused():
    """What they, or those that they call, draw inside, the mode would not see."""
    names = {*nondeterministic()} - {"scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu"}
    found = {f for f in python_functions() if reaches_a_draw(f, names, set())}
    assert {torch.svd_lowrank, torch.pca_lowrank, torch.lobpcg, F.gumbel_softmax, nn.init.kaiming_uniform_} <= found
    assert [f.__qualname__ for f in found if f not in HANDLERS and f not in COMPOSITES] == []


def test_every_python_function_of_torch_that_runs_the_users_is_reentered():
    def takes_functions(f):
        return any("Callable" in str(p.annotation) for p in inspect.signature(f).parameters.values())

    found = [f for f in python_functions() if takes_functions(f)]
    assert F.triplet_margin_with_distance_loss in found
    assert [f.__qualname__ for f in found if f not in COMPOSITES] == []


def test_every_initializer_is_keyed():
    named = {name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
    constant = {"constant_", "ones_", "zeros_", "eye_", "dirac_"}
    keyed = {f.__name__ for f in HANDLERS if getattr(f, "__module__", None) == "torch.nn.init"}
    assert named - constant - keyed == PASS_DOWN
    assert {f"nn.init.{name}" for name in named - constant} <= set(DRAWS)


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.dropout(x, 0.5)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_function_of_the_users_with_its_own_gradient_is_keyed():
    def drawn(key):
        with tfn.keyed(key):
            return Noisy.apply(X)

    graph = captured(drawn, KEY)
    assert drawing(graph) == []
    assert_identical(graph(KEY), under(KEY, lambda: F.dropout(X, 0.5)))


@pytest.mark.parametrize(
    ("draw", "kernel"),
    [
        (lambda x: torch.ops.aten.dropout(x, 0.5, True), "bernoulli|dropout"),
        (lambda x: torch.ops.aten.rand([3]), "rand"),
        (lambda x: torch.ops.aten.scaled_dot_product_attention(x, x, x, None, 0.5), "attention|bernoulli|dropout"),
    ],
)
def test_what_draws_behind_torchs_functions_is_found_in_the_graph(draw, kernel):
    """Fake tensors move no generator, so the graph is looked at."""

    def drawn(key, x):
        with tfn.keyed(key):
            return draw(x)

    assert any(re.search(kernel, name) for name in drawing(captured(drawn, KEY, X)))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.ops.aten.dropout(x, 0.5, False),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.rrelu(x),
        lambda x: F.dropout(x, training=False),
        lambda x: LSTM(x)[0],
    ],
)
def test_what_draws_nothing_is_none_of_those(draw):
    assert drawing(captured(draw, X)) == []


# --- under vmap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.5),
        lambda x: F.dropout(torch.ones(4, 8), 0.5),
        torch.randn_like,
        lambda x: torch.rand(3),
        lambda x: torch.randint(1000, (3,)),
        lambda x: torch.randperm(20),
        lambda x: torch.bernoulli(x.sigmoid()),
        lambda x: x.clone().normal_(),
        F.gumbel_softmax,
        lambda x: torch.vmap(lambda y: F.dropout(y, 0.5), randomness="different")(x),
        lambda x: torch.func.grad(lambda y: F.dropout(y, 0.5).sum())(x),
    ],
)
@pytest.mark.parametrize("rows", [0, 6])
def test_under_vmap_samples_draw_their_own_or_all_the_same(draw, rows):
    for randomness, distinct in (("different", 6), ("same", 1)):
        one = under(KEY, lambda r=randomness: torch.vmap(draw, randomness=r)(torch.ones(6, 4, 8)), rows=rows)
        assert len({tuple(sample.flatten().tolist()) for sample in one}) == distinct
        assert_identical(
            under(KEY, lambda r=randomness: torch.vmap(draw, randomness=r)(torch.ones(6, 4, 8)), rows=rows), one
        )


def test_samples_under_vmap_draw_what_rows_draw():
    by_sample = under(KEY, lambda: torch.vmap(lambda x: F.dropout(x, 0.5), randomness="different")(X), rows=6)
    assert_identical(by_sample, under(KEY, lambda: F.dropout(X, 0.5), rows=6))
    second = under(
        KEY, lambda: torch.vmap(lambda x: F.dropout(x, 0.5), randomness="different")(X[4:]), rows=2, first_row=4
    )
    assert_identical(second, by_sample[4:])


def test_vmap_asks_what_a_draw_means():
    message = r'under `torch\.vmap\(\.\.\., randomness="error"\)`.*Write `randomness="different"` or'
    with pytest.raises(RandomnessError, match=message):
        under(KEY, lambda: torch.vmap(lambda x: F.dropout(x, 0.5))(X))


def test_keys_under_vmap_draw_each_their_own():
    keys = tfn.random.split(KEY, 5)
    many = torch.vmap(lambda key: under(key, lambda: F.dropout(X, 0.5), rows=6))(keys)
    assert_identical(many, torch.stack([under(key, lambda: F.dropout(X, 0.5), rows=6) for key in keys]))


# --- a step that draws nothing ------------------------------------------------------------------------------------

STATE = tfn.init({"w": torch.ones(3)}, tfn.optim.sgd(0.1))


class Counted:
    """A function that knows how often it ran, and whether the mode was on."""

    def __init__(self, function):
        self.function, self.modes = function, []

    def __call__(self):
        self.modes.append(torch._C._len_torch_function_stack() > 0)
        return self.function(len(self.modes))


def test_what_draws_runs_under_the_mode():
    body, run = Counted(lambda n: torch.rand(3)), Randomness()
    first = run(STATE, body)
    assert all(torch.equal(run(STATE, body), first) for _ in range(3))
    assert_identical(first, under(tfn.random.fold_in(STATE.key, STATE.step), lambda: torch.rand(3)))
    assert not torch.equal(run(STATE._replace(step=STATE.step + 1), body), first)
    assert body.modes == [True] * 5


def test_what_draws_nothing_runs_without_the_mode():
    body, run = Counted(lambda n: F.dropout(X, 0.5, training=False)), Randomness()
    for _ in range(130):
        assert torch.equal(run(STATE, body), X)
    assert [i for i, mode in enumerate(body.modes) if mode] == [0, 64, 128]  # it is looked at again now and then
    other = tfn.init(LSTM, tfn.optim.sgd(0.1))
    run(other, body)
    assert body.modes[-1]


def test_what_begins_to_draw_is_run_again_under_the_mode():
    body, run = Counted(lambda n: F.dropout(X, 0.5, training=n > 3)), Randomness()
    keyed = under(tfn.random.fold_in(STATE.key, STATE.step), lambda: F.dropout(X, 0.5))
    outs = [run(STATE, body) for _ in range(5)]
    assert [torch.equal(out, X) for out in outs] == [True, True, True, False, False]
    assert torch.equal(outs[3], keyed) and torch.equal(outs[4], keyed)
    assert body.modes == [True, False, False, False, True, True]


def test_what_begins_to_draw_where_nothing_reroutes_it_is_refused():
    run = Randomness()
    body = Counted(lambda n: torch.ops.aten.rand([3]) if n > 2 else X)
    run(STATE, body), run(STATE, body)
    for _ in range(2):
        with pytest.raises(RandomnessError, match="drew from torch's global generator"):
            run(STATE, body)
    body = Counted(lambda n: torch.rand(3, generator=generator(0)) if n > 2 else X)
    with pytest.raises(RandomnessError, match="`generator=` inside a step"):
        for _ in range(100):
            run(STATE, body)


def test_an_error_leaves_torchs_generator_as_it_was():
    def fails(n):
        if n > 2:
            torch.ops.aten.rand([3])
            raise ZeroDivisionError
        return X

    body, run = Counted(fails), Randomness()
    run(STATE, body), run(STATE, body)
    with pytest.raises(ZeroDivisionError):
        run(STATE, body)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_captured_step_is_keyed_even_where_eager_ones_drew_nothing(mode):
    run = Randomness()
    for _ in range(3):
        run(STATE, lambda: X)

    def dropped(key, step, x):
        return run(STATE._replace(key=key, step=step), lambda: F.dropout(x, 0.5))

    graph = captured(dropped, STATE.key, STATE.step, X, mode=mode)
    assert drawing(graph) == []
    assert_identical(graph(STATE.key, STATE.step, X), dropped(STATE.key, STATE.step, X))


class Device:
    """A GPU's generator: it has a seed, and an offset that grows with each draw."""

    def __init__(self):
        self.seed, self.offset = 7, 40

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def manual_seed(self, seed):
        self.seed, self.offset = seed, 0
        return self

    def set_offset(self, offset):
        self.offset = offset
        return self


@pytest.fixture
def devices(monkeypatch):
    made = (Device(), Device())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "default_generators", made)
    return made


def test_a_draw_on_a_gpu_is_found_out(devices):
    def drawn(n):
        devices[1].offset += 4

    with pytest.raises(RandomnessError, match="drew from torch's global generator"):
        under(KEY, lambda: drawn(0))
    body, run = Counted(lambda n: drawn(n) if n == 3 else X), Randomness()
    for _ in range(4):
        run(STATE, body)
    assert body.modes == [True, False, False, True, False]
    assert [(device.seed, device.offset) for device in devices] == [(7, 40), (7, 40)]


def test_a_recorded_cuda_graph_is_asked_for_no_generator(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Device, "get_offset", lambda self: pytest.fail("asked"))
    assert under(KEY, lambda: X) is X


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_is_watched():
    before = torch.cuda.get_rng_state()
    with pytest.raises(RandomnessError, match="drew from torch's global generator"):
        under(KEY, lambda: torch.ops.aten.rand([3], device="cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    state = tfn.init({"w": torch.ones(3, device="cuda")}, tfn.optim.sgd(0.1))
    body, run = Counted(lambda n: F.dropout(X.cuda(), 0.5, training=n > 3)), Randomness()
    outs = [run(state, body) for _ in range(5)]
    assert body.modes == [True, False, False, False, True, True] and torch.equal(outs[3], outs[4])
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.fixture
def restored_generators():
    before = np.random.get_state(), random.getstate()
    yield
    np.random.set_state(before[0])
    random.setstate(before[1])


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda: np.random.rand(), r"`numpy\.random`"),
        (lambda: np.random.beta(1.0, 1.0), r"`numpy\.random`"),
        (lambda: np.random.rand(312), r"`numpy\.random`"),  # all the words there are: the position is the same
        (random.random, "`random`"),
        (lambda: random.choice(range(10**9)), "`random`"),
        (lambda: (random.random(), np.random.rand()), r"`random` and `numpy\.random`"),
    ],
)
@pytest.mark.parametrize("before", [0, 2])
def test_a_draw_from_numpy_or_python_is_keyed_and_refused_where_it_is_captured(draw, name, before, restored_generators):
    seen = []
    body, run = Counted(lambda n: seen.append(draw()) if n > before else None), Randomness()
    for _ in range(before):
        run(STATE, body)
    after = np.random.get_state()[1].copy(), np.random.get_state()[2], random.getstate()
    for step, row in ((0, 0), (0, 0), (1, 0), (0, 5)):
        run(STATE._replace(step=torch.tensor(step)), body, first_row=row)
    run(STATE._replace(step=torch.tensor(0)), body)
    a, b, next_step, other_row, again = map(repr, seen[-5:])
    assert a == b == again
    assert a != next_step and a != other_row
    assert (np.random.get_state()[1] == after[0]).all()
    assert (np.random.get_state()[2], random.getstate()) == after[1:]
    message = rf"drew from the global generator of {name}, which is not a part of the state.*`torch\.rand\(\(\)\)`"
    step = tfn.jit(lambda state, batch: Randomness()(state, lambda: (draw(), state.step + 1)[1]), backend="eager")
    with pytest.raises(RandomnessError, match=message):
        step(STATE, X)


def test_mixup_and_resumed_steps_with_numpy_are_functions_of_the_state(restored_generators):
    """As with `numpy.random.default_rng`, drawn before the step and passed in the batch."""
    rows, optimizer = torch.arange(12.0).reshape(6, 2), tfn.optim.sgd(0.01)

    def loss(p, batch):
        share = float(np.random.beta(1.0, 1.0))
        drawn.append(share)
        return tfn.Mean.of((share * batch + (1 - share) * batch.flip(0)) @ p["w"])

    drawn: list[float] = []
    step = tfn.train_step(loss, optimizer)
    first = [tfn.init({"w": torch.ones(2)}, optimizer)]
    for _ in range(4):
        first.append(step(first[-1], rows)[0])
    shares = drawn[-4:]
    assert len(set(shares)) == 4
    resumed = tfn.train_step(loss, optimizer)(first[2], rows)[0]  # a new process knows nothing of the step
    assert resumed.params["w"].equal(first[3].params["w"])
    w = torch.ones(2, requires_grad=True)
    for share in shares:
        (grad,) = torch.autograd.grad(((share * rows + (1 - share) * rows.flip(0)) @ w).mean(), w)
        w = (w - 0.01 * grad).detach().requires_grad_()
    torch.testing.assert_close(first[4].params["w"], w.detach())


def test_a_draw_of_another_thread_is_none_of_the_steps(restored_generators):
    body, run = Counted(lambda n: random.random() if n == 2 else X), Randomness()
    for _ in range(3):
        assert run(STATE, body) is X
    assert len(body.modes) == 4


def test_generators_without_a_known_place_in_memory_are_asked(restored_generators, monkeypatch):
    monkeypatch.setattr("trainfn._keyed._elsewhere._PEEKS", False)
    assert Randomness()(STATE, random.random) == Randomness()(STATE, random.random)
    twister = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        with pytest.raises(RandomnessError, match=r"`numpy\.random`"):
            Randomness()(STATE, np.random.rand)
        assert Randomness()(STATE, lambda: X) is X
    finally:
        np.random.set_bit_generator(twister)
