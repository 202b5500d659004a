"""The nearest known word to one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], sentence: str) -> str:
    """``sentence`` with the known word that looks most like this one, or nothing if none does.

    >>> nearest("momentun", ["momentum", "nesterov"], "Did you mean {!r}?")
    "Did you mean 'momentum'?"
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return sentence.format(found[0]) if found else ""
