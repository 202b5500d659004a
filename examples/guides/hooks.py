"""Pages that mkdocs generates from the code, such as the reference; and the promises with their tests."""

from pathlib import Path
from typing import Any

import api
import arguments
import messages
import methods
import promises
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are generated from the code."""
    pages = {
        **api.pages(),
        "arguments.md": arguments.page(),
        "methods.md": methods.page(),
        "messages.md": messages.page(ROOT / "trainfn"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add its file to each test that a page names."""
    return promises.placed(markdown, ROOT / "tests") if page.file.src_uri == "promises.md" else markdown
