"""The guides and the README: their code runs, the site is built, and what is generated of them is complete."""

import ast
import doctest
import importlib
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.processes import succeeded
from tests.test_architecture import PUBLIC

ROOT = Path(__file__).parent.parent
GUIDES = ROOT / "examples" / "guides"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((GUIDES / "pages").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"# Not run by the tests: .+")

EACH_PAGE = pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])


def blocks(page, *languages):
    """The blocks of code of a page, with their languages and their first lines in the file."""
    text = page.read_text()
    for found in BLOCK.finditer(text):
        if found[1] in languages:
            yield found[1], found[2], text[: found.start(2)].count("\n")


def runs(page):
    return [block for block in blocks(page, "python", "pycon") if not NOT_RUN.match(block[1])]


EACH_RUNNING = pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES if runs(page)])


def examined(code, line, page, names):
    """Run a session of the prompt, and compare what it prints."""
    test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    printed = []
    runner.run(test, out=printed.append, clear_globs=False)
    names.update(test.globs)
    assert runner.summarize(verbose=False).failed == 0, "".join(printed)


@EACH_RUNNING
def test_every_block_runs(page, tmp_path, monkeypatch):
    """In the order of the page, with one set of names, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    for language, code, line in runs(page):
        if language == "pycon":
            examined(code, line, page, names)
        else:
            exec(compile("\n" * line + code, str(page), "exec"), names)


@EACH_PAGE
def test_blocks_have_a_known_language_and_the_form_of_it(page):
    fences = re.findall(r"^```(\w*)", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0 and set(fences) <= {"", "python", "pycon", "sh"}
    for _, code, _ in blocks(page, "python"):
        ast.parse(code)
    for _, code, _ in blocks(page, "sh"):
        subprocess.run(["bash", "-n", "-c", code], check=True)


def test_blocks_that_are_not_run_are_few():
    left_out = [code for page in PAGES for _, code, _ in blocks(page, "python") if NOT_RUN.match(code)]
    assert len(left_out) <= 3


def test_the_two_commands_stand_in_the_readme():
    commands = [line for line in README.read_text().splitlines() if line.startswith("python3 -m venv .venv")]
    assert [command.rsplit(" && ", 1)[-1] for command in commands] == [
        ".venv/bin/python examples/nano.py",
        ".venv/bin/python -m pytest -q -n 2",
    ]
    assert len(README.read_text().split()) < 1000


def test_links_between_files_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            generated = page.parent == GUIDES / "pages" and re.match(r"(api/.*|arguments|methods|messages)\.md", target)
            assert generated or (page.parent / target).exists(), f"{page.name}: {target}"


@EACH_PAGE
def test_files_that_prose_names_are_there(page):
    named = re.findall(r"`((?:trainfn|tests|perf|examples)/[\w/.-]*)`", page.read_text())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


# --- what is generated ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator():
    """The modules that generate pages, by name."""
    sys.path.insert(0, str(GUIDES))
    yield importlib.import_module
    sys.path.remove(str(GUIDES))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = ("-m", "mkdocs", "build", "--strict", "-q", "-f", GUIDES / "mkdocs.yml", "-d", folder)
    silent = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    return folder, succeeded(*command, timeout=300, **silent).err


def test_the_site_is_built_without_a_warning(site):
    folder, said = site
    assert "WARNING" not in said and (folder / "index.html").exists()


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site[0].rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(https?:[^\"' >]+)", page.read_text())
        assert not loaded, page


def test_every_public_name_is_in_the_reference(site):
    anchors = {
        name for page in (site[0] / "api").glob("*.html") for name in re.findall(r'id="([\w.]+)"', page.read_text())
    }
    assert not set(PUBLIC) - anchors


def test_every_argument_is_in_the_table(site):
    from trainfn.hf import Seq2SeqTrainingArguments

    shown = set(re.findall(r"<td><code>(\w+)</code></td>", (site[0] / "arguments.html").read_text()))
    assert set(Seq2SeqTrainingArguments.__dataclass_fields__) <= shown | {"legacy_arguments"}


@pytest.fixture(scope="module")
def found(generator):
    return generator("messages").collected(ROOT / "trainfn")


def test_nearly_every_message_of_the_package_is_found(found, generator):
    """Those that are not are made of another message: an error that was caught, or a list of several."""
    made = 0
    for file in (ROOT / "trainfn").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            made += isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
            made += isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn")
    assert len(found) > 0.9 * made
    assert sum(not message.calls for message in found) < 0.05 * len(found)


def mistakes():
    """Wrong calls, each with a public call that the index should name."""
    import torch

    import trainfn as tfn

    yield "trainfn.losses.cross_entropy", lambda: tfn.losses.cross_entropy(torch.ones(2, 3), torch.ones(5).long())
    yield "trainfn.schedules.cosine", lambda: tfn.schedules.cosine(1e-3, 10, warmup_steps=20)
    yield "trainfn.data.Sampler", lambda: tfn.data.shuffled(3, 8, seed=0)
    yield "trainfn.init", lambda: tfn.init(torch.nn.ReLU(), tfn.optim.sgd(0.1))
    yield "trainfn.load_step", lambda: tfn.load_step("nowhere.step")
    yield "trainfn.hf.TrainingArguments", lambda: tfn.TrainingArguments("out", learning_rat=1.0)


@pytest.mark.parametrize(("call", "wrong"), [pytest.param(*row, id=row[0]) for row in mistakes()])
def test_a_message_finds_its_entry(call, wrong, found):
    """By the words that it shares with the entry, rare words before frequent ones: as the search of the page does."""
    with pytest.raises(Exception) as caught:
        wrong()
    words = [set(re.findall(r"[a-z_]{2,}", message.text.lower())) for message in found]
    named = [{call.rpartition(".")[2].lower() for call in message.calls[:4]} for message in found]
    asked = set(re.findall(r"[a-z_]{2,}", str(caught.value).lower()))
    counts = Counter(word for pair in zip(words, named, strict=True) for word in set.union(*pair))
    worth = {word: math.log(1 + len(found) / count) for word, count in counts.items()}
    scores = [
        sum(worth[word] for word in asked & (one | calls)) / math.sqrt(sum(worth[word] for word in one) or 1)
        for one, calls in zip(words, named, strict=True)
    ]
    nearest = found[scores.index(max(scores))]
    assert call in nearest.calls
    assert nearest.kind in (type(caught.value).__name__, "_NoArgument")


def test_a_promise_without_a_test_is_noticed(generator):
    promises = generator("promises")
    assert promises.placed("`test_a_promise_without_a_test_is_noticed`", ROOT / "tests").startswith("`tests/")
    with pytest.raises(LookupError, match="test_nowhere is in no file of tests/"):
        promises.placed("`test_nowhere`", ROOT / "tests")
