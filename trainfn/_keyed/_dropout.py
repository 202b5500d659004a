"""Dropout in all its forms, attention's included, with keyed masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from trainfn._keyed._draws import Draws


def dropout_of(mask_shape: Callable[[Tensor], tuple[int, ...]]) -> Callable[..., Tensor]:
    def dropout(d: Draws, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return input
        keep = d.keep(1.0 - p, mask_shape(input), input.device)
        scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        out = torch.where(keep, input * scale, torch.zeros((), dtype=input.dtype, device=input.device))
        return input.copy_(out) if inplace else out

    return dropout


def channels(spatial: int) -> Callable[[Tensor], tuple[int, ...]]:
    """Whole channels drop together: the last ``spatial`` dimensions share one draw."""
    return lambda x: tuple(x.shape[:-spatial]) + (1,) * spatial


def alpha(whole_channels: bool) -> Callable[..., Tensor]:
    def alpha_dropout(d: Draws, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return input
        shape = tuple(input.shape[:2]) + (1,) * (input.dim() - 2) if whole_channels else tuple(input.shape)
        low = -1.7580993408473766  # -scale * alpha of SELU: what a dropped unit becomes
        a = ((1.0 - p) * (1.0 + p * low**2)) ** -0.5 if p < 1.0 else 0.0
        keep = d.keep(1.0 - p, shape, input.device)
        out = torch.where(keep, input, torch.full((), low, dtype=input.dtype, device=input.device)) * a - a * low * p
        return input.copy_(out) if inplace else out

    return alpha_dropout


def attention(
    d: Draws,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p == 0.0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, dim=-1)
    return d.by_rows(lambda: plain_dropout(d, weights, dropout_p)) @ value


plain_dropout = dropout_of(lambda x: tuple(x.shape))


def in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The variant of torch's with an underscore at its end."""

    def changed(d: Draws, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(function(d, input, *args, **kwargs))

    return changed


def kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch` has ``train`` as the name of an argument, where `torch.nn.functional` has ``training``."""

    def called(d: Draws, input: Tensor, p: float, train: bool) -> Tensor:
        return function(d, input, p, train)

    return called
