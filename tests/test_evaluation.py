"""Evaluation that draws, differentiates, or runs under autocast."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainfn as tfn

SGD = tfn.optim.sgd(0.1)


def noisy(p: Any, batch: Any) -> tfn.Mean:
    return tfn.Mean.of((p["w"] * torch.randn(len(batch)) + batch) ** 2)


@pytest.mark.parametrize("how", ["eager", "compiled", "plan"])
def test_a_stochastic_evaluation_does_not_depend_on_the_batch_size(how: str) -> None:
    state = tfn.init({"w": torch.ones(1)}, SGD)
    step: Any = tfn.eval_step(noisy, plan=tfn.Plan() if how == "plan" else None)
    step = tfn.jit(step, backend="eager") if how == "compiled" else step
    rows = torch.arange(12.0)
    whole = step(state, rows)["loss"]
    for sizes in ([12], [4, 4, 4], [5, 5, 2], [1] * 12):
        found = tfn.evaluate(step, state, rows.split(sizes))["loss"]
        torch.testing.assert_close(found.value.float(), whole.value)
        assert found.weight == 12


def test_an_evaluation_function_of_two_arguments_is_called_with_two() -> None:
    state = tfn.init({"w": torch.ones(1)}, SGD)
    step = tfn.eval_step(noisy)
    found = tfn.evaluate(lambda s, b: step(s, b), state, [torch.ones(3), torch.ones(2)])
    assert found["loss"].weight == 5


def energy_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def forces(model: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return g**2


def adapted(model: Any, x: Tensor) -> Tensor:
    """One inner step of MAML: derivatives by the parameters."""
    params = dict(model.named_parameters())
    inner = (torch.func.functional_call(model, params, (x,)) ** 2).mean()
    grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
    return torch.func.functional_call(model, moved, (x,)) ** 2


@pytest.mark.parametrize("values", [forces, adapted])
@pytest.mark.parametrize("grad", [None, True])
@pytest.mark.parametrize("how", ["eager", "compiled", "plan"])
def test_a_loss_that_differentiates_can_be_evaluated(values: Any, grad: bool | None, how: str) -> None:
    model = energy_model()
    x = torch.randn(6, 3)
    expected = values(model, x).mean()
    state = tfn.init(model, SGD)
    step: Any = tfn.eval_step(
        lambda m, b: tfn.Mean.of(values(m, b)), plan=tfn.Plan() if how == "plan" else None, grad=grad
    )
    step = tfn.jit(step, backend="eager") if how == "compiled" else step
    for _ in range(2):
        found = step(state, x)["loss"]
        torch.testing.assert_close(found.value, expected.detach())
        assert not found.total.requires_grad


def test_an_evaluation_without_derivatives_runs_without_autograd() -> None:
    seen = []

    def loss(p: Any, batch: Tensor) -> tfn.Mean:
        seen.append((torch.is_grad_enabled(), p["w"].requires_grad))
        return tfn.Mean.of(p["w"] * batch)

    state = tfn.init({"w": torch.ones(1)}, SGD)
    tfn.eval_step(loss)(state, torch.ones(2))
    tfn.eval_step(loss, grad=True)(state, torch.ones(2))
    assert seen == [(False, False), (True, True)]


def test_other_errors_and_derivatives_that_are_forbidden_are_raised() -> None:
    state = tfn.init(energy_model(), SGD)
    with pytest.raises(RuntimeError, match="does not require grad"):
        tfn.eval_step(lambda m, b: tfn.Mean.of(forces(m, b)), grad=False)(state, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tfn.eval_step(lambda m, b: tfn.Mean.of(m(b)))(state, torch.ones(2, 2))


@pytest.mark.parametrize("module", [True, False])
def test_an_autocast_around_the_steps_keeps_no_parameters_of_past_steps(module: bool) -> None:
    model = nn.Linear(16, 16, bias=False)
    seen: list[weakref.ref[Tensor]] = []

    def loss(m: Any, x: Tensor) -> tfn.Mean:
        weight = m.weight if module else m["weight"]
        seen.append(weakref.ref(weight))
        out = nn.functional.linear(x, weight)
        assert out.dtype == torch.bfloat16
        return tfn.Mean.of(out**2)

    state = tfn.init(model if module else {"weight": model.weight.detach()}, SGD)
    step, evaluation = tfn.train_step(loss, SGD), tfn.eval_step(loss, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        step(state, torch.ones(2, 16))
        evaluation(state, torch.ones(2, 16))
        gc.collect()
        assert [ref() for ref in seen] == [None, None]
