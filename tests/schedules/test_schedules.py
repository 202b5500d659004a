"""Every schedule against transformers, and the laws of composition."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import optimization as hf

import trainfn.testing as tt
from trainfn import schedules
from trainfn.testing import check_schedule

PEAK, TOTAL, WARMUP = 3e-4, 60, 12

# name, ours, theirs, number of steps to compare
SCHEDULES = [
    ("constant", schedules.constant(PEAK), lambda o: hf.get_constant_schedule(o), TOTAL),
    (
        "constant_with_warmup",
        schedules.constant_with_warmup(PEAK, WARMUP),
        lambda o: hf.get_constant_schedule_with_warmup(o, WARMUP),
        TOTAL,
    ),
    (
        "linear",
        schedules.linear(PEAK, TOTAL, WARMUP),
        lambda o: hf.get_linear_schedule_with_warmup(o, WARMUP, TOTAL),
        TOTAL + 20,
    ),
    (
        "linear, no warm-up",
        schedules.linear(PEAK, TOTAL),
        lambda o: hf.get_linear_schedule_with_warmup(o, 0, TOTAL),
        TOTAL + 20,
    ),
    (
        "cosine",
        schedules.cosine(PEAK, TOTAL, WARMUP),
        lambda o: hf.get_cosine_schedule_with_warmup(o, WARMUP, TOTAL),
        TOTAL + 1,
    ),
    (
        "cosine, two periods",
        schedules.cosine(PEAK, TOTAL, WARMUP, num_cycles=2.0),
        lambda o: hf.get_cosine_schedule_with_warmup(o, WARMUP, TOTAL, num_cycles=2.0),
        TOTAL + 1,
    ),
    (
        "cosine_with_restarts",
        schedules.cosine_with_restarts(PEAK, TOTAL, WARMUP, num_cycles=3),
        lambda o: hf.get_cosine_with_hard_restarts_schedule_with_warmup(o, WARMUP, TOTAL, num_cycles=3),
        TOTAL + 20,
    ),
    (
        "cosine_with_min_lr",
        schedules.cosine_with_min_lr(PEAK, TOTAL, WARMUP, min_lr=1e-5),
        lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, TOTAL, min_lr=1e-5),
        TOTAL + 1,
    ),
    (
        "cosine_warmup_with_min_lr",
        schedules.cosine_warmup_with_min_lr(PEAK, TOTAL, WARMUP, min_lr_rate=0.1),
        lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(o, WARMUP, TOTAL, min_lr_rate=0.1),
        TOTAL,
    ),
    (
        "cosine_warmup_with_min_lr, warm-up rate",
        schedules.cosine_warmup_with_min_lr(PEAK, TOTAL, WARMUP, min_lr_rate=0.1, warmup_lr_rate=0.2),
        lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            o, WARMUP, TOTAL, min_lr_rate=0.1, warmup_lr_rate=0.2
        ),
        TOTAL,
    ),
    (
        "polynomial",
        schedules.polynomial(PEAK, TOTAL, WARMUP, power=2.0),
        lambda o: hf.get_polynomial_decay_schedule_with_warmup(o, WARMUP, TOTAL, power=2.0),
        TOTAL + 20,
    ),
    (
        "inverse_sqrt",
        schedules.inverse_sqrt(PEAK, WARMUP),
        lambda o: hf.get_inverse_sqrt_schedule(o, WARMUP),
        200,
    ),
    (
        "inverse_sqrt, no warm-up",
        schedules.inverse_sqrt(PEAK),
        lambda o: hf.get_inverse_sqrt_schedule(o, 0),
        200,
    ),
    *(
        (
            f"warmup_stable_decay, {rise}, {fall}",
            schedules.warmup_stable_decay(
                PEAK, TOTAL, WARMUP, num_decay_steps=20, warmup_type=rise, decay_type=fall, min_lr_ratio=0.05
            ),
            lambda o, rise=rise, fall=fall: hf.get_wsd_schedule(
                o, WARMUP, 20, TOTAL, warmup_type=rise, decay_type=fall, min_lr_ratio=0.05
            ),
            TOTAL + 20,
        )
        for rise, fall in itertools.product(("linear", "cosine", "1-sqrt"), repeat=2)
    ),
]
ALL = pytest.mark.parametrize("ours", [pytest.param(row[1], id=row[0]) for row in SCHEDULES])


def at(schedule, n):
    return schedule(torch.tensor(n)).item()


def reference(make, num_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, values = make(optimizer), []
    for _ in range(num_steps):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize(("ours", "theirs", "num_steps"), [pytest.param(*row[1:], id=row[0]) for row in SCHEDULES])
def test_matches_transformers_and_compiles_once(ours, theirs, num_steps):
    check_schedule(ours, total_steps=num_steps - 1, reference=reference(theirs, num_steps), tolerance=1e-6)


@ALL
def test_is_a_float32_scalar_on_the_counts_device(ours):
    value = ours(torch.tensor(3))
    assert (value.dtype, value.shape) == (torch.float32, ())
    assert ours(torch.tensor(3, device="meta")).device.type == "meta"


@given(tt.schedules())
@settings(deadline=None, max_examples=10)
def test_drawn_schedules_obey_the_law(schedule):
    check_schedule(schedule, total_steps=20)


@ALL
def test_maps_over_many_counts(ours):
    assert ours(torch.arange(5)).tolist() == [at(ours, n) for n in range(5)]


def test_counts_beyond_the_precision_of_float32():
    total = 2**25
    assert at(schedules.linear(1.0, total), total - 1) == pytest.approx(1 / total, rel=1e-6)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5))
@settings(deadline=None)
def test_join_follows_the_schedule_whose_turn_it_is(boundaries):
    boundaries = sorted(boundaries)
    parts = [lambda count, i=i: count.float() + 1000 * i for i in range(len(boundaries) + 1)]
    joined = schedules.join(parts, boundaries)
    for n in {0, *boundaries, *(b + 1 for b in boundaries)}:
        turn = sum(n >= b for b in boundaries)
        assert at(joined, n) == 1000 * turn + n - [0, *boundaries][turn]


@given(st.integers(0, 20), st.floats(0, 1), st.integers(0, 60))
@settings(deadline=None)
def test_warmup_rises_to_the_first_value_and_follows(steps, start, n):
    inner = schedules.linear(0.5, 40)
    expected = (start + (1 - start) * n / steps) * 0.5 if n < steps else at(inner, n - steps)
    assert at(schedules.warmup(inner, steps, start=start), n) == pytest.approx(expected, rel=1e-6)


def test_scale_multiplies():
    assert at(schedules.scale(schedules.constant(0.5), 3.0), 9) == 1.5


def test_stable_steps_stand_for_the_total():
    by_total = schedules.warmup_stable_decay(1.0, 30, 5, num_decay_steps=10)
    by_stable = schedules.warmup_stable_decay(1.0, None, 5, num_decay_steps=10, num_stable_steps=15)
    assert [at(by_total, n) for n in range(35)] == [at(by_stable, n) for n in range(35)]


def test_peak_may_be_a_tensor():
    assert at(schedules.cosine(torch.tensor(2.0), 10), 5) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.linear(1.0, 10, 11), r"warmup_steps=11.*between 0 and 10.*warmup_steps=1"),
        (lambda: schedules.cosine(1.0, 10, -1), r"`cosine\(.*warmup_steps=-1"),
        (lambda: schedules.cosine_with_min_lr(1.0, 10), r"needs exactly one.*min_lr=0.1.*min_lr_rate=0.1"),
        (
            lambda: schedules.cosine_warmup_with_min_lr(1.0, 10, min_lr=0.1, min_lr_rate=0.1),
            "needs exactly one of the two",
        ),
        (lambda: schedules.polynomial(1e-8, 10), r"end_value=1e-07.*not below.*end_value=0.0"),
        (lambda: schedules.inverse_sqrt(1.0, timescale=0), r"timescale=0.*timescale=10_000"),
        (lambda: schedules.warmup_stable_decay(1.0, num_decay_steps=3), "needs exactly one of the two"),
        (lambda: schedules.warmup_stable_decay(1.0, 10, 8, num_decay_steps=3), r"total_steps=11 or more"),
        (
            lambda: schedules.warmup_stable_decay(1.0, 10, num_decay_steps=3, decay_type="sqrt"),
            r"decay_type='sqrt'.*\['linear', 'cosine', '1-sqrt'\]",
        ),
        (lambda: schedules.join([schedules.constant(1.0)], [3]), "one boundary between each two"),
        (lambda: schedules.join([schedules.constant(1.0)] * 3, [5, 3]), r"boundaries=\[3, 5\]"),
        (lambda: schedules.warmup(schedules.constant(1.0), -3), "Write 0 for no warm-up"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
