"""The dates of certificates: of a device, of a broker, of their authority. The gateway's checks use it as well."""

from __future__ import annotations

import time
from pathlib import Path

from edge_agent.doctor.checks import Check
from edge_agent.doctor.host import EARLIEST_YEAR, LATEST_YEAR
from regrow.findings import Finding

SOON_S = 14 * 86_400.0


def certificate_check(name: str, file: Path, cure: str, fleet_s: float = 0.0) -> Check:
    """The dates of the first certificate in a PEM file. cure: what renews it; fleet_s: as of `dated`."""
    return Check((name,), lambda tell: tell(certificate(name, file, time.time(), cure, fleet_s)))


def certificate(name: str, file: Path, now_s: float, cure: str, fleet_s: float = 0.0) -> Finding:
    """Whether a certificate on the disk is valid now. now_s, fleet_s: as of `dated`."""
    try:
        from cryptography import x509
    except ModuleNotFoundError:
        return Finding(name, "unknown", f"{file.name} cannot be read without cryptography", "pip install 'regrow[fleet]'")
    try:
        found = x509.load_pem_x509_certificate(file.read_bytes())
    except FileNotFoundError:
        return Finding(name, "fail", f"{file} is missing", cure)
    except PermissionError:
        return Finding(name, "unknown", f"this user may not read {file}", "ask as root, or as the user of the service")
    except (OSError, ValueError) as error:
        return Finding(name, "fail", f"{file} is no certificate: {error}", cure)
    return dated(name, found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp(), now_s, cure, fleet_s)


def dated(name: str, begins_s: float, ends_s: float, now_s: float, cure: str, fleet_s: float = 0.0) -> Finding:
    """What these dates mean now; all unix seconds.

    Args:
        now_s: by this machine's clock.
        fleet_s: the fleet's time as this device knows it, by which an agent judges; 0: there is none.
    """
    until = _day(ends_s)
    if fleet_s and now_s >= ends_s > fleet_s:
        said = f"valid until {until}: by this clock ({_day(now_s)}) that is over, by the fleet's time ({_day(fleet_s)}) it is not"
        return Finding(name, "warn", said, f"set the clock if it is wrong; if it is right: {cure}")
    if fleet_s:
        now_s = fleet_s
    if not EARLIEST_YEAR <= time.gmtime(now_s).tm_year <= LATEST_YEAR:
        return Finding(name, "unknown", f"valid until {until}, but the clock cannot be right", "set the clock first")
    if now_s < begins_s:
        return Finding(name, "fail", f"valid only from {_day(begins_s)}", "is the clock behind?")
    if now_s >= ends_s:
        return Finding(name, "fail", f"expired on {until}", cure)
    if ends_s - now_s < SOON_S:
        return Finding(name, "warn", f"valid until {until} only", cure)
    return Finding(name, "ok", f"valid until {until}")


def _day(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(unix_s))
