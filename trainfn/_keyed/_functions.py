"""Each random function of torch with its keyed counterpart, arguments as torch has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainfn._keyed._dropout import alpha, attention, channels, dropout_of, in_place, kernel, plain_dropout
from trainfn.errors import RandomnessError

if TYPE_CHECKING:
    from trainfn._keyed._draws import Draws


def _no_generator(generator: object) -> None:
    if generator is not None:
        raise RandomnessError(
            "`generator=` inside a step: a generator is state outside the TrainState, so the step would not be a"
            " function of its inputs. Leave the argument out; the draw then comes from state.key."
        )


def _size(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int | torch.SymInt) else tuple(size)


def _place(device: Any) -> Any:
    return torch.get_default_device() if device is None else device


# --- new tensors ------------------------------------------------------------------------------------------------


def _rand(kind: str) -> Callable[..., Tensor]:
    def rand(
        d: Draws,
        *shape: Any,
        size: Any = None,
        generator: Any = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        requires_grad: bool = False,
        **_: Any,
    ) -> Tensor:
        _no_generator(generator)
        out = getattr(d, kind)(_size(shape) if size is None else tuple(size), dtype, _place(device))
        return out.requires_grad_() if requires_grad else out

    return rand


def _rand_like(kind: str) -> Callable[..., Tensor]:
    def rand_like(d: Draws, input: Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
        return getattr(d, kind)(input.shape, dtype or input.dtype, device or input.device)

    return rand_like


def _randint(
    d: Draws,
    *args: Any,
    generator: Any = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
    **kw: Any,
) -> Tensor:
    _no_generator(generator)
    named = [kw[name] for name in ("low", "high", "size") if name in kw]
    *bounds, size = [*args, *named]
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    return d.integers(low, high, tuple(size), dtype or torch.int64, _place(device))


def _randint_like(d: Draws, input: Tensor, *args: Any, dtype: torch.dtype | None = None, **kw: Any) -> Tensor:
    bounds = [*args, *(kw[name] for name in ("low", "high") if name in kw)]
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    return d.integers(low, high, tuple(input.shape), dtype or input.dtype, input.device)


def _randperm(d: Draws, n: int, *, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    _no_generator(generator)
    return d.permutation(n).to(dtype=dtype or torch.int64, device=_place(device))


# --- samples from given parameters ------------------------------------------------------------------------------


def _bernoulli(d: Draws, input: Tensor, p: float | None = None, *, generator: Any = None, out: Any = None) -> Tensor:
    _no_generator(generator)
    return d.keep(input if p is None else p, input.shape, input.device).to(input.dtype)


def _normal(
    d: Draws,
    mean: Tensor | float,
    std: Tensor | float = 1.0,
    size: Any = None,
    *,
    generator: Any = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
    **_: Any,
) -> Tensor:
    _no_generator(generator)
    like = mean if isinstance(mean, Tensor) else std
    if isinstance(like, Tensor):
        both = torch.broadcast_shapes(*(x.shape for x in (mean, std) if isinstance(x, Tensor)))
        return d.normal(both, like.dtype, like.device) * std + mean
    return d.normal(tuple(size), dtype, device) * std + mean


def _multinomial(
    d: Draws, input: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None, **_: Any
) -> Tensor:
    _no_generator(generator)
    if not replacement:  # the smallest of exponential clocks with these rates ring first
        return (input / d.exponential(input.shape, torch.float32, input.device)).topk(num_samples, dim=-1).indices
    cumulative = input.double().cumsum(-1)
    u = d.uniform((*input.shape[:-1], num_samples), torch.float64, input.device)
    picked = torch.searchsorted(cumulative, u * cumulative[..., -1:], right=True)
    return picked.clamp(max=input.shape[-1] - 1)


def _gumbel_softmax(
    d: Draws, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    gumbels = -d.exponential(logits.shape, logits.dtype, logits.device).log()
    soft = ((logits + gumbels) / tau).softmax(dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(logits).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft


def _rrelu(
    d: Draws,
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
    generator: Any = None,
) -> Tensor:
    _no_generator(generator)
    if not training:
        return F.rrelu(input, lower, upper, False, inplace)
    slope = d.uniform(input.shape, input.dtype, input.device, low=lower, high=upper)
    out = torch.where(input >= 0, input, input * slope)
    return input.copy_(out) if inplace else out


# --- tensors filled in place ------------------------------------------------------------------------------------


def _fill(sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fill(d: Draws, tensor: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
        _no_generator(generator)
        return tensor.copy_(sample(d, tensor, *args, **kwargs))

    return fill


def _random_(d: Draws, x: Tensor, low: int = 0, to: int | None = None, **kw: int) -> Tensor:
    low, to = kw.get("from", low), to
    if to is None and low:
        low, to = 0, low
    elif to is None:  # all integers that the dtype holds without gaps
        to = int(2 / torch.finfo(x.dtype).eps) if x.is_floating_point() else torch.iinfo(x.dtype).max + 1
        to = min(to, 2**63 - 1)
    return d.integers(low, to, tuple(x.shape), torch.int64, x.device)


_FILLS: dict[Any, Callable[..., Tensor]] = {
    Tensor.uniform_: lambda d, x, low=0.0, to=1.0, **kw: d.uniform(
        x.shape, x.dtype, x.device, low=kw.get("from", low), high=to
    ),
    Tensor.normal_: lambda d, x, mean=0.0, std=1.0: d.normal(x.shape, x.dtype, x.device) * std + mean,
    Tensor.bernoulli_: lambda d, x, p=0.5: d.keep(p, x.shape, x.device).to(x.dtype),
    Tensor.exponential_: lambda d, x, lambd=1.0: d.exponential(x.shape, x.dtype, x.device) / lambd,
    Tensor.log_normal_: lambda d, x, mean=1.0, std=2.0: (d.normal(x.shape, x.dtype, x.device) * std + mean).exp(),
    Tensor.cauchy_: lambda d, x, median=0.0, sigma=1.0: (
        torch.tan(math.pi * (d.uniform(x.shape, x.dtype, x.device) - 0.5)) * sigma + median
    ),
    Tensor.geometric_: lambda d, x, p: (
        torch.ceil(-d.exponential(x.shape, torch.float32, x.device) / math.log1p(-p)).clamp(min=1).to(x.dtype)
    ),
    Tensor.random_: _random_,
}


def _kaiming_uniform(
    d: Draws, tensor: Tensor, a: float = 0, mode: Any = "fan_in", nonlinearity: str = "leaky_relu", **_: Any
) -> Tensor:
    fan = nn.init._calculate_correct_fan(tensor, mode)
    bound = nn.init.calculate_gain(nonlinearity, a) * math.sqrt(3.0 / fan)  # type: ignore[arg-type]
    return d.uniform(tensor.shape, tensor.dtype, tensor.device, low=-bound, high=bound)


_INITIALIZERS: dict[Any, Callable[..., Tensor]] = {
    nn.init.uniform_: lambda d, tensor, a=0.0, b=1.0: d.uniform(
        tensor.shape, tensor.dtype, tensor.device, low=a, high=b
    ),
    nn.init.normal_: lambda d, tensor, mean=0.0, std=1.0: (
        d.normal(tensor.shape, tensor.dtype, tensor.device) * std + mean
    ),
    nn.init.kaiming_uniform_: _kaiming_uniform,
}


# --- what can't be keyed ----------------------------------------------------------------------------------------


def _refuse(name: str, instead: str) -> Callable[..., Any]:
    def refused(d: Draws, *args: Any, **kwargs: Any) -> Any:
        raise RandomnessError(
            f"`{name}` inside a step draws from the global generator inside its kernel, where state.key can't reach."
            f" {instead}"
        )

    return refused


def _recurrent(func: Any, name: str) -> Callable[..., Any]:
    refused = _refuse(name, "Use one layer per module with nn.Dropout between them, or dropout=0.")

    def run(d: Draws, *args: Any, **kwargs: Any) -> Any:
        at = next(i for i, a in enumerate(args) if isinstance(a, bool))  # has_biases, num_layers, dropout, train
        if args[at + 2] > 0 and args[at + 3]:
            refused(d)
        return func(*args, **kwargs)

    return run


_MADE_BEFORE = "Draw it before the step and pass it in the batch, keyed with `trainfn.random`."

_feature = dropout_of(lambda x: (*x.shape[:2], *(1,) * (x.dim() - 2)))
_alpha, _feature_alpha = alpha(whole_channels=False), alpha(whole_channels=True)

HANDLERS: dict[Any, Callable[..., Any]] = {
    F.dropout: plain_dropout,
    F.dropout1d: dropout_of(channels(1)),
    F.dropout2d: dropout_of(channels(2)),
    F.dropout3d: dropout_of(channels(3)),
    F.alpha_dropout: _alpha,
    F.feature_alpha_dropout: _feature_alpha,
    torch.dropout: kernel(plain_dropout),
    torch.dropout_: in_place(kernel(plain_dropout)),
    torch.feature_dropout: kernel(_feature),
    torch.feature_dropout_: in_place(kernel(_feature)),
    torch.alpha_dropout: kernel(_alpha),
    torch.alpha_dropout_: in_place(kernel(_alpha)),
    torch.feature_alpha_dropout: kernel(_feature_alpha),
    torch.feature_alpha_dropout_: in_place(kernel(_feature_alpha)),
    F.scaled_dot_product_attention: attention,
    F.gumbel_softmax: _gumbel_softmax,
    **dict.fromkeys((F.rrelu, torch.rrelu), _rrelu),
    torch.rrelu_: in_place(_rrelu),
    torch.rand: _rand("uniform"),
    torch.randn: _rand("normal"),
    torch.rand_like: _rand_like("uniform"),
    torch.randn_like: _rand_like("normal"),
    torch.randint: _randint,
    torch.randint_like: _randint_like,
    torch.randperm: _randperm,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    torch.normal: _normal,
    torch.multinomial: _multinomial,
    Tensor.multinomial: _multinomial,
    **{function: _fill(sample) for function, sample in _FILLS.items()},
    **{function: torch.no_grad()(_fill(sample)) for function, sample in _INITIALIZERS.items()},
    torch.lstm: _recurrent(torch.lstm, "nn.LSTM(dropout=...)"),
    torch.gru: _recurrent(torch.gru, "nn.GRU(dropout=...)"),
    torch.rnn_tanh: _recurrent(torch.rnn_tanh, "nn.RNN(dropout=...)"),
    torch.rnn_relu: _recurrent(torch.rnn_relu, "nn.RNN(dropout=...)"),
    torch.poisson: _refuse("torch.poisson", _MADE_BEFORE),
    torch.native_dropout: _refuse("torch.native_dropout", "Use F.dropout."),
    torch.binomial: _refuse("torch.binomial", _MADE_BEFORE),
    torch._standard_gamma: _refuse("torch.distributions' Gamma, Beta and Dirichlet", _MADE_BEFORE),
    torch._sample_dirichlet: _refuse("torch.distributions.Dirichlet", _MADE_BEFORE),
    F.fractional_max_pool2d: _refuse("F.fractional_max_pool2d", "Use F.max_pool2d."),
    F.fractional_max_pool2d_with_indices: _refuse("F.fractional_max_pool2d", "Use F.max_pool2d."),
    F.fractional_max_pool3d: _refuse("F.fractional_max_pool3d", "Use F.max_pool3d."),
    F.fractional_max_pool3d_with_indices: _refuse("F.fractional_max_pool3d", "Use F.max_pool3d."),
}


def draws(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of a kernel, a node of a captured graph, draws from torch's own generator.

    >>> draws(torch.ops.aten.bernoulli.default, (torch.ones(1),), {})
    True
    >>> draws(torch.ops.aten.dropout.default, (torch.ones(1), 0.5, False), {})
    False
    """
    if not isinstance(kernel, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in kernel.tags:
        return False
    declared = kernel._schema.arguments
    given = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    given |= dict(zip([argument.name for argument in declared], args, strict=False)) | kwargs
    switches = [given.get(name) for name in ("train", "training", "dropout", "dropout_p")]  # attention always counts
    return not any(value is False or (isinstance(value, float) and value == 0.0) for value in switches)
