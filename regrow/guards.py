"""Which sealed messages are taken: two pure state machines, one for devices and one for the gateway.

A seal says who spoke, where and when; whether that is fresh depends on what was heard before. A device hears its coordinator on retained
topics, again after every reconnect, so per topic a stamp may be repeated but never be older, and nothing may have expired. The gateway
hears a device on many topics in one order, so all stamps of one key must rise. What is refused is counted, and told rarely.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from regrow import topics
from regrow.fleet_time import FleetTime
from regrow.machine import Note, Received
from regrow.seal import Opened, SealError, Verify, open_seal

REFUSED = "seal refused"
TELL_S = 600.0
MAX_TOPICS, MAX_MANIFESTS = 256, 32
RESERVE_MS = 10_000
LEAPS = 4
SILENT_S = 300.0
ANSWER_S = 60.0
RECENT = 64
STRANGER = "a stranger"

Keys = Callable[[], Sequence[bytes]]


@dataclass(slots=True)
class _Refused:
    times: int = 0
    told: int = 0
    tell_s: float = float("-inf")
    reason: str = ""


class Refusals:
    """How often which peer was refused for what; the first is told at once, more of them every TELL_S.

    Attributes:
        repeated: messages that a broker delivered twice, as QoS 1 allows; nobody's fault.
    """

    def __init__(self) -> None:
        self.repeated = 0
        self._of: dict[tuple[str, str], _Refused] = {}

    def add(self, peer: str, error: SealError) -> None:
        """peer: one of a bounded number of names."""
        refused = self._of.setdefault((peer, error.kind), _Refused())
        refused.times += 1
        refused.reason = str(error)

    def times(self, kind: str) -> int:
        """Of all peers."""
        return sum(refused.times for (_, of), refused in self._of.items() if of == kind)

    def notes(self, now: float) -> list[Note]:
        """What is new and due to be told."""
        due = [(key, refused) for key, refused in self._of.items() if refused.times > refused.told and now >= refused.tell_s]
        for _, refused in due:
            refused.told, refused.tell_s = refused.times, now + TELL_S
        return [
            Note(REFUSED, {"peer": peer, "kind": kind, "times": refused.times, "reason": refused.reason}) for (peer, kind), refused in due
        ]


class FromCoordinator:
    """What is taken as the coordinator's word.

    Args:
        listener: the device that hears it; None: the gateway, which hears what coordinators say to each other.
        keys: gives the public keys that may speak now; two while the coordinator changes its key.
        verify: as in regrow.seal.
        time: the fleet's; raised here.
        heard: what `heard` gave in an earlier life.
    """

    def __init__(self, listener: str | None, keys: Keys, verify: Verify, time: FleetTime, heard: Mapping[str, int] | None = None) -> None:
        self.refusals = Refusals()
        self._listener, self._keys, self._verify, self._time = listener, keys, verify, time
        # Every version has a manifest of its own: these push out each other only. Assignments, which name versions, keep the order.
        self._manifests: OrderedDict[str, int] = OrderedDict()
        self._others: OrderedDict[str, int] = OrderedDict()
        for topic, stamp in (heard or {}).items():
            self._remember(topic, stamp)

    @property
    def heard(self) -> dict[str, int]:
        """Topic -> newest stamp, to be saved."""
        return {**self._manifests, **self._others}

    def open(self, event: Received, now: float) -> Received | None:
        """The bare message, or None when it must not be heard."""
        if not topics.is_sealed(event.topic):
            return event if self._listener is not None else None
        if not event.payload:
            return None  # cleared
        try:
            return Received(event.topic, self._checked(event, now).frame)
        except SealError as error:
            self.refusals.add("coordinator", error)
            return None

    def _checked(self, event: Received, now: float) -> Opened:
        topic = event.topic
        if topics.device_of(topic) != self._listener and topics.device_of(topic) is not None:
            raise SealError("another device's", f"{topic}: this is for another device")
        opened = open_seal(topic, event.payload, self._keys(), self._verify)
        self._time.raise_to(opened.stamp, now)
        newest = self._table(topic)[0].get(topic, 0)
        if opened.stamp < newest:
            raise SealError("older", f"{topic}: stamp {opened.stamp}, a newer one was heard: {newest}")
        if opened.expires_s and 1000 * opened.expires_s < self._time.at_ms(now):
            raise SealError("expired", f"{topic}: held until {opened.expires_s}, it is {self._time.at_ms(now) // 1000} (unix seconds)")
        self._remember(topic, opened.stamp)
        return opened

    def _remember(self, topic: str, stamp: int) -> None:
        table, most = self._table(topic)
        table[topic] = stamp
        table.move_to_end(topic)
        if len(table) > most:
            table.popitem(last=False)

    def _table(self, topic: str) -> tuple[OrderedDict[str, int], int]:
        """Where the stamps of such topics are, and how many are kept: those heard last."""
        is_manifest = topic.split("/")[4:5] == ["manifest"]
        return (self._manifests, MAX_MANIFESTS) if is_manifest else (self._others, MAX_TOPICS)


@dataclass(slots=True)
class _Speaker:
    """A device's key. last: of its stamps; heard_s: when; reserved: durably, no stamp from here on was accepted; saved_s: when, lately."""

    last: int = -1
    heard_s: float = float("-inf")
    reserved: int = 0
    saved_s: deque[float] = field(default_factory=lambda: deque(maxlen=LEAPS))
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))


class FromDevices:
    """What the gateway takes as a device's word.

    A stamp is accepted only below a number that was saved before, so that a gateway that was killed takes nothing twice: it goes on from
    that number. Devices' stamps run with their clocks, so one write covers RESERVE_MS of the whole fleet, and after a crash every device
    is past that number RESERVE_MS later.

    Args:
        keys_of: device -> the public keys that it may sign with now; none: it is not in the fleet.
        verify: as in regrow.seal.
        reserved: key (hexadecimal) -> below this everything is refused: of earlier lives.
        save: makes (reserved, last heard) by key durable; nothing is taken before it returns.
    """

    def __init__(
        self,
        keys_of: Callable[[str], Sequence[bytes]],
        verify: Verify,
        reserved: Mapping[str, int],
        save: Callable[[Mapping[str, int], Mapping[str, int]], None],
    ) -> None:
        self.refusals = Refusals()
        self._keys_of, self._verify, self._save = keys_of, verify, save
        self._behind: dict[str, int] = {}
        self._answer_s: dict[str, float] = {}
        self._speakers = {key: _Speaker(last=floor - 1, reserved=floor) for key, floor in reserved.items()}

    def open(self, event: Received, now: float) -> Received | None:
        """The bare message, or None when it must not be heard."""
        who = topics.device_of(event.topic)
        if who is None or not event.payload or not topics.is_sealed(event.topic):
            return None  # the last will is a hint that anybody with the broker's rights can give; heartbeats say the same
        keys = self._keys_of(who)
        try:
            if not keys:
                raise SealError("not in the fleet", f"{event.topic}: {who} is not in the fleet")
            opened = open_seal(event.topic, event.payload, keys, self._verify)
            return Received(event.topic, opened.frame) if self._is_new(who, opened, now) else None
        except SealError as error:
            self.refusals.add(who if keys else STRANGER, error)
            return None

    def behind(self, now: float) -> list[tuple[str, int]]:
        """(device, newest stamp heard of its key) of those that were refused as older, each at most every ANSWER_S.

        Its card may be an old copy, so that it counts where it was once: told the number it goes on above it, and what it had said before
        stays refused. One whose old messages somebody else repeats is past that number, and need not care.
        """
        due = {who: stamp for who, stamp in self._behind.items() if now >= self._answer_s.get(who, float("-inf"))}
        for who in due:
            del self._behind[who]
            self._answer_s[who] = now + ANSWER_S
        return list(due.items())

    def ended(self) -> tuple[dict[str, int], dict[str, int]]:
        """(reserved, last heard) for the next life, when nothing more will be taken: it goes on where every device is."""
        last = self._last()
        return {key: stamp + 1 for key, stamp in last.items()}, last

    def _is_new(self, who: str, opened: Opened, now: float) -> bool:
        key = opened.key.hex()
        speaker = self._speakers.setdefault(key, _Speaker())
        if opened.stamp <= speaker.last:
            if opened.stamp in speaker.recent:
                self.refusals.repeated += 1
                return False
            self._behind[who] = speaker.last
            why = f"a replay, or {who} runs from an old copy of its identity, or as two copies; it is told, and goes on above that stamp"
            raise SealError("older", f"stamp {opened.stamp}, {speaker.last} was heard: {why}")
        if opened.stamp >= speaker.reserved:
            self._reserve(key, opened.stamp, now)
        speaker.last, speaker.heard_s = opened.stamp, now
        speaker.recent.append(opened.stamp)
        return True

    def _reserve(self, key: str, stamp: int, now: float) -> None:
        speaker = self._speakers[key]
        patience_s = 2 * RESERVE_MS / 1000
        if len(speaker.saved_s) == LEAPS and now - speaker.saved_s[0] < patience_s:  # a write for each message would wear out the disk
            raise SealError("ahead", f"stamp {stamp}: it has leapt {LEAPS} times within {patience_s:.0f} s, more than restarts explain")
        speaker.saved_s.append(now)
        reserved = {key: _ahead(each, now) for key, each in self._speakers.items()}
        reserved[key] = stamp + RESERVE_MS
        self._save(reserved, self._last())
        for key, floor in reserved.items():
            self._speakers[key].reserved = floor

    def _last(self) -> dict[str, int]:
        return {key: speaker.last for key, speaker in self._speakers.items()}


def _ahead(speaker: _Speaker, now: float) -> int:
    """What a device's stamps reach while this reservation lasts; that of one which was silent for long stays."""
    if now - speaker.heard_s > SILENT_S:
        return speaker.reserved
    return max(speaker.reserved, speaker.last + int(1000 * (now - speaker.heard_s)) + RESERVE_MS)
