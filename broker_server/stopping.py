"""How commands end: properly at Ctrl-C and SIGTERM, at once at a second Ctrl-C, and never without what they have started."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

# Ask the kernel to end the child with its parent, check that the parent was not gone before that, become the command.
_PRELUDE = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(0)
os.execv(sys.argv[2], sys.argv[2:])
"""


def ending_with_parent(command: Sequence[str]) -> list[str]:
    """The same command, ended by the kernel (Linux) when this process is gone, even by SIGKILL."""
    return [sys.executable, "-S", "-c", _PRELUDE, str(os.getpid()), *command]


def stop_at_signals(stop: Callable[[], None], ending: str) -> None:
    """Call `stop` at SIGINT and SIGTERM; a SIGINT after the first one raises KeyboardInterrupt, so that what was begun is closed.

    Args:
        stop: asks for the end; called in a signal handler, so it must only set or queue something.
        ending: what goes on after the first Ctrl-C, for the user: "writing the report".
    """

    before = signal.getsignal(signal.SIGINT)

    def interrupted(number: int, frame: FrameType | None) -> None:
        if callable(before):  # whoever counts them: what it raises comes with the second one
            with suppress(KeyboardInterrupt):
                before(number, frame)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: the signal may have come in the middle of one, and its stream cannot be entered twice.
        with suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), f"\n{ending}; Ctrl-C again quits at once\n".encode())
        stop()

    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, lambda *_: stop())  # some that send it send it twice, and mean an orderly end
