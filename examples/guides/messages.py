"""The index of messages: each text that the package raises or warns with, read from its source."""

import ast
import functools
import html
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from calls import Callers, Function, functions

HOLE = "…"  # It stands for a value in a message.
PARTS = ("_Damage", "Uncuttable")  # Internal errors; their texts end up in messages of other errors.
LEAST = 12  # A message is found by its fixed text if that has so many letters.

HEAD = """---
hide: [toc]
---
# Messages and remedies

This page is generated from the code: it has every error and every warning of the package, {count} in all. A message
names the call, the value that it received, the reason, and the line to write instead; `…` stands for a value.

Paste a message, or a part of it, and the nearest entries are shown. Without JavaScript, search this page for some of
its fixed words.

<textarea id="message" rows="3" aria-label="A message" placeholder="Paste a message here"></textarea>
<p id="message-count" role="status"></p>
"""


class Message(NamedTuple):
    """A message of the package.

    Attributes:
        kind: The class of the error or of the warning.
        text: The message; `HOLE` stands for its values.
        file: The file that has it, from the package on.
        calls: The public calls nearest to it.
    """

    kind: str
    text: str
    file: str
    calls: tuple[str, ...]


def texts(node: ast.expr | None, scope: Function, depth: int = 4) -> list[str]:
    """Return the texts that an expression can be; an empty list if only a run would show them."""
    again = functools.partial(texts, scope=scope, depth=depth - 1)
    match node:
        case _ if depth == 0:
            return []
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(p.value if isinstance(p, ast.Constant) else _value(p, scope, depth) for p in parts)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [one + two for one in again(left) or [HOLE] for two in again(right) or [HOLE]]
        case ast.IfExp(body=body, orelse=other):
            return again(body) + again(other)
        case ast.Name(id=name):
            return [text for value in scope.assigned(name) for text in again(value)]
        case ast.Call(func=ast.Name(id=name), args=arguments):
            called = scope.neighbour(name)
            if called is None:
                return []
            own = [text for value in called.returned() for text in texts(value, called, depth - 1)]
            return own or [text for argument in arguments for text in again(argument) if len(fixed(text)) > LEAST]
        case _:
            return []


def _value(part: ast.expr, scope: Function, depth: int) -> str:
    """The text that a value in a message always has, or a hole."""
    value = part.value if isinstance(part, ast.FormattedValue) else part
    known = texts(value, scope, depth - 1) if isinstance(value, ast.Name) else []
    return known[0] if len(known) == 1 else HOLE


def fixed(text: str) -> str:
    """The letters of a message that are the same each time."""
    return re.sub(r"\W", "", text)


def raised(scope: Function) -> Iterator[tuple[str, str]]:
    """The class and the text of each message of a function."""
    for node in scope.statements():
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            kind = ast.unparse(node.exc.func).split(".")[-1]
            arguments = node.exc.args
            if kind.islower():  # a function makes the error
                yield from _made(kind, node.exc, scope)
                continue
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn"):
            named = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "category")]
            kind = ast.unparse(named[0]).split(".")[-1] if named else "UserWarning"
            arguments = node.args
        else:
            continue
        for text in texts(arguments[0], scope) if arguments else []:
            yield kind, text


def _made(maker: str, call: ast.Call, scope: Function) -> Iterator[tuple[str, str]]:
    """Return the messages of `raise maker(...)`: its argument if that is a text, or else the texts in the maker."""
    given = " ".join(one[0] for one in (texts(argument, scope) for argument in call.args) if one)
    if len(fixed(given)) > 3 * LEAST:
        yield "LawViolation", given
    elif made := scope.neighbour(maker):
        for value in made.returned():
            if isinstance(value, ast.Call) and value.args:
                yield from ((ast.unparse(value.func).split(".")[-1], text) for text in texts(value.args[0], made))


def collected(package: Path) -> list[Message]:
    """Every message below a folder, once."""
    found: dict[str, Message] = {}
    everything = functions(package)
    callers = Callers(everything)
    for scope in everything.values():
        for kind, text in raised(scope):
            text = re.sub(r"\s+", " ", text).strip()
            if len(fixed(text)) >= LEAST and text not in found:
                found[text] = Message(kind, text, scope.file, callers.public(scope.name))
    return list(found.values())


def heading(message: Message) -> tuple[str, str]:
    """The first sentence of a message, and the rest."""
    cut = re.search(r"(?<=[^.…][.:?!]) (?=[A-Z`])|\n", message.text)
    return (message.text[: cut.start()], message.text[cut.end() :]) if cut else (message.text, "")


def shown(text: str) -> str:
    """A message as HTML; what stands between backticks is code."""
    return (
        re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
        .replace("*", "&#42;")
        .replace("_", "&#95;")
    )


def entry(message: Message) -> str:
    """The section of one message."""
    first, rest = heading(message)
    named = ", ".join(f"[`{name.replace('trainfn', 'tfn', 1)}`][{name}]" for name in message.calls[:4])
    by = f" Raised by {named}{' and others' if len(message.calls) > 4 else ''}." if named else ""
    body = f"\n{shown(rest)}\n" if rest else ""
    kind = "A part of a longer message" if message.kind in PARTS else f"`{message.kind}`"
    return f"### {shown(first)}\n{body}\n{kind}, `{message.file}`.{by}\n"


def group(message: Message) -> str:
    """The public call, or the namespace, that a message belongs to."""
    spaces = {name.rpartition(".")[0] for name in message.calls}
    if len(message.calls) == 1:
        return message.calls[0].replace("trainfn", "tfn", 1)
    if len(spaces) == 1:
        return f"Several calls of {spaces.pop().replace('trainfn', 'tfn', 1)}"
    return "Calls of several namespaces"


def page(package: Path) -> str:
    """The whole page."""
    groups: dict[str, list[Message]] = defaultdict(list)
    for message in collected(package):
        groups[group(message)].append(message)
    parts = [HEAD.format(count=sum(map(len, groups.values())))]
    for name, messages in sorted(groups.items(), key=lambda item: (not item[0].startswith("tfn"), item[0].lower())):
        title = f"`{name}`" if name.startswith("tfn") else name
        parts += [f"\n## {title}\n", *map(entry, messages)]
    return "\n".join(parts)
