"""The fleet as people see it in a terminal: made from the coordinator's notes, drawn with rich."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from regrow.machine import Note

SILENT_S = 30.0
HAS_WORK = ("joined", "assigned")
BAD = {"memory": "too little memory", "data": "cannot train"}
PHASE_AFTER = {"assigned": "fetching", "update": "waiting", "rejected": "waiting"}  # sooner than the next telemetry


@dataclass(slots=True)
class _Row:
    fields: dict[str, Any] = field(default_factory=dict)
    updates: int = 0
    declined: str = ""
    """What for, nothing once it has work again."""
    heard_s: float = 0.0
    resting: bool = False
    """By its owner's limits."""


class FleetView:
    """Remembers the newest note of every device and of the run; `note` may be called from any thread.

    Args:
        title: first words of the head line.
        planned_s: duration of the run, for the time left.
    """

    def __init__(self, title: str, planned_s: float | None = None) -> None:
        self._title, self._planned_s = title, planned_s
        self._lock = threading.Lock()
        self._rows: dict[str, _Row] = {}
        self._run: dict[str, Any] = {"version": 0}
        self._events: list[str] = []
        self._started_s = time.monotonic()

    def note(self, note: Note) -> None:
        with self._lock:
            who = note.fields.get("device")
            if isinstance(who, str):
                row = self._rows.setdefault(who, _Row())
                row.heard_s = time.monotonic()
                row.fields.update({name: value for name, value in note.fields.items() if value is not None})
                row.updates += note.kind == "update"
                if note.kind == "declined":
                    row.declined = "memory" if "needs_bytes" in note.fields else "data"
                elif note.kind in HAS_WORK:
                    row.declined = ""
                if note.kind in ("limited", "free again"):
                    row.resting = note.kind == "limited" and note.fields["most"] is None
                if note.kind in PHASE_AFTER:
                    row.fields["phase"] = PHASE_AFTER[note.kind]
            if note.kind == "aggregated":
                self._run.update(note.fields)
            said = in_words(note)
            if said:
                self._events = [*self._events, said][-4:]

    def render(self) -> RenderableType:
        """The picture of this moment."""
        with self._lock:
            return Group(self._head(), self._table(), *(Text(event, style="dim") for event in self._events))

    def _head(self) -> Text:
        elapsed_s = time.monotonic() - self._started_s
        parts = [self._title, f"version {self._run['version']}", f"{elapsed_s:.0f} s"]
        if self._planned_s is not None:
            parts.append(f"{max(self._planned_s - elapsed_s, 0):.0f} s left")
        if self._run.get("mean_density") is not None:
            parts.append(f"mean density {self._run['mean_density']:.2f}")
        declined = Counter(row.declined for row in self._rows.values() if row.declined)
        for why, count in sorted(declined.items(), reverse=True):  # the task may wait for its `min_devices` because of them
            parts.append(f"{count} declined for {why}")
        head = Text("  ·  ".join(parts), style="bold")
        scores = self._run.get("scores") or {}
        levels = "   ".join(f"{float(level):g}: {score:.3f}" for level, score in sorted(scores.items(), key=lambda s: float(s[0])))
        head.append("\naccuracy per level   " + (levels or "no report yet"), style="not bold cyan")
        return head

    def _table(self) -> Table:
        table = Table(expand=False, pad_edge=False)
        for name in ("device", "measured link", "density", "", "version", "staleness", "updates", "up", "down", "phase"):
            right = name in ("measured link", "version", "staleness", "updates", "up", "down")
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        for who, row in sorted(self._rows.items()):
            known = row.fields
            density = float(known.get("density", 0.0))
            silent = time.monotonic() - row.heard_s > SILENT_S
            bad = BAD.get(row.declined) or (
                "limited" if row.resting else "silent" if silent else "cannot train" if known.get("failed") else ""
            )
            table.add_row(
                who,
                f"{known.get('uplink_bps', 0) / 1000:.0f} kbit/s",
                f"{density:.2f}",
                Text("█" * round(density * 12) + "░" * (12 - round(density * 12)), style="green"),
                str(known.get("version", "-")),
                str(known.get("staleness", "-")),
                str(row.updates),
                _bytes(known.get("bytes_up", 0)),
                _bytes(known.get("bytes_down", 0)),
                Text(bad, style="red") if bad else Text(str(known.get("phase", "waiting"))),
            )
        return table


def watch(view: FleetView, work: Callable[[], str]) -> str:
    """Show the view, redrawn twice a second, while the work is done."""
    ended = threading.Event()
    with Live(view.render(), console=Console(), refresh_per_second=4) as live:

        def draw() -> None:
            while not ended.wait(0.5):
                live.update(view.render())

        painter = threading.Thread(target=draw, daemon=True)
        painter.start()
        try:
            return work()
        finally:
            ended.set()
            painter.join()
            live.update(view.render())


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def in_words(note: Note) -> str:
    """What a note says to people; nothing for one that is not worth a line."""
    fields = note.fields
    words = {
        "restored": "{device} regrows from {density_from:g} to {density:g}",
        "joined": "{device} joined at {uplink_bps:.0f} bit/s with density {density:g}, bound by {bound_by}",
        "declined": (
            "{device} declined: training takes at least {needs}, it offers {offers}, {missing} too few, and gets no work; "
            "lower [training] batch or the smallest density, or free memory there"
        ),
        "restarting": (
            "{device} was started more than {starts} times in {within_s:.0f} s and gets no work meanwhile: "
            "its last start counts in {wait_s:.0f} s"
        ),
        "unfit": "{device} declined: {reason}; it gets no work until its data change or it starts anew",
        "rejected": "{device}: update rejected, {reason}",
        "released": "{device}: assignment ended, {reason}",
        "refreshed": "order epoch {epoch} ({bytes} bytes of index sets)",
        "seal refused": "{peer}: refused {times} times ({kind}): {reason}",
        "limited": "{device} {does}: {reason}",
        "free again": "{device}: no limit of its owner holds any more",
        "density limited": "{device} goes from density {density_from:g} to {density:g}, as its owner allows",
        "promotion": "{device}: model {promotion} {said}",
        "finished": "finished: {reason}",
    }
    kind = note.kind if note.kind != "declined" or "needs_bytes" in fields else "unfit"
    if kind == "declined":
        needs, half, offers = fields["needs_bytes"], fields.get("needs_bytes_float16"), fields["memory_bytes"]
        said = f"{needs:,} bytes of memory" + ("" if half is None else f", with float16 storage {half:,}")
        least = needs if half is None or fields["storage"] == "float32" else half if fields["storage"] == "float16" else min(needs, half)
        fields = {"device": fields["device"], "needs": said, "offers": f"{offers:,}", "missing": f"{least - offers:,}"}
    return words[kind].format(**fields) if kind in words else ""
