"""A device that speaks the protocol with good credentials and sends what no device should."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from regrow import topics, values, wire

BEAT_S = 0.4
Forge = Callable[[int, int], bytes]


def not_a_number(size: int, always_kept: int) -> bytes:
    """An update whose always-kept values, which travel as float32, are NaN."""
    return np.full(always_kept, np.nan, "<f4").tobytes().ljust(size, b"\0")


def far_too_large(size: int, always_kept: int) -> bytes:
    """A change whose norm is far above 100 times any honest one."""
    return np.full(always_kept, 1e4, "<f4").tobytes().ljust(size, b"\0")


class Impostor:
    """One such device, on a thread of its own until `close`; `receipts` holds what it was told."""

    def __init__(self, device: str, password: str, port: int, forge: Forge, uplink_bps: float) -> None:
        self.receipts: list[wire.Receipt] = []
        self._device, self._forge, self._uplink_bps = device, forge, uplink_bps
        self._install, self._boot = device.encode().ljust(16, b"i")[:16], device.encode().ljust(16, b"b")[:16]
        self._names: topics.Run | None = None
        self._assignment: wire.Assignment | None = None
        self._sequence = -1
        self._heard: queue.SimpleQueue[tuple[str, bytes] | None] = queue.SimpleQueue()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=device)
        self._client.username_pw_set(device, password)
        self._client.on_message = lambda _client, _data, message: self._heard.put((message.topic, bytes(message.payload)))
        self._client.on_connect = self._greet
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _greet(self, *_: object) -> None:
        self._client.subscribe(topics.tasks(self._device), 1)

    def close(self) -> None:
        self._heard.put(None)
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()

    def _live(self) -> None:
        while True:
            try:
                heard = self._heard.get(timeout=BEAT_S)
            except queue.Empty:
                self._beat()
                continue
            if heard is None:
                return
            self._take(*heard)

    def _beat(self) -> None:
        if self._names is None:
            hello = wire.Hello(boot=self._boot, install=self._install, uplink_bps=self._uplink_bps, examples=100, validation_examples=0)
            self._client.publish(topics.hello(self._device), wire.encode(hello), 1)
        else:
            telemetry = wire.Telemetry(install=self._install, phase="waiting", uplink_bps=self._uplink_bps)
            self._client.publish(self._names.telemetry(self._device), wire.encode(telemetry), 1)

    def _take(self, topic: str, payload: bytes) -> None:
        if not payload:
            return
        if topic == topics.tasks(self._device):
            tasks = wire.decode(payload, wire.Tasks)[0].tasks
            self._names = topics.Run(tasks[0].task, tasks[0].run) if tasks else None
            if self._names is not None:
                self._client.subscribe([(self._names.assignment(self._device), 1), (self._names.receipt(self._device), 1)])
        elif self._names is None:
            return
        elif topic == self._names.assignment(self._device):
            self._assignment = wire.decode(payload, wire.Assignment)[0]
            self._client.subscribe(self._names.manifest(self._assignment.version), 1)
        elif topic == self._names.receipt(self._device):
            self.receipts.append(wire.decode(payload, wire.Receipt)[0])
        elif self._assignment is not None and topic == self._names.manifest(self._assignment.version):
            self._send(self._names, self._assignment, wire.decode(payload, wire.Manifest)[0])

    def _send(self, names: topics.Run, assignment: wire.Assignment, manifest: wire.Manifest) -> None:
        size = values.encoded_size(assignment.dtype, manifest.lengths[assignment.level], manifest.always_kept)
        payload = self._forge(size, manifest.always_kept)
        self._client.unsubscribe(names.manifest(assignment.version))
        self._assignment = None
        self._sequence += 1
        head = wire.UpdateHead(
            assignment=assignment.number,
            version=assignment.version,
            epoch=assignment.epoch,
            level=assignment.level,
            dtype=assignment.dtype,
            examples=100,
            size=size,
            digest=wire.digest(payload),
        )
        chunk = wire.UpdateChunk(install=self._install, count=1, chunk_bytes=assignment.chunk_bytes, head=head)
        self._client.publish(names.update(self._device, self._sequence, 0), wire.encode(chunk, payload), 1)
