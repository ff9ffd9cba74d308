"""What an agent knows of its device beside its work: the power it draws, its owner's limits, and the journal of what it observes.

Each part may be absent. This module is where they meet: rows of every part go to the journal and to whoever counts a round's joules, and a
field run's orders reach the meters.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_agent.budgets import Budgets, RoundJoules
from edge_agent.energy.account import Energy
from edge_agent.observer import Observer
from regrow.budget import Allowed
from regrow.device import Device
from regrow.machine import Note, Train
from regrow.observations import Row
from regrow.wire import PowerState


class Senses:
    """One device's.

    Args:
        clock: unix seconds, what every row is stamped with: the fleet's time where the device has an identity.
        observer: keeps rows and sends them; hears of field runs.
        energy: makes what measures the power, given what takes its rows.
        budgets: makes the owner's limits, given what counts a round's joules (None where nothing tells any).
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        observer: Observer | None = None,
        energy: Callable[[Callable[[Row], None]], Energy] | None = None,
        budgets: Callable[[RoundJoules | None], Budgets | None] = lambda _: None,
    ) -> None:
        self.clock, self.observer = clock, observer
        self._joules = RoundJoules()
        self.energy = None if energy is None else energy(self.take)
        self._budgets = budgets(self._joules if self.energy is not None and self.energy.tells_joules else None)
        self._round: tuple[int, float] | None = None  # number and share of the job that was last begun
        if observer is not None and self.energy is not None:
            orders, measured = observer.orders, self.energy
            orders.on_rate, orders.on_still, orders.on_pulse = measured.record, measured.keep_still, lambda: measured.pulse(clock())
            orders.meter = lambda: measured.state().meter

    def take(self, row: Row) -> None:
        """A row of any part, or of the link; from any thread."""
        self._joules.add(row)
        if self.observer is not None:
            self.observer.add(row)

    def start(self) -> None:
        """Begin to measure."""
        if self.energy is not None:
            self.energy.start()

    def close(self, *, clearing: bool) -> None:
        """Make durable what was observed. clearing: the device is being wiped, so nothing may be written."""
        if self.energy is not None:
            self.energy.close()
        if self.observer is not None:
            self.observer.close()
        if self._budgets is not None and not clearing:
            self._budgets.close()

    def abandon(self) -> None:
        """The device is being wiped."""
        if self.observer is not None:
            self.observer.abandon()

    @property
    def still(self) -> bool:
        """Whether a field run wants the device to keep still."""
        return self.observer is not None and self.observer.orders.still

    @property
    def marked(self) -> str:
        """What slows the board at this moment; nothing where it runs at its own pace."""
        return "" if self.energy is None else self.energy.marked

    @property
    def power(self) -> PowerState | None:
        """For telemetry; None where nobody wants it measured."""
        return None if self.energy is None else self.energy.state()

    def allowed(self, now: float, total_bytes: int) -> Allowed | None:
        """What the owner's limits allow, where that is news."""
        return None if self._budgets is None else self._budgets.look(now, total_bytes)

    def follow(self, device: Device, *, training: bool) -> None:
        """What the device does now; as often as it may have changed. training: its training thread is at work."""
        if self.energy is not None:
            self.energy.follow(device, training=training)

    def begins(self, device: Device, job: Train) -> None:
        """A job of training begins."""
        if device.assignment is not None and device.share is not None:
            self._round = (device.assignment.number, device.share)
        if self.energy is not None:
            self.energy.trains(job)

    def note(self, device: Device, note: Note, now: float) -> None:
        """Something has happened; with its receipt a round is over, and what it took is known."""
        if note.kind not in ("accepted", "rejected") or self._budgets is None or self._round is None or device.names is None:
            return
        (number, share), self._round = self._round, None
        self._budgets.round_done(device.names.root, number, share, now)
