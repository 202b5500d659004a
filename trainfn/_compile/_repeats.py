"""Find what repeats in a line of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int64]
_CALL = 6  # tokens: what each window costs, as a call at run time
_SHORT = 8  # tokens: shorter windows may be taken several at once
_BASE = np.uint64(6364136223846793005)


def repeats(tokens: Sequence[int], heavy: Sequence[bool], least: int) -> Iterator[list[range]]:
    """Yield sets of equal windows that don't overlap, those first that save most; ``heavy`` tokens should begin them.

    A set saves the tokens of all of its windows but one: at least ``least`` of them.
    """
    line = np.asarray(tokens, dtype=np.int64).copy()
    fresh = -1
    while (found := _best(line, heavy, least)) is not None:
        yield found
        for window in found:
            line[window.start : window.stop] = range(fresh, fresh - len(window), -1)
            fresh -= len(window)


def _best(line: _Ints, heavy: Sequence[bool], least: int) -> list[range] | None:
    best: list[range] | None = None
    most = least - 1
    seen: set[tuple[int, int]] = set()
    hashes = _Hashes(line)
    for start, length in _candidates(line, heavy):
        key = (length, hashes.of(start, length))
        if key in seen or len(line) - length <= most:
            continue
        seen.add(key)
        if _periodic(line[start : start + length]):
            continue  # several of a shorter window
        windows = hashes.occurrences(start, length)
        saved = (len(windows) - 1) * length - _CALL * len(windows)
        if saved > most:
            best, most = windows, saved
    return best


def _periodic(window: _Ints) -> bool:
    parts = (p for p in range(_SHORT, len(window) // 2 + 1) if window[p] == window[0])
    return any(np.array_equal(window[p:], window[:-p]) for p in parts)


def _candidates(line: _Ints, heavy: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Windows ``(start, length)`` that come again ``shift`` tokens later, for each shift and each longest such."""
    for shift in range(1, len(line)):
        equal = np.concatenate(([False], line[shift:] == line[:-shift], [False]))
        edges = np.flatnonzero(equal[1:] != equal[:-1])
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            length = stop - start
            if length < shift:
                yield start, length
                continue
            # One after the other: the first may begin anywhere in the slack, at a heavy token if there is one.
            slack = (length + shift) % shift
            yield next((s for s in range(start, start + slack + 1) if heavy[s]), start), shift


class _Hashes:
    """Hashes of all windows of a line, from its running sums."""

    def __init__(self, line: _Ints) -> None:
        with np.errstate(over="ignore"):
            mixed = (line.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            self._powers = np.concatenate(([np.uint64(1)], np.cumprod(np.full(len(line), _BASE, np.uint64))))
            self._sums = np.concatenate(([np.uint64(0)], np.cumsum(mixed * self._powers[:-1])))
        self._line = line

    def of(self, start: int, length: int) -> int:
        with np.errstate(over="ignore"):
            shifted = (self._sums[start + length] - self._sums[start]) * self._powers[len(self._line) - start]
        return int(shifted)

    def occurrences(self, start: int, length: int) -> list[range]:
        """Equal windows from the left, none over another."""
        count = len(self._line) - length + 1
        with np.errstate(over="ignore"):
            all_of = (self._sums[length:] - self._sums[:count]) * self._powers[len(self._line) - np.arange(count)]
        out: list[range] = []
        window = self._line[start : start + length]
        for at in np.flatnonzero(all_of == np.uint64(self.of(start, length))).tolist():
            if (not out or at >= out[-1].stop) and np.array_equal(self._line[at : at + length], window):
                out.append(range(at, at + length))
        return out
