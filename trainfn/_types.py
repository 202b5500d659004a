"""The vocabulary. Read this first: every other file speaks in these words.

========== =================================================================================
Params     trainable tensors by dotted name, the names of ``module.named_parameters()``
Mean       ``(total, weight)``: what a loss and a metric *are*; combined by ``+``, divided once
TrainState all that a step reads and writes: tensors only
Gradients  what one pass over a batch adds up; pieces of a batch combine by addition
Step       ``(state, batch) -> (state, metrics)``, pure
Transform  ``(init, update)``: a rule that turns gradients into updates
Schedule   ``step -> value``, tensors in and out
Callback   what happens after each step of a run: a role whose every method may be left out
========== =================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor, nn

Params: TypeAlias = dict[str, Tensor]
Buffers: TypeAlias = dict[str, Tensor]
NOTHING: Params = {}  # a default; nothing writes to it
Batch: TypeAlias = Any  # a tree of tensors whose first dimension is the row
Tree: TypeAlias = Any  # dicts, lists, tuples and NamedTuples of tensors


class Mean(NamedTuple):
    """A weighted mean that has not been divided yet: ``total / weight``.

    Two means combine by ``+``, which is exact for any split of the rows; a mean of means can't be written. A number
    times a mean, its negation, and its division by a number scale the total. `trainfn.losses.total` adds different
    losses.

    Attributes:
        total: Sum of the weighted values, any shape (a scalar for a loss).
        weight: Sum of the weights, broadcastable to ``total``.

    >>> import torch
    >>> ragged = Mean.of(torch.tensor([1.0, 1.0, 4.0])) + Mean.of(torch.tensor([10.0]))
    >>> ragged.value.item()
    4.0
    >>> 0.5 * ragged
    Mean(2 over weight 4)
    """

    total: Tensor
    weight: Tensor

    @staticmethod
    def of(values: Tensor, weights: Tensor | None = None) -> Mean:
        """The mean of ``values`` (any shape), weighted by ``weights`` (broadcastable; a mask will do).

        >>> import torch
        >>> Mean.of(torch.tensor([1.0, 9.0]), torch.tensor([True, False])).value.item()
        1.0
        """
        values = values if values.is_floating_point() else values.float()
        if weights is None:
            return Mean(values.sum(), torch.full((), values.numel(), dtype=torch.float32, device=values.device))
        weights = weights.to(values.dtype).expand_as(values)
        return Mean((values * weights).sum(), weights.sum().float())

    @property
    def value(self) -> Tensor:
        """``total / weight``, a tensor; NaN where the weight is 0, for there is no mean of nothing."""
        return self.total / self.weight

    def wide(self) -> Mean:
        """The same mean in float64, in memory of its own, without a derivative: for sums over many steps.

        A sum in float32 loses what is 2⁻²⁴ of it, so thousands of steps would not add up. A device without float64
        (MPS) keeps float32. The copy outlives a donating step, which may overwrite its metrics.

        >>> import torch
        >>> Mean.of(torch.ones(2)).wide().total.dtype
        torch.float64
        """
        dtype = torch.float32 if self.total.device.type == "mps" else torch.float64
        return type(self)(self.total.detach().to(dtype, copy=True), self.weight.detach().to(dtype, copy=True))

    def mapped(self, change: Callable[[Mean], Mean]) -> Mean:
        """``change`` of this mean; of each of its terms, where it is a total of several."""
        return change(self)

    def __add__(self, other: object) -> Mean:  # type: ignore[override]
        """Combine two means of one loss over disjoint rows into the mean of all of them."""
        if type(other) is not type(self):
            raise self._refused("+", other)
        mean = cast("Mean", other)
        if mean.total.shape != self.total.shape:
            raise ValueError(
                f"Mean + Mean: the totals have the shapes {list(self.total.shape)} and {list(mean.total.shape)}. `+`"
                " pools the rows of one loss or metric, so both must be of one kind: totals of equal shapes."
            )
        return type(self)(self.total + mean.total, self.weight + mean.weight)

    def __radd__(self, other: object) -> Mean:
        """So that ``sum(means)`` works, which starts from 0."""
        if isinstance(other, int) and other == 0:
            return self
        raise self._refused("+", other)

    def __mul__(self, factor: object) -> Mean:  # type: ignore[override]
        """Scale the total by a number or a scalar tensor; the weight stays."""
        if not _is_scalar(factor):
            raise self._refused("*", factor)
        return self.mapped(lambda mean: Mean(mean.total * factor, mean.weight))

    def __rmul__(self, factor: object) -> Mean:  # type: ignore[override]
        """See `__mul__`."""
        return self * factor

    def __truediv__(self, divisor: object) -> Mean:
        """Divide the total by a number or a scalar tensor; the weight stays."""
        if not _is_scalar(divisor):
            raise self._refused("/", divisor)
        return self.mapped(lambda mean: Mean(mean.total / divisor, mean.weight))

    def __neg__(self) -> Mean:
        """The mean of the negated values."""
        return self * -1

    def _refused(self, sign: str, other: object) -> TypeError:
        return TypeError(
            f"{type(self).__name__} {sign} {type(other).__name__}: a Mean is a sum that is not divided yet."
            " `0.5 * mean`, `mean / 2` and `-mean` scale it, and `a + b` pools two parts of one loss. To add"
            ' different losses, write `tfn.losses.total({"a": a, "b": b})`, and `-1 * b` for a difference. `mean.value`'
            " is a tensor for everything else."
        )

    def __sub__(self, other: object) -> Mean:
        raise self._refused("-", other)

    def __rsub__(self, other: object) -> Mean:
        raise self._refused("-", other)

    def __rtruediv__(self, other: object) -> Mean:
        raise self._refused("/", other)

    def __pow__(self, other: object) -> Mean:
        raise self._refused("**", other)

    def __lt__(self, other: object) -> bool:  # type: ignore[override]
        raise self._refused("<", other)

    def __gt__(self, other: object) -> bool:  # type: ignore[override]
        raise self._refused(">", other)

    def __le__(self, other: object) -> bool:  # type: ignore[override]
        raise self._refused("<=", other)

    def __ge__(self, other: object) -> bool:  # type: ignore[override]
        raise self._refused(">=", other)

    def __float__(self) -> float:
        raise TypeError("float(mean): a Mean is a sum that is not divided yet. Write `float(mean.value)`.")

    def __repr__(self) -> str:
        if self.total.numel() == 1 and not self.total.is_meta:
            return f"Mean({float(self.value.detach()):.6g} over weight {float(self.weight):g})"
        return f"Mean(total={self.total!r}, weight={self.weight!r})"


def _is_scalar(x: object) -> TypeGuard[Tensor | float]:
    return x.dim() == 0 if isinstance(x, Tensor) else isinstance(x, int | float) and not isinstance(x, bool)


class Total(Mean):
    """A sum of several means, each with a weight of its own, that have not been divided yet.

    Two totals combine by ``+``, term by term, and each term is divided once. `trainfn.losses.total` makes one.

    Attributes:
        parts: The terms by name, where it is what a loss returns; empty in metrics.
        total: ``total[terms]``.
        weight: ``weight[terms]``.
    """

    parts: dict[str, Mean] = {}  # noqa: RUF012  (no field of the tuple: it is set by `joined`)

    @classmethod
    def joined(cls, parts: dict[str, Mean]) -> Total:
        """The total of these means."""
        made = cls(*(torch.stack([part[i] for part in parts.values()]) for i in (0, 1)))
        made.parts = parts
        return made

    @property
    def value(self) -> Tensor:
        """The sum of the means, a tensor; a term of weight 0 counts for nothing."""
        return torch.where(self.weight == 0, 0.0, self.total / _divisor(self.weight)).sum()

    @property
    def terms(self) -> list[Mean]:
        """The means that are added."""
        return list(self.parts.values()) or [Mean(*pair) for pair in zip(self.total, self.weight, strict=True)]

    def mapped(self, change: Callable[[Mean], Mean]) -> Mean:
        """The total of the changed terms."""
        if not self.parts:
            return type(self).joined({str(i): change(term) for i, term in enumerate(self.terms)})
        return type(self).joined({name: change(part) for name, part in self.parts.items()})

    def __repr__(self) -> str:
        return f"Total({float(self.value.detach()):.6g} of {len(self.total)} means)"


def _divisor(weight: Tensor) -> Tensor:
    """The weight, or 1 where nothing counted: the sums are 0 too."""
    return torch.where(weight == 0, torch.ones_like(weight), weight)


Metrics: TypeAlias = dict[str, Mean]
LossOutput: TypeAlias = "Mean | tuple[Mean, Metrics] | Tensor"
Loss: TypeAlias = Callable[[Any, Batch], "Mean | tuple[Mean, Metrics] | Tensor"]
Schedule: TypeAlias = Callable[[Tensor], Tensor]


class TrainState(NamedTuple):
    """Everything a training step reads and writes, as one immutable tree of tensors.

    Made by `trainfn.init`, which returns a subclass that remembers the module. Structure lives in the type and numbers
    in the value, so `_replace`, `optree.tree_map` and friends keep it.

    Attributes:
        step: Completed optimizer updates, ``int64[]``.
        params: What the optimizer updates, by name.
        buffers: Everything else the module holds: its buffers, frozen and integer parameters, by name.
        opt_state: The optimizer's own tree.
        key: Source of all randomness, ``int64[2]``; never changes: each step folds `step` into it.
        extra: What step transforms keep, such as an exponential moving average.
    """

    step: Tensor
    params: Params
    buffers: Buffers
    opt_state: Tree
    key: Tensor
    extra: dict[str, Tree]

    module = cast("nn.Module | None", None)  # the user's nn.Module; set on the subclass that `init` makes
    sites = cast("tuple[Any, ...]", ())  # where each named tensor sits in the module; see _module.py
    modes = cast("tuple[Any, ...]", ())  # the module's submodules, and which of them train
    held = cast("tuple[int, ...] | None", None)  # the identities of the tensors at the sites, if they stay
    looked = -1  # when the module was last looked at; see _changes.py
    warned = False  # whether a warning about its modes was given
    aliases = cast("tuple[Any, ...]", ())  # what else in the module holds a parameter; see _audit.py

    def __repr__(self) -> str:
        numel = sum(p.numel() for p in self.params.values() if isinstance(p, Tensor))
        name = "functions" if self.module is None else type(self.module).__name__
        step = int(self.step) if isinstance(self.step, Tensor) and not self.step.is_meta else "?"
        extra = f", extra={sorted(self.extra)}" if self.extra else ""
        return f"TrainState({name}, step={step}, params={len(self.params)} tensors / {numel:,} numbers{extra})"


class Gradients(NamedTuple):
    """Sums over the rows of one batch or micro-batch; two of them combine by adding all but the buffers.

    Attributes:
        loss: Total and weight of the loss.
        grads: d loss.total / d params, by name: a sum, not yet divided by the weight. None for a parameter that the
            loss does not reach. For a total of several means it is the gradient of its value, or ``terms`` has them.
        metrics: The loss function's metrics.
        buffers: The module's buffers and frozen parameters after the forward pass.
        written: The parameters that the forward pass itself wrote to, by name.
        reached: Whether the rows of any rank reach a parameter that this rank's rows do not, ``bool[]`` by name.
        terms: The ``grads`` of each term of a total of several means, which are divided after the last piece.
    """

    loss: Mean
    grads: dict[str, Tensor | None]
    metrics: Metrics
    buffers: Buffers
    written: Params = NOTHING
    reached: Params = NOTHING
    terms: tuple[dict[str, Tensor | None], ...] = ()


class Transform(NamedTuple):
    """A gradient transformation: a pair of pure functions (optax's grammar).

    Attributes:
        init: ``params -> state``.
        update: ``(updates, state, params) -> (updates, state)``; what comes out of the last one is added
            to the parameters.
    """

    init: Callable[[Params], Tree]
    update: Callable[[Params, Tree, Params], tuple[Params, Tree]]


class Step(Protocol):
    """A pure training step: same state and batch, same bits out."""

    def __call__(self, state: TrainState, batch: Batch, /) -> tuple[TrainState, Metrics]:
        """Return the next state and the metrics of this batch."""
        ...


class StepInfo(NamedTuple):
    """One finished step: `steps` yields it, and callbacks get it.

    Attributes:
        n: Completed steps: the value of ``state.step``.
        state: The state after step ``n``. With a donating step it is valid until the next step;
            `trainfn.copy` keeps it.
        metrics: This step's metrics, on the device, undivided.
        seconds: Wall time since the previous step's end, data loading included.
        until: The step at which the run will end, where that is known.
    """

    n: int
    state: TrainState
    metrics: Metrics
    seconds: float
    until: int | None = None


class Stop(NamedTuple):
    """A callback returns this to end the run after the current step.

    Attributes:
        reason: Why; `fit` prints it.
    """

    reason: str


class Callback:
    """The role of a callback: `fit` calls it after each step of a run.

    Every method does nothing, so a subclass writes only those that it needs. A plain function of a `StepInfo` will do
    where `__call__` is all.

    Attributes:
        latest: The step of the last evaluation and its metrics, where the callback evaluates. `Checkpoints` keeps the
            best by it.

    >>> import torch, trainfn as tfn
    >>> class Slowest(Callback):
    ...     seconds = 0.0
    ...     def __call__(self, info):
    ...         self.seconds = max(self.seconds, info.seconds)
    ...     def state_dict(self):
    ...         return {"seconds": self.seconds}
    ...     def load_state_dict(self, state):
    ...         self.seconds = state["seconds"]
    >>> optimizer, slowest = tfn.optim.sgd(0.1), Slowest()
    >>> step = tfn.train_step(lambda p, x: tfn.Mean.of(p["w"] * x), optimizer)
    >>> state = tfn.init({"w": torch.tensor([4.0])}, optimizer)
    >>> _ = tfn.fit(step, state, [torch.ones(1)] * 2, callbacks=[slowest])
    >>> slowest.seconds > 0
    True
    """

    latest: tuple[int, dict[str, float]] | None = None

    def __enter__(self) -> Self:
        """Called when the run begins, before a checkpoint's state is looked at by `begin`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        """Called when the run has ended, however it ended; True holds its error back."""
        return None

    def begin(self, info: StepInfo, /) -> list[str] | None:
        """Called before the first step; returns the names of the metrics that this callback will evaluate, if any."""
        return None

    def check(self, names: list[str], /) -> None:
        """Called before the first step by the evaluation that this callback follows, with its metrics' names.

        Raises:
            ValueError: If the metric that this callback waits for is not among them.
        """

    def __call__(self, info: StepInfo, /) -> Stop | None:
        """Called after each step; a `Stop` ends the run."""
        return None

    def state_dict(self) -> dict[str, Any] | None:
        """The state that a checkpoint keeps of this callback, as plain JSON; None if there is nothing to keep."""
        return None

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Take what `state_dict` returned when the checkpoint was saved."""
