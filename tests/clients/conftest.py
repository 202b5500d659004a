"""Packages of others warn of what they use of still others; only our own warnings are errors here."""

import pytest

THEIRS = ("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:peft", "ignore::UserWarning:trl")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/clients" in str(item.path):
            for text in THEIRS:
                item.add_marker(pytest.mark.filterwarnings(text), append=False)
