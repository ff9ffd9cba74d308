"""Observations over a real broker: an agent whose link is cut, a gateway that trains it, and a field run announced to it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker_server.broker import Broker, Kind
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.field_herald import FieldHerald, announce, reports
from broker_server.gateway import Gateway
from broker_server.observations import open_observations, recorder_of
from broker_server.runs import load_task, recover
from broker_server.store import Store
from edge_agent import observer
from edge_agent.agent import Agent, Bundle
from edge_agent.data.source import DataSource
from edge_agent.field_journal import MIN_JOURNAL_BYTES
from edge_agent.observer import Observer
from edge_agent.senses import Senses
from edge_agent.state import StateFolder
from export.models import digits_mlp
from regrow.coordinator import Coordinator
from regrow.errors import LocalError
from regrow.observations import Field, Mark, PowerSeen
from tests.broker_server.histories import new_run
from tests.testbed.processes import Fleet, Relay, task_text, until

NONCES = itertools.count(1)


class World:
    """A broker, a gateway that records, and one agent behind a link that can be cut; all in this process but the broker."""

    def __init__(self, folder: Path, stack: ExitStack, kind: Kind) -> None:
        self.folder, self.home, self._stack = folder, folder / "home", stack
        credentials = Credentials(self.home)
        self.password = credentials.add_device("d1")
        self.broker = Broker(self.home, credentials, port=0, kind=kind)
        self.broker.start()
        stack.callback(self.broker.stop)
        self.relay = Relay()
        self.relay.target = self.broker.port
        stack.callback(self.relay.close)
        self.coordinator_password = credentials.coordinator_password
        self.serve()
        self.live()

    def serve(self) -> None:
        run = new_run(self.folder)
        store = self._stack.enter_context(Store.open(run))
        task = load_task(run / "task")
        recorder = self._stack.enter_context(recorder_of(self.home))
        assert recorder is not None
        self.coordinator = Coordinator(recover(store, task), run.name, task.programs, 1)
        gateway = Gateway(
            self.coordinator,
            store,
            url=self.broker.url,
            username=COORDINATOR,
            password=self.coordinator_password,
            companions=[recorder, FieldHerald(self.home, recorder.note_clock)],
        )
        self._thread(gateway.run, gateway.stop)

    def live(self) -> None:
        """Begin another life of the agent, in the same folder."""
        self._life = self._stack.enter_context(ExitStack())
        folder = self._life.enter_context(StateFolder(self.folder / "state"))
        source = DataSource(20)
        source.append(np.zeros((20, 64), np.float32), np.zeros(20, np.int64))
        nonce = next(NONCES).to_bytes(16, "big")
        self.observer = Observer("d1", folder, nonce, time.time, quiet=lambda: agent.quiet, journal_bytes=MIN_JOURNAL_BYTES)
        agent = self.agent = Agent(
            Bundle("d1", f"mqtt://127.0.0.1:{self.relay.port}", self.password), folder, source, senses=Senses(observer=self.observer)
        )
        self._thread(agent.run, agent.stop, self._life)

    def restart(self) -> None:
        self._life.close()
        self.live()

    def _thread(self, run: Any, stop: Any, stack: ExitStack | None = None) -> None:
        thread = threading.Thread(target=run)
        thread.start()

        def end() -> None:
            stop()
            thread.join(20)
            assert not thread.is_alive()

        (stack or self._stack).callback(end)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        try:
            db = open_observations(self.home)
        except LocalError:  # nothing came yet
            return []
        with closing(db):
            return db.execute(sql).fetchall()


@pytest.fixture(params=["amqtt", pytest.param("mosquitto", marks=pytest.mark.network)])
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[World]:
    for name, seconds in {"GATHER_S": 0.3, "KEEP_S": 0.05, "RECEIPT_S": 2.0}.items():
        monkeypatch.setattr(observer, name, seconds)
    with ExitStack() as stack:
        yield World(tmp_path, stack, request.param)


def watts(world: World) -> list[float]:
    return [row[0] for row in world.query("SELECT watts FROM power ORDER BY rowid")]


def observe(world: World, numbers: range) -> None:
    for number in numbers:
        world.observer.add(PowerSeen(time.time(), 1.0, float(number), "test", "measured"))


def test_what_was_seen_while_the_link_was_cut_comes_afterwards_once(world: World) -> None:
    observe(world, range(100))
    until(lambda: len(watts(world)) == 100, "the first rows")
    world.relay.cut()
    until(lambda: not world.agent._link.connected, "the cut")
    observe(world, range(100, 700))
    world.restart()
    observe(world, range(700, 1300))
    world.relay.restore()
    until(lambda: len(watts(world)) >= 1300, lambda: f"all rows, {len(watts(world))} came")
    world.restart()
    observe(world, range(1300, 1310))
    until(lambda: len(watts(world)) >= 1310, "the last rows")
    assert watts(world) == list(range(1310))
    assert world.query("SELECT * FROM missing") == []
    marks = [row[0].partition(":")[0] for row in world.query("SELECT text FROM marks ORDER BY rowid")]
    assert marks[:4] == ["start", "connected", "cut", "start"]
    assert marks.count("start") == 3


def test_a_journal_that_was_full_shows_what_is_missing(world: World) -> None:
    world.relay.cut()
    until(lambda: not world.agent._link.connected, "the cut")
    for number in range(600):
        world.observer.add(Mark(float(number), f"{number} " + "x" * 900))
    until(lambda: not world.observer._rows, "the journal")
    world.relay.restore()
    until(lambda: world.query("SELECT 1 FROM marks WHERE text LIKE '599 %'"), "the last row")
    came = {int(row[0]) for row in world.query("SELECT at_s FROM marks WHERE text LIKE '% x%'")}
    missing = world.query("SELECT at_s, seconds, rows FROM missing ORDER BY at_s")
    assert missing
    assert len(came) < 300
    assert len(came) + sum(row[2] for row in missing) == 600
    gone = set(range(600)) - came
    assert gone == {number for at_s, seconds, _ in missing for number in range(int(at_s), int(at_s + seconds) + 1)}


def test_a_baseline_is_kept_and_the_clock_known(world: World) -> None:
    until(lambda: world.agent._link.connected, "the connection")
    number = announce(world.home, ["d1"], Field(number=1, name="walk", phase="baseline", end_s=time.time() + 3600.0))

    def report() -> Any:
        heard = reports(world.home).get("d1")
        return heard if heard is not None and heard.announced >= number else None

    heard = until(report, "the answer")
    assert heard.report.phase == "baseline"
    assert heard.error_s < 5.0
    assert abs(heard.offset_s) <= heard.error_s + 0.001, "both run on this machine's clock"
    until(lambda: world.coordinator.paused == {"d1"}, "no work for who keeps still")
    assert world.agent.device.told == "pause"
    assert not world.agent.quiet, "nor are models or releases fetched"
    number = announce(world.home, ["d1"], Field(number=1))
    heard = until(report, "the end")
    assert heard.report.phase == ""
    until(lambda: not world.coordinator.paused, "work again")
    until(lambda: world.agent.device.told == "work", "work again")
    until(lambda: world.query("SELECT 1 FROM clocks WHERE error_s IS NOT NULL"), "its clock on record")


def test_work_rests_in_a_baseline_and_goes_on_at_once_afterwards(tmp_path: Path) -> None:
    with Fleet(tmp_path / "fleet", digits_mlp(1), task_text("used", stop="seconds = 300"), kind="amqtt") as fleet:
        fleet.serve()
        fleet.add({"one": 4000.0})
        fleet.device("one")
        fleet.reach_version(2)
        home = fleet.runs / ".gateway"

        def say(phase: str) -> bool:
            heard = reports(home).get("one")
            return heard is not None and heard.announced == number and heard.report.phase == phase

        number = announce(home, ["one"], Field(number=1, name="walk", phase="baseline", end_s=time.time() + 5.0))
        until(lambda: say("baseline"), "the baseline")
        before = fleet.version()
        until(lambda: say(""), "its end")
        assert fleet.version() <= before + 1, "at most what had been sent"
        number = announce(home, ["one"], Field(number=1, name="walk", phase="run", start_s=time.time() + 3.0, end_s=time.time() + 300.0))
        until(lambda: say("run"), "the run")
        before = fleet.version()
        until(lambda: fleet.version() >= before + 2, "updates long before an assignment that nobody took would be over", 20.0)
        fleet.check()
