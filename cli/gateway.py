"""The gateway's commands: task, serve, device, runs, rollback, verify."""

from __future__ import annotations

import argparse
import secrets
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from rich.console import Console
from rich.table import Table

from broker_server.audit import audit
from broker_server.broker import Broker
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.gateway import Gateway
from broker_server.report import plot, write_metrics
from broker_server.runs import TaskFolder, create_run, list_runs, load_task, newest_unfinished, read_task, recover
from broker_server.runs import rollback as roll_back
from broker_server.store import Store
from broker_server.view import FleetView, watch
from edge_agent.data.sources import open_source
from edge_agent.trainer import Trainer
from export.task import build_task, is_stale, write_trained
from regrow.coordinator import Coordinator
from regrow.errors import LocalError
from regrow.ledger import Ledger
from regrow.machine import Evaluate, Evaluated, Note
from regrow.topics import check_name

GATEWAY_HOME = ".gateway"
TASK_TEXT = """name = "{name}"
model = "model.onnx"

# Everything below is a default; see docs/task.md for every key.
[training]
local_steps = 20
batch = 20
learning_rate = 0.05

[stop]
seconds = 3600
"""


# ---- task --------------------------------------------------------------------------------------------------------------------------


def task_new(options: argparse.Namespace) -> int:
    """Make a task folder around a model, and build it, so that a model that cannot be trained is refused at once."""
    folder: Path = options.folder
    name = check_name(folder.resolve().name, "task")
    if (folder / "task.toml").exists():
        raise LocalError(f"{folder / 'task.toml'} exists already; edit it instead")
    if not options.model.is_file():
        raise LocalError(f"--model {options.model}: there is no such file")
    folder.mkdir(parents=True, exist_ok=True)
    if options.model.resolve() != (folder / "model.onnx").resolve():
        shutil.copyfile(options.model, folder / "model.onnx")
    build_task(folder, folder / "model.onnx")
    (folder / "task.toml").write_text(TASK_TEXT.format(name=name))
    print(f"{folder}/task.toml written; next: regrow serve {folder}")
    return 0


def task_build(options: argparse.Namespace) -> int:
    """Write the programs of a task folder."""
    folder = built(options.folder, always=True)
    print(f"{folder.path / 'build'}: {folder.layout.size} parameters, {folder.layout.always_kept_coordinates.size} always kept")
    return 0


def built(folder: Path, *, always: bool = False) -> TaskFolder:
    """The task folder with its programs, built when they are missing or stale."""
    model = folder / read_task(folder).model
    if always or is_stale(folder, model):
        build_task(folder, model)
    return load_task(folder)


# ---- serve -------------------------------------------------------------------------------------------------------------------------


def serve(options: argparse.Namespace) -> int:
    """Run a task until it is finished or stopped."""
    path = _run_to_serve(options)
    folder = load_task(path / "task")
    with Store.open(path) as store:
        ledger = recover(store, folder)
        if ledger.finished:
            raise LocalError(f"{path} is finished ({ledger.finished}); start another with --new-run, or return with `regrow rollback`")
        gateway, stop_broker, keep = _gateway(options, path, folder, store, ledger)
        try:
            reason = _serve(options, gateway, path, folder, keep)
        finally:
            stop_broker()
        finish(store, path, folder, gateway.coordinator.ledger)
        if reason and not gateway.coordinator.ledger.finished:
            raise LocalError(reason)
    print(f"{reason or 'stopped: the same command goes on where it was'}; {path} holds the store, model.onnx, metrics and plot.png")
    return 0


def _run_to_serve(options: argparse.Namespace) -> Path:
    if (options.task / "log.sqlite").is_file():
        run: Path = options.task
        return run
    task = read_task(options.task)
    options.runs.mkdir(parents=True, exist_ok=True)
    unfinished = None if options.new_run or options.run else newest_unfinished(options.runs, task.name)
    if unfinished is not None:
        print(f"going on with {unfinished} (--new-run starts anew)")
        return unfinished
    if options.run is not None:
        check_name(options.run, "run")
    return create_run(options.runs, built(options.task), options.run)


def _gateway(
    options: argparse.Namespace, path: Path, folder: TaskFolder, store: Store, ledger: Ledger
) -> tuple[Gateway, Callable[[], None], Callable[[], str | None]]:
    """The gateway, what stops its broker, and what keeps it alive."""
    coordinator = Coordinator(ledger, path.name, folder.programs, secrets.randbits(31), takeover=options.takeover)
    evaluate = evaluator(folder) if folder.task.evaluation.data is not None else None
    if options.broker:
        parts = urlsplit(options.broker)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or not parts.username:
            raise LocalError("--broker: expected mqtt://user:password@host:port; the user may use everything below regrow/v1/")
        url = f"{parts.scheme}://{parts.hostname}:{parts.port or (8883 if parts.scheme == 'mqtts' else 1883)}"
        user, password = unquote(parts.username), unquote(parts.password or "")
        return Gateway(coordinator, store, url=url, username=user, password=password, evaluate=evaluate), lambda: None, lambda: None
    home = options.runs / GATEWAY_HOME
    credentials = Credentials(home)
    kind = None if options.broker_kind == "auto" else options.broker_kind
    broker = Broker(home, credentials, host=options.host, port=options.port, kind=kind)
    broker.start()
    print(f"{broker.kind} on {options.host}:{broker.port}; let devices in with `regrow device add NAME --runs {options.runs}`")
    secret = credentials.coordinator_password
    gateway = Gateway(coordinator, store, url=broker.url, username=COORDINATOR, password=secret, evaluate=evaluate)
    return gateway, broker.stop, _keeper(broker, home)


def evaluator(folder: TaskFolder) -> Callable[[Evaluate], Evaluated]:
    """Scores prefixes on the task's held-out data, a path relative to the task folder."""
    file = folder.path / (folder.task.evaluation.data or "")
    x, y = open_source(str(file), validation_fraction=0.0).everything()
    trainer = Trainer(folder.programs)

    def evaluate(effect: Evaluate) -> Evaluated:
        accuracies = {}
        for level, length in effect.lengths.items():
            vector = np.zeros(folder.layout.size, np.float32)
            vector[effect.coordinates[:length]] = effect.values[:length]
            accuracies[level] = trainer.evaluate(vector, x, y).accuracy
        return Evaluated(effect.version, accuracies)

    return evaluate


def _keeper(broker: Broker, home: Path) -> Callable[[], str | None]:
    """Keep the broker alive and its passwords as `regrow device` last wrote them."""
    file = home / "credentials.json"
    seen = [file.stat().st_mtime_ns]

    def keep() -> str | None:
        now = file.stat().st_mtime_ns
        if now != seen[0]:
            seen[0] = now
            broker.reload(Credentials(home))
        return broker.poll()

    return keep


def _serve(options: argparse.Namespace, gateway: Gateway, path: Path, folder: TaskFolder, keep: Callable[[], str | None]) -> str:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: gateway.stop())
    print(f"run {path}")
    if options.plain:
        return gateway.run(on_note=_print_note, housekeeping=keep)
    view = FleetView(path.name, folder.task.stop.seconds)
    return watch(view, lambda: gateway.run(on_note=view.note, housekeeping=keep))


def _print_note(note: Note) -> None:
    if note.kind not in ("telemetry", "assigned"):
        print(time.strftime("%H:%M:%S"), note.kind, " ".join(f"{name}={value}" for name, value in note.fields.items()), flush=True)


def finish(store: Store, path: Path, folder: TaskFolder, ledger: Ledger) -> None:
    """Leave the model, the metrics and the picture in the run's folder."""
    write_trained(folder.model_path, ledger.flat_weights, path / "model.onnx")
    rows = write_metrics(store, path)
    plot(rows, path / "plot.png", title=f"{path.name}: {folder.task.method.name}, {len(ledger.devices)} devices")


# ---- devices -----------------------------------------------------------------------------------------------------------------------


def device_add(options: argparse.Namespace) -> int:
    """Give a device its password and write its bundle."""
    credentials = Credentials(options.runs / GATEWAY_HOME)
    credentials.add_device(options.name)
    print(credentials.write_bundle(options.name, options.broker, options.out))
    return 0


def device_remove(options: argparse.Namespace) -> int:
    """Take a device's access away."""
    Credentials(options.runs / GATEWAY_HOME).remove_device(options.name)
    print(f"{options.name} can no longer connect")
    return 0


def device_list(options: argparse.Namespace) -> int:
    """Name the devices that may connect."""
    print("\n".join(Credentials(options.runs / GATEWAY_HOME).devices()) or "no devices yet: regrow device add NAME")
    return 0


# ---- runs --------------------------------------------------------------------------------------------------------------------------


def runs(options: argparse.Namespace) -> int:
    """List the runs."""
    table = Table("run", "task", "method", "started", "version", "devices", "updates", "accuracy", "state", pad_edge=False)
    found = list(list_runs(options.runs))
    for info in found:
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.started_s))
        accuracy = "-" if info.accuracy is None else f"{info.accuracy:.3f}"
        numbers = (str(info.version), str(info.devices), str(info.updates), accuracy)
        table.add_row(info.path.name, info.task, info.method, started, *numbers, info.finished or "unfinished")
    Console().print(table if found else f"no runs in {options.runs}: try `regrow demo`")
    return 0


def rollback(options: argparse.Namespace) -> int:
    """Return to an earlier snapshot."""
    old, new = roll_back(options.run, options.to)
    print(f"{options.run}: the model of version {old} is now version {new}; go on with `regrow serve {options.run}`")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Replay a run's log through reference.py."""
    outcome = audit(options.run)
    print(
        f"{options.run}: {outcome.updates} receipted updates, {outcome.aggregations} aggregations; the model differs from the "
        f"reference by at most {outcome.worst:.2g} of the tolerance"
    )
    return 0 if outcome.worst <= 1.0 else 1
