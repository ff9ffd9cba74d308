"""Staging: who is offered a release and when, and what leaves the gateway for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from broker_server.fleet import members
from broker_server.fleet.authority import Authority
from broker_server.fleet.registry import Device, Registry
from broker_server.fleet.release_herald import ReleaseHerald
from broker_server.fleet.releases import Releases, Staged, Wish, percentile
from broker_server.queueing import WINDOW
from edge_agent.release_bundle import open_bundle, read_wheels
from regrow import topics, wire
from regrow.errors import LocalError
from regrow.machine import Acknowledged, Connected, Event, Publish, Received
from tests.edge_agent.release_rig import make_wheel, wheels_of

MANY = 40


class Yard:
    """A fleet of many devices, and the gateway's machine on a link that acknowledges everything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        members.init(path / "fleet", "yard", ["127.0.0.1"])
        self.registry = Registry(path / "fleet")
        self.authority = Authority(self.registry.folder)
        with self.registry.change() as devices:
            for number in range(MANY):
                devices[f"d{number}"] = Device(state="active", added_s=1, board="pi5" if number % 2 else "")
        self.releases = Releases(self.registry)
        self.herald = ReleaseHerald(self.releases)
        self.retained: dict[str, bytes] = {}
        self.order: list[str] = []
        self.most = 0
        self.now = 0.0

    def stage(self, version: str = "2.0.0", **wish: Any) -> tuple[Staged, bool]:
        first, *others = wheels_of(self.path / version, version)
        return self.releases.stage(first, others, Wish(**{"percent": 10.0, **wish}), self.authority.sign)

    def offered(self, staged: Staged) -> set[str]:
        return set(self.releases.offered(staged))

    def turn(self, event: Event | None = None) -> None:
        """Two seconds of the link."""
        self.now += 2
        waiting: list[int] = []
        pending = self.herald.step(event, self.now)
        while True:
            for effect in pending:
                if isinstance(effect, Publish):
                    assert effect.token is not None
                    waiting.append(effect.token)
                    self.order.append(effect.topic)
                    self.retained[effect.topic] = bytes(effect.payload)
            self.most = max(self.most, len(waiting))
            if not waiting:
                return
            pending = self.herald.step(Acknowledged(waiting.pop(0), 0.0, 0.0, 0), self.now)

    def hears(self, device: str) -> wire.Release:
        return wire.decode(self.retained[topics.release(device)], wire.Release)[0]

    def pieces(self) -> dict[str, bytes]:
        return {topic: data for topic, data in self.retained.items() if topic.startswith("regrow/v1/release/") and data}


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(tmp_path)


def test_a_wider_stage_keeps_the_narrower_one_and_is_the_same_release(yard: Yard) -> None:
    reached: set[str] = set()
    for percent in (0, 10, 30, 60, 100):
        staged, new = yard.stage(percent=float(percent))
        assert (staged.opened().number, new) == (1, percent == 0)
        wider = yard.offered(staged)
        assert wider >= reached
        reached = wider
    assert len(reached) == MANY
    staged, _ = yard.stage(percent=20.0)
    assert yard.offered(staged) == reached, "a narrower one takes nothing back: that is what --halt is for"


def test_another_release_begins_with_other_devices(yard: Yard) -> None:
    first, _ = yard.stage("2.0.0", percent=30.0)
    second, new = yard.stage("2.0.1", percent=30.0)
    assert new
    assert second.opened().number == 2
    assert 0 < len(yard.offered(first)) < MANY
    assert yard.offered(first) != yard.offered(second)
    drawn = [percentile(first.opened(), f"device-{number}") for number in range(2000)]
    assert 27 < 100 * sum(value < 30 for value in drawn) / 2000 < 33


def test_a_halted_release_is_offered_to_nobody_and_the_same_wheels_are_then_another_release(yard: Yard) -> None:
    yard.stage(percent=100.0)
    assert not yard.offered(yard.releases.halt())
    again, new = yard.stage(percent=100.0)
    assert (again.opened().number, new, len(yard.offered(again))) == (2, True, MANY)


def test_boards_and_states_leave_devices_out(yard: Yard) -> None:
    staged, _ = yard.stage(percent=100.0, boards=("jetson",))
    assert yard.offered(staged) == {f"d{number}" for number in range(0, MANY, 2)}, "a device whose board is not known decides itself"
    with yard.registry.change() as devices:
        for name, state in (("d0", "revoked"), ("d2", "wiping"), ("d4", "claimed")):
            devices[name] = Device(state=state, added_s=1)  # type: ignore[arg-type]
    assert yard.offered(staged) == {f"d{number}" for number in range(6, MANY, 2)}


def test_pieces_leave_before_the_announcement_some_at_a_time_and_are_cleared(yard: Yard) -> None:
    staged, _ = yard.stage(percent=50.0)
    yard.turn(Connected())
    offered = yard.offered(staged)
    announced = [at for at, topic in enumerate(yard.order) if topic.startswith("regrow/v1/device/")]
    pieces = [at for at, topic in enumerate(yard.order) if topic.startswith("regrow/v1/release/")]
    assert max(pieces) < min(announced)
    assert yard.most <= WINDOW
    for number in range(MANY):
        assert bool(yard.hears(f"d{number}").files) == (f"d{number}" in offered)
    yard.order.clear()
    yard.turn()
    assert not yard.order
    yard.releases.halt()
    yard.turn()
    assert not yard.pieces()
    assert not any(yard.hears(f"d{number}").files for number in range(MANY))


def test_everything_is_said_again_after_a_reconnect(yard: Yard) -> None:
    yard.stage(percent=100.0)
    yard.turn(Connected())
    before, yard.retained = yard.retained, {}
    yard.turn(Connected())
    assert yard.retained == before


def test_what_devices_say_is_kept_and_strangers_are_not(yard: Yard) -> None:
    yard.turn(Connected())
    report = wire.ReleaseReport(number=1, state="rolled back", reason="trial: no round", version="1.0")
    for device in ("d1", "stranger"):
        yard.turn(Received(topics.release_report(device), wire.encode(report)))
    yard.turn(Received(topics.release_report("d2"), b"nonsense"))
    yard.turn()
    assert yard.releases.reports() == {"d1": report}
    assert ReleaseHerald(yard.releases)._known == {"d1": report}


def test_the_bundle_beside_it_is_whole_and_signed(yard: Yard) -> None:
    yard.stage()
    with (yard.releases.path / "1.bundle").open("rb") as stream:
        manifest = open_bundle(stream, [yard.authority.signing_key])
        read_wheels(stream, manifest.files, None)
    assert manifest.version == "2.0.0"
    assert all(file.stat().st_mode & 0o077 == 0 for file in yard.releases.path.rglob("*") if file.is_file())


def test_a_damaged_wheel_is_not_published(yard: Yard) -> None:
    yard.stage(percent=100.0)
    file = next((yard.releases.path / "files").iterdir())
    file.write_bytes(b"damaged")
    yard.turn(Connected())
    assert not yard.order


def test_wheels_that_no_device_could_install_are_refused_when_they_are_staged(yard: Yard, tmp_path: Path) -> None:
    first, *others = wheels_of(tmp_path / "ok", "2.0.0")
    apart = make_wheel(tmp_path, "numpy", "2", "numpy", "", tag="cp311-cp311-linux_aarch64")
    far = make_wheel(tmp_path, "psutil", "2", "psutil", "", tag="cp313-cp313-linux_aarch64")
    text = tmp_path / "regrow-2.0.0-py3-none-any.whl"
    text.write_text("no zip")
    for wheel, more, why in (
        (first, [*others, apart, far], "no Python and machine has a wheel of each"),
        (others[0], [], "expected the wheel of regrow"),
        (text, [], "expected the wheel of regrow"),
        (tmp_path / "none.whl", [], "none.whl"),
        (first, [wheels_of(tmp_path / "two", "2.1.0")[0]], "two wheels of regrow"),
    ):
        with pytest.raises(LocalError, match=why):
            yard.releases.stage(wheel, more, Wish(10.0), yard.authority.sign)
    assert yard.releases.newest() is None
