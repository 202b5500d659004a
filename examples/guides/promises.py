"""The places of the tests that a page names, so that a test that moves or is renamed is noticed."""

import ast
import re
from collections import defaultdict
from pathlib import Path

NAMED = re.compile(r"`(test_\w+)`")


def tests(folder: Path) -> dict[str, list[str]]:
    """The files of each test function, from the folder's parent on."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name].append(str(path.relative_to(folder.parent)))
    return found


def placed(markdown: str, folder: Path) -> str:
    """The page, with the file before the name of each test.

    Raises:
        LookupError: If a test is not there.
    """
    known = tests(folder)

    def place(found: re.Match[str]) -> str:
        if found[1] not in known:
            raise LookupError(f"{found[1]} is in no file of {folder.name}/: name a test that exists.")
        return ", ".join(f"`{file}::{found[1]}`" for file in known[found[1]])

    return NAMED.sub(place, markdown)
