"""`regrow simulate`: the gateway's and the devices' own state machines in virtual time, with real training on a data set's split.

Only the clock and the links are simulated. One process, one thread: the same specification gives the same run, to the bit, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_server.runs import TaskFolder
from edge_agent.data.source import DataSource
from edge_agent.trainer import Score
from export.task import programs_of, read_model
from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.errors import LocalError
from regrow.ledger import Ledger, unit_densities_of
from regrow.methods import named
from regrow.parameters import Layout
from regrow.presence import Identity
from regrow.programs import UNITS
from regrow.task import Task, task_from_tables
from regrow.units import Units
from testbed.compute import Compute, timed
from testbed.conditions import PERCENT, heterogeneity, paper_links, paper_server_links
from testbed.datasets import Dataset, load
from testbed.links import Constant, Link, WithOutages, read_trace
from testbed.memory import COORDINATOR, World
from testbed.splits import split, train_validation
from testbed.trainers import engine_of
from testbed.waves import Jobs, Result, Waves

CURVE_EXAMPLES = 2000  # of the test data, for the curve; the last point uses all of it
RATE_PERIOD_S = 10.0


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a simulated run depends on, beside its task folder; `settings` are keys of task.toml, dotted, above the method's."""

    method: str | None = None
    settings: dict[str, Any] = {}
    seed: int = 1
    data: str = "watch"
    data_folder: str | None = None
    split: str = "user"
    clients: int = 10
    links: str = "high"
    outages: tuple[float, float] | None = None
    step_s: float = 0.01
    slowdown: float = 1.0
    seconds: float = 600.0
    points: int = 60
    trainer: str = "onnxruntime"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The run at one moment of virtual time; bytes are MQTT payload, all devices together; accuracy and loss on test data."""

    time_s: float
    version: int
    accuracy: float
    loss: float
    bytes_up: int
    bytes_down: int
    updates: int
    mean_density: float
    coverage: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run. `worst_decile`: mean over the tenth of devices (at least one) on whose validation data the model is worst."""

    spec: Spec
    points: list[Point]
    final_accuracy: float
    validation_accuracy: float
    worst_decile: float
    per_class: list[float]
    updates: dict[str, int]
    densities: dict[str, tuple[float, float]]
    rejected: int
    reason: str


def task_of(folder: TaskFolder, tables: Mapping[str, Any], spec: Spec) -> Task:
    """The folder's task as this run has it: a method by name replaces [method], [trigger] and [restoration]; settings stand above all.

    Raises:
        LocalError: an unknown method, or a setting that is none.
    """
    merged: dict[str, Any] = {section: dict(values) if isinstance(values, dict) else values for section, values in tables.items()}
    if spec.method is not None:
        for section in ("method", "trigger", "restoration"):
            merged.pop(section, None)
        merged |= named(spec.method)
    merged["seed"] = spec.seed
    merged["stop"] = {"seconds": spec.seconds}
    merged["fleet"] = {"min_devices": spec.clients, "join_s": 0.0, "min_deadline_s": spec.seconds, **merged.get("fleet", {})}
    merged.pop("evaluation", None)
    for key, value in spec.settings.items():
        section, _, name = key.partition(".")
        merged[section] = {**merged.get(section, {}), name: value} if name else value
    restoration = merged.get("restoration", {})
    if restoration.get("trigger") in ("fixed", "mixed"):
        merged["restoration"] = {"planned_s": spec.seconds, **restoration}
    return task_from_tables(merged, f"{folder.path / 'task.toml'} with this command's options")


class Simulation:
    """One run, ready to go.

    Args:
        folder: the built task; its model must take the data's examples.
        task: what `task_of` made of it.
        spec: everything else.

    Raises:
        LocalError: data, split, links or trainer that cannot be had, or data that does not fit the model.
    """

    def __init__(self, folder: TaskFolder, task: Task, spec: Spec) -> None:
        self.spec, self.task = spec, task
        data = load(spec.data, None if spec.data_folder is None else Path(spec.data_folder))
        programs, units, layout = _programs(folder, task)
        self._engine = engine_of(spec.trainer, programs)
        self._trainer = self._engine.whole
        self._test = data.test
        self._curve = _subset(data.test, CURVE_EXAMPLES)
        self.names = [f"device-{index:04d}" for index in range(spec.clients)]
        self._sources = dict(zip(self.names, _sources(data.train, spec), strict=True))
        model_bytes = 4 * layout.size
        compute = {name: Compute((spec.step_s,), slowdown=spec.slowdown, seed=spec.seed, stream=name) for name in self.names}
        train = timed(Waves(self._train, together=self._engine.together), compute, layout.size)
        self.world = World(train, store_and_forward=True, keep_log=False, keep_published=False)
        self._ledger = Ledger.start(task, layout, folder.initial, units)
        up, down = paper_server_links(COORDINATOR, model_bytes, seed=spec.seed, period_s=RATE_PERIOD_S)
        shaped = spec.links in PERCENT
        coordinator = Coordinator(self._ledger, "simulated", programs, spec.seed + 1)
        self.world.add(COORDINATOR, coordinator, up=up if shaped else None, down=down if shaped else None)
        for name, (device_up, device_down) in zip(self.names, links_of(spec, model_bytes), strict=True):
            token = name.encode().ljust(16, b".")
            self.world.add(name, Device(Identity(name, token, token), {}), up=device_up, down=device_down)

    def run(self, on_point: Callable[[Point], None] = lambda _: None) -> Outcome:
        """To the end of the run; `on_point` hears of every point of the curve as it is made."""
        spec, points = self.spec, list[Point]()
        for index in range(1, spec.points + 1):
            self.world.run(index * spec.seconds / spec.points, stop=self._ended)
            self.world.notes.clear()  # nobody reads them here, and they grow
            if index < spec.points and not self._ended():
                points.append(self._point(self._curve))
                on_point(points[-1])
        self.world.run(spec.seconds + 1.0, stop=self._ended)
        return self._outcome([*points, self._point(self._test)])

    def _ended(self) -> bool:
        return COORDINATOR in self.world.finished

    def _train(self, jobs: Jobs) -> Sequence[Result]:
        return self._engine.train([(self._sources[name], job) for name, job in jobs])

    def _score(self, data: Dataset) -> Score:
        return self._trainer.evaluate(self._ledger.flat_weights, data.x, data.y)

    def _point(self, data: Dataset) -> Point:
        score, ledger, clients = self._score(data), self._ledger, self.world.clients
        devices = ledger.devices.values()
        densities = [device.density for device in devices]
        return Point(
            time_s=self.world.now,
            version=ledger.version,
            accuracy=score.accuracy,
            loss=score.loss if np.isfinite(score.loss) else 1e9,
            bytes_up=sum(clients[name].sent_bytes for name in self.names),
            bytes_down=sum(clients[name].received_bytes for name in self.names),
            updates=sum(device.updates for device in devices),
            mean_density=float(np.mean(densities)) if densities else 0.0,
            coverage=_minimum_coverage(ledger),
        )

    def _outcome(self, points: list[Point]) -> Outcome:
        weights, ledger = self._ledger.flat_weights, self._ledger
        own = [self._trainer.evaluate(weights, *source.validation()) for source in self._sources.values() if len(source.validation()[1])]
        counts = np.array([score.examples for score in own])
        accuracies = np.array([score.accuracy for score in own])
        worst = np.sort(accuracies)[: max(len(own) // 10, 1)]
        per_class = []
        for label in range(self._test.classes):
            mine = self._test.y == label
            per_class.append(self._trainer.evaluate(weights, self._test.x[mine], self._test.y[mine]).accuracy if mine.any() else 0.0)
        return Outcome(
            spec=self.spec,
            points=points,
            final_accuracy=points[-1].accuracy,
            validation_accuracy=float(np.average(accuracies, weights=counts)) if len(own) else 0.0,
            worst_decile=float(worst.mean()) if len(own) else 0.0,
            per_class=per_class,
            updates={name: device.updates for name, device in ledger.devices.items()},
            densities={name: (device.first_density, device.density) for name, device in ledger.devices.items()},
            rejected=sum(device.rejections for device in ledger.devices.values()),
            reason=self.world.finished.get(COORDINATOR, ledger.finished),
        )


def _programs(folder: TaskFolder, task: Task) -> tuple[dict[str, bytes], Units | None, Layout]:
    """What the folder was built with, or, for a method of another granularity, what it would be built with."""
    densities = unit_densities_of(task)
    if densities == unit_densities_of(folder.task):
        return folder.programs, folder.units, folder.layout
    programs = programs_of(read_model(folder.model_path), densities)
    layout = Layout.from_json(programs["layout"])
    units_json = programs.pop(UNITS, None)
    return programs, None if units_json is None else Units.from_json(units_json, layout), layout


def links_of(spec: Spec, model_bytes: int) -> list[tuple[Link, Link]]:
    """(up, down) of every device: the papers' classes, `BPS,BPS,...` constant uplinks with four times as much down, or `trace:FOLDER`.

    Raises:
        LocalError: none of these.
    """
    if spec.links in PERCENT:
        classes = heterogeneity(spec.links, spec.clients)
        pairs: Iterable[tuple[Link, Link]] = (
            paper_links(f"device-{index}", density, model_bytes, seed=spec.seed, period_s=RATE_PERIOD_S)
            for index, density in enumerate(classes)
        )
    elif spec.links.startswith("trace:"):
        files = sorted(Path(spec.links.removeprefix("trace:")).glob("*.csv"))
        if not files:
            raise LocalError(f"links {spec.links!r}: no .csv file there; give a folder of files with lines `seconds,bits_per_second`")
        traces = [read_trace(files[index % len(files)]) for index in range(spec.clients)]
        pairs = ((trace, trace) for trace in traces)
    else:
        pairs = _constant(spec)
    made = list(pairs)
    if spec.outages is None:
        return made
    up_s, down_s = spec.outages
    return [
        (WithOutages(up, up_s, down_s, spec.seed, f"{i}/up"), WithOutages(down, up_s, down_s, spec.seed, f"{i}/down"))
        for i, (up, down) in enumerate(made)
    ]


def _constant(spec: Spec) -> list[tuple[Link, Link]]:
    try:
        rates = [float(text) for text in spec.links.split(",")]
    except ValueError as error:
        known = "high, medium, low, trace:FOLDER, or uplinks in bit/s such as 4000000,800000,200000"
        raise LocalError(f"links {spec.links!r}: give {known}") from error
    chosen = [rates[index * len(rates) // spec.clients] for index in range(spec.clients)]
    return [(Constant(bps), Constant(4 * bps)) for bps in chosen]


def _sources(data: Dataset, spec: Spec) -> list[DataSource]:
    """Each client's share in a device's own data source, training and validation apart."""
    shares = split(data, spec.clients, spec.split, spec.seed)
    sources = []
    for training, validation in train_validation(shares, 0.2, spec.seed, data.part):
        source = DataSource(capacity=len(training) + len(validation))
        where = np.concatenate([training, validation])
        part = np.repeat([0, 1], [len(training), len(validation)])
        source.append(data.x[where], data.y[where], part=part)
        sources.append(source)
    return sources


def _subset(data: Dataset, count: int) -> Dataset:
    """Evenly spaced examples."""
    if len(data.y) <= count:
        return data
    where: NDArray[np.int64] = np.linspace(0, len(data.y) - 1, count).astype(np.int64)
    return Dataset(data.name, data.x[where], data.y[where], None, data.classes)


def _minimum_coverage(ledger: Ledger) -> float:
    """The share of devices that train the least covered coordinate: min_j |{i: m_i[j] = 1}| / devices, of the convergence analysis."""
    devices = ledger.devices.values()
    return sum(device.density >= 1.0 for device in devices) / len(devices) if devices else 0.0
