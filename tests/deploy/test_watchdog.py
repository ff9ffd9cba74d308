"""The service manager is fed by real progress: real processes, a real notification socket, and threads that hang.

Each has a control: the same process without the fault is fed for as long as it works.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.main import INTERRUPTED
from cli.systemd import watchdog_of
from edge_agent.vitals import HEALTH, Vitals, boot_id
from regrow.device import Phase
from regrow.machine import Note
from regrow.watchdog import Patience, Progress, Watchdog
from tests.testbed.processes import Child, Fleet, task_text, until, wide_mlp

PERIOD = {"WATCHDOG_USEC": "1500000", "PYTHONFAULTHANDLER": "1"}
QUIET_S = 4.0


class Manager:
    """The service manager's end of the notification socket."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(0.05)
        self.lines: list[str] = []

    def hear(self) -> list[str]:
        """Everything that was said so far."""
        try:
            while True:
                self.lines += self._socket.recv(4096).decode().splitlines()
        except TimeoutError:
            return self.lines

    def count(self, line: str) -> int:
        return self.hear().count(line)

    def status(self) -> str:
        return next((line.removeprefix("STATUS=") for line in reversed(self.hear()) if line.startswith("STATUS=")), "")

    def close(self) -> None:
        self._socket.close()


def listening() -> Iterator[Manager]:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are too long for the name of a socket
        manager = Manager(Path(folder))
        yield manager
        manager.close()


manager = pytest.fixture(listening, name="manager")
other = pytest.fixture(listening, name="other")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path / "fleet", wide_mlp(1, hidden=8), task_text("digits", stop="aggregations = 100000"), shared=True) as fleet:
        fleet.add({"d1": 4000.0, "d2": 4000.0})
        yield fleet


def start(fleet: Fleet, manager: Manager, what: str, *words: object) -> Child:
    more = {**PERIOD, "NOTIFY_SOCKET": str(manager.path)}
    child = Child([what, *words], fleet.folder / f"{what}.log", module="tests.deploy.hanging", more=more)
    fleet._children.append(child)
    return child


def agent(name: str) -> list[str]:
    return ["--log", "agent", "--bundle", f"{name}.json", "--data", f"{name}.npz", "--state", f"{name}.state", "--no-tuning"]


def gateway(fleet: Fleet) -> list[object]:
    return ["serve", fleet.task, "--plain", "--runs", fleet.runs, "--broker", fleet.broker_url]


def assert_starved(manager: Manager, child: Child) -> None:
    """Nobody is fed any more though the process lives; ended as systemd does it, it says where every thread was."""
    fed = manager.count("WATCHDOG=1")
    assert fed, "it was never fed before"
    quiet_until_s = time.monotonic() + QUIET_S
    until(lambda: time.monotonic() > quiet_until_s or manager.count("WATCHDOG=1") > fed, "the time to pass")
    assert manager.count("WATCHDOG=1") == fed
    assert child.running
    child.process.send_signal(signal.SIGABRT)
    child.ended()
    assert "hang_in_the_end" in child.text()


def test_a_device_that_computes_without_end_still_ends_well_when_it_is_told_to(fleet: Fleet, manager: Manager) -> None:
    """Not by an abort in C++, as the interpreter's end under a thread in onnxruntime would be."""
    fleet.serve()
    device = start(fleet, manager, "computing", *agent("d1"))
    device.said("^hangs$")
    assert device.stop() == 0
    assert "terminate called" not in device.text()


def test_after_ctrl_c_such_a_device_ends_with_the_status_of_ctrl_c(fleet: Fleet, manager: Manager) -> None:
    fleet.serve()
    device = start(fleet, manager, "computing", *agent("d1"))
    device.said("^hangs$")
    device.process.send_signal(signal.SIGINT)
    device.process.send_signal(signal.SIGINT)
    assert device.process.wait(20) == INTERRUPTED
    assert "terminate called" not in device.text()


def test_a_device_is_fed_while_it_trains_and_starves_when_training_hangs(fleet: Fleet, manager: Manager, other: Manager) -> None:
    fleet.serve()
    control = start(fleet, other, "nothing", *agent("d2"))
    hangs = start(fleet, manager, "training", *agent("d1"))
    until(lambda: "stuck" in manager.status(), lambda: f"stuck; it says {manager.status()!r}\n{hangs.text()[-2000:]}")
    assert re.search(r"the training thread is stuck: training job 1 is overdue", hangs.text())
    assert manager.lines[0] == "READY=1"
    fed = other.count("WATCHDOG=1")
    assert_starved(manager, hangs)
    until(lambda: other.count("WATCHDOG=1") > fed, "the control to be fed all the while")
    until(lambda: "accepted" in control.text(), "a round of the control")
    assert control.stop() == 0
    assert other.hear()[-1] == "STOPPING=1"


def test_a_device_without_a_gateway_tries_and_is_fed(fleet: Fleet, manager: Manager) -> None:
    fleet.relays["d1"].cut()
    child = start(fleet, manager, "nothing", *agent("d1"))
    until(lambda: manager.count("WATCHDOG=1") >= 4, "food")
    assert manager.status() == "trying to connect; idle"
    health = json.loads((fleet.folder / "d1.state" / HEALTH).read_text())
    assert (health["connected_s"], health["round_s"], health["phase"]) == (None, None, "idle")
    assert child.stop() == 0


def test_a_gateway_is_fed_while_it_stores_and_starves_when_the_store_hangs(fleet: Fleet, manager: Manager) -> None:
    hangs = start(fleet, manager, "store", *gateway(fleet))
    hangs.said("^run ")
    fleet.device("d1")
    until(lambda: "stuck" in manager.status(), lambda: f"stuck; it says {manager.status()!r}\n{hangs.text()[-2000:]}")
    assert "the store thread is stuck" in manager.status()
    assert_starved(manager, hangs)


def test_a_gateway_that_stores_is_fed_for_many_versions(fleet: Fleet, manager: Manager) -> None:
    child = start(fleet, manager, "nothing", *gateway(fleet))
    child.said("^run ")
    fleet.device("d1")
    fleet.reach_version(8)
    fed = manager.count("WATCHDOG=1")
    until(lambda: manager.count("WATCHDOG=1") > fed + 2, "more food")
    assert manager.status() == "connected; leading"
    assert child.stop() == 0


# ---- the parts ---------------------------------------------------------------------------------------------------------------------


def test_a_slow_board_gets_time_by_its_own_steps() -> None:
    progress = Progress("training", Patience(first_s=100, step_s=10, slowest=30))
    progress.begin("job 1", 100, 0.0)
    progress.step(40.0)  # sessions took 40 s
    assert progress.overdue(99.0) == ""
    assert progress.overdue(101.0)
    progress.step(60.0)  # a step took 20 s: the next may take 600
    assert progress.overdue(659.0) == ""
    assert "job 1 is overdue by 1 s" in progress.overdue(661.0)
    progress.end()
    assert progress.overdue(1e9) == ""


def test_a_dead_thread_and_a_lost_job_are_stuck(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []
    vitals = Vitals(tmp_path, "1", Watchdog(said.append, 1.0))
    vitals.turn(0.0, connected=True, phase=Phase.TRAINING, alive=True)
    assert "WATCHDOG=1" in said[-1]
    vitals.turn(61.0, connected=True, phase=Phase.TRAINING, alive=True)
    assert "nothing to do for 61 s" in said[-1]
    assert "WATCHDOG" not in said[-1]
    vitals.turn(62.0, connected=True, phase=Phase.WAITING, alive=True)
    assert "WATCHDOG=1" in said[-1]
    vitals.turn(64.0, connected=True, phase=Phase.WAITING, alive=False)
    assert "has ended" in said[-1]
    assert caplog.text.count("nothing to do") == 2  # that it is stuck, and that it goes on


def test_health_is_written_once_a_minute_and_at_once_when_something_happens_first(tmp_path: Path) -> None:
    vitals = Vitals(tmp_path, "2.0")
    vitals.turn(1000.0, connected=False, phase=Phase.IDLE, alive=True)
    first = json.loads((tmp_path / HEALTH).read_text())
    assert (first["version"], first["boot"], first["connected_s"], first["round_s"], first["phase"]) == (
        "2.0",
        boot_id(),
        None,
        None,
        "idle",
    )
    vitals.turn(1001.0, connected=True, phase=Phase.SENDING, alive=True)
    vitals.note(Note("accepted", {}), 1001.5)
    vitals.turn(1002.0, connected=True, phase=Phase.WAITING, alive=True)
    first = json.loads((tmp_path / HEALTH).read_text())
    assert (first["connected_s"], first["round_s"], first["phase"]) == (1002.0, 1001.5, "waiting")
    vitals.note(Note("rejected", {}), 1010.0)
    vitals.turn(1059.0, connected=True, phase=Phase.SENDING, alive=True)
    vitals.note(Note("accepted", {}), 1059.5)
    assert json.loads((tmp_path / HEALTH).read_text()) == first
    vitals.turn(1062.0, connected=False, phase=Phase.WAITING, alive=True)
    second = json.loads((tmp_path / HEALTH).read_text())
    assert (second["connected_s"], second["round_s"], second["written_s"], second["phase"]) == (1059.0, 1059.5, 1062.0, "waiting")


@pytest.mark.parametrize(
    ("environment", "every_s"),
    [
        ({}, 10.0),
        ({"WATCHDOG_USEC": "90000000"}, 30.0),
        ({"WATCHDOG_USEC": "90000000", "WATCHDOG_PID": "1"}, 10.0),
        ({"WATCHDOG_USEC": "x"}, 10.0),
    ],
)
def test_it_feeds_three_times_in_the_managers_patience(environment: dict[str, str], every_s: float) -> None:
    watchdog = watchdog_of(environment)
    assert watchdog._every_s == pytest.approx(every_s)
    watchdog.turn(0.0, "", "works")  # without a socket nothing happens


def test_a_socket_in_the_abstract_namespace_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("")  # the kernel chooses an abstract name
        heard.settimeout(5.0)
        watchdog_of({"NOTIFY_SOCKET": "@" + heard.getsockname()[1:].decode()}).turn(0.0, "", "works")
        assert heard.recv(4096).decode() == "READY=1\nSTATUS=works\nWATCHDOG=1"
