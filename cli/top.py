"""`regrow top`: the fleet as it is now, in a terminal; from the page of a running gateway, or from what a run's folder says."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from broker_server.page.past import Runs, last_state
from cli.access import password_in
from cli.page import pages
from regrow.errors import LocalError, UsageError

ANSWER_S = 3.0
MOST_BYTES = 64 * 2**20
HEAD_LINES, EVENTS = 5, 4
BAR = 12
MOST_REASON = 40  # characters
State = dict[str, Any]


def command(options: argparse.Namespace) -> int:
    """Show it until Ctrl-C, or once; what is no terminal gets one picture, without colours."""
    console = Console() if sys.stdout.isatty() else Console(width=160)
    look, plain = Looking(options), console.no_color or console.color_system is None
    if options.once or not sys.stdout.isatty():
        console.print(picture(look(), options.rows or sys.maxsize, plain=plain))
        return 0
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:  # Ctrl-C ends it
            rows = options.rows or max(console.height - HEAD_LINES - EVENTS, 1)
            try:
                shown = picture(look(), rows, plain=plain)
            except LocalError as error:
                shown = Text(str(error))
            live.update(shown, refresh=True)
            time.sleep(options.every)


class Looking:
    """Gives the state: of the page that was named, else of the newest run's page, else of the newest run's folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._runs, self._run, self._url = options.runs, options.run, options.url
        self._token = "" if options.token_file is None else password_in(options.token_file)
        if self._url is not None and not self._url.startswith("http://"):
            raise UsageError(f"--url {self._url}: expected http://HOST:PORT")
        if self._url is None and not self._runs.is_dir():
            raise UsageError(f"{self._runs} is no folder: say the --runs of `regrow serve`, or the --url of its page")

    def __call__(self) -> State:
        if self._url is not None:
            return asked(self._url, self._token)
        for url in pages(self._runs, self._run):
            with suppress(LocalError):  # of a gateway that ends just now
                return asked(url, self._token)
        return last_state(self._folder())

    def _folder(self) -> Path:
        runs = Runs(self._runs)
        if self._run is not None:
            path: Path | None = runs.path(self._run)
            if path is None:
                raise UsageError(f"there is no run {self._run} in {self._runs}: `regrow runs` lists them")
            return path
        lines = runs.all()
        if not lines:
            raise UsageError(f"no runs in {self._runs}: try `regrow demo`")
        return Path(self._runs) / str(lines[0]["run"])


def asked(url: str, token: str) -> State:
    """What a page says now.

    Raises:
        LocalError: it does not answer, or wants the token.
    """
    request = urllib.request.Request(f"{url.rstrip('/')}/api/state", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            state: State = json.loads(answer.read(MOST_BYTES))
    except urllib.error.HTTPError as error:
        cure = "say --token-file" if error.code == 401 else "is it a page of Regrow?"
        raise LocalError(f"{url}: {error.code} {error.reason}; {cure}") from error
    except (OSError, ValueError) as error:
        raise LocalError(f"{url} does not answer: {getattr(error, 'reason', error)}; see that `regrow serve` runs there") from error
    if not {"run", "devices", "events", "now_s"} <= state.keys():
        raise LocalError(f"{url}: this is no page of Regrow")
    return state


# ---- the picture -------------------------------------------------------------------------------------------------------------------------


def picture(state: State, rows: int, *, plain: bool) -> RenderableType:
    """The state as a head, a table of at most `rows` devices, and the last events. plain: no colours, so words say what they would."""
    run, devices = state["run"], state["devices"]
    table = Table(expand=False, pad_edge=False, box=None)
    for name in ("device", "state", "density", "", "link", "phase", "temp.", "power", "updates", "last update", "sent", "received"):
        table.add_column(
            name,
            justify="right" if name in ("link", "temp.", "power", "updates", "last update", "sent", "received") else "left",
            no_wrap=True,
        )
    shown = sorted(devices.items())[:rows]
    for who, row in shown:
        table.add_row(who, *_cells(row, state["now_s"], plain=plain))
    left = len(devices) - len(shown)
    more = [Text(f"and {left} more devices")] if left else []
    events = (Text(event["text"], style="" if plain else "dim") for event in state["events"][-EVENTS:])
    return Group(_head(run, len(devices)), table, *more, *events)


def _head(run: State, known: int) -> Text:
    said = "finished: " + run["finished"] if run.get("finished") else "paused" if run.get("paused") else run.get("phase", "")
    parts = [run["run"], said, f"version {run['version']}", f"{run.get('online', 0)} of {known} devices online"]
    if run.get("resting"):
        parts.append(f"{run['resting']} resting")
    if run.get("score") is not None:
        parts.append(f"accuracy {run['score']:.3f}")
    if run.get("mean_density") is not None:
        parts.append(f"mean density {run['mean_density']:.2f}")
    parts += [f"{_bytes(run.get('sent_bytes', 0))} sent", _joules(run.get("joules"))]
    return Text("  ·  ".join(part for part in parts if part), style="bold")


def _cells(row: State, now_s: float, *, plain: bool) -> list[str | Text]:
    density = float(row.get("density") or 0.0)
    word, colour = _state(row)
    updated = row.get("updated_s")
    full, empty = ("#", ".") if plain else ("█", "░")
    return [
        Text(word, style="" if plain else colour),
        f"{density:.2f}",
        Text(full * round(density * BAR) + empty * (BAR - round(density * BAR)), style="" if plain else "green"),
        "-" if row.get("uplink_bps") is None else f"{row['uplink_bps'] / 1000:.0f} kbit/s",
        row.get("phase") or "",
        "-" if row.get("temperature_c") is None else f"{row['temperature_c']:.0f} °C",
        "-" if row.get("watts") is None else f"{row['watts']:.1f} W",
        str(row.get("updates", 0)),
        "-" if updated is None else f"{max(now_s - updated, 0):.0f} s ago",
        _bytes(row.get("sent_bytes", 0)),
        _bytes(row.get("received_bytes", 0)),
    ]


def _state(row: State) -> tuple[str, str]:
    if row.get("declined") or row.get("excluded"):
        return "cannot train", "red"
    if row.get("resting"):
        return f"resting: {str(row['resting'])[:MOST_REASON]}", "yellow"
    if not row.get("online"):
        return "silent", "red"
    if row.get("standing"):
        return str(row["standing"]), "yellow"
    return ("limited", "yellow") if row.get("limit") else ("online", "")


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _joules(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} J"
