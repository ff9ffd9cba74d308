"""The device's side of sealed work: every message that leaves is sealed, and what the coordinator says is opened, or not heard.

What was heard is saved seldom, for the card's sake, and when the agent ends: a power cut costs the last minutes of it, so that what the
coordinator said in these could be played to the device once more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import msgspec

from edge_agent.identity_folder import new_claim
from edge_agent.state import StateFolder, content_of
from regrow import seal, topics, wire
from regrow.errors import LocalError, PeerError
from regrow.fleet_time import FleetTime
from regrow.guards import FromCoordinator
from regrow.machine import Event, Note, Publish, Received

log = logging.getLogger(__name__)
FOLDER = "heard"
HEARD = "heard"
SAVE_S = 300.0
LEAP_MS = 24 * 3600 * 1000
_COUNTS = 1 << 32


class Signer(Protocol):
    """What this needs of edge_agent.identity.Identity."""

    @property
    def folder(self) -> Path: ...
    @property
    def device(self) -> str: ...
    @property
    def signing_key(self) -> bytes: ...
    @property
    def coordinator_keys(self) -> Sequence[bytes]: ...
    def sign(self, data: bytes, /) -> bytes: ...
    def next_start(self, above: int = 0, /) -> int: ...


class _Heard(msgspec.Struct, frozen=True):
    """time_ms: the fleet's, at least; stamps: by topic."""

    time_ms: int
    stamps: dict[str, int]


def known_s(folder: Path, since_s: float = 0.0) -> float:
    """The fleet's time as the agent of this identity knows it before it hears anything, unix seconds; 0: it cannot be read.

    Args:
        since_s: it is at least this late, unix seconds.
    """
    try:
        saved = msgspec.json.decode(content_of((folder / FOLDER / HEARD).read_bytes()) or b"", type=_Heard).time_ms / 1000
    except (OSError, msgspec.DecodeError, ValueError):
        saved = 0.0
    return max(saved, since_s)


class Sealing:
    """One agent's, from its start to its end.

    Attributes:
        deaf: the coordinator's word on its keys is sealed by one that this device does not know, so nothing is heard.

    Args:
        identity: who it is; whoever changes its keys puts the new one in place with `identity = ...`.
        verify: as in regrow.seal.
        now: monotonic seconds, as in every other call.
        since_ms: what the fleet's time is at least, unix milliseconds.

    Raises:
        LocalError: another agent uses this identity, or it cannot be written.
    """

    def __init__(self, identity: Signer, verify: seal.Verify, now: float, *, since_ms: int = 0) -> None:
        self.identity = identity
        self._folder = StateFolder(identity.folder / FOLDER)
        known = self._load()
        self._saved_ms, self._save_s = known.time_ms, now + SAVE_S
        self.time = FleetTime(max(known.time_ms, since_ms), now)
        self._guard = FromCoordinator(identity.device, lambda: self.identity.coordinator_keys, verify, self.time, known.stamps)
        self._again = self.deaf = False
        self._begin(now)

    def _load(self) -> _Heard:
        data = self._folder.get(HEARD)
        try:
            return _Heard(0, {}) if data is None else msgspec.json.decode(data, type=_Heard)
        except (msgspec.DecodeError, ValueError) as error:
            log.warning("set aside what was heard of the coordinator in earlier lives: %s", error)
            return _Heard(0, {})

    def _begin(self, now: float, above: int = 0) -> None:
        self._start, self._start_s, self._count = self.identity.next_start(above), now, -1

    def seal(self, effect: Publish, now: float) -> Publish:
        """The same, sealed where it must be."""
        if not topics.is_sealed(effect.topic) or not len(effect.payload):
            return effect
        # Milliseconds rather than a count, so that the gateway knows without asking how far a device's stamps have come.
        self._count = max(self._count + 1, int(1000 * (now - self._start_s)))
        if self._count >= _COUNTS:
            self._begin(now)
            self._count = 0
        stamp, me = self._start << 32 | self._count, self.identity
        sealed = seal.seal(effect.topic, effect.payload, stamp=stamp, expires_s=0, key=me.signing_key, sign=me.sign)
        return replace(effect, payload=sealed)

    def open(self, event: Event, now: float) -> Event | None:
        """The same event, its message bare; None: nobody must hear it."""
        if not isinstance(event, Received):
            return event
        refused = self._guard.refusals.times(seal.UNKNOWN_KEY)
        heard = self._guard.open(event, now)
        if event.topic == topics.coordinator_keys(self.identity.device) and event.payload:
            self.deaf = self._guard.refusals.times(seal.UNKNOWN_KEY) > refused
        if heard is None or heard.topic != topics.older(self.identity.device):
            return heard
        try:
            self._go_on_above(wire.decode(heard.payload, wire.Older)[0].stamp, now)
        except PeerError as error:
            log.warning("refused: %s", error)
        return None

    def _go_on_above(self, stamp: int, now: float) -> None:
        """The coordinator has heard this stamp of our key and takes nothing up to it."""
        if stamp < (self._start << 32 | max(self._count, 0)):
            return  # somebody repeats what we said once: that is no news of ours
        log.warning(
            "the gateway has heard stamps of %s that are above ours: another copy of %s is in use, or this one was restored from an older "
            "copy; going on above them. If there is another copy, end it with `regrow fleet rotate %s` on the gateway",
            self.identity.device,
            self.identity.folder,
            self.identity.device,
        )
        self._begin(now, stamp >> 32)
        self._again = True

    def must_say_again(self) -> bool:
        """Whether the gateway has refused what was said on this connection; true once."""
        again, self._again = self._again, False
        return again

    def tend(self, now: float) -> list[Note]:
        """To be called every second or so: saves what is due, and tells what was refused."""
        leapt = self.time.at_ms(now) - self._saved_ms > LEAP_MS  # the first word in a device's life, or after long
        if now >= self._save_s or leapt:
            self._save(now)
        return [self._with_cure(note) for note in self._guard.refusals.notes(now)]

    def _with_cure(self, note: Note) -> Note:
        """A device that was off while the coordinator changed its key hears nothing any more, and nobody else can tell it why."""
        if note.fields["kind"] != seal.UNKNOWN_KEY:
            return note
        me = self.identity
        cure = f"if {me.device} was off while the fleet changed its coordinator's key: {new_claim(me.device, me.folder)}"
        return replace(note, fields={**note.fields, "cure": cure})

    def now_s(self, now: float) -> float:
        """The fleet's time, unix seconds."""
        return self.time.at_ms(now) / 1000

    def close(self, now: float) -> None:
        """Save, and let another agent use the identity."""
        try:
            self._save(now)
        except LocalError as error:
            log.warning("what was heard last is not kept: %s", error)
        self._folder.close()

    def _save(self, now: float) -> None:
        self._saved_ms, self._save_s = self.time.at_ms(now), now + SAVE_S
        self._folder.put(HEARD, msgspec.json.encode(_Heard(self._saved_ms, self._guard.heard)))
