"""The paced link under a clock of our own: nothing here waits."""

from __future__ import annotations

import math
import random
import socket
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from edge_agent.pacing import CATCH_UP_S, SLICE_BYTES, PacedSocket, RateLimiter
from regrow.errors import LocalError

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def paced(sock: socket.socket, clock: Clock, up_bps: float | None = None, down_bps: float | None = None) -> PacedSocket:
    return PacedSocket(sock, uplink=RateLimiter(up_bps, clock), downlink=RateLimiter(down_bps, clock), clock=clock)


def attempt(call: Callable[[Argument], Result], argument: Argument) -> Result | None:
    """The call's result, or None when it would have to wait."""
    try:
        return call(argument)
    except BlockingIOError:
        return None


def send_all(link: PacedSocket, theirs: socket.socket, clock: Clock, data: bytes, late_s: float = 0.0) -> float:
    """Send everything, waking `late_s` after each slot; returns the seconds it took."""
    started_s = clock.now_s
    while data:
        sent_bytes = attempt(link.send, data)
        if sent_bytes is not None:
            data = data[sent_bytes:]
            theirs.recv(1 << 20)
        else:
            ready_s = link.next_ready_s()
            assert ready_s is not None
            assert link.up_waits
            clock.now_s = ready_s + late_s
    link.idle()
    return clock.now_s - started_s


@pytest.mark.parametrize("size_bytes", [1, 100, SLICE_BYTES, SLICE_BYTES + 1, 6_000, 90_000])
@pytest.mark.parametrize("bps", [200e3, 4e6])
def test_a_transfer_takes_its_bytes_over_its_rate(pair: tuple[socket.socket, socket.socket], size_bytes: int, bps: float) -> None:
    clock = Clock()
    link = paced(pair[0], clock, up_bps=bps)
    assert send_all(link, pair[1], clock, bytes(size_bytes)) == pytest.approx(size_bytes * 8 / bps)
    clock.now_s += 3600  # idle time earns nothing: the next one takes just as long
    assert send_all(link, pair[1], clock, bytes(size_bytes)) == pytest.approx(size_bytes * 8 / bps)
    assert link.bytes_up == 2 * size_bytes


def test_waking_late_does_not_slow_the_link(pair: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    link = paced(pair[0], clock, up_bps=4e6)  # a slice every 8.2 ms, each woken 5 ms late
    assert send_all(link, pair[1], clock, bytes(90_000), late_s=0.005) == pytest.approx(0.18 + 0.005)


def test_a_long_sleep_is_not_made_up_for(pair: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    link = paced(pair[0], clock, up_bps=1e6)
    assert attempt(link.send, bytes(SLICE_BYTES)) is None
    clock.now_s += 60
    sent_bytes = 0
    while (slice_bytes := attempt(link.send, bytes(SLICE_BYTES))) is not None:
        sent_bytes += slice_bytes
        pair[1].recv(1 << 20)
    assert SLICE_BYTES <= sent_bytes <= SLICE_BYTES + CATCH_UP_S * 1e6 / 8


def test_what_the_kernel_refuses_has_had_its_slot(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    clock = Clock()
    link = paced(ours, clock, up_bps=1e6)
    while attempt(ours.send, bytes(1 << 16)) is not None:
        pass  # the kernel's buffer is full now
    assert attempt(link.send, bytes(SLICE_BYTES)) is None
    clock.now_s += 1
    assert not link.up_waits
    assert attempt(link.send, bytes(SLICE_BYTES)) is None  # its slot has ended, but the kernel does not take it
    assert link.bytes_up == 0
    while attempt(theirs.recv, 1 << 20) is not None:
        pass
    assert attempt(link.send, bytes(SLICE_BYTES)) == SLICE_BYTES  # at once


def test_what_arrives_is_paced_too(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    clock = Clock()
    link = paced(ours, clock, down_bps=800e3)
    message = random.Random(1).randbytes(20_000)
    theirs.sendall(message)
    got, started_s = b"", clock.now_s
    while len(got) < len(message):
        part = attempt(link.recv, 1 + len(got) % 3)  # as paho does: a byte, a byte, then the rest
        got += part or b""
        if part is None:
            assert link.down_waits
            assert link.pending()
            ready_s = link.next_ready_s()
            assert ready_s is not None
            clock.now_s = ready_s
    assert got == message
    assert clock.now_s - started_s == pytest.approx(0.2)
    assert link.bytes_down == 20_000
    with pytest.raises(BlockingIOError):
        link.recv(1)
    assert link.next_ready_s() is None
    assert not link.down_waits
    theirs.close()
    assert link.recv(1) == b""


def test_unlimited_passes_everything_through(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    link = paced(ours, Clock())
    assert link.send(bytes(50_000)) == 50_000
    assert len(theirs.recv(1 << 20)) == 50_000
    theirs.sendall(b"abc")
    assert link.recv(10) == b"abc"
    assert (link.bytes_up, link.bytes_down) == (50_000, 3)
    assert link.next_ready_s() is None
    assert link.fileno() == ours.fileno()


def test_every_packet_is_heard_once_when_it_is_first_offered(pair: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    limiter = RateLimiter(8 * SLICE_BYTES, clock)  # a slice a second
    heard: list[tuple[int, float]] = []
    link = PacedSocket(
        pair[0],
        uplink=limiter,
        downlink=RateLimiter(None, clock),
        clock=clock,
        on_packet=lambda data, now_s: heard.append((len(data), now_s)),
    )
    for size_bytes in (2 * SLICE_BYTES, SLICE_BYTES):
        send_all(link, pair[1], clock, bytes(size_bytes))
    assert heard == [(2 * SLICE_BYTES, 100.0), (SLICE_BYTES, 102.0)]


@pytest.mark.parametrize("bps", [0, -1, math.nan])
def test_a_rate_that_is_none_is_refused(bps: float) -> None:
    with pytest.raises(LocalError, match="rate"):
        RateLimiter(bps)
