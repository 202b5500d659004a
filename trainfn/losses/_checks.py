"""The checks of every loss before it computes: shapes, dtypes and ranges, never a tensor's values.

So nothing here waits for a device, and all of it vanishes when a step is compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is: losses are never summed in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shape(x: Tensor) -> str:
    """A tensor's shape as messages show it."""
    return str(list(x.shape))


def check_float(call: str, name: str, x: Tensor) -> None:
    """Refuse logits or predictions that are not floating-point numbers."""
    if not x.is_floating_point():
        raise TypeError(
            f"`{call}` got {name} of dtype {x.dtype}, which has no gradient. Pass the network's output"
            f" itself, not its argmax; if it really is a number, write {name}.float()."
        )


def check_same_shape(call: str, name: str, x: Tensor, targets: Tensor) -> None:
    """Refuse to broadcast: [N] against [N, 1] would silently become [N, N]."""
    if x.shape == targets.shape:
        return
    if x.numel() == targets.numel():
        fix = f"targets.view_as({name})" if x.dim() > targets.dim() else f"{name}.view_as(targets)"
        fix = f"Both have {x.numel()} elements: write {fix} if they are in the same order."
    else:
        fix = f"If you mean to broadcast, write targets.expand_as({name})."
    raise ValueError(
        f"`{call}` got {name} of shape {shape(x)} and targets of shape {shape(targets)}. It compares element"
        " with element and never broadcasts, for [N] against [N, 1] would silently average N * N pairs."
        f" {fix}"
    )


def check_weights(call: str, weights: Tensor | None, like: Tensor, name: str = "targets") -> None:
    """Refuse weights that don't line up with ``like`` dimension by dimension, or that want a gradient."""
    if weights is None:
        return
    sizes = zip(weights.shape, like.shape, strict=False)
    if weights.dim() != like.dim() or any(w not in (1, n) for w, n in sizes):
        per_row = f"weights[:{', None' * (like.dim() - 1)}]"
        raise ValueError(
            f"`{call}` got weights of shape {shape(weights)} for {name} of shape {shape(like)}. Every"
            " dimension must be the same or 1, and none may be left out, for rows and columns are easily"
            f" confused. If there is one weight per row, write {per_row}; if they have the right number"
            f" already, weights.view({shape(like)})."
        )
    check_constant(call, "weights", weights)


def check_constant(call: str, name: str, x: Tensor) -> None:
    """Refuse weights with a gradient, which would be lost: only the total is differentiated."""
    if x.requires_grad:
        raise ValueError(
            f"`{call}` got {name} that require a gradient. A mean's weight is a constant: only its total is"
            f" differentiated. Write {name}.detach(), or multiply a loss of your own and return"
            " `Mean.of(values)`."
        )


def check_smoothing(call: str, label_smoothing: float) -> None:
    """Refuse a label smoothing that leaves nothing of the labels."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            f"`{call}` got label_smoothing={label_smoothing}, which must lie in [0, 1): it is the share of"
            " each target spread evenly over all classes. Write label_smoothing=0.1 for ten percent."
        )


def check_class_indices(call: str, logits: Tensor, targets: Tensor, name: str = "targets") -> None:
    """Refuse targets that don't name one class per row of ``logits[..., C]``."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(
            f"`{call}` got {name} of dtype {targets.dtype} and shape {shape(targets)} for logits of shape"
            f" {shape(logits)}. Class indices are integers: write {name}.long(). Probabilities have the shape"
            " of the logits; for a yes-or-no question per element there is `binary_cross_entropy`."
        )
    if targets.shape == logits.shape[:-1]:
        return
    if targets.shape == logits.shape:
        fix = f"They look one-hot: write {name}.argmax(-1), or {name}.float() to have probabilities."
    elif logits.dim() > 2 and logits.movedim(1, -1).shape[:-1] == targets.shape:
        fix = "Here the class dimension comes last, where torch has it second: write logits.movedim(1, -1)."
    else:
        fix = f"Write {name} of shape {list(logits.shape[:-1])}, one class per row."
    raise ValueError(
        f"`{call}` got logits of shape {shape(logits)} and integer {name} of shape {shape(targets)}, but"
        f" logits[..., C] take {name}[...]. {fix}"
    )


def check_probabilities(call: str, logits: Tensor, targets: Tensor) -> None:
    """Refuse targets that don't hold one probability per element of ``logits[..., C]``."""
    if not targets.is_floating_point():
        raise TypeError(
            f"`{call}` got targets of dtype {targets.dtype}, but they are probabilities, one per class. For"
            " class indices write `cross_entropy(logits, targets)`; for one-hot targets, targets.float()."
        )
    check_same_shape(call, "logits", logits, targets)


def check_classes(call: str, logits: Tensor) -> None:
    """Refuse a softmax over nothing or over a single class, which is constant."""
    if logits.dim() == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"`{call}` got logits of shape {shape(logits)}, whose last dimension holds the classes: with"
            " fewer than two the loss is 0 whatever the network says. For one yes-or-no logit per row write"
            " `binary_cross_entropy(logits, targets)`."
        )


def check_no_ignore(call: str, ignore_index: int) -> None:
    """Refuse to ignore an index where there are none."""
    if ignore_index != -100:
        raise ValueError(
            f"`{call}` got ignore_index={ignore_index} and floating-point targets, which are probabilities"
            " and name no index to ignore. Write weights=mask, with 0 for each row to leave out."
        )


def check_class_weights(call: str, class_weights: Tensor, logits: Tensor) -> None:
    """Refuse class weights that are not one constant number per class."""
    if class_weights.shape != logits.shape[-1:]:
        raise ValueError(
            f"`{call}` got class_weights of shape {shape(class_weights)} for logits of shape {shape(logits)}:"
            f" there must be one per class, that is [{logits.shape[-1]}]. For a weight per row write"
            " weights=."
        )
    check_constant(call, "class_weights", class_weights)
