"""One pure function, compiled as one graph per shape."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from trainfn import tree
from trainfn._compile._capture import capture_error, capturing
from trainfn._compile._donate import check_alive, overwrite, reclaim
from trainfn._compile._report import Report
from trainfn._types import TrainState
from trainfn.errors import RecompileError

_Signature = tuple[Any, ...]
_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to compile; see `jit`."""

    compile: bool
    backend: str | Callable[..., Any]
    mode: str | None
    dynamic: bool | None
    options: dict[str, Any] | None
    max_graphs: int
    regather: bool = False


class Program:
    """A function ``(state, batch, …) -> …``, compiled at the first call with each shape of batch.

    A call with a known shape runs under torch's ``fail_on_recompile``: what else might need another graph is found
    out, counted and named, never compiled in silence.
    """

    def __init__(self, fn: Callable[..., Any], settings: Settings, *, donate: bool, name: str) -> None:
        self.fn, self.settings, self.donate, self.name = fn, settings, donate, name
        self.report = Report()
        self._known: dict[_Signature, dict[str, str]] = {}
        self._call = self._compiled() if settings.compile else self._traced

    def __call__(self, state: Any, batch: Any, *rest: Any) -> Any:
        check_alive(state)
        with torch.no_grad():  # one grad mode, one set of guards
            out = self._call(state, batch, *rest) if not self.settings.compile else self._run(state, batch, *rest)
        if not self.donate:
            return out
        fresh, metrics = out
        return reclaim(state, iter(fresh)), metrics

    def _traced(self, state: Any, batch: Any, *rest: Any) -> Any:
        out = self.fn(state, batch, *rest)
        if not self.donate:
            return out
        new, metrics = _state_and_metrics(out)
        return overwrite(state, new), metrics

    def _compiled(self) -> Callable[..., Any]:
        s = self.settings
        if isinstance(s.backend, str):
            # As torch.compile does; we only need to see each graph on its way.
            compiler: Any = torch._TorchCompileInductorWrapper(s.mode, s.options, s.dynamic) if (
                s.backend == "inductor"
            ) else torch._TorchCompileWrapper(s.backend, s.mode, s.options, s.dynamic)  # fmt: skip
        else:
            compiler = s.backend
        # Torch keeps compiled graphs by code object, and by its name what sizes it saw: each program has its own.
        own = types.FunctionType(
            _entry.__code__.replace(co_name=f"{self.name}_{next(_NUMBERS)}"),
            globals(),
            self.name,
            None,
            _entry.__closure__,
        )
        own.__kwdefaults__ = {"traced": self._traced}
        return torch.compile(own, fullgraph=True, dynamic=s.dynamic, backend=self.report.counting(compiler))

    def _run(self, *args: Any) -> Any:
        signature = _signature(args[1])
        if signature in self._known:
            try:
                with torch.compiler.set_stance("fail_on_recompile"):
                    return self._call(*args)
            except RuntimeError as error:
                if "fail_on_recompile" not in str(error):
                    raise
                self._check_budget(args[1], str(error))
        elif self.report.graphs >= self.settings.max_graphs:
            return self._within_budget(args, signature)
        return self._compile(args, signature)

    def _compile(self, args: tuple[Any, ...], signature: _Signature) -> Any:
        from torch._dynamo.exc import TorchDynamoException  # here, since the tracer takes seconds to import

        shapes = _shapes(args[1])
        label = f"{self.name}({', '.join(f'{k}: {v}' for k, v in shapes.items() if self.name != 'update')})"
        try:
            with self.report.timing(label), capturing(regather=self.settings.regather):
                out = self._call(*args)
        except TorchDynamoException as error:
            out = self.fn(*args)  # pure, so it can be run again: an error of the step's own is the one to show
            if self.donate:
                overwrite(tree.copy(args[0]), _state_and_metrics(out)[0])
            raise capture_error(error) from error
        self._known[signature] = shapes
        return out

    def _within_budget(self, args: tuple[Any, ...], signature: _Signature) -> Any:
        """Run a new shape on the graphs there are, one of which may be dynamic."""
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                out = self._call(*args)
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            self._check_budget(args[1], str(error))
            raise
        self._known[signature] = _shapes(args[1])
        return out

    def _check_budget(self, batch: Any, reason: str) -> None:
        if self.report.graphs < self.settings.max_graphs:
            return
        new, known = _shapes(batch), list(self._known.values())
        changed = _difference(new, known) or "not the batch:" + reason.partition("guard failure(s):")[2].rstrip()
        raise RecompileError(
            f"{self.name}(state, batch) needs another compiled graph, and max_graphs={self.settings.max_graphs} of"
            f" them exist. What changed: {changed}\nIf the sizes of a dimension vary, declare them:"
            ' `tfn.jit(step, buckets=tfn.Buckets((64, 128), pad={"input_ids": 0, "labels": -100}))`; or compile for any'
            " size, `dynamic=True`; or raise the budget, `max_graphs=`."
        )


def _entry(state: Any, batch: Any, *rest: Any, traced: Callable[..., Any]) -> Any:
    return traced(state, batch, *rest)


def _state_and_metrics(out: Any) -> tuple[TrainState, Any]:
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState)):
        raise TypeError(
            "jit(step, donate=True) needs a step that returns (state, metrics): only then can the new state take the"
            " old one's memory. For a function that returns something else, use `donate=False`."
        )
    return out


def _signature(batch: Any) -> _Signature:
    leaves, treedef = optree.tree_flatten(batch)
    return (treedef, *[(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else repr(x) for x in leaves])


def _shapes(batch: Any) -> dict[str, str]:
    return {
        f"batch[{name!r}]" if name else "batch": f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        if isinstance(x, Tensor)
        else repr(x)
        for name, x in tree.named_leaves(batch).items()
    }


def _difference(new: dict[str, str], known: list[dict[str, str]]) -> str:
    """What sets ``new`` apart from the known shapes most like it."""
    nearest = min(known, key=lambda old: sum(old.get(name) != shape for name, shape in new.items()), default={})
    changes = [
        f"{name} from {nearest.get(name, 'absent')} to {new[name]}" for name in new if nearest.get(name) != new[name]
    ]
    return ", ".join(changes[:4])
