"""Makes the sync pulse: loads every core of this device in the pattern of regrow.pulse."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable

from regrow.pulse import BIT_S, PULSE_S, is_high

_BLOCK = bytes(256 * 1024)  # hashed outside the interpreter's lock, so that threads load all cores; a millisecond, so that edges are sharp


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_pulse(
    stopped: threading.Event | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    work: Callable[[], object] = lambda: hashlib.sha512(_BLOCK),
    threads: int | None = None,
) -> float:
    """Make the pattern now and return when it is over.

    Args:
        stopped: ends it early.
        clock: monotonic seconds.
        work: what loads a core for about a millisecond.
        threads: by default one for each core.

    Returns:
        When it began, by the clock.
    """
    stop = stopped or threading.Event()
    began_s = clock()
    count, arguments = threads or cores(), (began_s, stop, clock, work)
    loads = [threading.Thread(target=_load, args=arguments, name="pulse", daemon=True) for _ in range(count)]
    for load in loads:
        load.start()
    for load in loads:
        load.join()
    return began_s


def _load(began_s: float, stop: threading.Event, clock: Callable[[], float], work: Callable[[], object]) -> None:
    while (since_s := clock() - began_s) < PULSE_S and not stop.is_set():
        if is_high(since_s):
            work()
        else:
            stop.wait(BIT_S - since_s % BIT_S)
