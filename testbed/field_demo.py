"""A field test without a field: five agents behind shaped, changing links, three methods, one report. As root, in ten minutes:

    sudo .venv/bin/python -m testbed.field_demo --out docs/field-demo

Every agent runs in a network namespace of its own and reaches the gateway's mosquitto through a link of a known rate, which changes while
it trains. Everything else is what a person does outdoors: `regrow device add`, `regrow agent`, `regrow field plan`, `run` and `report`.
What the devices took their uplinks for is drawn beside what the links were. Needs Debian's iproute2, nftables and mosquitto.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from broker_server.observations import open_observations
from broker_server.stopping import ending_with_parent
from edge_agent.board import board_name
from export.models import watch_cnn
from export.task import save_model
from regrow.errors import LocalError
from regrow.observations import Phase
from regrow.power_model import PhasePower, PowerModel
from testbed.namespaces import HUB_ADDRESS, Namespaces, Spot
from testbed.watch import write_device_files

ROOT = Path(__file__).resolve().parent.parent
PORT = 1883  # in a namespace of its own
GOODPUT = 1448 / 1514  # of a full frame: what is not headers of Ethernet, IP and TCP with timestamps
LEAD_S = 4.0
DOWN_PER_UP = 4
# One machine's meter cannot tell five agents apart, so their joules are modelled, and labelled so. These watts are assumed, not
# measured: about those of a Pi 4, with a tenth between units.
WATTS: dict[Phase, float] = {"idle": 2.7, "train": 4.6, "transmit": 3.1, "receive": 3.1}
UNITS = 10
TASK = """name = "orchard"
[method]
name = "fedgmr"
[training]
local_steps = 40
batch = 20
learning_rate = 0.1
[wire]
up = "int8"
[fleet]
min_devices = 5
join_s = 0
heartbeat_s = 2
[restoration]
trigger = "mixed"
planned_s = {planned_s:g}
"""


@dataclass(frozen=True, slots=True)
class Course:
    """A device's uplink: wire rates, and from when on in each run each holds; 0 bit/s is a cut."""

    name: str
    rates: tuple[tuple[float, float], ...]


def courses(run_s: float) -> tuple[Course, ...]:
    """Five links: two that stay, one that falls, one that rises, one that is cut for ten seconds."""
    half, third = run_s / 2, run_s / 3
    return (
        Course("hilltop", ((0.0, 4e6),)),
        Course("barn", ((0.0, 2e6), (half, 5e5))),
        Course("brook", ((0.0, 1e6), (third, 0.0), (third + 10.0, 1e6))),
        Course("hedge", ((0.0, 2.5e5), (half, 1e6))),
        Course("meadow", ((0.0, 2.5e5),)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("field-demo"), metavar="DIR", help="where the report goes (default: field-demo)")
    parser.add_argument("--run-s", type=float, default=80.0, metavar="S", help="seconds of each run (default: 80)")
    parser.add_argument("--baseline-s", type=float, default=8.0, metavar="S", help="seconds of stillness before each run (default: 8)")
    parser.add_argument("--repetitions", type=int, default=2, metavar="N", help="runs of each method (default: 2)")
    parser.add_argument("--methods", default="fedgmr,fedasync,fedavg", metavar="M,...", help="default: fedgmr,fedasync,fedavg")
    parser.add_argument("--data", type=Path, default=Path.home() / ".cache" / "regrow", metavar="DIR", help="where the watch data is kept")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep runs, logs and observations here")
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("field_demo: root is needed, for network namespaces; nothing outside of those that it makes is changed")
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nft", "nftables"), ("mosquitto", "mosquitto")):
        if shutil.which(program) is None:
            sys.exit(f"field_demo: {program} is not installed; on Debian: apt-get install {package}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is cleaned up
    try:
        with ExitStack() as stack:
            folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            field_test(stack, options, folder)
    except LocalError as error:
        sys.exit(f"field_demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def field_test(stack: ExitStack, options: argparse.Namespace, folder: Path) -> None:
    """Make the fleet, run the plan, write the report."""
    planned = courses(options.run_s)
    task = folder / "task"
    task.mkdir(exist_ok=True)
    (task / "task.toml").write_text(TASK.format(planned_s=0.42 * options.run_s))
    save_model(watch_cnn(1), task / "model.onnx")
    regrow(folder, "task", "build", "task")
    (folder / "power.json").write_bytes(assumed_power().to_json())
    for course, data in zip(planned, paired(options.data, folder), strict=True):
        regrow(folder, "device", "add", course.name, "--broker", f"mqtt://{HUB_ADDRESS}:{PORT}")
        data.replace(folder / f"{course.name}.npz")
    words = ["--task", "task", "--devices", ",".join(course.name for course in planned), "--methods", options.methods, "--lead-s", LEAD_S]
    lengths = ["--repetitions", options.repetitions, "--run-s", options.run_s, "--baseline-s", options.baseline_s]
    print(regrow(folder, "field", "plan", "orchard.toml", *words, *lengths), end="", flush=True)

    links = stack.enter_context(Namespaces())
    spots = {course.name: links.device(course.name, course.rates[0][1], DOWN_PER_UP * course.rates[0][1]) for course in planned}
    for name, spot in spots.items():
        agent = ["--log", "agent", "--bundle", f"{name}.json", "--data", f"{name}.npz", "--meter", "none", "--power-model", "power.json"]
        stack.enter_context(running([*links.inside(spot.namespace), *python(*agent)], folder, folder / f"{name}.log"))
    drawn = stack.enter_context(Weather(links, spots, planned, folder / "true-links.csv"))
    run = [
        *links.inside(links.hub),
        *python("field", "run", "orchard.toml", "--host", HUB_ADDRESS, "--port", PORT, "--broker-kind", "mosquitto"),
    ]
    conduct(run, folder, drawn, LEAD_S + options.baseline_s + LEAD_S)
    out: Path = options.out.resolve()
    print(regrow(folder, "field", "report", "orchard.toml", "--out", out), end="", flush=True)
    shutil.copy(folder / "true-links.csv", out)
    draw(folder, out / "measured-and-true.png", planned)
    print(f"{out}: report.html, its pictures and tables, measured-and-true.png", flush=True)


def assumed_power() -> PowerModel:
    """A power model of this board that nobody has fitted."""
    units = [f"assumed-{number}" for number in range(1, UNITS + 1)]
    phases = {phase: PhasePower(watts=watts, unit_sd_w=0.1 * watts, row_sd_w=0.0, units=UNITS) for phase, watts in WATTS.items()}
    return PowerModel(board=board_name(), meter="none: assumed", units=units, rows=UNITS, watts_a_degree=0.0, phases=phases)


def regrow(folder: Path, *words: object) -> str:
    """What a command prints.

    Raises:
        LocalError: it failed.
    """
    done = subprocess.run(
        python(*words), cwd=folder, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LocalError(f"regrow {' '.join(map(str, words))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def python(*words: object) -> list[str]:
    return [sys.executable, "-m", "cli.main", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def paired(data: Path, folder: Path) -> list[Path]:
    """Five devices' samples of the ten wearers, two each."""
    *files, _ = write_device_files(data / "watch")
    made = []
    for number in range(5):
        parts = [dict(np.load(file)) for file in files[2 * number : 2 * number + 2]]
        parts[1]["group"] = parts[1]["group"] + parts[0]["group"].max() + 1
        made.append(folder / f"pair-{number}.npz")
        both: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        np.savez(made[-1], **both)
    return made


@contextmanager
def running(command: Sequence[str], folder: Path, log: Path) -> Iterator[None]:
    """A child that ends with the block."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            ending_with_parent([str(shutil.which(command[0])), *command[1:]]),
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def conduct(command: Sequence[str], folder: Path, weather: Weather, baseline_s: float) -> None:
    """Run the plan, showing what it says; every run, so long after its baseline is announced, begins the courses of the links anew.

    Raises:
        LocalError: it failed.
    """
    child = subprocess.Popen(
        ending_with_parent([str(shutil.which(command[0])), *command[1:]]),
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in child.stdout or ():
            print(line, end="", flush=True)
            if ": keeping still" in line:
                weather.begin(time.monotonic() + baseline_s)
        if child.wait():
            raise LocalError(f"regrow field run ended with status {child.returncode}")
    finally:
        child.terminate()
        child.wait(60)


class Weather:
    """Changes the links as their courses say, counted from the beginning of each run, and writes down when."""

    def __init__(self, links: Namespaces, spots: dict[str, Spot], planned: Sequence[Course], record: Path) -> None:
        self._links, self._spots, self._courses, self._record = links, spots, planned, record
        self._begin, self._over = threading.Event(), threading.Event()
        self._began_s = 0.0
        self._thread = threading.Thread(target=self._change, name="weather", daemon=True)

    def __enter__(self) -> Weather:
        with self._record.open("w", newline="") as file:
            csv.writer(file).writerow(("at_s", "device", "bits_per_second"))
        for course in self._courses:
            self._write(course.name, course.rates[0][1])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._begin.set()
        self._thread.join()

    def begin(self, at_s: float) -> None:
        """A run begins then, in monotonic seconds."""
        self._began_s = at_s
        self._begin.set()

    def _change(self) -> None:
        while True:
            self._begin.wait()
            self._begin.clear()
            began_s = self._began_s
            for after_s, name, bps in sorted((at, course.name, bps) for course in self._courses for at, bps in course.rates):
                if self._over.wait(max(0.0, began_s + after_s - time.monotonic())):
                    return
                self._set(name, bps)

    def _set(self, name: str, bps: float) -> None:
        spot = self._spots[name]
        if bps:
            self._links.heal(spot)
            self._links.change(spot, bps, DOWN_PER_UP * bps)
        else:
            self._links.cut(spot)
        self._write(name, bps)

    def _write(self, name: str, bps: float) -> None:
        with self._record.open("a", newline="") as file:
            csv.writer(file).writerow((f"{time.time():.3f}", name, f"{GOODPUT * bps:.0f}"))


def draw(folder: Path, picture: Path, planned: Sequence[Course]) -> None:
    """Each device's own estimate of its uplink with its interval, over what its link was."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    with (folder / "true-links.csv").open(newline="") as file:
        rows = [(float(row["at_s"]), row["device"], float(row["bits_per_second"])) for row in csv.DictReader(file)]
    database = open_observations(folder / "runs" / ".gateway")
    zero_s = rows[0][0]
    figure, axes = plt.subplots(len(planned), 1, sharex=True, figsize=(9, 9), layout="constrained")
    for axis, course in zip(axes, planned, strict=True):
        query = "SELECT at_s, mean_bps, low_bps, high_bps FROM uplinks WHERE device = ? ORDER BY at_s"
        found = np.array(database.execute(query, (course.name,)).fetchall(), float).reshape(-1, 4)
        true = np.array([(at, bps) for at, name, bps in rows if name == course.name])
        end_s = max(found[-1, 0] if len(found) else 0.0, true[-1, 0])
        axis.step(
            [*(true[:, 0] - zero_s), end_s - zero_s],
            [*true[:, 1] / 1e3, true[-1, 1] / 1e3],
            where="post",
            color="#000000",
            label="the link",
        )
        if len(found):
            axis.fill_between(found[:, 0] - zero_s, found[:, 2] / 1e3, found[:, 3] / 1e3, step="post", color="#56B4E9", alpha=0.4)
            axis.step(found[:, 0] - zero_s, found[:, 1] / 1e3, where="post", color="#0072B2", label="as the device measures it, 95 %")
        axis.set_ylabel(f"{course.name}\nkbit/s")
        axis.set_ylim(bottom=0)
    axes[0].legend(loc="upper right")
    axes[-1].set_xlabel("seconds")
    figure.savefig(picture, dpi=110)
    database.close()


if __name__ == "__main__":
    main()
