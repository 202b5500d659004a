"""Compile a graph in another process, ahead of its use: this one then finds every part of it in the caches on the disk.

A thread could not do it: torch's compiler changes settings of the whole process, under the steps that run meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import fx

from trainfn._compile._backend import Settings, configured
from trainfn._compile._trace import Trace

# --- this process ---------------------------------------------------------------------------------------------------


class Helper:
    """A second process, which compiles what it is given. It ends after `last`, and at the latest with this one."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as unless_it_starts:
            self._errors: IO[bytes] = unless_it_starts.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("_helper.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                start_new_session=True,  # Ctrl-C is not meant for it
            )
            unless_it_starts.pop_all()
        weakref.finalize(self, _end, self._process, self._errors, os.getpid())
        self._waiting: list[Hashable] = []
        self._answers: dict[Hashable, str | None] = {}

    def give(self, key: Hashable, make: Callable[[], bytes]) -> None:
        """Hand over a graph, unless an equal one was."""
        if key in self._waiting or key in self._answers:
            return
        try:
            order = make()
            self._send(len(order).to_bytes(8, "little") + order)
            self._waiting.append(key)
        except BrokenPipeError:
            self._answers[key] = self._last_words()
        except Exception as error:  # the pickler may not know all that a graph holds
            self._answers[key] = f"{type(error).__name__}: {error}"

    def last(self) -> None:
        """Let the process end by itself once it has compiled what it was given."""
        with contextlib.suppress(OSError):
            self._send(bytes(8))

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def wait(self, key: Hashable) -> None:
        """Wait until a graph is compiled, if it was given; warn if it could not be."""
        assert self._process.stdout is not None
        while key in self._waiting:
            line = self._process.stdout.readline()
            self._answers[self._waiting.pop(0)] = json.loads(line) if line else self._last_words()
        reason = self._answers.get(key)
        if reason is not None:
            self._answers[key] = None
            warnings.warn(
                f"jit(step, warm=...): the second process could not compile the step: {reason}\nThis process compiles"
                " it now. If it happens in each run, leave out `warm=`.",
                stacklevel=2,
            )

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"it ended with code {code}. {lines[-1] if lines else ''}".strip()


def _end(process: subprocess.Popen[bytes], errors: IO[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process has no part in this
        return
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # with the C++ compilers that it has started
        process.kill()
        process.wait()
    for file in (process.stdin, process.stdout, errors):
        with contextlib.suppress(OSError):
            file.close()  # type: ignore[union-attr]


def order(trace: Trace, settings: Settings) -> bytes:
    """Return all that `carry_out` needs to compile a graph as this process would."""
    from torch.fx._graph_pickler import GraphPickler, Options

    options = Options(ops_filter=None, node_metadata_key_filter=lambda key: key in ("val", "stack_trace"))
    graph = GraphPickler.dumps(trace.graph, options)
    with configured(trace, settings) as config:
        return pickle.dumps((graph, trace.mode.static_shapes, config.save_config(), _conditions()))


# --- the other process ----------------------------------------------------------------------------------------------


def carry_out(order: bytes) -> None:
    """Compile an ordered graph."""
    from torch._inductor import config
    from torch._subclasses import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from trainfn._compile._inductor import compile_graph

    graph, exact, saved, conditions = pickle.loads(order)
    for (read, put), value in zip(_SETTINGS, conditions, strict=True):
        if value not in (None, read()):  # to set what is set already may be another setting
            put(value)
    config.load_config(saved)
    mode = FakeTensorMode(allow_non_fake_inputs=True, static_shapes=exact, shape_env=ShapeEnv())
    with torch.no_grad():
        compile_graph(cast("fx.GraphModule", GraphPickler.loads(graph, mode)))


def _autocast(device: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    def put(found: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, found[0])
        torch.set_autocast_dtype(device, found[1])

    return lambda: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)), put


def _reduced(kind: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    name, matmul = f"allow_{kind}_reduced_precision_reduction", torch.backends.cuda.matmul
    return lambda: getattr(matmul, name), lambda value: setattr(matmul, name, value)


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


# The compiler, and the key of its caches, depend on these besides its own settings: how to read and how to set each.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (_deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
    (lambda: torch.cuda.current_device() if torch.cuda.is_initialized() else None, torch.cuda.set_device),
    *map(_autocast, ("cpu", "cuda")),
    *map(_reduced, ("fp16", "bf16")),
)


def _conditions() -> list[Any]:
    return [read() for read, _ in _SETTINGS]
