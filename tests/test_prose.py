"""Plain English: every docstring, comment and message is read by a stranger."""

import ast
import re
from functools import cache

import pytest

from tests import counts

PROJECT = counts.ROOT.parent
FILES = {
    str(file.relative_to(PROJECT)): file
    for file in sorted(
        [*counts.ROOT.rglob("*.py"), *(PROJECT / "examples").rglob("*.py"), *PROJECT.glob("*.md")],
    )
}
READ = pytest.mark.parametrize("name", FILES)

# What these words mean here is known to those who wrote them. To the right, what a stranger understands.
AVOIDED = {
    r"\b(?:is|are|was|were) told\b|\btold\b": "reported, gathered, passed",
    r"\btells?\b": "reports, shows, names",
    r"\b(?:laid|lays?|laying) out\b": "sharded",
    r"\b(?:go|goes|going|gone|went) on from\b": "resume from",
    r"\bat hand\b": "current, available",
    r"\b(?:leaves?|left|leaving) word\b": "report",
    r"(?<!\bthere )(?<!\bThere )\b(?:is|are) none\b(?! of)": "is not one",
    r"\b(?:can't|can|could|cannot|to) be had\b": "can't be supported, is not available",
    r"\bwhole again\b|\b(?:made|makes?|make) whole\b": "full, gathered",
    r"\bwhoever\b|\bthose (?:that|who) think\b": "name the subject",
    r"\b(?:becomes?|became) of\b": "what happens to",
    r"\bno business of\b|\bslip of the pen\b|\bnaught\b|\blest\b|\bthereof\b": "plain words",
}
FRAGMENT = re.compile(r"(?:\w+: )?(?:Of (?!course\b)|Those\b|(?<!: )Which\b|Whose\b|Whatever\b)(?!.*\?$)")


@cache
def texts(name):
    return list(counts.texts(FILES[name]))


@cache
def sentences(name):
    """Each text of a file with each of its sentences."""
    return [(text, sentence) for text in texts(name) for sentence in counts.sentences(text.text)]


def found(texts, pattern):
    return [f"line {text.line}: {match[0]}" for text in texts for match in pattern.finditer(text.text)]


@pytest.mark.parametrize("avoided", AVOIDED)
def test_an_avoided_word_is_a_pattern_that_finds_itself(avoided):
    said = {"told": 1, "tells": 1, "laid out": 1, "goes on from": 1, "at hand": 1, "left word": 1, "it is none": 1,
            "can't be had": 1, "whole again": 1, "whoever": 1, "became of": 1, "no business of": 1}  # fmt: skip
    assert any(re.search(avoided, text) for text in said)
    assert not any(
        re.search(avoided, text) for text in ("there is none", "none of these", "goes on", "the whole batch")
    )


@READ
def test_words_that_only_we_understand_are_avoided(name):
    for pattern, instead in AVOIDED.items():
        assert not found(texts(name), re.compile(pattern)), instead
    assert not found(texts(name), counts.IS_NO), "is not a valid X"


@READ
def test_docstrings_begin_with_a_subject_or_a_verb(name):
    headless = [text for text in texts(name) if text.kind == "docstring" and counts.HEADLESS.match(text.text.strip())]
    assert not [(text.line, text.text.split("\n")[0]) for text in headless]


@READ
def test_sentences_are_no_fragments(name):
    assert not [(t.line, s) for t, s in sentences(name) if t.kind != "string" and FRAGMENT.match(s)]


def too_long(name, kind):
    return [(t.line, s) for t, s in sentences(name) if t.kind == kind and counts.words(s) > counts.LONGEST]


@READ
def test_sentences_of_docstrings_are_short(name):
    assert not too_long(name, "docstring")


@READ
def test_sentences_of_messages_are_short(name):
    assert not too_long(name, "string")


def test_the_counts_of_the_whole_package_are_printed():
    table = counts.counts()
    assert table["imports / circles"].endswith("/ 0")
    assert all(table.values())


def test_texts_finds_each_kind(tmp_path):
    file = tmp_path / "m.py"
    file.write_text('"""Doc."""\n# one\n# two\nx = f"a {1} b"  # type: ignore[x]\ny = "c"\n')
    found = [(text.line, text.kind, text.text) for text in counts.texts(file)]
    assert sorted(found) == [(1, "docstring", "Doc."), (2, "comment", "one two"), (4, "string", "a X b"),
                             (5, "string", "c")]  # fmt: skip
    assert [*counts.sentences("One two. Three (e.g. ``a b``)!\n\n>>> code\nNo.")] == ["One two.", "Three (e.g. code)!"]
    assert counts.circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [{"a", "b"}]
    assert ast.parse(file.read_text())
