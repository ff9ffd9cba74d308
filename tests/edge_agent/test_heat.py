"""What slows a board, from trees of real ones: only what does so now is marked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.heat import Condition, Heat, pi_flags
from tests.edge_agent.energy import boards
from tests.edge_agent.energy.boards import write


def test_the_hottest_zone_and_a_fan_that_slows_nothing(tmp_path: Path) -> None:
    heat = Heat(write(tmp_path, boards.HEAT))
    assert heat.look() == Condition(52.1, ())
    write(tmp_path, {"sys/class/thermal/thermal_zone1/temp": "60000\n", "sys/class/thermal/thermal_zone0/temp": "-273000\n"})
    assert heat.look() == Condition(60.0, ())
    heat.close()


def test_a_board_that_tells_nothing(tmp_path: Path) -> None:
    assert Heat(tmp_path).look() == Condition(None, ())
    assert pi_flags(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("0\n", ()),
        ("50000\n", ()),  # since the start, but not now
        ("1\n", ("under-voltage",)),
        ("d000f\n", ("under-voltage", "frequency capped", "throttled", "at the soft temperature limit")),
        ("", ()),
        ("garbage\n", ()),
    ],
)
def test_the_flags_of_a_pi(tmp_path: Path, text: str, marks: tuple[str, ...]) -> None:
    assert Heat(write(tmp_path, {boards.PI_FLAGS: text})).look().marks == marks


def test_cooling_by_running_slower(tmp_path: Path) -> None:
    files = {"sys/class/thermal/cooling_device1/type": "cpufreq-cpu0\n", "sys/class/thermal/cooling_device1/cur_state": "3\n"}
    assert Heat(write(tmp_path, {**boards.HEAT, **files})).look().marks == ("throttled",)


def test_over_current_and_thermal_throttling_count_when_they_happen(tmp_path: Path) -> None:
    over = "sys/class/hwmon/hwmon6/oc1_event_cnt"
    slow = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    heat = Heat(write(tmp_path, {over: "7\n", slow: "120\n"}))
    assert heat.look().marks == ()  # long ago
    write(tmp_path, {over: "8\n"})
    assert heat.look().marks == ("over-current",)
    write(tmp_path, {slow: "121\n"})
    assert heat.look().marks == ("throttled",)
    write(tmp_path, {slow: "121 or so\n"})
    assert heat.look().marks == ()
    heat.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80), name=st.sampled_from([*boards.HEAT, boards.PI_FLAGS]))
def test_any_file_gives_a_condition(tmp_path: Path, content: bytes, name: str) -> None:
    write(tmp_path, {**boards.HEAT, boards.PI_FLAGS: "0\n"})
    (tmp_path / name).write_bytes(content)
    heat = Heat(tmp_path)
    condition = heat.look()
    heat.close()
    assert condition.temperature_c is None or -40 < condition.temperature_c < 150
