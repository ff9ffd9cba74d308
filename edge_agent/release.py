"""What the agent does about software releases: it fetches, checks and lays them ready; installing is the updater's, and root's.

A machine beside training on the same link. A release is checked before a byte of it is fetched, pieces come while training leaves the link
alone and go to their places in one file, and after a restart the file says itself which of them are there. Whole and checked once more, it
is renamed into the spool; the updater checks it again by itself. What the updater's journal says is told to the gateway.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.board import look_here
from edge_agent.identity import verify
from edge_agent.release_bundle import has_wheel, open_bundle, read_wheels
from edge_agent.slots import WHEELS
from edge_agent.state import sync_folder
from edge_agent.update_files import PREFIX, SUFFIX, Journal, read_journal
from edge_agent.updater import RESERVE_BYTES
from regrow import topics, wire
from regrow.errors import LocalError, PeerError
from regrow.machine import Connected, Disconnected, Effect, Event, Publish, Received, Subscribe
from regrow.piecewise import PATIENCE_S, Piecewise, check_blob
from regrow.publication import PIECE_BYTES
from regrow.release import MAX_WHEEL_BYTES, SHA_BYTES, Wheel, check_fit, head, open_manifest

SPOOL = "spool"  # in the agent's state folder
SAY_PERCENT = 10
_PART = ".part"
_AT_STEP = {"trial": "trial", "back": "trial", "back-restart": "trial"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a piece goes in the bundle, and how long it is."""

    offset: int
    size: int


class Incoming:
    """A bundle that comes in pieces, each written to its place. The file alone tells what is there: nothing else need be remembered.

    Args:
        path: of the file.
        beginning: the bundle's head.
        wheels: which it holds, each with the Blob that names its pieces.
    """

    def __init__(self, path: Path, beginning: bytes, wheels: Sequence[tuple[Wheel, wire.Blob]]) -> None:
        self.path = path
        self._places: dict[bytes, list[Piece]] = defaultdict(list)
        self._topics: dict[bytes, str] = {}
        fixed, size = [(0, beginning)], len(beginning)
        for wheel, blob in wheels:
            fixed.append((size, bytes.fromhex(wheel.sha256)))
            size += SHA_BYTES
            for number, digest in enumerate(blob.pieces):
                self._places[digest].append(Piece(size + number * PIECE_BYTES, min(PIECE_BYTES, wheel.size - number * PIECE_BYTES)))
                self._topics.setdefault(digest, topics.release_file(blob.digest, number))
            size += wheel.size
        self.size, self._fixed = size, fixed

    def open(self) -> dict[bytes, str]:
        """Make the file, or look what is in it already; digest -> topic of what lacks."""
        there = self.path.is_file() and self.path.stat().st_size == self.size
        lacking = {
            digest for digest, places in self._places.items() if not there or not all(self._holds(digest, place) for place in places)
        }
        if not there:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            with self.path.open("wb") as file:
                file.truncate(self.size)
        with self.path.open("r+b") as file:
            for offset, data in self._fixed:
                file.seek(offset)
                file.write(data)
        return {digest: topic for digest, topic in self._topics.items() if digest in lacking}

    def put(self, digest: bytes, data: bytes) -> None:
        """Write a piece to its places."""
        with self.path.open("r+b") as file:
            for place in self._places[digest]:
                file.seek(place.offset)
                file.write(data[: place.size])

    def percent(self, lacking: int) -> int:
        return 100 * (len(self._places) - lacking) // max(len(self._places), 1)

    def _holds(self, digest: bytes, place: Piece) -> bool:
        with self.path.open("rb") as file:
            file.seek(place.offset)
            return wire.digest(file.read(place.size)) == digest


class Releases:
    """One device's. `step` takes every event of the link, and None about once a second.

    Args:
        device: its name.
        state: the agent's state folder; bundles go to its folder `spool`.
        keys: Ed25519 public keys of who may release software.
        version: of this agent.
        quiet: whether training leaves the link alone now.
        prefix: the updater's, whose journal and wheels are read.
        board: "" for what the firmware says.
    """

    def __init__(
        self,
        device: str,
        state: Path,
        keys: Sequence[bytes],
        *,
        version: str = "",
        quiet: Callable[[], bool] = lambda: True,
        prefix: Path = PREFIX,
        board: str = "",
    ) -> None:
        self._device, self._keys, self._quiet, self._prefix = device, tuple(keys), quiet, prefix
        self._spool = state / SPOOL
        self._here = look_here(board=board, version=version)
        self._connected = False
        self._release: wire.Release | None = None
        self._wheels: list[Wheel] = []
        self._incoming: Incoming | None = None
        self._pieces: Piecewise | None = None
        self._state, self._reason = "none", ""
        self._retry_s = float("-inf")
        self._said: wire.ReleaseReport | None = None

    def step(self, event: Event | None, now: float) -> list[Effect]:
        """What the link must do about an event."""
        effects: list[Effect] = []
        if isinstance(event, Connected):
            self._connected, self._said, self._release = True, None, None
            self._forget("none", "")
            effects.append(Subscribe((topics.release(self._device),)))
        elif isinstance(event, Disconnected):
            self._connected, self._pieces = False, None
        elif isinstance(event, Received) and event.payload:
            effects += self._hear(event, now)
        if self._connected:
            effects += self._pursue(now)
            effects += self._report()
        return effects

    # ---- hearing -------------------------------------------------------------------------------------------------------------------

    def _hear(self, event: Received, now: float) -> list[Effect]:
        if event.topic == topics.release(self._device):
            try:
                return self._hear_release(wire.decode(event.payload, wire.Release)[0])
            except PeerError as error:
                return self._forget("refused", str(error))
        if self._pieces is not None and self._incoming is not None and event.topic in self._pieces.asked:
            try:
                digest, effects = self._pieces.take(event, now)
                self._incoming.put(digest, event.payload)
            except (PeerError, OSError) as error:
                return self._put_off(str(error), now)
            return effects
        return []

    def _hear_release(self, release: wire.Release) -> list[Effect]:
        self._said = None  # every announcement is answered: the gateway may have missed what was said before
        if release == self._release:
            return []
        effects = self._forget("waiting", "")
        self._release, self._retry_s = release, float("-inf")
        if not release.files:
            self._state = "withdrawn"
            self._sweep(None)
        return effects

    def _forget(self, state: str, reason: str) -> list[Effect]:
        effects = self._pieces.stop() if self._pieces is not None and self._connected else []
        self._pieces = self._incoming = None
        self._state, self._reason = state, reason[:1000]
        return effects

    def _put_off(self, reason: str, now: float) -> list[Effect]:
        """Try again in a while: what is wrong may pass."""
        self._retry_s = now + PATIENCE_S
        return self._forget("waiting", reason)

    # ---- doing ---------------------------------------------------------------------------------------------------------------------

    def _pursue(self, now: float) -> list[Effect]:
        """Begin to fetch, fetch on, or hand over."""
        release = self._release
        if release is None or self._state not in ("waiting", "fetching") or now < self._retry_s or self._begun(release.number) is not None:
            return []
        try:
            if self._pieces is None:
                self._begin(release, now)
            if self._pieces is None or self._incoming is None:
                return []
            if not self._pieces.lacking:
                self._hand_over(release.number, self._incoming.path)
                return self._forget("verified", "")
        except PeerError as error:
            return self._forget("refused", str(error))
        except (LocalError, OSError) as error:
            return self._put_off(str(error), now)
        if self._pieces.stalled(now):
            return self._put_off("its pieces are not on the broker", now)
        return self._pieces.ask() if self._quiet() else []

    def _begin(self, release: wire.Release, now: float) -> None:
        """Check all that can be known before anything is fetched, then see what lacks.

        Raises:
            PeerError: it is not for this device, or nobody whom it trusts signed it.
            LocalError: there is no room for it.
        """
        manifest = open_manifest(release.manifest, release.signed, self._keys, verify)
        if manifest.number != release.number:
            raise PeerError(f"the release is announced as {release.number}, but its manifest says {manifest.number}")
        self._wheels = check_fit(manifest, replace(self._here, number=self._journal().number))
        blobs = {blob.name: blob for blob in release.files}
        wanted = []
        for wheel in self._wheels:
            blob = blobs.get(wheel.name)
            if blob is None or blob.size != wheel.size or blob.digest.hex() != wheel.sha256[: 2 * wire.DIGEST_BYTES]:
                raise PeerError(f"the announcement of {wheel.name} contradicts the signed manifest")
            check_blob(blob, MAX_WHEEL_BYTES)
            if not has_wheel(self._prefix / WHEELS, wheel):
                wanted.append((wheel, blob))
        incoming = Incoming(self._spool / f".{release.number}{_PART}", head(release.manifest, release.signed), wanted)
        self._sweep(incoming.path)
        self._check_room(manifest.min_free_bytes + incoming.size)
        self._incoming, self._pieces, self._state, self._reason = incoming, Piecewise(incoming.open(), now), "fetching", ""

    def _check_room(self, needed: int) -> None:
        self._spool.mkdir(mode=0o700, exist_ok=True)
        free = shutil.disk_usage(self._spool).free
        if free < needed + RESERVE_BYTES:
            raise LocalError(f"needs {needed / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are free; free some space")

    def _hand_over(self, number: int, part: Path) -> None:
        """Check the whole file, and let the updater see it."""
        try:
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
                open_bundle(stream, self._keys)
                read_wheels(stream, self._wheels, None)
        except PeerError:
            part.unlink()
            raise
        part.rename(self._spool / f"{number}{SUFFIX}")
        sync_folder(self._spool)

    def _sweep(self, keep: Path | None) -> None:
        """Remove what other releases left half fetched."""
        for file in self._spool.glob(f".*{_PART}"):
            if file != keep:
                with suppress(OSError):
                    file.unlink()

    # ---- saying --------------------------------------------------------------------------------------------------------------------

    def _journal(self) -> Journal:
        try:
            return read_journal(self._prefix)
        except LocalError as error:
            return Journal(refused=str(error))

    def _begun(self, number: int) -> tuple[str, str] | None:
        """(state, reason) when the updater has the release, has had it or has refused it."""
        journal = self._journal()
        if journal.number == number:
            return (_AT_STEP.get(journal.step, "installing") if journal.step else journal.outcome), journal.reason
        if (self._spool / f"{number}{SUFFIX}").exists():
            return "verified", ""
        if journal.refused_file == f"{number}{SUFFIX}":
            return "refused", journal.refused
        return None

    def _report(self) -> list[Effect]:
        number = self._journal().number if self._release is None else self._release.number
        state, reason = self._begun(number) or (self._state, self._reason)
        percent = 0
        if self._incoming is not None and self._pieces is not None:
            percent = self._incoming.percent(len(self._pieces.lacking)) // SAY_PERCENT * SAY_PERCENT
        here = self._here
        report = wire.ReleaseReport(
            number=number,
            state=state or "none",
            percent=100 if state in ("verified", "installing", "trial", "healthy") else percent,
            reason=reason,
            version=here.version,
            python=here.python,
            machine=here.machine,
            board=here.board,
        )
        if report == self._said:
            return []
        self._said = report
        return [Publish(topics.release_report(self._device), wire.encode(report))]
