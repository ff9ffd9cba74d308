"""Who is here, who works and who may have work, kept as facts come: no event looks at the whole fleet.

Every quantity that the coordinator asks for is a count, a least value or a rank over what each device has at the moment. When something
about a device changes, `Roster.look` reads it from the ledger again and corrects each of them by the difference, in O(log devices); only a
refresh, which costs the size of the buffer anyway, looks at everybody. All of it follows from the ledger and from who was heard of.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from regrow import density, records, wire
from regrow.ledger import Ledger
from regrow.member import Device
from regrow.presence import QUIET_S
from regrow.scoreboard import Scoreboard

HEARTBEATS = 3
_ABOUT_ONE = (records.Joined, records.Limited, records.Assigned, records.Accepted, records.Rejected, records.Released)


class Tally:
    """How many devices have each value; a device has one value or none."""

    def __init__(self) -> None:
        self.counts: dict[float, int] = {}
        self._values: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._values)

    def put(self, who: str, value: float | None) -> None:
        old = self._values.get(who)
        if value == old:
            return
        if old is not None:
            self.counts[old] -= 1
            if not self.counts[old]:
                del self.counts[old]
            del self._values[who]
        if value is not None:
            self._values[who] = value
            self.counts[value] = self.counts.get(value, 0) + 1


class Least:
    """The least of the devices' values: a heap whose replaced entries are dropped when they come to its top, or outnumber the others."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, int, str]] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._count = 0

    def put(self, who: str, value: float | None) -> None:
        old = self._entries.get(who)
        if value is None:
            self._entries.pop(who, None)
        elif old is None or old[0] != value:
            self._count += 1
            self._entries[who] = entry = (value, self._count, who)
            heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def least(self) -> float | None:
        """The least value, or None while nobody has one."""
        while self._heap and self._entries.get(self._heap[0][2]) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, limit: float) -> list[str]:
        """Remove those whose value is at most `limit`; returns them in the order in which the values were put."""
        taken: list[tuple[int, str]] = []
        while (least := self.least()) is not None and least <= limit:
            _, count, who = heapq.heappop(self._heap)
            del self._entries[who]
            taken.append((count, who))
        return [who for _, who in sorted(taken)]


class Ranked:
    """The devices' values in ascending order. Moving 8 bytes per device on a change is microseconds even for 100 000 of them."""

    def __init__(self) -> None:
        self.ascending: list[float] = []
        self._values: dict[str, float] = {}

    def put(self, who: str, value: float | None) -> None:
        old = self._values.get(who)
        if value == old:
            return
        if old is not None:
            del self.ascending[bisect_left(self.ascending, old)]
            del self._values[who]
        if value is not None:
            insort(self.ascending, value)
            self._values[who] = value


class Roster:
    """The fleet as the coordinator asks for it.

    Args:
        ledger: the coordinator's; read here, never changed.

    Attributes:
        idle: live devices without a lease or an update that waits, and not excluded: they may have work.
        outstanding: live devices with a lease who never missed a deadline since they last delivered: they are waited for.
        overdue: who missed a deadline; not waited for again until they deliver.
        deadlines: of the leases, monotonic seconds.
        classes: first densities of the live devices that are not excluded.
        densities: of all devices; `eligible`: of those that are not excluded, live or not; `unready`: of the live ones among these with too
            few rounds on this order for a refresh.
        leases: versions that are leased.
        uplinks: of all devices, bit/s.
        transfers: density / uplink of all devices, and `live_transfers` of the live ones that are not excluded: what a transfer takes, but
            for a constant.
        rounds: mean normalised round times, seconds, where densities follow from them (PR-FL).
        scores: what devices reported of the levels.
        resting: who gets no new work by order, and is not waited for.
        limits: what devices last said of their owners' limits; one that leaves no level means rest as well.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._heard_s: OrderedDict[str, float] = OrderedDict()  # the longest silent first
        self._quiet_s: dict[str, float] = {}  # no longer live, but at rest, where heartbeats are rare
        self._arrived: list[str] = []
        self.idle: set[str] = set()
        self.outstanding: set[str] = set()
        self.overdue: set[str] = set()
        self.resting: frozenset[str] = frozenset()
        self.limits: dict[str, wire.Limit] = {}
        self.deadlines, self.uplinks, self.transfers, self.live_transfers, self.rounds = Least(), Least(), Least(), Least(), Least()
        self.classes, self.densities, self.eligible, self.unready, self.leases = Tally(), Tally(), Tally(), Tally(), Tally()
        self._live_links, self._live_speeds = Ranked(), Ranked()
        self.scores = Scoreboard(ledger)
        self._look_at(ledger.devices)
        self._arrived = list(ledger.arrived)
        for who in ledger.devices:
            self.scores.look(who)

    # ---- facts ---------------------------------------------------------------------------------------------------------------------

    def heed(self, entry: records.Entry, now: float) -> None:
        """A fact has gone into the ledger."""
        if isinstance(entry, _ABOUT_ONE):
            self.look(entry.device)
            if isinstance(entry, records.Assigned):
                self.deadlines.put(entry.device, now + entry.deadline_s)
            elif isinstance(entry, records.Accepted):
                self._arrived.append(entry.device)
            moved = isinstance(entry, records.Assigned) and self._ledger.task.method.density == "relative"
            if moved or isinstance(entry, (records.Joined, records.Limited, records.Accepted)):
                self.scores.look(entry.device)
        elif isinstance(entry, records.Aggregated):
            arrived, self._arrived = self._arrived, []
            self._look_at(arrived)
        elif isinstance(entry, records.Restored):
            self._look_at(entry.densities)
            for who in entry.densities:
                self.scores.look(who)
        elif isinstance(entry, records.Refreshed):
            self._look_at(self._ledger.devices)

    def hear(self, who: str, now: float) -> None:
        """A device has said something."""
        came = who not in self._heard_s
        self._heard_s[who] = now
        self._heard_s.move_to_end(who)
        self._quiet_s.pop(who, None)
        if came:
            self.look(who)

    def silence(self, who: str) -> None:
        """A will is only a hint: the device is silent until its next word."""
        self._quiet_s.pop(who, None)
        if self._heard_s.pop(who, None) is not None:
            self.look(who)

    def silence_all(self) -> None:
        self._quiet_s |= {who: heard_s for who, heard_s in self._heard_s.items() if self._is_to_rest(who)}
        silent, self._heard_s = self._heard_s, OrderedDict()
        self._look_at(silent)

    def rest(self, resting: frozenset[str]) -> None:
        """These get no new work from now on, and all others do."""
        before, self.resting = self.resting, resting
        self._look_at(sorted(before ^ resting))

    def limit(self, who: str, limit: wire.Limit | None) -> None:
        """A device has said what its owner allows, None: everything."""
        if limit != self.limits.get(who):
            if limit is None:
                del self.limits[who]
            else:
                self.limits[who] = limit
            self.look(who)

    def allowed(self, who: str) -> float:
        """The largest density whose share of the model the device's owner allows, 0.0 for none."""
        limit = self.limits.get(who)
        if limit is None:
            return 1.0
        order, most = self._ledger.order, (limit.density or 0.0) * (1 + 1e-6)
        within = [level for level, length in enumerate(order.lengths) if length <= most * order.size]
        return self._ledger.density_of(within[-1]) if within else 0.0

    def pass_time(self, now: float) -> None:
        """It is `now`: who was not heard of within three heartbeats is no longer live."""
        patience_s = HEARTBEATS * self._ledger.task.fleet.heartbeat_s
        while self._heard_s:
            who, heard_s = next(iter(self._heard_s.items()))
            if now - heard_s <= patience_s:
                break
            self.silence(who)
            if self._is_to_rest(who):
                self._quiet_s[who] = heard_s
        quiet_s = max(patience_s, HEARTBEATS * QUIET_S)
        while self._quiet_s and now - next(iter(self._quiet_s.values())) > quiet_s:  # the longest silent first
            del self._quiet_s[next(iter(self._quiet_s))]

    def miss_deadlines(self, now: float) -> list[str]:
        """Those whose deadline has passed, in the order in which it was set; their leases are for the caller to end."""
        late = self.deadlines.take(now)
        self.overdue.update(late)
        return late

    def deliver(self, who: str) -> None:
        """A valid update has come: the device is waited for again."""
        self.overdue.discard(who)
        self.look(who)

    def restart_deadlines(self, now: float) -> None:
        """Every lease has its whole time again, counted from `now`."""
        self.deadlines = Least()
        for who, device in self._ledger.devices.items():
            if device.lease is not None:
                self.deadlines.put(who, now + device.lease.deadline_s)

    def _look_at(self, devices: Iterable[str]) -> None:
        for who in devices:
            self.look(who)

    def look(self, who: str) -> None:
        """Take what the ledger says of one device now."""
        device = self._ledger.devices.get(who)
        if device is None:
            return
        live = who in self._heard_s
        eligible = not self.excluded(device)
        resting = who in self.resting or (who in self.limits and self.allowed(who) == 0.0)
        working = live and eligible and not resting
        method, lease = self._ledger.task.method, device.lease
        _member(self.idle, who, working and lease is None and who not in self._ledger.arrived)
        _member(self.outstanding, who, live and lease is not None and who not in self.overdue and not resting)
        if lease is None:
            self.deadlines.put(who, None)
        self.leases.put(who, None if lease is None else lease.version)
        self.classes.put(who, device.first_density if working else None)
        self.densities.put(who, device.density)
        self.eligible.put(who, device.density if eligible else None)
        self.unready.put(who, device.density if working and device.rounds_in_epoch < method.refresh_min_rounds else None)
        self.uplinks.put(who, device.uplink_bps)
        self.transfers.put(who, device.density / device.uplink_bps)
        self.live_transfers.put(who, device.density / device.uplink_bps if working else None)
        if method.full_density_bps is None:
            self._live_links.put(who, device.uplink_bps if working else None)
        if method.granularity == "unit":
            self._live_speeds.put(who, 1.0 / device.step_s if working and device.step_s else None)
        if method.density == "relative":
            self.rounds.put(who, density.mean_round_s(device.full_round_s))

    # ---- questions -----------------------------------------------------------------------------------------------------------------

    def live(self, who: str) -> bool:
        """Heard of within three heartbeats of the time that `pass_time` was last told."""
        return who in self._heard_s

    def rests(self, who: str) -> bool:
        """At rest by its owner's limit, and heard of within three of the rare heartbeats that it then sends."""
        return self._is_to_rest(who) and (who in self._heard_s or who in self._quiet_s)

    def _is_to_rest(self, who: str) -> bool:
        return who in self.limits and self.limits[who].density is None

    def excluded(self, device: Device) -> bool:
        """Too many bad updates in a row, data that it cannot train on, or a memory that holds no level: no work until it starts anew."""
        return device.declined or device.rejections >= self._ledger.task.fleet.max_rejections or device.memory_density == 0.0

    def fastest_class(self) -> int:
        """How many live devices are in the class with the highest first density: K of the `fastest` trigger."""
        return self.classes.counts[max(self.classes.counts)] if self.classes.counts else 0

    def mean_density(self) -> float:
        """Of all devices; there must be one."""
        return math.fsum(value * count for value, count in self.densities.counts.items()) / len(self.densities)

    def full_density_bps(self, joining_bps: Iterable[float]) -> float:
        """The link that deserves the whole model, among these and those of the live devices that are not excluded, bit/s."""
        return _full_density(density.full_density_goodput_bps, self._live_links.ascending, list(joining_bps))

    def full_density_speed(self, joining_per_s: Iterable[float]) -> float | None:
        """Steps of the full model per second at which a device deserves it, among the same devices; None without any."""
        ascending, joining = self._live_speeds.ascending, list(joining_per_s)
        return _full_density(density.full_density_speed, ascending, joining) if ascending or joining else None


def _full_density(rule: Callable[[Sequence[float]], float], ascending: list[float], joining: list[float]) -> float:
    for value in joining:
        insort(ascending, value)
    full = rule(ascending)
    for value in joining:
        del ascending[bisect_left(ascending, value)]
    return full


def _member(group: set[str], who: str, belongs: bool) -> None:
    if belongs:
        group.add(who)
    else:
        group.discard(who)
