"""`regrow demo`: ten real agents with real sensor data and very different links train one model through a real broker.

Nothing is special about these devices: each is `regrow agent` in its own process, with its own data file, state folder and password; only
`--max-uplink-bps` and `--max-downlink-bps` make their links uneven.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from broker_server.broker import Broker
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.gateway import Gateway
from broker_server.report import plot, write_metrics
from broker_server.runs import TaskFolder, create_run, load_task, recover
from broker_server.shelf import MappedShelf
from broker_server.stopping import ending_with_parent, stop_at_signals
from broker_server.store import Store
from broker_server.view import FleetView, watch
from edge_agent.trainer import Trainer
from export.models import watch_cnn
from export.programs import with_weights
from export.task import build_task, read_model, save_model
from regrow.coordinator import Coordinator
from regrow.errors import LocalError
from regrow.ledger import Ledger
from regrow.local_training import statistics_from
from regrow.machine import Note
from testbed.watch import write_device_files

LINKS_BPS = (4_000_000, 4_000_000, 2_000_000, 2_000_000, 800_000, 800_000, 400_000, 400_000, 200_000, 200_000)
DOWN_PER_UP = 4
CENTRAL_EXAMPLES = 300_000
RESTORED_AFTER = 0.42  # of the run: by then every device has been given the whole model, unless plateaus gave it earlier
TASK = """name = "watch"
seed = {seed}

[method]
name = "fedgmr"
refresh_every = 50
staleness_a = 0.3
eta_g = 1.5

[training]
local_steps = 60
batch = 20
learning_rate = 0.1

[restoration]
trigger = "mixed"
planned_s = {planned_s:g}
every = 5
patience = 8

[wire]
up = "int8"

[fleet]
min_devices = 10
join_s = 0
heartbeat_s = 5
norm_bound = 30

[stop]
seconds = {seconds:g}

[store]
keep_updates = true
"""


@dataclass(frozen=True, slots=True)
class DemoDevice:
    """One agent process and the link that it is given."""

    name: str
    link_bps: int
    data: Path


def command(options: argparse.Namespace) -> int:
    """Run the demo; its results are in the printed folder, also after Ctrl-C."""
    console = Console()
    console.print("[bold]Regrow demo[/]: ten wearers of a smartwatch, five kinds of link, one model")
    *files, test = write_device_files(options.data / "watch")
    devices = [DemoDevice(f"wearer-{i + 1:02d}", bps, file) for i, (bps, file) in enumerate(zip(LINKS_BPS, files, strict=True))]
    options.runs.mkdir(parents=True, exist_ok=True)
    path = _make_run(options.runs, options.seconds, options.seed)
    folder = load_task(path / "task")
    with Store.open(path) as store:
        ledger = recover(store, folder, MappedShelf(store.path, 4 * folder.layout.size))
        kind, seconds = _run_fleet(options, path, folder, store, ledger, devices)
        if not ledger.version:
            raise LocalError(
                f"it ended before the first aggregation, so there is nothing to report; the agents' logs are in {path / 'devices'}"
            )
        summary = _report(console, path, folder, store, ledger, devices, test, kind, seconds)
    early = ", interrupted" if summary["interrupted"] else ""
    console.print(
        f"\naccuracy on unseen test data [bold]{summary['accuracy']:.3f}[/], trained centrally {summary['accuracy_central']:.3f}; "
        f"{summary['aggregations']} aggregations in {seconds:.0f} s{early}\n"
        f"{path} holds summary.json, plot.png, model.onnx, metrics and the store"
    )
    return 0


def _make_run(runs: Path, seconds: float, seed: int) -> Path:
    """A run folder with the watch CNN, built here, without torch."""
    task_dir = runs / ".demo-task"
    task_dir.mkdir(exist_ok=True)
    (task_dir / "task.toml").write_text(TASK.format(seed=seed, seconds=seconds, planned_s=RESTORED_AFTER * seconds))
    save_model(watch_cnn(seed), task_dir / "model.onnx")
    build_task(task_dir, task_dir / "model.onnx")
    return create_run(runs, load_task(task_dir), f"demo-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")


# ---- the fleet ---------------------------------------------------------------------------------------------------------------------


def _run_fleet(
    options: argparse.Namespace, path: Path, folder: TaskFolder, store: Store, ledger: Ledger, devices: Sequence[DemoDevice]
) -> tuple[str, float]:
    """Serve and be the fleet until the run ends or Ctrl-C; returns (broker kind, seconds)."""
    home = path / "gateway"
    credentials = Credentials(home)
    for device in devices:
        credentials.add_device(device.name)
    broker = Broker(home, credentials, kind=None if options.broker == "auto" else options.broker)
    broker.start()
    agents: dict[str, subprocess.Popen[bytes]] = {}
    try:
        coordinator = Coordinator(ledger, path.name, folder.programs, secrets.randbits(31))
        gateway = Gateway(coordinator, store, url=broker.url, username=COORDINATOR, password=credentials.coordinator_password)
        stop_at_signals(gateway.stop, "ending: testing the model and training one centrally for the report")
        agents.update({device.name: _start_agent(device, credentials, broker.url, path) for device in devices})
        started = time.monotonic()
        view = FleetView(f"{path.name} on {broker.kind}", options.seconds)
        _serve(options, gateway, view, lambda: _look_after(broker, agents, path))
        return broker.kind, time.monotonic() - started
    finally:
        _end(list(agents.values()))
        broker.stop()


def _serve(options: argparse.Namespace, gateway: Gateway, view: FleetView, housekeeping: Callable[[], str | None]) -> None:
    if options.plain or not sys.stdout.isatty():
        gateway.run(on_note=_every_ten_seconds(view), housekeeping=housekeeping)
    else:
        watch(view, lambda: gateway.run(on_note=view.note, housekeeping=housekeeping))


def _look_after(broker: Broker, agents: dict[str, subprocess.Popen[bytes]], path: Path) -> str | None:
    """Keep the broker alive; an agent that somebody killed may stay dead, one that fails by itself ends the demo."""
    for name, agent in list(agents.items()):
        code = agent.poll()
        if code is None:
            continue
        del agents[name]
        log = path / "devices" / f"{name}.log"
        if code > 0:
            last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise LocalError(f"agent {name} ended with status {code}: {last} (all of it: {log})")
        return f"agent {name} was ended by signal {-code}"
    return broker.poll()


def _every_ten_seconds(view: FleetView) -> Callable[[Note], None]:
    """Where there is no terminal, the whole table now and then."""
    console = Console(width=140)
    shown = [0.0]

    def note(said: Note) -> None:
        view.note(said)
        if time.monotonic() - shown[0] >= 10.0:
            shown[0] = time.monotonic()
            console.print(view.render())

    return note


def _start_agent(device: DemoDevice, credentials: Credentials, url: str, path: Path) -> subprocess.Popen[bytes]:
    bundle = credentials.write_bundle(device.name, url, path / "devices")
    arguments = ["--log", "agent", "--bundle", bundle, "--data", device.data, "--state", path / "devices" / device.name]
    links = ["--max-uplink-bps", device.link_bps, "--max-downlink-bps", DOWN_PER_UP * device.link_bps]
    rooms = str(Path(__file__).resolve().parent.parent)
    with (path / "devices" / f"{device.name}.log").open("wb") as log:
        return subprocess.Popen(
            ending_with_parent([sys.executable, "-m", "cli.main", *map(str, arguments), *map(str, links)]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([rooms, os.environ.get("PYTHONPATH", "")])},
            start_new_session=True,  # Ctrl-C is for the gateway, which ends the agents itself
        )


def _end(agents: Sequence[subprocess.Popen[bytes]]) -> None:
    for agent in agents:
        with suppress(ProcessLookupError):
            agent.terminate()
    for agent in agents:
        try:
            agent.wait(5)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


# ---- the report --------------------------------------------------------------------------------------------------------------------


def _report(
    console: Console,
    path: Path,
    folder: TaskFolder,
    store: Store,
    ledger: Ledger,
    devices: Sequence[DemoDevice],
    test: Path,
    kind: str,
    seconds: float,
) -> dict[str, Any]:
    """Test, train centrally for comparison, and write everything that a run leaves."""
    with np.load(test, allow_pickle=False) as arrays:
        x, y = arrays["x"], arrays["y"]
    trainer, weights = Trainer(folder.programs, threads=2), ledger.trained_weights
    statistics = statistics_from(trainer, weights, x)
    train_last = folder.task.training.train_last
    save_model(with_weights(read_model(folder.model_path), weights, train_last, statistics=statistics), path / "model.onnx")
    rows = write_metrics(store, path)
    plot(rows, path / "plot.png", title=f"{path.name}: FedGMR, ten wearers, links 200 to 4000 kbit/s")
    accuracy = trainer.evaluate(weights, x, y, statistics=statistics).accuracy
    updates = [row for row in rows if row["kind"] == "update"]
    fleet_examples = int(sum(row["examples"] for row in updates))
    central_examples = min(fleet_examples, CENTRAL_EXAMPLES)
    central = _train_centrally(console, trainer, folder, devices, central_examples)
    meters = {row["device"]: row for row in rows if row["kind"] == "telemetry"}
    full_bytes = 4 * folder.layout.size
    downloads = sum(row["kind"] == "assigned" for row in rows)
    summary = {
        "accuracy": accuracy,
        "accuracy_central": trainer.evaluate(central, x, y, statistics=statistics_from(trainer, central, x)).accuracy,
        "central_examples": central_examples,
        "fleet_examples": fleet_examples,
        "seconds": seconds,
        "interrupted": not ledger.finished,
        "aggregations": ledger.version,
        "bytes_down": sum(row["bytes_down"] for row in meters.values()),
        "bytes_up": sum(row["bytes_up"] for row in meters.values()),
        "bytes_if_full_models": full_bytes * (downloads + len(updates)),
        "broker": kind,
        "devices": [_device_summary(device, ledger) for device in devices],
    }
    (path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _device_summary(device: DemoDevice, ledger: Ledger) -> dict[str, Any]:
    known = ledger.devices.get(device.name)
    return {
        "id": device.name,
        "link_bps": device.link_bps,
        "measured_uplink_bps": None if known is None else known.uplink_bps,
        "density_first": None if known is None else known.first_density,
        "density_last": None if known is None else known.density,
        "updates": 0 if known is None else known.updates,
    }


def _train_centrally(
    console: Console, trainer: Trainer, folder: TaskFolder, devices: Sequence[DemoDevice], examples: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The same model on the pooled training data, for as many examples as the fleet used."""
    console.print(f"training the same model centrally on {examples} examples, for comparison")
    parts = []
    for device in devices:
        with np.load(device.data, allow_pickle=False) as arrays:
            train = arrays["part"] == 0
            parts.append((arrays["x"][train], arrays["y"][train]))
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    task = folder.task.training
    rng = np.random.default_rng(folder.task.seed)
    vector = folder.initial
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("central training", total=examples)
        done = 0
        while done + task.batch <= examples:
            order = rng.permutation(len(y))
            rounds = min(len(y) // task.batch, (examples - done) // task.batch)
            batches = [order[i * task.batch : (i + 1) * task.batch] for i in range(rounds)]
            vector = trainer.train(vector, None, ((x[b], y[b]) for b in batches), task.learning_rate).vector
            done += rounds * task.batch
            progress.update(bar, completed=done)
    return vector
