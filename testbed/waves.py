"""Training jobs that wait until the first of them is due in virtual time, so that those under way together are trained together.

How long a job takes is known without training it (testbed.compute), and in a simulation nobody looks at its result before that time has
passed. Which jobs wait together depends on virtual time alone, so the same run always has the same waves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from regrow.machine import Train, Trained, TrainingFailed
from testbed.memory import Deferred

Result = Trained | TrainingFailed
Jobs = Sequence[tuple[str, Train]]
"""(device, what it trains)."""


class Waves:
    """A `testbed.memory.Trainer` that takes no time (see testbed.compute.timed) and trains late.

    Args:
        train: jobs -> their results in the same order.
        together: train all that waits when the first result is due; otherwise only what is due.
    """

    def __init__(self, train: Callable[[Jobs], Sequence[Result]], *, together: bool) -> None:
        self._train, self._together = train, together
        self._waiting: dict[int, tuple[str, Train]] = {}
        self._results: dict[int, Result] = {}
        self._count = 0

    def __call__(self, name: str, job: Train) -> tuple[float, Deferred]:
        self._count += 1
        ticket = self._count
        self._waiting[ticket] = (name, job)
        return 0.0, Deferred(lambda: self._result(ticket), lambda: self._drop(ticket))

    def _result(self, ticket: int) -> Result:
        if ticket not in self._results:
            tickets = list(self._waiting) if self._together else [ticket]
            results = self._train([self._waiting.pop(number) for number in tickets])
            self._results.update(zip(tickets, results, strict=True))
        return self._results.pop(ticket)

    def _drop(self, ticket: int) -> None:
        self._waiting.pop(ticket, None)
        self._results.pop(ticket, None)
