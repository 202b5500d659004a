"""NEFTune: noise on the input embeddings, while training.

Source: https://arxiv.org/abs/2310.05914.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator

import torch
from torch import Tensor, nn

from trainfn.hf._step._counting import base_of


@contextlib.contextmanager
def neftune(model: nn.Module, alpha: float) -> Generator[None]:
    """Add uniform noise in ``± alpha / sqrt(positions * width)`` to the embeddings of training steps.

    The noise is drawn from the state's key, as all randomness of a step. The hook is removed when the block ends, also
    after an error.

    Raises:
        ValueError: If ``alpha`` is not positive.
    """
    if alpha <= 0:
        raise ValueError(
            f"`TrainingArguments(neftune_noise_alpha={alpha})` can't work: the scale of the noise is positive. Write"
            " `neftune_noise_alpha=5.0`, or leave it out."
        )

    def add_noise(module: nn.Module, _: object, output: Tensor) -> Tensor:
        if not module.training:
            return output
        bound = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + (2 * torch.rand_like(output) - 1) * bound

    embeddings: Callable[[], nn.Module] = base_of(model).get_input_embeddings  # type: ignore[assignment]
    handle = embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
