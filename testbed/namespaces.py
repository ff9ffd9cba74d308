"""Real links for tests and demonstrations: network namespaces with shaped, lossy, cut or delayed links between devices and a hub.

A device's namespace is joined to the hub by a veth pair. Its rate is that of token-bucket filters at both ends, losses are dropped by nft
where packets enter the hub, a cut takes the hub's end down. Kernels without netem cannot delay a packet: `Relay` does, a process that
takes IP packets from one TUN device, keeps each for its delay and the link's rate, and gives them to another. TCP at both ends is the
kernel's. Needs root and Debian's iproute2 (and nftables for losses and NATs).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from regrow.errors import LocalError

HUB_ADDRESS = "10.77.0.1"
_NUMBERS = itertools.count(1)
BURST_S = 0.01
BUFFER_S = 0.5


def said(*words: object) -> str:
    """What a command says.

    Raises:
        LocalError: it failed, or is not there.
    """
    command = [str(word) for word in words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LocalError(f"{command[0]}: {error.strerror}; install iproute2 and nftables") from error
    if done.returncode:
        raise LocalError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}; this needs root")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Spot:
    """A device's place: its namespace, its address there, and the hub's end of its link."""

    name: str
    namespace: str
    address: str
    hub_end: str


class Namespaces:
    """A hub and devices around it; a context manager that removes all of it.

    Args:
        congestion: TCP's congestion control in every namespace.
    """

    def __init__(self, congestion: str = "cubic") -> None:
        self._id = f"rg{os.getpid()}x{next(_NUMBERS)}"
        self.hub = f"{self._id}h"
        self._congestion = congestion
        self._made: list[str] = []
        self._spots: dict[str, Spot] = {}

    def __enter__(self) -> Namespaces:
        # A namespace may only use what the machine allows to everybody, and what some allow is one of those that they have.
        available = said("sysctl", "-n", "net.ipv4.tcp_available_congestion_control").strip()
        said("sysctl", "-qw", f"net.ipv4.tcp_allowed_congestion_control={available}")
        try:
            self._add(self.hub)
            said("ip", "-n", self.hub, "link", "add", "br0", "type", "bridge")
            said("ip", "-n", self.hub, "addr", "add", f"{HUB_ADDRESS}/24", "dev", "br0")
            said("ip", "-n", self.hub, "link", "set", "br0", "up")
        except LocalError:
            self.close()
            raise
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove every namespace, and with it its links."""
        for namespace in reversed(self._made):
            with contextlib.suppress(LocalError):
                said("ip", "netns", "delete", namespace)
        self._made.clear()

    def add_namespace(self, name: str) -> str:
        """Another namespace, bare; returns its full name."""
        return self._add(f"{self._id}{name}")

    def _add(self, namespace: str) -> str:
        said("ip", "netns", "add", namespace)
        self._made.append(namespace)
        said("ip", "-n", namespace, "link", "set", "lo", "up")
        said("ip", "netns", "exec", namespace, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={self._congestion}")
        return namespace

    def device(self, name: str, up_bps: float, down_bps: float) -> Spot:
        """A device behind a link of these wire rates."""
        number = 11 + len(self._spots)
        namespace, end = self._add(f"{self._id}d{number}"), f"{name[:8]}h{number}"
        said("ip", "link", "add", end, "netns", self.hub, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        # One segment a packet: what is dropped is a segment, and the shaper counts real frames.
        said("ip", "-n", namespace, "link", "set", "dev", "eth0", "gso_max_segs", "1")
        said("ip", "-n", self.hub, "link", "set", end, "master", "br0", "up")
        spot = Spot(name, namespace, f"10.77.0.{number}", end)
        said("ip", "-n", namespace, "addr", "add", f"{spot.address}/24", "dev", "eth0")
        said("ip", "-n", namespace, "link", "set", "eth0", "up")
        self._spots[name] = spot
        self._shape("add", namespace, "eth0", up_bps)
        self._shape("add", self.hub, end, down_bps)
        return spot

    def _shape(self, verb: str, namespace: str, interface: str, bps: float) -> None:
        burst, limit = max(int(bps / 8 * BURST_S), 3200), max(int(bps / 8 * BUFFER_S), 16_384)
        said("tc", "-n", namespace, "qdisc", verb, "dev", interface, "root", "tbf", "rate", f"{bps:.0f}bit", "burst", burst, "limit", limit)

    def change(self, spot: Spot, up_bps: float | None = None, down_bps: float | None = None) -> None:
        """Give a live link other rates."""
        if up_bps is not None:
            self._shape("change", spot.namespace, "eth0", up_bps)
        if down_bps is not None:
            self._shape("change", self.hub, spot.hub_end, down_bps)

    def lose(self, spot: Spot, share: float) -> None:
        """Drop this share of the packets on their way up, by chance."""
        table = f"loss_{spot.hub_end}"
        rules = f"add table netdev {table}; delete table netdev {table}; add table netdev {table};"
        if share > 0:
            rules += f" add chain netdev {table} c {{ type filter hook ingress device {spot.hub_end} priority 0; }};"
            rules += f" add rule netdev {table} c numgen random mod 1000 < {round(1000 * share)} drop"
        said("ip", "netns", "exec", self.hub, "nft", rules)

    def cut(self, spot: Spot) -> None:
        """Nothing passes any more, and nobody is told."""
        said("ip", "-n", self.hub, "link", "set", spot.hub_end, "down")

    def heal(self, spot: Spot) -> None:
        """The link is there again."""
        said("ip", "-n", self.hub, "link", "set", spot.hub_end, "up")

    def inside(self, namespace: str) -> list[str]:
        """What is put before a command to run it there."""
        return ["ip", "netns", "exec", namespace]

    def received_bytes(self, port: int) -> int:
        """Bytes that TCP in the hub has received in order on connections to this port: what really came through, headers apart."""
        text = said("ip", "netns", "exec", self.hub, "ss", "-tinHO", "state", "established", "sport", "=", f":{port}")
        return sum(int(count) for count in re.findall(r"bytes_received:(\d+)", text))

    def sent_frames_bytes(self, spot: Spot) -> int:
        """Bytes that the device's interface has sent, frame headers and segments sent again in full."""
        return int(said(*self.inside(spot.namespace), "cat", "/sys/class/net/eth0/statistics/tx_bytes"))


def relay(namespaces: Namespaces, name: str, *, bps: float, delay_s: float, idle_s: float = 0.0) -> tuple[str, subprocess.Popen[bytes]]:
    """A device's namespace whose only link is a relay of packets to the hub: slow, far away, or forgetful.

    Args:
        bps: of either direction, IP packets in full.
        delay_s: one way.
        idle_s: a TCP flow that is quiet for so long is forgotten, and what comes of it later dropped without a word; 0: never.

    Returns:
        The namespace, and the process, for the caller to end. The hub is 10.78.N.1 there: see `relay_address`.
    """
    namespace = namespaces.add_namespace(name)
    here, there = f"{name[:10]}a", f"{name[:10]}b"
    said("ip", "-n", namespace, "tuntap", "add", here, "mode", "tun")
    said("ip", "-n", namespaces.hub, "tuntap", "add", there, "mode", "tun")
    said("ip", "-n", namespace, "addr", "add", "10.78.0.2", "peer", RELAY_HUB_ADDRESS, "dev", here)
    said("ip", "-n", namespaces.hub, "addr", "add", RELAY_HUB_ADDRESS, "peer", "10.78.0.2", "dev", there)
    said("ip", "-n", namespace, "link", "set", here, "up")
    said("ip", "-n", namespaces.hub, "link", "set", there, "up")
    words: Sequence[object] = (namespace, here, namespaces.hub, there, bps, delay_s, idle_s)
    process = subprocess.Popen(
        [sys.executable, "-m", "testbed.packet_relay", *(str(word) for word in words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    ready = process.stdout.readline() if process.stdout is not None else b""
    if ready.strip() != b"ready":
        process.kill()
        process.wait()
        raise LocalError("the packet relay did not start; it needs root and /dev/net/tun")
    return namespace, process


RELAY_HUB_ADDRESS = "10.78.0.1"
