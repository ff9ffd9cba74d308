"""Many real device machines in one process, behind one connection to a real broker: `python -m testbed.swarm`.

The machines, the broker and the training (a small model, onnxruntime) are real; links and the length of a round are made to last as told,
and so are what telemetry says of link and power, whose meter is called "synthetic". It loads a gateway for the page's tests and its bench.
"""

from __future__ import annotations

import argparse
import heapq
import math
import queue
import random
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from broker_server.transport import MqttBus
from edge_agent.data.source import DataSource
from edge_agent.worker import LevelTrainers, train_job
from regrow import topics, wire
from regrow.device import Device
from regrow.errors import RegrowError
from regrow.machine import (
    Acknowledged,
    Connected,
    Disconnected,
    Effect,
    Event,
    Measured,
    Persisted,
    Publish,
    Received,
    Save,
    SetTimer,
    Subscribe,
    Train,
    TrainingFailed,
    Unsubscribe,
    Woken,
)
from regrow.presence import Identity
from testbed.subscriptions import Subscriptions

LINKS_BPS = (4e6, 2e6, 8e5, 4e5, 2e5)
SOURCES = 20
ROWS = 100


class Swarm:
    """Devices by name; `run` lets them live.

    Args:
        url: of a broker that lets anybody in.
        names: of the devices; their links go in turn through LINKS_BPS.
        round_s: how long training lasts, at least and at most.
    """

    def __init__(self, url: str, names: Sequence[str], round_s: tuple[float, float], seed: int = 0) -> None:
        self._heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._bus = MqttBus(url, client_id="swarm", username="swarm", password="", on_event=self._heard.put)
        self._random, self._round_s = random.Random(seed), round_s
        self._sources = [_digits(number) for number in range(min(SOURCES, len(names)))]
        self._trainers: LevelTrainers | None = None
        self._later: list[tuple[float, int, str, Event]] = []
        self._count = 0
        self._timer: dict[str, int] = {}
        self._subscriptions = Subscriptions()
        self._kept: dict[str, bytes] = {}  # what lies on the topics that somebody listens to
        self._devices: dict[str, Device] = {}
        self._bps: dict[str, float] = {}
        self._place = {name: number for number, name in enumerate(names)}
        for number, name in enumerate(names):
            nonce = name.encode().ljust(16, b".")[:16]
            self._bps[name] = LINKS_BPS[number % len(LINKS_BPS)]
            identity = Identity(name, nonce, nonce, examples=ROWS, validation_examples=ROWS // 5)
            self._devices[name] = Device(identity, {}, self._bps[name])

    def run(self, seconds: float = math.inf) -> None:
        """Live for that long, or until Ctrl-C."""
        self._bus.start()
        end_s = time.monotonic() + seconds
        try:
            while (now := time.monotonic()) < end_s:
                due_s = self._later[0][0] if self._later else math.inf
                if due_s <= now:
                    _, number, name, event = heapq.heappop(self._later)
                    if not isinstance(event, Woken) or self._timer.get(name) == number:
                        self._step(name, event)
                    continue
                try:
                    event = self._heard.get(timeout=min(max(min(due_s, end_s) - now, 0.0), 1.0))
                except queue.Empty:
                    continue
                for name in self._hearers(event):
                    self._step(name, event)
        finally:
            self._bus.close()

    def _hearers(self, event: Event) -> Sequence[str]:
        if isinstance(event, (Connected, Disconnected)):
            return list(self._devices)
        if not isinstance(event, Received):
            return ()
        if event.payload:
            self._kept[event.topic] = event.payload
        else:
            self._kept.pop(event.topic, None)
        return sorted(self._subscriptions.listeners(event.topic))

    def _step(self, name: str, event: Event) -> None:
        for effect in self._devices[name].step(event, time.monotonic()):
            self._perform(name, effect)

    def _perform(self, name: str, effect: Effect) -> None:
        match effect:
            case Publish():
                self._publish(name, effect)
            case Subscribe():
                self._subscribe(name, effect.topics)
            case Unsubscribe():
                for topic in effect.topics:
                    self._subscriptions.remove(name, topic)
            case SetTimer() if math.isfinite(effect.at_s):
                self._timer[name] = self._at(effect.at_s, name, Woken())
            case Save(id=int() as number):
                self._at(time.monotonic(), name, Persisted(number))
            case Train():
                self._at(time.monotonic() + self._random.uniform(*self._round_s), name, self._trained(name, effect))

    def _at(self, at_s: float, name: str, event: Event) -> int:
        self._count += 1
        heapq.heappush(self._later, (at_s, self._count, name, event))
        return self._count

    def _publish(self, name: str, effect: Publish) -> None:
        now, device = time.monotonic(), self._devices[name]
        if effect.topic.endswith("/telemetry"):
            message, _ = wire.decode(bytes(effect.payload), wire.Telemetry)
            effect = Publish(effect.topic, wire.encode(self._metered(name, message)))
        device.meters.bytes_up += len(effect.payload)
        self._bus.perform(Publish(effect.topic, effect.payload, effect.retain))
        if effect.token is not None:
            lasts_s = 8 * len(effect.payload) / self._bps[name]
            self._at(now + lasts_s, name, Acknowledged(effect.token, now, now + lasts_s, len(effect.payload)))
            self._at(now + lasts_s, name, Measured(self._bps[name] * self._random.uniform(0.9, 1.1)))

    def _metered(self, name: str, said: wire.Telemetry) -> wire.Telemetry:
        """What instruments would say. Every fourth device has no power meter, every seventh is warm enough to be throttled."""
        bps, place = self._bps[name], self._place[name]
        link = wire.LinkState(0.9 * bps, 1.1 * bps, round(2000 / bps + 0.02, 4))
        busy = said.phase == "training"
        watts = None if place % 4 == 3 else round((4.5 if busy else 2.4) + self._random.uniform(-0.2, 0.2), 2)
        meter = "synthetic" if watts is not None else "unmeasured: no meter"
        warm = round((62.0 if busy else 48.0) + (20.0 if place % 7 == 6 else 0.0) + self._random.uniform(-2, 2), 1)
        limit = wire.Limit("limit: 2.0 GB a day, 1.9 GB used", None, 0.2) if place % 11 == 10 else None
        return msgspec.structs.replace(said, link=link, power=wire.PowerState(watts, meter, warm, warm > 80.0), limit=limit)

    def _subscribe(self, name: str, wanted: Sequence[str]) -> None:
        new = [topic for topic in wanted if not self._subscriptions.listeners(topic)]
        for topic in wanted:
            self._subscriptions.add(name, topic)
            if topic not in new and topic in self._kept:
                self._devices[name].meters.bytes_down += len(self._kept[topic])
                self._at(time.monotonic(), name, Received(topic, self._kept[topic]))
        if new:
            self._bus.perform(Subscribe(tuple(new)))

    def _trained(self, name: str, job: Train) -> Event:
        if self._trainers is None:
            self._trainers = LevelTrainers(job.programs)
        try:
            return train_job(self._trainers, self._sources[self._place[name] % len(self._sources)], job)
        except RegrowError as error:
            return TrainingFailed(job.number, str(error))


def _digits(seed: int) -> DataSource:
    """Ten noisy patterns of 8 x 8, the same ones for every device."""
    patterns = np.random.default_rng(0).random((10, 64), np.float32)
    rng = np.random.default_rng(1000 + seed)
    y = rng.integers(0, 10, ROWS)
    source = DataSource(ROWS)
    source.append((patterns[y] + 0.6 * rng.standard_normal((ROWS, 64))).astype(np.float32), y)
    return source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="mqtt://HOST:PORT of a broker that lets anybody in")
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--round", type=float, nargs=2, default=(10.0, 20.0), metavar="S", help="least and longest training")
    options = parser.parse_args()
    names = [topics.check_name(f"pi-{number:04d}", "device") for number in range(options.devices)]
    Swarm(options.url, names, tuple(options.round)).run(options.seconds)


if __name__ == "__main__":
    main()
