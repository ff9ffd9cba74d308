"""How do time per arrival and memory of the coordinator grow with the fleet, from 10 to 10 000 devices?

A bench of the coordinator, not of learning: the devices are the real state machines in virtual time (testbed.memory.World), but their
"training" only moves each value by a little and costs nothing. The model is that of the digits task without its hidden layer: 650 values.
For each size two processes: one simulates the fleet and writes down every event that reached the coordinator; another feeds these events
to a coordinator alone, its latest updates in the gateway's disk-mapped file. What is measured is the second one: the time of
`Coordinator.step` over the second half of the run per accepted update (heartbeats, timers and aggregations included), the median time of
the steps that take an update, and the process's memory apart from mapped files (RssAnon). Both times are wall and processor time: where
others use the machine too, only the latter says something. Records go nowhere: the disk is not measured. Methods run side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from machine import write_result

from broker_server.shelf import MappedShelf
from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.ledger import Ledger
from regrow.machine import Connected, Effect, Event, Persisted, Received, Train, Trained, Woken
from regrow.parameters import Layout, Tensor
from regrow.presence import Identity
from regrow.shelf import Shelf, in_memory
from regrow.task import Task, task_from_tables
from testbed.memory import COORDINATOR, World

LAYOUT = Layout((Tensor("dense.weight", (10, 64)), Tensor("dense.bias", (10,), always_kept=True)))
ROOT = Path(__file__).resolve().parent.parent
METHODS = ("fedgmr", "fedasync")
LEAST_UPDATES = 600
SIZES = (10, 30, 100, 300, 1000, 3000, 10_000)


def task(method: str, devices: int) -> Task:
    """The method's defaults; nothing ends the run or raises a density, rounds take 10 to 60 s, a device is heard of every 15 s."""
    fleet = {"min_devices": devices, "join_s": 0.0, "heartbeat_s": 15.0, "min_deadline_s": 300.0}
    restored = {"full_model_every": 0, "patience": 1_000_000}
    tables = {"name": "bench", "method": {"name": method}, "fleet": fleet, "restoration": restored, "stop": {"aggregations": 10**9}}
    return task_from_tables(tables, "bench/devices.py")


def coordinator(kind: type[Coordinator], method: str, devices: int, shelf: Shelf = in_memory) -> Coordinator:
    initial = np.random.default_rng(0).normal(size=LAYOUT.size).astype(np.float32)
    return kind(Ledger.start(task(method, devices), LAYOUT, initial, shelf=shelf), "r1", {"layout": LAYOUT.to_json()}, 7)


# ---- the process that simulates the fleet --------------------------------------------------------------------------------------------


class Recording(Coordinator):
    """A coordinator that writes down what it is told, and when."""

    to: BinaryIO
    accepted = 0

    def step(self, event: Event, now: float) -> list[Effect]:
        row: tuple[Any, ...] = (now, type(event).__name__)
        if isinstance(event, Received):
            row += (event.topic, bytes(event.payload))
            self.accepted += "/update/" in event.topic
        elif isinstance(event, Persisted):
            row += (event.id,)
        data = msgspec.msgpack.encode(row)
        self.to.write(len(data).to_bytes(4, "little") + data)
        return super().step(event, now)


def record(method: str, devices: int, updates: int, path: Path) -> dict[str, Any]:
    """Simulate until that many updates have come; the coordinator's events go to `path`."""
    speeds = np.random.default_rng(1)
    seconds = {f"d{i:05d}": float(speeds.uniform(10.0, 60.0)) for i in range(devices)}

    def train(who: str, job: Train) -> tuple[float, Trained]:
        moved = job.values[: job.length] * np.float32(0.99) + np.float32(1e-3)
        scores = tuple((level, 0.5, 0.5, 20) for level in job.evaluate)
        return seconds[who], Trained(job.number, moved, 20, 0.5, 0.1, scores)

    world = World(train, keep_log=False, keep_published=False)
    started = time.perf_counter()
    with path.open("wb") as file:
        leader = coordinator(Recording, method, devices)
        if not isinstance(leader, Recording):
            raise TypeError("not a recording coordinator")
        leader.to = file
        world.add(COORDINATOR, leader)
        for who in seconds:
            nonce = who.encode().ljust(16, b".")
            bps = 2e5 * 20.0 ** float(speeds.uniform())
            world.add(who, Device(Identity(who, nonce, nonce, examples=100, validation_examples=20), {}, bps), up_bps=bps, down_bps=4 * bps)
        world.run(math.inf, stop=lambda: leader.accepted >= updates)
    return {"world_s": time.perf_counter() - started, "world_anon_mb": anonymous_bytes() / 1e6, "virtual_s": world.now}


# ---- the process that is measured ----------------------------------------------------------------------------------------------------


def events(path: Path) -> Iterator[tuple[float, Event]]:
    """The events that were written down, one in memory at a time."""
    simple: dict[str, Event] = {"Connected": Connected(), "Woken": Woken()}
    with path.open("rb") as file:
        while head := file.read(4):
            now, kind, *rest = msgspec.msgpack.decode(file.read(int.from_bytes(head, "little")))
            yield now, Received(*rest) if kind == "Received" else Persisted(*rest) if kind == "Persisted" else simple[kind]


def measure(method: str, devices: int, updates: int, path: Path) -> dict[str, Any]:
    """Feed the events to a coordinator alone."""
    empty = anonymous_bytes()
    leader = coordinator(Coordinator, method, devices, MappedShelf(path.parent, 4 * LAYOUT.size))
    arrived, total_s, total_cpu_s = 0, 0.0, 0.0
    taking_s: list[float] = []
    taking_cpu_s: list[float] = []
    for now, event in events(path):
        taken = isinstance(event, Received) and "/update/" in event.topic
        began, began_cpu = time.perf_counter(), time.thread_time()
        leader.step(event, now)
        passed_cpu, passed = time.thread_time() - began_cpu, time.perf_counter() - began
        arrived += taken
        if arrived > updates // 2:
            total_s += passed
            total_cpu_s += passed_cpu
            if taken:
                taking_s.append(passed)
                taking_cpu_s.append(passed_cpu)
    anonymous = anonymous_bytes()
    return {
        "devices": devices,
        "joined": len(leader.ledger.devices),
        "updates": sum(device.updates for device in leader.ledger.devices.values()),
        "aggregations": leader.ledger.version,
        "step_us_per_arrival": round(1e6 * total_s / len(taking_s), 1),
        "step_us_median": round(1e6 * statistics.median(taking_s), 1),
        "step_cpu_us_per_arrival": round(1e6 * total_cpu_s / len(taking_s), 1),
        "step_cpu_us_median": round(1e6 * statistics.median(taking_cpu_s), 1),
        "anonymous_mb": round(anonymous / 1e6, 2),
        "anonymous_before_mb": round(empty / 1e6, 2),
        "mapped_file_mb": round(resident("RssFile") / 1e6, 2),
    }


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def anonymous_bytes() -> int:
    """Resident memory apart from mapped files; NumPy's and Python's own included."""
    return resident("RssAnon")


# ---- all sizes -----------------------------------------------------------------------------------------------------------------------


def child(part: str, method: str, devices: int, updates: int, path: Path) -> dict[str, Any]:
    """A part in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--part",
        part,
        "--method",
        method,
        "--devices",
        str(devices),
        "--updates",
        str(updates),
        str(path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def one_size(method: str, devices: int, updates_each: int) -> dict[str, Any]:
    updates = max(LEAST_UPDATES, updates_each * devices)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events"
        world = child("record", method, devices, updates, path)
        result = child("measure", method, devices, updates, path)
    row = {**result, **{name: round(value, 1) for name, value in world.items()}}
    print(method, json.dumps(row), flush=True)
    return row


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Time per arrival and memory over the number of devices."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for method, rows in results.items():
        sizes = [row["devices"] for row in rows]
        (line,) = left.plot(sizes, [row["step_cpu_us_per_arrival"] for row in rows], "o-", label=f"{method}: all steps per arrival")
        left.plot(sizes, [row["step_cpu_us_median"] for row in rows], "s--", color=line.get_color(), label=f"{method}: median of a step")
        right.plot(sizes, [row["anonymous_mb"] for row in rows], "o-", color=line.get_color(), label=method)
    left.set(xscale="log", xlabel="devices", ylabel="microseconds", title="coordinator's processor time per arrival", ylim=(0, None))
    right.set(xscale="log", xlabel="devices", ylabel="MB", title="resident memory apart from mapped files", ylim=(0, None))
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def per_device_bytes(rows: list[dict[str, Any]]) -> int:
    """Slope of memory between the smallest and the largest fleet."""
    first, last = rows[0], rows[-1]
    return round(1e6 * (last["anonymous_mb"] - first["anonymous_mb"]) / max(last["devices"] - first["devices"], 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="devices (default: %(default)s)")
    parser.add_argument("--updates-each", type=int, default=2, help="updates per device, at least 600 in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "devices.json", help="where the JSON goes")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "devices.png", help="where the plot goes")
    for name, kind in (("--part", str), ("--method", str), ("--devices", int), ("--updates", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("path", type=Path, nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part = {"record": record, "measure": measure}[options.part]
        print(json.dumps(part(options.method, options.devices, options.updates, options.path)))
        return
    with ThreadPoolExecutor(len(METHODS)) as pool:
        rows = pool.map(lambda method: [one_size(method, devices, options.updates_each) for devices in options.sizes], METHODS)
        results = dict(zip(METHODS, rows, strict=True))
    setting = {"parameters": LAYOUT.size, "updates_each": options.updates_each, "least_updates": LEAST_UPDATES}
    growth = {method: per_device_bytes(rows) for method, rows in results.items()}
    command = f"python bench/devices.py --updates-each {options.updates_each}"
    write_result(options.out, {"command": command, "setting": setting, "bytes_per_device": growth, "methods": results})
    plot(results, options.plot)


if __name__ == "__main__":
    main()
