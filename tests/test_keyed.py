"""Torch's random functions inside a step: keyed, or refused; never the global generator's."""

import inspect
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_identical, generator, quick, seeded
from torch import Tensor, nn

import trainfn as tfn
from trainfn._keyed import HANDLERS
from trainfn._keyed._composites import COMPOSITES
from trainfn.errors import CaptureError, RandomnessError

pytestmark = pytest.mark.usefixtures("untouched_rng")

KEY = tfn.random.key(0)
X = torch.randn(6, 4, 8, generator=generator(0))
P = torch.full((6, 50), 0.3)
LOGITS = torch.log(torch.tensor([0.1, 0.2, 0.7]))


def empty(*shape, **kwargs):
    return torch.empty(*shape, **kwargs)


MHA = seeded(lambda: nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True))
LAYER = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True))
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
    "pca_lowrank": lambda: torch.pca_lowrank(X, q=2)[0],
    "Normal": lambda: DISTRIBUTIONS.Normal(0.0, 1.0).sample((5,)),
    "Normal, reparametrized": lambda: DISTRIBUTIONS.Normal(X, 1.0).rsample(),
    "Uniform": lambda: DISTRIBUTIONS.Uniform(torch.zeros(5), 1.0).sample(),
    "Bernoulli": lambda: DISTRIBUTIONS.Bernoulli(P).sample(),
    "Categorical": lambda: DISTRIBUTIONS.Categorical(P).sample((4,)),
    "Exponential": lambda: DISTRIBUTIONS.Exponential(torch.ones(5)).sample(),
}
# One of each kind: tracing all of them takes a minute.
COMPILED = """dropout/dropout in place/dropout2d/alpha_dropout/torch.dropout_/torch.feature_dropout/rrelu/rrelu_/
attention/MultiheadAttention without weights/TransformerEncoderLayer/gumbel_softmax hard/rand/randn_like/randint of two/
randperm/bernoulli/normal/normal of both/multinomial/multinomial replaced/uniform_/bernoulli_/exponential_/cauchy_/
geometric_/random_/nn.init.uniform_/nn.init.xavier_normal_/Normal, reparametrized""".replace("\n", "").split("/")
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


def test_compiled_draws_are_the_eager_ones():
    """The rest of torch runs its eager kernels under this backend, so: to the bit."""
    state = tfn.init({"w": torch.ones(1)}, tfn.optim.sgd(0.1))

    def drawn(state, _):
        with tfn.keyed(state.key):
            return {name: DRAWS[name]() for name in COMPILED}

    assert_identical(quick(drawn)(state, torch.zeros(1)), drawn(state, None))


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


def test_every_python_function_of_torch_that_draws_is_keyed_or_refused():
    """Functions that torch hands to a mode as a whole: what they draw inside, the mode would not see."""
    drawing = re.compile(
        r"\b(rand|randn|randint|randperm|rand_like|randn_like|\w*dropout|bernoulli_?|uniform_|normal_?)\("
    )
    left = []
    for functions in torch.overrides.get_overridable_functions().values():
        for function in functions:
            if not inspect.isfunction(inspect.unwrap(function)):
                continue
            code = inspect.getsource(function).split('"""')[-1]
            if drawing.search(code) and function not in HANDLERS and function not in COMPOSITES:
                left.append(function.__name__)
    assert left == []


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


@pytest.mark.parametrize("draw", [lambda x: Noisy.apply(x), lambda x: torch.ops.aten.dropout(x, 0.5, True)])
def test_a_compiled_step_never_draws_from_the_global_generator(draw):
    """Where torch traces on behalf of another function it hides what it draws: an error, not another number."""
    optimizer = tfn.optim.sgd(0.1)
    state = tfn.init({"w": torch.ones(3)}, optimizer)
    step = quick(tfn.train_step(lambda p, x: tfn.Mean.of(draw(x * p["w"])), optimizer), backend="eager")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch, of how it traces an autograd.Function itself
        try:
            new, _ = step(state, torch.ones(4, 3))
        except (CaptureError, RandomnessError) as error:
            assert re.search("global generator|rerouted to state", str(error))
        else:
            assert_identical(new, step.step(state, torch.ones(4, 3))[0])
