"""The API reference: a page for each namespace of the package, with every public name of it."""

import inspect
import typing
from collections.abc import Iterator
from types import ModuleType

import trainfn

NAMESPACES = (
    *("callbacks", "data", "deepspeed", "errors", "hf", "launch", "losses", "metrics", "optim", "process"),
    *("random", "schedules", "testing", "transforms", "tree"),
)
MIXED = ("trainfn.hf.Trainer", "trainfn.hf.Seq2SeqTrainer", "trainfn.hf.SFTTrainer")  # methods in several files
PAGE = """# {title}

{intro}

{names}
"""
NAME = """::: {name}
    options:
      inherited_members: {inherited}
"""


def ours(value: object) -> bool:
    """Whether a value is a function, a class or a type alias of this package."""
    if inspect.isfunction(value) or inspect.isclass(value):
        return getattr(value, "__module__", "").split(".")[0] == "trainfn"
    return typing.get_origin(value) is not None


def names(space: ModuleType) -> Iterator[str]:
    """The public names of a namespace: functions in the order of the alphabet, then classes."""
    for name, value in sorted(vars(space).items(), key=lambda item: item[0].swapcase()):
        if name.startswith("_") or not ours(value):
            continue
        home = getattr(value, "__module__", "") if callable(value) and not typing.get_origin(value) else ""
        if space is trainfn or home == space.__name__ or home.startswith(f"{space.__name__}."):
            yield f"{space.__name__}.{name}"


def page(space: ModuleType) -> str:
    """One page: the first paragraph of the namespace's docstring, then its names."""
    intro = (inspect.getdoc(space) or "").split("\n\n")[0]
    blocks = [NAME.format(name=name, inherited=str(name in MIXED).lower()) for name in names(space)]
    return PAGE.format(title=space.__name__.replace("trainfn", "tfn", 1), intro=intro, names="\n".join(blocks))


def space(name: str) -> ModuleType:
    """A namespace by its name."""
    return typing.cast(ModuleType, getattr(trainfn, name))


def pages() -> dict[str, str]:
    """All pages, by their paths."""
    spaces = {"trainfn": trainfn, **{name: space(name) for name in NAMESPACES}}
    return {f"api/{name}.md": page(space) for name, space in spaces.items()}
