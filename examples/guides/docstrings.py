"""Docstrings for mkdocstrings: an example is a block of code, and a public name a link."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)
NAME = re.compile(r"(?<!`)`(trainfn(?:\.[a-z]\w*)*\.\w+)`(?!`)")


def fenced(text: str) -> str:
    """A docstring with fences around its examples."""
    return EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


class Examples(griffe.Extension):
    """Prepare every docstring of the package."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
