"""A small fleet for the state machine tests: devices whose "training" pulls their values towards a target that all share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.ledger import Ledger
from regrow.machine import Train, Trained, TrainingFailed
from regrow.parameters import Layout, Tensor
from regrow.presence import Identity
from regrow.task import Task, with_method_defaults
from regrow.units import Axis, Group, Units
from testbed.memory import COORDINATOR, World

LAYOUT = Layout((Tensor("a.weight", (40, 30)), Tensor("a.bias", (40,), always_kept=True), Tensor("b.weight", (7, 40))))
PROGRAMS = {"layout": LAYOUT.to_json(), "train": b"T" * 1000}
UNIT_LAYOUT = Layout((Tensor("a.weight", (40, 30)), Tensor("a.bias", (40,)), Tensor("b.weight", (7, 40))))
UNITS = Units((Group("a", 40),), ((Axis(0, owns=True), Axis()), (Axis(0, owns=True),), (Axis(), Axis(0))))
UNIT_PROGRAMS = {"layout": UNIT_LAYOUT.to_json(), "train": b"T" * 1000}
LINKS = {"d0": 4_000_000.0, "d1": 2_000_000.0, "d2": 800_000.0, "d3": 400_000.0, "d4": 200_000.0}
INITIAL = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32)
TARGET = np.random.default_rng(2).normal(size=LAYOUT.size).astype(np.float32)


def task(**sections: Mapping[str, Any]) -> Task:
    tables: dict[str, Any] = {
        "name": "toy",
        "fleet": {"min_devices": len(LINKS), "join_s": 0.0, "min_deadline_s": 20.0, "heartbeat_s": 3.0},
        "method": {"name": "fedgmr", "refresh_every": 10},
        "stop": {"aggregations": 60},
    }
    for name, section in sections.items():
        tables[name] = {**tables.get(name, {}), **section}
    return msgspec.convert(with_method_defaults(tables), Task)


def train(_: str, job: Train) -> tuple[float, Trained | TrainingFailed]:
    target = TARGET[job.coordinates[: job.length]]
    values = job.values[: job.length]
    trained = values + np.float32(0.3) * (target - values)
    scores = tuple((level, distance(job, length), accuracy(job, length), 50) for level, length in job.evaluate.items())
    return 0.5, Trained(job.number, trained, 100, distance(job, job.length), 0.5, scores)


def distance(job: Train, length: int) -> float:
    flat = np.zeros(LAYOUT.size, np.float32)
    flat[job.coordinates[:length]] = job.values[:length]
    return float(np.linalg.norm(flat - TARGET))


def accuracy(job: Train, length: int) -> float:
    return max(0.0, 1.0 - distance(job, length) / float(np.linalg.norm(TARGET)))


def identity(name: str, boot: int = 0, install: int = 0) -> Identity:
    def nonce(number: int, what: str) -> bytes:
        return f"{what}{name}{number}".encode().ljust(16, b".")[:16]

    return Identity(name, nonce(install, "i"), nonce(boot, "b"), examples=100, validation_examples=50)


def start_ledger(settings: Task, initial: NDArray[np.float32] = INITIAL) -> Ledger:
    if settings.method.granularity == "unit":
        return Ledger.start(settings, UNIT_LAYOUT, initial, UNITS)
    return Ledger.start(settings, LAYOUT, initial)


def programs_of(settings: Task) -> dict[str, bytes]:
    return UNIT_PROGRAMS if settings.method.granularity == "unit" else PROGRAMS


def new_coordinator(settings: Task, *, run: str = "r1", nonce: int = 7, initial: NDArray[np.float32] = INITIAL) -> Coordinator:
    return Coordinator(start_ledger(settings, initial), run, programs_of(settings), nonce)


def recovered(world: World, settings: Task, *, run: str = "r1", nonce: int = 8) -> Coordinator:
    """The coordinator's next life, from the durable log alone."""
    ledger = start_ledger(settings)
    for record in world.log:
        ledger.apply_record(record)
    return Coordinator(ledger, run, programs_of(settings), nonce)


def start(settings: Task, links: Mapping[str, float] = LINKS, trainer: Any = train) -> World:
    world = World(trainer)
    world.add(COORDINATOR, new_coordinator(settings))
    for name, bps in links.items():
        world.add(name, Device(identity(name), {}), up_bps=bps, down_bps=4 * bps)
    return world
