"""What `regrow doctor` finds: one finding a check, the same on a device, on the gateway and on the wire between them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec

State = Literal["ok", "warn", "fail", "unknown"]
CHECK = re.compile(r"[a-z]+(\.[a-z-]+)?\Z")
TEXT_MOST = 400
_WIDTHS = (8, 20)


class Finding(msgspec.Struct, frozen=True, array_like=True):
    """What one check found.

    check: a name that stays, such as "disk.free". state: `warn` works for now, `fail` does not, `unknown` could not be found out, which is
    never told as a number. said: one line for people. cure: what to do, empty where nothing is to be done.
    """

    check: Annotated[str, msgspec.Meta(pattern=r"^[a-z]+(\.[a-z-]+)?\Z", max_length=40)]
    state: State
    said: Annotated[str, msgspec.Meta(max_length=TEXT_MOST)]
    cure: Annotated[str, msgspec.Meta(max_length=TEXT_MOST)] = ""


def bounded(finding: Finding) -> Finding:
    """The same on one line, cut to what travels."""
    said, cure = (" ".join(text.split()) for text in (finding.said, finding.cure))
    return Finding(finding.check, finding.state, said[:TEXT_MOST], cure[:TEXT_MOST])


def in_words(finding: Finding) -> str:
    """One line: `fail    disk.free           3 MB of 29 GB are free; delete what is not needed`."""
    head = "".join(f"{word:<{width}}" for word, width in zip((finding.state, finding.check), _WIDTHS, strict=True))
    return f"{head}{finding.said}{'; ' if finding.cure else ''}{finding.cure}"


def failed(findings: Iterable[Finding]) -> bool:
    """Whether something does not work; what is unknown counts as neither."""
    return any(finding.state == "fail" for finding in findings)


def to_json(findings: Iterable[Finding]) -> bytes:
    """An array of objects with check, state, said and cure."""
    return msgspec.json.format(msgspec.json.encode([msgspec.structs.asdict(finding) for finding in findings]), indent=1)
