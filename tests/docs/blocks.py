"""The code blocks of a page, and what the comment above a block says about running it.

<!-- not executed: REASON -->                 people run it, the test does not
<!-- background: NAME -->                     a terminal of its own
<!-- background: NAME; ready when it prints "TEXT" -->
<!-- after: NAME -->                          once that one has ended
<!-- file: PATH -->                           written, not run
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"(?:^<!-- (?P<say>[^\n]*) -->\n)?^```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `how` and `what` are the two sides of its comment's colon, "" without one."""

    language: str
    text: str
    how: str
    what: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        how, _, what = (match["say"] or "").partition(": ")
        found.append(Block(match["language"], match["text"], how, what, text.count("\n", 0, match.start("text")) + 1))
    return found
