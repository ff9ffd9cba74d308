"""The gateway's commands: task and serve."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from broker_server.broker import Broker
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.field.progress import field_of
from broker_server.field_herald import FieldHerald
from broker_server.fleet.sealing import Sealing
from broker_server.gateway import Companion, Gateway
from broker_server.herald import herald_of
from broker_server.inquiry import inquirer_of
from broker_server.instructions import Instructions, as_told
from broker_server.observations import recorder_of
from broker_server.promotions import Promotions
from broker_server.report import plot, write_metrics
from broker_server.run_record import why_unscored
from broker_server.runs import TaskFolder, create_run, load_task, newest_unfinished, read_task, recover
from broker_server.shelf import MappedShelf
from broker_server.stopping import stop_at_signals
from broker_server.store import Store
from broker_server.transport import check_broker
from broker_server.view import FleetView, watch
from broker_server.vitals import Vitals
from cli.access import password_in
from cli.arguments import GATEWAY_HOME, own_fleet
from cli.deployable import held_out, write_deployable
from cli.fleet_doors import Doors, OpenFleet, check_ports, open_fleet
from cli.page import instructions_of, page_of
from cli.systemd import watchdog_of
from cli.version import version
from edge_agent.inference import Inference
from edge_agent.trainer import Trainer
from export.task import build_task, is_stale, model_from, save_model
from regrow.broker_url import parse_broker_url
from regrow.coordinator import Coordinator
from regrow.errors import LocalError, UsageError
from regrow.ledger import Ledger
from regrow.levels import unit_densities_of
from regrow.local_training import statistics_from
from regrow.machine import Evaluate, Evaluated, Note
from regrow.scoring import score_name
from regrow.task import Training
from regrow.topics import check_name

Callbacks = tuple[Callable[[Note], None], Callable[[], str | None]]  # on_note and housekeeping of `Gateway.run`

TASK_TEXT = """name = "{name}"
model = "model.onnx"

# Every key and its default: docs/task.md.
[training]
loss = "{loss}"
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
        raise UsageError(f"{folder / 'task.toml'} exists already; edit it instead")
    model, was_there = options.model, folder.exists()
    made = not model.is_file()
    if made:
        model = _made_model(str(options.model), folder)
    try:
        _build(folder, model, Training(loss=options.loss))  # before anything is copied
    except BaseException:  # a model that cannot be trained leaves nothing behind, nor does Ctrl-C
        if made:
            model.unlink()
        if not was_there and folder.is_dir():
            folder.rmdir()
        raise
    if model.resolve() != (folder / "model.onnx").resolve():
        shutil.copyfile(model, folder / "model.onnx")
    (folder / "task.toml").write_text(TASK_TEXT.format(name=name, loss=options.loss))
    print(f"{folder}/task.toml written; next: regrow serve {folder}")
    _hint(folder / "model.onnx", options.loss)
    return 0


def _hint(model: Path, loss: str) -> None:
    """Say so where a model that looks like a classifier is to come near to values."""
    inference = Inference(model.read_bytes())
    outputs = inference.output_shape[1:]
    if loss in ("mse", "huber") and len(outputs) == 1 and outputs[0] not in (1, *inference.input_shape[1:]):
        print(
            f"a hint: {loss} compares the {outputs[0]} outputs of each example with as many float targets; if they are scores of classes, "
            'and the labels whole numbers, set loss = "cross_entropy" in task.toml'
        )


def _made_model(name: str, folder: Path) -> Path:
    """Write one of the models that come with Regrow, or that of a torch module, as the folder's model."""
    model = model_from(name)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder / "model.onnx")
    return folder / "model.onnx"


def task_build(options: argparse.Namespace) -> int:
    """Write the programs of a task folder."""
    folder = built(options.folder, always=True)
    print(f"{folder.path / 'build'}: {folder.layout.size} parameters, {folder.layout.always_kept_coordinates.size} always kept")
    return 0


def built(folder: Path, *, always: bool = False) -> TaskFolder:
    """The task folder with its programs, built when they are missing or stale."""
    task = read_task(folder)
    model = folder / task.model
    unit_densities = unit_densities_of(task)
    if always or is_stale(folder, model, unit_densities, task.training):
        _build(folder, model, task.training, unit_densities)
    loaded = load_task(folder)
    _check(loaded)
    return loaded


def _check(folder: TaskFolder) -> None:
    """What only the model or the held-out data can tell of a task's settings, before a run is made from them."""
    try:
        Ledger.start(folder.task, folder.layout, folder.initial, folder.units)
        if folder.task.evaluation.data is not None:
            evaluator(folder)
    except LocalError as error:
        raise LocalError(f"{folder.path / 'task.toml'}: {error}") from error


def _build(folder: Path, model: Path, training: Training, unit_densities: tuple[float, ...] | None = None) -> None:
    try:
        build_task(folder, model, unit_densities, training)
    except LocalError as error:
        raise LocalError(f"{model}: {error}") from error


# ---- serve -------------------------------------------------------------------------------------------------------------------------


def serve(options: argparse.Namespace) -> int:
    """Run a task until it is finished or stopped."""
    folder, path = _what_to_serve(options)
    home = (path.parent if path is not None else options.runs) / GATEWAY_HOME
    link = link_of(options, home, resuming=path is not None)  # before a run is made: a wrong address or a dead broker leaves none behind
    try:
        return serve_run(options, path or create_run(options.runs, folder, options.run), link)
    finally:
        link.stop()


def _what_to_serve(options: argparse.Namespace) -> tuple[TaskFolder, Path | None]:
    """(the built task, the run to go on with)."""
    if (options.task / "log.sqlite").is_file():
        if options.new_run or options.run:
            raise UsageError(f"{options.task} is a run to go on with: --run and --new-run need the task folder")
        _say_whose(options.task.resolve())
        return _unlocked(options.task)
    task = read_task(options.task)
    if options.run is not None:
        check_name(options.run, "run")
        if (options.runs / options.run).exists():
            raise UsageError(f"{options.runs / options.run} exists already: go on with it by `regrow serve {options.runs / options.run}`")
    unfinished = None if options.new_run or options.run else newest_unfinished(options.runs, task.name)
    if unfinished is not None:
        changed = (unfinished / "task" / "task.toml").read_bytes() != (options.task / "task.toml").read_bytes()
        why = "; task.toml has changed since, the run keeps its own copy" if changed else ""
        print(f"going on with {unfinished} (--new-run starts anew{why})", flush=True)
        return _unlocked(unfinished)
    return built(options.task), None


def _say_whose(run: Path) -> None:
    field = field_of(run)
    if field is not None:
        print(f"{run.name} was made by `regrow field run` for {field}; what is served here does not count there", flush=True)


def _unlocked(run: Path) -> tuple[TaskFolder, Path]:
    """A run to go on with, refused here and now when another process serves it."""
    Store.open(run).close()
    return load_task(run / "task"), run


@dataclass(frozen=True, slots=True)
class Link:
    """How the coordinator reaches its broker, what ends the broker, what keeps it alive, what else speaks over it, and what seals it."""

    url: str
    user: str
    password: str
    stop: Callable[[], None] = lambda: None
    keep: Callable[[], str | None] = lambda: None
    restarts: Callable[[], int] = lambda: 0
    companions: tuple[Companion, ...] = ()
    sealing: Callable[[str], Sealing | None] = lambda _: None


def link_of(options: argparse.Namespace, home: Path, *, resuming: bool) -> Link:
    """The broker that the options name, or one of our own, started. resuming: what it is for waits for a broker that is away."""
    fleet = _fleet_of(options, own_fleet(home.parent))
    check_ports(options, fleet)
    url = options.broker or os.environ.get("REGROW_BROKER")
    if url:
        address = parse_broker_url(url)
        if not address.username:
            raise UsageError("--broker: expected mqtt://user:password@host:port; the user may use everything below regrow/v1/")
        password = address.password or ("" if options.broker_password_file is None else password_in(options.broker_password_file))
        if not resuming:  # a run that is there waits for its broker
            check_broker(url, address.username, password)
        link = Link(url, address.username, password)
        return link if fleet is None else _with_fleet(link, fleet.doors(None, options.host))
    if options.passwords and (fleet is None or options.broker_kind == "mosquitto"):
        raise UsageError("--passwords needs a fleet, for its certificate, and amqtt: mosquitto's door lets nobody in without one")
    credentials = Credentials(home)
    kind = None if options.broker_kind == "auto" else options.broker_kind
    if fleet is None:
        broker = Broker(home, credentials, host=options.host or "127.0.0.1", port=options.port, kind=kind)
    else:
        door = fleet.door(options.host, options.tls_port)
        broker = Broker(home, credentials, port=options.port, kind="amqtt" if options.passwords else kind, door=door)
    broker.start()
    link = Link(broker.url, COORDINATOR, credentials.coordinator_password, broker.stop, _keeper(broker, home), lambda: broker.restarts)
    if fleet is None:
        hint = f"let devices in with `regrow device add NAME --runs {home.parent}`"
        print(f"{broker.kind} on {broker.host}:{broker.port}; {hint}", flush=True)
        return link
    print(fleet.said(broker), flush=True)
    if options.passwords:
        return link
    try:
        return _with_fleet(link, fleet.doors(broker, options.host))
    except LocalError:
        broker.stop()
        raise


def _fleet_of(options: argparse.Namespace, own: Path) -> OpenFleet | None:
    """The fleet that is served, which options that only a fleet has a use for must find."""
    fleet = open_fleet(options.fleet, own)
    if fleet is None and options.tls_port is not None:
        raise UsageError(
            f"--tls-port {options.tls_port} is for a fleet's devices, and there is no fleet in {own}: make one with `regrow fleet init`, "
            "or say the --runs or --fleet where it is"
        )
    return fleet


def _with_fleet(link: Link, doors: Doors) -> Link:
    def stop() -> None:
        doors.close()
        link.stop()

    def keep() -> str | None:
        return "; ".join(filter(None, (doors.look(), link.keep()))) or None

    return replace(link, stop=stop, keep=keep, companions=doors.companions, sealing=doors.sealing)


def serve_run(options: argparse.Namespace, path: Path, link: Link, on_note: Callable[[Note], None] | None = None) -> int:
    """Serve one run until it is finished or stopped; on_note: what hears of it, in the place of the table or of lines."""
    folder = load_task(path / "task")
    promotions = Promotions(path.parent, folder.task.name)
    home = path.parent / GATEWAY_HOME
    with Store.open(path) as store, herald_of(promotions) as herald, inquirer_of(home) as inquirer, _recording(options, home) as recording:
        if herald is None:
            print(
                f"another process publishes the promoted models of {folder.task.name}; when it has ended, start this one again", flush=True
            )
        ledger = recover(store, folder, MappedShelf(store.path, 4 * folder.layout.size))
        if ledger.finished:
            raise LocalError(f"{path} is finished ({ledger.finished}); serve the task folder for another, or return with `regrow rollback`")
        instructions = instructions_of(options, path)
        ledger.task = as_told(ledger.task, instructions.told)
        coordinator = Coordinator(ledger, path.name, folder.programs, secrets.randbits(31), takeover=options.takeover)
        evaluate = evaluator(folder) if folder.task.evaluation.data is not None else None
        companions = [*link.companions, *(companion for companion in (herald, inquirer, *recording) if companion is not None)]
        gateway = Gateway(
            coordinator,
            store,
            url=link.url,
            username=link.user,
            password=link.password,
            evaluate=evaluate,
            companions=companions,
            sealing=link.sealing(f"serve-{path.name}"),
            vitals=Vitals(path, version(), watchdog_of()),
            instructions=instructions,
        )
        reason = _serve(options, gateway, path, folder, link, instructions, on_note)
        finish(store, path, folder, ledger)
        if reason and not ledger.finished:
            raise LocalError(reason)
    print(f"{reason or 'stopped: the same command goes on where it was'}; {path} holds the store, model.onnx, metrics and plot.png")
    if not ledger.version:
        joined = f"{len(ledger.devices)} devices joined, min_devices in [fleet] is {folder.task.fleet.min_devices}"
        print(
            f"nothing was aggregated, so model.onnx is the untrained model: {joined}; `regrow serve --plain` says who is declined, and why"
        )
    if why := why_unscored(path, folder.task, ledger.version):
        print(why)
    return 0


@contextmanager
def _recording(options: argparse.Namespace, home: Path) -> Iterator[tuple[Companion, ...]]:
    """What stores devices' observations and tells them of field runs; of several processes of one home the first."""
    if options.no_observations:
        yield ()
        return
    with recorder_of(home, int(options.observations_mb * 1e6)) as recorder:
        if recorder is None:
            print("another process stores the observations of devices; when it has ended, start this one again", flush=True)
            yield (FieldHerald(home, lambda _: None, speaks=False),)
        else:
            yield recorder, FieldHerald(home, recorder.note_clock)


def evaluator(folder: TaskFolder) -> Callable[[Evaluate], Evaluated]:
    """Scores prefixes on the held-out data; a model with batch normalisation with running statistics from the same examples."""
    own = held_out(folder)
    if own is None:
        raise UsageError("data at $.evaluation: name held-out data to score the model with")
    file, x, y = own
    trainer = Trainer(folder.programs)
    try:  # data that do not fit the model are refused before the run begins
        trainer.evaluate(folder.initial, x, y, statistics=statistics_from(trainer, folder.initial, x))
    except LocalError as error:
        raise LocalError(f"{file}: {error}") from error

    def evaluate(effect: Evaluate) -> Evaluated:
        accuracies = {}
        for level, length in effect.lengths.items():
            vector = np.zeros(folder.layout.size, np.float32)
            vector[effect.coordinates[:length]] = effect.values[:length]
            accuracies[level] = trainer.evaluate(vector, x, y, statistics=statistics_from(trainer, vector, x)).accuracy
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


def _serve(
    options: argparse.Namespace,
    gateway: Gateway,
    path: Path,
    folder: TaskFolder,
    link: Link,
    instructions: Instructions,
    on_note: Callable[[Note], None] | None,
) -> str:
    stop_at_signals(gateway.stop, "stopping: writing the model and the metrics")
    print(f"run {path}", flush=True)
    view = None if options.plain or on_note is not None else FleetView(path.name, gateway.coordinator.ledger.task.stop.seconds)
    with (
        _measured(options, gateway, link, on_note or (_print_note if view is None else view.note)) as callbacks,
        page_of(options, gateway, callbacks, instructions, path, folder.task) as (note, keep),
    ):

        def work() -> str:
            return gateway.run(on_note=note, housekeeping=keep)

        return work() if view is None else watch(view, work)


def _measured(options: argparse.Namespace, gateway: Gateway, link: Link, note: Callable[[Note], None]) -> AbstractContextManager[Callbacks]:
    """(on_note, housekeeping) for the gateway, with its metrics where somebody wants them."""
    if options.metrics_port is None:
        return nullcontext((note, link.keep))
    from broker_server.metrics import measured

    return measured(gateway, note, link.keep, host=options.metrics_host, port=options.metrics_port, broker_restarts=link.restarts)


def _print_note(note: Note) -> None:
    if note.kind not in ("telemetry", "assigned"):
        print(time.strftime("%H:%M:%S"), note.kind, " ".join(f"{name}={value}" for name, value in note.fields.items()), flush=True)


def finish(store: Store, path: Path, folder: TaskFolder, ledger: Ledger) -> None:
    """Leave the model, the metrics and the picture in the run's folder."""
    write_deployable(folder, ledger, path / "model.onnx")
    rows = write_metrics(store, path)
    title = f"{path.name}: {folder.task.method.name}, {len(ledger.devices)} devices"
    plot(rows, path / "plot.png", title=title, score=score_name(folder.task.training))


def check_run(path: Path) -> None:
    """Raises LocalError: the folder holds no run."""
    if not (path / "log.sqlite").is_file():
        raise UsageError(f"{path} holds no run: `regrow runs` lists them")
