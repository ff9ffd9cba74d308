"""A fleet of one device on a real broker, whose traffic an attacker with the coordinator's password can change; only the signing key is
safe. The gateway's side is the machine that `serve` runs, the device's the one of `regrow agent --updates`, and the updater the real one.
"""

from __future__ import annotations

import json
import queue
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from broker_server.broker import Broker, Kind
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.fleet import members
from broker_server.fleet.authority import Authority
from broker_server.fleet.registry import Device, Registry
from broker_server.fleet.release_herald import ReleaseHerald
from broker_server.fleet.releases import Releases as Staging
from broker_server.fleet.releases import Wish
from broker_server.transport import MqttBus
from edge_agent.release import SPOOL, Releases
from edge_agent.transport import MqttLink
from edge_agent.update_files import Journal, read_settings
from edge_agent.updater import Updater
from regrow import topics, wire
from regrow.machine import Connected, Publish, Subscribe, Unsubscribe
from regrow.publication import PIECE_BYTES, blob
from tests.edge_agent.release_rig import wheels_of
from tests.testbed.processes import until

DEVICE, BOARD, INSTALLED = "d1", "raspberry-pi-5-model-b", "1.5.0"


class World:
    """Broker, gateway's machine, device and its prefix."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder, self.prefix, self.state = folder, folder / "opt", folder / "state"
        members.init(folder / "fleet", "yard", ["127.0.0.1"])
        registry = Registry(folder / "fleet")
        with registry.change() as devices:
            devices[DEVICE] = Device(state="active", added_s=1, board=BOARD)
        self.authority, self.staging = Authority(registry.folder), Staging(registry)
        self.keys = (self.authority.signing_key,)
        self._install(folder)
        for number in range(1, 6):  # the five releases that the device has had
            self.stage(INSTALLED, percent=0.0, trial_minutes=float(number))
        credentials = Credentials(folder / "home")
        password = credentials.add_device(DEVICE)
        self._broker = Broker(folder / "broker", credentials, kind=kind)
        self._broker.start()
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.bus = MqttBus(
            self._broker.url,
            client_id=COORDINATOR,
            username=COORDINATOR,
            password=credentials.coordinator_password,
            on_event=self._events.put,
        )
        self.herald = ReleaseHerald(self.staging)
        self.bus.start()
        self.link = MqttLink(self._broker.url, device_id=DEVICE, password=password, rng=random.Random(1))
        self.heard: list[str] = []
        self.start_device()

    def start_again(self) -> None:
        """Another life of it, on the link that is there."""
        self.start_device()
        for effect in self.device.step(Connected(), time.monotonic()):
            self.link.perform(effect)  # type: ignore[arg-type]

    def _install(self, folder: Path) -> None:
        """What a refusal needs of a device: an environment that says its version, and the updater's settings."""
        (self.prefix / "a").mkdir(parents=True)
        (self.prefix / "a" / "release.json").write_text(json.dumps({"number": 5, "version": INSTALLED, "wheels": []}))
        for link in ("current", "good"):
            (self.prefix / link).symlink_to("a")
        (self.prefix / "update").mkdir()
        (self.prefix / "update" / "journal.json").write_text(json.dumps({"number": 5, "outcome": "healthy", "version": INSTALLED}))
        self.settings = folder / "update.json"
        paths = {"prefix": str(self.prefix), "spool": str(self.spool), "health": str(self.state / "health.json")}
        said = {"keys": [key.hex() for key in self.keys], **paths, "restart": ["true"], "board": BOARD}
        self.settings.write_text(json.dumps(said))
        self.settings.chmod(0o644)
        self.spool.mkdir(parents=True)

    @property
    def spool(self) -> Path:
        return self.state / SPOOL

    def start_device(self) -> None:
        """A life of the agent's part that takes releases."""
        self.device = Releases(DEVICE, self.state, self.keys, version=INSTALLED, prefix=self.prefix, board=BOARD)

    def close(self) -> None:
        self.link.close()
        self.bus.close()
        self._broker.stop()

    # ---- turning -------------------------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Let both ends take what has come."""
        for event in [*self.link.poll(0.01), None]:
            self.heard.append(getattr(event, "topic", ""))
            for effect in self.device.step(event, time.monotonic()):
                self.link.perform(effect)  # type: ignore[arg-type]
        event = None if self._events.empty() else self._events.get()
        for effect in self.herald.step(event, time.monotonic()):
            if isinstance(effect, (Publish, Subscribe, Unsubscribe)):
                self.bus.perform(effect)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Turn until something is true."""

        def look() -> Any:
            self.turn()
            return condition()

        return until(look, lambda: f"{what}; the device said {self.said()}", 20)

    def said(self) -> wire.ReleaseReport | None:
        """What the gateway has noted of the device."""
        return self.staging.reports().get(DEVICE)

    def told(self, number: int, *states: str) -> str:
        """Wait until the gateway knows that the device is so with this release; why."""
        report = self.until(
            lambda: (said := self.said()) is not None and (said.number, said.state) in {(number, state) for state in states} and said,
            f"release {number} {' or '.join(states)}",
        )
        return str(report.reason)

    # ---- the two who publish -------------------------------------------------------------------------------------------------------

    def stage(self, version: str = "2.0.0", **wish: Any) -> wire.Release:
        """What the operator does; what the devices then hear."""
        first, *others = wheels_of(self.folder / f"wheels-{version}", version)
        staged, _ = self.staging.stage(first, others, Wish(**{"percent": 100.0, **wish}), self.authority.sign)
        return self.staging.announcement(staged)

    def forge(self, release: wire.Release, files: Mapping[bytes, bytes]) -> None:
        """What the attacker does: publish a release and pieces (by the digest of their file) as the coordinator would."""
        for digest, data in files.items():
            for number, piece in enumerate(wire.pieces(data, PIECE_BYTES)):
                self.bus.perform(Publish(topics.release_file(digest, number), bytes(piece), retain=True))
        self.bus.perform(Publish(topics.release(DEVICE), wire.encode(release), retain=True))

    # ---- what must not have happened -----------------------------------------------------------------------------------------------

    def apply(self) -> Journal:
        """The updater, as its unit would start it."""
        return Updater(read_settings(self.settings), say=lambda _: None).apply()

    def untouched(self) -> None:
        """Nothing was handed over, nothing installed."""
        assert not list(self.spool.glob("*.bundle"))
        assert self.apply().number == 5
        assert (self.prefix / "current").readlink() == (self.prefix / "good").readlink() == Path("a")
        assert not (self.prefix / "b").exists()


def blobs_of(files: Mapping[str, bytes]) -> list[wire.Blob]:
    return [blob(name, data) for name, data in files.items()]
