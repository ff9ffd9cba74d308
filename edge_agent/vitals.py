"""Whether this device gets anywhere: it feeds the service manager's watchdog, and leaves `health.json` for whoever installs updates.

Healthy is a device that is connected or trying, and that trains or waits for work. The loop tries to connect by itself, each attempt with
a deadline, so a loop that turns is one that tries; whether training advances is what the training thread says step by step.

health.json is plain JSON in the state folder, replaced once a minute, at once when something happens for the first time, and without fsync,
which would wear the card:
    version      of the software that wrote it
    boot         the kernel's boot id: the seconds below are CLOCK_MONOTONIC of that boot, the same for every process of the machine
    started_s    when this agent started
    written_s    when the file was written
    connected_s  when there was last a connection to the broker that had let us in; null: not since the start
    round_s      when the coordinator last accepted an update; null: not since the start
    phase        of the device (docs/architecture.md), or "stuck"
    deaf         what the coordinator says is sealed by a key that this device does not know
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from regrow.device import Phase
from regrow.machine import Note
from regrow.watchdog import Patience, Progress, Watchdog

log = logging.getLogger(__name__)
HEALTH = "health.json"
WRITE_S = 60.0
LOST_JOB_S = 60.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Vitals:
    """One agent's, turned by its loop.

    Args:
        state: the folder that health.json goes to.
        version: of the software.
        watchdog: what feeds the service manager.
        patience: with the training thread.
    """

    def __init__(self, state: Path, version: str = "", watchdog: Watchdog | None = None, patience: Patience | None = None) -> None:
        self.work = Progress("training", patience)
        self._watchdog = watchdog or Watchdog()
        self._file = state / HEALTH
        self._fields: dict[str, str | float | bool | None] = {"version": version, "boot": boot_id(), "started_s": time.monotonic()}
        self._fields |= {"connected_s": None, "round_s": None, "deaf": False}
        self._write_s = float("-inf")
        self._jobless_s: float | None = None

    def note(self, note: Note, now: float) -> None:
        """Something has happened; when the coordinator has accepted an update, a round is done."""
        if note.kind == "accepted":
            self._first("round_s")
            self._fields["round_s"] = now

    def stopping(self) -> None:
        """The loop has ended."""
        self._watchdog.stopping()

    def turn(self, now: float, *, connected: bool, phase: Phase, alive: bool, deaf: bool = False) -> None:
        """The loop has turned. alive: the training thread runs; deaf: as in health.json."""
        if deaf != self._fields["deaf"]:
            self._fields["deaf"], self._write_s = deaf, float("-inf")
        if connected:
            self._first("connected_s")
            self._fields["connected_s"] = now
        stuck = self._stuck(now, phase, alive)
        news = self._watchdog.turn(now, stuck, f"{'connected' if connected else 'trying to connect'}; {phase.value}")
        if news:
            log.error("%s", news)
        if now >= self._write_s:
            self._write_s = now + WRITE_S
            self._write(now, "stuck" if stuck else phase.value)

    def _first(self, field: str) -> None:
        """What happens for the first time is written at once: an update on trial waits for it."""
        if self._fields[field] is None:
            self._write_s = float("-inf")

    def _stuck(self, now: float, phase: Phase, alive: bool) -> str:
        if not alive:
            return "the training thread has ended; its error is above in the log"
        if phase is not Phase.TRAINING or not self.work.idle:
            self._jobless_s = None
        elif self._jobless_s is None:
            self._jobless_s = now
        elif now - self._jobless_s > LOST_JOB_S:
            return f"the device trains, but its training thread has had nothing to do for {now - self._jobless_s:.0f} s"
        return self.work.overdue(now)

    def _write(self, now: float, phase: str) -> None:
        aside = self._file.with_name(f"{HEALTH}.tmp")  # StateFolder removes what a crash leaves of it
        text = json.dumps({**self._fields, "written_s": now, "phase": phase}, indent=1) + "\n"
        with suppress(OSError):  # it promises nothing; a disk that fails ends the agent where it does
            aside.write_text(text)
            os.replace(aside, self._file)  # noqa: PTH105 - as in edge_agent.state


def boot_id() -> str:
    """The kernel's name for the time since the machine was started; "" where it has none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
