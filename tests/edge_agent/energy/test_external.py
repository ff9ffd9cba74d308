"""Meters that speak by themselves: a real pseudo-terminal stands for the serial line."""

from __future__ import annotations

import os
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.energy.external import SILENT_S, MqttMeter, SerialMeter, watts_in
from edge_agent.energy.meter import MOST_W, Unmeasured, Watts
from regrow.errors import LocalError


@pytest.mark.parametrize(
    ("text", "expected_w"),
    [
        ("4.52", 4.52),
        (" 4.52 W\r", 4.52),
        ("P=4520mW", 4.52),
        ("power: 0.004 kW", 4.0),
        ('{"watts": 4.5}', 4.5),
        ('{"id":0,"apower":7.25,"voltage":230.1}', 7.25),  # a Shelly
        ('{"Time":"2026-11-21T10:00:00","ENERGY":{"Total":3.1,"Power":12,"Voltage":231}}', 12.0),  # a Tasmota
    ],
)
def test_what_meters_say(text: str, expected_w: float) -> None:
    assert watts_in(text) == pytest.approx(expected_w)


@pytest.mark.parametrize(
    "text", ["", "on", "5.1,0.9,4.6", "nan", "inf", "4.5 A", "{", '{"power": "4"}', '{"power": true}', "[4]", "{}", "0x10"]
)
def test_what_is_no_number_of_watts(text: str) -> None:
    with pytest.raises(LocalError):
        watts_in(text)


@given(st.binary(max_size=300))
def test_any_payload_gives_a_reading_or_a_reason(payload: bytes) -> None:
    meter = MqttMeter("t", lambda: 1.0)
    meter.hear(payload, 1.0)
    reading = meter.read()
    assert (isinstance(reading, Unmeasured) and reading.reason) or (isinstance(reading, Watts) and 0 < reading.watts <= MOST_W)


def test_a_topic_holds_its_value_until_it_is_silent_for_too_long() -> None:
    now = [100.0]
    meter = MqttMeter("home/plug", lambda: now[0])
    assert meter.read() == Unmeasured("home/plug: has said nothing yet")
    meter.hear(b"5.5", 101.0)
    now[0] = 102.0
    assert meter.read() == Watts(5.5, 101.0)
    now[0] = 101.0 + SILENT_S + 1
    assert meter.read() == Unmeasured("home/plug: silent for 16 s")
    meter.hear(b"-3", now[0])
    assert "negative" in str(meter.read())


@pytest.fixture
def line() -> Iterator[tuple[int, Path]]:
    """(the meter's end, the path of ours)."""
    theirs, ours = os.openpty()
    tty.setraw(theirs)
    yield theirs, Path(os.ttyname(ours))
    for descriptor in (theirs, ours):
        os.close(descriptor)


def test_lines_from_a_serial_meter(line: tuple[int, Path]) -> None:
    theirs, path = line
    now = [10.0]
    meter = SerialMeter(path, 9600, lambda: now[0])
    assert "has said nothing yet" in str(meter.read())
    os.write(theirs, b"52\r\n4.5")  # we came in the middle of "12.52"
    assert "has said nothing yet" in str(meter.read())
    os.write(theirs, b"0 W\r\n4.60 W\r\n4.")
    assert meter.read() == Watts(4.6, 10.0)
    now[0] = 11.0
    assert meter.read() == Watts(4.6, 10.0)
    os.write(theirs, b"7 W\r\n")
    assert meter.read() == Watts(4.7, 11.0)
    os.write(theirs, b"Err\r\n")
    assert "'Err' is no number of watts" in str(meter.read())
    now[0] = 40.0
    os.write(theirs, b"4.8\n")
    assert meter.read() == Watts(4.8, 40.0)
    now[0] = 60.0
    assert "silent for 20 s" in str(meter.read())
    os.write(theirs, b"x" * 4200)
    meter.read()
    assert "sends no lines: 4096 bytes without an end of line; check its speed in baud" in str(meter.read())
    os.write(theirs, b"\n4.9\n")
    assert meter.read() == Watts(4.9, 60.0)
    meter.close()


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=60) | st.sampled_from([b"4.5 W\n", b"\r\n", b"-1\n", b"0\n", b"1e9\n", b"4.\n"]), max_size=8))
def test_any_bytes_on_the_line_give_a_reading_or_a_reason(said: list[bytes]) -> None:
    theirs, ours = os.openpty()
    tty.setraw(theirs)
    meter = SerialMeter(Path(os.ttyname(ours)))
    meter.read()
    for data in said:
        os.write(theirs, data)
        reading = meter.read()
        assert (isinstance(reading, Unmeasured) and reading.reason) or (isinstance(reading, Watts) and 0 < reading.watts <= MOST_W)
    os.close(theirs)
    assert isinstance(meter.read(), Unmeasured)  # unplugged
    meter.close()
    os.close(ours)


def test_a_serial_meter_that_is_not_there_yet(tmp_path: Path) -> None:
    meter = SerialMeter(tmp_path / "ttyUSB0")
    assert "No such file or directory; plug the meter in" in str(meter.read())
    (tmp_path / "ttyUSB0").write_text("4.5\n")
    assert "plug the meter in" in str(meter.read())  # no terminal
    with pytest.raises(LocalError, match="1234 baud is no speed"):
        SerialMeter(tmp_path / "ttyUSB0", 1234)
