"""From rows to a batch: `stack`, and `pad_collate` for rows of different lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainfn._types import Batch

Collate = Callable[[Sequence[Any]], Batch]


def stack(rows: Sequence[Any]) -> Batch:
    """Stack rows into one batch, field by field: what a `loader` does by default.

    As torch's ``default_collate``, with three differences. A list of numbers is one tensor and not one tensor per
    position, Python floats become torch's default dtype, and tuples stay tuples. Strings are kept in a list.

    Raises:
        ValueError: If rows have different fields or shapes.
        TypeError: If a value is nothing that a tensor can hold.

    >>> stack([{"x": [1, 2], "y": 0.5}, {"x": [3, 4], "y": 1.5}])
    {'x': tensor([[1, 2],
            [3, 4]]), 'y': tensor([0.5000, 1.5000])}
    """
    if len(rows) == 0:
        raise ValueError('stack(rows): there are no rows. Use a sampler with last="drop" or "pad".')
    return _stack(rows, "")


def _stack(rows: Sequence[Any], name: str) -> Any:
    first = rows[0]
    if isinstance(first, Mapping):
        for i, row in enumerate(rows):
            if row.keys() != first.keys():
                raise ValueError(f"stack(rows): row 0 of the batch has the fields {sorted(first)}, row {i} has"
                                 f" {sorted(row)}. Give all rows the same fields with `transform=`.")  # fmt: skip
        return {field: _stack([row[field] for row in rows], _inner(name, field)) for field in first}
    if isinstance(first, tuple):
        if any(len(row) != len(first) for row in rows):
            raise ValueError(f"stack(rows): the tuples in {name or 'the rows'} differ in length. Give all rows the same"
                             " items with `transform=`.")  # fmt: skip
        items = [_stack([row[i] for row in rows], _inner(name, i)) for i in range(len(first))]
        return type(first)(*items) if hasattr(first, "_fields") else tuple(items)
    if isinstance(first, str | bytes):
        return list(rows)
    return _tensors(rows, name)


def _inner(name: str, field: Any) -> str:
    return f"{name}[{field!r}]" if name else str(field)


def _tensors(rows: Sequence[Any], name: str) -> Tensor:
    if isinstance(rows[0], bool | int | float):
        try:
            return torch.tensor(rows)
        except (TypeError, ValueError, RuntimeError):
            pass  # some row is of another kind; found below
    tensors = [_tensor(row, name, i) for i, row in enumerate(rows)]
    shape = tensors[0].shape
    for i, x in enumerate(tensors):
        if x.shape != shape:
            raise ValueError(
                f"stack(rows): the field {name or 'of the rows'!r} has shape {list(shape)} in row 0 of the batch and"
                f" {list(x.shape)} in row {i}. Give all rows one shape, or pad them:"
                f" loader(..., collate=tfn.data.pad_collate({{{name!r}: 0}}))."
            )
    return torch.stack(tensors)


def _tensor(value: Any, name: str, i: int) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, list) and value and isinstance(value[0], Tensor | np.ndarray):
            return torch.stack([torch.as_tensor(x) for x in value])
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"stack(rows): the field {name or 'of the rows'!r} is a {type(value).__name__} in row {i} of the batch,"
            f" which no tensor can hold ({error}). Drop it or make it a tensor with `transform=`, or pass your own"
            " `collate=`."
        ) from error


def pad_collate(
    pad: Mapping[str, float], *, length: int | None = None, multiple_of: int = 1, mask: str | None = None
) -> Collate:
    """A collate function that pads the named fields on the right, and stacks the others.

    Args:
        pad: What fills up each field that has different lengths, by name.
        length: Pad to this length: one shape for all batches. By default, to the longest row of the batch.
        multiple_of: Round the longest row's length up: few shapes.
        mask: The name of a field to add, ``int64[batch, length]``: 1 for what a row has, 0 for padding.

    Raises:
        ValueError: If a field is missing, or a row is longer than ``length``.

    >>> collate = pad_collate({"input_ids": 0, "labels": -100}, multiple_of=4)
    >>> collate([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])["labels"]
    tensor([[   1,    2,    3, -100],
            [   4, -100, -100, -100]])
    """
    call = f"pad_collate({dict(pad)}, length={length}, multiple_of={multiple_of})"
    if not pad or multiple_of < 1 or (length is not None and length < 1):
        raise ValueError(f'`{call}`: name a field at least, and lengths of 1 or more: pad_collate({{"input_ids": 0}}).')
    return functools.partial(_padded, pad=dict(pad), length=length, multiple_of=multiple_of, mask=mask)


def _padded(
    rows: Sequence[Mapping[str, Any]], *, pad: dict[str, float], length: int | None, multiple_of: int, mask: str | None
) -> Batch:
    out = [dict(row) for row in rows]
    for name, value in pad.items():
        for i, row in enumerate(out):
            if name not in row:
                raise ValueError(f"pad_collate: row {i} of the batch has no field {name!r}, but {sorted(row)}. Name"
                                 " the fields that the rows have.")  # fmt: skip
        columns = [torch.as_tensor(row[name]) for row in out]
        longest = max(len(x) for x in columns)
        if length is not None and longest > length:
            raise ValueError(f"pad_collate(length={length}): a row of the batch has {longest} in {name!r}. Cut the rows"
                             f" with `transform=`, or say length={longest}.")  # fmt: skip
        width = length if length is not None else -(-longest // multiple_of) * multiple_of
        for row, x in zip(out, columns, strict=True):
            row[name] = torch.cat([x, x.new_full((width - len(x), *x.shape[1:]), value)])
            if mask is not None:
                row[mask] = (torch.arange(width) < len(x)).long()
    return stack(out)
