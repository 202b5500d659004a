"""Numbers in the state: get, set, schedules, and what a wrong name is told."""

import pytest
import torch

from tests.helpers import quick
from trainfn import optim, schedules, tree
from trainfn._types import TrainState

PARAMS = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
ADAMW = optim.inject_hyperparams(optim.adamw)


class RememberingState(TrainState):
    """What `trainfn.init` returns: a subclass."""


def train_state(opt_state):
    return RememberingState(torch.tensor(0), PARAMS, {}, opt_state, torch.tensor([0, 1]), {})


def values(state):
    return {name: round(value.item(), 6) for name, value in optim.get_hyperparams(state).items()}


def test_numbers_are_float32_scalars_and_defaults_are_among_them():
    state = ADAMW(learning_rate=1e-3, mask=optim.decay_mask).init(PARAMS)
    assert {(x.dtype, x.shape) for x in state.hyperparams.values()} == {(torch.float32, ())}
    assert values(state) == {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 0.0, "weight_decay": 0.01}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rule: rule,
        lambda rule: optim.chain(optim.clip_by_global_norm(1.0), rule),
        lambda rule: optim.partition({"a": rule, "b": optim.sgd(0.1)}, [("bias", "b")], default="a"),
        lambda rule: optim.lookahead(optim.masked(rule, "weight")),
    ],
    ids=["alone", "chain", "partition", "lookahead of masked"],
)
def test_found_anywhere_in_a_train_state(wrap):
    optimizer = wrap(ADAMW(1e-3, weight_decay=0.1))
    state = train_state(optimizer.init(PARAMS))
    changed = optim.set_hyperparams(state, learning_rate=5e-4, weight_decay=torch.tensor(0.0))
    assert type(changed) is RememberingState
    assert values(changed) == {**values(state), "learning_rate": 5e-4, "weight_decay": 0.0}
    assert values(state)["learning_rate"] == 1e-3
    assert optim.get_hyperparams(changed)["weight_decay"].dtype == torch.float32
    optimizer.update(PARAMS, changed.opt_state, PARAMS)


def test_a_new_number_counts_and_does_not_recompile():
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.inject_hyperparams(optim.sgd)(0.1))
    update = quick(lambda state, grads: optimizer.update(grads, state, PARAMS))
    state = optimizer.init(PARAMS)
    slow, state = update(state, PARAMS)
    fast, _ = update(optim.set_hyperparams(state, learning_rate=0.2), PARAMS)
    torch.testing.assert_close(fast, tree.mul(slow, 2.0))
    assert (update.explain().graphs, update.explain().traces) == (1, 1)


def test_schedules_follow_the_count_and_are_reported():
    optimizer = ADAMW(schedules.linear(1.0, 10), weight_decay=schedules.constant(0.5), mask=optim.decay_mask)
    plain = optim.adamw(schedules.linear(1.0, 10), weight_decay=0.5, mask=optim.decay_mask)
    state, expected_state = optimizer.init(PARAMS), plain.init(PARAMS)
    for n in range(3):
        updates, state = optimizer.update(PARAMS, state, PARAMS)
        expected, expected_state = plain.update(PARAMS, expected_state, PARAMS)
        torch.testing.assert_close(updates, expected, rtol=2e-5, atol=1e-6)
        assert values(state)["learning_rate"] == pytest.approx(1.0 - n / 10)
    assert values(state)["weight_decay"] == 0.5


def test_a_tensor_is_a_number_and_is_not_shared():
    rate = torch.tensor(0.1)
    state = optim.inject_hyperparams(optim.sgd)(rate).init(PARAMS)
    assert values(state)["learning_rate"] == 0.1
    assert optim.get_hyperparams(state)["learning_rate"].data_ptr() != rate.data_ptr()


def test_names_that_two_optimizers_share_are_led_by_their_path():
    optimizer = optim.partition(
        {"slow": optim.inject_hyperparams(optim.sgd)(0.1), "fast": ADAMW(0.2)},
        [("bias", "fast")],
        default="slow",
    )
    state = optimizer.init(PARAMS)
    slow, fast = (name for name in sorted(values(state), reverse=True) if name.endswith("learning_rate"))
    assert (values(state)[slow], values(state)[fast]) == (0.1, 0.2)
    assert values(optim.set_hyperparams(state, **{slow: 0.3})) == {**values(state), slow: 0.3}
    assert values(optim.set_hyperparams(state, learning_rate=0.4)) == {**values(state), slow: 0.4, fast: 0.4}


def test_ints_stay_where_the_factory_says_int():
    state = optim.inject_hyperparams(optim.lookahead)(optim.sgd(0.1), 3, slow_step_size=1).init(PARAMS)
    assert values(state) == {"slow_step_size": 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: optim.set_hyperparams(ADAMW(0.1).init(PARAMS), lr=0.2),
            r"`set_hyperparams\(state, lr=0.2\)`.*no hyperparameter 'lr'.*b1, b2, eps, learning_rate, weight_decay",
        ),
        (
            lambda: optim.set_hyperparams(ADAMW(schedules.constant(0.1)).init(PARAMS), learning_rate=0.2),
            "'learning_rate' follows a schedule",
        ),
        (
            lambda: optim.set_hyperparams(optim.adamw(0.1).init(PARAMS), learning_rate=0.2),
            r"no hyperparameters.*inject_hyperparams\(tfn.optim.adamw\)",
        ),
        (lambda: optim.get_hyperparams(train_state(())), "no hyperparameters"),
        (lambda: ADAMW(-0.1), r"`adamw\(learning_rate=-0.1\)` can't work"),
        (lambda: ADAMW(schedules.constant(0.1), b1=1.0), r"`adamw\(b1=1.0\)`"),
        (lambda: optim.inject_hyperparams(lambda **numbers: None)(lr=0.1), r"`\*\*numbers` hides the names"),
        (lambda: optim.inject_hyperparams(optim.chain)(optim.sgd(0.1)), "hides the names"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
