"""Counter-based randomness: a key is a value, a draw is a pure function of (key, shape).

The generator is SplitMix64 with its published splitting rule: a key is ``(seed, gamma)``, draw ``i`` is
``mix(seed + i * gamma)``. Only integer arithmetic makes the bits, so eager and compiled programs, CPUs and GPUs draw
the same ones. Draw ``i`` costs the same as draw 0. As in JAX, use a key once: either draw from it, or derive new keys
from it.

Source: Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

# The paper's constants as signed 64-bit integers; torch has no unsigned arithmetic to speak of.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64  # for numbers
_GAMMA_1, _GAMMA_2 = 0xFF51AFD7ED558CCD - 2**64, 0xC4CEB9FE1A85EC53 - 2**64  # for gammas
_FOLD = 0x2545F4914F6CDD1D  # keeps `fold_in` apart from `split` and from draws

_SIGNIFICANT_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def _shift(x: Tensor, bits: int) -> Tensor:
    """``x >>> bits``: a right shift that fills with zeros."""
    # Not `x >> bits`: torch_xla 2.9 rounds that towards 0.
    return torch.bitwise_right_shift(x, bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _mix_gamma(x: Tensor) -> Tensor:
    # The paper also flips bits of the 2 % of gammas with few changes between neighbours. We don't: counting them
    # takes more operations than all the rest, and `_mix` does not depend on it.
    x = (x ^ _shift(x, 33)) * _GAMMA_1
    x = (x ^ _shift(x, 33)) * _GAMMA_2
    return (x ^ _shift(x, 33)) | 1


def _derive(seed: Tensor) -> Tensor:
    return torch.stack([_mix(seed + _GOLDEN), _mix_gamma(seed + _GOLDEN + _GOLDEN)], dim=-1)


ROWS_AT: contextvars.ContextVar[int | None] = contextvars.ContextVar("rows_at", default=0)
"""The dimension of a draw inside a step that the batch's rows are in; see `rows_at`."""


@contextlib.contextmanager
def rows_at(dim: int | None) -> Generator[None]:
    """Say where the rows of a batch are in what torch's random functions draw in this block of a loss.

    A step draws for each row by its number, so that the update does not depend on how a batch is split. By default the
    rows are in dimension 0. In time-major tensors, ``[time, rows, ...]``, they are in dimension 1.

    Args:
        dim: The dimension, from 0 on. None: the draw has no rows, as a mask of weights, and every micro-batch of every
            rank draws the same.

    Raises:
        ValueError: If ``dim`` is negative.

    >>> import trainfn as tfn
    >>> def forward(dropout, x):  # x: [time, rows, width]
    ...     with tfn.random.rows_at(1):
    ...         return dropout(x)
    """
    if dim is not None and dim < 0:
        raise ValueError(f"rows_at({dim}): count the dimension from the front: 0, 1, ...; or None for no rows.")
    token = ROWS_AT.set(dim)
    try:
        yield
    finally:
        ROWS_AT.reset(token)


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """A key, ``int64[2]``, from any 64-bit integer seed.

    >>> key(0).shape
    torch.Size([2])
    """
    return _derive(_mix(torch.full((), _signed(seed), dtype=torch.int64, device=device) ^ _FOLD))


def _signed(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"key(seed={seed}): a seed has 64 bits. Use seed={seed % 2**64}, for example.")
    return seed - 2**64 if seed >= 2**63 else seed


def split(key: Tensor, num: int = 2) -> Tensor:
    """``num`` new keys, ``int64[num, 2]``, independent of one another.

    >>> left, right = split(key(0))
    """
    seed, gamma = key[..., 0], key[..., 1]
    return _derive(_mix(seed + (torch.arange(num, dtype=torch.int64, device=key.device) + 1) * gamma))


def fold_in(key: Tensor, data: Tensor | int) -> Tensor:
    """A new key for each value of ``data``: a step number, a row, a name's hash.

    >>> torch.equal(fold_in(key(0), 7), fold_in(key(0), torch.tensor(7)))
    True
    """
    seed, gamma = key[..., 0], key[..., 1]
    return _derive(_mix(_mix(seed ^ _FOLD) + data * gamma))


def bits(key: Tensor, shape: Sequence[int], *, first: Tensor | int = 0) -> Tensor:
    """Uniform 64-bit integers, ``int64[shape]``; element ``i`` (row-major) is draw number ``first + i``.

    >>> torch.equal(bits(key(0), (6,))[2:], bits(key(0), (4,), first=2))
    True
    """
    index = torch.arange(math.prod(shape), dtype=torch.int64, device=key.device) + (first + 1)
    return _mix(key[0] + index * key[1]).view(tuple(shape))


def _unit(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Map random bits to [0, 1): a multiple of 2**-p, with p the significant bits of ``dtype``."""
    precision = _SIGNIFICANT_BITS[dtype]
    return _shift(raw, 64 - precision).to(dtype) * 2.0**-precision


def uniform(
    key: Tensor,
    shape: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float32,
    low: float = 0.0,
    high: float = 1.0,
    first: Tensor | int = 0,
) -> Tensor:
    """Uniform numbers in ``[low, high)``, ``dtype[shape]``.

    >>> u = uniform(key(0), (1000,))
    >>> bool((0 <= u).all() and (u < 1).all())
    True
    """
    unit = _unit(bits(key, shape, first=first), dtype)
    if (low, high) == (0.0, 1.0):
        return unit
    out = unit * (high - low) + low
    return torch.where(out < high, out, low)  # the sum may round up to `high`: once in 2**p draws


def bernoulli(key: Tensor, p: float | Tensor, shape: Sequence[int] = (), *, first: Tensor | int = 0) -> Tensor:
    """``bool[shape]``, each true with probability ``p`` (a number, or a tensor broadcastable to ``shape``).

    >>> bernoulli(key(0), 1.0, (2,)).tolist()
    [True, True]
    """
    return uniform(key, shape, first=first) < p


def normal(
    key: Tensor,
    shape: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float32,
    mean: float | Tensor = 0.0,
    std: float | Tensor = 1.0,
    first: Tensor | int = 0,
) -> Tensor:
    """Normal numbers, ``dtype[shape]``, by Box and Muller's transform of one 64-bit draw each.

    The bits behind them are exact everywhere; the logarithm and cosine are the device's own.

    >>> normal(key(0), (10_000,)).std().round(decimals=1).item()
    1.0
    """
    raw = bits(key, shape, first=first)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    radius = torch.sqrt(-2.0 * torch.log((_shift(raw, 32).to(wide) + 0.5) * 2.0**-32))
    angle = (raw & 0xFFFFFFFF).to(wide) * (2.0 * math.pi * 2.0**-32)
    return (radius * torch.cos(angle)).to(dtype) * std + mean


def exponential(
    key: Tensor,
    shape: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float32,
    rate: float = 1.0,
    first: Tensor | int = 0,
) -> Tensor:
    """Exponential numbers of the given rate, ``dtype[shape]``, always positive.

    >>> bool((exponential(key(0), (100,)) > 0).all())
    True
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inner = (_shift(bits(key, shape, first=first), 41).to(wide) + 0.5) * 2.0**-23  # 24 bits: exact, never 0 or 1
    return (-torch.log(inner) / rate).to(dtype)


def randint(key: Tensor, low: int, high: int, shape: Sequence[int] = (), *, first: Tensor | int = 0) -> Tensor:
    """Integers in ``[low, high)``, ``int64[shape]``; the bias is below ``(high - low) / 2**63``.

    >>> set(randint(key(0), 3, 5, (100,)).tolist())
    {3, 4}
    """
    if high <= low:
        raise ValueError(f"randint(low={low}, high={high}): the range is empty. `high` is exclusive.")
    return _shift(bits(key, shape, first=first), 1) % (high - low) + low


def permutation(key: Tensor, n: int) -> Tensor:
    """A random order of ``0 … n-1``, ``int64[n]``.

    >>> sorted(permutation(key(0), 4).tolist())
    [0, 1, 2, 3]
    """
    return torch.argsort(bits(key, (n,)), stable=True)
