"""A law of a module: a step trains it as torch's plain loop does."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainfn import random, tree
from trainfn._compile import jit
from trainfn._keyed import keyed
from trainfn._module import init
from trainfn._step import train_step
from trainfn._types import Batch, Gradients, Loss, Mean, TrainState
from trainfn.errors import CaptureError, InexactLossWarning, UnreachedWarning, shortened
from trainfn.optim import add_decayed_weights, chain, scale_by_learning_rate, trace
from trainfn.testing._sums import of_whole
from trainfn.testing._violation import violation

_RATE, _MOMENTUM, _DECAY = 1e-2, 0.9, 0.1
_CAUSE = (
    "the module, or the loss, does something that a step does not see. It draws from a generator of its own, or keeps"
    " something between two calls in a Python variable. Or it changes a tensor outside of parameters and buffers."
)


class ModuleReport(NamedTuple):
    """The findings of `check_module`.

    Attributes:
        holds: What the module has, other than plain parameters and buffers, a line each.
        steps: How many steps were compared.
        compiled: Whether the compiled step was compared too; else why it could not be.
    """

    holds: tuple[str, ...]
    steps: int
    compiled: str

    def __repr__(self) -> str:
        lines = [f"{self.steps} steps equal those of torch's plain loop; {self.compiled}."]
        return "\n".join([*lines, *(f"  {line}" for line in self.holds)])


def check_module(
    model: nn.Module, loss: Loss, batch: Batch, *, steps: int = 3, compile: bool = True, tolerance: float = 1e-4
) -> ModuleReport:
    """Law: steps train a module as torch's plain loop does, whatever the module is made of.

    Both start from the module's numbers, take gradient descent with momentum and weight decay, and draw the same
    dropout. Compared are all parameters and buffers after every step.

    Args:
        model: The module; it is not changed.
        loss: ``loss(model, batch) -> Mean``.
        batch: A batch for it.
        steps: How many steps to compare.
        compile: Whether to compare the captured step too.
        tolerance: The largest difference that counts as rounding, relative to the largest number of a tensor.

    Returns:
        A report of what is out of the ordinary in the module: hooks, other references, parameters that the loss does
        not reach. Print it.

    Raises:
        LawViolation: Naming the tensors that differ.

    >>> import torch, trainfn as tfn
    >>> check_module(torch.nn.Linear(2, 1), lambda model, x: tfn.Mean.of(model(x) ** 2), torch.ones(4, 2))
    3 steps equal those of torch's plain loop; compiled too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreachedWarning)
        warnings.simplefilter("ignore", InexactLossWarning)
        with _as_found(model):
            wanted = list(_by_hand(model, loss, batch, steps))
        ours, sums = _by_steps(model, loss, batch, steps, lambda step: step)
        _compare(wanted, ours, "a step", tolerance)
        said = "not compiled, as asked"
        if compile:
            try:
                captured, _ = _by_steps(model, loss, batch, steps, lambda step: jit(step, backend="eager"))
            except CaptureError as error:
                said = f"it can't be compiled: {' '.join(str(error).split())}"
            else:
                _compare(wanted, captured, "a compiled step", tolerance)
                said = "compiled too"
    return ModuleReport(tuple(_held(model, sums)), steps, said)


@contextlib.contextmanager
def _as_found(model: nn.Module) -> Generator[None]:
    """Afterwards the module's tensors, gradients and modes are what they were; hooks do not survive a copy of it."""
    tensors = [(x, x.detach().clone(), x.grad) for _, x in _tensors(model)]
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, value, grad in tensors:
                x.copy_(value)
                x.grad = grad
        for module, mode in modes:
            module.training = mode


def _by_hand(model: nn.Module, loss: Loss, batch: Batch, steps: int) -> Iterator[dict[str, Tensor]]:
    """Torch's plain loop."""
    key, rows = random.key(0), tree.row_count(batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, _RATE, momentum=_MOMENTUM, weight_decay=_DECAY)
    modes = [(m, m.training or not model.training) for m in model.modules()]
    for n in range(steps):
        for module, mode in modes:
            module.training = mode
        optimizer.zero_grad()
        with torch.enable_grad(), keyed(random.fold_in(key, n), rows=rows):
            _value(loss(model, batch)).backward()
        optimizer.step()
        yield {name: x.detach().clone() for name, x in _tensors(model)}


def _value(out: Any) -> Tensor:
    """Return the mean that a loop in torch differentiates."""
    out = out[0] if type(out) is tuple else out
    return out.value if isinstance(out, Mean) else out


def _by_steps(
    model: nn.Module, loss: Loss, batch: Batch, steps: int, way: Callable[[Any], Any]
) -> tuple[list[dict[str, Tensor]], Gradients]:
    optimizer = chain(add_decayed_weights(_DECAY), trace(_MOMENTUM), scale_by_learning_rate(_RATE))
    state = init(model, optimizer)
    made = train_step(loss, optimizer)
    sums = of_whole(made.gradients)(state, batch)
    found: list[dict[str, Tensor]] = []
    step = way(made)
    for _ in range(steps):
        state, _ = step(state, batch)
        found.append(_of(state))
    return found, sums


def _of(state: TrainState) -> dict[str, Tensor]:
    return {**state.params, **state.buffers}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _compare(wanted: list[dict[str, Tensor]], ours: list[dict[str, Tensor]], what: str, tolerance: float) -> None:
    for n, (theirs, mine) in enumerate(zip(wanted, ours, strict=True)):
        wrong = {name: gap for name, x in theirs.items() if (gap := _gap(mine[name], x)) > tolerance}
        if wrong:
            lines = shortened(
                (f"{name}: by {gap:.3g} of its largest number" for name, gap in wrong.items()), 4, str, "\n"
            )
            raise violation(
                "check_module",
                f"{what} is not that of torch's plain loop after {n + 1} steps.",
                {"what differs": lines},
                _CAUSE,
                "keep in a buffer what is to be kept, and draw with torch's random functions inside of the loss",
            )


def _gap(a: Tensor, b: Tensor) -> float:
    if not (b.is_floating_point() or b.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    wide = torch.promote_types(b.dtype, torch.float64)
    a, b = a.to(wide), b.to(wide)
    largest = max(float(b.abs().max()) if b.numel() else 0.0, 1e-12)
    return float((a - b).abs().max()) / largest if b.numel() else 0.0


def _held(model: nn.Module, sums: Gradients) -> Iterator[str]:
    """Yield a line for each thing in a module that is out of the ordinary."""
    held = dict(model.named_parameters())
    found: dict[str, list[str]] = {
        "the loss does not reach": [name for name, grad in sums.grads.items() if grad is None],
        "frozen": [name for name, p in held.items() if not p.requires_grad],
        "hooks of parameters": [n for n, p in held.items() if p._backward_hooks or p._post_accumulate_grad_hooks],
        "Parameters of a class of their own": [name for name, p in held.items() if type(p) is not nn.Parameter],
        "Parameters with attributes": [name for name, p in held.items() if vars(p)],
        "complex": [name for name, p in held.items() if p.is_complex()],
        "written to by the forward pass": [*sums.written, *_written(held, sums)],
        "hooks of modules": [name or type(m).__name__ for name, m in model.named_modules() if _hooks(m)],
        "in eval mode": [n for n, m in model.named_modules() if model.training and not m.training],
    }
    aliases = len(init(model, scale_by_learning_rate(0.0), storage="adopt").aliases)
    for what, names in found.items():
        if names:
            yield f"{what}: {shortened(names, 4, repr)}"
    if aliases:
        yield f"other places that hold a parameter, and follow the state: {aliases}"


def _written(held: dict[str, nn.Parameter], sums: Gradients) -> list[str]:
    frozen = [name for name, p in held.items() if not p.requires_grad]
    return [name for name in frozen if not torch.equal(sums.buffers[name], held[name].detach())]


def _hooks(module: nn.Module) -> bool:
    return any(bool(value) for key, value in vars(module).items() if key.endswith("_hooks") and "state_dict" not in key)
