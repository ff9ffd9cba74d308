"""`regrow agent`. With another trainer than onnxruntime it loads torch and onnx, which the bare install has not."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from cli.systemd import watchdog_of
from cli.version import version
from edge_agent.agent import Agent, Companion
from edge_agent.bundle import read_bundle
from edge_agent.data.sources import open_source
from edge_agent.state import StateFolder
from edge_agent.trainer import Trainer, scan_program
from edge_agent.vitals import Vitals
from edge_agent.worker import MakeTrainer
from regrow.errors import LocalError
from regrow.local_training import Training

SOFTWARE = "regrow"


def agent(options: argparse.Namespace) -> int:
    """Run a device until SIGINT or SIGTERM."""
    bundle = read_bundle(options.bundle)
    if not 0 <= options.validation < 1:
        raise LocalError(f"--validation {options.validation}: at least 0 and below 1, for example 0.2")
    if options.gap < 0:
        raise LocalError(f"--gap {options.gap}: at least 0")
    if options.capacity is not None and options.capacity < 1:
        raise LocalError(f"--capacity {options.capacity}: at least 1")
    make = trainer_of(options.trainer)
    source = open_source(options.data, options.capacity, validation_fraction=options.validation, gap=options.gap)
    with StateFolder(options.state or Path(f"regrow-state-{bundle.device}")) as folder:
        releases = (
            ()
            if options.updates is None
            else (_releases(options.updates, bundle.device, folder.path, lambda: not running.device.needs_link),)
        )
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
            make=make,
            tune=options.trainer == "onnxruntime" and not options.no_tuning,
            companions=releases,
            vitals=Vitals(folder.path, version(), watchdog_of()),
        )
        samples = f"{source.training_size} samples to train on, {source.validation_size} to validate with"
        offer = f"{(running.identity.memory_bytes or 0) / 1e6:.0f} MB of memory to spare"
        print(f"{bundle.device}: {samples}; {offer}; looking for work at {bundle.broker} (Ctrl-C ends, --log says more)", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: running.stop())
        running.run()
    return 0


def _releases(settings: Path, device: str, state: Path, quiet: Callable[[], bool]) -> Companion:
    """What fetches releases; it needs the cryptography library, which a device without a fleet has not."""
    from edge_agent.release import Releases
    from edge_agent.updater import read_settings

    said = read_settings(settings)
    return Releases(device, state, said.keys, version=version(), quiet=quiet, prefix=said.prefix, board=said.board)


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
