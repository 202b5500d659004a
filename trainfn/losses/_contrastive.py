"""Losses in which the rows of a batch are each other's negatives.

Such a loss is **not additive over rows**: cut a batch in two and each row meets half the negatives. It is the
one kind of loss here whose value depends on the micro-batch, and on the number of ranks. Pass ``negatives``
of your own, from a queue or another encoder, and it is additive again.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from trainfn._marks import is_split_batch
from trainfn._types import Mean
from trainfn.errors import SplitWarning
from trainfn.losses._categorical import cross_entropy
from trainfn.losses._checks import check_float, shape, widen


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor,
    symmetric: bool = False,
    negatives: Tensor | None = None,
) -> Mean:
    """Cross entropy in nats, per row, of finding each query's own key among the others by cosine similarity.

    ======================== ================================= ======================
    negatives                a query is compared with          additive over rows
    ======================== ================================= ======================
    none                     all N keys of the batch           **no**
    ``negatives[M, D]``      its key and these M               yes, given the same M
    ``negatives[N, M, D]``   its key and its own M             yes
    ======================== ================================= ======================

    So without ``negatives`` accumulating over micro-batches, or adding ranks, gives another loss than one
    pass over the whole batch. A `SplitWarning` says so.

    Args:
        queries: ``queries[N, D]``; normalised here, so any length will do.
        keys: ``keys[N, D]``; row n is the positive of query n.
        temperature: What the similarities, in [-1, 1], are divided by; a tensor if it is learned. 0.07 is
            usual.
        symmetric: Average with the loss of finding each key's query, as CLIP does.
        negatives: Keys that no query should be close to.

    Raises:
        ValueError: If shapes disagree, the batch has one row and thus no negatives, the temperature is not
            positive, or ``symmetric`` meets explicit negatives.
        TypeError: If a tensor is not of a floating-point dtype.

    Source: https://arxiv.org/abs/1807.03748, eq. 4; symmetric, https://arxiv.org/abs/2103.00020.

    >>> loss = info_nce(torch.eye(3), torch.eye(3), temperature=1.0)
    >>> loss.weight.item(), round(loss.value.item(), 4)
    (3.0, 0.5514)
    """
    _check(queries, keys, temperature, symmetric, negatives)
    q, k = _unit(queries), _unit(keys)
    if negatives is not None:
        others = torch.einsum("nd,md->nm" if negatives.dim() == 2 else "nd,nmd->nm", q, _unit(negatives))
        similarity = torch.cat([(q * k).sum(-1, keepdim=True), others], 1)
        return cross_entropy(similarity / temperature, torch.zeros(len(q), dtype=torch.long, device=q.device))
    if is_split_batch():
        warnings.warn(
            f"`info_nce(queries, keys)` sees {len(q)} rows of a batch that is split into micro-batches or over ranks,"
            " and the rows are each other's negatives. Each row meets those of its own part only, so this trains"
            " another loss than the whole batch does. Pass `negatives=`, or write `accumulate=1` on one process.",
            SplitWarning,
            stacklevel=2,
        )
    similarity = q @ k.T / temperature
    own = torch.arange(len(q), device=q.device)
    loss = cross_entropy(similarity, own)
    return Mean((loss.total + cross_entropy(similarity.T, own).total) / 2, loss.weight) if symmetric else loss


def _unit(x: Tensor) -> Tensor:
    return F.normalize(widen(x), dim=-1)


def _check(
    queries: Tensor, keys: Tensor, temperature: float | Tensor, symmetric: bool, negatives: Tensor | None
) -> None:
    call = "info_nce(queries, keys)"
    check_float(call, "queries", queries)
    check_float(call, "keys", keys)
    if queries.dim() != 2 or queries.shape != keys.shape:
        raise ValueError(
            f"`{call}` got queries of shape {shape(queries)} and keys of shape {shape(keys)}, which can't be paired."
            " They must both be [N, D], with row n the positive of query n. Write keys[positive] to order them,"
            " x.flatten(0, -2) to make rows, and negatives= for further keys."
        )
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(
            f"`{call}` got temperature={temperature}, which the similarities are divided by and must be above"
            " 0. Write temperature=0.07."
        )
    if negatives is None:
        if len(queries) < 2:
            raise ValueError(
                f"`{call}` got {len(queries)} row, and a query's negatives are the other rows of its batch."
                " Use larger (micro-)batches, or pass negatives=."
            )
        return
    check_float(call, "negatives", negatives)
    num, dim = queries.shape
    if symmetric:
        raise ValueError(
            f"`{call}` got symmetric=True and negatives, which are negatives of the queries, not of the keys."
            " Write info_nce(q, k, negatives=other_k) + info_nce(k, q, negatives=other_q): its value is the"
            " average."
        )
    if negatives.shape[-1] != dim or negatives.shape[:-2] not in ((), (num,)):
        raise ValueError(
            f"`{call}` got negatives of shape {shape(negatives)} for queries of shape {shape(queries)}. Write"
            f" negatives[M, {dim}], shared by all queries, or negatives[{num}, M, {dim}]."
        )
