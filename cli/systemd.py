"""What a service is told by systemd, and tells it: the notification socket and the watchdog's period. Without systemd nothing happens."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress

from regrow.watchdog import FEED_S, Watchdog


def watchdog_of(environment: Mapping[str, str] = os.environ) -> Watchdog:
    """The watchdog that feeds the service manager which started this process, three times in its patience."""
    return Watchdog(_notifier(environment.get("NOTIFY_SOCKET", "")), _period_s(environment) / 3)


def _period_s(environment: Mapping[str, str]) -> float:
    """WatchdogSec of the unit, if it is meant for this process."""
    period = environment.get("WATCHDOG_USEC", "")
    ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(period) / 1e6 if ours and period.isascii() and period.isdecimal() and int(period) else 3 * FEED_S


def _notifier(address: str) -> Callable[[str], None]:
    if address[:1] not in ("/", "@"):
        return lambda _: None
    where = "\0" + address[1:] if address.startswith("@") else address  # "@": Linux's namespace without files

    def say(text: str) -> None:
        # A service manager that does not listen now is told again; none of this may end the work.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1.0)
            sock.sendto(text.encode(), where)

    return say
