"""The page of `regrow serve`, and `regrow page token`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from broker_server.doctor import is_served
from broker_server.gateway import Gateway
from broker_server.instructions import FILE, Instructions
from broker_server.page.access import token_in
from broker_server.page.controls import Controls
from broker_server.page.serving import FILE as PAGE_FILE
from broker_server.page.serving import Place, paged
from cli.arguments import GATEWAY_HOME, own_fleet, page_address
from cli.fleet_doors import open_fleet
from regrow.errors import UsageError
from regrow.machine import Note
from regrow.task import Task

Callbacks = tuple[Callable[[Note], None], Callable[[], str | None]]


def instructions_of(options: argparse.Namespace, run: Path) -> Instructions:
    """What the run has been told; with --paused to pause, which is said."""
    instructions = Instructions(run)
    if options.paused and not instructions.told.paused:
        instructions.tell(type(instructions.told)(paused=True, stop=instructions.told.stop))
    if instructions.told.paused:
        how = "start it on the page" if options.page != "off" else f"remove {run / FILE}, or leave out --no-page and start it there"
        print(f"the run is paused and gives out no work: {how}", flush=True)
    return instructions


def page_of(
    options: argparse.Namespace, gateway: Gateway, callbacks: Callbacks, instructions: Instructions, run: Path, task: Task
) -> AbstractContextManager[Callbacks]:
    """(on_note, housekeeping) for the gateway, with its page unless nobody wants it. task: as the run's task.toml says."""
    where = options.page
    if where == "off":
        (run / PAGE_FILE).unlink(missing_ok=True)  # of a gateway that was killed
        return nullcontext(callbacks)
    host, port = page_address(where)
    fleet = open_fleet(options.fleet, own_fleet(run.parent))
    file = run / "task" / "task.toml"
    controls = Controls(gateway, instructions, task, file, None if fleet is None else fleet.registry, options.in_force)
    return paged(gateway, callbacks, place=Place(host, port), run=run, home=run.parent / GATEWAY_HOME, controls=controls)


def token(options: argparse.Namespace) -> int:
    """Show the token, and the addresses that hold it of the pages that are open."""
    if not options.runs.is_dir():
        raise UsageError(f"{options.runs} is no folder: say the --runs of `regrow serve`")
    shown = token_in(options.runs / GATEWAY_HOME)
    print(shown)
    for url in pages(options.runs):
        print(f"{url}/#token={shown}")
    return 0


def pages(runs: Path, run: str | None = None) -> list[str]:
    """Addresses of the pages of these runs, or of one, the newest first; what a gateway that was killed has left is passed over."""
    found: list[tuple[float, str]] = []
    for file in runs.glob(f"*/{PAGE_FILE}"):
        if run not in (None, file.parent.name) or not is_served(file.parent):
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            found.append((file.stat().st_mtime, str(json.loads(file.read_text())["url"])))
    return [url for _, url in sorted(found, reverse=True)]
