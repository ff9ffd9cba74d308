"""Publishes the fleet's newest release to the devices that its stage reaches, and notes what they say: a machine on the coordinator's link.

Order of publication: the wheels' pieces, some at a time and each acknowledged; then a Release to each device; then what an older one left
is cleared. After every reconnect all of it again: nothing relies on the broker's memory.
"""

from __future__ import annotations

import logging

from broker_server.fleet.releases import Releases, Staged, in_words
from broker_server.queueing import Queueing
from regrow import topics, wire
from regrow.errors import LocalError, PeerError
from regrow.machine import Connected, Effect, Event, Note, Received, Subscribe
from regrow.publication import PIECE_BYTES

log = logging.getLogger(__name__)
LOOK_S = 1.0
_FIRST_TOKEN = 1 << 41  # beside the herald's of promoted models


class ReleaseHerald:
    """One fleet's, in the one process that speaks for it. `step` takes every event of the link; whoever owns it carries the effects out."""

    def __init__(self, releases: Releases) -> None:
        self._releases = releases
        self._stamp: tuple[tuple[int, int], tuple[int, ...]] | None = None
        self._pieces: dict[str, bytes] = {}  # topic -> b"" of what is published on this connection
        self._told: dict[str, bytes] = {}
        self._queue = Queueing(_FIRST_TOKEN)
        self._look_s = float("-inf")
        self._known = releases.reports()
        self._changed: dict[str, wire.ReleaseReport] = {}

    def step(self, event: Event | None, now: float, *, leads: bool = True) -> list[Effect]:  # noqa: ARG002 - a fleet is not a task's
        """Take an event in, or None for the time alone."""
        effects: list[Effect] = []
        self._queue.heed(event)
        if isinstance(event, Connected):
            self._stamp, self._look_s = None, now
            self._told.clear()
            effects.append(Subscribe((topics.release_report("+"),)))
        elif isinstance(event, Received):
            self._hear(event)
        if now >= self._look_s:
            self._look_s = now + LOOK_S
            effects += self._notes()
            if self._queue.connected:
                self._look()
        return [*effects, *self._queue.send()]

    # ---- publishing ----------------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Publish anew when the release, its stage or the registry has changed; what does not check out leaves everything as it is."""
        try:
            stamp = (self._releases.stamp(), self._releases.registry.stamp())
            if stamp == self._stamp:
                return
            staged = self._releases.newest()
            self._stamp = stamp
            if staged is not None:
                self._publish(staged)
        except (LocalError, OSError) as error:
            log.warning("no release is published: %s", error)

    def _publish(self, staged: Staged) -> None:
        offered = self._releases.offered(staged)
        release = self._releases.announcement(staged)
        old, pieces = self._pieces, {}
        if offered:
            for wheel, blob in zip(staged.opened().files, release.files, strict=True):
                parts = wire.pieces(self._releases.wheel(wheel), PIECE_BYTES)
                pieces.update({topics.release_file(blob.digest, number): bytes(part) for number, part in enumerate(parts)})
        self._queue.clear()  # a piece that was queued and did not leave is among those that follow
        told = {topics.release(device): wire.encode(release) for device in offered}
        withdrawn = wire.encode(wire.Release(number=release.number))
        others = {topics.release(device): withdrawn for device in self._releases.registry.devices() if topics.release(device) not in told}
        self._queue.put(pieces.items())
        self._queue.put(told.items(), after_all=True)
        self._queue.put((topic, data) for topic, data in others.items() if self._told.get(topic) != data)
        self._queue.put((topic, b"") for topic in old if topic not in pieces)
        self._pieces, self._told = dict.fromkeys(pieces, b""), told | others

    # ---- hearing -------------------------------------------------------------------------------------------------------------------

    def _hear(self, event: Received) -> None:
        found = topics.parse_of_device(event.topic, ("release-report",))
        if found is None or not event.payload:
            return
        try:
            self._changed[found[0]] = wire.decode(event.payload, wire.ReleaseReport)[0]
        except PeerError as error:
            log.warning("%s: %s", found[0], error)

    def _notes(self) -> list[Effect]:
        """What is new since the last look: however much a device says, it costs one small file a second."""
        notes: list[Effect] = []
        members = self._releases.registry.devices() if self._changed else {}
        for device, report in self._changed.items():
            if self._known.get(device) == report or device not in members:
                continue
            self._known[device] = report
            try:
                self._releases.note_report(device, report)
            except OSError as error:
                log.warning("cannot keep what %s says of the release: %s", device, error)
            notes.append(Note("release", {"device": device, "release": report.number, "said": in_words(report), "version": report.version}))
        self._changed.clear()
        return notes
