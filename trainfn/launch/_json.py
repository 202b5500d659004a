"""The reader of DeepSpeed's JSON, for the launcher's settings, the engine and the Trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Config = dict[str, Any]
_FIELDS = '`{"zero_optimization": {"stage": 2}}`'


class DeepSpeedJson:
    """A DeepSpeed configuration; its entries have dotted names, such as ``"zero_optimization.stage"``.

    Args:
        content: The sections; they are copied, as plain dicts and lists.

    >>> config = DeepSpeedJson({"zero_optimization": {"stage": 2}})
    >>> config.put("bf16.enabled", True)
    >>> dict(config.entries())
    {'zero_optimization.stage': 2, 'bf16.enabled': True}
    >>> config.get("zero_optimization.stage"), config.get("optimizer.type")
    (2, None)
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content: Config = _plain(content)

    @classmethod
    def read(cls, given: Any, call: str) -> DeepSpeedJson:
        """Read a dict, JSON text, or the path of a file.

        Args:
            given: Any of the three.
            call: The call of the user, for the errors.

        Raises:
            ValueError: If it is not one of them, or the file does not exist, or the JSON is not valid.
        """
        if isinstance(given, Mapping):
            return cls(given)
        if not isinstance(given, str | os.PathLike):
            raise ValueError(
                f"{call}: that is a {type(given).__name__}. Write the path of a DeepSpeed JSON, such as 'ds.json', or a"
                " dict of its fields."
            )
        text = os.fspath(given)
        if not text.lstrip().startswith("{"):
            if not Path(text).is_file():
                raise ValueError(
                    f"{call}: there is no such file. Write the path of a DeepSpeed JSON, or a dict of its fields."
                )
            text = Path(text).read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{call}: that is not valid JSON: {error}. Write the fields as in DeepSpeed's documentation: {_FIELDS}."
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"{call}: the JSON is a {type(content).__name__}, not an object. Write {_FIELDS}.")
        return cls(content)

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield the dotted name and the value of each entry; an empty section is one."""
        return _entries(self.content, "")

    def get(self, name: str, default: Any = None) -> Any:
        """Return the entry or the section of a dotted name."""
        found: Any = self.content
        for key in name.split("."):
            if not isinstance(found, dict) or key not in found:
                return default
            found = found[key]
        return found

    def section(self, name: str) -> Config:
        """Return a section; one that is written as a word is its ``type``."""
        found = self.get(name) or {}
        return found if isinstance(found, dict) else {"type": found}

    def put(self, name: str, value: Any) -> None:
        """Set the entry of a dotted name, and make the sections that it needs."""
        *path, key = name.split(".")
        section = self.content
        for part in path:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[key] = value

    def autos(self) -> list[str]:
        """Return the names of the entries that are ``"auto"``."""
        return [name for name, value in self.entries() if value == "auto"]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _entries(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
