"""Whether a process that looks alive also gets anywhere, and what to tell the service manager of it.

A loop that turns is not enough: a training or a store thread that hangs leaves it turning for ever. So each thread that works says
before every piece of work how long that may take at most (`Progress`), the loop looks at all of them, and the service manager is fed only
while none is overdue (`Watchdog`). Times are monotonic seconds, passed in; the socket is the runtime's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FEED_S = 10.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long work may take before it counts as stuck: generous, for a restart loses what was at hand.

    first_s: making a model's sessions, scoring, and the first step, also on a board that swaps. step_s: any later step, at least; and
    `slowest` times the slowest step of the job so far. other_s: what is no training, such as a promoted model's local head.
    """

    first_s: float = 1800.0
    step_s: float = 300.0
    slowest: float = 30.0
    other_s: float = 3600.0


class Progress:
    """What one thread is at. It writes, the loop reads: the state is replaced as a whole, so no lock is needed.

    Args:
        who: the thread, for the message.
    """

    def __init__(self, who: str, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        self._who = who
        self._work: tuple[str, float] | None = None
        self._began_s = self._slowest_s = 0.0
        self._steps = -1

    @property
    def idle(self) -> bool:
        return self._work is None

    def begin(self, what: str, allowed_s: float, now: float) -> None:
        """Work begins that ends, or advances by a `step`, within `allowed_s`."""
        self._work, self._began_s, self._slowest_s, self._steps = (what, now + allowed_s), now, 0.0, -1

    def step(self, now: float) -> None:
        """A training step begins: the one before it is done, and the next may take as long as such steps do.

        With the first call nothing is known yet of how long a step takes, so the time for it stays as `begin` allowed.
        """
        work = self._work
        if work is None:
            return
        self._steps += 1
        if self._steps:
            self._slowest_s = max(self._slowest_s, now - self._began_s)
            allowed_s = max(self.patience.step_s, self.patience.slowest * self._slowest_s)
            self._work = (work[0], now + allowed_s)
        self._began_s = now

    def end(self) -> None:
        """There is nothing to do."""
        self._work = None

    def overdue(self, now: float) -> str:
        """What is stuck and since when, or nothing."""
        work = self._work
        if work is None or now < work[1]:
            return ""
        return f"the {self._who} thread is stuck: {work[0]} is overdue by {now - work[1]:.0f} s"


class Watchdog:
    """Feeds the service manager from a loop that turns, as long as nothing is stuck.

    Args:
        say: sends one datagram of systemd's notification protocol; what does not run under systemd gives one that does nothing.
        every_s: how often to feed: a third of the service manager's patience.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None, every_s: float = FEED_S) -> None:
        self._say, self._every_s = say, every_s
        self._next_s = float("-inf")
        self._status = self._stuck = ""
        self._ready = False

    def turn(self, now: float, stuck: str, status: str) -> str:
        """The loop has turned.

        Args:
            stuck: why the process gets nowhere, or nothing.
            status: what it does, for `systemctl status`.

        Returns:
            What is news and belongs into the log: that it is stuck, once, and that it goes on.
        """
        news = ""
        if bool(stuck) != bool(self._stuck):
            news = stuck or f"goes on after all: {self._stuck}"
        self._stuck = stuck
        lines = []
        if not self._ready:
            self._ready = True
            lines.append("READY=1")
        if (said := stuck or status) != self._status:
            self._status = said
            lines.append(f"STATUS={said}")
        if not stuck and now >= self._next_s:
            self._next_s = now + self._every_s
            lines.append("WATCHDOG=1")
        if lines:
            self._say("\n".join(lines))
        return news

    def stopping(self) -> None:
        """The loop has ended; what is still to be written has the time that the unit gives for stopping."""
        self._say("STOPPING=1")
