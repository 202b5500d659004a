"""The shape of the package: layers, sizes, documentation, and what an import costs."""

import ast
import importlib
import inspect
import re
import sys
from functools import cache
from pathlib import Path

import pytest

import trainfn
from tests.processes import succeeded

ROOT = Path(trainfn.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# design.md §3. A file imports from its own layer or from one below; the name is that of the file or of its folder.
LAYERS = {
    **dict.fromkeys(("_types", "tree", "_batch_types", "_dtensor", "errors", "_marks", "_text"), 0),
    **dict.fromkeys(("random", "_keyed", "_audit", "_module", "_changes", "_hooks", "_bound"), 1),
    **dict.fromkeys(("losses", "metrics", "optim", "schedules"), 1),
    **dict.fromkeys(("_reached", "_adapt", "_grad", "_step", "_compose", "transforms"), 2),
    **dict.fromkeys(("_compile", "_ranks", "_plan", "process"), 3),
    **dict.fromkeys(("_checkpoint", "_value", "data"), 4),
    **dict.fromkeys(("_run", "callbacks"), 5),
    **dict.fromkeys(("deepspeed",), 6),  # the driver, with another engine behind the step
    **dict.fromkeys(("launch",), 6),  # reads what started the processes
    **dict.fromkeys(("testing",), 6),  # for users' tests: may import anything public, nothing imports it
    **dict.fromkeys(("hf",), 7),  # uses the public names of the whole package
    **dict.fromkeys(("__init__", "__main__"), 7),
}
PURE = 2  # the highest layer of pure functions of tensors
SEEDS = "_elsewhere.py"  # seeds Python's and NumPy's generators, where a loss draws from them: it must read the key
ALLOWED = {"torch", "optree", *sys.stdlib_module_names}
NAMESPACES = (
    *("random", "tree", "errors", "losses", "metrics", "optim", "schedules", "transforms", "callbacks", "process"),
    *("testing", "data", "deepspeed", "hf", "launch"),
)
# Data, documented by its fields, and what only `isinstance` ever sees: no example would say more.
NO_EXAMPLE = re.compile(
    r"(State|Error|Warning|Report|Step|StepInfo|Gradients|Transform|TrainStep|Compiled|Field|Piece|Laws|LawViolation|Diff|Digest|Stop|Manifest|Controller|StepTransform)$"
    r"|trainfn\.restore$"  # the example of `save` shows both
)
FILE_LINES, BODY_LINES = 400, 60

# Beyond public names and the vocabulary of `_types`: a launcher's answers, which name ranks before there is a run, and
# two guards of `value_and_grad` around DeepSpeed's own backward pass.
NOT_PUBLIC = {"testing": set(), "launch": {"Rule", "explain", "launched"}, "deepspeed": {"detached", "exact"}}

EACH_FILE = pytest.mark.parametrize("file", [pytest.param(f, id=str(f.relative_to(ROOT))) for f in FILES])


@cache
def parsed(file):
    return ast.parse(file.read_text())


FILES_OF_HF = [file for file in FILES if file.is_relative_to(ROOT / "hf")]


def module_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("trainfn", *parts)).removesuffix(".__init__")


def part_of(module):
    """``trainfn.optim._scale`` is of the part ``optim``, ``trainfn`` itself of ``__init__``."""
    return [*module.split("."), "__init__"][1]


def layer_of(module):
    part = part_of(module)
    assert part in LAYERS, f"{module}: give {part!r} a layer in {__file__}"
    return LAYERS[part]


@cache
def imports(file, *, lazy=True):
    """Every module a file imports; those that only a type checker sees don't count."""
    return list(_imports(parsed(file), file, lazy))


def _imports(tree, file, lazy):
    checked_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    nodes = tree.body if not lazy else ast.walk(tree)
    for node in nodes:
        if node in checked_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


MODULES = {module_of(file) for file in FILES}


@EACH_FILE
def test_imports_point_down(file):
    layer = layer_of(module_of(file))
    if layer == max(LAYERS.values()):
        return
    for module in imports(file):
        if module.split(".")[0] == "trainfn":
            assert module != "trainfn", f"{file} imports the whole package"
            assert layer_of(module) <= layer, f"{file} imports {module}, which is above it"


def private_names(file):
    """What a file takes from private modules of other parts of the package, as ``(line, module, name)``."""
    own = f"trainfn.{part_of(module_of(file))}"
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            taken = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            taken = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("tfn", "trainfn"):
            taken = [("trainfn", node.attr)]
        else:
            continue
        for module, name in taken:
            path = f"{module}.{name}"
            if module == "trainfn._text":  # how a message is worded: nothing that a step, a run or a file depends on
                continue
            if path.startswith("trainfn.") and not path.startswith(f"{own}.") and re.search(r"\._(?!_)", path):
                yield node.lineno, module, name


@pytest.mark.parametrize("file", [pytest.param(f, id=str(f.relative_to(ROOT))) for f in FILES_OF_HF])
def test_the_trainer_uses_public_names_only(file):
    assert not list(private_names(file))


@pytest.mark.parametrize("part", NOT_PUBLIC)
def test_other_layers_above_the_core_use_public_names(part):
    """They can't import the package that imports them, so they take public names from where these are defined."""
    found = {
        name
        for file in FILES
        if part_of(module_of(file)) == part
        for _, module, name in private_names(file)
        if module != "trainfn._types" and not is_public(getattr(importlib.import_module(module), name))
    }
    assert found == NOT_PUBLIC[part]


def is_public(value):
    spaces = [trainfn, *(getattr(trainfn, name) for name in NAMESPACES)]
    return any(value is other for space in spaces for name, other in vars(space).items() if not name.startswith("_"))


def test_imports_have_no_cycles():
    """Between files. A package's own `__init__` is imported by whoever imports from it, so it stands for its files."""
    graph = {
        module_of(file): {m for m in imports(file) if m in MODULES and m not in (module_of(file), "trainfn")}
        for file in FILES
        if module_of(file) != "trainfn"
    }
    done: set[str] = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in graph[module]:
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@EACH_FILE
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= FILE_LINES


def body_lines(node):
    """Lines of a function's body without its docstring, comments and empty lines."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return sum(len(ast.unparse(statement).splitlines()) for statement in body)


@EACH_FILE
def test_functions_are_short(file):
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert body_lines(node) <= BODY_LINES, f"{file}:{node.lineno} {node.name}"


def test_the_trainer_has_types():
    """What goes through a Trainer has names in `hf/_types.py`; `Any` is for values that may really be of any type."""
    assert sum(len(re.findall(r"\bAny\b", file.read_text())) for file in (ROOT / "hf").rglob("*.py")) <= 150


@EACH_FILE
def test_pure_layers_are_pure(file):
    """They import torch and optree only, never wait for the device, and do no input or output."""
    if layer_of(module_of(file)) > PURE or file.name == SEEDS:
        return
    for module in imports(file):
        assert module.split(".")[0] in ALLOWED | {"trainfn"}, f"{file} imports {module}"
        assert module not in ("time", "os", "pathlib", "io", "logging", "random"), f"{file} imports {module}"
    for node in ast.walk(parsed(file)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("print", "open", "input", "exec", "eval"), f"{file}:{node.lineno} {called}"
        assert not re.search(r"\.(item|tolist|numpy|cpu)$|\.synchronize$", called), f"{file}:{node.lineno} {called}"


def public_names():
    spaces = [trainfn, *(getattr(trainfn, name) for name in NAMESPACES if hasattr(trainfn, name))]
    for space in spaces:
        for name, value in vars(space).items():
            ours = getattr(value, "__module__", "").startswith("trainfn") and (
                inspect.isfunction(value) or inspect.isclass(value)
            )
            if ours and not name.startswith("_") and (space is trainfn or public_in(space, value)):
                yield f"{space.__name__}.{name}", value


def public_in(space, value):
    """Defined in this namespace or below it, not imported for use."""
    return value.__module__ == space.__name__ or value.__module__.startswith(f"{space.__name__}.")


PUBLIC = dict(sorted(public_names()))


def test_there_are_public_names():
    assert len(PUBLIC) > 80
    assert {"trainfn.init", "trainfn.jit", "trainfn.optim.adamw", "trainfn.errors.CaptureError"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented_with_an_example(name):
    doc = inspect.getdoc(PUBLIC[name])
    assert doc and doc.splitlines()[0].strip().endswith((".", "!", ":")), f"{name} has no docstring of a sentence"
    if not NO_EXAMPLE.search(name):
        assert ">>>" in doc, f"{name} has no example"


def test_errors_are_in_the_overview():
    named = {name for name, value in vars(trainfn.errors).items() if inspect.isclass(value)}
    assert len(named) >= 8
    for name in named:
        assert re.search(rf"\b{name}\b", trainfn.errors.__doc__), name
        assert issubclass(getattr(trainfn.errors, name), trainfn.errors.TrainfnError | UserWarning)


def test_every_name_the_package_exports_is_listed_explicitly():
    for file in FILES:
        if file.name != "__init__.py":
            continue
        for node in parsed(file).body:
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), file
                assert all(alias.asname == alias.name for alias in node.names), f"{file}:{node.lineno}"


# --- what an import costs -----------------------------------------------------------------------------------------

HEAVY = (
    "accelerate",
    "deepspeed",
    "transformers",
    "datasets",
    "tqdm",
    "matplotlib",
    "pandas",
    "scipy",
    "sympy",
    "IPython",
    "torch._dynamo",
)
PROGRAM = """
import sys, time
start = time.process_time()  # of the processor: a busy machine takes no more of it
import torch
before, middle = set(sys.modules), time.process_time()
import trainfn
end = time.process_time()
heavy = [name for name in {heavy!r} if name in set(sys.modules) - before]
print((end - middle), (middle - start), *heavy)
"""


def imported():
    done = succeeded("-W", "error::DeprecationWarning:trainfn", "-c", PROGRAM.format(heavy=HEAVY))
    assert done.err == ""
    seconds, torch_seconds, *heavy = done.out.split()
    return float(seconds), float(torch_seconds), heavy


def test_importing_is_fast_and_quiet_and_brings_no_framework():
    """Beyond torch: at most half a second of the processor, or a quarter of what torch takes."""
    runs = [imported() for _ in range(3)]
    assert [heavy for _, _, heavy in runs] == [[], [], []]
    seconds, torch_seconds, _ = sorted(runs)[1]
    assert seconds < max(0.5, 0.25 * torch_seconds)


def test_importing_works_without_the_frameworks():
    """None of them is needed to import, so a broken one does no harm."""
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY[:5]!r})); import trainfn; print(trainfn.__version__)"
    assert succeeded("-c", block).out.strip() == trainfn.__version__


def test_the_type_marker_is_shipped():
    assert (ROOT / "py.typed").exists()
    assert importlib.util.find_spec("trainfn") is not None
