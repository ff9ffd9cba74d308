"""The device's runtime without a broker: who it is after which accident, and how it ends."""

from __future__ import annotations

import logging
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.agent import ANEW_S, IDENTITY, TUNING, Agent, Bundle, Tuned
from edge_agent.data.source import DataSource
from edge_agent.energy.account import Energy
from edge_agent.energy.hwmon import Hwmon
from edge_agent.heat import Heat
from edge_agent.state import StateFolder
from edge_agent.traffic import UPLINK
from edge_agent.tuning import Tuning
from regrow import outgoing, wire
from regrow.device import OUTGOING
from regrow.errors import LocalError
from regrow.fetching import PART
from regrow.machine import Connected, Disconnected, Drop, Note, Save, Told, Train, TrainingFailed
from regrow.observations import PhaseSeen, PowerSeen, Row
from regrow.outage import Outage
from tests.edge_agent.energy import boards
from tests.edge_agent.energy.boards import write
from tests.edge_agent.listening import Listening

WAIT_S = 10.0


@pytest.fixture
def data() -> DataSource:
    source = DataSource(20)
    source.append(np.zeros((20, 64), np.float32), np.zeros(20, np.int64))
    return source


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StateFolder]:
    with StateFolder(tmp_path / "state") as folder:
        yield folder


def agent(folder: StateFolder, data: DataSource) -> Agent:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return Agent(Bundle("d1", f"mqtt://127.0.0.1:{port}", "secret"), folder, data)


def end(agent: Agent) -> None:
    agent.stop()
    agent.run()


def saved_update(sequence: int) -> bytes:
    head = wire.UpdateHead(1, 0, 0, 0, "float32", 10, 4, wire.digest(b"\0" * 4))
    return outgoing.Outgoing("run", sequence, head, b"\0" * 4, wire.MIN_CHUNK_BYTES, None).to_bytes()


def life(folder: StateFolder, data: DataSource) -> Agent:
    """An agent that has started and ended."""
    one = agent(folder, data)
    end(one)
    return one


def test_an_installation_survives_restarts_and_every_start_is_another_boot(folder: StateFolder, data: DataSource) -> None:
    first, second = life(folder, data), life(folder, data)
    assert first.identity.install == second.identity.install == folder.get(IDENTITY)
    assert first.identity.boot != second.identity.boot
    assert (first.identity.examples, first.identity.validation_examples) == (16, 4)


def test_the_sequence_goes_on(folder: StateFolder, data: DataSource) -> None:
    install = life(folder, data).identity.install
    folder.put(OUTGOING, saved_update(41))
    again = life(folder, data)
    assert again.device.outgoing is not None
    assert again.device.outgoing.sequence == 41
    assert again.identity.install == install


@pytest.mark.parametrize("accident", ["torn", "not an update", "set aside before"])
def test_a_lost_sequence_number_begins_a_new_installation(folder: StateFolder, data: DataSource, accident: str) -> None:
    install = life(folder, data).identity.install
    if accident == "torn":
        folder.put(OUTGOING, saved_update(41))
        with (folder.path / OUTGOING).open("r+b") as file:
            file.truncate(60)
    elif accident == "not an update":
        folder.put(OUTGOING, b"\x93nonsense")
    else:
        (folder.path / f"{OUTGOING}.rejected").write_bytes(b"")
    again = life(folder, data)
    assert again.identity.install != install
    assert again.device.outgoing is None
    assert folder.get(IDENTITY) == again.identity.install


def test_parts_are_kept_and_damaged_ones_are_dropped(folder: StateFolder, data: DataSource) -> None:
    good, bad = b"a part", b"another"
    folder.put(PART + wire.digest(good).hex(), good)
    folder.put(PART + wire.digest(bad).hex(), b"not it")
    one = agent(folder, data)
    assert set(one.device._fetching.parts.values()) == {good}
    assert Drop(PART + wire.digest(bad).hex()) in one.device.step(Disconnected(), 0.0)
    end(one)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"samples": 3}', b"\xff"])
def test_measurements_that_do_not_check_out_are_set_aside(
    folder: StateFolder, data: DataSource, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder.put(UPLINK, content)
    with caplog.at_level(logging.WARNING):
        assert life(folder, data).device.uplink_bps is None
    assert "set aside the saved uplink measurements" in caplog.text


def test_it_says_why_there_is_no_link_and_stops_when_told(
    folder: StateFolder, data: DataSource, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = agent(folder, data)
    told, lost = threading.Event(), one._outage.lost

    def hear(event: Disconnected, now: float) -> str:
        said = lost(event, now)
        told.set()
        return said

    monkeypatch.setattr(Outage, "lost", lambda _, event, now: hear(event, now))
    running = threading.Thread(target=one.run)
    with caplog.at_level(logging.WARNING):
        running.start()
        assert told.wait(WAIT_S)
        one.stop()
        running.join(WAIT_S)
    assert not running.is_alive()
    assert "refused" in caplog.text.lower()


def test_an_outage_is_two_lines_in_the_log(folder: StateFolder, data: DataSource, caplog: pytest.LogCaptureFixture) -> None:
    one = agent(folder, data)
    with caplog.at_level(logging.WARNING):
        one._take(Connected())
        one._take(Disconnected("connection lost"))
        for _ in range(10):
            one._take(Disconnected("cannot connect to 127.0.0.1:1: [Errno 111] Connection refused"))
        one._take(Connected())
    end(one)
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "connection lost; trying again"
    assert said[1:] == [f"connected to {one._bundle.broker} after 0 s without a connection"]


def test_samples_that_come_after_a_failure_are_another_start(folder: StateFolder, data: DataSource) -> None:
    one = agent(folder, data)
    job = Train(1, 0, {}, np.zeros(1, np.float32), np.zeros(1, np.uint32), 1, {}, steps=1, batch=1, learning_rate=0.1, seed=1)
    one._perform([job])
    more = (np.zeros((2, 64), np.float32), np.zeros(2, np.int64))
    boot = one.device.identity.boot
    one.device._presence.in_trouble("x", 0.0, once=True)
    one._start_anew(100.0)
    assert one.device.identity.boot == boot, "the same data would only fail again"
    data.append(*more, part=np.zeros(2, np.int64))
    one._start_anew(100.0)
    again = one.device.identity
    assert again.boot != boot
    assert again.examples == data.training_size
    one._start_anew(100.0)
    assert one.device.identity is again
    data.append(*more)
    one._start_anew(100.0 + ANEW_S - 1)
    assert one.device.identity is again, "a source that appends all the time is not tried all the time"
    one._start_anew(100.0 + ANEW_S)
    assert one.device.identity.boot != again.boot
    one.device._presence.trouble = ""
    data.append(*more)
    one._start_anew(300.0)
    assert len({boot, again.boot, one.device.identity.boot}) == 3, "what can be trained on is no other start"
    end(one)


def test_a_disk_that_fails_ends_it(folder: StateFolder, data: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    one = agent(folder, data)

    def full(*_: object, **__: object) -> None:
        raise LocalError("disk full")

    monkeypatch.setattr(folder, "put", full)
    with pytest.raises(LocalError, match="disk full"):
        one._perform([Save(OUTGOING, b"x", id=1)])
    end(one)


def test_it_ends_when_its_state_folder_is_gone_though_it_has_nothing_to_write(folder: StateFolder, data: DataSource) -> None:
    one = agent(folder, data)
    shutil.rmtree(folder.path)
    with pytest.raises(LocalError, match=f"the state folder {folder.path} is gone"):
        one.run()


def test_training_that_fails_is_told_to_the_machine(folder: StateFolder, data: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    one = agent(folder, data)
    heard: list[int] = []

    def step(event: object) -> None:
        if isinstance(event, TrainingFailed):
            heard.append(event.number)
            one.stop()

    monkeypatch.setattr(one, "_step", step)
    nothing = np.zeros(1, np.float32)
    one._perform([Train(7, 0, {}, nothing, np.zeros(1, np.uint32), 1, {}, 1, 1, 0.1, 1), Note("training", {})])
    one.run()
    assert heard == [7]


def test_what_was_found_out_about_speed_is_kept_and_if_damaged_found_out_again(folder: StateFolder, data: DataSource) -> None:
    programs = {"layout": b"l", "train": b"a", "train~convolve": b"b"}
    tuning = Tuning(1)
    challenger = tuning.trained(programs, "train", 1000)
    assert challenger is not None
    tuning.race(programs, challenger, lambda _: lambda _: None)
    one = agent(folder, data)
    one._take_result(Tuned(tuning.to_bytes()))
    end(one)
    assert Tuning(1, folder.get(TUNING)).trained(programs, "train", 1000) is None
    (folder.path / TUNING).write_bytes(b"torn")
    end(Agent(Bundle("d1", "mqtt://127.0.0.1:1", "secret"), folder, data, tune=True))
    assert [name for name, _ in folder.rejected] == [TUNING]


def test_energy_is_measured_while_it_runs_and_told_when_it_ends(folder: StateFolder, data: DataSource, tmp_path: Path) -> None:
    root = write(tmp_path / "board", {**boards.ZERO_WITH_INA219, **boards.HEAT})
    rows: list[Row] = []
    seen = threading.Event()

    def take(row: Row) -> None:
        rows.append(row)
        if isinstance(row, PowerSeen):
            seen.set()

    def measured(tell: Callable[[Row], None]) -> Energy:
        energy = Energy(Hwmon(root), tell, heat=Heat(root))
        energy.record(50.0)
        return energy

    one = Agent(Bundle("d1", "mqtt://127.0.0.1:1", "secret"), folder, data, senses=Listening(take, measured))
    runner = threading.Thread(target=one.run)
    runner.start()
    assert seen.wait(WAIT_S)
    one.stop()
    runner.join(WAIT_S)
    assert not runner.is_alive()
    power = [row for row in rows if isinstance(row, PowerSeen) and row.watts is not None]
    assert [row.watts for row in power] == pytest.approx([1.08] * len(power))
    assert {row.certainty for row in power} == {"measured"}
    phases = [row for row in rows if isinstance(row, PhaseSeen) and row.joules is not None]
    assert {row.phase for row in phases} == {"idle"}
    assert sum(row.joules or 0.0 for row in phases) == pytest.approx(sum((row.watts or 0.0) * row.seconds for row in power))


def test_one_companions_leave_to_work_does_not_end_anothers_pause(folder: StateFolder, data: DataSource) -> None:
    class Tells:
        def __init__(self) -> None:
            self.says: list[str] = []

        def step(self, *_: object) -> list[Told]:
            return [Told(self.says.pop())] if self.says else []

    fleet, field_run = Tells(), Tells()
    one = Agent(Bundle("d1", "mqtt://127.0.0.1:1", "secret"), folder, data, companions=[fleet, field_run])
    found = []
    for who, says in ((fleet, "drain"), (field_run, "pause"), (fleet, "pause"), (field_run, "work"), (fleet, "work")):
        who.says.append(says)
        one._accompany(None)
        found.append(one.device.told)
    assert found == ["drain", "pause", "pause", "pause", "work"]
    end(one)
