"""Modules of every kind that real ones are of, and torch's plain loop, which says what a step of theirs is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainfn as tfn

ROWS = 8


class Kind(NamedTuple):
    """A module, a loss of it, and batches.

    Attributes:
        make: Makes the module.
        loss: ``(model, batch) -> Mean``.
        batch: ``n -> batch``.
        splits: Whether the sum of the parts of a batch is the batch.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[Any, Any], tfn.Mean]
    batch: Callable[[int], Any]
    splits: bool = True


def squares(model: Any, x: Any) -> tfn.Mean:
    return tfn.Mean.of(model(x) ** 2)


def floats(n: int) -> Tensor:
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(n))


def ids(n: int) -> Tensor:
    return torch.randint(0, 10, (ROWS,), generator=torch.Generator().manual_seed(n))


# --- parameters that a loss does not reach ------------------------------------------------------------------------


class Heads(nn.Module):
    """Which head is used depends on the batch, as that of a task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
        self.pooler = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.heads[batch["task"]](self.body(batch["x"]))


def tasks(n: int) -> dict[str, Any]:
    return {"x": floats(n), "task": "ab"[n % 2]}


# --- backward passes inside of a backward pass --------------------------------------------------------------------


class Recompute(torch.autograd.Function):
    """A checkpoint of one's own: it runs `backward` inside its backward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, block: Any) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(h)
        with torch.no_grad():
            return block(h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        h = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.block(h)
        torch.autograd.backward(out, g)
        return h.grad, None


class Inner(nn.Module):
    """A block that is computed again in the backward pass, over a frozen embedding, as under LoRA."""

    def __init__(self, how: str, frozen: bool) -> None:
        super().__init__()
        self.how = how
        self.emb = nn.Linear(4, 8).requires_grad_(not frozen)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        h = h if h.requires_grad or not torch.is_grad_enabled() else h.requires_grad_()
        if not torch.is_grad_enabled():
            return self.head(self.block(h))
        return self.head(Recompute.apply(h, self.block) if self.how == "own" else checkpoint(
            self.block, h, use_reentrant=self.how == "reentrant"))  # fmt: skip


def cached_gradients(model: Any, x: Tensor) -> tfn.Mean:
    """The gradients of the outputs first; a hook of the loss makes those of the weights, as GradCache does."""
    with torch.no_grad():
        out = model(x)
    out = out.detach().requires_grad_()
    total = (out**2).sum()
    if not total.requires_grad:
        return tfn.Mean.of(out**2)
    total.backward()
    grad = out.grad
    total = total.detach().requires_grad_()

    def hook(g: Tensor) -> None:
        with torch.enable_grad():
            (model(x) * grad).sum().mul(g).backward()

    total.register_hook(hook)
    return tfn.Mean(total, torch.tensor(float(out.numel())))


# --- hooks --------------------------------------------------------------------------------------------------------


def hooked(how: str) -> nn.Module:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 1))
    new = torch.zeros(10, 1)
    new[8:] = 1.0
    if how == "mask":
        model[0].weight.register_hook(lambda g: g * new)
    elif how == "clamp":  # of the mean's gradient, not of the sum's
        model[1].weight.register_hook(lambda g: g.clamp(-0.05, 0.05))
    elif how == "after":
        model[0].weight.register_post_accumulate_grad_hook(lambda p: (p.grad.mul_(new), None)[1])
    elif how == "dropped":
        model[1].bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    elif how == "module":
        model[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,))
        model[0].register_forward_hook(lambda m, i, o: o * 2)
    return model


# --- what a Parameter is ------------------------------------------------------------------------------------------


class Scaled(nn.Parameter):
    """A Parameter of a class of its own, with a number."""

    scale: float

    def __new__(cls, data: Tensor, scale: float = 1.0) -> Scaled:
        made = torch.Tensor._make_subclass(cls, data, True)
        made.scale = scale
        return made

    def __deepcopy__(self, memo: Any) -> Scaled:
        return type(self)(self.data.clone(), self.scale)


class Special(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = Scaled(torch.randn(4, 1), 0.5)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.frozen.shift = 3.0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.w, nn.Parameter) and isinstance(self.frozen, nn.Parameter)
        return (x + self.frozen * self.frozen.shift) @ self.w * self.w.scale  # type: ignore[attr-defined, operator]


# --- writes into parameters ---------------------------------------------------------------------------------------


class Clipped(nn.Module):
    """It clips its own weight, in one of the ways in which that is written."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.lin, self.how = nn.Linear(4, 1), how

    def forward(self, x: Tensor) -> Tensor:
        weight = self.lin.weight
        with torch.no_grad():
            if self.how == "clamp_":
                weight.clamp_(-0.1, 0.1)
            elif self.how == "torch.clamp_":
                torch.clamp_(weight, -0.1, 0.1)
            elif self.how == ".data.clamp_":
                weight.data.clamp_(-0.1, 0.1)
            elif self.how == ".detach().clamp_":
                weight.detach().clamp_(-0.1, 0.1)
            elif self.how == ".data =":
                weight.data = weight.data.clamp(-0.1, 0.1)
            elif self.how == "row":
                weight[0].mul_(0.5)
            elif self.how == "copy_":
                weight.copy_(weight.clamp(-0.1, 0.1))
        return self.lin(x)


class Momentum(nn.Module):
    """A key encoder that follows, as in MoCo and BYOL."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k = nn.Linear(4, 2), nn.Linear(4, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for q, k in zip(self.q.parameters(), self.k.parameters(), strict=True):
                with torch.no_grad():
                    if self.how == ".data =":
                        k.data = k.data * 0.5 + q.data * 0.5
                    else:
                        k.mul_(0.5).add_(q, alpha=0.5)
        return self.q(x) - self.k(x)


class ActNorm(nn.Module):
    """Its first batch sets its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.lin = nn.Parameter(torch.ones(4)), nn.Linear(4, 1)
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.copy_(torch.where(self.ready, self.scale, 1 / x.std(0)))
            self.ready.fill_(True)  # type: ignore[operator]
        return self.lin(x * self.scale)


# --- other references ---------------------------------------------------------------------------------------------


class Aliased(nn.Module):
    """It keeps its weight elsewhere too, and uses it from there."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.lin, self.how = nn.Linear(4, 1), how
        w = self.lin.weight
        if how == "list":
            self.held: Any = [w]
        elif how == "dict":
            self.held = {"w": w}
        elif how == "tuple":
            self.held = (w, 1)
        elif how == "nested":
            self.held = {"all": [(w, "decayed")]}
        elif how == "closure":
            self.held = lambda: w
        elif how == "partial":
            self.held = functools.partial(F.linear, weight=w)
        elif how == "attribute":
            object.__setattr__(self, "held", w)

    def again(self) -> Tensor:
        if self.how == "partial":
            return self.held(torch.eye(4))
        found = {"list": lambda: self.held[0], "dict": lambda: self.held["w"], "tuple": lambda: self.held[0],
                 "nested": lambda: self.held["all"][0][0], "closure": lambda: self.held(),
                 "attribute": lambda: self.held}[self.how]()  # fmt: skip
        return found.t()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + x @ self.again()

    def __deepcopy__(self, memo: Any) -> Aliased:
        made = Aliased(self.how)
        made.load_state_dict(self.state_dict())
        return made


class Recurrent(nn.Module):
    """A module of torch that keeps its weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, None])[0]


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.cfloat))
        self.lin = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin((x.to(torch.cfloat) @ self.w).abs())


class Norms(nn.Module):
    """A BatchNorm inside of a checkpoint, which runs twice in a step."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.reentrant and torch.is_grad_enabled() else x
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


KINDS: dict[str, Kind] = {
    "plain": Kind(lambda: nn.Linear(4, 1), squares, floats),
    "heads by task": Kind(Heads, squares, tasks),
    **{
        f"{how}, {'frozen' if frozen else 'trained'} embedding": Kind(
            functools.partial(Inner, how, frozen), squares, floats
        )
        for how in ("checkpoint", "reentrant", "own")
        for frozen in (False, True)
    },
    "cached gradients": Kind(lambda: nn.Linear(4, 2), cached_gradients, floats),
    **{f"hook: {how}": Kind(functools.partial(hooked, how), squares, ids) for how in ("mask", "after", "module")},
    "hook: clamp": Kind(functools.partial(hooked, "clamp"), squares, ids, splits=False),
    "hook: dropped": Kind(functools.partial(hooked, "dropped"), squares, ids),
    "class and attributes": Kind(Special, squares, floats),
    **{
        f"clip by {how}": Kind(functools.partial(Clipped, how), squares, floats)
        for how in ("clamp_", "torch.clamp_", ".data.clamp_", ".detach().clamp_", ".data =", "copy_")
    },
    "clip by row": Kind(functools.partial(Clipped, "row"), squares, floats, splits=False),
    "embedding with max_norm": Kind(
        lambda: nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Linear(4, 1)), squares, ids
    ),
    **{
        f"momentum encoder by {how}": Kind(functools.partial(Momentum, how), squares, floats, splits=False)
        for how in (".data =", "mul_")
    },
    **{
        f"alias in a {how}": Kind(functools.partial(Aliased, how), squares, floats)
        for how in ("list", "dict", "tuple", "nested", "closure", "partial", "attribute")
    },
    "recurrent": Kind(Recurrent, squares, floats),
    "complex": Kind(Complex, squares, floats),
    "batch norm in a checkpoint": Kind(functools.partial(Norms, False), squares, floats, splits=False),
    "batch norm in a reentrant checkpoint": Kind(functools.partial(Norms, True), squares, floats, splits=False),
    "actnorm": Kind(ActNorm, squares, floats, splits=False),
}


def by_hand(kind: Kind, module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> nn.Module:
    """Torch's plain loop."""
    module.train()
    for n in range(steps):
        optimizer.zero_grad()
        kind.loss(module, kind.batch(n)).value.backward()
        optimizer.step()
    return module


def twins(kind: Kind) -> tuple[nn.Module, nn.Module]:
    """The module twice, hooks included."""
    torch.manual_seed(0)
    one = kind.make()
    torch.manual_seed(0)
    other = kind.make()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    return one, other


class Late(nn.Module):
    """It begins to write into a parameter at its third call; counted by hand, as modules do that warm up."""

    def __init__(self, how: str, *, frozen: bool) -> None:
        super().__init__()
        self.lin, self.w, self.how, self.calls = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), how, 0
        self.w.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            with torch.no_grad():
                WRITES[self.how](self.w)
        return self.lin(x) * self.w


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(0.5),
    "torch.clamp_": lambda w: torch.clamp_(w, max=0.5),
    "foreach": lambda w: torch._foreach_mul_([w], 0.5),
    ".data.mul_": lambda w: w.data.mul_(0.5),
    "detach": lambda w: w.detach().mul_(0.5),
    "item": lambda w: w.__setitem__(0, 3.0),
    "view": lambda w: w.view(2, 2)[0].mul_(0.5),
    "out=": lambda w: torch.mul(w, 0.5, out=w),
    ".data =": lambda w: setattr(w, "data", w.data * 0.5),
    ".data[0]": lambda w: w.data.__setitem__(0, 3.0),
}
