"""Where the device tests run: on `TRAINFN_DEVICE`, such as cuda; on a CPU unless it is set.

    TRAINFN_DEVICE=cuda python -m pytest tests/test_device.py tests/test_device_trainer.py -n 8 --dist=load

On a CPU steps are captured but not handed to the code generator. The tests beside these have each claim there, so that
these run there one way only, which keeps them in order; with TRAINFN_LONG=1, both ways.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import torch

import trainfn as tfn
from tests.helpers import long

DEVICE = torch.device(os.environ.get("TRAINFN_DEVICE", "cpu"))
ACCELERATOR = DEVICE.type != "cpu"
BACKEND = "inductor" if ACCELERATOR else "eager"

# What an accelerator shows, and what a CPU shows elsewhere.
both_ways = (lambda x: x) if ACCELERATOR else long
on_an_accelerator = pytest.mark.skipif(not ACCELERATOR, reason="takes an accelerator: TRAINFN_DEVICE=cuda")
on_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="takes a GPU of CUDA: TRAINFN_DEVICE=cuda")


def put(x: Any) -> Any:
    """A module or a tree of tensors on the device."""
    if isinstance(x, torch.nn.Module):
        return x.to(DEVICE)
    return tfn.tree.map(lambda leaf: leaf.to(DEVICE), x)


def jit(step: Any, **options: Any) -> tfn.Compiled:
    """The step compiled for the device."""
    return tfn.jit(step, **{"backend": BACKEND, **options})


@contextlib.contextmanager
def no_waiting():
    """Whatever makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def exact_products():
    """Matrix products and convolutions of float32 numbers in float32, not in TF32."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before
