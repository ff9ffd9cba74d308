"""The device's observer, stepped by hand: when it sends, what it forgets, and how it keeps still in a field run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from edge_agent.observer import FOLDER, GATHER_S, RECEIPT_MOST_S, RECEIPT_S, Observer
from edge_agent.state import StateFolder
from regrow import topics, wire
from regrow.errors import LocalError
from regrow.machine import Connected, Disconnected, Effect, Event, Publish, Received, Subscribe, Told
from regrow.observations import Field, FieldReport, Mark, Observations, ObservationsReceipt, PowerSeen, Row, decode_rows

WALL_S = 1_700_000_000.0
M = TypeVar("M", bound=msgspec.Struct)


@dataclass
class Device:
    """An observer whose clocks and link the test owns."""

    folder: StateFolder
    nonce: bytes = b"n" * 16
    now: float = 1000.0
    wall_s: float = WALL_S
    quiet: bool = True
    uplink_bps: float | None = None
    effects: list[Effect] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.observer = Observer(
            "d1", self.folder, self.nonce, lambda: self.wall_s, quiet=lambda: self.quiet, uplink_bps=lambda: self.uplink_bps, software="7"
        )

    def step(self, event: Event | None = None, after_s: float = 0.0) -> list[Effect]:
        self.now, self.wall_s = self.now + after_s, self.wall_s + after_s
        effects = self.observer.step(event, self.now)
        self.effects += effects
        return effects

    def receipt(self, said: Observations, number: int | None = None) -> list[Effect]:
        answer = ObservationsReceipt(journal=said.journal, number=said.number if number is None else number)
        return self.step(Received(topics.observations_receipt("d1"), wire.encode(answer)))

    def hear(self, said: Field) -> list[Effect]:
        return self.step(Received(topics.field_run("d1"), wire.encode(said)))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StateFolder]:
    with StateFolder(tmp_path / "state") as folder:
        yield folder


@pytest.fixture
def device(folder: StateFolder) -> Device:
    return Device(folder)


def batches(effects: Sequence[Effect]) -> list[tuple[Observations, list[Row]]]:
    found = []
    for effect in effects:
        if isinstance(effect, Publish) and effect.topic == topics.observations("d1"):
            assert not effect.retain
            said, payload = wire.decode(bytes(effect.payload), Observations)
            found.append((said, decode_rows(payload)))
    return found


def reports(effects: Sequence[Effect]) -> list[FieldReport]:
    field_report = topics.field_report("d1")
    return [wire.decode(bytes(e.payload), FieldReport)[0] for e in effects if isinstance(e, Publish) and e.topic == field_report]


def told(effects: Sequence[Effect]) -> list[str]:
    return [effect.action for effect in effects if isinstance(effect, Told)]


def power(watts: float) -> PowerSeen:
    return PowerSeen(WALL_S, 1.0, watts, "ina3221", "measured")


# ---- sending -----------------------------------------------------------------------------------------------------------------------


def test_rows_leave_together_once_each_until_the_receipt(device: Device) -> None:
    effects = device.step(Connected())
    assert {topic for effect in effects if isinstance(effect, Subscribe) for topic in effect.topics} == {
        topics.observations_receipt("d1"),
        topics.field_run("d1"),
    }
    device.observer.add(power(1.0))
    assert batches(device.step(after_s=1.0)) == []
    ((said, rows),) = batches(device.step(after_s=GATHER_S))
    assert rows == [Mark(WALL_S, "start"), Mark(WALL_S, "connected"), power(1.0)]
    assert (said.journal, said.number, said.sent_s) == (b"n" * 16, 1, device.wall_s)

    device.observer.add(power(2.0))
    assert batches(device.step(after_s=RECEIPT_S - 1)) == []
    assert [again for _, again in batches(device.step(after_s=1.0))] == [rows], "one at a time: the same until it is receipted"
    assert batches(device.step(after_s=2 * RECEIPT_S - 1)) == []
    assert len(batches(device.step(after_s=1.0))) == 1

    ((said, rows),) = batches(device.receipt(said))
    assert (said.number, rows) == (2, [power(2.0)])
    assert batches(device.receipt(said)) == []
    assert batches(device.step(after_s=RECEIPT_MOST_S)) == []
    assert list((device.folder.path / FOLDER).iterdir()) == []


def test_the_link_is_trainings_first(device: Device) -> None:
    device.step(Connected())
    device.quiet = False
    for _ in range(100):
        device.observer.add(power(1.0))
        assert batches(device.step(after_s=1.0)) == []
    device.quiet = True
    assert len(batches(device.step())) == 1


def test_what_was_seen_without_a_link_comes_afterwards_in_order(device: Device) -> None:
    device.step(Connected())
    device.step(Disconnected("connection lost"))
    device.step(Disconnected("cannot connect"))
    for watts in range(2000):
        device.observer.add(power(float(watts)))
        assert batches(device.step(after_s=1.0)) == []
    waiting = batches(device.step(Connected()))
    came: list[Row] = []
    while waiting:
        ((said, rows),) = waiting
        came += rows
        waiting = batches(device.receipt(said)) or batches(device.step(after_s=1.0)) or batches(device.step(after_s=GATHER_S))
    assert [row.watts for row in came if isinstance(row, PowerSeen)] == list(range(2000))
    assert [row.text for row in came if isinstance(row, Mark)] == ["start", "connected", "cut: connection lost", "connected"]


def test_a_gateway_that_does_not_answer_is_asked_more_and_more_rarely(device: Device) -> None:
    device.step(Connected())
    sent = 0
    for _ in range(24 * 60):
        device.observer.add(power(1.0))
        sent += len(batches(device.step(after_s=60.0)))
    assert 140 <= sent <= 150
    device.step(Disconnected())
    assert batches(device.step(Connected())) == [], "not at every reconnect either"


def test_a_gateway_that_takes_nothing_now_is_asked_later(device: Device) -> None:
    device.step(Connected())
    ((said, _),) = batches([*device.step(after_s=1.0), *device.step(after_s=GATHER_S)])
    device.receipt(said, 0)
    assert batches(device.step(after_s=RECEIPT_MOST_S - 1)) == []
    ((again, _),) = batches(device.step(after_s=1.0))
    assert again.number == said.number
    assert (device.folder.path / FOLDER / "0000000001.rows").exists()


def test_receipts_that_are_not_for_us_are_nothing(device: Device) -> None:
    device.step(Connected())
    ((said, _),) = batches([*device.step(after_s=1.0), *device.step(after_s=GATHER_S)])
    device.receipt(msgspec.structs.replace(said, journal=b"?" * 16))
    device.step(Received(topics.observations_receipt("d1"), b"nonsense"))
    device.step(Received(topics.observations_receipt("d1"), b""))
    assert len(batches(device.step(after_s=RECEIPT_S))) == 1


def test_batches_are_small_where_the_link_is_slow(device: Device) -> None:
    device.uplink_bps = 30_000.0
    device.step(Connected())
    for watts in range(2000):
        device.observer.add(power(float(watts)))
    ((_, rows),) = batches(device.step(after_s=1.0))
    assert 50 < len(rows) < 200


def test_a_row_that_no_receiver_takes_does_not_hold_up_the_others(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    device.step(Connected())
    with caplog.at_level(logging.ERROR):
        for watts in (float("nan"), -1.0, float("inf"), "many"):
            device.observer.add(PowerSeen(WALL_S, 1.0, watts, "ina3221", "measured"))  # type: ignore[arg-type]
        device.observer.add(object())  # type: ignore[arg-type]
    assert len(caplog.records) == 2, "once a kind"
    device.step(after_s=1.0)
    ((_, rows),) = batches(device.step(after_s=GATHER_S))
    assert all(isinstance(row, Mark) for row in rows)


def test_a_later_life_sends_what_an_earlier_one_left_and_tells_of_damage(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    device.step()
    device.observer.add(power(1.0))
    device.observer.close()
    device.observer.add(power(9.0))
    assert device.step() == []
    (file,) = (device.folder.path / FOLDER).iterdir()
    file.write_bytes(file.read_bytes() + b"torn")
    again = Device(device.folder, b"m" * 16)
    ((said, rows),) = batches(again.step(Connected()))
    assert (said.journal, rows) == (b"n" * 16, [Mark(WALL_S, "start"), power(1.0)])
    with caplog.at_level(logging.WARNING):
        again.step(after_s=1.0)
    assert "set aside 0000000001.rows: 4 bytes behind row 2: cut short" in caplog.text
    again.receipt(said)
    again.step(after_s=1.0)
    ((_, rows),) = batches(again.step(after_s=GATHER_S))
    assert "journal damaged: 4 bytes behind row 2: cut short" in [row.text for row in rows if isinstance(row, Mark)]


def test_a_disk_that_fails_is_told_once_and_stops_nothing(
    device: Device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise LocalError("disk full")

    monkeypatch.setattr(device.observer._journal, "append", fail)
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            device.observer.add(power(1.0))
            device.step(after_s=1.0)
    assert [record.getMessage() for record in caplog.records] == ["observations are not kept: disk full"]


def test_a_batch_that_cannot_be_made_durable_is_not_sent_now(
    device: Device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    device.step(Connected())
    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
        patched.setattr(os, "fsync", fail)
        device.observer.add(power(1.0))
        for _ in range(60):
            assert batches(device.step(after_s=1.0)) == []
    assert "Input/output error; check the disk" in caplog.text
    ((_, rows),) = batches([*device.step(after_s=RECEIPT_MOST_S), *device.step()])
    assert rows == [Mark(WALL_S, "start"), Mark(WALL_S, "connected"), power(1.0)]


def test_a_clock_that_is_set_leaves_a_mark(device: Device) -> None:
    device.step(Connected())
    device.wall_s += 3600.0
    device.step(after_s=1.0)
    for _ in range(20):
        device.wall_s -= 0.5  # slewed
        device.step(after_s=1.0)
    ((_, rows),) = batches(device.effects)
    assert [row.text for row in rows if isinstance(row, Mark)] == ["start", "connected", "clock set by +3600.0 s"]


def test_a_device_that_is_wiped_writes_nothing_any_more(device: Device) -> None:
    device.step(Connected())
    device.observer.abandon()
    device.folder.clear()
    device.observer.add(power(1.0))
    assert device.step(after_s=GATHER_S) == []
    device.observer.close()
    assert [file.name for file in device.folder.path.iterdir()] == ["lock"]


# ---- field runs --------------------------------------------------------------------------------------------------------------------


def announced(device: Device, ahead_s: float = 0.0, **more: object) -> Field:
    """What a gateway whose clock is ahead of the device's would say now."""
    said: Field = msgspec.convert({"number": 5, "name": "walk", "sent_s": device.wall_s + ahead_s, **more}, Field)
    return said


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0, -3600.0])
def test_a_baseline_keeps_it_still_in_the_coordinators_clock(device: Device, ahead_s: float) -> None:
    device.step(Connected())
    start_s = device.wall_s + ahead_s + 30.0
    said = announced(device, ahead_s, phase="baseline", start_s=start_s, end_s=start_s + 60.0)
    effects = device.hear(said)
    (report,) = reports(effects)
    assert (report.number, report.phase, report.heard_s, report.said_s, report.software) == (5, "", device.wall_s, device.wall_s, "7")
    assert told(effects) == told(device.step(after_s=29.0)) == []
    effects = device.step(after_s=1.0)
    assert told(effects) == ["pause"]
    assert [(report.phase, report.said_s - report.heard_s) for report in reports(effects)] == [("baseline", 30.0)]
    device.observer.add(power(1.0))
    assert batches(device.step(after_s=58.0)) == [], "sending would disturb it"
    device.wall_s += 500.0  # somebody sets the device's clock
    assert told(device.step()) == []
    effects = device.step(after_s=2.0)
    assert told(effects) == ["work"]
    assert [report.phase for report in reports(effects)] == [""]
    assert len(batches(effects)) == 1


def test_a_run_begins_for_all_at_once(device: Device) -> None:
    device.step(Connected())
    assert told(device.hear(announced(device, phase="run", start_s=device.wall_s + 10.0, end_s=device.wall_s + 20.0))) == ["pause"]
    effects = device.step(after_s=10.0)
    assert told(effects) == ["work"]
    assert [report.phase for report in reports(effects)] == ["run"]
    assert told(device.step(after_s=10.0)) == []
    assert [report.phase for report in reports(device.effects)] == ["", "run", ""]


def test_what_was_on_the_broker_for_long_does_not_set_the_clock(device: Device) -> None:
    device.step(Connected())
    start_s = device.wall_s + 10.0
    device.hear(announced(device, -300.0, phase="run", start_s=start_s))  # sent five minutes ago
    device.hear(announced(device, number=6, phase="run", start_s=start_s))
    assert told(device.step(after_s=9.0)) == []
    assert told(device.step(after_s=1.0)) == ["work"]


def test_hearing_it_again_is_answered_and_changes_nothing_and_the_past_is_not_obeyed(device: Device, folder: StateFolder) -> None:
    rates: list[float] = []
    device.observer.orders.on_rate = rates.append
    device.observer.orders.meter = lambda: "ina3221"
    device.step(Connected())
    said = announced(device, phase="run", sample_hz=4.0)
    for number in (5, 5, 6):
        (report,) = reports(device.hear(msgspec.structs.replace(said, number=number)))
        assert (report.number, report.phase, report.meter) == (number, "run", "ina3221")
    assert rates == [4.0]
    old = announced(device, number=4, phase="baseline")
    again = Device(folder, b"m" * 16)
    again.step(Connected())
    effects = again.hear(old)
    assert told(effects) == []
    assert [report.number for report in reports(effects)] == [5], "a gateway that has lost count goes on above"
    assert told(again.hear(announced(device, number=7, phase="baseline"))) == ["pause"]
    assert told(again.hear(Field(number=8, sent_s=device.wall_s))) == ["work"]


def test_it_answers_after_every_connect_and_only_then(device: Device) -> None:
    device.step(Connected())
    device.hear(announced(device, phase="run"))
    device.step(Disconnected())
    assert reports(device.step(after_s=1.0)) == []
    assert [report.number for report in reports(device.step(Connected()))] == [5]


def test_a_pulse_is_made_once_and_in_time(device: Device) -> None:
    pulses: list[float] = []
    device.observer.orders.on_pulse = lambda: pulses.append(device.wall_s)
    device.step(Connected())
    said = announced(device, phase="run", pulse_s=device.wall_s + 5.0)
    device.hear(said)
    device.hear(msgspec.structs.replace(said, number=6))
    device.step(after_s=4.0)
    assert pulses == []
    device.step(after_s=1.0)
    device.step(after_s=1.0)
    assert pulses == [WALL_S + 5.0]
    device.hear(announced(device, number=9, phase="run", pulse_s=device.wall_s - 60.0))
    assert len(pulses) == 1, "too late is not made up for"


def test_bytes_that_are_no_announcement_are_nothing(device: Device) -> None:
    device.step(Connected())
    for payload in (b"", b"nonsense", wire.encode(wire.Tasks())):
        assert device.step(Received(topics.field_run("d1"), payload)) == []
    assert device.step(Received(topics.field_run("d2"), wire.encode(announced(device, phase="baseline")))) == []
