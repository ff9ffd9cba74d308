"""The whole of a device's energy: a meter with a script, a clock that the test turns, and the rows that come out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_agent.energy import pulse
from edge_agent.energy.account import RECORDED_ROW_S, ROW_S, Energy
from edge_agent.energy.board_file import Baseline, BoardFile, Calibration
from edge_agent.energy.external import MqttMeter
from edge_agent.energy.hwmon import Hwmon
from edge_agent.energy.meter import Meter, NoMeter, Reading, Unmeasured, Watts
from edge_agent.energy.phases import Doing, doing_of
from edge_agent.heat import Heat
from regrow import observations, topics
from regrow.device import Device
from regrow.device import Phase as DevicePhase
from regrow.machine import Connected, Received, Subscribe, Train
from regrow.observations import Mark, PhaseSeen, PowerSeen, Row
from regrow.parameters import Layout, Tensor
from regrow.presence import Identity
from regrow.pulse import BITS, is_high
from tests.edge_agent.energy import boards
from tests.edge_agent.energy.boards import write
from tests.edge_agent.energy.test_phases import MODEL
from tests.golden.examples import EXAMPLES

UNIX_S = 1_790_000_000.0


class Script:
    """A meter that says what it is told to."""

    name, certainty, gap_s, most_hz = "script", "measured", 1.0, 100.0

    def __init__(self) -> None:
        self.reading: Reading = Watts(3.0)
        self.closed = False

    def read(self) -> Reading:
        return self.reading

    def close(self) -> None:
        self.closed = True


class Bench:
    """An `Energy` with all its surroundings in hand; one second is ten samples."""

    def __init__(self, meter: Meter, root: Path, **options: object) -> None:
        self.now = 50.0
        self.rows: list[Row] = []
        clock = lambda: self.now  # noqa: E731
        heat = Heat(write(root, boards.HEAT))
        unix_s = lambda: UNIX_S + self.now  # noqa: E731
        self.energy = Energy(meter, self.rows.append, heat=heat, unix_s=unix_s, clock=clock, **options)  # type: ignore[arg-type]
        self.energy.sample(self.now)

    def pass_s(self, seconds: int) -> None:
        began_s = self.now
        for tenth in range(1, 10 * seconds + 1):
            self.now = began_s + tenth / 10
            self.energy.sample(self.now)

    def power(self) -> list[PowerSeen]:
        return [row for row in self.rows if isinstance(row, PowerSeen)]


def test_a_row_a_minute_and_in_a_field_run_one_a_second(tmp_path: Path) -> None:
    bench = Bench(Script(), tmp_path)
    bench.pass_s(60)
    (row,) = bench.power()
    assert row == PowerSeen(UNIX_S + 110.0, pytest.approx(ROW_S), pytest.approx(3.0), "script", "measured", 52.1)
    bench.rows.clear()
    bench.energy.record(10.0)
    bench.pass_s(3)
    assert [row.seconds for row in bench.power()] == [pytest.approx(RECORDED_ROW_S)] * 3
    assert observations.decode_rows(observations.encode_rows(bench.rows)) == bench.rows


def test_telemetry_says_what_the_meter_said_lately_or_why_not(tmp_path: Path) -> None:
    script = Script()
    bench = Bench(script, tmp_path)
    assert bench.energy.state().meter == "script: no value"
    bench.pass_s(6)
    assert bench.energy.state() == type(bench.energy.state())(pytest.approx(3.0), "script", 52.1)
    script.reading = Unmeasured("unplugged")
    bench.pass_s(11)
    assert (bench.energy.state().watts, bench.energy.state().meter) == (None, "unplugged")
    script.reading = Watts(3.0)
    bench.pass_s(11)
    assert bench.energy.state().watts == pytest.approx(3.0)
    bench.now += 100.0  # nobody samples any more: what was is not what is
    assert bench.energy.state().watts is None


def test_what_slows_the_board_is_marked_and_told_at_once(tmp_path: Path) -> None:
    flags = write(tmp_path, {boards.PI_FLAGS: "0\n"}) / boards.PI_FLAGS
    bench = Bench(Script(), tmp_path)
    bench.energy.record(10.0)
    bench.pass_s(2)
    assert bench.energy.marked == ""
    flags.write_text("50005\n")
    bench.pass_s(6)
    assert bench.energy.marked == "under-voltage, throttled"
    assert bench.energy.state().throttled
    flags.write_text("50000\n")  # over: what was, does not count
    bench.pass_s(7)
    assert (bench.energy.marked, bench.energy.state().throttled) == ("", False)
    marked = [row.marked for row in bench.power()]
    assert (marked[0], marked[-1]) == ("", "")
    assert "under-voltage, throttled" in marked
    bench.energy.close()
    assert [row.marked for row in bench.rows if isinstance(row, PhaseSeen)] == ["under-voltage, throttled"]


def test_calibration_and_baseline_are_those_of_the_meter_in_use(tmp_path: Path) -> None:
    known = BoardFile(
        board="pi",
        calibrations={"script": Calibration(gain=1.1, offset_w=-0.3, by="Ann", on="2026-11-21"), "other": Calibration(by="Ann", on="x")},
        baselines={"script": Baseline(watts=2.0, low_w=1.9, high_w=2.1, seconds=60.0, on="2026-11-21")},
    )
    bench = Bench(Script(), tmp_path, known=known)
    bench.energy.record(10.0)
    bench.pass_s(1)
    assert bench.power()[0].watts == pytest.approx(3.0)
    bench.energy.meter.reading = Watts(5.0)  # type: ignore[attr-defined]
    bench.pass_s(2)
    assert bench.power()[-1].watts == pytest.approx(5.2)


def device() -> Device:
    return Device(Identity("pi", bytes(16), bytes(16)), {}, 1e6)


def test_joules_go_to_what_the_device_does(tmp_path: Path) -> None:
    bench = Bench(Script(), tmp_path)
    machine = device()
    bench.energy.follow(machine, training=False)
    bench.pass_s(2)
    bench.energy.follow(machine, training=True)
    bench.pass_s(4)
    bench.energy.follow(machine, training=False)
    bench.energy.keep_still(True)
    bench.pass_s(3)
    bench.energy.keep_still(False)
    bench.pass_s(1)
    bench.energy.close()
    rows = [(row.phase, row.joules) for row in bench.rows if isinstance(row, PhaseSeen)]
    assert rows == [
        ("idle", pytest.approx(6.0)),
        ("train", pytest.approx(12.0)),
        ("baseline", pytest.approx(9.0)),
        ("idle", pytest.approx(3.0)),
    ]
    assert bench.energy.meter.closed  # type: ignore[attr-defined]


def test_what_a_device_does_by_its_machine() -> None:
    machine = device()
    assert doing_of(machine, training=False) == Doing()
    assert doing_of(machine, training=True).phases == {"train"}
    machine.phase = DevicePhase.FETCHING
    assert doing_of(machine, training=False).phases == set()  # there is no link: it waits
    machine.connected = True
    assert doing_of(machine, training=False).phases == {"receive"}
    machine.phase = DevicePhase.PROBING
    assert doing_of(machine, training=True).phases == {"train", "transmit"}
    machine.phase = DevicePhase.SENDING
    assert doing_of(machine, training=False).phases == set()  # it waits for its receipt
    machine.phase = DevicePhase.SAVING
    assert doing_of(machine, training=False).phases == {"train"}


def test_the_density_of_the_job_at_hand_stands_in_its_rows(tmp_path: Path) -> None:
    bench = Bench(Script(), tmp_path)
    machine = device()
    machine.names, machine.term = topics.Run("digits", "run-1"), 1
    machine.assignment = EXAMPLES["assignment"][0]  # type: ignore[assignment]
    layout = Layout((Tensor("w", (8,)),)).to_json()
    values = np.zeros(2, np.float32)
    bench.energy.trains(Train(1, 0, {"layout": layout}, values, np.arange(2, dtype=np.uint32), 2, {}, 5, 10, 0.1, 1))
    bench.energy.follow(machine, training=True)
    bench.pass_s(1)
    bench.energy.close()
    row = next(row for row in bench.rows if isinstance(row, PhaseSeen) and row.phase == "train")
    assert machine.assignment is not None
    assert (row.run, row.number, row.steps, row.density) == ("run-1", machine.assignment.number, machine.assignment.steps, 0.25)


def test_without_a_meter_nothing_is_zero(tmp_path: Path) -> None:
    bench = Bench(NoMeter("no meter here"), tmp_path)
    bench.pass_s(65)
    bench.energy.close()
    assert bench.rows
    for row in bench.rows:
        assert isinstance(row, (PowerSeen, PhaseSeen))
        assert (row.certainty, row.meter) == ("unmeasured", "no meter here")
        assert (row.watts if isinstance(row, PowerSeen) else row.joules) is None


def test_with_a_model_of_the_board_power_is_modelled_and_says_so(tmp_path: Path) -> None:
    bench = Bench(NoMeter("no meter here"), tmp_path, guess=MODEL)
    bench.energy._say(Doing(frozenset({"train", "transmit"})), bench.now)
    bench.pass_s(60)
    bench.energy.close()
    (power, *_) = bench.power()
    assert (power.watts, power.certainty, power.meter) == (pytest.approx(6.0), "modelled", "model of pi")
    assert {row.certainty for row in bench.rows if isinstance(row, PhaseSeen)} == {"modelled"}


def test_a_meter_on_a_topic_is_heard_over_the_agents_link(tmp_path: Path) -> None:
    now = [50.0]
    bench = Bench(MqttMeter("home/plug", lambda: now[0]), tmp_path)
    assert bench.energy.step(Connected(), 50.0) == [Subscribe(("home/plug",))]
    assert bench.energy.step(Received("home/other", b"9"), 50.0) == []
    for second in range(1, 8):
        now[0] = 50.0 + second
        bench.energy.step(Received("home/plug", b"4.0"), now[0])
        bench.pass_s(1)
    assert bench.energy.state().watts == pytest.approx(4.0)


def test_the_thread_samples_tells_and_counts_what_it_costs(tmp_path: Path) -> None:
    write(tmp_path, {**boards.ZERO_WITH_INA219, **boards.HEAT})
    seen, rows = threading.Event(), []

    def take(row: Row) -> None:
        rows.append(row)
        seen.set()

    energy = Energy(Hwmon(tmp_path), take, heat=Heat(tmp_path))
    energy.record(50.0)
    energy.start()
    assert seen.wait(20)
    energy.close()
    assert isinstance(rows[0], PowerSeen)
    assert (rows[0].watts, rows[0].meter) == (pytest.approx(1.08), "ina219 hwmon2")
    assert 0 < energy.overhead < 0.5
    assert isinstance(rows[-1], (PhaseSeen, PowerSeen))


# ---- the sync pulse --------------------------------------------------------------------------------------------------------------------


def test_a_pulse_is_made_when_it_is_due_and_its_beginning_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = threading.Event(), threading.Event()

    def make(_: threading.Event, clock: Callable[[], float]) -> float:
        made.set()
        return clock()

    monkeypatch.setattr("edge_agent.energy.account.make_pulse", make)
    rows: list[Row] = []

    def take(row: Row) -> None:
        rows.append(row)
        told.set()

    energy = Energy(Script(), take, heat=Heat(tmp_path), unix_s=lambda: UNIX_S)  # type: ignore[arg-type]
    energy.pulse(UNIX_S - 3600)  # a retained wish that is long past
    energy.pulse(UNIX_S + 0.05)
    assert made.wait(20)
    assert told.wait(20)
    assert rows == [Mark(pytest.approx(UNIX_S, abs=5.0), "sync pulse")]


def test_the_load_follows_the_pattern() -> None:
    """With a clock of our own: every look at it is a millisecond."""
    now, busy = [0.0], []
    stopped = threading.Event()
    stopped.wait = lambda seconds: now.__setitem__(0, now[0] + seconds)  # type: ignore[method-assign, assignment]

    def clock() -> float:
        now[0] += 0.001
        return now[0]

    began_s = pulse.make_pulse(stopped, clock=clock, work=lambda: busy.append(now[0]), threads=1)
    for index, bit in enumerate(BITS):
        count = sum(index * 0.5 + 0.01 < at_s - began_s < (index + 1) * 0.5 - 0.01 for at_s in busy)
        assert (count > 300) == bool(bit), (index, bit, count)


def test_a_real_pulse_shows_in_this_machines_own_processor_time() -> None:
    """The processor time that this process takes is a power meter of sorts; how sharp it is depends on what else the machine does."""
    samples: list[tuple[float, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            samples.append((time.monotonic(), time.process_time()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    over.wait(1.2)
    began_s = pulse.make_pulse(threads=1)
    over.wait(1.2)
    over.set()
    watcher.join()
    at_s, busy_s = np.asarray(samples).T
    times, watts = (at_s[1:] + at_s[:-1]) / 2, np.diff(busy_s) / np.diff(at_s)
    high = np.asarray([is_high(at - began_s) for at in times])
    assert watts[high].mean() > 3 * watts[~high].mean()
