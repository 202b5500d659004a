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
        LookupError: If a test is not there, or two have the name.
    """
    known = tests(folder)

    def place(found: re.Match[str]) -> str:
        files = known.get(found[1], [])
        if len(files) != 1:
            raise LookupError(f"{found[1]} is in {files or 'no file'} of {folder.name}/: name one test that exists.")
        return f"`{files[0]}::{found[1]}`"

    return NAMED.sub(place, markdown)
