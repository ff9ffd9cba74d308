"""`regrow simulate`: the gateway's and the devices' own state machines in virtual time, with real training on a data set's split.

Only the clock and the links are simulated. One process, one thread: the same specification gives the same run, to the bit, on the CPU. With
a journal an interrupted run does not train again what it has trained; the outcome is the same.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from broker_server.runs import TaskFolder
from edge_agent.data import source as data_source
from edge_agent.data.source import DataSource
from edge_agent.worker import drawn_examples
from export.memory import step_memory
from export.task import programs_of, read_model
from export.work import relative_work
from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.errors import LocalError, UsageError
from regrow.ledger import Ledger
from regrow.levels import unit_densities_of
from regrow.local_step import step_of
from regrow.local_training import Score, Training, statistics_from
from regrow.methods import named, shortened
from regrow.parameters import Layout
from regrow.presence import Identity
from regrow.programs import MEMORY, UNITS, without_variants
from regrow.step_memory import memory_of, needs_bytes
from regrow.task import Task, task_from_tables
from regrow.units import Units
from testbed.compute import Busy, timed
from testbed.conditions import PERCENT, Attendance, attend, attendances, full_density_bps, paper_server_links
from testbed.datasets import Dataset, Loaded, load
from testbed.journal import Journal, digest, remembered, remembered_score
from testbed.links import Latency
from testbed.memory import COORDINATOR, World
from testbed.outcome import Outcome, Point, Spec, minimum_coverage, older_order_share
from testbed.scenario import RATE_PERIOD_S, Pair, latencies, link_pairs, speeds, spread
from testbed.splits import split, train_validation
from testbed.trainers import engine_of
from testbed.waves import Jobs, Result, Waves

CURVE_EXAMPLES = 2000  # of the test data, for the curve; the last point uses all of it
Scorer = Callable[[NDArray[np.float32]], Score]
OF_THE_COMMAND = {
    "name": "none: a name changes nothing of a run",
    "model": "another task folder: `regrow task new FOLDER --model FILE`",
    "seed": "--seed",
    "training.train_last": "train_last in the folder's task.toml, and `regrow task build`: it decides how large the trained model is",
    "stop.seconds": "--seconds",
    "evaluation": "none: devices score the model on their own validation data, and the curve shows the test data",
}
"""Keys that a simulated run does not take from --set, and what to use instead."""


def task_of(folder: TaskFolder, tables: Mapping[str, Any], spec: Spec) -> Task:
    """The folder's task as this run has it: a method by name replaces [method], [trigger] and [restoration]; settings stand above all.

    The folder's [stop], [evaluation] and seed give way to the command's; settings may add to [stop], but not set what the command does.

    Raises:
        LocalError: an unknown method, or a setting that is none or belongs to an option.
    """
    merged: dict[str, Any] = {section: dict(values) if isinstance(values, dict) else values for section, values in tables.items()}
    if spec.method is not None:
        _check_method(spec)
        for section in ("method", "trigger", "restoration"):
            merged.pop(section, None)
        merged |= named(spec.method)
    merged["seed"] = spec.seed
    merged["stop"] = {"seconds": spec.seconds}
    late = sum(not attendance.available(0.0) for attendance in attendances_of(spec).values())
    merged["fleet"] = {"min_devices": max(spec.clients - late, 1), "join_s": 0.0, "min_deadline_s": spec.seconds, **merged.get("fleet", {})}
    merged.pop("evaluation", None)
    for key, value in spec.settings.items():
        _set(merged, key, value)
    if spec.links in PERCENT:  # the papers' classes are what the links were made for; measured once, they would come out one rung off
        merged["method"] = {"full_density_bps": full_density_bps(4 * folder.layout.size), **merged.get("method", {})}
    restoration = merged.get("restoration", {})
    if restoration.get("trigger") in ("fixed", "mixed"):
        merged["restoration"] = {"planned_s": spec.seconds, **restoration}
    return task_from_tables(merged, f"{folder.path / 'task.toml'} with this command's options")


def _check_method(spec: Spec) -> None:
    """The method's name says what is run: nothing else names one, and no part of it is without effect."""
    method = spec.method or ""
    table = spec.settings.get("method")
    if "method.name" in spec.settings or (isinstance(table, dict) and "name" in table):
        raise UsageError(f"--set method.name: the run is of {method}, by --method; name another one there")
    for shorter in shortened(method):
        if _alone(method) == _alone(shorter):
            raise UsageError(f"method {method!r} is the same as {shorter!r}: that part changes nothing here; take {shorter!r}")


def _alone(method: str) -> Task:
    """A task that says nothing but the method."""
    tables = named(method)
    tables["restoration"] = {"planned_s": 1.0, **tables.get("restoration", {})}
    return task_from_tables({"name": "alone", **tables}, f"method {method!r}")


def _set(tables: dict[str, Any], key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    if isinstance(value, dict) and not name:
        for inner, each in value.items():
            _set(tables, f"{section}.{inner}", each)
        return
    taken = OF_THE_COMMAND.get(key, OF_THE_COMMAND.get(section))
    if taken is not None:
        raise UsageError(f"--set {key}: a simulated run does not take this from the task; use {taken}")
    table = tables.get(section, {})
    if name and not isinstance(table, dict):
        raise UsageError(f"--set {key}: {section} is no table of task.toml; write {section}=VALUE")
    tables[section] = {**table, name: value} if name else value


@dataclass(frozen=True)
class Earlier:
    """What devices have from a run before this one: parts by their names in the device's folder, and uplinks that need no probe."""

    parts: Mapping[str, bytes] = field(default_factory=dict)
    uplinks_bps: Mapping[str, float] = field(default_factory=dict)


class Simulation:
    """One run, ready to go.

    Args:
        folder: the built task; its model must take the data's examples.
        task: what `task_of` made of it.
        spec: everything else.
        journal: what an interrupted run has done already, and where this one notes what it does.

    Raises:
        LocalError: data, split, links or trainer that cannot be had, or data that does not fit the model.
    """

    def __init__(self, folder: TaskFolder, task: Task, spec: Spec, journal: Journal | None = None, earlier: Earlier | None = None) -> None:
        self.spec = spec
        self._earlier = earlier or Earlier()
        self._staleness: list[int] = []
        data = _loaded(spec)
        programs, units, layout, by_density = _programs(folder, task, with_memory=spec.memory is not UNSET)
        self._engine = engine_of(spec.trainer, programs)
        self._trainer = self._engine.whole
        _check_fit(self._trainer, folder, data)
        self._test = data.test
        self.names = [f"device-{index:04d}" for index in range(spec.clients)]
        self._sources = dict(zip(self.names, _sources(data.train, spec), strict=True))
        self._memory = {} if spec.memory is UNSET else dict(zip(self.names, spread(spec.memory, spec.clients), strict=True))
        self.task = task = self._without_declined(task, programs)
        curve = _subset(data.test, CURVE_EXAMPLES)
        train: Callable[[Jobs], Sequence[Result]] = self._train
        self._score_curve, self._score_test = self._scorer(curve), self._scorer(data.test)
        if journal is not None:
            code = _code_digest(spec.trainer, programs)
            contexts = {name: digest(code, *source.everything(), *source.validation()) for name, source in self._sources.items()}
            train = remembered(train, journal, contexts)
            self._score_curve = remembered_score(self._score_curve, journal, digest(code, curve.x, curve.y))
            self._score_test = remembered_score(self._score_test, journal, digest(code, data.test.x, data.test.y))
        compute = speeds(
            self.names,
            spec.seed,
            step_s=spec.step_s,
            steps_trace=None if spec.steps_trace is UNSET else Path(spec.steps_trace),
            slowdowns=spec.slowdown if isinstance(spec.slowdown, tuple) else (spec.slowdown,),
            sigma=0.0 if spec.step_sigma is UNSET else spec.step_sigma,
            by_density=by_density if spec.step_by_density is UNSET else spec.step_by_density,
        )
        steps_s = {name: each.full_step_s for name, each in compute.items()}
        # Said only where it can make a difference: a hello has a length, and a link.
        self._told_steps_s = steps_s if task.method.granularity == "unit" and len(set(steps_s.values())) > 1 else {}
        self._busy = Busy()
        waves = timed(Waves(train, together=self._engine.together), compute, layout.size, lambda s: self._busy.begin(self.world.now, s))
        self.world = World(waves, store_and_forward=True, keep_log=False, keep_published=False)
        self._ledger = Ledger.start(task, layout, folder.initial, units)
        self._people_the_world(Coordinator(self._ledger, "simulated", programs, spec.seed + 1), 4 * layout.size)

    def _without_declined(self, task: Task, programs: Mapping[str, bytes]) -> Task:
        """The task, waiting at its beginning only for devices whose memory holds some level; by default only for those that are there."""
        if not self._memory:
            return task
        memory = memory_of(programs, task)
        need = min(needs_bytes(memory, task))
        declined = {name for name, offer in self._memory.items() if need > offer}
        if len(declined) == len(self.names):
            raise LocalError(f"--memory-mb: training takes {need / 1e6:.1f} MB, more than any device has")
        late = {name for name, attendance in attendances_of(self.spec).items() if not attendance.available(0.0)}
        given = task.fleet.min_devices != max(len(self.names) - len(late), 1)
        fewer = max(min(task.fleet.min_devices, len(self.names) - len(declined if given else declined | late)), 1)
        return msgspec.structs.replace(task, fleet=msgspec.structs.replace(task.fleet, min_devices=fewer))

    def _people_the_world(self, coordinator: Coordinator, model_bytes: int) -> None:
        spec = self.spec
        up, down = paper_server_links(COORDINATOR, model_bytes, seed=spec.seed, period_s=RATE_PERIOD_S)
        shaped = spec.links in PERCENT
        self.world.add(COORDINATOR, coordinator, up=up if shaped else None, down=down if shaped else None)
        attendance = attendances_of(spec)
        delays = latencies(None if spec.latency is UNSET else spec.latency, spec.clients, spec.seed)
        for name, links, latency in zip(self.names, links_of(spec, model_bytes), delays, strict=True):
            if name in attendance:
                attend(self.world, name, attendance[name], partial(self._join, name, links, latency))
            else:
                self._join(name, links, latency)

    def _join(self, name: str, links: Pair, latency: Latency | None) -> None:
        token = name.encode().ljust(16, b".")
        identity = Identity(name, token, token)
        if name in self._memory:
            identity = replace(identity, validation_examples=self._sources[name].validation_size, memory_bytes=self._memory[name])
        device = Device(identity, dict(self._earlier.parts), self._earlier.uplinks_bps.get(name))
        device.meters.full_step_s = self._told_steps_s.get(name)
        self.world.add(name, device, up=links[0], down=links[1], latency=latency)

    def run(self, on_point: Callable[[Point], None] = lambda _: None) -> Outcome:
        """To the end of the run; `on_point` hears of every point of the curve as it is made."""
        spec, points = self.spec, list[Point]()
        for index in range(1, spec.points + 1):
            self.world.run(index * spec.seconds / spec.points, stop=self._ended)
            self._read_notes()
            if index < spec.points and not self._ended():
                points.append(self._point(self._score_curve))
                on_point(points[-1])
        self.world.run(spec.seconds + 1.0, stop=self._ended)
        return self._outcome([*points, self._point(self._score_test)])

    def _read_notes(self) -> None:
        """Nobody else does, and they grow."""
        self._staleness = [note.fields["staleness"] for _, _, note in self.world.notes if note.kind == "update"]
        self.world.notes.clear()

    def _ended(self) -> bool:
        return COORDINATOR in self.world.finished

    def _train(self, jobs: Jobs) -> Sequence[Result]:
        return self._engine.train([(self._sources[name], job) for name, job in jobs])

    def _scorer(self, data: Dataset) -> Scorer:
        model = self._trainer
        return lambda vector: model.evaluate(vector, data.x, data.y, statistics=statistics_from(model, vector, data.x))

    def _point(self, scorer: Scorer) -> Point:
        ledger = self._ledger
        score, clients = scorer(ledger.trained_weights), [self.world.clients[name] for name in self.names if name in self.world.clients]
        devices = ledger.devices.values()
        densities = [device.density for device in devices]
        return Point(
            time_s=self.world.now,
            version=ledger.version,
            accuracy=score.accuracy,
            loss=score.loss if np.isfinite(score.loss) else 1e9,
            bytes_up=sum(client.sent_bytes for client in clients),
            bytes_down=sum(client.received_bytes for client in clients),
            updates=sum(device.updates for device in devices),
            mean_density=float(np.mean(densities)) if densities else 0.0,
            coverage=minimum_coverage(ledger),
            older_orders=older_order_share(ledger),
            staleness=float(np.mean(self._staleness)) if self._staleness else 0.0,
            compute_s=self._busy.until(self.world.now),
        )

    def _outcome(self, points: list[Point]) -> Outcome:
        weights, ledger = self._ledger.trained_weights, self._ledger
        own = [self._own_score(weights, source) for source in self._sources.values() if len(source.validation()[1])]
        counts = np.array([score.examples for score in own])
        accuracies = np.array([score.accuracy for score in own])
        worst = np.sort(accuracies)[: max(len(own) // 10, 1)]
        per_class, statistics = [], statistics_from(self._trainer, weights, self._test.x)
        for label in range(self._test.classes):  # without classes all is one
            mine = self._test.y == label
            score = self._trainer.evaluate(weights, self._test.x[mine], self._test.y[mine], statistics=statistics) if mine.any() else None
            per_class.append(score.accuracy if score is not None else 0.0)
        return Outcome(
            spec=self.spec,
            points=points,
            final_accuracy=points[-1].accuracy,
            validation_accuracy=float(np.average(accuracies, weights=counts)) if len(own) else 0.0,
            worst_decile=float(worst.mean()) if len(own) else 0.0,
            per_class=per_class or [points[-1].accuracy],
            updates={name: device.updates for name, device in ledger.devices.items()},
            densities={name: (device.first_density, device.density) for name, device in ledger.devices.items()},
            rejected=sum(device.rejections for device in ledger.devices.values()),
            reason=self.world.finished.get(COORDINATOR, ledger.finished),
        )

    def _own_score(self, weights: NDArray[np.float32], source: DataSource) -> Score:
        """On a client's validation data, with running statistics from its training data."""
        examples = drawn_examples(source, self.task.training.batch, self.spec.seed)
        return self._trainer.evaluate(weights, *source.validation(), statistics=self._trainer.statistics(weights, examples))


def open_journal(path: Path, limit_bytes: int, *, resume: bool) -> Journal | None:
    """The journal that belongs to the outcome at `path`; None where it may hold nothing, and then none is left there."""
    place = path.with_suffix(".journal")
    if limit_bytes <= 0:
        place.unlink(missing_ok=True)
        return None
    return Journal(place, limit_bytes=limit_bytes, resume=resume)


Programs = tuple[dict[str, bytes], Units | None, Layout, tuple[tuple[float, float], ...]]


def _programs(folder: TaskFolder, task: Task, *, with_memory: bool) -> Programs:
    """What the folder was built with, or, for a method of another granularity, what it would be built with; and Compute's by_density."""
    programs, units, layout, by_density = _built(folder, task)
    programs = {name: data for name, data in without_variants(programs).items() if name != MEMORY}  # nothing is timed here
    return programs | ({MEMORY: step_memory(programs).to_json()} if with_memory else {}), units, layout, by_density


def _built(folder: TaskFolder, task: Task) -> Programs:
    densities = unit_densities_of(task)
    by_density = ((1.0, 1.0),) if densities is None else relative_work(read_model(folder.model_path), densities)
    if densities == unit_densities_of(folder.task) and step_of(task.training) == step_of(folder.task.training):
        return folder.programs, folder.units, folder.layout, by_density
    programs = programs_of(read_model(folder.model_path), densities, task.training)
    layout = Layout.from_json(programs["layout"])
    units_json = programs.pop(UNITS, None)
    return programs, None if units_json is None else Units.from_json(units_json, layout), layout, by_density


def _loaded(spec: Spec) -> Loaded:
    if spec.data_folder is not None and not Path(spec.data_folder).is_dir():
        raise UsageError(f"--data-folder {spec.data_folder}: there is no such folder; leave the option out for the usual place")
    return load(spec.data, None if spec.data_folder is None else Path(spec.data_folder))


def _check_fit(model: Training, folder: TaskFolder, data: Loaded) -> None:
    """The model takes the data's examples and knows all of its labels; tried on two examples of either part."""
    for part in (data.train, data.test):
        some = [0, int(part.y.argmax()) if part.classes else -1]
        try:
            statistics = statistics_from(model, folder.initial, part.x[some])
            model.evaluate(folder.initial, part.x[some], part.y[some], statistics=statistics)
        except LocalError as error:
            raise LocalError(f"data {part.name} does not fit the model {folder.model_path}: {error}") from error


def _code_digest(engine: str, programs: Mapping[str, bytes]) -> bytes:
    """What results depend on beside data and job: the programs, the code that trains, and what computes them."""
    rooms = Path(__file__).parent.parent
    torch = (
        ("testbed/torch_engine.py", "export/torch_trainer.py", "export/torch_steps.py", "export/torch_graph.py", "export/torch_ops.py")
        if engine != "onnxruntime"
        else ()
    )
    names = (
        "edge_agent/trainer.py",
        "edge_agent/worker.py",
        "edge_agent/data/source.py",
        "regrow/local_rules.py",
        "regrow/local_training.py",
        "regrow/examples.py",
        *torch,
    )
    files = [(rooms / name).read_bytes() for name in names]
    backend = "onnxruntime" if engine == "onnxruntime" else "torch"
    machine = f"{platform.machine()} {engine} {version(backend)} {version('numpy')}"
    return digest(machine, *files, *(part for name in sorted(programs) for part in (name, programs[name])))


def links_of(spec: Spec, model_bytes: int) -> list[Pair]:
    """(up, down) of every device (testbed.scenario.link_pairs)."""
    return link_pairs(spec.links, spec.clients, model_bytes, spec.seed, spec.outages)


def attendances_of(spec: Spec) -> dict[str, Attendance]:
    """Of the devices that are not always there."""
    return {} if spec.attend is UNSET else attendances(spec.attend, [f"device-{index:04d}" for index in range(spec.clients)])


class _Still(DataSource):
    """A source that nothing comes to any more, so that its parts are copied once and not for every job."""

    @cached_property
    def _held_out(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return super().validation()

    @cached_property
    def _of_part(self) -> dict[int, NDArray[np.int64]]:
        return {part: super(_Still, self)._numbers(part) for part in (data_source.TRAIN, data_source.VALIDATION)}

    def validation(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The same arrays each time; nobody writes to them."""
        return self._held_out

    def _numbers(self, part: int) -> NDArray[np.int64]:
        return self._of_part[part]


def _sources(data: Dataset, spec: Spec) -> list[DataSource]:
    """Each client's share in a device's own data source, training and validation apart."""
    shares = split(data, spec.clients, spec.split, spec.seed)
    sources: list[DataSource] = []
    for training, validation in train_validation(shares, 0.2 if spec.validation is UNSET else spec.validation, spec.seed, data.part):
        source = _Still(capacity=len(training) + len(validation))
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
