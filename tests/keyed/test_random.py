"""The generator: its published values, its distributions, its edges."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close
from trainfn import random

pytestmark = pytest.mark.usefixtures("untouched_rng")

M = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
N = 100_000
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def mix(z):
    """The paper's mix64variant13, in integers without a sign."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & M
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & M
    return z ^ (z >> 31)


def mix_gamma(z):
    """The paper's mixGamma, without its repair of gammas with few changes of bits."""
    z = (z ^ (z >> 33)) * 0xFF51AFD7ED558CCD & M
    z = (z ^ (z >> 33)) * 0xC4CEB9FE1A85EC53 & M
    return (z ^ (z >> 33)) | 1


def unmix(z):
    """The inverse of `mix`: which input gives these bits?"""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        x = z
        for _ in range(64 // shift + 1):
            x = z ^ (x >> shift)
        z = x * pow(factor, -1, 2**64) & M
    return z


def signed(z):
    return z - 2**64 if z >> 63 else z


def unsigned(x):
    return [v & M for v in x.flatten().tolist()]


def key_with(raw):
    """A key whose first draw has exactly these bits."""
    return torch.tensor([signed((unmix(raw) - GOLDEN) & M), signed(GOLDEN)])


# --- bits ---------------------------------------------------------------------------------------------------------


def test_published_values():
    """SplitMix64 with seed 1234567 and the golden gamma, as Rosetta Code and Java's SplittableRandom list them."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert unsigned(random.bits(torch.tensor([1234567, signed(GOLDEN)]), (5,))) == expected


@given(seed=st.integers(-(2**63), 2**64 - 1), data=st.integers(0, 2**62), num=st.integers(1, 4))
def test_keys_equal_the_rules_in_python_integers(seed, data, num):
    def derive(s):
        return [mix((s + GOLDEN) & M), mix_gamma((s + 2 * GOLDEN) & M)]

    fold = 0x2545F4914F6CDD1D
    key = random.key(seed)
    s, g = unsigned(key)
    assert [s, g] == derive(mix((seed & M) ^ fold))
    assert unsigned(random.split(key, num)) == [x for i in range(num) for x in derive(mix((s + (i + 1) * g) & M))]
    assert unsigned(random.fold_in(key, data)) == derive(mix((mix(s ^ fold) + data * g) & M))
    assert unsigned(random.bits(key, (2, num))) == [mix((s + (i + 1) * g) & M) for i in range(2 * num)]
    assert torch.equal(random.fold_in(key, data), random.fold_in(key, torch.tensor(data)))


@given(first=st.integers(0, 2**40), n=st.integers(1, 20), skip=st.integers(0, 20))
@pytest.mark.parametrize("sample", [random.bits, random.uniform, random.normal, random.exponential])
def test_draw_i_is_draw_i_from_wherever_one_starts(sample, first, n, skip):
    key = random.key(1)
    assert torch.equal(sample(key, (skip + n,), first=first)[skip:], sample(key, (n,), first=first + skip))
    assert torch.equal(sample(key, (n,), first=torch.tensor(first)), sample(key, (n,), first=first))


def test_integer_draws_and_shapes():
    key = random.key(2)
    for sample in (random.uniform, random.normal, random.exponential):
        assert sample(key).shape == () and sample(key, (2, 0, 3)).shape == (2, 0, 3)
        assert torch.equal(sample(key, (2, 3)).flatten(), sample(key, (6,)))
    assert random.bernoulli(key, 0.5, (4,)).dtype == torch.bool
    assert random.split(random.split(key, 3)[1]).shape == (2, 2)


def test_keys_of_seeds_splits_and_folds_never_meet():
    root = random.key(0)
    keys = torch.cat([
        torch.stack([random.key(s) for s in range(500)]),
        random.split(root, 5_000),
        random.fold_in(root, torch.arange(5_000)),
        random.fold_in(random.fold_in(root, torch.arange(70))[:, None, :], torch.arange(70)).reshape(-1, 2),
    ])  # fmt: skip
    assert len({tuple(k) for k in keys.tolist()}) == len(keys)
    assert (keys[:, 1] & 1 == 1).all()


def test_streams_of_neighbouring_keys_are_uncorrelated():
    """A correlation of two independent streams is normal with deviation 1/sqrt(n): 4.5 of them, in 120 pairs."""
    root = random.key(0)
    keys = [*random.split(root, 6), *random.fold_in(root, torch.arange(6)), *(random.key(s) for s in range(4))]
    streams = torch.stack([random.uniform(k, (10_000,), dtype=torch.float64) for k in keys])
    off_diagonal = torch.corrcoef(streams) - torch.eye(len(keys), dtype=torch.float64)
    assert off_diagonal.abs().max() < 4.5 / 100
    lagged = torch.corrcoef(torch.stack([streams[0, i : 9_000 + i] for i in range(5)])) - torch.eye(5)
    assert lagged.abs().max() < 4.5 / 90


def test_every_bit_is_set_half_of_the_time():
    raw = random.bits(random.key(3), (N,))
    for bit in range(64):
        share = ((raw >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 4.5 * 0.5 / math.sqrt(N), bit


# --- distributions ------------------------------------------------------------------------------------------------


def distance(sample, cdf):
    """Kolmogorov and Smirnov's: the largest gap between the sample's distribution function and the true one."""
    p = cdf(sample.double().sort().values)
    steps = torch.arange(len(p) + 1, dtype=torch.float64) / len(p)
    return max((steps[1:] - p).max().item(), (p - steps[:-1]).max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("sample", "cdf"),
    [
        (random.uniform, lambda x: x),
        (random.normal, torch.special.ndtr),
        (random.exponential, lambda x: 1 - torch.exp(-x)),
    ],
)
def test_distributions(sample, cdf, seed, dtype):
    """1.95 / sqrt(n) is exceeded by chance once in 1000."""
    x = sample(random.key(seed), (N,), dtype=dtype)
    assert x.dtype == dtype
    assert distance(x, cdf) < 1.95 / math.sqrt(N)


def test_parameters_of_distributions():
    key = random.key(4)
    assert distance(random.uniform(key, (N,), low=-2.0, high=4.0), lambda x: (x + 2) / 6) < 1.95 / math.sqrt(N)
    assert distance(random.normal(key, (N,), mean=3.0, std=2.0), lambda x: torch.special.ndtr((x - 3) / 2)) < 0.0062
    assert distance(random.exponential(key, (N,), rate=3.0), lambda x: 1 - torch.exp(-3 * x)) < 0.0062
    per_element = random.normal(key, (2, 3), mean=torch.tensor([10.0, 20.0, 30.0]), std=0.0)
    assert per_element.tolist() == [[10, 20, 30]] * 2
    share = random.bernoulli(key, 0.3, (N,)).double().mean().item()
    assert abs(share - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / N)
    p = torch.tensor([0.0, 0.25, 1.0])
    shares = random.bernoulli(key, p, (N, 3)).double().mean(0)
    assert shares[0] == 0 and shares[2] == 1 and abs(shares[1] - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / N)


def chi2_is_small(counts, expected):
    """Below its mean + 5 deviations."""
    chi2 = sum((n - expected) ** 2 / expected for n in counts)
    freedom = len(counts) - 1
    return chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_integers_are_uniform_in_their_range():
    x = random.randint(random.key(5), -3, 4, (70_000,))
    counts = Counter(x.tolist())
    assert set(counts) == set(range(-3, 4)) and chi2_is_small(counts.values(), 10_000)
    with pytest.raises(ValueError, match=r"randint\(low=2, high=2\): the range is empty"):
        random.randint(random.key(5), 2, 2)


def test_permutations_are_permutations_and_equally_likely():
    keys = random.split(random.key(6), 6_000)
    counts = Counter(tuple(random.permutation(k, 3).tolist()) for k in keys)
    assert len(counts) == 6 and chi2_is_small(counts.values(), 1_000)
    assert sorted(random.permutation(random.key(0), 1000).tolist()) == list(range(1000))
    assert random.permutation(random.key(0), 0).tolist() == []


# --- edges --------------------------------------------------------------------------------------------------------

EXTREMES = [0, M, M >> 1, 1 << 63, 0xFFFFFFFF, 0xFFFFFFFF << 32, M << 11 & M, M << 40 & M, M << 56 & M]


@pytest.mark.parametrize("raw", EXTREMES)
def test_the_crafted_key_draws_these_bits(raw):
    assert unsigned(random.bits(key_with(raw), (1,))) == [raw]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("raw", EXTREMES)
def test_the_most_extreme_bits_stay_in_range(raw, dtype):
    key = key_with(raw)
    assert 0 <= random.uniform(key, (1,), dtype=dtype).item() < 1
    for low, high in ((1.0, 2.0), (-1.0, 1.0), (-0.3, 0.1), (1e3, 1e3 + 1)):
        x = random.uniform(key, (1,), dtype=dtype, low=low, high=high)
        bounds = torch.tensor([low, high], dtype=dtype)
        assert bounds[0] <= x < bounds[1] or bounds[0] == x == bounds[1], (low, high, x)
    assert random.exponential(key, (1,), dtype=dtype).item() > 0
    assert math.isfinite(random.exponential(key, (1,), dtype=dtype).item())
    assert math.isfinite(random.normal(key, (1,), dtype=dtype).item())
    assert 0 <= random.randint(key, 0, 10, (1,)).item() < 10
    assert not random.bernoulli(key, 0.0, (1,)) and random.bernoulli(key, 1.0, (1,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_uniforms_use_all_their_bits(dtype):
    x = random.uniform(random.key(7), (20_000,), dtype=dtype)
    assert x.dtype == dtype and x.max() < 1 and x.min() >= 0
    bits = {torch.float16: 11, torch.bfloat16: 8}[dtype]
    counts = Counter((x.double() * 2**bits).tolist())
    assert all(v.is_integer() for v in counts) and len(counts) > 0.99 * 2**bits
    assert abs(x.double().mean() - 0.5) < 0.01


def test_seeds_have_64_bits():
    assert torch.equal(random.key(-1), random.key(2**64 - 1))
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"a seed has 64 bits\. Use seed="):
            random.key(seed)


# --- compiled -----------------------------------------------------------------------------------------------------


def everything(key):
    a, b = random.split(key)
    return (
        random.fold_in(a, 3),
        random.bits(a, (7,)),
        random.uniform(b, (3, 2)),
        random.uniform(b, (9,), dtype=torch.bfloat16, low=-1.0, high=1.0),
        random.bernoulli(a, 0.3, (40,)),
        random.randint(b, 0, 1000, (5,)),
        random.permutation(a, 8),
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_draws_are_the_eager_ones(backend):
    """To the bit where only integers and one multiplication are involved; the logarithm of a normal is the device's."""
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    for seed in (0, 1):
        for got, expected in zip(compiled(random.key(seed)), everything(random.key(seed)), strict=True):
            assert torch.equal(got, expected)
    normals = torch.compile(
        lambda k: (random.normal(k, (50,)), random.exponential(k, (50,))), fullgraph=True, backend=backend
    )
    key = random.key(3)
    assert_close(normals(key), (random.normal(key, (50,)), random.exponential(key, (50,))), 1e-6)
