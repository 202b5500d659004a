"""A sum of different losses, each with a weight of its own."""

from __future__ import annotations

from collections.abc import Mapping

from trainfn._types import Mean, Total


def total(parts: Mapping[str, Mean]) -> Mean:
    """The sum of several losses, each divided by its own weight: ``Σ total / weight``.

    ``ce + mse`` pools two means into one, as the rows of one loss; this adds two different losses. It is exact for any
    split of the rows: a term is divided once, by its weight over all micro-batches and ranks. A term of weight 0 counts
    for nothing. The step reports each term among its metrics, under its name.

    With micro-batches or ranks there is a backward pass, and a copy of the gradients, for each term; without, there is
    one.

    Args:
        parts: Losses by name, each a scalar `Mean`, scaled as you like: ``0.5 * mse``; or a total of others.

    Raises:
        TypeError: If a part is not a `Mean`.
        ValueError: If there is no part, or one is not a scalar.

    >>> import torch, trainfn as tfn
    >>> ce, mse = tfn.Mean.of(torch.tensor([1.0, 3.0])), tfn.Mean.of(torch.tensor([10.0]))
    >>> total({"ce": ce, "mse": 0.5 * mse})
    Total(7 of 2 means)
    """
    if not isinstance(parts, Mapping):
        raise TypeError(
            f'`total(parts)` takes a dict of losses by name, not {type(parts).__name__}. Write `total({{"ce": ce,'
            ' "mse": 0.5 * mse})`.'
        )
    if not parts:
        raise ValueError('`total({})` has nothing to add. Write `total({"ce": ce, "mse": 0.5 * mse})`.')
    found: dict[str, Mean] = {}
    for name, part in parts.items():
        if isinstance(part, Total):
            found |= {f"{name}/{inner}": term for inner, term in (part.parts or dict(enumerate(part.terms))).items()}
        else:
            found[name] = _checked(name, part)
    return Total.joined(found)


def _checked(name: str, part: object) -> Mean:
    if not isinstance(part, Mean):
        raise TypeError(
            f"`total(parts)` got {name!r} of type {type(part).__name__}, which has no weight to be divided by. Write"
            " `tfn.Mean.of(values, mask)` of what you would have averaged. A penalty that no row has a part in, such as"
            " a norm of parameters, is `tfn.Mean(penalty, torch.ones(()))`."
        )
    if part.total.dim() or part.weight.dim():
        raise ValueError(
            f"`total(parts)` got {name!r} with a total of shape {list(part.total.shape)} and a weight of shape"
            f" {list(part.weight.shape)}; a loss is a scalar. Write `tfn.Mean(part.total.sum(), part.weight.sum())`."
        )
    return part
