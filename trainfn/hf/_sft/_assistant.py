"""The tokens of the assistant's messages, for chat templates that do not mark them.

A template marks them with ``{% generation %}``, and few that come with a model do. With most others the first messages
are rendered alone. A message begins where those before it and the prompt for the next one end. Templates of Qwen write
earlier messages in another way than the last one, or differ from their prompt; here their text is edited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

from trainfn.hf._types import Values

Render: TypeAlias = Callable[..., list[int]]
"""``(messages, add_generation_prompt=False) -> tokens``."""

_THINKS = r"{{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
_END = (re.compile(r"""(\{\{- '<\|im_end\|>\\n' \}\})(\s*\{%- elif message\.role == "tool" %\})"""),
        r"\1{%- endgeneration %}\2")  # fmt: skip
_EDITS: tuple[tuple[tuple[re.Pattern[str], str], ...], ...] = (
    (  # Qwen 3: each message thinks, as it did when it was written
        (
            re.compile(r"\{%- if loop\.index0 > ns\.last_query_index %\}.*?(?=\{%- if message\.tool_calls %\})", re.S),
            r"{{- '<|im_start|>' + message.role + '\\n' }}{%- generation %}" + _THINKS,
        ),
        _END,
    ),
    (  # Qwen 2.5
        (re.compile(r' or \(message\.role == "assistant" and not message\.tool_calls\)(?= %\})'), ""),
        (
            re.compile(r"(\{\{- '<\|im_start\|>' \+ message\.role \}\}\s*)\{%- if message\.content %\}"),
            r"\1{%- generation %}{%- if message.content or not message.tool_calls %}",
        ),
        _END,
    ),
)


def is_marked(template: str) -> bool:
    """Whether a template marks what the assistant says.

    >>> is_marked("{%- generation -%}{{ message.content }}{%- endgeneration -%}")
    True
    """
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def marked(template: str) -> str:
    """Return a template of Qwen with the marks, in the places in which trl has them; any other as it is."""
    for edits in _EDITS:
        changed, counts = template, []
        for pattern, new in edits:
            changed, count = pattern.subn(new, changed)
            counts.append(count)
        if all(count == 1 for count in counts) and not is_marked(template):
            return changed
    return template


def spoken(messages: Sequence[Values], ids: Sequence[int], render: Render) -> list[bool]:
    """Return for each token of a conversation whether the assistant says it.

    Args:
        messages: The conversation.
        ids: Its tokens.
        render: The tokens of the first messages.

    Raises:
        ValueError: If the first messages are not written as the conversation begins.
    """
    learnt = [False] * len(ids)
    for n, message in enumerate(messages):
        if message["role"] != "assistant" or n == 0:
            continue
        prompt = render(messages[:n], add_generation_prompt=True)
        begin, end = common(prompt, ids), common(render(messages[: n + 1]), ids)
        if begin < len(prompt) - 1 or end <= begin:  # the prompt's last token may merge with the message's first
            raise ValueError(
                "`SFTConfig(assistant_only_loss=True)` can't work: the chat template does not mark the assistant's"
                " messages, and it writes messages in another way when others follow. Write `{% generation %}` and"
                " `{% endgeneration %}` around them in the template."
            )
        learnt[begin:end] = [True] * (end - begin)
    return learnt


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common beginning of two sequences."""
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))
