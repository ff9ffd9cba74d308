"""The same run twice: over real MQTT by a gateway and its agents, then in virtual time from the sequence of arrivals that its log holds.

The real run orders arrivals as it likes, on whatever machine; the replay follows. What a clock or a link gave stands in the record (first
uplinks, uplinks and training seconds of updates, which updates fell into which aggregation) and goes into the simulated devices from there.
Everything else both worlds must find by themselves: who trains which part of which version, every value that travels, every model.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker_server.broker import Broker, Kind
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.gateway import Gateway
from broker_server.runs import TaskFolder, create_run, load_task, recover
from broker_server.store import Store
from cli.gateway import built
from edge_agent.agent import Agent, Bundle
from edge_agent.data.source import DataSource
from edge_agent.data.sources import open_source
from edge_agent.state import StateFolder
from edge_agent.worker import LevelTrainers, train_job
from export.models import digits_mlp
from export.task import save_model
from regrow import records, wire
from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.ledger import Ledger
from regrow.machine import Record, Train, Trained, TrainingFailed
from regrow.methods import defaults_of
from regrow.presence import Identity
from regrow.records import from_record, to_record
from testbed.memory import World
from tests.export.unit_models import batch_norm_perceptron
from tests.testbed.processes import write_digits

UPLINKS_BPS = {"d1": 32e6, "d2": 12e6, "d3": 6e6}
"""Three devices never fill the four places for versions on the broker: which version a device gets does not depend on downloads."""
FULL_DENSITY_BPS = 40e6  # above all of them: nobody starts with the whole model, so that there is something to restore
NONCE = 4711
AT_ONCE = 3
PATIENCE_S = 100.0
GROUP_S = 100.0  # virtual seconds between aggregations: several heartbeats, which tell the coordinator of a new uplink
STEP_S = 0.01  # and between the arrivals of one aggregation: well within the trigger's interval_s
INTERVAL_S = 0.05


MODELS = {"digits_mlp": lambda: digits_mlp(1), "batch_norm": lambda: batch_norm_perceptron(64, 10)}


@dataclass(frozen=True)
class Setting:
    """A method by name, what travels, and whether a level is made of weights or of units (None: as the method has it)."""

    method: str
    dtype: str = "float32"
    granularity: str | None = None
    aggregations: int = 6
    model: str = "digits_mlp"

    def __str__(self) -> str:
        return "-".join(part for part in (self.method, self.dtype, self.granularity, self.model.partition("digits_mlp")[0]) if part)

    def toml(self) -> str:
        """A task whose restoration and refreshes, where the method has any, come within a few aggregations."""
        implied = defaults_of(self.method).get("method", {})
        method: dict[str, Any] = {"name": self.method, "full_density_bps": FULL_DENSITY_BPS}
        if "refresh_every" not in implied:
            method |= {"refresh_every": 3, "refresh_min_rounds": 0}
        if self.method == "fedmr":
            method["recombine_after"] = 2
        if self.granularity is not None:
            method["granularity"] = self.granularity
        tables: dict[str, dict[str, Any]] = {
            "method": method,
            "training": {"local_steps": 3, "batch": 10, "learning_rate": 0.1},
            "trigger": {"interval_s": INTERVAL_S},
            "restoration": {"every": 2, "patience": 1, "min_delta": 1.0, "full_model_every": 3},
            "wire": {"up": self.dtype, "down": "float16" if self.dtype == "int8" else self.dtype},
            "fleet": {"min_devices": len(UPLINKS_BPS), "join_s": 0.0, "min_deadline_s": 1e6},
            "stop": {"aggregations": self.aggregations},
            "store": {"keep_updates": True, "snapshot_every": 1000},
        }
        lines = ['name = "parity"', "seed = 7"]
        for table, values in tables.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, eq=False)
class Run:
    """What a run has left: its log and its model, float32 [n] by flat coordinate."""

    folder: TaskFolder
    name: str
    log: list[Record]
    weights: NDArray[np.float32]
    reason: str

    @property
    def entries(self) -> list[records.Entry]:
        return [from_record(record) for record in self.log]

    def of(self, kind: type[records.Entry]) -> list[Any]:
        return [entry for entry in self.entries if isinstance(entry, kind)]

    def arrivals(self) -> list[tuple[str, int, int, int]]:
        """(device, version, level, epoch) of every accepted update."""
        return [(entry.device, entry.version, entry.level, entry.epoch) for entry in self.of(records.Accepted)]

    def versions(self) -> list[tuple[str, int, bytes]]:
        """The digest of every model, and of the bytes that devices received of every published one, as the log gives them."""
        ledger = Ledger.start(self.folder.task, self.folder.layout, self.folder.initial, self.folder.units)
        found = []
        for record in self.log:
            ledger.apply_record(record)
            if record.kind == "aggregated":
                found.append(("model", ledger.version, wire.digest(ledger.flat_weights.tobytes())))
            elif record.kind == "published":
                found.append(("published", ledger.version, wire.digest(ledger.published[ledger.version].data)))
        return found

    def comparable(self) -> list[tuple[str, bytes, bytes]]:
        """The log without the seconds that the run had been led, without what a device's start is known by and its speed, and without when
        versions were given up that nobody leased any more.

        An update that comes just after the trigger's interval, before the coordinator has woken up, is taken and aggregated in one step:
        the version that it was made from is then given up after the aggregation and not before. Nothing else depends on that.
        """
        found = []
        for record in self.log:
            if record.kind == "retired":
                continue
            entry = from_record(record)
            if isinstance(entry, (records.Aggregated, records.Finished)):
                entry = msgspec.structs.replace(entry, elapsed_s=0.0)
            if isinstance(entry, records.Joined):
                entry = msgspec.structs.replace(entry, boot="", step_s=None)
            found.append((record.kind, bytes(to_record(entry).header), bytes(record.payload)))
        return found


# ---- over MQTT -----------------------------------------------------------------------------------------------------------------------


def sources(folder: Path) -> dict[str, DataSource]:
    """Every device's data, read anew."""
    return {name: open_source(str(folder / f"{name}.npz")) for name in UPLINKS_BPS}


def prepare(folder: Path, setting: Setting) -> Path:
    """The new run of a task in a folder, and the data of its devices."""
    task = folder / "task"
    task.mkdir(parents=True)
    (task / "task.toml").write_text(setting.toml())
    save_model(MODELS[setting.model](), task / "model.onnx")
    for number, name in enumerate(UPLINKS_BPS):
        write_digits(folder / f"{name}.npz", seed=number, rows=80)
    return create_run(folder / "runs", built(task), "run")


def serve(folder: Path, kind: Kind) -> Run:
    """Run what was prepared there over a broker of its own, by a gateway and an agent per device, to its end."""
    path, credentials = folder / "runs" / "run", Credentials(folder / "secrets")
    for name in UPLINKS_BPS:
        credentials.add_device(name)
    loaded = load_task(path / "task")
    broker = Broker(folder / "broker", credentials, kind=kind)
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(path))
        stack.callback(broker.stop)
        broker.start()
        coordinator = Coordinator(recover(store, loaded), path.name, loaded.programs, NONCE)
        password = credentials.coordinator_password
        gateway = Gateway(coordinator, store, url=broker.url, username=COORDINATOR, password=password)
        watchdog = threading.Timer(PATIENCE_S, gateway.stop)
        stack.callback(watchdog.cancel)
        watchdog.start()
        with _agents(folder, broker.url, credentials):
            reason = gateway.run(housekeeping=broker.poll)
        log = [record for _, record in store.replay()]
    return Run(loaded, path.name, log, coordinator.ledger.flat_weights, reason)


@contextmanager
def _agents(folder: Path, url: str, credentials: Credentials) -> Iterator[None]:
    with ExitStack() as stack:
        agents = []
        for name, source in sources(folder).items():
            state = stack.enter_context(StateFolder(folder / name))
            bundle = Bundle(name, url, credentials.password(name))
            agents.append(Agent(bundle, state, source, max_uplink_bps=UPLINKS_BPS[name]))
        pool = stack.enter_context(ThreadPoolExecutor(len(agents)))
        running = [pool.submit(agent.run) for agent in agents]
        try:
            yield
        finally:
            for agent in agents:
                agent.stop()
        for one in running:
            one.result(PATIENCE_S)


# ---- in virtual time -----------------------------------------------------------------------------------------------------------------


class Replay:
    """A world in which every update arrives when the record says: in its order, in its aggregation, with its meters.

    Args:
        run: the recorded one.
        data: the devices' own.
        order: other entries than its own, for a replay that shall differ.
    """

    def __init__(self, run: Run, data: Mapping[str, DataSource], order: Sequence[records.Entry] | None = None) -> None:
        folder = run.folder
        self._run, self._data, self._trainers = run, data, LevelTrainers(folder.programs)
        self._due = _due(run.entries if order is None else order)
        self._ledger = Ledger.start(folder.task, folder.layout, folder.initial, folder.units)
        self._world = World(self._train)
        self._world.add(COORDINATOR, Coordinator(self._ledger, run.name, folder.programs, NONCE))
        self._world.run(1.0)  # it leads
        for joined in run.of(records.Joined):  # sums over devices go in the order in which they joined
            install = bytes.fromhex(joined.install)
            self._world.add(joined.device, Device(Identity(joined.device, install, install), {}, joined.uplink_bps))

    def run(self) -> Run:
        """The simulated run, to its end or, if it has none, to when the recorded one ended."""
        world = self._world
        world.run(GROUP_S * (len(self._run.of(records.Aggregated)) + 1), stop=lambda: COORDINATOR in world.finished)
        return Run(self._run.folder, self._run.name, world.log, self._ledger.flat_weights, world.finished.get(COORDINATOR, ""))

    def _train(self, name: str, job: Train) -> tuple[float, Trained | TrainingFailed]:
        if not self._due[name]:
            return 1e9, TrainingFailed(job.number, "the recorded run had ended before")
        at_s, accepted = self._due[name].popleft()
        self._world.measure(name, accepted.uplink_bps)
        trained = train_job(self._trainers, self._data[name], job)
        return at_s - self._world.now, replace(trained, seconds=accepted.seconds)


def _due(entries: Sequence[records.Entry]) -> dict[str, deque[tuple[float, records.Accepted]]]:
    """Device -> its updates, oldest first, each with the virtual time at which its training ends."""
    due: dict[str, deque[tuple[float, records.Accepted]]] = defaultdict(deque)
    group, index = 1, 0
    for entry in entries:
        if isinstance(entry, records.Accepted):
            due[entry.device].append((GROUP_S * group + STEP_S * index, entry))
            index += 1
        elif isinstance(entry, records.Aggregated):
            group, index = group + 1, 0
    return due


# ---- both ----------------------------------------------------------------------------------------------------------------------------


@contextmanager
def begun(folder: Path, kind: Kind, settings: Sequence[Setting]) -> Iterator[dict[Setting, Future[Run]]]:
    """The check of every setting, several at once, since they mostly wait; their programs are built before, one after the other."""
    for setting in settings:
        prepare(folder / str(setting), setting)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {setting: pool.submit(check, folder / str(setting), kind, setting) for setting in settings}


def check(folder: Path, kind: Kind, setting: Setting) -> Run:
    """Serve what was prepared and replay: the same arrivals, the same versions, the same model, and the same log, all to the bit."""
    served = serve(folder, kind)
    assert served.reason == f"{setting.aggregations} aggregations"
    assert not served.of(records.Rejected)
    assert not served.of(records.Released)
    simulated = Replay(served, sources(folder)).run()
    assert simulated.reason == served.reason
    assert simulated.arrivals() == served.arrivals()
    assert simulated.versions() == served.versions()
    assert simulated.weights.tobytes() == served.weights.tobytes()
    assert simulated.comparable() == served.comparable()  # every assignment, restoration, order and byte that devices sent, too
    assert not np.array_equal(served.weights, served.folder.initial)
    return served
