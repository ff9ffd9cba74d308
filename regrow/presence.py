"""What a coordinator must hear of a device, and when: who it is (hello), and how it is (telemetry, the heartbeat)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from regrow import topics, wire
from regrow.machine import DataChanged, Note, Publish
from regrow.programs import StorageRule

HELLO_FIRST_S = 1.0
HELLO_AGAIN_S = 10.0
FIRST_COMPLAINT_S = 30.0  # one that never had work says so this soon for the first time
COMPLAINT_S = 300.0  # a device that could not do its last work and got no other, or has none at all, says so this often
TRY_AGAIN = "repair the data or the settings and start the agent again; only data that a source appends meanwhile are tried without"
QUIET_S = 900.0  # a device that may not use its link speaks this often
LEADER_SILENT_S = 60.0  # a leader beats every two seconds; after this long it may be gone, and another may not know of us


@dataclass(frozen=True, slots=True)
class Identity:
    """What a device says of itself. install: new with every installation; boot: new with every start (16 bytes each).

    memory_bytes: that a training job may take; storage: of activations, meanwhile.
    """

    name: str
    install: bytes
    boot: bytes
    examples: int = 0
    validation_examples: int = 0
    software: str = ""
    memory_bytes: int | None = None
    storage: StorageRule = "float32"


@dataclass(slots=True)
class Meters:
    """What the runtime last measured, for telemetry and hello; the machine itself decides nothing by these.

    step_s: of whatever was trained last; full_step_s: of the full model. link, power: None while nobody measures it.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    step_s: float | None = None
    full_step_s: float | None = None
    link: wire.LinkState | None = None
    power: wire.PowerState | None = None


@dataclass(slots=True)
class Presence:
    """When the next hello and the next heartbeat are due (monotonic seconds, infinite: none is), and what they say.

    `trouble` is why the last assignment could not be done, nothing once one could. `quiet`: its link is not to be used.
    `fresh`: it never had work, and has not said so.
    """

    identity: Identity
    meters: Meters = field(default_factory=Meters)
    heartbeat_s: float = HELLO_AGAIN_S
    hello_s: float = float("inf")
    beat_s: float = float("inf")
    trouble: str = ""
    quiet: bool = False
    fresh: bool = True
    _complaint_s: float = 0.0
    _hello_wait_s: float = HELLO_FIRST_S

    def connect(self, now: float) -> None:
        self._hello_wait_s = HELLO_FIRST_S
        self._wait_anew(now)
        self.beaten(now)

    def rested(self) -> None:
        """It may work again: hellos come soon again, for the coordinator may learn of it later than the device."""
        self._hello_wait_s = HELLO_FIRST_S

    def disconnect(self) -> None:
        self.beat_s = self.hello_s = float("inf")

    def beaten(self, now: float) -> None:
        self.beat_s = now + self._at_least(self.heartbeat_s)

    def _at_least(self, wait_s: float) -> float:
        return max(wait_s, QUIET_S) if self.quiet else wait_s

    def hello_in(self, wait_s: float, now: float) -> None:
        """Say hello again after so many seconds, unless the link is not to be used."""
        self.hello_s = now + self._at_least(wait_s)

    def hear_heartbeat(self, heartbeat_s: float, now: float) -> None:
        """The coordinator says how often it wants to hear something."""
        self.heartbeat_s = heartbeat_s
        self.beat_s = min(self.beat_s, now + self._at_least(heartbeat_s))

    def at_work(self, now: float) -> None:
        """The device works for a coordinator that is heard of: no need for another hello unless that one falls silent."""
        self.hello_s = now + LEADER_SILENT_S
        self._wait_anew(now)

    def _wait_anew(self, now: float) -> None:
        if not self.trouble:
            self._complaint_s = now + (FIRST_COMPLAINT_S if self.fresh else COMPLAINT_S)

    def start_anew(self, data: DataChanged) -> Identity:
        """Who the device is from now on."""
        self.identity = replace(self.identity, boot=data.boot, examples=data.examples, validation_examples=data.validation_examples)
        return self.identity

    def in_trouble(self, reason: str, now: float, *, once: bool) -> None:
        """An assignment could not be done and another will not help: what is wrong is here. once: no complaints follow."""
        self.trouble, self._complaint_s = reason, float("inf") if once else now + COMPLAINT_S

    def complaints(self, now: float) -> list[Note]:
        """What a device that waits for work says now and then: of its trouble, or else of what may keep it waiting."""
        if now < self._complaint_s:
            return []
        self._complaint_s, first, self.fresh = now + COMPLAINT_S, self.fresh, False
        if not self.trouble:
            why = (
                "too few devices are there, this one was declined for its memory, or it was started more than five times in five minutes: "
                "the gateway's log says which"
            )
            return [Note("no work yet" if first else "still no work", {"memory_bytes": self.identity.memory_bytes, "reason": why})]
        return [Note("without work", {"reason": self.trouble, "cure": TRY_AGAIN})]

    def hello_soon(self, now: float) -> None:
        """There is another task, or none any more."""
        self._wait_anew(now)
        self.hello_s = min(self.hello_s, now + self._at_least(HELLO_AGAIN_S))

    def hello(self, uplink_bps: float | None, now: float, *, again: bool) -> Publish:
        """again: repeat it, later and later, until there is something to do."""
        me = self.identity
        message = wire.Hello(
            boot=me.boot,
            install=me.install,
            uplink_bps=uplink_bps,
            examples=me.examples,
            validation_examples=me.validation_examples,
            step_s=self.meters.full_step_s,
            software=me.software,
            memory_bytes=me.memory_bytes,
            storage=me.storage,
        )
        self.hello_in(self._hello_wait_s if again else LEADER_SILENT_S, now)
        self._hello_wait_s = min(2 * self._hello_wait_s, HELLO_AGAIN_S)
        return Publish(topics.hello(me.name), wire.encode(message))

    def telemetry(
        self,
        names: topics.Run,
        now: float,
        phase: str,
        assignment: wire.Assignment | None,
        uplink_bps: float | None,
        failed: str,
        pending: wire.Pending | None,
        limit: wire.Limit | None,
    ) -> Publish:
        """failed: why the assignment is given up, or nothing; pending: the update whose receipt is asked for.

        Without an assignment it names the trouble.
        """
        message = wire.Telemetry(
            install=self.identity.install,
            phase=phase,
            assignment=assignment.number if assignment is not None else 0,
            uplink_bps=uplink_bps,
            bytes_up=self.meters.bytes_up,
            bytes_down=self.meters.bytes_down,
            disk_bytes=self.meters.disk_bytes,
            memory_bytes=self.meters.memory_bytes,
            step_s=self.meters.step_s,
            failed=(failed if assignment is not None else self.trouble)[:900],
            pending=pending,
            link=self.meters.link,
            power=self.meters.power,
            limit=limit,
        )
        self.beaten(now)
        return Publish(names.telemetry(self.identity.name), wire.encode(message))
