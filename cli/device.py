"""`regrow agent`."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from edge_agent.agent import Agent, read_bundle
from edge_agent.data.sources import open_source
from edge_agent.state import StateFolder
from regrow.errors import LocalError

SOFTWARE = "regrow"


def agent(options: argparse.Namespace) -> int:
    """Run a device until SIGINT or SIGTERM."""
    bundle = read_bundle(options.bundle)
    if options.threads < 1:
        raise LocalError(f"--threads {options.threads}: at least 1")
    if not 0 <= options.validation < 1:
        raise LocalError(f"--validation {options.validation}: at least 0 and below 1, for example 0.2")
    if options.gap < 0:
        raise LocalError(f"--gap {options.gap}: at least 0")
    if options.capacity is not None and options.capacity < 1:
        raise LocalError(f"--capacity {options.capacity}: at least 1")
    source = open_source(options.data, options.capacity, validation_fraction=options.validation, gap=options.gap)
    with StateFolder(options.state or Path(f"regrow-state-{bundle.device}")) as folder:
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
        )
        samples = f"{source.training_size} samples to train on, {source.validation_size} to validate with"
        offer = f"{(running.identity.memory_bytes or 0) / 1e6:.0f} MB of memory to spare"
        print(f"{bundle.device}: {samples}; {offer}; looking for work at {bundle.broker} (Ctrl-C ends, --log says more)", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: running.stop())
        running.run()
    return 0
