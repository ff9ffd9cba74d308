"""`python -m testbed.packet_relay NS_A TUN_A NS_B TUN_B BPS DELAY_S IDLE_S`: a link between two TUN devices, in user space.

IP packets pass as they are, each after its time on a link of BPS and DELAY_S more; a queue of two seconds, behind which packets
are dropped. With IDLE_S above 0 it forgets TCP flows as a NAT does: what comes of a flow that was quiet for so long is dropped without a
word, until a SYN begins it anew.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from regrow.errors import LocalError

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_SYN, _TCP = 0x02, 6
QUEUE_S = 2.0
PACKET_BYTES = 65_536


def open_tun(namespace: str, name: str) -> int:
    """The file descriptor of a TUN device that is there in a namespace; this thread stays in that namespace."""
    with Path("/run/netns", namespace).open("rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise LocalError(f"cannot enter namespace {namespace}: {os.strerror(ctypes.get_errno())}")
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


@dataclass
class Direction:
    """One way of the link. waiting: (when it leaves, the packet), in order."""

    source: int
    sink: int
    bps: float
    delay_s: float
    free_s: float = 0.0
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take(self, packet: bytes, now: float) -> None:
        if self.free_s - now > QUEUE_S:
            return
        self.free_s = max(self.free_s, now) + len(packet) * 8 / self.bps
        self.waiting.append((self.free_s + self.delay_s, packet))

    def give(self, now: float) -> None:
        while self.waiting and self.waiting[0][0] <= now:
            os.write(self.sink, self.waiting.popleft()[1])


class Flows:
    """TCP flows by their two ends, and when each was last heard of. idle_s: how long one is remembered; 0: for ever."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._seen_s: dict[frozenset[bytes], float] = {}

    def passes(self, packet: bytes, now: float) -> bool:
        """Whether this IP packet is let through; only TCP over IPv4 is looked at."""
        if not self._idle_s or len(packet) < 20 or packet[0] >> 4 != 4 or packet[9] != _TCP:
            return True
        at = (packet[0] & 15) * 4
        if len(packet) < at + 14:
            return True
        flow = frozenset((packet[12:16] + packet[at : at + 2], packet[16:20] + packet[at + 2 : at + 4]))
        known = now - self._seen_s.get(flow, float("-inf")) <= self._idle_s
        if not known and not packet[at + 13] & _SYN:
            return False
        self._seen_s[flow] = now
        return True


def main(words: list[str]) -> None:
    """Serve until killed."""
    near_namespace, near, far_namespace, far = words[:4]
    bps, delay_s, idle_s = map(float, words[4:])
    near_end, far_end = open_tun(near_namespace, near), open_tun(far_namespace, far)
    ways = {near_end: Direction(near_end, far_end, bps, delay_s), far_end: Direction(far_end, near_end, bps, delay_s)}
    flows = Flows(idle_s)
    print("ready", flush=True)
    while True:
        due_s = min((way.waiting[0][0] for way in ways.values() if way.waiting), default=float("inf"))
        timeout_s = max(due_s - time.monotonic(), 0.0) if due_s < float("inf") else None
        readable, _, _ = select.select(list(ways), [], [], timeout_s)
        now = time.monotonic()
        for end in readable:
            packet = os.read(end, PACKET_BYTES)
            if flows.passes(packet, now):
                ways[end].take(packet, now)
        for way in ways.values():
            way.give(now)


if __name__ == "__main__":
    main(sys.argv[1:])
