"""`regrow measure power`, `baseline`, `align` and `fit`, with a pseudo-terminal for the meter and a database as the gateway's."""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cli import measure_power
from cli.energy import energy_of
from cli.main import FAILED, INTERRUPTED, MISUSED, main
from edge_agent.board import board_name
from edge_agent.energy.account import Energy
from edge_agent.energy.board_file import Calibration, read_board_file, write_board_file
from edge_agent.energy.external import SerialMeter
from regrow.errors import LocalError, UsageError
from regrow.observations import PowerSeen
from regrow.power_model import from_json
from regrow.pulse import is_high


@pytest.fixture
def meter() -> Iterator[str]:
    """--meter of a serial line on which 4.5 W are said fifty times a second."""
    theirs, ours = os.openpty()
    tty.setraw(theirs)
    os.set_blocking(theirs, False)
    over = threading.Event()

    def speak() -> None:
        while not over.wait(0.02):
            try:
                os.write(theirs, b"4.50 W\n")
            except BlockingIOError:  # nobody reads
                continue

    speaker = threading.Thread(target=speak)
    speaker.start()
    yield f"serial:{os.ttyname(ours)}:9600"
    over.set()
    speaker.join()
    os.close(theirs)
    os.close(ours)


def test_power_as_objects(meter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "power", "--meter", meter, "--seconds", "3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(row["seconds"] for row in rows) == pytest.approx(3.0, abs=0.5)
    known = [row for row in rows if row["watts"] is not None]
    assert known
    assert [row["watts"] for row in known] == pytest.approx([4.5] * len(known))
    last = known[-1]
    assert last["joules"] == pytest.approx(4.5 * last["measured_s"])
    assert (last["board"], last["certainty"]) == (board_name(), "measured")
    assert last["overhead"] < 0.5


def test_power_in_words_and_why_there_is_none(meter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "power", "--meter", meter, "--seconds", "3"]) == 0
    assert "4.50 W; " in capsys.readouterr().out
    assert main(["measure", "power", "--meter", "none", "--seconds", "2.5"]) == FAILED
    said = capsys.readouterr()
    assert "unmeasured; no joules; " in said.out
    assert said.err == "regrow: nothing was measured: switched off: --meter none\n"


# ---- baseline ------------------------------------------------------------------------------------------------------------------------


def test_a_baseline_is_kept_beside_what_is_known(
    meter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_power, "LEAST_BASELINE_S", 2.0)
    file = tmp_path / "energy.json"
    words = ["measure", "baseline", "--meter", meter, "--seconds", "2", "--calibration", str(file)]
    assert main(words) == 0
    assert "4.500 W idle" in capsys.readouterr().out
    first = read_board_file(file, board_name())
    (name,) = first.baselines
    assert first.baselines[name].watts == pytest.approx(4.5)
    write_board_file(file, type(first)(board=first.board, calibrations={name: Calibration(gain=2.0, by="Ann", on="today")}))
    assert main(words) == 0
    again = read_board_file(file, board_name())
    assert again.baselines[name].watts == pytest.approx(9.0)
    assert again.calibrations[name].by == "Ann"


def test_ctrl_c_keeps_nothing(meter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(_: list[PowerSeen]) -> list[PowerSeen]:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure_power, "_next_second", pressed)
    assert main(["measure", "baseline", "--meter", meter, "--calibration", str(tmp_path / "energy.json")]) == INTERRUPTED
    assert not list(tmp_path.iterdir())


def seconds_of(count: int, watts: float | None, marked: str = "") -> list[PowerSeen]:
    certainty = "unmeasured" if watts is None else "measured"
    return [PowerSeen(float(at_s), 1.0, watts, "unplugged" if watts is None else "x", certainty, 50.0, marked) for at_s in range(count)]


def test_seconds_that_were_slowed_are_left_out_of_a_baseline() -> None:
    found = measure_power.baseline_of([*seconds_of(30, 2.0), *seconds_of(30, 2.2), *seconds_of(5, 9.0, "throttled")], 60.0, "")
    assert (found.watts, found.seconds, found.marked_s, found.temperature_c) == (pytest.approx(2.1), 60.0, 5.0, 50.0)
    assert 1.9 < found.low_w < 2.1 < found.high_w < 2.3


@pytest.mark.parametrize(
    ("rows", "unknown", "why"),
    [
        (seconds_of(50, 2.0) + seconds_of(10, None), "unplugged", "only 50 of 60 s were measured undisturbed: unplugged; nothing was kept"),
        (seconds_of(20, 2.0) + seconds_of(40, 2.0, "under-voltage"), "", "only 20 of 60 s .*: under-voltage"),
        ([], "", "only 0 of 60 s"),
    ],
)
def test_too_little_is_no_baseline(rows: list[PowerSeen], unknown: str, why: str) -> None:
    with pytest.raises(LocalError, match=why):
        measure_power.baseline_of(rows, 60.0, unknown)


def test_without_a_meter_nobody_waits_a_minute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "baseline", "--meter", "none", "--calibration", str(tmp_path / "energy.json")]) == FAILED
    assert "nothing to measure with: switched off" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- pulse ---------------------------------------------------------------------------------------------------------------------------


def trace(file: Path, began_s: float, head: str = "time,power\n") -> Path:
    rng = np.random.default_rng(1)
    lines = [f"{at_s:.3f},{2 + 3 * is_high(at_s - began_s) + rng.normal(0, 0.1):.3f},extra\n" for at_s in np.arange(1000.0, 1040.0, 0.1)]
    file.write_text(head + "".join(lines))
    return file


def test_the_offset_of_a_meters_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trace(tmp_path / "meter.csv", 1013.2)
    assert main(["measure", "align", str(file), "--pulse-s", "1000.0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["offset_s"] == pytest.approx(13.2, abs=0.1)
    assert found["rise_w"] == pytest.approx(3.0, rel=0.2)
    assert main(["measure", "align", str(file), "--pulse-s", "1020.0"]) == 0
    assert "s behind the device's" in capsys.readouterr().out


def test_a_trace_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trace(tmp_path / "meter.csv", 1013.2, "1,2\n\nnothing,here\n")
    assert main(["measure", "align", str(file), "--pulse-s", "1"]) == MISUSED
    assert f"{file}:3: 'nothing,here' is not `seconds,watts`" in capsys.readouterr().err
    file.write_bytes(b"\xff\xfe\x00")
    assert main(["measure", "align", str(file), "--pulse-s", "1"]) == MISUSED


def test_a_pulse_says_when_it_began(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(measure_power, "make_pulse", measure_power.time.monotonic)
    before_s = measure_power.time.time()
    assert main(["measure", "pulse", "--json"]) == 0
    assert before_s - 1 < json.loads(capsys.readouterr().out)["began_s"] < before_s + 60
    assert main(["measure", "pulse"]) == 0
    assert "--pulse-s " in capsys.readouterr().out


# ---- model ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A gateway's folder that has observed four devices; one of them was throttled, one has another meter."""
    (tmp_path / "runs" / ".gateway").mkdir(parents=True)
    rng = np.random.default_rng(2)
    with sqlite3.connect(tmp_path / "runs" / ".gateway" / "observations.sqlite") as database:
        database.execute(
            "CREATE TABLE phases(device TEXT, at_s REAL, seconds REAL, phase TEXT, joules REAL, meter TEXT, certainty TEXT, run TEXT, "
            "number INTEGER, density REAL, steps INTEGER, low_j REAL, high_j REAL, marked TEXT, received_s REAL)"
        )
        database.execute(
            "CREATE TABLE power(device TEXT, at_s REAL, seconds REAL, watts REAL, meter TEXT, certainty TEXT, temperature_c REAL, "
            "marked TEXT, received_s REAL)"
        )
        phase = "INSERT INTO phases VALUES (?, ?, 20.0, ?, ?, ?, ?, 'r', 1, 0.5, 40, NULL, NULL, ?, 0)"
        for unit in ("a", "b", "c"):
            own = rng.normal(0, 0.05)
            for index in range(20):
                at_s, kind = 1000.0 + 20 * index, ("idle", "train")[index % 2]
                watts = {"idle": 2.0, "train": 5.0}[kind] + own + rng.normal(0, 0.02)
                database.execute(phase, (unit, at_s, kind, 20 * watts, "ina219 hwmon2", "measured", ""))
                database.execute("INSERT INTO power VALUES (?, ?, 20, ?, 'x', 'measured', 55.0, '', 0)", (unit, at_s + 19, watts))
            database.execute(phase, (unit, 5000.0, "train", 20 * 50.0, "ina219 hwmon2", "measured", "throttled"))
            database.execute(phase, (unit, 5100.0, "train", None, "unplugged", "unmeasured", ""))
            database.execute(phase, (unit, 5200.0, "train", 20 * 50.0, "model of pi", "modelled", ""))
        database.execute(phase, ("d", 1000.0, "train", 20 * 50.0, "rapl package", "estimated", ""))
    return tmp_path / "runs"


def test_a_model_from_what_the_gateway_has_observed(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["measure", "fit", "--board", "pi", "--out", str(tmp_path / "model.json"), "--runs", str(runs)]
    assert main(words) == MISUSED
    assert "meters of the kinds ina219, rapl; choose one with --kind" in capsys.readouterr().err
    assert main([*words, "--kind", "ina219"]) == 0
    said = capsys.readouterr().out
    model = from_json((tmp_path / "model.json").read_bytes())
    assert model.units == ["a", "b", "c"]
    assert model.phases["train"].watts == pytest.approx(5.0, abs=0.15)
    assert len(model.held_out) == 3
    assert "without c: " in said
    assert "20 of 20 stretches inside their interval" in said
    _, examples = measure_power.read_examples(runs / ".gateway" / "observations.sqlite", ["a"], None)
    assert {example.temperature_c for example in examples} == {55.0}
    assert main([*words, "--kind", "ina219", "--device", "a", "--device", "b"]) == FAILED
    assert "needs 3 measured units" in capsys.readouterr().err
    assert main([*words, "--device", "nobody"]) == MISUSED


def test_a_database_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "observations.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(LocalError, match="is it a gateway's"):
        measure_power.read_examples(tmp_path / "observations.sqlite", None, None)


# ---- the agent's -----------------------------------------------------------------------------------------------------------------------


def options(**said: object) -> argparse.Namespace:
    return argparse.Namespace(**{"meter": "none", "calibration": None, "power_model": None, "identity": None, **said})


def test_the_agents_energy(runs: Path, tmp_path: Path, meter: str) -> None:
    energy = energy_of(options(meter=meter), time.time, lambda _: None)
    assert isinstance(energy, Energy)
    assert isinstance(energy.meter, SerialMeter)
    energy.close()
    model = tmp_path / "model.json"
    main(["measure", "fit", "--board", "another-board", "--out", str(model), "--runs", str(runs), "--kind", "ina219"])
    with pytest.raises(UsageError, match="is a model of another-board, this board is"):
        energy_of(options(power_model=model), time.time, lambda _: None)
    main(["measure", "fit", "--board", board_name(), "--out", str(model), "--runs", str(runs), "--kind", "ina219"])
    energy_of(options(power_model=model), time.time, lambda _: None).close()
    with pytest.raises(UsageError, match="nothing unsealed is heard"):
        energy_of(options(meter="mqtt:home/plug", identity=tmp_path), time.time, lambda _: None)
