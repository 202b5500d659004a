"""The user's own lines: which of them made each operation of a graph, and which one a capture stopped at."""

from __future__ import annotations

import contextlib
import functools
import linecache
import sys
from collections.abc import Generator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn
from torch.fx import traceback as fx_traceback
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode

_FILES = (torch.__file__, optree.__file__, str(Path(__file__).parent))
_LIBRARIES = tuple(f"{Path(file).parent}/" for file in _FILES)
_PYTHON = f"{Path(linecache.__file__).parent}/"


_READS = frozenset(
    ("item", "tolist", "numpy", "equal", "__float__", "__int__", "__bool__", "__index__", "__complex__", "__array__")
)


class Line(NamedTuple):
    """A place in a source file."""

    file: str
    number: int
    function: str

    @property
    def text(self) -> str:
        """The source text of the line."""
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        return f'  File "{self.file}", line {self.number}, in {self.function}\n    {self.text}\n'


@functools.cache
def is_ours(file: str) -> bool:
    """Return whether a file belongs to torch, optree or this package."""
    return file.startswith(_LIBRARIES)


@functools.cache
def is_library(file: str) -> bool:
    """Return whether a file belongs to torch, to Python or to this package, or can't be shown."""
    python = file.startswith(_PYTHON) and "site-packages" not in file
    return python or file.startswith((*_LIBRARIES, "<frozen", "<string>", "<attrs", "<eval_with_key>"))


def lines_of(traceback: TracebackType | None) -> list[Line]:
    """Return the user's lines of a traceback, the outermost first."""
    found: list[Line] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not is_library(code.co_filename):
            found.append(Line(code.co_filename, traceback.tb_lineno, code.co_name))
        traceback = traceback.tb_next
    return found


class Lines(TorchFunctionMode):
    """Gives each node of a graph the user's line and module path, while it is made.

    Attributes:
        asked: The function of torch that was called last; after an error, the one that raised.
        read: Tensors from outside whose numbers Python took.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = ""
        self.read: list[Tensor] = []
        self._texts: dict[tuple[Any, int], str] = {}
        self._base: FrameType | None = None
        self._stack: list[tuple[str, type]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the line, and run the function."""
        if torch.compiler.is_compiling():  # the branches of `torch.cond`, which torch's own tracer reads
            return func(*args, **(kwargs or {}))
        meta = fx_traceback.current_meta
        meta["stack_trace"] = self._where()
        self.asked = getattr(func, "__name__", str(func))
        if self.asked in _READS:
            self.read += [x for x in args if isinstance(x, Tensor) and not hasattr(x, "fake_mode")]
        return func(*args, **(kwargs or {}))

    def _where(self) -> str:
        frame: FrameType | None = sys._getframe(2)
        found: list[str] = []
        while frame is not None and frame is not self._base:
            code = frame.f_code
            if not is_library(code.co_filename):
                at = (code, frame.f_lineno)
                if at not in self._texts:
                    self._texts[at] = str(Line(code.co_filename, frame.f_lineno, code.co_name))
                found.append(self._texts[at])
            frame = frame.f_back
        return "".join(reversed(found))

    @contextlib.contextmanager
    def recorded(self, modules: nn.Module | None) -> Generator[None]:
        """Record in this block; ``modules`` says which paths there are."""
        named = {} if modules is None else dict(modules.named_modules())
        names = {id(module): name for name, module in named.items()}

        def enter(module: nn.Module, *_: object) -> None:
            if id(module) in names:
                self._stack.append((names[id(module)], type(module)))
                self._tell()

        def leave(module: nn.Module, *_: object) -> None:
            if id(module) in names and self._stack:
                self._stack.pop()
                self._tell()

        self._base = sys._getframe(2)
        # A module that was compiled before warns of hooks.
        hooks = (
            []
            if any(type(module).__name__ == "OptimizedModule" for module in named.values())
            else [
                nn_module.register_module_forward_pre_hook(enter),
                nn_module.register_module_forward_hook(leave, always_call=True),
            ]
        )
        try:
            with fx_traceback.preserve_node_meta(), self:
                yield
        finally:
            self._base = None
            for hook in hooks:
                hook.remove()

    def _tell(self) -> None:
        path = {name: (name, kind) for name, kind in self._stack}
        if path:
            fx_traceback.current_meta["nn_module_stack"] = path
        else:
            fx_traceback.current_meta.pop("nn_module_stack", None)
