"""The fleet as it is now, for those who look at it.

Strategy: the thread that steps the machines writes, in `note` and `look`, and takes only what has changed, so that a fleet costs what it
says and not what it is; everybody else reads copies of references under one short lock. A row is replaced and never changed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from broker_server.gateway import Gateway
from broker_server.metering import Joules
from broker_server.page.past import MOST_CHARACTERS, Spent, contributions
from broker_server.view import in_words
from regrow.levels import densities_of
from regrow.machine import Note
from regrow.member import Device
from regrow.wire import Telemetry

EVENTS = 200
LOOK_S = 0.9
Row = dict[str, Any]


class Board:
    """What the page of one gateway shows; `note` and `look` belong to the gateway's thread, the rest to anybody.

    Args:
        gateway: it need not run yet.
        spent, updates, by_level: what the run's store says of devices and levels from before this process.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        spent: Mapping[str, Spent] | None = None,
        updates: Mapping[str, tuple[int, float]] | None = None,
        by_level: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        self._gateway = gateway
        self._spent, self._by_level = dict(spent or {}), dict(by_level or {})
        self._updated_s = {who: at_s for who, (_, at_s) in (updates or {}).items()}
        self._heard_s: dict[str, float] = {}
        self._joules = Joules(gateway.coordinator.ledger.task.fleet.heartbeat_s)
        self._declined: dict[str, str] = {}
        self._said: dict[str, Row] = {}
        self._dirty: set[str] = set(gateway.coordinator.ledger.devices)
        self._live: frozenset[str] = frozenset()
        self._resting: frozenset[str] = frozenset()
        self._at_limit: frozenset[str] = frozenset()
        self._due_s = float("-inf")
        self._lock = threading.Lock()
        self._rows: dict[str, Row] = {}
        self._run: Row = {}
        self._events: deque[Row] = deque(maxlen=EVENTS)
        self._event_count = 0
        self._changed: dict[str, Row] = {}
        self._run_changed: Row = {}
        self._new_events: list[Row] = []

    # ---- the gateway's thread --------------------------------------------------------------------------------------------------------

    def note(self, note: Note) -> None:
        """Something has happened."""
        who, fields = note.fields.get("device"), note.fields
        if isinstance(who, str):
            self._dirty.add(who)
            self._take(who, note.kind, fields)
        said = in_words(note)
        if said:
            with self._lock:
                self._event_count += 1
                event = {"id": self._event_count, "at_s": time.time(), "kind": note.kind, "device": who, "text": said[:MOST_CHARACTERS]}
                self._events.append(event)
                self._new_events = [*self._new_events, event][-EVENTS:]

    def _take(self, who: str, kind: str, fields: Mapping[str, Any]) -> None:
        if kind in ("telemetry", "update", "joined", "declined"):
            self._heard_s[who] = time.time()
        if kind == "telemetry":
            self._spent[who] = self._spent.get(who, Spent()).after(fields["bytes_up"], fields["bytes_down"])
            self._joules.hear(who, self._gateway.coordinator.telemetry[who], time.monotonic())
        elif kind == "update":
            self._updated_s[who] = time.time()
            updates, examples = self._by_level.get(fields["level"], (0, 0))
            self._by_level[fields["level"]] = updates + 1, examples + fields["examples"]
            self._said[who] = {"version": fields["version"], "staleness": fields["staleness"]}
        elif kind == "declined":
            self._declined[who] = in_words(Note(kind, dict(fields)))
        elif kind in ("joined", "assigned"):
            self._declined.pop(who, None)

    def look(self) -> None:
        """Take what the ledger says now; called about twice a second."""
        if time.monotonic() < self._due_s:
            return
        self._due_s = time.monotonic() + LOOK_S
        coordinator = self._gateway.coordinator
        at_limit = frozenset(who for who in coordinator.roster.limits if coordinator.roster.rests(who))
        live = frozenset(who for who in coordinator.ledger.devices if coordinator.roster.live(who)) - at_limit
        resting = coordinator.roster.resting
        dirty = self._dirty | (live ^ self._live) | (resting ^ self._resting) | (at_limit ^ self._at_limit)
        self._dirty, self._live, self._resting, self._at_limit = set(), live, resting, at_limit
        known = coordinator.ledger.devices
        rows = {
            who: self._row(who, known[who]) if who in known else self._of_declined(who)
            for who in dirty & (known.keys() | self._declined.keys())
        }
        run = self._of_run()
        with self._lock:
            for who, row in rows.items():
                changed = _difference(self._rows.get(who, {}), row)
                if changed:
                    self._rows[who] = row
                    self._changed[who] = {**self._changed.get(who, {}), **changed}
            self._run_changed.update(_difference(self._run, run))
            self._run = run

    def _row(self, who: str, device: Device) -> Row:
        coordinator, telemetry = self._gateway.coordinator, self._gateway.coordinator.telemetry.get(who)
        spent = self._spent.get(who, Spent())
        standing = "paused" if who in coordinator.paused else "draining" if who in coordinator.roster.resting else ""
        row = {
            "online": who in self._live,
            "resting": coordinator.roster.limits[who].said if who in self._at_limit else "",
            "standing": standing,
            "excluded": coordinator.roster.excluded(device),
            "declined": self._declined.get(who, ""),
            "density": device.density,
            "first_density": device.first_density,
            "memory_density": device.memory_density,
            "bound_by": device.bound_by,
            "uplink_bps": device.uplink_bps,
            "updates": device.updates,
            "updated_s": self._updated_s.get(who),
            "heard_s": self._heard_s.get(who),
            "sent_bytes": spent.sent_bytes,
            "received_bytes": spent.received_bytes,
            "joules": self._joules.by_device.get(who),
            "trains": None if device.lease is None else coordinator.ledger.density_of(device.lease.level),
            **self._said.get(who, {}),
        }
        return row if telemetry is None else row | _of_telemetry(telemetry)

    def _of_declined(self, who: str) -> Row:
        """One that never joined: it is there, gets no work, and says why."""
        nothing: Row = dict.fromkeys(("density", "first_density", "memory_density", "updated_s", "joules", "trains"))
        here = {"online": True, "heard_s": self._heard_s.get(who), "declined": self._declined[who], "updates": 0, "bound_by": "memory"}
        return {**nothing, **here, "standing": "", "excluded": True, "sent_bytes": 0, "received_bytes": 0}

    def _of_run(self) -> Row:
        gateway, coordinator = self._gateway, self._gateway.coordinator
        ledger, roster = coordinator.ledger, coordinator.roster
        counts = {f"{density:g}": count for density, count in sorted(roster.densities.counts.items())}
        joules = self._joules.by_device.values()
        return {
            "run": coordinator.names.run,
            "task": coordinator.names.task,
            "method": ledger.task.method.name,
            "phase": coordinator.phase.value,
            "connected": gateway.connected,
            "paused": gateway.paused,
            "finished": ledger.finished,
            "version": ledger.version,
            "elapsed_s": round(coordinator.elapsed_s(), 1),
            "planned_s": ledger.task.stop.seconds,
            "known": len(ledger.devices),
            "online": len(self._live),
            "resting": len(self._at_limit & ledger.devices.keys()),
            "score": ledger.global_score,
            "mean_density": roster.mean_density() if ledger.devices else None,
            "densities": counts,
            "contributions": contributions(densities_of(ledger.task), self._by_level, ledger.level_scores),
            "sent_bytes": sum(spent.sent_bytes for spent in self._spent.values()),
            "received_bytes": sum(spent.received_bytes for spent in self._spent.values()),
            "joules": sum(joules) if joules else None,
            "metered": len(joules),
            "store_lag_s": round(gateway.store_lag_s, 1),
            "scores": {f"{float(level):g}": score for level, score in ledger.level_scores.items()},
        }

    # ---- any thread ------------------------------------------------------------------------------------------------------------------

    def whole(self) -> Row:
        """Everything, for somebody who begins to look."""
        with self._lock:
            return {"now_s": time.time(), "run": self._run, "devices": dict(self._rows), "events": list(self._events)}

    def device(self, who: str) -> Row | None:
        """A device's row, None where it is not of this run."""
        with self._lock:
            return self._rows.get(who)

    def changes(self) -> Row | None:
        """What is new since this was last asked, None where nothing is; for the one thread that tells all listeners.

        Values are absolute, so to hear of them twice does no harm. A value that is gone is None.
        """
        with self._lock:
            devices, self._changed = self._changed, {}
            run, self._run_changed = self._run_changed, {}
            events, self._new_events = self._new_events, []
        if not devices and not run and not events:
            return None
        return {"now_s": time.time(), "run": run, "devices": devices, "events": events}


def _of_telemetry(telemetry: Telemetry) -> Row:
    link, power, limit = telemetry.link, telemetry.power, telemetry.limit
    row: Row = {"phase": telemetry.phase, "failed": telemetry.failed, "step_s": telemetry.step_s, "memory_bytes": telemetry.memory_bytes}
    if telemetry.uplink_bps is not None:
        row["uplink_bps"] = telemetry.uplink_bps
    if link is not None:
        row |= {"low_bps": link.low_bps, "high_bps": link.high_bps, "rtt_s": link.rtt_s}
    if power is not None:
        row |= {"watts": power.watts, "meter": power.meter, "temperature_c": power.temperature_c, "throttled": power.throttled}
    if limit is not None:
        row["limit"] = limit.said
    return row


def _difference(old: Row, new: Row) -> Row:
    changed = {name: value for name, value in new.items() if name not in old or old[name] != value}
    return changed | {name: None for name in old if name not in new}
