"""A fleet with keys on a compromised broker: a gateway, two agents and somebody with every right that a broker can give, but no key."""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from broker_server.broker import MAX_CONNECTIONS, MESSAGE_LIMIT_BYTES, Broker, Kind
from broker_server.credentials import COORDINATOR, BrokerFiles, Credentials
from broker_server.fleet import members
from broker_server.fleet.authority import Authority, check_request
from broker_server.fleet.registry import Registry
from broker_server.fleet.sealing import Sealing, sealing_of
from broker_server.gateway import Gateway
from broker_server.herald import Herald
from broker_server.promotions import Promotions
from broker_server.runs import create_run, load_task, recover
from broker_server.store import Store
from edge_agent import identity, identity_folder
from edge_agent import sealing as device_sealing
from edge_agent.agent import Agent
from edge_agent.bundle import Bundle
from edge_agent.data.source import DataSource
from edge_agent.state import StateFolder
from regrow import topics
from regrow.coordinator import Coordinator
from regrow.errors import LocalError
from regrow.machine import Note
from tests.broker_server.histories import make_task
from tests.testbed.processes import ROOT, task_text, until, write_digits

TASK, RUN, MALLORY = "digits", "one", "mallory"
NAMES = topics.Run(TASK, RUN)


def enrolled(registry: Registry, name: str, folder: Path) -> identity.Identity:
    """The identity of a new device of the fleet, made as by `regrow fleet add` and `regrow join`, but for the way of the request."""
    about = identity_folder.adopt(folder, members.write_claim(registry, name, folder.parent))
    assert about.claim is not None
    asked, authority = identity.request(folder), Authority(registry.folder)
    request = check_request(asked.csr, asked.signing_key, asked.proof, name)
    return identity.accept(folder, members.enrol(registry, authority, name, about.claim.token, request).encode())


class Lax(Broker):
    """mosquitto with an access list that gives somebody everything."""

    def _render(self) -> BrokerFiles:
        files = super()._render()
        files.access.write_text(f"{files.access.read_text()}user {MALLORY}\ntopic readwrite #\n")
        return files


class Mallory:
    """Reads everything, publishes anything.

    hands: the broker hands on to whoever has not subscribed, too; seen: what others have said.
    """

    def __init__(self, port: int, password: str, *, hands: bool) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self._said: set[tuple[str, bytes]] = set()
        self._spoil: tuple[str, Callable[[str, bytes], bytes]] | None = None
        self._spoiled: dict[str, bytes] = {}
        self._hands = hands
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=MALLORY)
        self._client.username_pw_set(MALLORY, password)
        self._client.on_message = lambda _client, _data, message: self._hear(message.topic, bytes(message.payload))
        ready: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._client.on_connect = lambda *_: self._client.subscribe([("regrow/v1/#", 1), ("to/#", 1)])
        self._client.on_subscribe = lambda *_: ready.put(None)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        ready.get(timeout=10)

    def _hear(self, topic: str, payload: bytes) -> None:
        if (topic, payload) in self._said:
            return
        self.seen.append((topic, payload))
        if self._spoil is not None and payload and self._spoil[0] in topic:
            self._spoiled[topic] = payload
            self.say(topic, self._spoil[1](topic, payload), retain=True)
        elif not payload:
            self._spoiled.pop(topic, None)

    @contextmanager
    def spoiling(self, part: str, with_what: Callable[[str, bytes], bytes]) -> Iterator[None]:
        """Put something else in the place of everything retained on topics with this part; in the end what was there again."""
        self._spoil = (part, with_what)
        try:
            yield
        finally:
            self._spoil = None
            for topic, payload in list(self._spoiled.items()):
                self.say(topic, payload, retain=True)
            self._spoiled.clear()

    def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._said.add((topic, payload))
        self._client.publish(topic, payload, qos=1, retain=retain)

    def hand(self, device: str, topic: str, payload: bytes) -> None:
        """Give one device a message."""
        self.say(f"to/{device}/{topic}" if self._hands else topic, payload)

    def last(self, wanted: str | Callable[[str], bool]) -> tuple[str, bytes]:
        """The newest message on a topic, or on one that fits; waits for the first."""
        fits = wanted if callable(wanted) else wanted.__eq__
        found: tuple[str, bytes] = until(
            lambda: next(((topic, data) for topic, data in reversed(self.seen) if data and fits(topic)), None), f"{wanted} was never said"
        )
        return found

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Device:
    """One agent of the fleet on a thread of its own."""

    def __init__(self, name: str, folder: Path, port: int, password: str, owner: identity.Identity) -> None:
        self.name, self.identity, self.notes = name, owner, list[Note]()
        write_digits(folder / f"{name}.npz", seed=len(name))
        source = DataSource(200)
        with np.load(folder / f"{name}.npz") as data:
            source.append(data["x"], data["y"])
        self._state = StateFolder(folder / f"{name}.state")
        self.sealing = device_sealing.Sealing(owner, identity.verify, time.monotonic(), since_ms=1000 * owner.about.since_s)
        bundle = Bundle(name, f"mqtt://127.0.0.1:{port}", password)
        self.agent = Agent(bundle, self._state, source, sealing=self.sealing)
        self._thread = threading.Thread(target=self.agent.run, args=(self.notes.append,), daemon=True)
        self._thread.start()

    def refused(self, kind: str) -> int:
        return self.sealing._guard.refusals.times(kind)

    def close(self) -> None:
        self.agent.stop()
        self._thread.join(15)
        assert not self._thread.is_alive()
        self._state.close()


class SealedFleet:
    """All of it in one folder; a context manager that ends every thread and process. kind: "amqtt" is the compromised one."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder, self.fleet, self.kind = folder, folder / "fleet", kind
        self._mosquitto: Broker | None = None
        self._embedded: subprocess.Popen[bytes] | None = None
        members.init(self.fleet, "meadow", ["127.0.0.1"])
        self.registry, self.authority = Registry(self.fleet), Authority(self.fleet)
        self.credentials = Credentials(folder / "home")
        for name in ("one", "two", MALLORY):
            self.credentials.add_device(name)
        text = task_text(TASK, fleet="min_devices = 2", stop="seconds = 1000")
        self.run = create_run(folder / "runs", load_task(make_task(folder / "task", text)), RUN)
        self.promotions = Promotions(folder / "runs", TASK)
        self.notes: list[Note] = []
        self.owners = {name: enrolled(self.registry, name, folder / f"{name}.identity") for name in ("one", "two")}
        self.devices: dict[str, Device] = {}
        self._gateway_thread: threading.Thread | None = None
        self._start_broker()

    def _start_broker(self) -> None:
        if self.kind == "mosquitto":
            self._mosquitto = Lax(self.folder / "home", self.credentials, kind="mosquitto")
            self._mosquitto.start()
            self.port = self._mosquitto.port
            return
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        config = self.folder / "broker.json"
        settings = {"host": "127.0.0.1", "port": self.port, "users": str(self.credentials.render(self.folder / "home").embedded)}
        more = {"log": str(self.folder / "broker.log"), "message_limit_bytes": MESSAGE_LIMIT_BYTES, "max_connections": MAX_CONNECTIONS}
        config.write_text(json.dumps({**settings, **more}))
        self._embedded = subprocess.Popen([sys.executable, "-m", "tests.attacks.compromised_broker", str(config)], cwd=ROOT)
        until(self._answers, "the broker answers")

    def _answers(self) -> bool:
        assert self._embedded is not None
        assert self._embedded.poll() is None
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def __enter__(self) -> SealedFleet:
        try:
            self.mallory = Mallory(self.port, self.credentials.password(MALLORY), hands=self.kind == "amqtt")
            self.start_gateway()
            self.devices = {name: self.device(name) for name in self.owners}
        except BaseException:
            self._end_broker()
            raise
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        for device in self.devices.values():
            device.close()
        if self._gateway_thread is not None:
            self.stop_gateway()
        self.mallory.close()
        self._end_broker()

    def _end_broker(self) -> None:
        if self._mosquitto is not None:
            self._mosquitto.stop()
        if self._embedded is not None:
            self._embedded.terminate()
            self._embedded.wait(10)

    # ---- the gateway -----------------------------------------------------------------------------------------------------------------

    def start_gateway(self) -> None:
        """Start it, or start it again with what the last one left."""
        started: queue.SimpleQueue[Gateway] = queue.SimpleQueue()
        self._gateway_thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._gateway_thread.start()
        self.gateway = started.get(timeout=15)

    def _serve(self, started: queue.SimpleQueue[Gateway]) -> None:
        folder = load_task(self.run / "task")
        with Store.open(self.run) as store:
            coordinator = Coordinator(recover(store, folder), RUN, folder.programs, 7)
            gateway = Gateway(
                coordinator,
                store,
                url=f"mqtt://127.0.0.1:{self.port}",
                username=COORDINATOR,
                password=self.credentials.coordinator_password,
                companions=(Herald(self.promotions),),
                sealing=sealing_of(self.registry, self.authority, f"serve-{RUN}"),
            )
            started.put(gateway)
            try:
                gateway.run(on_note=self.notes.append)
            except LocalError as error:
                assert str(error) == "killed"  # noqa: PT017 - nothing else may end it

    def stop_gateway(self, *, killed: bool = False) -> None:
        """End it; killed: without a chance to save anything more."""
        assert self._gateway_thread is not None
        if killed:
            self.gateway._events.put(LocalError("killed"))
        else:
            self.gateway.stop()
        self._gateway_thread.join(30)
        assert not self._gateway_thread.is_alive()
        self._gateway_thread = None

    @property
    def sealing(self) -> Sealing:
        assert self.gateway._sealing is not None
        return self.gateway._sealing

    def refused(self, kind: str) -> int:
        """By the gateway, of whoever."""
        sealing = self.sealing
        return sealing._devices.refusals.times(kind) + sealing._coordinators.refusals.times(kind)

    def accepted(self, who: str) -> int:
        """The newest update of a device that counts, by its sequence number; -1: none."""
        return self.gateway.coordinator.ledger.devices[who].last_sequence if who in self.gateway.coordinator.ledger.devices else -1

    # ---- devices ---------------------------------------------------------------------------------------------------------------------

    def device(self, name: str) -> Device:
        return Device(name, self.folder, self.port, self.credentials.password(name), self.owners[name])

    def restart_device(self, name: str) -> Device:
        self.devices[name].close()
        self.devices[name] = self.device(name)
        return self.devices[name]
