"""Trees and tensors in JSON: what a saved step takes and returns."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import optree
from torch import Tensor

from trainfn._compile._file_format import Description
from trainfn._compile._structure import Dict, Leaf, Other, Row, Structure, leaf_names
from trainfn._compile._trace import Output
from trainfn._dtensor import held, spec_of
from trainfn._types import TrainState

_PLAIN = (bool, int, float, str, type(None))
_NONE: Any = optree.tree_structure(None)  # type: ignore[arg-type]
_STATE = f"{TrainState.__module__}:{TrainState.__qualname__}"


# --- containers ---------------------------------------------------------------------------------------------------


def containers(found: Structure, call: str) -> Any:
    """Describe a structure.

    Raises:
        ValueError: If it holds a container that can't be named in a file.
    """
    if isinstance(found, Leaf):
        return "leaf"
    if isinstance(found, Other):
        if found.spec == _NONE:
            return "none"
        raise ValueError(
            f"{call}: a file can't name the container {found.spec}. Use dicts, lists, tuples and NamedTuples."
        )
    children = found.children or (Leaf(),) * found.size
    items = [containers(child, call) for child in children]
    if isinstance(found, Dict):
        odd = next((name for name in found.names if type(name) not in (str, int)), None)
        if odd is not None:
            raise ValueError(f"{call}: a file can't name the key {odd!r} of a dict. Use strings.")
        return {"kind": "dict", "keys": list(found.names), "items": items}
    if found.kind in (list, tuple):
        return {"kind": found.kind.__name__, "items": items}
    return {"kind": _path(found.kind), "items": items}


def unordered(found: Any) -> Any:
    """Return what is equal for containers that differ in the order of the names of their dicts."""
    if isinstance(found, str):
        return found
    items = [unordered(item) for item in found["items"]]
    if found["kind"] != "dict":
        return (found["kind"], items)
    return ("dict", sorted(zip(found["keys"], items, strict=True), key=lambda pair: repr(pair[0])))


def _path(kind: type) -> str:
    """The name of a NamedTuple; a state's own type is the module's, and is known from the state that comes in."""
    return _STATE if issubclass(kind, TrainState) else f"{kind.__module__}:{kind.__qualname__}"


def structure_of(described: Any, state: type) -> Structure:
    """Make the structure that was described; ``state`` is the type of states.

    Raises:
        ValueError: If it needs a type that this program has not imported.
    """
    if described == "leaf":
        return Leaf()
    if described == "none":
        return Other(_NONE, 0)
    children = tuple(structure_of(item, state) for item in described["items"])
    size, kind = sum(child.size for child in children), described["kind"]
    if kind == "dict":
        plain = all(isinstance(child, Leaf) for child in children)
        return Dict(tuple(described["keys"]), () if plain else children, size)
    return Row({"list": list, "tuple": tuple, _STATE: state}.get(kind) or _imported(kind), children, size)


def _imported(path: str) -> type:
    """A type by its name. Nothing is imported for it: a name in a file must not choose what code runs."""
    module, _, names = path.partition(":")
    found: Any = sys.modules.get(module)
    for name in names.split("."):
        found = getattr(found, name, None)
    if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields"):
        return found
    raise ValueError(
        f"step(state, batch): this step, loaded from a file, returns a {path}, and there is no such NamedTuple in this"
        f" program. Import the module {module!r} before the first step."
    )


# --- leaves -------------------------------------------------------------------------------------------------------


def described(leaf: Any) -> Description:
    """Describe a leaf: what it must be for the step to hold."""
    if not isinstance(leaf, Tensor):
        return {"type": type(leaf).__name__, "value": leaf if isinstance(leaf, _PLAIN) else repr(leaf)}
    spec = spec_of(leaf)
    return {
        "dtype": str(leaf.dtype).removeprefix("torch."),
        "shape": list(leaf.shape),
        "device": str(leaf.device),
        "stride": list(held(leaf).stride()),
        "requires_grad": leaf.requires_grad,
        "spread": None if spec is None else f"{spec.placements} of {spec.mesh}",
    }


def check_plain(values: Sequence[Any], call: str) -> None:
    """Raise if one of the values that are not tensors can't be written in a file."""
    odd = next((x for x in values if not isinstance(x, (Tensor, *_PLAIN))), None)
    if odd is not None:
        raise ValueError(
            f"{call}: a file can't hold a {type(odd).__name__}, {odd!r}. Give and return tensors, numbers and strings."
        )


def text(description: Mapping[str, Any] | None) -> str:
    """Say what a leaf is, in a line."""
    if description is None:
        return "absent"
    if "value" in description:
        return repr(description["value"])
    extras = [f"{name} {description[name]}" for name in ("stride", "spread") if description[name]]
    grad = ["requires_grad"] if description["requires_grad"] else []
    return f"{description['dtype']}{description['shape']} on {', '.join([description['device'], *extras, *grad])}"


def named(form: Structure, arguments: Sequence[str]) -> list[str]:
    """Name the leaves of a call's arguments, as in ``state/params/weight``."""
    names = [name.partition("/") for name in leaf_names(form)]
    return [arguments[int(first)] + slash + rest for first, slash, rest in names]


# --- results ------------------------------------------------------------------------------------------------------


def output_described(output: Output, call: str) -> Description:
    """Describe where a leaf of the result comes from."""
    check_plain([output.value], call)
    return {"kind": output.kind, "place": output.place, "value": output.value}


def output_of(found: Mapping[str, Any]) -> Output:
    """Make the output that was described."""
    return Output(found["kind"], found["place"], None, found["value"])
