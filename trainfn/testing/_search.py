"""The search for the smallest counterexample, by hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.control import current_build_context, currently_in_test_context
from hypothesis.errors import NoSuchExample
from hypothesis.strategies import SearchStrategy

_Case = TypeVar("_Case")
_DRAWS_WITHIN_A_TEST = 3
# Nothing is stored on disk, and the outcome depends on the arguments only.
_SETTINGS = {
    "database": None,
    "deadline": None,
    "derandomize": False,
    "phases": (Phase.generate, Phase.shrink),
    "suppress_health_check": list(HealthCheck),
}


def counterexample(cases: SearchStrategy[_Case], breaks: Callable[[_Case], bool], seed: int = 0) -> _Case | None:
    """The smallest case found that breaks a law, or None; the same for the same arguments.

    As many cases are tried as the active hypothesis profile says. Inside a test under ``@given`` a few are drawn from
    that test instead, and it is hypothesis that repeats the test and shrinks them.
    """
    if currently_in_test_context():
        data = current_build_context().data
        drawn = (data.draw(cases) for _ in range(_DRAWS_WITHIN_A_TEST))
        return next((case for case in drawn if breaks(case)), None)
    try:
        return hypothesis.find(
            cases,
            breaks,
            settings=settings(settings.default, **_SETTINGS),  # type: ignore[arg-type]
            random=Random(seed),
        )
    except NoSuchExample:
        return None


def register_profiles() -> None:
    """Register hypothesis' profiles ``trainfn-dev`` and ``trainfn-ci``; for a ``conftest.py``.

    Both lift the deadline, since a first call of a step may compile. ``trainfn-ci`` tries the same cases in every run.
    Choose one with ``pytest --hypothesis-profile=trainfn-ci`` or ``settings.load_profile``.

    >>> register_profiles()
    >>> settings.get_profile("trainfn-ci").derandomize
    True
    """
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    common = {"deadline": None, "max_examples": 25, "suppress_health_check": slow}
    settings.register_profile("trainfn-dev", derandomize=False, **common)  # type: ignore[arg-type]
    settings.register_profile("trainfn-ci", derandomize=True, **common)  # type: ignore[arg-type]
