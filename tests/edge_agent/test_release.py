"""The agent fetches a release piece by piece, keeps what is there over a restart, gives way to training, and says how far it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("cryptography")

from edge_agent.release import Releases
from regrow import topics, wire
from regrow.machine import Connected, Disconnected, Effect, Event, Publish, Received, Subscribe, Unsubscribe
from regrow.piecewise import AT_ONCE, PATIENCE_S
from regrow.publication import PIECE_BYTES, blob
from regrow.release import signed_bytes
from tests.edge_agent.release_rig import KEY, PUBLIC, bundle_of, make_wheel, manifest_of, wheels_of


class Rig:
    """One device and what is retained for it. `live` lets everything happen that follows."""

    def __init__(self, path: Path) -> None:
        self.path, self.prefix, self.state = path, path / "opt", path / "state"
        self.state.mkdir()
        (self.prefix / "wheels").mkdir(parents=True)
        (self.prefix / "update").mkdir()
        self.retained: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.reports: list[wire.ReleaseReport] = []
        self.quiet = True
        self.now = 0.0
        self.start()

    def start(self) -> None:
        self._subscribed: set[str] = set()
        self.releases = Releases("d1", self.state, [PUBLIC], version="1.0.0", quiet=lambda: self.quiet, prefix=self.prefix, board="pi")

    def offer(self, number: int = 1, *, padding: int = 0, **changes: Any) -> bytes:
        """Publish a release; returns its bundle."""
        wheels = wheels_of(self.path / f"wheels-{number}", "2.0.0")
        if padding:
            wheels.append(make_wheel(self.path, "padding", "1", "padding", "".join(f"x{n} = {n}\n" for n in range(padding))))
        manifest = manifest_of(wheels, number, "2.0.0", **changes)
        said = msgspec.json.encode(manifest)
        files = [blob(file.name, file.read_bytes()) for file in wheels]
        for found, file in zip(files, wheels, strict=True):
            for piece, data in enumerate(wire.pieces(file.read_bytes(), PIECE_BYTES)):
                self.retained[topics.release_file(found.digest, piece)] = bytes(data)
        release = wire.Release(number=number, manifest=said, signed=KEY.sign(signed_bytes(said)), files=files)
        self.retained[topics.release("d1")] = wire.encode(release)
        return bundle_of(manifest, wheels)

    def step(self, event: Event | None) -> list[Effect]:
        return self.releases.step(event, self.now)

    def live(self, *, pieces: int = 10**6) -> str:
        """Connect, and go on until nothing happens any more, or so many pieces have come; the last state that was said."""
        self._subscribed.clear()
        pending = self.step(Connected())
        while pending:
            effect = pending.pop(0)
            if isinstance(effect, Publish):
                assert effect.topic == topics.release_report("d1")
                self.reports.append(wire.decode(bytes(effect.payload), wire.ReleaseReport)[0])
            elif isinstance(effect, Unsubscribe):
                self._subscribed -= set(effect.topics)
            elif isinstance(effect, Subscribe):
                assert len([topic for topic in effect.topics if "/release/" in topic]) <= AT_ONCE
                for topic in effect.topics:
                    self.asked.append(topic)
                    if "/release/" in topic:
                        pieces -= 1
                    if topic in self.retained and pieces >= 0:
                        pending += self.step(Received(topic, self.retained[topic]))
            if not pending:
                pending += self.step(None)
        return self.reports[-1].state

    def fetched(self) -> list[str]:
        return [topic for topic in self.asked if "/release/" in topic]

    def journal(self, **fields: Any) -> None:
        (self.prefix / "update" / "journal.json").write_text(json.dumps(fields))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_release_arrives_whole_in_the_spool(rig: Rig) -> None:
    bundle = rig.offer(padding=30_000)
    assert rig.live() == "verified"
    assert (rig.state / "spool" / "1.bundle").read_bytes() == bundle
    assert rig.reports[-1].percent == 100
    assert len(rig.fetched()) == len(set(rig.fetched())) > 8


def test_after_a_restart_only_what_lacks_is_asked_for(rig: Rig) -> None:
    bundle = rig.offer(padding=30_000)
    assert rig.live(pieces=5) == "fetching"
    before = set(rig.fetched()[:5])
    (part,) = (rig.state / "spool").iterdir()
    rig.asked.clear()
    rig.start()
    assert rig.live() == "verified"
    assert not before & set(rig.fetched())
    assert (rig.state / "spool" / "1.bundle").read_bytes() == bundle
    assert not part.exists()


def test_a_piece_that_a_power_cut_tore_is_fetched_again(rig: Rig) -> None:
    bundle = rig.offer(padding=30_000)
    rig.live(pieces=5)
    (part,) = (rig.state / "spool").iterdir()
    data = bytearray(part.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    part.write_bytes(data)
    rig.start()
    assert rig.live() == "verified"
    assert (rig.state / "spool" / "1.bundle").read_bytes() == bundle


def test_wheels_that_the_device_has_are_not_fetched(rig: Rig) -> None:
    rig.offer()
    (there,) = (rig.path / "wheels-1").glob("onnxruntime*")
    (rig.prefix / "wheels" / there.name).write_bytes(there.read_bytes())
    assert rig.live() == "verified"
    assert len(rig.fetched()) == 1
    assert (rig.state / "spool" / "1.bundle").stat().st_size < sum(file.stat().st_size for file in (rig.path / "wheels-1").iterdir())


def test_training_goes_first(rig: Rig) -> None:
    rig.offer()
    rig.quiet = False
    assert rig.live() == "fetching"
    assert not rig.fetched()
    rig.quiet = True
    assert rig.live() == "verified"


def test_pieces_that_do_not_come_are_said_and_asked_for_again_in_a_while(rig: Rig) -> None:
    rig.offer(padding=30_000)
    pieces = {topic: data for topic, data in rig.retained.items() if "/release/" in topic}
    for topic in list(pieces)[3:]:
        del rig.retained[topic]
    assert rig.live() == "fetching"
    rig.now += PATIENCE_S + 1
    (report,) = [effect for effect in rig.step(None) if isinstance(effect, Publish)]
    said = wire.decode(bytes(report.payload), wire.ReleaseReport)[0]
    assert (said.state, said.reason) == ("waiting", "its pieces are not on the broker")
    rig.step(Disconnected())
    rig.retained |= pieces
    rig.now += PATIENCE_S + 1
    assert rig.live() == "verified"


def test_without_room_on_the_disk_nothing_is_fetched(rig: Rig) -> None:
    rig.offer(min_free_bytes=2**49)
    assert rig.live() == "waiting"
    assert "of disk" in rig.reports[-1].reason
    assert not rig.fetched()


def test_a_withdrawn_release_is_dropped(rig: Rig) -> None:
    rig.offer(padding=30_000)
    rig.live(pieces=3)
    rig.retained[topics.release("d1")] = wire.encode(wire.Release(number=1))
    rig.start()
    assert rig.live() == "withdrawn"
    assert not list((rig.state / "spool").iterdir())


@pytest.mark.parametrize(
    ("journal", "state", "reason"),
    [
        ({"number": 1, "step": "build"}, "installing", ""),
        ({"number": 1, "step": "trial"}, "trial", ""),
        ({"number": 1, "outcome": "healthy"}, "healthy", ""),
        ({"number": 1, "outcome": "rolled back", "reason": "trial: no round"}, "rolled back", "trial: no round"),
        ({"number": 1, "outcome": "failed", "reason": "build: no"}, "failed", "build: no"),
        ({"number": 0, "refused_file": "1.bundle", "refused": "not signed"}, "refused", "not signed"),
        (
            {"number": 2, "outcome": "healthy"},
            "refused",
            "release 1 (regrow 2.0.0) is not newer than release 2, which was tried here already",
        ),
    ],
)
def test_what_the_updater_has_begun_is_said_and_not_fetched_again(rig: Rig, journal: dict[str, Any], state: str, reason: str) -> None:
    rig.journal(**journal)
    rig.offer()
    assert rig.live() == state
    assert reason in rig.reports[-1].reason
    assert bool(reason) == bool(rig.reports[-1].reason)
    assert not rig.fetched()


def test_a_journal_that_cannot_be_read_does_not_end_the_agent(rig: Rig) -> None:
    (rig.prefix / "update" / "journal.json").write_text("{")
    rig.offer()
    assert rig.live() == "verified"
