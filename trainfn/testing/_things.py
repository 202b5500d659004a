"""Strategies for what a step is made of: modules, trees, states, schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from trainfn import random, tree
from trainfn import schedules as _schedules
from trainfn._module import init
from trainfn._types import Schedule, TrainState, Transform, Tree


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _architectures(features: int, outputs: int) -> list[Callable[[], nn.Module]]:
    return [
        lambda: nn.Linear(features, outputs),
        lambda: nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, outputs)),
        lambda: nn.Sequential(nn.Linear(features, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, outputs, bias=False)),
        lambda: nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, outputs)),
    ]


def modules(*, features: int = 4, outputs: int = 3) -> SearchStrategy[nn.Module]:
    """Strategy: small modules ``float[rows, features] -> float[rows, outputs]``; shrinks to one linear layer.

    All treat each row by itself; some have dropout.

    >>> from hypothesis import given
    >>> @given(modules())
    ... def test(module):
    ...     assert module(torch.zeros(2, 4)).shape == (2, 3)
    >>> test()
    """
    makers = st.sampled_from(_architectures(features, outputs))
    return st.tuples(makers, st.integers(0, 2**16)).map(lambda drawn: _seeded(*drawn))


def default_module() -> nn.Module:
    """The module that laws use when they are given none."""
    return _seeded(_architectures(4, 3)[1], 0)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)


def tensors(dtypes: tuple[torch.dtype, ...] = _DTYPES) -> SearchStrategy[Tensor]:
    """Strategy: small tensors of up to three dimensions, empty ones among them; shrinks to ``tensor(0.)``.

    >>> from hypothesis import given
    >>> @given(tensors())
    ... def test(x):
    ...     assert x.dim() <= 3
    >>> test()
    """
    shapes = st.lists(st.integers(0, 3), max_size=3)
    values = st.integers(0, 2**16)

    def make(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
        drawn = random.randint(random.key(seed), -4, 5, shape) if seed else torch.zeros(shape, dtype=torch.int64)
        return (drawn % 2 == 1) if dtype == torch.bool else drawn.to(dtype)

    return st.builds(make, st.sampled_from(dtypes), shapes, values)


def trees(
    leaves: SearchStrategy[Any] | None = None, *, max_leaves: int = 6
) -> SearchStrategy[Tree]:  # fmt: skip
    """Strategy: nested dicts, lists and tuples of tensors; shrinks to a single leaf.

    >>> from hypothesis import given
    >>> @given(trees())
    ... def test(t):
    ...     assert tree.leaves(tree.copy(t)) is not None
    >>> test()
    """
    names = st.sampled_from(["a", "b", "weight", "0", "layer.1"])

    def grow(inner: SearchStrategy[Any]) -> SearchStrategy[Any]:
        several = st.lists(inner, max_size=3)
        return st.one_of(st.dictionaries(names, inner, max_size=3), several, several.map(tuple))

    return st.recursive(tensors() if leaves is None else leaves, grow, max_leaves=max_leaves)


def states(
    module: nn.Module | dict[str, Tensor] | None = None, optimizer: Transform | None = None, *, max_steps: int = 3
) -> SearchStrategy[TrainState]:
    """Strategy: states of a module and an optimizer, a few updates along random gradients into training.

    Shrinks to the state that `trainfn.init` returns.

    >>> from hypothesis import given
    >>> @given(states())
    ... def test(state):
    ...     assert 0 <= int(state.step) <= 3
    >>> test()
    """
    from trainfn.optim import adamw

    model = default_module() if module is None else module
    transform = adamw(1e-2) if optimizer is None else optimizer

    def make(seed: int, steps: int) -> TrainState:
        state = init(model, transform, seed=seed)
        for n in range(steps):
            grads = random_like(state.params, random.fold_in(random.key(seed), n))
            updates, opt_state = transform.update(grads, state.opt_state, state.params)
            params = tree.cast_like(tree.add(state.params, updates), state.params)
            state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state

    return st.builds(make, st.integers(0, 2**16), st.integers(0, max_steps))


def random_like(params: Tree, key: Tensor) -> Tree:
    """A tree of standard normal numbers with the structure, shapes and dtypes of another."""
    leaves = {
        name: random.normal(random.fold_in(key, i), x.shape, dtype=x.dtype).to(x.device)
        for i, (name, x) in enumerate(tree.named_leaves(params).items())
    }
    return tree.with_leaves(params, leaves)


def schedules(*, total_steps: int = 20) -> SearchStrategy[Schedule]:
    """Strategy: learning-rate schedules that end within ``total_steps``; shrinks to a constant.

    >>> from hypothesis import given
    >>> @given(schedules())
    ... def test(schedule):
    ...     assert schedule(torch.tensor(3)) >= 0
    >>> test()
    """
    peaks = st.sampled_from([1.0, 0.1, 3e-4])
    warmups = st.integers(0, total_steps // 2)
    with_both = st.sampled_from([_schedules.linear, _schedules.cosine, _schedules.polynomial])
    return st.one_of(
        peaks.map(_schedules.constant),
        st.builds(_schedules.constant_with_warmup, peaks, warmups),
        st.builds(lambda make, peak, warmup: make(peak, total_steps, warmup), with_both, peaks, warmups),
        st.builds(_schedules.inverse_sqrt, peaks, st.integers(1, total_steps)),
    )
