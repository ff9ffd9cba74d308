"""What systemd says of a unit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from edge_agent.doctor.checks import Check, Tell
from edge_agent.firmware import said_by
from regrow.findings import Finding

RESTARTS_MANY = 5
_NAMES = ("service.unit", "service.watchdog")
_FIELDS = "LoadState,ActiveState,SubState,NRestarts,Result,WatchdogUSec,StatusText"


def service_checks(unit: str, root: Path = Path("/")) -> list[Check]:
    """The state of a unit and of its watchdog."""
    return [Check(_NAMES, lambda tell: service(unit, root, tell))]


def service(unit: str, root: Path, tell: Tell) -> None:
    """Ask systemd, if it runs here; inside the service its environment says what the watchdog is."""
    if not (root / "run/systemd/system").is_dir():
        tell(Finding(_NAMES[0], "unknown", "systemd does not run here"))
        tell(_fed_here() or Finding(_NAMES[1], "unknown", "systemd does not run here"))
        return
    text = said_by("systemctl", "show", unit, "--no-pager", f"--property={_FIELDS}")
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if not fields:
        fed, silent = _fed_here(), "systemctl does not answer this user"
        tell(
            Finding(_NAMES[0], "ok", "this process is the service")
            if fed
            else Finding(_NAMES[0], "unknown", silent, f"systemctl status {unit}")
        )
        tell(fed or Finding(_NAMES[1], "unknown", silent))
        return
    tell(unit_state(unit, fields))
    tell(_fed_here() or watchdog(unit, fields))


def unit_state(unit: str, fields: Mapping[str, str]) -> Finding:
    """What `systemctl show` means for a person. fields: name -> value."""
    if fields.get("LoadState") != "loaded":
        return Finding(_NAMES[0], "unknown", f"{unit} is not installed as a service", "docs/deploy.md says how")
    state, restarts = fields.get("ActiveState", "?"), fields.get("NRestarts", "")
    said = f"{unit} is {state} ({fields.get('SubState', '?')})"
    if status := fields.get("StatusText", ""):
        said += f": {status}"
    look = f"journalctl --namespace=regrow -u {unit}"
    if state == "failed":
        return Finding(_NAMES[0], "fail", f"{said}; it ended by {fields.get('Result', '?')}", look)
    if state not in ("active", "activating", "reloading"):
        return Finding(_NAMES[0], "warn", said, f"systemctl enable --now {unit}")
    if restarts.isdecimal() and int(restarts) > RESTARTS_MANY:
        return Finding(_NAMES[0], "warn", f"{said}; it was started again {restarts} times", look)
    return Finding(_NAMES[0], "warn" if state == "activating" else "ok", said, look if state == "activating" else "")


def watchdog(unit: str, fields: Mapping[str, str]) -> Finding:
    """Whether a service that is stuck would be ended."""
    if fields.get("LoadState") != "loaded":
        return Finding(_NAMES[1], "unknown", f"{unit} is not installed as a service")
    period = fields.get("WatchdogUSec", "0")
    if period in ("0", "infinity", ""):
        cure = f"WatchdogSec= of deploy/{unit}.service; install that file"
        return Finding(_NAMES[1], "warn", "none: a service that is stuck would stay so", cure)
    if fields.get("Result") == "watchdog":
        look = f"journalctl --namespace=regrow -u {unit} shows where every thread was"
        return Finding(_NAMES[1], "fail", f"it has ended {unit} because it was stuck", look)
    return Finding(_NAMES[1], "ok", f"ends {unit} when it gets nowhere for {period}")


def _fed_here() -> Finding | None:
    """What this very process was told, where it is the service."""
    period = os.environ.get("WATCHDOG_USEC", "")
    if not re.fullmatch(r"[1-9]\d{0,17}", period) or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return Finding(_NAMES[1], "ok", f"fed by this process; it ends it after {int(period) / 1e6:g} s without progress")
