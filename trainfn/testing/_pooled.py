"""Find losses that were added by ``+`` though they are different ones."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

from trainfn._types import Batch, Mean
from trainfn.testing._sums import Subject, attempt

_Kind = tuple[frozenset[str], frozenset[int]]


def pooled(subject: Subject, row: Batch) -> tuple[str, str] | None:
    """Two different losses of one row that the loss adds by ``+``, in words; None if there are none.

    A loss that is cut into chunks adds means of equal kind: the same operations on the same parameters.
    """
    kinds: dict[int, list[tuple[Mean, _Kind]]] = {}
    held, found = list[Mean](), list[tuple[str, str]]()
    add = Mean.__add__

    def spy(self: Mean, other: object) -> Mean:
        out = add(self, other)
        mine = [pair for mean in (self, other) if isinstance(mean, Mean) for pair in _known(kinds, mean)]
        odd = next((pair for pair in mine[1:] if pair[1] != mine[0][1]), None)
        if odd is not None:
            found.append((repr(mine[0][0]), repr(odd[0])))
        kinds[id(out)] = mine
        held.append(out)  # or another mean could get its identity
        return out

    with mock.patch.object(Mean, "__add__", spy):
        attempt(lambda: subject.sums(row))
    return found[0] if found else None


def _known(kinds: dict[int, list[tuple[Mean, _Kind]]], mean: Mean) -> list[tuple[Mean, _Kind]]:
    if id(mean) in kinds:
        return kinds[id(mean)]
    counts = mean.total.requires_grad and mean.weight.dim() == 0 and float(mean.weight) != 0
    return [(mean, _kind(mean.total))] if counts else []


def _kind(total: Tensor) -> _Kind:
    names, leaves, seen, ahead = set[str](), set[int](), set[Any](), list[Any]([total.grad_fn])
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        ahead += [function for function, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
    return frozenset(names), frozenset(leaves)
