"""Which sealed messages are taken: fresh ones of whoever may speak, once; and what is said of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from regrow import guards, seal, topics
from regrow.fleet_time import FleetTime
from regrow.guards import ANSWER_S, LEAPS, MAX_MANIFESTS, MAX_TOPICS, RESERVE_MS, TELL_S, FromCoordinator, FromDevices, Refusals
from regrow.machine import Received
from regrow.seal import SealError
from tests.regrow.test_seal import sign_by, verify

OURS, NEXT, THEIRS = bytes(32), bytes([1]) * 32, bytes([2]) * 32
RUN = topics.Run("toy", "r1")
NOW_MS = 1_800_000_000_000
TASKS, CLAIM, ASSIGNMENT = topics.tasks("d1"), topics.claim("toy"), RUN.assignment("d1")
TELEMETRY = RUN.telemetry("d1")


def said(topic: str, stamp: int, *, key: bytes = OURS, lasts_s: int | None = 600, frame: bytes = b"frame") -> Received:
    expires_s = 0 if lasts_s is None else stamp // 1000 + lasts_s
    return Received(topic, seal.seal(topic, frame, stamp=stamp, expires_s=expires_s, key=key, sign=sign_by(key)))


# ---- on the device -----------------------------------------------------------------------------------------------------------------


def device(heard: Mapping[str, int] | None = None, *, at_ms: int = NOW_MS, keys: tuple[bytes, ...] = (OURS,)) -> FromCoordinator:
    return FromCoordinator("d1", lambda: keys, verify, FleetTime(at_ms, 0.0), heard)


def why(guard: FromCoordinator | FromDevices) -> dict[str, int]:
    return {note.fields["kind"]: note.fields["times"] for note in guard.refusals.notes(1e9)}


def test_a_device_hears_its_coordinator_bare() -> None:
    guard = device()
    for topic in (TASKS, CLAIM, ASSIGNMENT, RUN.manifest(3), topics.promotion("toy")):
        assert guard.open(said(topic, NOW_MS), 0.0) == Received(topic, b"frame")
    assert not why(guard)


def test_retained_messages_are_heard_again_but_no_older_ones() -> None:
    guard = device()
    new, old = said(ASSIGNMENT, NOW_MS + 5), said(ASSIGNMENT, NOW_MS + 4)
    assert guard.open(old, 0.0)
    assert guard.open(new, 0.0)
    assert guard.open(new, 0.0), "the broker delivers it again after every reconnect"
    assert guard.open(old, 0.0) is None
    assert guard.open(said(TASKS, NOW_MS), 0.0), "each topic has an order of its own"
    assert why(guard) == {"older": 1}


def test_no_older_one_after_a_restart_either() -> None:
    first = device()
    assert first.open(said(ASSIGNMENT, NOW_MS + 5), 0.0)
    assert first.open(said(RUN.manifest(3), NOW_MS + 5), 0.0)
    again = device(first.heard)
    assert again.open(said(ASSIGNMENT, NOW_MS + 4), 0.0) is None
    assert again.open(said(RUN.manifest(3), NOW_MS + 4), 0.0) is None
    assert again.open(said(ASSIGNMENT, NOW_MS + 5), 0.0)


@pytest.mark.parametrize("topic", [topics.tasks("d2"), RUN.assignment("d2"), RUN.receipt("d2")])
def test_what_is_for_another_device_is_not_heard(topic: str) -> None:
    guard = device()
    assert guard.open(said(topic, NOW_MS), 0.0) is None
    assert why(guard) == {"another device's": 1}


def test_what_has_expired_is_not_heard_whatever_the_devices_own_clock_says() -> None:
    guard = device()
    message = said(TASKS, NOW_MS, lasts_s=600)
    assert guard.open(message, 600.0)
    assert guard.open(message, 602.0) is None
    assert why(guard) == {"expired": 1}
    assert guard.open(said(ASSIGNMENT, NOW_MS, lasts_s=None), 1e9), "without an expiry it holds for ever"


def test_a_newer_word_ends_an_older_ones_time() -> None:
    """The device was off for a day and does not know; the first live message says so."""
    guard = device()
    assert guard.open(said(CLAIM, NOW_MS + 86_400_000), 0.0)
    assert guard.open(said(TASKS, NOW_MS, lasts_s=600), 0.0) is None
    assert why(guard) == {"expired": 1}


def test_a_refused_old_word_does_not_set_time_back() -> None:
    guard = device()
    assert guard.open(said(CLAIM, NOW_MS - 86_400_000), 0.0) is None
    assert guard._time.at_ms(0.0) == NOW_MS


def test_a_forged_stamp_does_not_move_the_time() -> None:
    guard = device()
    assert guard.open(said(CLAIM, NOW_MS + 10**12, key=THEIRS), 0.0) is None
    assert guard._time.at_ms(0.0) == NOW_MS
    assert why(guard) == {"unknown key": 1}


def test_two_keys_speak_while_the_coordinator_changes_its_own() -> None:
    keys = [OURS]
    guard = FromCoordinator("d1", lambda: keys, verify, FleetTime(NOW_MS, 0.0))
    assert guard.open(said(TASKS, NOW_MS + 1), 0.0)
    assert guard.open(said(TASKS, NOW_MS + 2, key=NEXT), 0.0) is None
    keys.append(NEXT)
    assert guard.open(said(TASKS, NOW_MS + 2, key=NEXT), 0.0)
    assert guard.open(said(TASKS, NOW_MS + 3), 0.0)
    keys.remove(OURS)
    assert guard.open(said(TASKS, NOW_MS + 4), 0.0) is None
    assert guard.open(said(TASKS, NOW_MS + 3, key=NEXT), 0.0), "the last one that was heard, by another key"


def test_bytes_with_a_digest_elsewhere_and_clearings_are_no_messages() -> None:
    guard = device()
    chunk = Received(RUN.chunk(3, 0), b"values")
    assert guard.open(chunk, 0.0) == chunk
    assert guard.open(Received(TASKS, b""), 0.0) is None
    assert not why(guard)


def test_what_is_remembered_is_bounded_and_manifests_push_out_manifests_only() -> None:
    guard = device()
    assert guard.open(said(ASSIGNMENT, NOW_MS + 5), 0.0)
    for version in range(2 * MAX_TOPICS):
        assert guard.open(said(RUN.manifest(version), NOW_MS), 0.0)
    assert guard.open(said(ASSIGNMENT, NOW_MS + 4), 0.0) is None
    assert len(guard.heard) == MAX_MANIFESTS + 1
    for number in range(MAX_TOPICS):
        assert guard.open(said(topics.claim(f"t{number}"), NOW_MS), 0.0)
    assert len(guard.heard) == MAX_MANIFESTS + MAX_TOPICS


def test_the_gateway_hears_other_coordinators_claims_only_sealed() -> None:
    guard = FromCoordinator(None, lambda: [OURS], verify, FleetTime(NOW_MS, 0.0))
    assert guard.open(said(CLAIM, NOW_MS), 0.0)
    assert guard.open(Received(CLAIM, b"RG\x01\x04bare"), 0.0) is None
    assert guard.open(said(CLAIM, NOW_MS - 1), 0.0) is None
    assert guard.open(Received(RUN.chunk(1, 0), b"values"), 0.0) is None
    assert why(guard) == {"unsealed": 1, "older": 1}


# ---- the clock ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year_ms", [0, NOW_MS, 4_070_908_800_000], ids=["1970", "now", "2099"])
def test_whatever_a_device_believes_at_first_the_coordinators_word_is_heard_and_sets_it_right(year_ms: int) -> None:
    """2099 can come from the coordinator only: one that was wrong once and goes on from there, see broker_server.fleet.stamps."""
    guard = device(at_ms=year_ms)
    live = max(NOW_MS, year_ms)
    assert guard.open(said(TASKS, live), 0.0)
    assert guard._time.at_ms(0.0) == live
    assert guard.open(said(ASSIGNMENT, live - 700_000, lasts_s=600), 0.0) is None


def test_time_runs_with_the_monotonic_clock_and_never_back() -> None:
    time = FleetTime(1000, 50.0)
    assert time.at_ms(52.5) == 3500
    assert time.at_ms(40.0) == 1000
    time.raise_to(2000, 52.5)
    assert time.at_ms(52.5) == 3500
    time.raise_to(9000, 52.5)
    assert time.at_ms(53.5) == 10_000


# ---- on the gateway ----------------------------------------------------------------------------------------------------------------


@dataclass
class Disk:
    """What was saved, as a gateway's next life finds it."""

    reserved: dict[str, int] = field(default_factory=dict)
    writes: int = 0

    def save(self, reserved: Mapping[str, int], _: Mapping[str, int]) -> None:
        self.reserved = dict(reserved)
        self.writes += 1


FLEET = {"d1": (OURS,), "d2": (THEIRS,)}


def gateway(disk: Disk | None = None) -> FromDevices:
    disk = disk or Disk()
    return FromDevices(lambda who: FLEET.get(who, ()), verify, disk.reserved, disk.save)


def told(stamp: int, topic: str = TELEMETRY, *, key: bytes = OURS) -> Received:
    return said(topic, stamp, key=key, lasts_s=None)


def test_the_gateway_hears_each_device_bare_and_once() -> None:
    guard = gateway()
    assert guard.open(told(1 << 32), 0.0) == Received(TELEMETRY, b"frame")
    assert guard.open(told(1 << 32 | 1, topics.hello("d1")), 0.0)
    assert guard.open(told(1 << 32, topics.hello("d2"), key=THEIRS), 0.0), "each key has an order of its own"
    assert guard.open(told(1 << 32), 0.0) is None
    assert guard.refusals.repeated == 1, "a broker may deliver twice"
    assert not why(guard)


def test_older_stamps_are_replays() -> None:
    guard = gateway()
    assert guard.open(told(1 << 32 | 7), 0.0)
    assert guard.open(told(1 << 32 | 6), 0.0) is None
    assert guard.open(told(7), 0.0) is None, "an earlier start of the same device"
    assert why(guard) == {"older": 2}


def test_who_was_refused_as_older_is_told_what_was_heard_once_a_minute_and_nothing_old_counts_for_it() -> None:
    guard = gateway()
    assert guard.open(told(2 << 32 | 7), 0.0)
    old = told(1 << 32)
    assert guard.open(old, 1.0) is None
    assert guard.behind(1.0) == [("d1", 2 << 32 | 7)]
    assert guard.open(old, 2.0) is None
    assert not guard.behind(2.0)
    assert guard.behind(1.0 + ANSWER_S) == [("d1", 2 << 32 | 7)]
    assert not guard.behind(1e9)
    assert guard.open(told(3 << 32), 70.0), "it goes on above"
    assert guard.open(old, 71.0) is None


def test_strangers_and_repetitions_are_told_nothing() -> None:
    guard = gateway()
    assert guard.open(told(9), 0.0)
    for message in (told(9), told(5, key=NEXT), told(5, topics.hello("d9"))):
        assert guard.open(message, 1.0) is None
    assert not guard.behind(1.0)


@pytest.mark.parametrize(
    ("topic", "key", "kind"),
    [
        (TELEMETRY, THEIRS, "unknown key"),
        (RUN.update("d2", 0, 0), OURS, "unknown key"),
        (topics.hello("d9"), OURS, "not in the fleet"),
        (topics.hello("d1"), NEXT, "unknown key"),
    ],
)
def test_one_device_cannot_speak_as_another(topic: str, key: bytes, kind: str) -> None:
    guard = gateway()
    assert guard.open(told(5, topic, key=key), 0.0) is None
    assert why(guard) == {kind: 1}


def test_wills_clearings_and_bare_messages_are_not_heard() -> None:
    guard = gateway()
    for message in (Received(topics.status("d1"), b"RG\x01\x02will"), Received(TELEMETRY, b""), Received(RUN.probe("d1"), b"noise")):
        assert guard.open(message, 0.0) is None
    assert not why(guard)
    assert guard.open(Received(TELEMETRY, b"RG\x01\x09bare"), 0.0) is None
    assert why(guard) == {"unsealed": 1}


def test_strangers_are_counted_as_one_so_that_names_cannot_fill_the_memory() -> None:
    guard = gateway()
    for number in range(1000):
        assert guard.open(told(5, topics.hello(f"x{number}")), 0.0) is None
    (note,) = guard.refusals.notes(0.0)
    assert (note.fields["peer"], note.fields["times"]) == ("a stranger", 1000)


@pytest.mark.parametrize("at_s", [0.0, 3.0, 12.5, 700.0])
def test_a_gateway_that_was_killed_takes_nothing_twice(at_s: float) -> None:
    """Whenever that was: all that it took lies below what it had saved."""
    disk = Disk()
    first = gateway(disk)
    taken = []
    for step in range(int(10 * at_s) + 1):
        taken.append(told(1 << 32 | 100 * step))
        assert first.open(taken[-1], step / 10)
    again = gateway(disk)
    assert [again.open(message, 0.0) for message in taken[-50:]] == [None] * len(taken[-50:])
    assert again.open(told(1 << 32 | int(1000 * at_s) + RESERVE_MS), 0.0), "the device is past the reservation that much later"


def test_one_write_covers_the_whole_fleet_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {f"d{number}": bytes([number]) * 32 for number in range(1, 21)}
    monkeypatch.setattr(guards, "open_seal", lambda topic, data, _keys, _verify: seal.Opened(keys[topics.device_of(topic) or ""], *data))
    disk = Disk()
    guard = FromDevices(lambda who: (keys[who],), verify, {}, disk.save)
    for second in range(600):
        for number in range(1, 21):  # each beats every ten seconds, at a time of its own
            if (second + number) % 10 == 0:
                now = second + number / 40
                opened: object = (number << 32 | int(1000 * now), 0, b"")
                assert guard.open(Received(topics.hello(f"d{number}"), opened), now)  # type: ignore[arg-type]
    assert disk.writes <= 20 + 600 / (RESERVE_MS / 1000) * 2


def test_after_a_clean_end_it_goes_on_where_the_device_is() -> None:
    disk = Disk()
    first = gateway(disk)
    assert first.open(told(1 << 32 | 5), 0.0)
    disk.save(*first.ended())
    again = gateway(disk)
    assert again.open(told(1 << 32 | 5), 0.0) is None
    assert again.open(told(1 << 32 | 6), 0.0)


def test_stamps_that_run_ahead_do_not_wear_out_the_disk() -> None:
    disk = Disk()
    guard = gateway(disk)
    for start in range(1, 100):
        guard.open(told(start << 32), start / 100)
    assert disk.writes == LEAPS, "so many restarts within a moment are nothing"
    assert why(guard) == {"ahead": 99 - LEAPS}
    assert guard.open(told(1000 << 32), 1 + 2 * RESERVE_MS / 1000), "it was locked out for a while only"


def test_nothing_is_taken_that_could_not_be_saved() -> None:
    class FullError(Exception):
        pass

    def full(_: Mapping[str, int], __: Mapping[str, int]) -> None:
        raise FullError

    guard = FromDevices(lambda who: FLEET.get(who, ()), verify, {}, full)
    with pytest.raises(FullError):
        guard.open(told(5), 0.0)
    assert guard._speakers[OURS.hex()].last < 5


# ---- what is told ------------------------------------------------------------------------------------------------------------------


def test_refusals_are_told_at_once_and_then_rarely_with_their_number() -> None:
    refusals = Refusals()
    refusals.add("d1", SealError("older", "first"))
    (note,) = refusals.notes(0.0)
    assert note.fields == {"peer": "d1", "kind": "older", "times": 1, "reason": "first"}
    for _ in range(500):
        refusals.add("d1", SealError("older", "again"))
    assert not refusals.notes(TELL_S - 1)
    (note,) = refusals.notes(TELL_S)
    assert (note.fields["times"], note.fields["reason"]) == (501, "again")
    assert not refusals.notes(10 * TELL_S), "nothing new"
    assert refusals.times("older") == 501
