"""What Prometheus reads of a gateway: counters and gauges at http://HOST:PORT/metrics, on a thread of their own.

Strategy: the thread that steps the machines writes, in `note` and `look`; a scrape only reads numbers that are there, so it never waits
for the coordinator, nor the coordinator for it. Counters begin at 0 with the process, gauges say what the store says. Labels are bounded:
classes and levels are the task's, and only the first `DEVICE_SERIES` devices have series of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, start_http_server

from broker_server.gateway import Gateway
from broker_server.metering import Joules
from regrow.errors import LocalError
from regrow.machine import Note

DEVICE_SERIES = 100
CLASS_SERIES = 32
OTHER = "other"
STALENESS = (0, 1, 2, 3, 5, 8, 13, 21, 34)


class Metrics:
    """The numbers of one gateway; its methods belong to the thread that runs the gateway.

    Args:
        gateway: whose numbers; it need not run yet.
        broker_restarts: how often this process has started its broker again.
    """

    def __init__(self, gateway: Gateway, broker_restarts: Callable[[], int] = lambda: 0) -> None:
        self._gateway, self._broker_restarts = gateway, broker_restarts
        self._told = 0, 0  # bytes written and restarts, as far as they were counted
        self._classes: set[str] = set()
        self._devices: set[str] = set()
        self._known: set[Gauge] = set()  # of those that have no value at first
        self._joules = Joules(gateway.coordinator.ledger.task.fleet.heartbeat_s)
        self._bytes: dict[str, tuple[int, int]] = {}  # what each device had sent and received when it last said so
        registry = self.registry = CollectorRegistry()
        gauge, counter = self._gauge, self._counter
        names, method = gateway.coordinator.names, gateway.coordinator.ledger.task.method.name
        run = Info("regrow_run", "The run that is served", registry=registry)
        run.info({"run": names.run, "task": names.task, "method": method})
        self._devices_known = gauge("devices", "Devices that ever joined the run")
        self._online = gauge("devices_online", "Devices heard of within three heartbeats and not excluded, by first density", "class")
        self._hidden = gauge("devices_without_series", f"Devices beyond the first {DEVICE_SERIES}, which have no series of their own")
        self._limited = gauge("devices_limited", "Devices that their owners' limits hold back, by what they do: rest, or smaller", "does")
        self._declined = counter("devices_declined", "Devices that were declined for their memory, each time")
        self._updates = counter("updates", "Whole updates that came, by what became of them", "result")
        self._refused = counter("messages_refused", "Messages that were not what their topic promises")
        self._aggregations = counter("aggregations", "Versions made by this process")
        self._version = gauge("version", "Version of the global model")
        self._score = self._later("score", "Newest score of the global model: accuracy for classes")
        self._level_score = gauge("level_score", "Newest score of the prefix of each level", "level")
        self._density = self._later("mean_density", "Mean density of all devices, 0 to 1")
        self._staleness = Histogram(
            "regrow_update_staleness_versions",
            "Versions made since the one that an update started from",
            buckets=STALENESS,
            registry=registry,
        )
        self._lag = gauge("store_lag_seconds", "Age of the oldest record that is not on the disk yet")
        self._written = counter("store_written_bytes", "Bytes that this process gave to the store")
        self._connected = gauge("broker_connected", "1 while the coordinator is connected to its broker")
        self._restarts = counter("broker_restarts", "How often this process has started its broker again")
        for result in ("accepted", "rejected"):
            self._updates.labels(result)
        self._add_devices()
        ProcessCollector(registry=registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"regrow_{name}", text, labels, registry=self.registry)

    def _later(self, name: str, text: str) -> Gauge:
        """A gauge that nobody sees before `_tell` has a value for it: 0 would be one."""
        return Gauge(f"regrow_{name}", text, registry=None)

    def _tell(self, gauge: Gauge, value: float) -> None:
        gauge.set(value)
        if gauge not in self._known:
            self._known.add(gauge)
            self.registry.register(gauge)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"regrow_{name}", text, labels, registry=self.registry)

    def _add_devices(self) -> None:
        self._sent = self._counter("device_sent_bytes", "Bytes that devices sent, as they meter it, by first density", "class")
        self._received = self._counter("device_received_bytes", "Bytes that devices received, as they meter it, by first density", "class")
        self._energy = self._counter(
            "device_energy_joules", "Energy that devices took, as far as heartbeats tell, by first density", "class"
        )
        self._device_power = self._gauge(
            "device_power_watts", "Mean power of a device since its last heartbeat, as it measures it", "device"
        )
        self._device_warmth = self._gauge("device_temperature_celsius", "Temperature of a device", "device")
        self._device_rtt = self._gauge("device_round_trip_seconds", "Round trip of a device's connection", "device")
        self._device_density = self._gauge("device_density", "Density of a device", "device")
        self._device_uplink = self._gauge("device_uplink_bytes_per_second", "Uplink of a device, as it measures it", "device")
        self._device_heard = self._gauge("device_heard_timestamp_seconds", "When a device last said something, unix time", "device")
        self._device_updates = self._counter("device_updates", "Accepted updates of a device", "device")

    def look(self) -> None:
        """Take what the ledger says now; about twice a second."""
        ledger, roster, store = self._gateway.coordinator.ledger, self._gateway.coordinator.roster, self._gateway.store
        self._devices_known.set(len(ledger.devices))
        self._hidden.set(max(0, len(ledger.devices) - DEVICE_SERIES))
        online: dict[str, int] = dict.fromkeys(self._classes, 0)
        for value, count in roster.classes.counts.items():
            name = self._class_named(value)
            online[name] = online.get(name, 0) + count
        for name, count in online.items():
            self._online.labels(name).set(count)
        resting = sum(limit.density is None for limit in roster.limits.values())
        self._limited.labels("rest").set(resting)
        self._limited.labels("smaller").set(len(roster.limits) - resting)
        self._version.set(ledger.version)
        if ledger.global_score is not None:
            self._tell(self._score, ledger.global_score)
        for level, score in ledger.level_scores.items():
            self._level_score.labels(f"{float(level):g}").set(score)
        if ledger.devices:
            self._tell(self._density, roster.mean_density())
        self._lag.set(self._gateway.store_lag_s)
        written, restarts = store.bytes_written, self._broker_restarts()
        self._written.inc(written - self._told[0])
        self._restarts.inc(restarts - self._told[1])
        self._told = written, restarts
        self._connected.set(self._gateway.connected)

    def note(self, note: Note) -> None:
        """Count what has happened."""
        fields = note.fields
        match note.kind:
            case "update":
                self._updates.labels("accepted").inc()
                self._staleness.observe(fields["staleness"])
            case "rejected":
                self._updates.labels("rejected").inc()
            case "refused":
                self._refused.inc()
            case "aggregated":
                self._aggregations.inc()
            case "declined":
                self._declined.inc()
            case "telemetry":
                self._meter(fields)
        who = fields.get("device")
        if isinstance(who, str) and self._has_series(who):
            self._note_device(who, note.kind, fields)

    def _note_device(self, who: str, kind: str, fields: dict[str, Any]) -> None:
        if kind in ("telemetry", "update", "joined"):
            self._device_heard.labels(who).set(time.time())
        if kind == "update":
            self._device_updates.labels(who).inc()
        if fields.get("density") is not None:
            self._device_density.labels(who).set(fields["density"])
        if fields.get("uplink_bps"):
            self._device_uplink.labels(who).set(fields["uplink_bps"] / 8)
        if kind == "telemetry":
            self._note_instruments(who)

    def _note_instruments(self, who: str) -> None:
        """What a device does not measure has no value: an old one would be wrong, and 0 too."""
        telemetry = self._gateway.coordinator.telemetry[who]
        link, power = telemetry.link, telemetry.power
        found = (
            (self._device_power, None if power is None else power.watts),
            (self._device_warmth, None if power is None else power.temperature_c),
            (self._device_rtt, None if link is None else link.rtt_s),
        )
        for gauge, value in found:
            if value is not None:
                gauge.labels(who).set(value)
            else:
                with suppress(KeyError):  # it never had one
                    gauge.remove(who)

    def _meter(self, fields: dict[str, Any]) -> None:
        """What came on top of a device's last word; less than that means that the device began to count anew."""
        who, up, down = fields["device"], fields["bytes_up"], fields["bytes_down"]
        old_up, old_down = self._bytes.get(who, (up, down))  # what was metered before this process began is not its own
        self._bytes[who] = (up, down)
        known = self._gateway.coordinator.ledger.devices.get(who)
        name = OTHER if known is None else self._class_named(known.first_density)
        joules = self._joules.hear(who, self._gateway.coordinator.telemetry[who], time.monotonic())
        if joules is not None:
            self._energy.labels(name).inc(joules)
        self._sent.labels(name).inc(up - old_up if up >= old_up else up)
        self._received.labels(name).inc(down - old_down if down >= old_down else down)

    def _class_named(self, density: float) -> str:
        name = f"{density:g}"
        if name not in self._classes:
            if len(self._classes) >= CLASS_SERIES:
                return OTHER
            self._classes.add(name)
        return name

    def _has_series(self, who: str) -> bool:
        if who not in self._devices and len(self._devices) < DEVICE_SERIES:
            self._devices.add(who)
        return who in self._devices


@contextmanager
def measured(
    gateway: Gateway,
    note: Callable[[Note], None],
    keep: Callable[[], str | None],
    *,
    host: str,
    port: int,
    broker_restarts: Callable[[], int],
) -> Iterator[tuple[Callable[[Note], None], Callable[[], str | None]]]:
    """(on_note, housekeeping) for `gateway.run`, which do what `note` and `keep` do and serve the metrics of it.

    Raises:
        LocalError: as `serving`.
    """
    metrics = Metrics(gateway, broker_restarts)

    def count_and_note(what: Note) -> None:
        metrics.note(what)
        note(what)

    def look_and_keep() -> str | None:
        metrics.look()
        return keep()

    metrics.look()
    with serving(metrics, host, port) as found:
        print(f"metrics on http://{f'[{host}]' if ':' in host else host}:{found}/metrics", flush=True)
        yield count_and_note, look_and_keep


@contextmanager
def serving(metrics: Metrics, host: str, port: int) -> Iterator[int]:
    """Answer at http://host:port/metrics for as long as the block takes; the port is yielded, for 0 a free one.

    Raises:
        LocalError: it cannot listen there.
    """
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except (OSError, OverflowError) as error:
        cure = "choose another --metrics-port (0 picks a free one) or --metrics-host"
        raise LocalError(f"cannot serve metrics on {host}:{port}: {getattr(error, 'strerror', None) or error}; {cure}") from error
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
