"""The two errors of the house: who is to blame decides what happens next.

RegrowError
├── LocalError   we (this process, its configuration, its caller) did wrong
│   └── UsageError   what was asked for is wrong
└── PeerError    the other end, or bytes that claim to come from it, did wrong
"""

from __future__ import annotations


class RegrowError(Exception):
    """Anything that Regrow reports to its user; the message names the place and the cure."""


class LocalError(RegrowError):
    """Our own side is wrong: an argument, a file, a configuration, an invariant."""


class UsageError(LocalError):
    """What was asked for is wrong: an option, an argument, or a file that configures; asked again it is wrong again. Exit status 2."""


class PeerError(RegrowError):
    """The other side is wrong: the only exception that a decoder lets out, whatever the bytes."""


def shortened(name: str) -> str:
    """A name that somebody else chose, as a message quotes it: at most 100 characters of it."""
    return name if len(name) <= 100 else f"{name[:97]}..."
