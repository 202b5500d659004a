"""The size and the prose of a package, as numbers: ``python -m tests.counts [folder]``.

Another version is counted by its folder: ``python -m tests.counts ../before/trainfn``.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1] / "trainfn"
LONGEST = 25  # words of a sentence

HEADLESS = re.compile(r"(What|Of|Those|Which|That|Whatever|Whose|Whoever|The one that|The ones that)\b(?!.*\?$)")
IS_NO = re.compile(
    r"(?<!\bthere )(?<!\bThere )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|better\b|other\b|such\b)[a-z`]+"
)


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Text(NamedTuple):
    """A piece of prose: where it is, what it is, and what it says."""

    file: Path
    line: int
    kind: str  # "docstring", "comment", "string"
    text: str


# --- what there is to read --------------------------------------------------------------------------------------------


def texts(file: Path) -> Iterator[Text]:
    """The docstrings, comments and strings of a file; of Markdown, its paragraphs."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        yield from _markdown(file, source)
        return
    tree = ast.parse(source)
    documented = dict(docstrings(tree))
    for node, constant in documented.items():
        yield Text(file, constant.lineno, "docstring", ast.get_docstring(node) or "")
    known = {id(constant) for constant in documented.values()}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            yield Text(file, node.lineno, "string", "".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in known | inside:
            yield Text(file, node.lineno, "string", node.value)
    yield from _comments(file, source)


def docstrings(tree: ast.AST) -> Iterator[tuple[Documented, ast.Constant]]:
    """Each documented node and its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            yield node, first.value


def _comments(file: Path, source: str) -> Iterator[Text]:
    """Comments; those on lines that follow each other are one text."""
    block: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or re.match(r"# (type: ignore|noqa|fmt:|---|pyright:)", token.string):
            continue
        if block and token.start[0] != block[-1][0] + 1:
            yield Text(file, block[0][0], "comment", " ".join(text for _, text in block))
            block = []
        block.append((token.start[0], token.string.lstrip("# ")))
    if block:
        yield Text(file, block[0][0], "comment", " ".join(text for _, text in block))


def _markdown(file: Path, source: str) -> Iterator[Text]:
    line = 1
    for part in re.split(r"(```.*?```)", source, flags=re.DOTALL):
        if not part.startswith("```"):
            yield Text(file, line, "docstring", part)
        line += part.count("\n")


def sentences(text: str) -> Iterator[str]:
    """The sentences of a docstring or a message, without examples, tables and literal blocks."""
    literal = False
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:\*|-|\d+\.) )|\n(?=\s*\w+: )", text):
        if re.match(r"\s*(>>>|\.\. |=====|\||#)", paragraph) or (literal and paragraph.startswith((" ", "\n"))):
            continue
        literal = paragraph.rstrip().endswith("::")
        flat = re.sub(r"\s+", " ", re.sub(r">>>.*", "", paragraph, flags=re.DOTALL)).strip()
        flat = re.sub(r"``.*?``|`[^`]*`", "code", flat)
        yield from (
            s for s in re.split(r"(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?])[\")'*]*\s+(?=[A-Z0-9(\"*]|code\b)", flat) if s
        )


def words(sentence: str) -> int:
    """The words of a sentence, or of its longest part between semicolons or middle dots; a piece of code is one."""
    return max(len(re.findall(r"[\w'-]+", part)) for part in re.split("[;·]", sentence))


# --- counts -----------------------------------------------------------------------------------------------------------


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its docstring, comments and empty lines."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return sum(len(ast.unparse(statement).splitlines()) for statement in body)


def imports(root: Path) -> dict[str, set[str]]:
    """The modules of a package that each of its modules imports, but for its own ``__init__``."""
    files = {
        ".".join((root.name, *f.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): f
        for f in root.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        found: set[str] = set()
        tree = ast.parse(file.read_text())
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        checked_only = {inner for block in blocks for inner in ast.walk(block)}
        for node in ast.walk(tree):
            if node in checked_only:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in files else str(node.module) for name in names}
        graph[module] = (found & files.keys()) - {module, root.name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules of which each is reached from each other."""
    reached = {module: _reached(graph, module) for module in graph}
    groups = {frozenset({m} | {n for n in reached[m] if m in reached.get(n, ())}) for m in graph if m in reached[m]}
    return [set(group) for group in groups]


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = graph.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def counts(root: Path = ROOT) -> dict[str, str]:
    """Name and value of each count."""
    files = sorted(root.rglob("*.py"))
    sources = [file.read_text(encoding="utf-8") for file in files]
    trees = [ast.parse(source) for source in sources]
    lines = sorted(len(source.splitlines()) for source in sources)
    functions = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    bodies = sorted(map(body_lines, functions))
    anys: Counter[str] = Counter()
    for file, tree in zip(files, trees, strict=True):
        anys[file.relative_to(root).parts[0]] += sum(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(tree))
    alone = sum(line.lstrip().startswith("# ") for source in sources for line in source.splitlines())
    everything = [text for file in files for text in texts(file)]
    docs = [text for text in everything if text.kind == "docstring"]
    said = [sentence for text in docs for sentence in sentences(text.text)]
    long = [sentence for sentence in said if words(sentence) > LONGEST]
    graph = imports(root)
    return {
        "files / lines": f"{len(files)} / {sum(lines):,}",
        "file: median / max": f"{median(lines):g} / {lines[-1]}",
        "body: median / p90 / max": f"{median(bodies):g} / {bodies[int(0.9 * len(bodies))]} / {bodies[-1]}",
        "type ignores": str(sum(source.count("# type: ignore") for source in sources)),
        "Any": f"{anys.total():,} ({', '.join(f'{k} {n}' for k, n in anys.most_common(12))})",
        "comment lines": f"{alone / sum(lines):.1%}",
        "docstrings / headless": f"{len(docs):,} / {sum(bool(HEADLESS.match(text.text.strip())) for text in docs)}",
        "is no X": str(sum(len(IS_NO.findall(text.text)) for text in everything)),
        f"sentences / of more than {LONGEST} words": f"{len(said):,} / {len(long)}",
        "imports / circles": f"{sum(map(len, graph.values()))} / {len(circles(graph))}",
    }


if __name__ == "__main__":
    table = counts(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
    width = max(map(len, table))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in table.items()))
