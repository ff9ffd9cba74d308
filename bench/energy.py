"""What does sampling cost: processor time of the sampling thread, for every meter, at 10 Hz?

Each meter is read as on a device: temperature and throttling once a second, integration, phases and a row a second beside it. Sensors are
trees of files as real boards show them (the same system calls, answered from memory instead of by a chip, whose own time is no processor
time), a pseudo-terminal, and a function in the place of the Raspberry Pi's firmware. RAPL is the machine's own where it has one. Phases
change every half second, as on a busy device. Run it from the root: `python -m bench.energy`.
"""

from __future__ import annotations

import argparse
import os
import struct
import tempfile
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.machine import write_result
from edge_agent.energy.account import Energy
from edge_agent.energy.battery import Battery
from edge_agent.energy.external import MqttMeter, SerialMeter
from edge_agent.energy.hwmon import Hwmon
from edge_agent.energy.ina3221 import Ina3221
from edge_agent.energy.ina_i2c import InaI2c
from edge_agent.energy.meter import Meter, NoMeter, Reading, Unmeasured
from edge_agent.energy.phases import Doing
from edge_agent.energy.pmic import Pmic
from edge_agent.energy.rapl import Rapl
from edge_agent.firmware import gencmd
from edge_agent.heat import Heat
from regrow.machine import Received
from regrow.observations import PowerSeen, Row
from tests.edge_agent.energy import boards
from tests.edge_agent.energy.boards import write

ROOT = Path(__file__).resolve().parent.parent
HZ = 10.0
LIMIT = 0.01
ORIN_ZONES = ("cpu", "gpu", "cv0", "cv1", "cv2", "soc0", "soc1", "soc2", "tj")


def tree(folder: Path) -> Path:
    """A board with every sensor, nine thermal zones and what else tells of throttling."""
    files = {**boards.AGX_ORIN, **boards.ZERO_WITH_INA219, **boards.BATTERY, **boards.LAPTOP, boards.PI_FLAGS: "0\n"}
    for number, zone in enumerate(ORIN_ZONES):
        folder_of = f"sys/class/thermal/thermal_zone{number}"
        files |= {f"{folder_of}/type": f"{zone}-thermal\n", f"{folder_of}/temp": "51000\n"}
    for number in range(8):
        device = f"sys/class/thermal/cooling_device{number}"
        files |= {f"{device}/type": "cpufreq-cpu0\n", f"{device}/cur_state": "0\n"}
        files |= {f"sys/devices/system/cpu/cpu{number}/thermal_throttle/{kind}_throttle_count": "0\n" for kind in ("core", "package")}
    files |= {f"sys/class/hwmon/hwmon6/oc{number}_event_cnt": "0\n" for number in (1, 2, 3)}
    return write(folder, files)


def run(meter: Meter, root: Path, seconds: float) -> dict[str, Any]:
    """One meter for so long; what it cost. One on a topic hears something twice a second."""
    rows: list[Row] = []
    energy = Energy(meter, rows.append, heat=Heat(root))
    energy.record(HZ)
    energy.start()
    began_s = time.monotonic()
    turn = 0
    while time.monotonic() - began_s < seconds:
        energy.step(Received("home/plug", b'{"apower": 4.5}'), time.monotonic())
        energy._say(Doing(frozenset({("train", "transmit")[turn % 2]}), "run", turn + 1, 40, 0.5), time.monotonic())  # type: ignore[arg-type]
        turn += 1
        time.sleep(0.5)
    overhead = energy.overhead
    energy.close()
    known = [row for row in rows if isinstance(row, PowerSeen) and row.watts is not None]
    return {
        "meter": meter.name,
        "share_of_a_core": round(overhead, 5),
        "rows": len(rows),
        "measured_s": round(sum(row.seconds for row in known), 1),
    }


@contextmanager
def counting(root: Path) -> Iterator[None]:
    """Lets the RAPL counter of the tree run, over its end."""
    descriptor = os.open(root / "sys/class/powercap/intel-rapl:0/energy_uj", os.O_WRONLY)
    over, began_s = threading.Event(), time.monotonic()

    def count() -> None:
        while not over.wait(0.02):
            microjoules = (262_143_000_000 + int(8e6 * (time.monotonic() - began_s))) % 262_143_328_850
            os.pwrite(descriptor, b"%012d\n" % microjoules, 0)

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    yield
    over.set()
    counter.join()
    os.close(descriptor)


class Together:
    """All meters read one after the other, as no device does."""

    name, certainty, gap_s, most_hz = "all of them in one thread", "measured", 1.0, 100.0

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = meters

    def read(self) -> Reading:
        first, *_ = [meter.read() for meter in self._meters]
        return first

    def close(self) -> None:
        for meter in self._meters:
            meter.close()


def registers(folder: Path) -> Callable[[int], bytes]:
    """Two system calls for a register, as on a bus."""
    descriptor = os.open(folder / "registers", os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, struct.pack(">3H", 0, 2000, 1250 << 3), 0)

    def transfer(register: int) -> bytes:
        os.lseek(descriptor, 2 * register, os.SEEK_SET)
        return os.read(descriptor, 2)

    return transfer


def answers(_: int, __: int, buffer: bytearray) -> None:
    buffer[24 : 24 + len(boards.PMIC)] = boards.PMIC.encode()


@contextmanager
def speaking() -> Iterator[Path]:
    """A serial line on which a meter says a line twenty times a second."""
    theirs, ours = os.openpty()
    tty.setraw(theirs)
    os.set_blocking(theirs, False)
    over = threading.Event()

    def speak() -> None:
        while not over.wait(0.05):
            with suppress(BlockingIOError):
                os.write(theirs, b"4.50 W\r\n")

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    yield Path(os.ttyname(ours))
    over.set()
    speaker.join()
    os.close(theirs)
    os.close(ours)


def measure(seconds: float) -> list[dict[str, Any]]:
    """Every meter, one after the other, and all of them."""
    with tempfile.TemporaryDirectory() as name, speaking() as line:
        root = tree(Path(name))
        makers: list[Callable[[], Meter]] = [
            lambda: Ina3221(root),
            lambda: Hwmon(root),
            lambda: InaI2c("ina219", registers(root), "1:0x40"),
            lambda: Pmic(lambda command: gencmd(0, command, answers)),
            lambda: Battery(root),
            lambda: Rapl(root),
            lambda: SerialMeter(line),
            lambda: MqttMeter("home/plug"),
        ]
        with counting(root):
            results = [run(make(), root, seconds) for make in makers]
            results += [run(Together([make() for make in makers]), root, seconds), run(NoMeter("no meter here"), root, seconds)]
    if Path("/sys/class/powercap/intel-rapl:0").exists() and not isinstance(Rapl(Path("/")).read(), Unmeasured):
        results.append({**run(Rapl(Path("/")), Path("/"), seconds), "meter": "rapl of this machine"})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each meter (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "energy.json", help="where the JSON goes")
    arguments = parser.parse_args()
    results = measure(arguments.seconds)
    for result in results:
        print(f"{result['meter']:45} {result['share_of_a_core']:.3%} of a core, {result['measured_s']} s measured")
    worst = max(result["share_of_a_core"] for result in results)
    command = f"python -m bench.energy --seconds {arguments.seconds:g}"
    write_result(arguments.out, {"command": command, "hz": HZ, "limit": LIMIT, "worst": worst, "meters": results})


if __name__ == "__main__":
    main()
