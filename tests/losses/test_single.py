"""What holds for one loss only: memory, masks, coupling of rows, and every error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainfn import losses
from trainfn._types import Mean

randn, zeros, ones, tensor = torch.randn, torch.zeros, torch.ones, torch.tensor


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def head(n: int, dim: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = ((n, dim), (classes, dim), (classes,))
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes)
    y = torch.randint(0, classes, (n,), generator=g)
    y[n // 2] = -100
    return hidden, weight, bias, y


def test_linear_cross_entropy_memory_is_a_chunk() -> None:
    n, dim, classes, chunk = 256, 8, 64, 16
    hidden, weight, bias, y = head(n, dim, classes, torch.float32)
    with Largest() as seen:
        loss = losses.linear_cross_entropy(hidden, weight, y, bias=bias, chunk_size=chunk)
        torch.autograd.grad(loss.total, (hidden, weight, bias))
    assert seen.numel == max(n * dim, chunk * classes) < n * classes / 4
    with Largest() as seen:
        loss = losses.cross_entropy(F.linear(hidden, weight, bias), y)
        torch.autograd.grad(loss.total, (hidden, weight, bias))
    assert seen.numel == n * classes  # the measure does see logits where there are some


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_linear_cross_entropy_is_cross_entropy(chunk_size: int, label_smoothing: float) -> None:
    hidden, weight, bias, y = head(10, 3, 5)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "weights": torch.rand(10)}
    ours = losses.linear_cross_entropy(hidden, weight, y, bias=bias, chunk_size=chunk_size, **options)
    theirs = losses.cross_entropy(F.linear(hidden, weight, bias), y, **options)
    torch.testing.assert_close(ours, theirs)
    inputs = (hidden, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(ours.total, inputs), torch.autograd.grad(theirs.total, inputs))


def test_linear_cross_entropy_gradcheck() -> None:
    hidden, weight, bias, y = head(7, 3, 5)

    def fn(*inputs: Tensor) -> Tensor:
        h, w, b = inputs
        options: dict[str, Any] = {"bias": b, "chunk_size": 3, "label_smoothing": 0.1}
        return losses.linear_cross_entropy(h, w, y, weights=torch.arange(7), **options).total.sin()

    assert torch.autograd.gradcheck(fn, (hidden, weight, bias))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_linear_cross_entropy_with_frozen_parts(frozen: tuple[int, ...]) -> None:
    *parts, y = head(7, 3, 5)
    parts = [p.detach() if i in frozen else p for i, p in enumerate(parts)]
    learned = [p for p in parts if p.requires_grad]
    loss = losses.linear_cross_entropy(parts[0], parts[1], y, bias=parts[2], chunk_size=3)
    ours = torch.autograd.grad(loss.total, learned)
    torch.testing.assert_close(ours, torch.autograd.grad(losses.cross_entropy(F.linear(*parts), y).total, learned))


def test_linear_cross_entropy_without_gradients_or_twice() -> None:
    hidden, weight, bias, y = head(7, 3, 5)
    with torch.no_grad():
        assert not losses.linear_cross_entropy(hidden, weight, y, bias=bias).total.requires_grad
    total = losses.linear_cross_entropy(hidden, weight, y).total
    (grad,) = torch.autograd.grad(total * hidden.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_linear_cross_entropy_under_func_grad() -> None:
    hidden, weight, _, y = head(7, 3, 5)
    grad = torch.func.grad(lambda w: losses.linear_cross_entropy(hidden.detach(), w, y, chunk_size=2).total)
    exact = torch.func.grad(lambda w: losses.cross_entropy(F.linear(hidden.detach(), w), y).total)
    torch.testing.assert_close(grad(weight.detach()), exact(weight.detach()))


def test_linear_cross_entropy_sums_16_bit_gradients_in_32() -> None:
    """Many chunks are no worse than one, which an accumulator in bfloat16 would be by far."""
    *parts, y = head(512, 8, 16, torch.bfloat16)
    exact = losses.cross_entropy(F.linear(parts[0].double(), parts[1].double()), y)
    (truth,) = torch.autograd.grad(exact.total, parts[1])
    errors = []
    for chunk_size in (512, 4):
        loss = losses.linear_cross_entropy(parts[0], parts[1], y, chunk_size=chunk_size)
        (grad,) = torch.autograd.grad(loss.total, parts[1])
        errors.append((grad - truth).norm() / truth.norm())
    assert errors[1] < 1.5 * errors[0] < 0.02


def test_cross_entropy_of_images_and_of_one_row() -> None:
    logits, y = randn(2, 4, 5, 3), torch.randint(0, 3, (2, 4, 5))
    torch.testing.assert_close(losses.cross_entropy(logits, y).value, F.cross_entropy(logits.movedim(-1, 1), y))
    assert losses.cross_entropy(randn(3), tensor(1)).weight == 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integer_is_a_class_index(dtype: torch.dtype) -> None:
    logits, y = randn(3, 4, 5), torch.randint(0, 5, (3, 4))
    for loss in (losses.cross_entropy, losses.next_token):
        torch.testing.assert_close(loss(logits, y.to(dtype)), loss(logits, y))
    weight = randn(7, 5)
    ours = losses.linear_cross_entropy(logits, weight, y.to(dtype))
    torch.testing.assert_close(ours, losses.linear_cross_entropy(logits, weight, y))


def test_mask_hides_an_infinite_loss() -> None:
    logits = tensor([[0.0, float("-inf")], [0.0, 0.0]], requires_grad=True)
    loss = losses.cross_entropy(logits, tensor([1, 0]), weights=tensor([False, True]))
    assert loss.value.isfinite() and torch.autograd.grad(loss.total, logits)[0].isfinite().all()


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "binary_cross_entropy"])
def test_mask_hides_nan(name: str) -> None:
    """NaN on either side of a masked element reaches neither the loss nor the gradient."""
    nan = float("nan")
    x, y = tensor([1.0, nan, 2.0, 3.0], requires_grad=True), tensor([0.5, 0.5, nan, 1.0])
    loss = getattr(losses, name)(x, y, weights=~(x.isnan() | y.isnan()))
    assert loss.weight == 2 and loss.value.isfinite()
    (grad,) = torch.autograd.grad(loss.total, x)
    assert grad.isfinite().all() and (grad[1:3] == 0).all()


def test_next_token_weights_belong_to_the_predicted_token() -> None:
    logits, tokens = randn(2, 4, 5), torch.randint(0, 5, (2, 4))
    weights = torch.rand(2, 4)
    ours = losses.next_token(logits, tokens, weights=weights)
    cut = losses.cross_entropy(logits[:, :-1], tokens[:, 1:], weights=weights[:, 1:])
    torch.testing.assert_close(ours, cut)
    padded = losses.next_token(logits, tokens, weights=tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool())
    assert padded.weight == 3
    assert losses.next_token(logits, tokens, weights=tensor([[True], [False]])).weight == 3


def test_kl_takes_log_probabilities_and_counts_rows() -> None:
    logits, q = randn(2, 3, 4), randn(2, 3, 4).softmax(-1)
    q[0, 0] = tensor([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(losses.kl(logits, q), losses.kl(logits.log_softmax(-1), q))
    assert losses.kl(logits, q).weight == 6
    torch.testing.assert_close(losses.kl(logits, logits.softmax(-1)).total, zeros(()), atol=1e-6, rtol=0)


def test_binary_cross_entropy_takes_booleans_and_scalar_pos_weight() -> None:
    logits, y = randn(3, 2), tensor([[True, False], [False, True], [True, True]])
    ours = losses.binary_cross_entropy(logits, y, pos_weight=tensor(3.0)).value
    theirs = F.binary_cross_entropy_with_logits(logits, y.float(), pos_weight=tensor(3.0))
    torch.testing.assert_close(ours, theirs)


def test_info_nce_adds_up_only_with_explicit_negatives() -> None:
    q, k, negatives = randn(6, 4), randn(6, 4), randn(5, 4)

    def halves(**kw: Any) -> Mean:
        return sum(losses.info_nce(q[i : i + 3], k[i : i + 3], temperature=0.1, **kw) for i in (0, 3))  # type: ignore[return-value]

    whole = losses.info_nce(q, k, temperature=0.1)
    assert halves().weight == whole.weight and halves().total < whole.total  # fewer negatives: an easier task
    assert halves(symmetric=True).total < losses.info_nce(q, k, temperature=0.1, symmetric=True).total
    torch.testing.assert_close(halves(negatives=negatives), losses.info_nce(q, k, temperature=0.1, negatives=negatives))


def test_info_nce_learns_its_temperature() -> None:
    temperature = tensor(0.5, requires_grad=True)
    loss = losses.info_nce(randn(4, 3), randn(4, 3), temperature=temperature)
    assert torch.autograd.grad(loss.total, temperature)[0] != 0


ce, nt, lce, kl = losses.cross_entropy, losses.next_token, losses.linear_cross_entropy, losses.kl
mse, bce, nce = losses.mse, losses.binary_cross_entropy, losses.info_nce
z, y3 = zeros(3, 4), zeros(3, dtype=torch.long)
ERRORS: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, "[3, 4] and integer targets of shape [5]", lambda: ce(z, y3.new_zeros(5))),
    (
        ValueError,
        "targets of shape [3, 2], one class per row",
        lambda: ce(zeros(3, 2, 4), y3.new_zeros(3, 7)),
    ),
    (ValueError, "write logits.movedim(1, -1)", lambda: ce(zeros(3, 4, 7), y3.new_zeros(3, 7))),
    (ValueError, "write logits.movedim(1, -1)", lambda: ce(zeros(2, 9, 4, 7), y3.new_zeros(2, 4, 7))),
    (ValueError, "targets.argmax(-1)", lambda: ce(z, z.long())),
    (ValueError, "`binary_cross_entropy(logits, targets)`", lambda: ce(zeros(3, 1), y3)),
    (ValueError, "fewer than two", lambda: ce(zeros(()), y3)),
    (TypeError, "write targets.long()", lambda: ce(z, y3.float())),
    (TypeError, "targets of dtype torch.bool", lambda: ce(z, y3.bool())),
    (TypeError, "not its argmax", lambda: ce(z.long(), y3)),
    (ValueError, "class_weights of shape [3]", lambda: ce(z, y3, class_weights=ones(3))),
    (ValueError, "class_weights.detach()", lambda: ce(z, y3, class_weights=ones(4, requires_grad=True))),
    (ValueError, "label_smoothing=1.0", lambda: ce(z, y3, label_smoothing=1.0)),
    (ValueError, "label_smoothing=-0.1", lambda: lce(z, zeros(5, 4), y3, label_smoothing=-0.1)),
    (ValueError, "label_smoothing=2", lambda: bce(z, z, label_smoothing=2)),
    (ValueError, "Write weights=mask", lambda: ce(z, z, ignore_index=0)),
    (ValueError, "weights of shape [4]", lambda: ce(z, y3, weights=ones(4))),
    (ValueError, "weights[:, None]", lambda: ce(zeros(3, 3, 4), y3.new_zeros(3, 3), weights=ones(3))),
    (ValueError, "weights.detach()", lambda: ce(z, y3, weights=ones(3, requires_grad=True))),
    (ValueError, "`next_token(logits, tokens)` got", lambda: nt(zeros(2, 3, 4), y3.new_zeros(2, 2))),
    (ValueError, "tokens of shape []", lambda: nt(zeros(4), y3[0])),
    (
        ValueError,
        "for tokens of shape [2, 3]",
        lambda: nt(zeros(2, 3, 4), y3.new_zeros(2, 3), weights=ones(3)),
    ),
    (ValueError, "Write weight.T", lambda: lce(z, zeros(4, 5), y3)),
    (ValueError, "Write linear.weight", lambda: lce(z, zeros(5), y3)),
    (ValueError, "got bias of shape [4]", lambda: lce(z, zeros(5, 4), y3, bias=zeros(4))),
    (ValueError, "chunk_size=0", lambda: lce(z, zeros(5, 4), y3, chunk_size=0)),
    (ValueError, "one class per row", lambda: lce(z, zeros(5, 4), y3[:2])),
    (TypeError, "write targets.long()", lambda: lce(z, zeros(5, 4), y3.float())),
    (TypeError, "targets.float()", lambda: kl(z, z.long())),
    (ValueError, "got logits of shape [3, 4] and targets of shape [3]", lambda: kl(z, zeros(3))),
    (ValueError, "write predictions.view_as(targets)", lambda: mse(zeros(3), zeros(3, 1))),
    (ValueError, "write targets.view_as(predictions)", lambda: mse(zeros(3, 1), zeros(3))),
    (ValueError, "write targets.expand_as(predictions)", lambda: losses.mae(z, zeros(4))),
    (TypeError, "predictions of dtype torch.int64", lambda: mse(y3, y3)),
    (ValueError, "weights[:, None]", lambda: mse(z, z, weights=ones(3))),
    (ValueError, "delta=0", lambda: losses.huber(z, z, delta=0)),
    (ValueError, "`binary_cross_entropy(logits, targets)` got", lambda: bce(zeros(3, 1), zeros(3))),
    (ValueError, "pos_weight of shape [3]", lambda: bce(z, z, pos_weight=ones(3))),
    (ValueError, "pos_weight.detach()", lambda: bce(z, z, pos_weight=ones(4, requires_grad=True))),
    (ValueError, "keys of shape [2, 4]", lambda: nce(z, z[:2], temperature=1.0)),
    (TypeError, "queries of dtype", lambda: nce(z.long(), z, temperature=1.0)),
    (ValueError, "temperature=0", lambda: nce(z, z, temperature=0)),
    (ValueError, "got 1 row", lambda: nce(z[:1], z[:1], temperature=1.0)),
    (
        ValueError,
        "symmetric=True and negatives",
        lambda: nce(z, z, temperature=1.0, symmetric=True, negatives=z),
    ),
    (ValueError, "negatives[M, 4]", lambda: nce(z, z, temperature=1.0, negatives=zeros(2, 5))),
    (ValueError, "negatives[3, M, 4]", lambda: nce(z, z, temperature=1.0, negatives=zeros(2, 7, 4))),
]


@pytest.mark.parametrize(("error", "message", "call"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_errors_say_what_to_write(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
