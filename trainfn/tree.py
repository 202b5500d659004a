"""Arithmetic on trees of tensors, so that an optimizer reads like its equations.

A tree is any nesting of dicts, lists, tuples and NamedTuples. The vector operations (`add`, `mul`, `lerp`, …) take
trees of one structure and use PyTorch's multi-tensor kernels. All leaves take one launch and one graph node. `map` is
for everything else.

Tensors that are spread over ranks (`full`, `local`, `sum_over`, …) have their code in `_dtensor`.

optree walks the trees of `map`; the vector operations walk plain dicts, lists, tuples and NamedTuples themselves.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from trainfn import _batch_types, _dtensor
from trainfn._dtensor import full as full
from trainfn._dtensor import held
from trainfn._dtensor import is_distributed as is_distributed
from trainfn._dtensor import is_split as is_split
from trainfn._dtensor import local as local
from trainfn._dtensor import on_full as on_full
from trainfn._dtensor import split_like as split_like
from trainfn._dtensor import sum_over as sum_over
from trainfn._text import shortened
from trainfn._types import TrainState, Tree


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply ``fn`` leaf by leaf; the result has the structure of the first tree.

    >>> map(lambda x: x + 1, {"a": 1, "b": (2, 3)})
    {'a': 2, 'b': (3, 4)}
    """
    try:
        return optree.tree_map(fn, tree, *rest)
    except ValueError as error:
        if (said := _of_other_states([tree, *rest])) is None:
            raise
        raise ValueError(said) from error


def _of_other_states(trees: list[Tree]) -> str | None:
    """How to go on, where the trees are states of different modules."""

    def is_state(x: Any) -> bool:
        return isinstance(x, TrainState)

    found = [[type(x) for x in optree.tree_leaves(tree, is_leaf=is_state) if is_state(x)] for tree in trees]
    if not found[0] or any(len(kinds) != len(found[0]) for kinds in found) or all(k == found[0] for k in found):
        return None
    return (
        "tree.map(fn, state, other): the states are of two modules, and a state's type stands for its module. Map what"
        " they have in common: `tfn.tree.map(fn, state.params, other.params)`. States of one module come from one"
        " `tfn.init`, by `tfn.copy(state)`, `tfn.fork(state, 1)` or `state._replace(...)`."
    )


def _flat(like: Tree, tree: Tree) -> list[Any]:
    """The leaves of ``tree``, which has the structure of ``like``, in the order of ``like``."""
    if isinstance(like, Tensor):
        return [tree]
    if type(like) is dict:
        if like is not tree and like.keys() != tree.keys():
            raise ValueError(f"two trees differ: one has {_differing(like, tree)}, the other has not.")
        if _flat_dict(like):
            return list(tree.values()) if like is tree else [tree[name] for name in like]
        return [
            x for name, v in like.items() for x in ((tree[name],) if isinstance(v, Tensor) else _flat(v, tree[name]))
        ]
    if type(like) is list or type(like) is tuple or (isinstance(like, tuple) and hasattr(like, "_fields")):
        if len(like) != len(tree):
            raise ValueError(f"two trees differ: one has {len(like)} items where the other has {len(tree)}.")
        return [x for v, w in zip(like, tree, strict=True) for x in _flat(v, w)]
    return optree.tree_structure(like).flatten_up_to(tree)  # pyright: ignore[reportArgumentType]


def _flat_dict(tree: dict[Any, Any]) -> bool:
    """Whether all values are tensors; most trees are of this kind, and their leaves many."""
    return all([issubclass(kind, Tensor) for kind in set(builtins.map(type, tree.values()))])


def _differing(a: dict[Any, Any], b: dict[Any, Any]) -> str:
    return shortened(sorted(map(repr, a.keys() ^ b.keys())), write=str)


def _unflat(like: Tree, values: Iterator[Any]) -> Tree:
    """A tree with the structure of ``like``, of leaves in the order of `_flat`."""
    if isinstance(like, Tensor):
        return next(values)
    if type(like) is dict and _flat_dict(like):
        return dict(zip(like, values, strict=False))  # of an iterator that goes on
    if type(like) is dict:
        return {name: next(values) if isinstance(v, Tensor) else _unflat(v, values) for name, v in like.items()}
    if type(like) is list:
        return [_unflat(v, values) for v in like]
    if isinstance(like, tuple) and (type(like) is tuple or hasattr(like, "_fields")):
        items = [_unflat(v, values) for v in like]
        return type(like)(*items) if hasattr(like, "_fields") else tuple(items)
    structure = optree.tree_structure(like)  # pyright: ignore[reportArgumentType]
    return optree.tree_unflatten(structure, [next(values) for _ in range(structure.num_leaves)])


def is_traced(x: Any) -> bool:
    """Return whether a tensor has no numbers, because a step is being captured.

    >>> import torch
    >>> is_traced(torch.ones(2))
    False
    """
    return torch.compiler.is_compiling() or hasattr(held(x), "fake_mode")


def leaves(tree: Tree) -> list[Any]:
    """The leaves, in optree's order (dict keys sorted).

    >>> leaves({"b": 1, "a": (2, 3)})
    [2, 3, 1]
    """
    return optree.tree_leaves(tree)


def named_leaves(tree: Tree) -> dict[str, Any]:
    """The leaves by path, joined with ``/``: field names, dict keys and indices.

    >>> named_leaves({"a": 1, "b": (2, 3)})
    {'a': 1, 'b/0': 2, 'b/1': 3}
    """
    accessors, values, _ = optree.tree_flatten_with_accessor(tree)
    return {"/".join(_entry(e) for e in path): value for path, value in zip(accessors, values, strict=True)}


def with_leaves(tree: Tree, named: Mapping[str, Any]) -> Tree:
    """The same structure with other leaves, given by the paths of `named_leaves`.

    >>> with_leaves({"a": 1, "b": (2, 3)}, {"a": 10, "b/0": 20, "b/1": 30})
    {'a': 10, 'b': (20, 30)}
    """
    return optree.tree_unflatten(optree.tree_structure(tree), [named[name] for name in named_leaves(tree)])


def _entry(entry: Any) -> str:
    return str(entry.field) if isinstance(entry, optree.NamedTupleEntry) else str(entry.entry)


def _apply(op: Callable[..., Any], tree: Tree, *others: Any, **kwargs: Any) -> Tree:
    """Run a ``torch._foreach_*`` function over the leaves; a tree argument is flattened, a number is passed on."""
    flat = _flat(tree, tree)
    if not flat:
        return tree
    scalars = int | float if isinstance(tree, Tensor) else int | float | Tensor
    args = [other if isinstance(other, scalars) else _flat(tree, other) for other in others]
    return _unflat(tree, iter(op(flat, *args, **kwargs)))


def add(a: Tree, b: Tree | float, *, alpha: float = 1.0) -> Tree:
    """``a + alpha * b``, leaf by leaf.

    >>> import torch
    >>> add({"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}, alpha=10)
    {'w': tensor([21.])}
    """
    if isinstance(b, int | float):
        return _apply(torch._foreach_add, a, alpha * b)
    return _apply(torch._foreach_add, a, b, alpha=alpha)


def sub(a: Tree, b: Tree) -> Tree:
    """``a - b``, leaf by leaf.

    >>> import torch
    >>> sub([torch.tensor([3.0])], [torch.tensor([2.0])])
    [tensor([1.])]
    """
    return _apply(torch._foreach_sub, a, b)


def mul(a: Tree, b: Tree | Tensor | float) -> Tree:
    """``a * b``, where ``b`` is a tree, a number or a scalar tensor.

    >>> import torch
    >>> mul([torch.tensor([3.0]), torch.tensor([4.0])], 2.0)
    [tensor([6.]), tensor([8.])]
    """
    return _apply(torch._foreach_mul, a, b)


def div(a: Tree, b: Tree | Tensor | float) -> Tree:
    """``a / b``, where ``b`` is a tree, a number or a scalar tensor.

    >>> import torch
    >>> div([torch.tensor([3.0])], torch.tensor(2.0))
    [tensor([1.5000])]
    """
    return _apply(torch._foreach_div, a, b)


def sqrt(a: Tree) -> Tree:
    """The square root of every leaf.

    >>> import torch
    >>> sqrt([torch.tensor([9.0])])
    [tensor([3.])]
    """
    return _apply(torch._foreach_sqrt, a)


def lerp(a: Tree, b: Tree, weight: float) -> Tree:
    """``a + weight * (b - a)``: an exponential moving average with decay ``1 - weight``.

    >>> import torch
    >>> lerp([torch.tensor([0.0])], [torch.tensor([10.0])], 0.25)
    [tensor([2.5000])]
    """
    return _apply(torch._foreach_lerp, a, b, weight)


def addcmul(a: Tree, b: Tree, c: Tree, value: float = 1.0) -> Tree:
    """``a + value * b * c``, leaf by leaf.

    >>> import torch
    >>> one, two = [torch.tensor([1.0])], [torch.tensor([2.0])]
    >>> addcmul(one, two, two, value=0.5)
    [tensor([3.])]
    """
    return _apply(torch._foreach_addcmul, a, b, c, value=value)


def where(condition: Tensor, a: Tree, b: Tree) -> Tree:
    """``a`` if the scalar ``condition`` is true, else ``b``: without a branch, so it compiles.

    >>> import torch
    >>> where(torch.tensor(False), [torch.tensor(1.0)], [torch.tensor(2.0)])
    [tensor(2.)]
    """
    return map(lambda x, y: torch.where(condition, x, y), a, b)


def zeros_like(tree: Tree, dtype: torch.dtype | None = None) -> Tree:
    """A tree of zeros with the same shapes and devices.

    >>> import torch
    >>> zeros_like({"w": torch.ones(2)})
    {'w': tensor([0., 0.])}
    """
    return map(lambda x: torch.zeros_like(x, dtype=dtype), tree)


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Every floating-point leaf in ``dtype``, the others as they are.

    >>> import torch
    >>> cast([torch.ones(1), torch.tensor(3)], torch.bfloat16)
    [tensor([1.], dtype=torch.bfloat16), tensor(3)]
    """
    return map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    """Every leaf in the dtype of its counterpart.

    >>> import torch
    >>> cast_like([torch.ones(1)], [torch.tensor(3)])
    [tensor([1])]
    """
    flat, others = _flat(tree, tree), _flat(tree, like)
    if all([x.dtype == y.dtype for x, y in zip(flat, others, strict=True)]):
        return tree
    return _unflat(tree, iter([x.to(y.dtype) for x, y in zip(flat, others, strict=True)]))


def copy(tree: Tree) -> Tree:
    """A tree whose tensors share no memory with the given one.

    The way to keep a state that a donating step is about to overwrite.

    >>> import torch
    >>> tree = {"w": torch.zeros(1)}
    >>> kept = copy(tree)
    >>> tree["w"] += 1
    >>> kept
    {'w': tensor([0.])}
    """
    return map(lambda x: x.clone() if hasattr(x, "clone") else x, tree)


def global_norm(tree: Tree) -> Tensor:
    """The 2-norm of all leaves seen as one vector, ``float32[]``; 0 for an empty tree.

    >>> import torch
    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    flat = _flat(tree, tree)
    if not flat:
        return torch.zeros(())
    if any(map(is_distributed, flat)):
        return _dtensor.norm(flat)
    return torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(flat)]))


def matches(name: str, pattern: str) -> bool:
    r"""Whether the regular expression ``pattern`` occurs in ``name`` (case-insensitive).

    >>> matches("blocks.0.ln1.weight", r"(ln|norm)\d*\.weight$")
    True
    """
    return re.search(pattern, name, re.IGNORECASE) is not None


def row_count(batch: Tree) -> int:
    """The number of rows: the first dimension of the batch's first tensor that has one; 1 if there are only numbers.

    A batch may be of your own type: a mapping, a dataclass, or an object with a method ``to``.

    Raises:
        TypeError: If the batch has no tensor, and something whose rows can't be counted.

    >>> import torch
    >>> row_count({"scale": torch.tensor(1.0), "x": torch.zeros(4, 2)})
    4
    """
    _batch_types.recognize(batch)
    # Objects come last: one beside other tensors is seldom a table of rows.
    found = [*optree.tree_leaves(batch, is_leaf=_batch_types.is_object), *optree.tree_leaves(batch)]
    for leaf in found:
        if _has_rows(leaf):
            return leaf.shape[0]
    unknown = [leaf for leaf in found if not isinstance(leaf, int | float | complex) and not hasattr(leaf, "ndim")]
    if unknown:
        given = "a batch" if type(batch) is type(unknown[-1]) else f"a batch with a {type(unknown[-1]).__name__}"
        raise TypeError(
            f"{given} of type {type(batch).__name__} has no tensor, so its rows can't be counted. Give the step"
            ' tensors, as in `{"x": torch.stack(images)}`; or, for a type of your own,'
            " `optree.register_pytree_node(...)`, which says what its tensors are."
        )
    return 1


def _has_rows(leaf: Any) -> bool:
    return getattr(leaf, "ndim", 0) > 0  # a tensor, or an array of NumPy


def split(batch: Tree, num: int) -> Iterator[tuple[Tree, int]]:
    """Cut a batch into ``num`` pieces along the rows, sizes as equal as can be; yield (piece, first row).

    Tensors without dimensions, and values of other types, go to every piece.

    Raises:
        ValueError: If the batch has fewer rows than pieces, or its tensors disagree on the number of rows.

    >>> import torch
    >>> [(piece["x"].tolist(), row) for piece, row in split({"x": torch.arange(5)}, 2)]
    [([0, 1, 2], 0), ([3, 4], 3)]
    """
    rows = row_count(batch)
    for name, leaf in named_leaves(batch).items():
        if _has_rows(leaf) and leaf.shape[0] != rows:
            raise ValueError(
                f"a batch is split along its rows, but its first tensor has {rows} rows and batch[{name!r}]"
                f" {leaf.shape[0]}, with the shape {list(leaf.shape)}. Give every tensor the rows as"
                " its first dimension, or make it a scalar, which every micro-batch gets whole."
            )
    if rows < num:
        raise ValueError(
            f"accumulate={num} needs at least {num} rows, and this batch has {rows}. Use accumulate={rows} or less, or"
            " a larger batch."
        )
    first = 0
    for i in range(num):
        size = rows // num + (i < rows % num)
        cut = slice(first, first + size)
        yield map(lambda x, c=cut: x[c] if _has_rows(x) else x, batch), first
        first += size
