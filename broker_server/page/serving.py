"""Opens the page of a gateway that is about to run, and closes it afterwards."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from broker_server.gateway import Gateway
from broker_server.page.access import Access, token_in
from broker_server.page.board import Board
from broker_server.page.controls import Controls
from broker_server.page.past import Runs, spent_by_device, updates_by_device, updates_by_level
from broker_server.page.server import Page
from regrow.errors import LocalError
from regrow.machine import Note

FILE = "page.json"
Callbacks = tuple[Callable[[Note], None], Callable[[], str | None]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the page listens; the port 0 is a free one."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """For a browser."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@contextmanager
def paged(gateway: Gateway, callbacks: Callbacks, *, place: Place, run: Path, home: Path, controls: Controls) -> Iterator[Callbacks]:
    """(on_note, housekeeping) for `gateway.run`, which do what `callbacks` do and keep the page; RUN/page.json says where it is.

    Raises:
        LocalError: it cannot listen there, or the token cannot be read.
    """
    note, keep = callbacks
    access = Access(token_in(home), place.host)
    board = Board(
        gateway,
        spent=spent_by_device(run),
        updates=updates_by_device(run),
        by_level=updates_by_level(run),
    )
    page = _listening(place, lambda where: Page((where.host, where.port), access, board, controls, Runs(run.parent), home, run))
    found = Place(place.host, page.server_port)
    print(_said(found, place, access, home.parent), flush=True)

    def show_and_note(what: Note) -> None:
        board.note(what)
        note(what)

    def look_and_keep() -> str | None:
        board.look()
        controls.look()
        return keep()

    board.look()
    page.start()
    try:
        _write(run / FILE, found)
        yield show_and_note, look_and_keep
    finally:
        page.close()
        (run / FILE).unlink(missing_ok=True)


def _listening(place: Place, opened: Callable[[Place], Page]) -> Page:
    try:
        return opened(place)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or not place.port:
            why = error.strerror or str(error)
            raise LocalError(f"cannot serve the page on {place.host}:{place.port}: {why}; choose another --page, or --no-page") from error
    return opened(Place(place.host, 0))


def _said(found: Place, wanted: Place, access: Access, runs: Path) -> str:
    lines = [f"page on {found.url}" + ("" if found.port == wanted.port or not wanted.port else f" (port {wanted.port} is taken)")]
    how = f"`regrow page token --runs {runs}` shows the token"
    if not access.local:
        lines.append(f"the page is open to the network without encryption; {how}, which it asks for: use it only on a network of your own")
    else:
        lines[0] += f"; to pause, stop or change the run there, {how}"
    return "\n".join(lines)


def _write(file: Path, place: Place) -> None:
    with suppress(OSError):  # only `regrow top` reads it, and it can be told the address
        file.write_text(json.dumps({"url": place.url, "pid": os.getpid()}) + "\n")
