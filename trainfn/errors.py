"""Every error of ours, in one place.

::

    TrainfnError
    ├── DonatedStateError     a state was used after a donating step consumed it
    ├── CaptureError          a step can't be captured as one graph
    │   └── LeakedError       a tensor that a captured step left on a module, or elsewhere, was used
    ├── RecompileError        a step was compiled for more shapes than its budget allows
    ├── RandomnessError       a step would draw from a generator outside the state
    ├── NonFiniteError        the loss became NaN or infinite
    ├── CheckpointError       a checkpoint can't be read, or does not fit
    ├── ReplayError           a part of a run, computed again, came out differently
    └── LawViolation          a loss, step, transform or schedule breaks a law of `trainfn.testing`
    InexactLossWarning        a loss returned a bare scalar; see `trainfn.Mean`
    UnreachedWarning          a loss does not reach some parameters, which stand still
    SplitWarning              a step seems to depend on how its batch is split
    NonFiniteWarning          a step with a NaN or infinite loss was skipped, or let through as asked

A wrong argument is a plain ``ValueError`` or ``TypeError``. Every message says what was called, with what,
why that can't work, and the line to write instead; `nearest` and `shortened` help to write them.
"""

from __future__ import annotations

from trainfn._text import nearest as nearest
from trainfn._text import shortened as shortened


class TrainfnError(Exception):
    """The base of this package's own errors."""


class DonatedStateError(TrainfnError):
    """A state was used after a donating step had consumed it."""


class CaptureError(TrainfnError):
    """A step can't be captured as one graph."""


class LeakedError(CaptureError):
    """A tensor that a captured step left on a module, or elsewhere, was used; it has no numbers."""


class RecompileError(TrainfnError):
    """A step needs more compiled variants than its budget allows."""


class RandomnessError(TrainfnError):
    """A step would draw from a generator that is not part of the state."""


class NonFiniteError(TrainfnError):
    """The loss of a step is NaN or infinite.

    Attributes:
        state: The `trainfn.TrainState` before that step; None if it was donated.
    """

    state: object = None


class CheckpointError(TrainfnError):
    """A checkpoint can't be read, or does not fit the state it should fill."""


class ReplayError(TrainfnError):
    """A part of a run, computed again, came out differently."""


class LawViolation(TrainfnError, AssertionError):
    """A loss, step, transform or schedule breaks a law of `trainfn.testing`."""


class InexactLossWarning(UserWarning):
    """A loss returned a bare scalar, so its exact weight is unknown."""


class UnreachedWarning(UserWarning):
    """A loss does not reach some parameters, so they stand still."""


class SplitWarning(UserWarning):
    """A step seems to depend on how its batch is split into micro-batches or over ranks."""


class NonFiniteWarning(UserWarning):
    """A step with a NaN or infinite loss was skipped, or let through as asked."""
