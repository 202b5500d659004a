"""The two metric-driven learning rates against torch and transformers."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.optimization import GreedyLR

from trainfn import schedules

PLATEAU = [
    {},
    {"patience": 2, "factor": 0.5},
    {"patience": 1, "cooldown": 3, "factor": 0.3},
    {"mode": "max", "patience": 2, "threshold_mode": "abs", "threshold": 0.05},
    {"patience": 0, "factor": 0.5, "min_lr": 0.01, "threshold_mode": "abs"},
    {"mode": "max", "patience": 1, "threshold": 0.02},
]
GREEDY = [
    {},
    {"patience": 1, "factor": 0.7},
    {"patience": 1, "factor": 0.5, "cooldown": 2, "warmup": 3},
    {"patience": 0, "factor": 0.3, "reset_start": 3, "cooldown": 1, "warmup": 2},
    {"patience": 0, "factor": 0.3, "reset_start": 2, "smooth": True, "window_size": 4},
    {"patience": 1, "factor": 0.8, "smooth": True, "window_size": 5, "threshold_mode": "rel"},
    {"mode": "max", "patience": 1, "factor": 0.8, "threshold_mode": "rel", "threshold": 0.01},
    {"mode": "max", "patience": 1, "factor": 0.8},
]


def metrics(seed):
    """A loss that falls, stays and rises, with noise."""
    draw = random.Random(seed)
    trend = [3.0 - 0.1 * n for n in range(25)] + [0.5] * 60 + [0.5 + 0.05 * n for n in range(40)] + [0.1] * 30
    return [value + draw.choice([0.0, 0.02, 0.3]) * draw.random() for value in trend]


def run(controller, values):
    state, rates = controller.init(), []
    for value in values:
        state = controller.update(value, state)
        rates.append(state.learning_rate.item())
    return rates


def reference(make, values):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, rates = make(optimizer), []
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", PLATEAU, ids=str)
def test_reduce_on_plateau_matches_torch(options, seed):
    expected = reference(lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, **options), metrics(seed))
    assert run(schedules.reduce_on_plateau(0.1, **options), metrics(seed)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", GREEDY, ids=str)
def test_greedy_matches_transformers(options, seed):
    expected = reference(lambda o: GreedyLR(o, **options), metrics(seed))
    assert run(schedules.greedy(0.1, **options), metrics(seed)) == pytest.approx(expected, rel=1e-12)


CONTROLLERS = pytest.mark.parametrize(
    "controller",
    [schedules.reduce_on_plateau(0.1), schedules.greedy(0.1, smooth=True)],
    ids=["plateau", "greedy"],
)


@CONTROLLERS
def test_state_is_stable_and_compiles_once(controller):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    update = torch.compile(controller.update, backend=counter, fullgraph=True)
    state = expected = controller.init()
    counts = set()
    for value in metrics(0)[:30]:
        state = update(torch.tensor(value), state)
        expected = controller.update(torch.tensor(value), expected)
        counts.add(counter.frame_count)
    assert len(counts) == 1  # Dynamo restarts its first analysis where scalars are float64: not always 1 graph
    assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))
    assert [x.dtype for x in state] == [x.dtype for x in controller.init()]
    assert [x.shape for x in state] == [x.shape for x in controller.init()]


@CONTROLLERS
def test_update_is_pure(controller):
    state = controller.init()
    controller.update(1.0, state)
    assert all(torch.equal(a, b) for a, b in zip(state, controller.init(), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.reduce_on_plateau(0.1, factor=1.0), r"factor=1.0.*between 0 and 1"),
        (lambda: schedules.greedy(0.1, mode="least"), r"mode='least'.*\['min', 'max'\]"),
        (lambda: schedules.greedy(0.1, threshold_mode="x"), r"threshold_mode='x'.*\['rel', 'abs'\]"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
