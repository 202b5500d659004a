"""Random bits and permutations by counting, on the host: `trainfn.random` in NumPy, bit for bit.

Only integer arithmetic modulo 2**64 is used, so every machine, process and NumPy version gets the same bits. Element
10**12 costs as much as element 0.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trainfn import random

Ints: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]  # the last dimension of a key is 2: (seed, gamma)

_wraps = np.errstate(over="ignore")  # arithmetic modulo 2**64 is what we want; NumPy warns about it for scalars


def _word(x: int) -> np.uint64:
    return np.uint64(x % 2**64)


_GOLDEN, _FOLD = _word(random._GOLDEN), _word(random._FOLD)
_MIX = _word(random._MIX_1), _word(random._MIX_2)
_GAMMA = _word(random._GAMMA_1), _word(random._GAMMA_2)
_27, _30, _31, _33 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(33)


def _mix(x: Any) -> Any:
    x = (x ^ (x >> _30)) * _MIX[0]
    x = (x ^ (x >> _27)) * _MIX[1]
    return x ^ (x >> _31)


def _mix_gamma(x: Any) -> Any:
    x = (x ^ (x >> _33)) * _GAMMA[0]
    x = (x ^ (x >> _33)) * _GAMMA[1]
    return (x ^ (x >> _33)) | np.uint64(1)


def _derive(seed: Any) -> Words:
    return np.stack([_mix(seed + _GOLDEN), _mix_gamma(seed + _GOLDEN + _GOLDEN)], axis=-1)


@_wraps
def key(seed: int) -> Words:
    """`trainfn.random.key`."""
    return _derive(_mix(_word(seed) ^ _FOLD))


@_wraps
def fold_in(key: Words, data: int | Ints) -> Words:
    """`trainfn.random.fold_in`: a new key for each value, ``uint64[..., 2]``."""
    data = _word(data) if isinstance(data, int) else data.astype(np.uint64)  # pyright: ignore[reportAssignmentType]
    return _derive(_mix(_mix(key[..., 0] ^ _FOLD) + data * key[..., 1]))


@_wraps
def bits(key: Words, numbers: Ints) -> Words:
    """The draws with these numbers: ``bits(key, arange(n))`` is `trainfn.random.bits` of shape ``[n]``."""
    return _mix(key[0] + (numbers.astype(np.uint64) + np.uint64(1)) * key[1])


def permute(key: Words, n: int, positions: Ints) -> Ints:
    """Where a random permutation of ``range(n)`` sends these positions; no list of n numbers is made.

    A Feistel network over pairs (left, right) with ``a * b >= n`` and as little to spare as can be. Each round adds a
    function of one half to the other. That can be undone, so the network is a bijection. A value that lands at n or
    above is sent through again (cycle walking). That takes few passes: the pairs outnumber n by less than its square
    root.

    Source: Black, Rogaway: "Ciphers with arbitrary finite domains", CT-RSA 2002, section 5.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    # Tiny n need more rounds until every permutation is equally likely; tests/data/test_bits.py measures it.
    round_keys = bits(key, np.arange(8 if n > 1024 else 24))
    out = positions.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        out[todo] = _network(round_keys, np.uint64(a), np.uint64(b), out[todo])
        todo = todo[out[todo] >= np.uint64(n)]
    return out.astype(np.int64)


@_wraps
def _network(round_keys: Words, a: np.uint64, b: np.uint64, x: Words) -> Words:
    left, right = x // b, x % b
    for i in range(0, len(round_keys), 2):
        left = (left + _mix(right + round_keys[i]) % a) % a
        right = (right + _mix(left + round_keys[i + 1]) % b) % b
    return left * b + right
