"""Text of messages: the known name nearest to a wrong one, and lists that stay short."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any


def closest(word: str, known: Iterable[str], n: int = 1, *, likeness: float = 0.5) -> list[str]:
    """Up to ``n`` known words that look like this one, the nearest first.

    ``likeness`` is between 0, for any word, and 1, for the word itself.

    >>> closest("momentun", ["nesterov", "momentum"])
    ['momentum']
    """
    return difflib.get_close_matches(word, list(known), n=n, cutoff=likeness)


def nearest(
    word: str,
    known: Iterable[str],
    sentence: str = " Did you mean {!r}?",
    *,
    likeness: float = 0.5,
    otherwise: str = "",
) -> str:
    """``sentence`` with the known word that looks most like this one; ``otherwise`` if none does.

    >>> nearest("momentun", ["momentum", "nesterov"])
    " Did you mean 'momentum'?"
    """
    found = closest(word, known, likeness=likeness)
    return sentence.format(found[0]) if found else otherwise


def shortened(items: Iterable[Any], most: int = 4, write: Callable[[Any], str] = repr, between: str = ", ") -> str:
    """The first items, and how many more there are.

    >>> shortened("abcdef", 2)
    "'a', 'b' and 4 more"
    """
    items = list(items)
    text = between.join(map(write, items[:most]))
    last = " " if between == ", " else between  # with lines, the number of the others is a line, too
    return f"{text}{last}and {len(items) - most} more" if len(items) > most else text
