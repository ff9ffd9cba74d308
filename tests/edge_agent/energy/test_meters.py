"""Every meter against trees of real boards, and against whatever else could stand there: a reading, or why there is none."""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent import firmware
from edge_agent.energy.battery import Battery
from edge_agent.energy.choose import meter_or_why, open_meter
from edge_agent.energy.external import MqttMeter, SerialMeter
from edge_agent.energy.hwmon import Hwmon
from edge_agent.energy.ina3221 import Ina3221
from edge_agent.energy.ina_i2c import CHIPS, InaI2c, open_chip
from edge_agent.energy.meter import MOST_W, Joules, Meter, Reading, Unmeasured, Watts
from edge_agent.energy.pmic import Pmic, watts_of
from edge_agent.energy.rapl import Rapl
from regrow.errors import LocalError, UsageError
from tests.edge_agent.energy import boards
from tests.edge_agent.energy.boards import write


def watts(meter: Meter) -> float:
    reading = meter.read()
    meter.close()
    assert isinstance(reading, Watts), reading
    return reading.watts


def why(meter: Meter) -> str:
    reading = meter.read()
    meter.close()
    assert isinstance(reading, Unmeasured), reading
    return reading.reason


# ---- boards --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "name", "expected_w"),
    [
        (boards.ORIN_NANO, "ina3221 VDD_IN", 5.032 * 0.976),  # not with its sub-rails, which would be 44 % more
        (boards.NANO, "ina3221 POM_5V_IN", 2.5),
        (boards.AGX_ORIN, "ina3221 VDD_CPU_CV+VDD_GPU_SOC+VIN_SYS_5V0", 19 * 0.17 + 5.032 * 0.6),
        (boards.AGX_XAVIER, "ina3221 CPU+CV+GPU+SOC+SYS5V+VDDRQ", 19 * 0.11 + 2.0),
    ],
)
def test_a_jetsons_total(tmp_path: Path, files: dict[str, str], name: str, expected_w: float) -> None:
    meter = Ina3221(write(tmp_path, files))
    assert (meter.name, meter.certainty) == (name, "measured")
    assert watts(meter) == pytest.approx(expected_w)


def test_a_jetson_whose_total_nobody_knows_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="VDD_CPU_GPU_CV, VDD_SOC: none is known to be the board's total"):
        Ina3221(write(tmp_path, boards.ina3221("1-0040", "hwmon3", [("VDD_CPU_GPU_CV", 5000, 1), ("VDD_SOC", 5000, 1)])))


def test_one_rail_of_a_sum_that_is_missing_leaves_all_unmeasured(tmp_path: Path) -> None:
    meter = Ina3221(write(tmp_path, boards.AGX_ORIN))
    (tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr3_input").unlink()
    assert "curr3_input: No such file" in why(meter)


def test_an_ina_in_the_supply(tmp_path: Path) -> None:
    write(tmp_path, boards.ZERO_WITH_INA219)
    assert watts(Hwmon(tmp_path)) == 1.08
    (tmp_path / "sys/class/hwmon/hwmon2/power1_input").unlink()
    assert watts(Hwmon(tmp_path, "hwmon2")) == pytest.approx(5.108 * 0.212)
    with pytest.raises(LocalError, match="hwmon0 is no INA2xx; there are hwmon2"):
        Hwmon(tmp_path, "hwmon0")
    write(tmp_path, {"sys/class/hwmon/hwmon5/name": "ina226\n"})
    with pytest.raises(LocalError, match=r"several power chips \(hwmon2, hwmon5\): name the one"):
        Hwmon(tmp_path)


def test_a_chip_wired_the_other_way_round_is_not_zero(tmp_path: Path) -> None:
    write(tmp_path, {**boards.ZERO_WITH_INA219, "sys/class/hwmon/hwmon2/power1_input": "-1080000\n"})
    assert "negative, so it is wired the other way round" in why(Hwmon(tmp_path))
    write(tmp_path, {"sys/class/hwmon/hwmon2/power1_input": "0\n"})
    assert why(Hwmon(tmp_path)) == "says 0 W, which no running device draws"


def test_a_battery_only_while_it_feeds_the_device(tmp_path: Path) -> None:
    meter = Battery(write(tmp_path, boards.BATTERY))
    assert meter.name == "battery BAT0"  # the mouse's is none of ours
    assert watts(meter) == pytest.approx(9.69)
    write(tmp_path, {"sys/class/power_supply/BAT0/power_now": "-9100000\n"})  # as some drivers count
    assert watts(Battery(tmp_path)) == 9.1
    for status in ("Charging", "Full", "Not charging"):
        write(tmp_path, {"sys/class/power_supply/BAT0/status": f"{status}\n"})
        assert f"{status.lower()}, so what the device draws comes from the charger" in why(Battery(tmp_path))
    write(tmp_path, {"sys/class/power_supply/BAT0/status": ""})
    assert "so it may be charging" in why(Battery(tmp_path))


def test_rapl_counts_packages_and_takes_a_wrap_out(tmp_path: Path) -> None:
    meter = Rapl(write(tmp_path, boards.LAPTOP))
    assert (meter.name, meter.certainty) == ("rapl package", "estimated")
    assert meter.read() == Joules(0.0)
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "671150\n"})  # 328 850 to the end, and these
    assert meter.read() == Joules(1.0)
    write(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "2671150\n"})
    assert meter.read() == Joules(3.0)
    meter.close()


def test_rapl_of_two_packages(tmp_path: Path) -> None:
    second = {f"sys/class/powercap/intel-rapl:2/{name}": text for name, text in (("name", "package-1\n"), ("energy_uj", "5\n"))}
    meter = Rapl(write(tmp_path, {**boards.LAPTOP, **second, "sys/class/powercap/intel-rapl:2/max_energy_range_uj": "100\n"}))
    assert meter.read() == Joules(0.0)
    write(tmp_path, {"sys/class/powercap/intel-rapl:2/energy_uj": "2\n"})
    assert meter.read() == Joules(97e-6)
    meter.close()


def test_rapl_for_root_only_says_so(tmp_path: Path) -> None:
    file = write(tmp_path, boards.LAPTOP) / "sys/class/powercap/intel-rapl:0/energy_uj"
    file.chmod(0)
    meter = Rapl(tmp_path)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65_534)
    try:
        assert "only root may read energy_uj" in why(meter)
    finally:
        if root:
            os.seteuid(0)


def test_after_a_failure_rapl_counts_anew(tmp_path: Path) -> None:
    """It may have wrapped meanwhile, who knows how often."""
    file = write(tmp_path, boards.LAPTOP) / "sys/class/powercap/intel-rapl:0/energy_uj"
    meter = Rapl(tmp_path)
    assert meter.read() == Joules(0.0)
    file.write_text("")
    assert isinstance(meter.read(), Unmeasured)
    file.write_text("7000000\n")
    assert meter.read() == Joules(0.0)
    meter.close()


def test_the_power_chip_of_a_pi_5() -> None:
    meter = Pmic(lambda command: boards.PMIC if command == "pmic_read_adc" else "")
    assert meter.certainty == "estimated"
    assert watts(meter) == pytest.approx(boards.pmic_watts())
    assert 1.5 < boards.pmic_watts() < 3  # a Pi 5 at rest


@pytest.mark.parametrize("length", range(0, len(boards.PMIC) - 100, 37))
def test_a_torn_answer_of_the_power_chip_is_no_smaller_power(length: int) -> None:
    assert why(Pmic(lambda _: boards.PMIC[:length]))


def test_the_firmware_is_asked_as_vcgencmd_does() -> None:
    asked = []

    def ioctl(descriptor: int, request: int, buffer: bytearray) -> None:
        asked.append((descriptor, request, struct.unpack_from("<6I", buffer), bytes(buffer[24:38])))
        assert struct.unpack_from("<I", buffer)[0] == len(buffer)
        buffer[24 : 24 + len(boards.PMIC)] = boards.PMIC.encode()

    assert firmware.gencmd(7, "pmic_read_adc", ioctl) == boards.PMIC
    assert asked == [(7, 0xC0086400, (4 * 7 + 4096, 0, 0x00030080, 4096, 0, 0), b"pmic_read_adc\0")]


def test_a_firmware_that_refuses_says_so() -> None:
    def refuses(_descriptor: int, _request: int, buffer: bytearray) -> None:
        struct.pack_into("<I", buffer, 20, 1)

    with pytest.raises(LocalError, match="refuses pmic_read_adc: error 1"):
        firmware.gencmd(7, "pmic_read_adc", refuses)
    with pytest.raises(LocalError, match="no Raspberry Pi firmware"):
        firmware.Firmware(Path("/nowhere"))


# ---- I2C -----------------------------------------------------------------------------------------------------------------------------


def chip(name: str, bus: int, current: int, shunt_ohm: float = 0.1) -> InaI2c:
    return InaI2c(name, lambda register: struct.pack(">H", {1: current & 0xFFFF, 2: bus}[register]), "1:0x40", shunt_ohm)


@pytest.mark.parametrize(
    ("meter", "expected_w"),
    [
        (chip("ina219", 1250 << 3 | 2, 2000), 5.0 * 0.2),  # 5 V; 20 mV over 0.1 ohm
        (chip("ina226", 4000, 8000), 5.0 * 0.2),
        (chip("ina226", 4000, 8000, 0.002), 5.0 * 10),
        (chip("ina260", 4000, 160), 5.0 * 0.2),
    ],
)
def test_the_registers_of_a_chip(meter: InaI2c, expected_w: float) -> None:
    assert watts(meter) == pytest.approx(expected_w)


def test_registers_that_say_nothing_to_count_on() -> None:
    assert "negative" in why(chip("ina226", 4000, -8000))
    assert "end of its range" in why(chip("ina226", 4000, 0x7FFF))
    assert "overflow" in why(chip("ina219", 1250 << 3 | 3, 2000))
    assert "1 bytes of register 2" in why(InaI2c("ina260", lambda _: b"\0", "1:0x40"))

    def gone(_: int) -> bytes:
        raise OSError(121, "Remote I/O error")

    assert why(InaI2c("ina260", gone, "1:0x40")) == "the sensor: Remote I/O error"


def test_an_i2c_bus_that_is_absent_or_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LocalError, match="No such file or directory; enable I2C"):
        open_chip(tmp_path, 1, 0x40, "ina219", 0.1)
    write(tmp_path, {"dev/i2c-1": ""})

    def taken(_: int, request: int, address: int) -> None:
        assert (request, address) == (0x0703, 0x40)
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(fcntl, "ioctl", taken)
    with pytest.raises(LocalError, match="busy; if a kernel driver has it, --meter hwmon reads it"):
        open_meter("i2c:1:0x40:ina219", tmp_path)


# ---- choosing ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({**boards.ORIN_NANO, **boards.ZERO_WITH_INA219}, "ina3221 VDD_IN"),
        ({**boards.LAPTOP, **boards.ZERO_WITH_INA219}, "ina219 hwmon2"),
        ({**boards.LAPTOP, **boards.BATTERY}, "rapl package"),
        (boards.BATTERY, "battery BAT0"),
        ({}, "unmeasured"),
    ],
)
def test_auto_takes_the_best_that_is_there(tmp_path: Path, files: dict[str, str], name: str) -> None:
    meter = open_meter("auto", write(tmp_path, files))
    assert meter.name == name
    meter.close()


def test_auto_prefers_what_speaks_and_else_keeps_what_may_speak_later(tmp_path: Path) -> None:
    write(tmp_path, {**boards.LAPTOP, **boards.BATTERY, "sys/class/powercap/intel-rapl:0/energy_uj": ""})
    meter = open_meter("auto", tmp_path)
    assert meter.name == "battery BAT0"
    meter.close()
    write(tmp_path, {"sys/class/power_supply/BAT0/status": "Charging\n"})
    meter = open_meter("auto", tmp_path)
    assert meter.name == "rapl package"
    assert "is empty" in why(meter)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "rapl:0",
        "volts",
        "i2c",
        "i2c:1",
        "i2c:1:0x40",
        "i2c:1:0x99:ina219",
        "i2c:1:0x40:ina3221",
        "i2c:1:0x40:ina219:0",
        "mqtt:a/#",
        "auto:x",
    ],
)
def test_a_meter_that_is_none_is_refused(said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--meter {said}"):
        meter_or_why(said, tmp_path)


def test_a_named_meter_that_is_not_there_leaves_the_device_at_work(tmp_path: Path) -> None:
    assert why(meter_or_why("ina3221", tmp_path)) == "no INA3221 with labelled rails"
    assert why(meter_or_why("none", tmp_path)) == "switched off: --meter none"
    assert isinstance(open_meter("serial:/dev/ttyUSB0:9600", tmp_path), SerialMeter)
    assert isinstance(open_meter("mqtt:regrow/v1/device/pi/watts", tmp_path), MqttMeter)


# ---- whatever stands there -------------------------------------------------------------------------------------------------------------

CONTENTS = st.one_of(
    st.binary(max_size=80),
    st.integers(-(2**70), 2**70).map(lambda number: f"{number}\n".encode()),
    st.sampled_from([b"", b"\n", b"-1\n", b"0\n", b"nan\n", b"1e9\n", b"12.5\n", b"0x10\n", b"99999999999999999\n", b"\xff\xfe", b"5 5\n"]),
)
NOTHING, FOLDER = "nothing", "folder"


def plausible(reading: Reading) -> bool:
    """A number that a device may draw, or a reason; never 0, never an exception."""
    if isinstance(reading, Unmeasured):
        return bool(reading.reason)
    return 0 < reading.watts <= MOST_W if isinstance(reading, Watts) else reading.joules >= 0


@pytest.mark.parametrize(
    ("make", "files"),
    [
        (Ina3221, boards.ORIN_NANO),
        (Ina3221, boards.AGX_ORIN),
        (Hwmon, boards.ZERO_WITH_INA219),
        (Battery, boards.BATTERY),
        (Rapl, boards.LAPTOP),
    ],
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_files_give_a_reading_or_a_reason(make: Callable[[Path], Meter], files: dict[str, str], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder), files)
        try:
            meter = make(root)
        except LocalError:
            pytest.fail("the board itself must do")
        try:
            for _ in range(3):
                _spoil(
                    root,
                    data.draw(st.dictionaries(st.sampled_from(sorted(files)), CONTENTS | st.sampled_from([NOTHING, FOLDER]), max_size=4)),
                )
                assert plausible(meter.read())
        finally:
            meter.close()
        _opens_or_says_why(make, root)


def _spoil(root: Path, changes: dict[str, bytes | str]) -> None:
    for name, content in changes.items():
        path = root / name
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == FOLDER:
            path.mkdir()


def _opens_or_says_why(make: Callable[[Path], Meter], root: Path) -> None:
    try:
        meter = make(root)
    except LocalError:
        return
    assert len(meter.name) <= 64
    assert plausible(meter.read())
    meter.close()


@settings(max_examples=60)
@given(start=st.integers(0, 999_999), grown=st.lists(st.integers(0, 999_999), max_size=30))
def test_whatever_a_counter_wraps_at_its_joules_add_up(start: int, grown: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder), {**boards.LAPTOP, "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "1000000\n"})
        file, meter = root / "sys/class/powercap/intel-rapl:0/energy_uj", Rapl(root)
        file.write_text(f"{start}\n")
        assert meter.read() == Joules(0.0)
        now, total = start, 0
        for more in grown:
            now, total = (now + more) % 1_000_000, total + more
            file.write_text(f"{now}\n")
            assert meter.read() == Joules(total / 1e6)
        meter.close()


@given(text=st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_any_answer_of_the_firmware(text: str) -> None:
    assert plausible(Pmic(lambda _: text).read())


@given(data=st.data())
def test_a_spoilt_answer_of_the_firmware(data: st.DataObject) -> None:
    at, length = data.draw(st.integers(0, len(boards.PMIC))), data.draw(st.integers(0, 60))
    text = boards.PMIC[:at] + data.draw(st.text("0123456789.-AV=()\n ", max_size=30)) + boards.PMIC[at + length :]
    assert plausible(Pmic(lambda _: text).read())


def test_what_the_firmware_says_of_negative_rails() -> None:
    with pytest.raises(LocalError, match="negative at VDD_CORE"):
        watts_of(boards.PMIC.replace("current(7)=0.7", "current(7)=-0.7"))


@given(name=st.sampled_from(sorted(CHIPS)), answers=st.lists(st.binary(max_size=3), min_size=2, max_size=2), ohm=st.floats(1e-5, 100))
def test_any_registers(name: str, answers: list[bytes], ohm: float) -> None:
    replies: Iterator[bytes] = iter(answers)
    assert plausible(InaI2c(name, lambda _: next(replies), "1:0x40", ohm).read())
