"""What this machine knows of the link to its broker: TCP's view, the interface's counters, the radio's, the modem's.

Every fact is there, or `Unknown` with the reason; nothing here raises for what the system says, and no network's name (SSID,
operator, cell) is ever kept. `root` is "/" but in tests, which give trees of their own.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TCP_INFO = getattr(socket, "TCP_INFO", 11)
TCP_CONGESTION = getattr(socket, "TCP_CONGESTION", 13)
DISCARD_PORT = 9  # any would do
COMMAND_TIMEOUT_S = 3.0
COUNTERS = ("tx_bytes", "rx_bytes")
_ROOT = Path("/")
_STARTED = re.compile(r"[a-z0-9_-]{1,32}\Z")
_LOUDEST_DBM, _FAINTEST_DBM = 30.0, -150.0
_TOUCHED_HZ = (1e8, 1e11)
Run = Callable[[Sequence[str]], str]


@dataclass(frozen=True, slots=True)
class Unknown:
    """What cannot be told, and why."""

    why: str


@dataclass(frozen=True, slots=True)
class TcpFacts:
    """Of one connection since it began. delivered_bytes: acknowledged by the other end's TCP; it and least_rtt_s: None on old kernels."""

    rtt_s: float
    least_rtt_s: float | None
    retransmitted: int
    delivered_bytes: int | None
    congestion: str


@dataclass(frozen=True, slots=True)
class Counters:
    """Of a network interface since it came up, frames and their headers in full."""

    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, slots=True)
class RadioFacts:
    """technology: "wifi", "lte"; signal_dbm: as received; radio_bps: what it sends at; radio_hz: its frequency, which says the band."""

    technology: str
    signal_dbm: float | Unknown
    radio_bps: float | Unknown
    radio_hz: float | Unknown


# ---- TCP ---------------------------------------------------------------------------------------------------------------------------


def tcp_facts(sock: socket.socket) -> TcpFacts | Unknown:
    """TCP's view of a connected socket, with TLS on it or not."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 256)
    except (OSError, ValueError) as error:
        return Unknown(f"no TCP_INFO of this socket: {error}")
    try:
        congestion = sock.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16)
    except (OSError, ValueError):
        congestion = b""
    return parse_tcp_info(info, congestion)


def parse_tcp_info(info: bytes, congestion: bytes) -> TcpFacts | Unknown:
    """Linux's struct tcp_info, of which older kernels have less."""
    if len(info) < 104:
        return Unknown(f"TCP_INFO has {len(info)} bytes, not Linux's 104 or more")
    (rtt_us,) = struct.unpack_from("=I", info, 68)
    (retransmitted,) = struct.unpack_from("=I", info, 100)
    delivered = struct.unpack_from("=Q", info, 120)[0] if len(info) >= 128 else None
    least_us = struct.unpack_from("=I", info, 148)[0] if len(info) >= 152 else 0
    name = congestion.partition(b"\0")[0].decode("ascii", "replace")
    return TcpFacts(
        rtt_us / 1e6, least_us / 1e6 if 0 < least_us < 2**32 - 1 else None, retransmitted, delivered, name if _STARTED.match(name) else ""
    )


# ---- the interface -----------------------------------------------------------------------------------------------------------------


def interface_to(host: str) -> str | Unknown:
    """The interface that packets to this host leave by, policy routing and all.

    Args:
        host: an address, or a name, which is looked up; "" is nobody.
    """
    if not host:
        return Unknown("not connected")
    try:
        found = socket.getaddrinfo(host, DISCARD_PORT, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, place in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)  # sends nothing
                own = probe.getsockname()[0].partition("%")[0]
            for name, addresses in psutil.net_if_addrs().items():
                if own in {each.address.partition("%")[0] for each in addresses}:
                    return str(name)
    except (OSError, ValueError) as error:
        return Unknown(f"no way to {host}: {getattr(error, 'strerror', None) or error}")
    return Unknown(f"no interface has the address that packets to {host} leave from")


def counters_of(interface: str, root: Path = _ROOT) -> Counters | Unknown:
    """Bytes that the interface has sent and received."""
    counted = []
    for name in COUNTERS:
        text = _read(root / "sys/class/net" / interface / "statistics" / name)
        if isinstance(text, Unknown):
            return text
        if not re.fullmatch(r"[0-9]{1,20}\s*", text, re.ASCII):
            return Unknown(f"{name} of {interface} is no number")
        counted.append(int(text))
    return Counters(*counted)


def counted_since(before: Counters | Unknown, now: Counters | Unknown) -> Counters | Unknown:
    """What was sent and received between two looks."""
    if isinstance(now, Unknown):
        return now
    if isinstance(before, Unknown):
        return before
    sent, received = now.sent_bytes - before.sent_bytes, now.received_bytes - before.received_bytes
    return Counters(sent, received) if sent >= 0 and received >= 0 else Unknown("the interface's counters began anew")


# ---- the radio ---------------------------------------------------------------------------------------------------------------------


def radio_of(interface: str, root: Path = _ROOT, run: Run | None = None) -> RadioFacts | Unknown:
    """What the radio behind an interface tells; Unknown where there is none. Takes as long as `iw` or `mmcli`: not for a loop.

    Args:
        run: runs a command and returns what it says, raising OSError or SubprocessError; tests give their own.
    """
    run = run or _run
    device = root / "sys/class/net" / interface
    if (device / "wireless").exists() or (device / "phy80211").exists():
        return _wifi(interface, root, run)
    kind = _read(device / "uevent")
    if (isinstance(kind, str) and "DEVTYPE=wwan" in kind.splitlines()) or interface.startswith(("wwan", "ppp")):
        return _modem(interface, run)
    return Unknown(f"{interface} is no radio")


def _wifi(interface: str, root: Path, run: Run) -> RadioFacts:
    said = _said(run, ["iw", "dev", interface, "link"])
    if not isinstance(said, Unknown):
        facts = parse_iw_link(said)
        if not isinstance(facts.signal_dbm, Unknown):
            return facts
    table = _read(root / "proc/net/wireless")
    signal = table if isinstance(table, Unknown) else parse_wireless(table, interface)
    why = said if isinstance(said, Unknown) else Unknown("iw tells of no connection")
    return RadioFacts("wifi", signal, why, why)


def parse_iw_link(text: str) -> RadioFacts:
    """What `iw dev X link` says, without the network's name."""
    return RadioFacts(
        "wifi",
        _dbm(_after(text, "signal")),
        _scaled(_after(text, "tx bitrate"), {"MBit/s": 1e6, "GBit/s": 1e9}, 1.0, 1e12),
        _scaled(f"{_after(text, 'freq')} MHz", {"MHz": 1e6}, *_TOUCHED_HZ),
    )


def _after(text: str, key: str) -> str:
    """What stands behind a key; names that a network's owner chose stand behind other keys."""
    found = re.search(rf"^[ \t]*{key}:[ \t]*([-+.0-9]{{1,12}}(?: [A-Za-z/]{{1,8}})?)", text, re.MULTILINE)
    return found[1] if found else ""


def _dbm(text: str) -> float | Unknown:
    return _scaled(text, {"dBm": 1.0}, _FAINTEST_DBM, _LOUDEST_DBM)


def _scaled(text: str, units: dict[str, float], least: float, most: float) -> float | Unknown:
    number, _, unit = text.strip().partition(" ")
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        return Unknown("not told by iw")
    return value if math.isfinite(value) and least <= value <= most else Unknown(f"{value:g} cannot be")


def parse_wireless(table: str, interface: str) -> float | Unknown:
    """The signal in dBm from /proc/net/wireless."""
    for line in table.splitlines():
        name, _, rest = line.partition(":")
        fields = rest.split()
        if name.strip() == interface and len(fields) >= 3:
            try:
                level = float(fields[2])
            except ValueError:
                break
            level -= 256 if level > 63 else 0  # drivers that give a byte without its sign
            # 0 is what drivers say that do not know; relative levels are no dBm.
            return level if _FAINTEST_DBM <= level < 0 else Unknown(f"the driver of {interface} gives no dBm")
    return Unknown(f"/proc/net/wireless tells nothing of {interface}")


def _modem(interface: str, run: Run) -> RadioFacts | Unknown:
    listed = _said(run, ["mmcli", "-L", "-J"])
    if isinstance(listed, Unknown):
        return listed
    for path in parse_modems(listed):
        said = _said(run, ["mmcli", "-m", path, "-J"])
        facts = said if isinstance(said, Unknown) else parse_modem(said, interface)
        if isinstance(facts, RadioFacts):
            return facts
    return Unknown(f"ModemManager knows no modem behind {interface}")


def parse_modems(text: str) -> list[str]:
    """The modems that `mmcli -L -J` names."""
    listed = _json_at(text, "modem-list")
    return (
        [name for name in listed if isinstance(name, str) and re.fullmatch(r"[/A-Za-z0-9]{1,100}", name)]
        if isinstance(listed, list)
        else []
    )


def parse_modem(text: str, interface: str) -> RadioFacts | Unknown:
    """The access technology from `mmcli -m N -J`, if this modem's is that interface (or a PPP one, which mmcli does not name)."""
    ports, technologies = _json_at(text, "modem", "generic", "ports"), _json_at(text, "modem", "generic", "access-technologies")
    if not isinstance(ports, list) or (f"{interface} (net)" not in ports and not interface.startswith("ppp")):
        return Unknown(f"another modem than {interface}'s")
    names = [name for name in technologies if isinstance(name, str) and _STARTED.match(name)] if isinstance(technologies, list) else []
    if not names:
        return Unknown("the modem is not registered")
    strength = Unknown("ModemManager gives a share, no dBm")
    return RadioFacts(",".join(names)[:64], strength, Unknown("not told by ModemManager"), Unknown("not told by ModemManager"))


def _json_at(text: str, *keys: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


class RadioWatch:
    """The radio's facts, at most `every_s` old, without waiting for the programs that tell them: a thread asks, now and then."""

    def __init__(self, every_s: float = 30.0, look: Callable[[str], RadioFacts | Unknown] = radio_of) -> None:
        self._every_s, self._look = every_s, look
        self._asked_s = float("-inf")
        self._interface = ""
        self._facts: RadioFacts | Unknown = Unknown("not looked at yet")

    def facts(self, interface: str, now: float) -> RadioFacts | Unknown:
        """The newest that is known; `now` is monotonic."""
        if interface != self._interface:
            self._interface, self._facts, self._asked_s = interface, Unknown("not looked at yet"), float("-inf")
        if now - self._asked_s >= self._every_s:
            self._asked_s = now
            threading.Thread(target=self._ask, args=(interface,), name="regrow-radio", daemon=True).start()
        return self._facts

    def _ask(self, interface: str) -> None:
        facts = self._look(interface)
        if interface == self._interface:
            self._facts = facts


# ---- the system --------------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str | Unknown:
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError) as error:
        return Unknown(f"{path}: {getattr(error, 'strerror', None) or error}")


def _said(run: Run, command: Sequence[str]) -> str | Unknown:
    try:
        return run(command)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Unknown(f"{command[0]}: {getattr(error, 'strerror', None) or error}")


def _run(command: Sequence[str]) -> str:
    program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/sbin:/sbin")
    if program is None:
        raise FileNotFoundError(2, "not installed")
    words = [program, *command[1:]]
    done = subprocess.run(words, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=True, stdin=subprocess.DEVNULL)
    return done.stdout.decode(errors="replace")
