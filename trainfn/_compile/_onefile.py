"""Inductor's C++ kernels in a few files instead of one file each: nine tenths of each file are the same headers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_FULL = 250_000  # characters of kernels: so many are handed to the C++ compiler while Python generates more

_HEADER = """
#include <Python.h>
#include <cerrno>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <torch/csrc/inductor/cpp_prefix.h>
static void* (*data_of)(PyObject*);
template <typename T> static inline T argument(PyObject* args, size_t n) {
    return static_cast<T>(data_of(PyTuple_GET_ITEM(args, n)));
}
static void no_error() { if (PyErr_Occurred()) [[unlikely]] throw std::runtime_error("expected a number"); }
template <> inline int64_t argument<int64_t>(PyObject* args, size_t n) {
    auto value = PyLong_AsSsize_t(PyTuple_GET_ITEM(args, n)); no_error(); return value;
}
template <> inline uintptr_t argument<uintptr_t>(PyObject* args, size_t n) {
    auto value = PyLong_AsVoidPtr(PyTuple_GET_ITEM(args, n)); no_error(); return reinterpret_cast<uintptr_t>(value);
}
template <> inline float argument<float>(PyObject* args, size_t n) {
    auto value = PyFloat_AsDouble(PyTuple_GET_ITEM(args, n)); no_error(); return static_cast<float>(value);
}
template <typename F> static PyObject* guarded(PyObject* args, Py_ssize_t count, F call) {
    try {
        if (!PyTuple_CheckExact(args) || PyTuple_GET_SIZE(args) != count) [[unlikely]]
            throw std::runtime_error("wrong number of arguments");
        call(); Py_RETURN_NONE;
    } catch (std::exception const& e) { PyErr_SetString(PyExc_RuntimeError, e.what()); return nullptr; }
    catch (...) { PyErr_SetString(PyExc_RuntimeError, "unhandled error"); return nullptr; }
}
"""
_KERNEL = """
namespace k%(n)d {
%(source)s
static PyObject* call(PyObject*, PyObject* args) {
    return guarded(args, %(count)d, [&] { kernel(%(args)s); });
}
}
"""
_FOOTER = """
static PyMethodDef methods[] = {
%(methods)s
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module_of_kernels = {PyModuleDef_HEAD_INIT, "kernel", NULL, -1, methods};
PyMODINIT_FUNC PyInit_kernel(void) {
    const char* address = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR");
    if (!address) { PyErr_SetString(PyExc_RuntimeError, "no address of torch's tensors"); return nullptr; }
    data_of = reinterpret_cast<decltype(data_of)>(static_cast<uintptr_t>(std::strtoull(address, nullptr, 10)));
    PyObject* module = PyModule_Create(&module_of_kernels);
#ifdef Py_GIL_DISABLED
    if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
    return module;
}
"""


@dataclasses.dataclass(eq=False)
class _Kernel:
    """One kernel's source, and the name under which each generated module wants to call it."""

    argtypes: tuple[str, ...]
    source: str
    wanted: list[tuple[dict[str, Any], str]] = dataclasses.field(default_factory=list)


class _Files:
    """Gathers kernels, gives them to the C++ compiler in the background, and puts them where they are wanted."""

    def __init__(self) -> None:
        self._pending: dict[tuple[tuple[str, ...], str], _Kernel] = {}
        self._libraries: list[tuple[list[_Kernel], Callable[[], object]]] = []
        self._pool = ThreadPoolExecutor(2)

    def add(self, argtypes: list[str], source: str) -> _Kernel:
        return self._pending.setdefault((tuple(argtypes), source), _Kernel(tuple(argtypes), source))

    def want(self, scope: dict[str, Any]) -> None:
        """Note where a generated module's kernels belong."""
        for name, kernel in scope.items():
            if isinstance(kernel, _Kernel):
                kernel.wanted.append((scope, name))
        if sum(len(kernel.source) for kernel in self._pending.values()) > _FULL:
            self.flush()

    def flush(self) -> None:
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        kernels, self._pending = list(self._pending.values()), {}
        if kernels:
            source = _library(kernels)
            load = CppPythonBindingsCodeCache.load_async(source, submit_fn=self._pool.submit, extra_flags=("-g0",))
            self._libraries.append((kernels, load))

    def finish(self) -> None:
        self.flush()
        for kernels, load in self._libraries:
            library = load()
            for n, kernel in enumerate(kernels):
                for scope, name in kernel.wanted:
                    scope[name] = getattr(library, f"k{n}")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _library(kernels: list[_Kernel]) -> str:
    includes: dict[str, None] = {}
    bodies: list[str] = []
    for n, kernel in enumerate(kernels):
        lines = kernel.source.splitlines()
        includes |= dict.fromkeys(line for line in lines if line.startswith("#include"))
        source = "\n".join(line for line in lines if not line.startswith("#include")).replace('extern "C"', "")
        args = ", ".join(f"argument<{t.replace('const ', '')}>(args, {i})" for i, t in enumerate(kernel.argtypes))
        bodies.append(_KERNEL % {"n": n, "source": source, "count": len(kernel.argtypes), "args": args})
    methods = "\n".join(f'    {{"k{n}", k{n}::call, METH_VARARGS, ""}},' for n in range(len(kernels)))
    return "\n".join([_HEADER, *includes, *bodies, _FOOTER % {"methods": methods}])


@contextlib.contextmanager
def few_files() -> Generator[None]:
    """While this is open, what inductor compiles gets its C++ kernels when it closes: don't run it before.

    Where torch's internals aren't those known, all goes inductor's own way.
    """
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    if sys.platform != "linux" or not hasattr(AsyncCompile, "cpp_pybinding"):
        yield
        return
    files, wait = _Files(), AsyncCompile.wait

    def wait_less(self: AsyncCompile, scope: dict[str, Any]) -> None:
        files.want(scope)
        wait(self, scope)

    settings = {"cpp_cache_precompile_headers": False}
    with contextlib.ExitStack() as stack:
        stack.callback(files.close)
        stack.enter_context(config.patch({k: v for k, v in settings.items() if hasattr(config, k)}))
        stack.enter_context(_patched(AsyncCompile, "cpp_pybinding", lambda _self, types, code: files.add(types, code)))
        stack.enter_context(_patched(AsyncCompile, "wait", wait_less))
        stack.enter_context(known_instructions())
        yield
        files.finish()


@contextlib.contextmanager
def _patched(owner: object, name: str, value: object) -> Generator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextlib.contextmanager
def known_instructions() -> Generator[None]:
    """Ask the compiler whether it knows a set of instructions; inductor compiles and loads a program for each set."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.cpu_vec_isa import VecISA

        check = VecISA.check_build
        compiler = get_cpp_compiler()
    except (ImportError, AttributeError):
        yield
        return
    known = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # torch was built for them and runs them

    def quick(isa: Any, code: str) -> bool:
        return _accepts(compiler, isa.build_arch_flags()) if known else check(isa, code)

    with _patched(VecISA, "check_build", quick):
        yield


@functools.cache
def _accepts(compiler: str, flags: str) -> bool:
    command = [compiler, *flags.split(), "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
