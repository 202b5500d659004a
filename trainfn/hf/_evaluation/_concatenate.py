"""Concatenate the outputs of many batches, padded where their shapes differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from trainfn.hf._types import Nested

Array: TypeAlias = npt.NDArray[np.generic]
PADDING = -100  # what fills ragged outputs, as in transformers


def merged(batches: Sequence[Nested]) -> Nested:
    """Return one tree of arrays with the rows of all batches; rows shorter than the longest end in `PADDING`."""
    first = batches[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        items = {name: merged([batch[name] for batch in batches]) for name in cast("Mapping[str, Nested]", first)}
        return type(first)(items)  # type: ignore[call-arg]
    if isinstance(first, tuple | list):
        return type(first)(merged(parts) for parts in zip(*batches, strict=True))
    return _concatenated([np.atleast_1d(batch) for batch in batches])


def _concatenated(arrays: Sequence[Array]) -> Array:
    widths = [array.shape[1:] for array in arrays]
    if len(set(widths)) == 1:
        return np.concatenate(arrays)
    # One allocation for all: to concatenate batch by batch would copy all rows so far at each batch.
    shape = (sum(len(array) for array in arrays), *np.max(widths, axis=0))
    full = np.full(shape, PADDING, dtype=np.result_type(*arrays))
    start = 0
    for array in arrays:
        full[(slice(start, start + len(array)), *map(slice, array.shape[1:]))] = array
        start += len(array)
    return full


def no_tensor(tree: Nested) -> object | None:
    """Return the first value in a tree that is neither a tensor nor None; None if there is no such value."""
    if isinstance(tree, Mapping):
        tree = tuple(cast("Mapping[str, Nested]", tree).values())
    if isinstance(tree, tuple | list):
        found = (no_tensor(part) for part in cast("Sequence[Nested]", tree))
        return next((odd for odd in found if odd is not None), None)
    return None if isinstance(tree, torch.Tensor) else tree


def check_tensors(tree: Nested) -> None:
    """Refuse outputs that can't be concatenated.

    Raises:
        TypeError: If a value in the tree is not a tensor.
    """
    odd = no_tensor(tree)
    if odd is not None:
        raise TypeError(
            f"`trainer.evaluation_loop(...)` keeps tensors, and tuples, lists and dicts of tensors, but was given "
            f"a {type(odd).__name__}, which can't be concatenated. Return `torch.as_tensor(value)` in its place, or "
            "leave it out, in the `forward`, `prediction_step` or `preprocess_logits_for_metrics` that made it."
        )
