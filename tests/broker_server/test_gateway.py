"""The gateway's loop and its store thread, without a broker."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from broker_server import doctor
from broker_server.gateway import Gateway, Writer, _Snapshot
from broker_server.runs import load_task, recover
from broker_server.store import Store
from broker_server.vitals import Vitals
from regrow import records
from regrow.coordinator import Coordinator
from regrow.errors import LocalError
from regrow.machine import Connected, Disconnected, Effect, Event, Persist, Persisted, Record, Standing
from regrow.records import to_record
from regrow.task import StoreSettings
from tests.broker_server.histories import new_run

WAIT_S = 10.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return new_run(tmp_path)


@pytest.fixture
def store(run: Path) -> Iterator[Store]:
    with Store.open(run) as store:
        yield store


@pytest.fixture
def gateway(run: Path, store: Store) -> Gateway:
    """A gateway whose broker is not there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    folder = load_task(run / "task")
    coordinator = Coordinator(recover(store, folder), run.name, folder.programs, 1)
    return Gateway(coordinator, store, url=f"mqtt://127.0.0.1:{port}", username="coordinator", password="x")


def persist(number: int) -> Persist:
    return Persist(number, (Record("led", b'{"term":%d}' % number),))


# ---- the store's thread ------------------------------------------------------------------------------------------------------------


class Held(Store):
    """A store whose next append waits until it is let go."""

    gate = threading.Event()
    entered = threading.Event()
    batches: list[int]

    def append(self, records: Sequence[Record]) -> int:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        self.batches.append(len(records))
        return super().append(records)


def test_a_burst_shares_a_transaction_and_only_the_last_is_confirmed(run: Path) -> None:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with Held.open(run) as store:
        assert isinstance(store, Held)
        store.batches = []
        writer = Writer(store, StoreSettings(), events.put)
        writer.put(persist(1))
        assert store.entered.wait(WAIT_S)
        for number in (2, 3, 4):
            writer.put(persist(number))
        assert events.empty()  # nothing is confirmed before it is durable
        store.gate.set()
        writer.close()
        assert store.batches == [1, 3]
        assert [events.get(), events.get()] == [Persisted(1), Persisted(4)]
        assert events.empty()
        assert store.last_id == 4


def test_a_snapshot_is_of_the_log_before_it(store: Store) -> None:
    writer = Writer(store, StoreSettings(keep_snapshots=2), lambda _: None)
    for number in (1, 2, 3):
        writer.put(persist(number))
        writer.put(_Snapshot(b'{"version":%d}' % number, {}))
    writer.close()
    assert [(info.log_id, info.version) for info in store.snapshots()] == [(2, 2), (3, 3)]


def test_a_disk_that_fails_is_told_and_nothing_is_confirmed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    writer = Writer(store, StoreSettings(), events.put)

    def full(_: Sequence[Record]) -> int:
        raise LocalError("disk full")

    monkeypatch.setattr(store, "append", full)
    writer.put(persist(1))
    writer.close()
    assert isinstance(events.get(timeout=WAIT_S), LocalError)
    assert events.empty()


# ---- the loop ----------------------------------------------------------------------------------------------------------------------


def test_it_stops_without_a_broker_and_leaves_a_snapshot(gateway: Gateway, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = ["the broker started again"]

    def housekeeping() -> str | None:
        return said.pop() if said else None

    for _ in range(5):
        gateway._events.put(Disconnected("cannot connect to nowhere"))
    threading.Timer(0.0, gateway.stop).start()
    with caplog.at_level(logging.WARNING):
        assert gateway.run(housekeeping=housekeeping) == ""
    assert "the broker started again" in caplog.text
    assert caplog.text.count("cannot connect to nowhere; trying again") == 1
    assert [info.version for info in store.snapshots()] == [0]


def test_an_error_in_a_step_leaves_no_snapshot_that_is_ahead_of_the_log(
    gateway: Gateway, run: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: Event, __: float) -> list[Effect]:
        gateway.coordinator.commit(records.Joined(device="d1", install="00" * 16, uplink_bps=1e6, density=1.0))
        raise LocalError("in the middle of a step")

    monkeypatch.setattr(gateway.coordinator, "step", breaks)
    gateway._events.put(Connected())
    with pytest.raises(LocalError, match="in the middle"):
        gateway.run()
    assert not store.snapshots()
    assert not recover(store, load_task(run / "task")).devices


def test_a_failed_write_ends_it(gateway: Gateway, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(_: Event, __: float) -> list[Effect]:
        return [Persist(1, (to_record(records.Led(term=1)),))]

    def full(_: Sequence[Record]) -> int:
        raise LocalError("disk full")

    monkeypatch.setattr(gateway.coordinator, "step", step)
    monkeypatch.setattr(store, "append", full)
    gateway._events.put(Connected())
    with pytest.raises(LocalError, match="disk full"):
        gateway.run()


def test_a_broker_that_cannot_be_kept_alive_ends_it(gateway: Gateway) -> None:
    def housekeeping() -> str | None:
        raise LocalError("mosquitto is gone")

    with pytest.raises(LocalError, match="mosquitto is gone"):
        gateway.run(housekeeping=housekeeping)


def test_who_rests_for_one_companion_rests_whatever_the_others_say(run: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tells:
        def __init__(self, *says: Standing) -> None:
            self.says = list(says)

        def step(self, event: Event | None, now: float, *, leads: bool = True) -> list[Effect]:  # noqa: ARG002
            return [self.says.pop(0)] if self.says and event is None else []

    fleet = Tells(Standing(frozenset({"d1"}), frozenset({"d2"})), Standing())
    field_run = Tells(Standing(frozenset({"d3"})))
    folder = load_task(run / "task")
    coordinator = Coordinator(recover(store, folder), run.name, folder.programs, 1)
    one = Gateway(coordinator, store, url="mqtt://127.0.0.1:1", username="c", password="x", companions=[fleet, field_run])
    heard: list[Effect] = []
    monkeypatch.setattr(one, "_perform", heard.extend)
    one._accompany(None)
    one._accompany(None)
    assert heard == [
        Standing(frozenset({"d1"}), frozenset({"d2"})),
        Standing(frozenset({"d1", "d3"}), frozenset({"d2"})),
        Standing(frozenset({"d3"})),
    ]
    one._writer.close()


def test_it_sweeps_the_broker_while_it_runs(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def swept() -> None:
        gateway.stop()  # else nothing ends it

    monkeypatch.setattr(gateway._bus, "sweep", swept)
    assert gateway.run() == ""


@pytest.mark.usefixtures("store")  # which holds the run
def test_the_doctor_names_a_full_broker_beside_a_rival(run: Path) -> None:
    Vitals(run).turn(time.monotonic(), connected=True, phase="claiming", dead="")
    found = doctor.coordinator(run.parent)
    assert found.state == "warn"
    assert "another gateway leads this task, or the broker is full" in found.cure
