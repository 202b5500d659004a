"""The message of a broken law: what was run, what differs and by how much, the probable cause, and the fix."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainfn import tree
from trainfn.errors import LawViolation, shortened


def violation(law: str, headline: str, facts: Mapping[str, str], cause: str, fix: str) -> LawViolation:
    """The error of a broken law, formatted for reading."""
    rows = {**facts, "probable cause": cause, "fix": fix}
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {_wrapped(text, width + 4)}" for name, text in rows.items() if text]
    return LawViolation(f"{law}: {headline}\n\n  " + "\n  ".join(lines))


def _wrapped(text: str, indent: int) -> str:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 116 - indent) or [""]]
    return ("\n" + " " * indent).join(lines)


def shown(batch: Any) -> str:
    """A batch in a few lines: every leaf's dtype and shape, and its values where they are few."""
    named = tree.named_leaves(batch)
    return "\n".join(f"{name} = {_leaf(leaf)}" if name else _leaf(leaf) for name, leaf in named.items())


def _leaf(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    head = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    if leaf.numel() > 24 or leaf.is_meta:
        return head
    values = [round(v, 4) if isinstance(v, float) else v for v in leaf.detach().flatten().tolist()]
    return f"{head} {_nested(values, list(leaf.shape))}"


def _nested(values: list[Any], shape: list[int]) -> Any:
    if len(shape) <= 1:
        return values if shape else values[0]
    size = len(values) // shape[0] if shape[0] else 0
    return [_nested(values[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def differences(a: Any, b: Any) -> dict[str, str]:
    """The leaves in which two trees differ in any bit, with what differs."""
    left, right = tree.named_leaves(a), tree.named_leaves(b)
    found = {name: "is only in one of the two" for name in left.keys() ^ right.keys()}
    for name in left.keys() & right.keys():
        said = _difference(left[name], right[name])
        if said:
            found[name] = said
    return {name: found[name] for name in [*left, *right] if name in found}


def _difference(x: Any, y: Any) -> str:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return "" if type(x) is type(y) and (x is y or x == y) else f"{x!r} against {y!r}"
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return f"{x.dtype}{list(x.shape)} against {y.dtype}{list(y.shape)}"
    if same_bits(x, y):
        return ""
    if x.numel() == 1:
        return f"{x.item()!r} against {y.item()!r}"
    gap = (x.detach().double() - y.detach().double()).abs().nan_to_num(nan=float("inf"))
    return f"{int((gap > 0).sum())} of {x.numel()} elements, by up to {float(gap.max()):.3g}"


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one dtype and shape are equal, NaN being equal to NaN."""
    return torch.equal(x, y) or (
        x.is_floating_point()
        and torch.equal(x.isnan(), y.isnan())
        and torch.equal(x.double().nan_to_num(), y.double().nan_to_num())
    )


def listed(found: Mapping[str, str], most: int = 4) -> str:
    """The first few differences, one a line."""
    return shortened((f"{name or 'the value'}: {said}" for name, said in found.items()), most, str, "\n")
