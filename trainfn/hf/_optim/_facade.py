"""The optimizer of a run, as callbacks and subclasses see it: torch's class, over the state of the functional core.

Its `param_groups` are those of the torch optimizer that it shows, and what is written there takes effect at the next
step. Its `state` is read from the run's state. It holds references only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import trainfn as tfn
from trainfn.hf._optim._groups import Groups
from trainfn.hf._optim._moments import entries, fields, with_entries
from trainfn.hf._optim._schedules import (
    closed_form,
    from_json,
    load_state,
    state_of,
    to_json,
    write_rates,
)
from trainfn.hf._types import OptState, Steps, TrainerLike, Values


class TransformOptimizer(torch.optim.Optimizer):
    """A transform of `trainfn.optim` with one parameter group, as a torch optimizer.

    The hyperparameters that `trainfn.optim.inject_hyperparams` put into its state are options of the group, and
    ``learning_rate`` is its ``lr``. A schedule moves that rate as it moves the rate of a torch optimizer.

    Args:
        transform: The transform.
        params: The parameters that it trains.
        lr: The rate that the group shows, if the transform has no hyperparameter ``learning_rate``.
    """

    def __init__(self, transform: tfn.Transform, params: Iterable[Tensor], lr: float) -> None:
        self.transform = transform
        self.hyperparams = _hyperparams(transform)
        found = {_shown(name): value for name, value in self.hyperparams.items()}
        super().__init__(params, {"lr": lr, **found})

    def step(self, closure: Callable[[], float] | None = None) -> NoReturn:
        """Raise an error: see `RunOptimizer.step`."""
        _no_step("trainer.train()")

    def pushed(self, opt_state: OptState) -> OptState:
        """The state with the numbers that were written into the group."""
        group = self.param_groups[0]
        new = {name: float(group[_shown(name)]) for name in self.hyperparams}
        changed = {name: value for name, value in new.items() if value != self.hyperparams[name]}
        self.hyperparams = new
        return tfn.optim.set_hyperparams(opt_state, **changed) if changed else opt_state


def _shown(name: str) -> str:
    return "lr" if name == "learning_rate" else name


def _hyperparams(transform: tfn.Transform) -> dict[str, float]:
    """The hyperparameters of a transform that can be set, with their first values."""
    try:
        state = transform.init({})
        found = tfn.optim.get_hyperparams(state)
    except Exception:  # it has none; or it is a user's, and needs parameters to make a state
        return {}
    free: dict[str, float] = {}
    for name, value in found.items():
        try:
            tfn.optim.set_hyperparams(state, **{name: value})
        except ValueError:  # a schedule sets it
            continue
        free[name] = float(value)
    return free


class RunOptimizer(torch.optim.Optimizer):
    """A run's optimizer, with the names and the layout of torch's.

    Args:
        trainer: The Trainer, whose newest state has the moments.
        optimizer: The torch optimizer, which has the groups; it makes no steps.
        scheduler: The schedule.
        named_parameters: The parameters by name, as the state has them.

    Attributes:
        optimizer: The torch optimizer.
        groups: The groups as a transform; None if the optimizer was a transform from the beginning.
        start: The numbers of the groups when the run began.
    """

    def __init__(
        self,
        trainer: TrainerLike,
        optimizer: torch.optim.Optimizer,
        scheduler: Steps,
        named_parameters: Iterable[tuple[str, nn.Parameter | Tensor]],
    ) -> None:
        # The base class's `__init__` is not called: it would make groups of its own.
        named = list(named_parameters)
        self.optimizer, self._trainer = optimizer, trainer
        self._names = {id(p): name for name, p in named}
        self._named = named
        own = isinstance(optimizer, TransformOptimizer)
        self.groups = None if own else Groups(optimizer, named)
        self.start, self._scheduler, self._place = self.options(), scheduler, state_of(scheduler)
        self._replaced = False

    @property
    def transform(self) -> tfn.Transform:
        """The update, without clipping."""
        if self.groups is not None:
            return self.groups.transform
        return cast("TransformOptimizer", self.optimizer).transform

    # --- as torch has it --------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Values]:  # type: ignore[override]
        """The groups; lr, weight decay and the other options may be written."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Values:  # type: ignore[override]
        """The options of a group that does not name them."""
        return self.optimizer.defaults

    @property
    def state(self) -> Mapping[Tensor, Values]:  # type: ignore[override]
        """The moments and counts of each parameter by torch's names, as they are after the newest step.

        The tensors are those of the run's state, which the next step may overwrite. Writes to the dict are lost; see
        `load_state_dict`.
        """
        held = self._trainer.train_state
        if held is None:
            return dict(self.optimizer.state)
        parameters = [p for group in self.param_groups for p in group["params"]]
        found = {p: entries(held.opt_state, self._names[id(p)]) for p in parameters if id(p) in self._names}
        return {p: entry for p, entry in found.items() if entry}

    def state_dict(self) -> Values:
        """The state and the groups in torch's layout."""
        numbers = {id(p): n for n, p in enumerate(p for g in self.param_groups for p in g["params"])}
        groups = [{**group, "params": [numbers[id(p)] for p in group["params"]]} for group in self.param_groups]
        return {"state": {numbers[id(p)]: entry for p, entry in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, state_dict: Values) -> None:
        """Take a state in torch's layout, from the next step on.

        Raises:
            ValueError: If the groups are not of the same sizes.
        """
        states = self.entries_of(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})

        def change(state: tfn.TrainState) -> tfn.TrainState:
            return state._replace(opt_state=with_entries(state.opt_state, states))

        run = self._trainer._trainfn.run
        if run is not None and self._trainer.is_in_train:
            run.changes.append(change)
        if self._trainer.train_state is not None:
            self._trainer.train_state = change(self._trainer.train_state)

    def entries_of(self, state_dict: Values) -> dict[str, Values]:
        """The entries of a state in torch's layout, by name of the parameter.

        Raises:
            ValueError: If the groups are not of the same sizes.
        """
        sizes = [len(group["params"]) for group in self.param_groups]
        theirs = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != theirs:
            raise ValueError(
                f"`optimizer.load_state_dict(...)` can't work: it has groups of {theirs} parameters, and this optimizer"
                f" of {sizes}. Load the state of an optimizer with the same groups."
            )
        found: dict[str, Values] = {}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                if entry := state_dict["state"].get(number):
                    found[self._names[id(parameter)]] = entry
        return found

    def fits(self, found: Mapping[str, Values]) -> bool:
        """Whether entries by name have the fields and the shapes that this optimizer's state has."""
        state = self._trainer.train_state
        if self.groups is None or state is None:
            return False
        for name, entry in found.items():
            mine = fields(state.opt_state, name)
            theirs = {key: value for key, value in entry.items() if key != "step" and value is not None}
            if mine.keys() != theirs.keys() or any(tuple(mine[k].shape) != tuple(theirs[k].shape) for k in mine):
                return False
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` of the parameters. The step does not read it."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: Values) -> None:
        """Add a group, whose parameters are trained from the next step on.

        Raises:
            ValueError: If the run's state does not hold a parameter as one that can be trained.
        """
        held = self._trainer.train_state
        self.optimizer.add_param_group(param_group)
        groups = self.groups
        if groups is None or held is None:
            return
        label, added = str(len(self.param_groups) - 1), self.param_groups[-1]["params"]
        try:
            params = {self._names[id(p)]: held.params[self._names[id(p)]] for p in added}
        except KeyError:
            del self.param_groups[-1]
            raise ValueError(
                "`optimizer.add_param_group(...)` can't work during a run for a parameter that was frozen, or outside"
                " of the model, when the run began. Put it into a group with `lr=0.0` before `trainer.train()`."
            ) from None
        made = Groups(self.optimizer, self._named)
        state = made.rules[label].init(params)
        self.groups, self._replaced = made, True
        run = self._trainer._trainfn.run
        if run is not None:
            run.changes.append(lambda state_: _with_label(state_, label, state))

    def step(self, closure: Callable[[], float] | None = None) -> NoReturn:
        """Raise an error: a step of the Trainer contains the update."""
        _no_step("trainer.train()")

    def register_step_pre_hook(self, hook: Callable[..., object]) -> NoReturn:
        """Raise an error: no step of the optimizer is called."""
        _no_hook("register_step_pre_hook", "on_pre_optimizer_step")

    def register_step_post_hook(self, hook: Callable[..., object]) -> NoReturn:
        """Raise an error: no step of the optimizer is called."""
        _no_hook("register_step_post_hook", "on_optimizer_step")

    def train(self) -> None:
        """Do nothing: there is one set of weights."""

    def eval(self) -> None:
        """Do nothing: there is one set of weights."""

    def __repr__(self) -> str:
        return f"RunOptimizer of {self.optimizer!r}"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            "`copy.deepcopy(trainer.optimizer)` and `pickle` can't work: it belongs to its Trainer. Write"
            " `copy.deepcopy(trainer.optimizer.state_dict())`."
        )

    def parameters(self) -> dict[str, nn.Parameter | Tensor]:
        """The parameters that the state holds, by name."""
        return dict(self._named)

    # --- for the loop -----------------------------------------------------------------------------------------------

    def options(self) -> list[Values]:
        """The plain values in the groups."""
        plain = (bool, int, float, str, tuple)
        return [
            {k: float(v) if isinstance(v, Tensor) and v.dim() == 0 else v for k, v in group.items() if k != "params"
             and (isinstance(v, plain) or (isinstance(v, Tensor) and v.dim() == 0))}
            for group in self.param_groups
        ]  # fmt: skip

    def rewind(self) -> None:
        """Bring the groups and the schedule back to the beginning of the run, so that another run may use them."""
        load_state(self._scheduler, self._place)
        for group, options in zip(self.param_groups, self.start, strict=False):
            group.update(options)

    def stale(self) -> bool:
        """Whether the step has to be made anew, because an option was written that is not a number of its state."""
        changed = self._replaced or (self.groups is not None and self.groups.stale())
        self._replaced = False
        return changed

    def pushed(self, state: tfn.TrainState) -> tfn.TrainState:
        """The state with the numbers that are in the groups now."""
        if self.groups is None:
            new = cast("TransformOptimizer", self.optimizer).pushed(state.opt_state)
            return state if new is state.opt_state else state._replace(opt_state=new)
        first, held = state.opt_state
        new = self.groups.pushed(held)
        return state if new is held else state._replace(opt_state=(first, new))

    def to_json(self, scheduler: Steps) -> Values:
        """The groups and the schedule, for a checkpoint."""
        now = [to_json(options) for options in self.options()]
        start = [to_json(options) for options in self.start]
        return {"groups": now, "start": start, "scheduler": state_of(scheduler)}

    def load_json(self, scheduler: Steps, saved: Values) -> None:
        """Restore the groups and the schedule.

        An option that the arguments of this run change keeps its new value. A learning rate is multiplied then, and so
        keeps its place in the schedule.
        """
        now, start = (cast("list[Values]", [from_json(each) for each in saved[key]]) for key in ("groups", "start"))
        load_state(scheduler, saved["scheduler"])
        rates = [group.get("lr") for group in now]
        for group, new, old, fresh in zip(self.param_groups, now, start, self.start, strict=False):
            group.update({k: v for k, v in new.items() if k in group and old.get(k) == fresh.get(k)})
            first, mine = (each.get("initial_lr", each["lr"]) for each in (old, fresh))
            if first != mine and first and mine is not None:
                group["lr"], group["initial_lr"] = new["lr"] * mine / first, mine
            elif first == mine:
                group["lr"] = new["lr"]
        if closed_form(scheduler) is not None and rates == scheduler.get_last_lr():  # no callback wrote another rate
            scheduler.base_lrs = [group["initial_lr"] for group in self.param_groups]  # type: ignore[attr-defined]
            write_rates(cast("LRScheduler", scheduler), self.optimizer)
        if self.groups is not None:
            self.groups.forget()


def _with_label(state: tfn.TrainState, label: str, added: OptState) -> tfn.TrainState:
    first, held = state.opt_state
    return state._replace(opt_state=(first, held._replace(inner={**held.inner, label: added})))


def _no_step(instead: str) -> NoReturn:
    raise RuntimeError(
        f"`optimizer.step()` can't work: the update is part of the Trainer's step, which `{instead}` makes. To change"
        " it, write into `optimizer.param_groups`, or override `create_optimizer`. Code that calls `backward()` and"
        " `step()` by itself needs an optimizer of its own, such as `torch.optim.AdamW(model.parameters())`."
    )


def _no_hook(name: str, event: str) -> NoReturn:
    raise RuntimeError(
        f"`optimizer.{name}(...)` can't work: the update is part of the Trainer's step, so no hook of the optimizer is"
        f" called. Write a callback with the method `{event}`."
    )
