"""`regrow promote`: signs a model off for the fleet, publishes it, and says what the devices made of it."""

from __future__ import annotations

import argparse
import getpass
import queue
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from broker_server.credentials import Credentials
from broker_server.fleet.sealing import Sealing
from broker_server.gateway import Companion
from broker_server.herald import herald_of
from broker_server.promotions import HeadPlan, Promotions, SignOff, in_words
from broker_server.runs import TaskFolder, joined_devices, load_task, recover
from broker_server.stopping import stop_at_signals
from broker_server.store import Store
from broker_server.transport import Event, MqttBus
from cli.arguments import GATEWAY_HOME
from cli.deployable import write_deployable
from cli.gateway import Link, check_run, link_of
from edge_agent.inference import Inference
from export.head import with_head
from regrow.errors import LocalError, PeerError, UsageError
from regrow.guards import REFUSED
from regrow.ledger import Ledger
from regrow.local_step import METADATA, Step
from regrow.machine import Disconnected, Note, Publish, Subscribe, Unsubscribe
from regrow.scoring import score_name
from regrow.task import Training

POLL_S = 0.25
HEAD_STEPS = 200


def promote(options: argparse.Namespace) -> int:
    """Sign off a model, or withdraw one, and wait for the devices."""
    run: Path = options.run
    check_run(run)
    if options.withdraw and (options.model or options.local_head):
        raise UsageError("--withdraw takes back the newest model; it goes with neither --model nor --local-head")
    folder = load_task(run / "task")
    if options.model is not None:
        _check_kind(options.model)
    promotions = Promotions(run.parent, folder.task.name)
    if options.no_wait:
        _decide(options, folder, promotions)
        print(f"`regrow serve` publishes it to devices, now or when it next runs; so does `regrow promote {run}`")
        return 0
    home = run.parent / GATEWAY_HOME
    known = _known_devices(run, home)
    with herald_of(promotions) as herald, ExitStack() as stack:
        link = None
        if herald is not None:  # before anything is signed: a port that is taken, or a broker that is away, refuses
            link = link_of(options, home, resuming=False)
            stack.callback(link.stop)
        decision = _decide(options, folder, promotions)
        watch = _Watch(promotions, decision, known, stay=options.stay, score=score_name(folder.task.training))
        stop_at_signals(watch.stop, "stopping; the model stays signed off, and the same command goes on")
        if herald is None or link is None:
            print(f"a running `regrow serve` publishes it; waiting for {len(known)} devices (Ctrl-C ends the waiting only)", flush=True)
            _follow(watch, promotions)
        else:
            print("publishing; devices that are away take it when they connect (Ctrl-C ends)", flush=True)
            sealing = link.sealing(f"promote-{folder.task.name}")
            try:
                turn(link, [herald], watch.over, sealing)
            finally:
                if sealing is not None:
                    sealing.close(time.monotonic())
    watch.show()
    return 0


def _decide(options: argparse.Namespace, folder: TaskFolder, promotions: Promotions) -> SignOff:
    decision = promotions.withdraw(_who(options)) if options.withdraw else _sign_off(options, folder, promotions)
    print(_said(decision, promotions), flush=True)
    return decision


def _check_kind(model: Path) -> None:
    """Refuse, before a broker is started, what is no ONNX file by its name.

    Raises:
        UsageError: Python, or onnxruntime's own format.
    """
    if model.suffix == ".py" or ".py:" in model.name:
        cure = "export the module first, or make a task of it with `regrow task new --model`"
        raise UsageError(f"--model {model}: expected an ONNX file, which devices can run, not Python; {cure}")
    if model.suffix == ".ort":
        cure = "give the .onnx file that it was made from; `regrow export` writes both"
        raise UsageError(f"--model {model}: a .ort file is not taken, since devices check ONNX before they run it; {cure}")


# ---- signing off -------------------------------------------------------------------------------------------------------------------


def _sign_off(options: argparse.Namespace, folder: TaskFolder, promotions: Promotions) -> SignOff:
    run: Path = options.run
    with Store.open(run, read_only=True) as store:
        ledger = recover(store, folder)
    head: dict[str, bytes] | None = None
    plan = None
    if options.model is not None:
        if options.local_head:
            raise UsageError("--local-head needs the run's own model: with --model the file goes out as it is")
        try:
            model, name = options.model.read_bytes(), options.model.name
        except OSError as error:
            raise UsageError(f"--model {options.model}: {error.strerror or error}") from error
    else:
        model, head = _own_model(folder, ledger, options.local_head)
        name = f"{run.name}, version {ledger.version}"
        if head is not None:
            training = folder.task.training
            plan = HeadPlan(programs=list(head), steps=HEAD_STEPS, batch=training.batch, learning_rate=training.learning_rate)
    check_inference(model, folder.model_path.read_bytes(), name)
    told = {"run": run.name, "version": ledger.version, "who": _who(options), "file": name, "step": _scored_by(folder.task.training)}
    return promotions.sign_off(model, **told, head=head, plan=plan)


def _scored_by(training: Training) -> str:
    """What of a step devices need in order to score by it, as in a program's metadata; "" for the default."""
    step = Step(loss=training.loss, target=training.target, huber_delta=training.huber_delta)
    return step.metadata().get(METADATA, "")


def _own_model(folder: TaskFolder, ledger: Ledger, local_head: bool) -> tuple[bytes, dict[str, bytes] | None]:
    """(the file that `serve` leaves as model.onnx, what trains its last layer), from the durable log, so also while `serve` runs."""
    with tempfile.TemporaryDirectory() as aside:
        file = Path(aside) / "model.onnx"
        write_deployable(folder, ledger, file)
        return with_head(file, folder.task.training) if local_head else (file.read_bytes(), None)


def check_inference(model: bytes, forward: bytes, name: str) -> None:
    """Return if devices can use the model in place of the task's.

    Args:
        model, forward: ONNX files; of the second only the names and shapes of its input and output count.

    Raises:
        LocalError: it holds what devices refuse, cannot be run, or takes or gives something else.
    """
    try:
        ours, theirs = Inference(model), Inference(forward)
        for found, wanted in zip(_ends(ours), _ends(theirs), strict=True):
            if found != wanted:
                raise LocalError(f"{name}: {found}, but the task's model has {wanted}")
        shape = [size if isinstance(size, int) else 1 for size in theirs.input_shape[1:]]
        ours.run(np.zeros((2, *shape), ours.input_kind))
    except PeerError as error:
        wanted = "give a forward ONNX file (.onnx) with the input and output of the task's model"
        raise LocalError(f"{name} cannot be used on devices: {error}; {wanted}") from error


def _ends(model: Inference) -> tuple[str, str]:
    """What a model takes and gives, in words."""
    taken = f"input {model.input} of {model.input_kind} {model.input_shape[1:]} each"
    return taken, f"output {model.output} of {model.output_shape[1:]} each"


def _who(options: argparse.Namespace) -> str:
    return options.by or f"{getpass.getuser()}@{socket.gethostname()}"


def _said(decision: SignOff, promotions: Promotions) -> str:
    head = f"{promotions.task} model {decision.number}: {decision.action} by {decision.who} at {decision.when}"
    if decision.digest is None:
        return f"{head}; none was promoted before, so devices use none"
    return f"{head}; {decision.file}, {decision.bytes} bytes, SHA-256 {decision.sha256}"


# ---- waiting -----------------------------------------------------------------------------------------------------------------------


def _known_devices(run: Path, home: Path) -> set[str]:
    """Who has taken part in the run and may still connect, as far as this gateway knows who may."""
    joined = joined_devices(run)
    allowed = Credentials(home).devices() if (home / "credentials.json").exists() else ()
    return set(joined & set(allowed) if allowed else joined)


class _Watch:
    """What is waited for: the answers of the known devices to one decision. A line each as they come, and a table at the end."""

    def __init__(self, promotions: Promotions, decision: SignOff, known: Collection[str], *, stay: bool, score: str) -> None:
        self._promotions, self._decision, self._known = promotions, decision, set(known)
        self._stay = stay or not self._known  # without anybody to wait for, whoever connects is waited for
        self._score = score
        self._told: dict[str, str] = {}
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def over(self) -> bool:
        """Whether to wait no longer; tells what is new."""
        answers = {device: report for device, report in self._promotions.reports().items() if report.number == self._decision.number}
        for device, report in answers.items():
            said = in_words(report)
            if self._told.get(device) != said:
                self._told[device] = said
                print(f"{device}: {said}", flush=True)
        return self._stopped.is_set() or (not self._stay and self._known <= answers.keys())

    def show(self) -> None:
        """The table of all devices."""
        reports = self._promotions.reports()
        table = Table("device", "model", "examples", self._score, "before", "local head", "loss", "what became of it", pad_edge=False)
        for device in sorted(self._known | reports.keys()):
            report = reports.get(device)
            if report is None:
                table.add_row(device, *["-"] * 6, "no answer yet")
                continue
            new, old, tuned = report.new, report.old, report.tuned
            table.add_row(
                device,
                str(report.number),
                "-" if new is None else str(new.examples),
                *("-" if score is None else f"{score.accuracy:.3f}" for score in (new, old, tuned)),
                "-" if new is None else f"{new.loss:.3f}",
                f"{report.outcome} {report.reason}".strip(),
            )
        console = Console() if sys.stdout.isatty() else Console(width=160)
        console.print(table)
        missing = sorted(device for device in self._known if device not in reports or reports[device].number != self._decision.number)
        if missing:
            print(f"no answer to model {self._decision.number} yet from {', '.join(missing)}")


def _follow(watch: _Watch, promotions: Promotions) -> None:
    """Wait while another process publishes."""
    while not watch.over():
        lock = promotions.lock()
        if lock is not None:
            lock.close()
            print("`regrow serve` has ended; the same command goes on without it", flush=True)
            return
        time.sleep(POLL_S)


def turn(link: Link, companions: Sequence[Companion], over: Callable[[], bool], sealing: Sealing | None) -> None:
    """Be the gateway's end of the link without a run, for these machines, until it is over."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    bus = MqttBus(link.url, client_id=link.user, username=link.user, password=link.password, on_event=events.put)
    if sealing is not None:
        sealing.wait()
    bus.start()
    try:
        while not over():
            said = link.keep()
            if said:
                print(said, file=sys.stderr, flush=True)
            try:
                event: Event | None = events.get(timeout=POLL_S)
            except queue.Empty:
                event = None
            if isinstance(event, Disconnected):
                print(f"{event.reason}; trying again", file=sys.stderr, flush=True)
            now = time.monotonic()
            heard = event if event is None or sealing is None else sealing.open(event, now)
            effects = [effect for companion in companions for effect in companion.step(heard, now)]
            for effect in effects if sealing is None else (*effects, *sealing.tend(now)):
                if isinstance(effect, Publish):
                    bus.perform(effect if sealing is None else sealing.seal(effect, now))
                elif isinstance(effect, (Subscribe, Unsubscribe)):
                    bus.perform(effect)
                elif isinstance(effect, Note) and effect.kind == REFUSED:
                    print(" ".join(f"{name}={value}" for name, value in effect.fields.items()), file=sys.stderr, flush=True)
    finally:
        bus.close()
