"""`regrow agent`. With another trainer than onnxruntime it loads torch and onnx, which the bare install has not."""

from __future__ import annotations

import argparse
import logging
import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from cli.doctor import examined_by_agent, subject_of
from cli.energy import energy_of
from cli.main import INTERRUPTED
from cli.systemd import watchdog_of
from cli.version import version
from edge_agent.agent import Agent, Companion
from edge_agent.budgets import BUDGET, Budgets, RoundJoules, budget_of, in_words
from edge_agent.bundle import Bundle, read_bundle
from edge_agent.checkup import Checkup
from edge_agent.conditions import InBackground, Sensors
from edge_agent.data.sources import open_source
from edge_agent.enrolment import enrol_until_done
from edge_agent.identity import Identity, verify
from edge_agent.identity_folder import adopt, can_speak, has_certificate, in_use, is_news, is_wiping, read_about, settle, wipe
from edge_agent.observer import Observer
from edge_agent.scan import scan_program
from edge_agent.sealing import Sealing
from edge_agent.senses import Senses
from edge_agent.state import StateFolder
from edge_agent.trainer import Trainer
from edge_agent.vitals import Vitals
from edge_agent.worker import MakeTrainer
from regrow.budget import Budget
from regrow.errors import LocalError, UsageError
from regrow.local_training import Training
from regrow.message import DIGEST_BYTES
from regrow.watchdog import Watchdog

SOFTWARE = "regrow"
WIPED = "{}: wiped by its fleet; a new claim lets this device in again"


def agent(options: argparse.Namespace) -> int:
    """Run a device until SIGINT or SIGTERM."""
    _check(options)
    make = trainer_of(options.trainer)
    watchdog = watchdog_of()
    if options.identity is None:
        return _run(options, make, read_bundle(options.bundle), None, watchdog)
    with in_use(options.identity) as note_state:  # before a claim is spent
        member = _member(options.identity, options.claim, watchdog)
        if member is None:
            return 0
        if ended := member.ended(time.time()):
            logging.getLogger(__name__).warning("%s", ended)
        return _run(options, make, Bundle(member.device, member.broker, None), member, watchdog, note_state)


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.validation < 1:
        raise UsageError(f"--validation {options.validation}: at least 0 and below 1, for example 0.2")
    if options.gap < 0:
        raise UsageError(f"--gap {options.gap}: at least 0")
    if options.capacity is not None and options.capacity < 1:
        raise UsageError(f"--capacity {options.capacity}: at least 1")
    if options.storage == "float16" and options.trainer != "onnxruntime":
        raise UsageError(f"--storage float16: the trainer {options.trainer} stores what torch does; use --trainer onnxruntime")
    if options.claim is not None and options.identity is None:
        raise UsageError("--claim begins an identity: say --identity DIR, where that shall be")
    if options.metered is not None and not options.unmetered_only:
        raise UsageError("--metered names what --unmetered-only keeps away from: say both")
    _budget(options)


def _budget(options: argparse.Namespace) -> Budget:
    return budget_of(
        max_bytes_per_day=options.max_bytes_per_day,
        max_joules_per_round=options.max_joules_per_round,
        battery_floor=options.battery_floor,
        max_temperature=options.max_temperature,
        hours=options.hours,
        unmetered_only=options.unmetered_only,
    )


def _budgets(options: argparse.Namespace, broker: str, folder: StateFolder, joules: RoundJoules | None) -> Budgets | None:
    """The owner's limits at work, or None without any. joules: None where nothing measures or models them.

    Raises:
        LocalError: one cannot be judged here.
    """
    budget = _budget(options)
    if not budget:
        folder.delete(BUDGET)
        return None
    named = None if options.metered is None else frozenset(name.strip() for name in options.metered.split(",")) - {"none", ""}
    sensors = Sensors(budget, broker, named)
    sensors.check()
    return Budgets(budget, folder, InBackground(sensors.read), joules=joules)


def _run(
    options: argparse.Namespace,
    make: MakeTrainer,
    bundle: Bundle,
    member: Identity | None,
    watchdog: Watchdog,
    note_state: Callable[[Path], None] = lambda _: None,
) -> int:
    source = open_source(options.data, options.capacity, validation_fraction=options.validation, gap=options.gap)
    with StateFolder(options.state or Path(f"regrow-state-{bundle.device}")) as folder:
        note_state(folder.path)
        subject = subject_of(bundle, folder.path, member)
        companions: list[Companion] = [Checkup(bundle.device, examined_by_agent(subject), lambda: running.identity.memory_bytes)]
        if options.updates is not None:
            companions.append(_releases(options.updates, bundle.device, folder.path, lambda: running.quiet))
        sealing = None if member is None else Sealing(member, verify, time.monotonic(), since_ms=1000 * member.about.since_s)
        clock = time.time if sealing is None else lambda: sealing.now_s(time.monotonic())
        observer = _observer(options, bundle.device, folder, clock, lambda: running)
        senses = Senses(clock, observer, partial(energy_of, options, clock), partial(_budgets, options, bundle.broker, folder))
        running = Agent(
            bundle,
            folder,
            source,
            max_uplink_bps=options.max_uplink_bps,
            max_downlink_bps=options.max_downlink_bps,
            threads=options.threads,
            software=SOFTWARE,
            memory_bytes=None if options.memory_mb is None else int(options.memory_mb * 1e6),
            local_head=options.local_head,
            storage=options.storage if options.trainer == "onnxruntime" else "float32",
            make=make,
            tune=options.trainer == "onnxruntime" and not options.no_tuning,
            member=member,
            sealing=sealing,
            companions=companions,
            vitals=Vitals(folder.path, version(), watchdog),
            senses=senses,
        )
        interrupted = at_signals(running.stop)
        samples = samples_in_words(source.training_size, source.validation_size)
        offer = f"{(running.identity.memory_bytes or 0) / 1e6:.0f} MB of memory to spare"
        print(f"{bundle.device}: {samples}; {offer}; looking for work at {bundle.broker} (Ctrl-C ends, --log says more)", flush=True)
        if allowed := in_words(_budget(options)):
            print(f"{bundle.device}: its owner allows {allowed}", flush=True)
        running.run()
    if member is not None and not can_speak(member.folder):
        print(WIPED.format(member.folder), flush=True)
    if running.computes:  # as edge_agent.worker.Worker.close has it; everything that was promised is on the disk
        logging.shutdown()
        os._exit(INTERRUPTED if interrupted.is_set() else 0)
    return 0


def samples_in_words(training: int, validation: int) -> str:
    """What a device holds, and a warning where nothing can be scored on it."""
    said = f"{training} sample{'s' * (training != 1)} to train on, {validation} to validate with"
    return said if validation else f"{said} (so it sends no scores: give more data, or a larger --validation)"


def _observer(
    options: argparse.Namespace, device: str, folder: StateFolder, clock: Callable[[], float], running: Callable[[], Agent]
) -> Observer | None:
    """What keeps and sends observations. clock: the fleet's time where the device knows it."""
    if options.no_observations:
        return None
    return Observer(
        device,
        folder,
        secrets.token_bytes(DIGEST_BYTES),
        clock,
        quiet=lambda: running().quiet,
        uplink_bps=lambda: running().device.uplink_bps,
        journal_bytes=int(options.journal_mb * 1e6),
        software=version(),
    )


def _releases(settings: Path, device: str, state: Path, quiet: Callable[[], bool]) -> Companion:
    """What fetches releases; it needs the cryptography library, which a device without a fleet has not."""
    from edge_agent.release import Releases
    from edge_agent.update_files import read_settings

    said = read_settings(settings)
    return Releases(device, state, said.keys, version=version(), quiet=quiet, prefix=said.prefix, board=said.board)


def _member(folder: Path, claim: Path | None, watchdog: Watchdog) -> Identity | None:
    """The device's identity, made from its claim first where that is not done; None: it was stopped, or was being wiped.

    Raises:
        LocalError: there is neither, or the gateway refuses the claim.
    """
    if is_wiping(folder) and not can_speak(folder):  # a power cut came between the report and the last key
        wipe(folder)
        print(WIPED.format(folder), flush=True)
        return None
    settle(folder)
    if claim is not None and is_news(claim, folder):
        adopt(folder, claim)
    about = read_about(folder)
    if about.claim is None:
        return Identity.load(folder)
    print(f"{about.device}: joining fleet {about.fleet} at {about.enrol}", flush=True)
    stopped = threading.Event()
    at_signals(stopped.set)
    try:
        return enrol_until_done(folder, stopped, random.Random(), lambda: _tries(watchdog, about.fleet))
    except LocalError as error:
        if not has_certificate(folder):
            raise
        logging.getLogger(__name__).warning("%s; going on with the certificate that is there", error)
        return Identity.load(folder)


def _tries(watchdog: Watchdog, fleet: str) -> None:
    watchdog.turn(time.monotonic(), "", f"trying to join {fleet}")


def at_signals(stop: Callable[[], None]) -> threading.Event:
    """Call this at SIGINT and SIGTERM, and tell of the first whoever heard it before; the event is set once that has come."""
    before, pressed = signal.getsignal(signal.SIGINT), threading.Event()

    def interrupted(number: int, frame: FrameType | None) -> None:
        pressed.set()
        stop()
        if callable(before):  # whoever counts them: the end is orderly
            with suppress(KeyboardInterrupt):
                before(number, frame)

    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, lambda *_: stop())
    return pressed


def trainer_of(name: str) -> MakeTrainer:
    """What makes the trainers of that name: onnxruntime, torch or torch-cuda.

    Raises:
        LocalError: it needs a package that is not installed here, or there is no CUDA device.
    """
    if name == "onnxruntime":
        return Trainer
    missing = [package for package in ("torch", "onnx") if find_spec(package) is None]
    if missing:
        raise LocalError(
            f"--trainer {name}: {' and '.join(missing)} not installed here; pip install 'regrow[torch]', "
            "or on a Jetson the board's own torch and 'regrow[export]'"
        )
    from export.torch_trainer import TorchTrainer, check_cuda

    if name == "torch-cuda":
        check_cuda()

    def make(programs: Mapping[str, bytes], threads: int) -> Training:
        if "evaluate" in programs:  # onnx would read files that a program names
            scan_program("evaluate", programs["evaluate"])
        return TorchTrainer(programs, threads, device="cuda" if name == "torch-cuda" else "cpu")

    return make
