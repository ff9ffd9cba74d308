"""Ctrl-C and SIGTERM for a command that has work to end properly: both ask for the end, and a second Ctrl-C is the end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType


def stop_at_signals(stop: Callable[[], None], ending: str) -> None:
    """Call `stop` at SIGINT and SIGTERM; a SIGINT after the first one raises KeyboardInterrupt, so that what was begun is closed.

    Args:
        stop: asks for the end; called in a signal handler, so it must only set or queue something.
        ending: what goes on after the first Ctrl-C, for the user: "writing the report".
    """

    def interrupted(_number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: the signal may have come in the middle of one, and its stream cannot be entered twice.
        with suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"\n{ending}; Ctrl-C again quits at once\n".encode())
        stop()

    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, lambda *_: stop())  # some that send it send it twice, and mean an orderly end
