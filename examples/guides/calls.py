"""The calls between functions of the package, by name, to find the public call that raises a message."""

import ast
import importlib
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import api

Place = ast.FunctionDef | ast.ClassDef | ast.Module


@dataclass(frozen=True)
class Function:
    """A function, a class or the rest of a file, as a place where messages are.

    Attributes:
        name: ``module.name``.
        file: The file, from the package on.
        node: Its source.
        near: The other places of the file, by their bare names.
        imports: What the file imports: full names by bare names.
    """

    name: str
    file: str
    node: Place
    near: Mapping[str, "Function"]
    imports: Mapping[str, str]

    def statements(self) -> Iterator[ast.AST]:
        """Every node of it; of a file, those that are in no function and no class."""
        if not isinstance(self.node, ast.Module):
            yield from ast.walk(self.node)
            return
        for statement in self.node.body:
            if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                yield from ast.walk(statement)

    def assigned(self, name: str) -> list[ast.expr]:
        """The values that a variable is given in this place, or in its file."""
        for place in (self, self.near.get("")):
            found = [
                node.value
                for node in (place.statements() if place else ())
                if isinstance(node, ast.Assign | ast.NamedExpr)
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                if isinstance(target, ast.Name) and target.id == name
            ]
            if found:
                return found
        return []

    def returned(self) -> list[ast.expr]:
        """The values that it returns."""
        return [node.value for node in self.statements() if isinstance(node, ast.Return) and node.value is not None]

    def neighbour(self, name: str) -> "Function | None":
        """The function of this name in the same file."""
        found = self.near.get(name)
        return found if found and isinstance(found.node, ast.FunctionDef) else None

    def mentions(self) -> Iterator[str]:
        """The full names of the package's functions and classes that it uses."""
        for node in self.statements():
            if isinstance(node, ast.Name):
                bare, rest = node.id, ""
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                bare, rest = node.value.id, f".{node.attr}"
            else:
                continue
            if bare in self.near and not rest:
                yield self.near[bare].name
            elif bare in self.imports:
                yield self.imports[bare] + rest


def functions(package: Path) -> dict[str, Function]:
    """Every place of a package, by its full name."""
    found: dict[str, Function] = {}
    for path in sorted(package.rglob("*.py")):
        tree, file = ast.parse(path.read_text()), str(path.relative_to(package.parent))
        module = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        imports = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        near: dict[str, Function] = {}
        near[""] = Function(module, file, tree, near, imports)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                near[node.name] = Function(f"{module}.{node.name}", file, node, near, imports)
        found.update({place.name: place for place in near.values()})
    return found


class Callers:
    """The public calls through which a place is reached."""

    def __init__(self, everything: Mapping[str, Function]) -> None:
        """Turn the mentions round."""
        self.by: dict[str, set[str]] = defaultdict(set)
        self.names = self._public()
        for place in everything.values():
            for mentioned in place.mentions():
                if mentioned != place.name and not isinstance(place.node, ast.Module):
                    self.by[mentioned].add(place.name)

    @staticmethod
    def _public() -> dict[str, str]:
        """The public names by where they are defined."""
        found: dict[str, str] = {}
        for space in (importlib.import_module("trainfn"), *map(api.space, api.NAMESPACES)):
            for name in api.names(space):
                value = getattr(space, name.rpartition(".")[2])
                if isinstance(value, types.FunctionType | type):
                    found.setdefault(f"{value.__module__}.{value.__qualname__}", name)
        return found

    def public(self, name: str) -> tuple[str, ...]:
        """The public calls that reach a place through private ones, the nearest first."""
        found: list[str] = []
        seen, edge = {name}, {name}
        while edge:
            found += sorted(self.names[place] for place in edge if place in self.names)
            private = (place for place in edge if place not in self.names)
            edge = {caller for place in private for caller in self.by[place]} - seen
            seen |= edge
        return tuple(dict.fromkeys(found))
