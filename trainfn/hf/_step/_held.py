"""Batches without tensors, such as lists of strings, which a step of tensors takes as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trainfn.hf._step._counting import has_tensor, row_count
from trainfn.hf._types import Batch

_ROWS, _INPUTS = "trainfn: rows", "trainfn: inputs"


def held(inputs: Batch) -> Batch:
    """A batch that a step takes: this one, or a tensor with as many rows beside it."""
    if has_tensor(inputs):
        return inputs
    try:
        rows = row_count(inputs)
    except TypeError:  # `exact_loss` says so, if the loss is not an exact mean
        rows = 1
    return {_ROWS: torch.zeros(rows), _INPUTS: lambda: inputs}


def opened(batch: Batch) -> Batch:
    """The batch that `held` was given."""
    return batch[_INPUTS]() if isinstance(batch, Mapping) and _INPUTS in batch else batch
