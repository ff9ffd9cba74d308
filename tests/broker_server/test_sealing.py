"""The gateway's seals over its lives: stamps that only rise whatever its clock does, and messages that never run out while it lives."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from broker_server.fleet.sealing import LONG_S, RENEW_S, SHORT_S, Keys, Sealing
from broker_server.fleet.stamps import CLOCK, CLOCK_MS, FOLDER, LEAP_MS, Stamps, write_clock
from regrow import topics, wire
from regrow.errors import LocalError
from regrow.guards import RESERVE_MS
from regrow.machine import Connected, Disconnected, Note, Publish, Received
from regrow.seal import Opened, open_seal
from tests.regrow.test_guards import FLEET, NOW_MS, OURS, told
from tests.regrow.test_seal import sign_by, verify

RUN = topics.Run("toy", "r1")
COORDINATOR = bytes([9]) * 32
ASSIGNMENT, TASKS, CLAIM = RUN.assignment("d1"), topics.tasks("d1"), topics.claim("toy")
HOUR_MS = 3_600_000


class Wall:
    """The gateway's clock, which anybody may set."""

    def __init__(self, at_ms: int = NOW_MS) -> None:
        self.at_ms = at_ms

    def __call__(self) -> float:
        return self.at_ms / 1000


def life(folder: Path, wall: Wall | None = None, *, role: str = "serve", now: float = 0.0) -> Sealing:
    keys = Keys(lambda: (COORDINATOR, sign_by(COORDINATOR)), lambda who: FLEET.get(who, ()), verify)
    return Sealing(keys, folder, role, now, wall=wall or Wall())


def killed(sealing: Sealing) -> None:
    """The process is gone, and with it its lock; nothing more is saved."""
    sealing.abandon()


def opened(sealing: Sealing, now: float, topic: str = ASSIGNMENT, *, retain: bool = True, frame: bytes = b"frame") -> Opened:
    sealed = sealing.seal(Publish(topic, frame, retain=retain, token=7), now)
    assert (sealed.topic, sealed.retain, sealed.token) == (topic, retain, 7)
    return open_seal(topic, sealed.payload, [COORDINATOR], verify)


# ---- what leaves ---------------------------------------------------------------------------------------------------------------------


def test_stamps_are_the_time_and_never_the_same(tmp_path: Path) -> None:
    wall = Wall()
    sealing = life(tmp_path, wall)
    assert [opened(sealing, 0.0).stamp for _ in range(3)] == [NOW_MS, NOW_MS + 1, NOW_MS + 2]
    wall.at_ms += 5000
    assert opened(sealing, 5.0).stamp == NOW_MS + 5000


def test_lifetimes(tmp_path: Path) -> None:
    sealing = life(tmp_path)
    lives = {
        (CLAIM, True): SHORT_S,
        (RUN.receipt("d1"), False): SHORT_S,
        (ASSIGNMENT, True): LONG_S,
        (TASKS, True): LONG_S,
        (RUN.manifest(3), True): LONG_S,
        (topics.promotion("toy"), True): LONG_S,
    }
    for (topic, retain), life_s in lives.items():
        found = opened(sealing, 0.0, topic, retain=retain)
        assert found.expires_s == found.stamp // 1000 + life_s


def test_parts_and_clearings_stay_bare(tmp_path: Path) -> None:
    sealing = life(tmp_path)
    for effect in (Publish(RUN.chunk(1, 0), b"values", retain=True), Publish(ASSIGNMENT, b"", retain=True)):
        assert sealing.seal(effect, 0.0) == effect


def test_what_is_live_is_published_again_before_it_expires_and_what_was_cleared_is_not(tmp_path: Path) -> None:
    sealing = life(tmp_path)
    first = opened(sealing, 0.0, ASSIGNMENT, frame=b"one")
    opened(sealing, 10.0, TASKS)
    opened(sealing, 10.0, CLAIM)
    opened(sealing, 10.0, RUN.receipt("d1"), retain=False)
    opened(sealing, 20.0, RUN.manifest(1))
    sealing.seal(Publish(RUN.manifest(1), b"", retain=True), 30.0)
    assert not sealing.tend(RENEW_S - 1)
    due = sealing.tend(RENEW_S + 5)
    assert due == [Publish(ASSIGNMENT, b"one", retain=True)]
    assert opened(sealing, RENEW_S + 5, ASSIGNMENT).expires_s > first.expires_s > RENEW_S
    assert [effect.topic for effect in sealing.tend(RENEW_S + 60) if isinstance(effect, Publish)] == [TASKS]


def test_after_a_lost_connection_the_machines_say_everything_anew_and_nothing_twice(tmp_path: Path) -> None:
    sealing = life(tmp_path)
    opened(sealing, 0.0)
    assert sealing.open(Disconnected("gone"), 1.0)
    assert sealing.open(Connected(), 2.0)
    assert not sealing.tend(RENEW_S + 5)


# ---- the clock -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_ms", [0, NOW_MS - 5 * HOUR_MS, 4_070_908_800_000], ids=["1970", "back", "2099"])
def test_a_clock_that_jumps_does_not_move_the_fleets_time(tmp_path: Path, to_ms: int, caplog: pytest.LogCaptureFixture) -> None:
    wall = Wall()
    sealing = life(tmp_path, wall)
    before = opened(sealing, 0.0)
    wall.at_ms = to_ms
    after = opened(sealing, 3600.0)
    assert after.stamp == before.stamp + HOUR_MS
    assert ("set the clock" in caplog.text) == (to_ms > NOW_MS + LEAP_MS)


def test_a_clock_that_was_late_by_days_and_is_set_right_is_followed(tmp_path: Path) -> None:
    wall = Wall()
    sealing = life(tmp_path, wall)
    opened(sealing, 0.0)
    wall.at_ms += 72 * HOUR_MS
    assert opened(sealing, 1.0).stamp == NOW_MS + 72 * HOUR_MS


@pytest.mark.parametrize("starts_ms", [0, NOW_MS - 5 * HOUR_MS, 4_070_908_800_000], ids=["1970", "back", "2099"])
@pytest.mark.parametrize("clean", [True, False])
def test_a_restart_with_a_wrong_clock_goes_on_above_what_was_sealed(
    tmp_path: Path, starts_ms: int, clean: bool, caplog: pytest.LogCaptureFixture
) -> None:
    wall = Wall()
    first = life(tmp_path, wall)
    stamps = []
    for second in range(0, 200, 7):
        wall.at_ms = NOW_MS + 1000 * second
        stamps.append(opened(first, second).stamp)
    if clean:
        first.close(200.0)
    else:
        killed(first)
    with caplog.at_level(logging.WARNING):
        again = life(tmp_path, Wall(starts_ms))
    assert stamps[-1] < opened(again, 0.0).stamp < stamps[-1] + 4 * CLOCK_MS
    assert "set the clock" in caplog.text


def test_restarts_with_a_right_clock_do_not_run_ahead_of_it(tmp_path: Path) -> None:
    wall = Wall()
    for _ in range(300):
        sealing = life(tmp_path, wall)
        assert opened(sealing, 0.0).stamp == wall.at_ms
        killed(sealing)
        wall.at_ms += 2000


def test_processes_of_one_fleet_agree_on_the_time(tmp_path: Path) -> None:
    one, two = life(tmp_path, Wall(0), role="one"), life(tmp_path, Wall(0), role="two")
    two.time.raise_to(NOW_MS, 0.0)
    opened(two, 0.0)
    assert opened(one, 0.0).stamp >= NOW_MS


def test_a_lost_clock_file_begins_with_the_gateways_clock(tmp_path: Path) -> None:
    write_clock_in = tmp_path / FOLDER
    write_clock_in.mkdir()
    (write_clock_in / CLOCK).write_text("soon")
    assert opened(life(tmp_path), 0.0).stamp == NOW_MS


# ---- what comes ----------------------------------------------------------------------------------------------------------------------


def test_a_killed_gateway_takes_nothing_twice_and_waits_until_devices_are_past_it(tmp_path: Path) -> None:
    first = life(tmp_path)
    assert first.quiet_s == 0.0
    message = told(1 << 32 | 5)
    assert first.open(message, 0.0)
    killed(first)
    again = life(tmp_path)
    assert 0 < again.quiet_s <= RESERVE_MS / 1000
    assert again.open(message, 0.0) is None
    assert again.open(told(1 << 32 | 5 + RESERVE_MS), 0.0)
    killed(again)
    os.utime(tmp_path / FOLDER / "serve.json", (0, 0))
    assert life(tmp_path).quiet_s == 0.0


def test_a_device_that_counts_where_it_was_once_is_told_what_was_heard(tmp_path: Path) -> None:
    sealing = life(tmp_path)
    assert sealing.open(told(3 << 32 | 5), 0.0)
    assert sealing.open(told(2 << 32), 1.0) is None
    (publish, note) = sealing.tend(1.0)
    assert publish == Publish(topics.older("d1"), wire.encode(wire.Older(stamp=3 << 32 | 5)))
    assert isinstance(note, Note)
    assert (note.fields["peer"], note.fields["kind"]) == ("d1", "older")
    assert "old copy of its identity" in note.fields["reason"]
    sealed = opened(sealing, 1.0, publish.topic, retain=False)
    assert sealed.expires_s == sealed.stamp // 1000 + SHORT_S


def test_killed_twice_before_anything_was_heard_it_still_waits(tmp_path: Path) -> None:
    first = life(tmp_path)
    assert first.open(told(1 << 32 | 5), 0.0)
    killed(first)
    killed(life(tmp_path))
    assert life(tmp_path).quiet_s > 0


def test_after_a_clean_end_it_hears_at_once(tmp_path: Path) -> None:
    first = life(tmp_path)
    assert first.open(told(1 << 32 | 5), 0.0)
    first.close(0.0)
    again = life(tmp_path)
    assert again.quiet_s == 0.0
    assert again.open(told(1 << 32 | 5), 0.0) is None
    assert again.open(told(1 << 32 | 6), 0.0)


@pytest.mark.parametrize("ending", ["lives", "closed", "killed"])
def test_what_another_process_has_heard_is_old_here_too(tmp_path: Path, ending: str) -> None:
    hello = topics.hello("d1")
    first = life(tmp_path, role="one")
    assert first.open(told(1 << 32 | 5, hello), 0.0)
    assert first.open(told(1 << 32 | 20_000, hello), 20.0)
    if ending == "closed":
        first.close(20.0)
    elif ending == "killed":
        killed(first)
    other = life(tmp_path, role="two")
    assert (other.quiet_s > 0) == (ending == "killed")
    assert other.open(told(1 << 32 | 5, hello), 0.0) is None
    assert other.open(told(1 << 32 | 20_001 + (RESERVE_MS if ending == "killed" else 0), hello), 0.0)


def test_files_of_processes_that_have_ended_are_taken_over(tmp_path: Path) -> None:
    for number in range(20):
        sealing = life(tmp_path, role=f"serve-{number}")
        assert sealing.open(told((number + 1) << 32), 10.0 * number)
        sealing.close(10.0 * number)
    assert [path.name for path in (tmp_path / FOLDER).glob("*.json")] == ["serve-19.json"]
    assert life(tmp_path, role="other").open(told(20 << 32), 0.0) is None


def test_a_role_is_one_process_at_a_time(tmp_path: Path) -> None:
    first = life(tmp_path)
    with pytest.raises(LocalError, match="another process"):
        life(tmp_path)
    first.close(0.0)
    life(tmp_path).close(0.0)


def test_what_devices_say_and_what_coordinators_say_is_held_against_their_own_keys(tmp_path: Path) -> None:
    sealing = life(tmp_path)
    assert sealing.open(sealing_claim(sealing), 0.0)
    assert sealing.open(told(5, CLAIM, key=OURS), 0.0) is None, "a device cannot claim a task"
    forged = sealing.seal(Publish(topics.hello("d1"), b"frame"), 0.0)
    assert sealing.open(Received(forged.topic, bytes(forged.payload)), 0.0) is None
    kinds = {(note.fields["peer"], note.fields["kind"]) for note in sealing.tend(0.0)}
    assert kinds == {("coordinator", "unknown key"), ("d1", "unknown key")}


def sealing_claim(sealing: Sealing) -> Received:
    sealed = sealing.seal(Publish(CLAIM, b"claim", retain=True), 0.0)
    return Received(CLAIM, bytes(sealed.payload))


def test_a_disk_that_fails_ends_it_before_anything_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    sealing = life(tmp_path)
    monkeypatch.setattr("broker_server.fleet.stamps.write_private", full)
    with pytest.raises(LocalError, match="No space left"):
        sealing.open(told(5), 0.0)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"reserved": {"aa": "x"}, "heard": {}}', b"\xff"])
def test_files_that_do_not_check_out_are_named_with_the_cure(tmp_path: Path, content: bytes) -> None:
    write_clock_in = tmp_path / FOLDER
    write_clock_in.mkdir()
    write_clock(tmp_path, NOW_MS)
    (write_clock_in / "serve.json").write_bytes(content)
    with pytest.raises(LocalError, match=r"serve\.json does not check out.*backup"):
        Stamps(tmp_path, "serve")
