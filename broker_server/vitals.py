"""Whether this gateway gets anywhere: it feeds the service manager's watchdog, and leaves health.json in the run's folder.

Healthy is a gateway whose loop turns, whose link is up or is being tried, whose store writes what it is given, and whose evaluation ends.
health.json has the fields of a device's (edge_agent/vitals.py), with the coordinator's phase; `regrow doctor` reads it.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path

from broker_server.credentials import write_private
from regrow.watchdog import Patience, Progress, Watchdog

log = logging.getLogger(__name__)
HEALTH = "health.json"
WRITE_S = 60.0
STORE_S = 600.0  # a transaction or a snapshot, on a card that stalls
EVALUATION_S = 3600.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Vitals:
    """One gateway's, turned by its loop.

    Args:
        run: folder of the run.
        version: of the software.
        watchdog: what feeds the service manager.
        store_s: how long one write of the store may take.
    """

    def __init__(self, run: Path, version: str = "", watchdog: Watchdog | None = None, store_s: float = STORE_S) -> None:
        self.store, self.evaluation = Progress("store", Patience(other_s=store_s)), Progress("evaluation", Patience(other_s=EVALUATION_S))
        self._watchdog = watchdog or Watchdog()
        self._file = run / HEALTH
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
        self._fields: dict[str, str | float | None] = {"version": version, "boot": boot, "started_s": time.monotonic()}
        self._fields |= {"connected_s": None, "round_s": None}
        self._write_s = float("-inf")

    def aggregated(self, now: float) -> None:
        """There is a new version of the model: a round is done."""
        self._fields["round_s"] = now

    def stopping(self) -> None:
        """The loop has ended."""
        self._watchdog.stopping()

    def turn(self, now: float, *, connected: bool, phase: str, dead: str) -> None:
        """The loop has turned. dead: the thread that has ended though it should not, or nothing."""
        if connected:
            self._fields["connected_s"] = now
        stuck = f"the {dead} thread has ended; its error is above in the log" if dead else ""
        stuck = stuck or self.store.overdue(now) or self.evaluation.overdue(now)
        news = self._watchdog.turn(now, stuck, f"{'connected' if connected else 'trying to connect'}; {phase}")
        if news:
            log.error("%s", news)
        if now >= self._write_s:
            self._write_s = now + WRITE_S
            text = json.dumps({**self._fields, "written_s": now, "phase": "stuck" if stuck else phase}, indent=1) + "\n"
            with suppress(OSError):  # it promises nothing; a disk that fails ends the gateway in its store
                write_private(self._file, text.encode())
