"""Several updates as one step."""

from __future__ import annotations

import functools
from collections.abc import Callable

from trainfn import random
from trainfn._keyed import phases
from trainfn._types import Batch, Metrics, TrainState

_Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def one_step(step: _Step) -> _Step:
    """Make one step of a function that calls several, such as a GAN's two phases or the epochs of PPO.

    A call advances ``state.step`` by 1, however many updates are inside. So `fit`, loaders, checkpoints and callbacks
    count calls, and a run resumes at the right batch. Each phase draws numbers of its own: the key inside is
    ``fold_in(key, step)`` of the call, into which a phase folds its own step. From the second loss on, the index of the
    loss is folded in too. Inside, ``state.step`` begins at the step of the call. Apply it before `trainfn.jit`.

    Args:
        step: ``(state, batch) -> (state, metrics)``, which calls other steps. With a plan, ``function.plan = plan``.

    >>> import torch, trainfn as tfn
    >>> optimizer = tfn.optim.sgd(0.5)
    >>> update = tfn.train_step(lambda p, x: tfn.Mean.of((p["w"] - x) ** 2), optimizer)
    >>> @tfn.one_step
    ... def twice(state, batch):
    ...     state, _ = update(state, batch)
    ...     return update(state, batch)
    >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
    >>> tfn.fit(twice, state, [torch.ones(1)] * 3)
    TrainState(functions, step=3, params=1 tensors / 1 numbers)
    """

    @functools.wraps(step)
    def one(state: TrainState, batch: Batch, /) -> tuple[TrainState, Metrics]:
        with phases():
            new, metrics = step(state._replace(key=random.fold_in(state.key, state.step)), batch)
        return new._replace(step=state.step + 1, key=state.key), metrics

    return one
