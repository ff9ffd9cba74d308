"""Keeps what a device observes of itself until the gateway has it, and sends it when the link is needed for nothing else.

A companion of the device's machine. Whoever observes calls `add`, from any thread. Rows go into the journal, and leave in batches, one at a
time and oldest first, each again until the gateway's receipt covers it; not while training needs the link, nor in a baseline, which
sending would disturb. A batch is small enough for the link to be free again after about LINK_S. What nobody answers is sent more and
more rarely.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import msgspec

from edge_agent.field_journal import MIN_BATCH_BYTES, Batch, FieldJournal
from edge_agent.field_orders import FieldOrders
from edge_agent.state import StateFolder
from regrow import topics, wire
from regrow.errors import LocalError, PeerError
from regrow.machine import Connected, Disconnected, Effect, Event, Publish, Received, Subscribe
from regrow.observations import MAX_BATCH_BYTES, Mark, Observations, ObservationsReceipt, Row, decode_rows, encode_rows

log = logging.getLogger(__name__)
FOLDER = "observations"  # in the state folder
JOURNAL_MB = 32.0
KEEP_S = 1.0  # between two writings
SYNC_S = 60.0  # between two syncs: what a power cut may cost
GATHER_S = 20.0  # so long rows wait for others to go with
RECEIPT_S = 15.0  # a batch without a receipt is sent again after this, then after twice as long
RECEIPT_MOST_S = 600.0
CLOCK_SET_S = 1.0
LINK_S = 2.0  # of the link for one batch
UNKNOWN_LINK_BATCH_BYTES = 16 * 1024
_encode = msgspec.msgpack.Encoder().encode


class Observer:
    """One device's.

    Args:
        device: its name.
        folder: its state; the journal lies in a folder of it.
        nonce: 16 bytes drawn for this life.
        clock: the device's, unix seconds: what rows must be stamped with.
        quiet: whether training leaves the link alone now.
        uplink_bps: what the link carries up, None where that is not known.
        journal_bytes: that the journal may have.
        software: this agent's version.

    Attributes:
        clock: as given.
        orders: the device's end of a field run; its callbacks may be set.

    Raises:
        LocalError: the journal's folder cannot be used.
    """

    def __init__(
        self,
        device: str,
        folder: StateFolder,
        nonce: bytes,
        clock: Callable[[], float],
        *,
        quiet: Callable[[], bool] = lambda: True,
        uplink_bps: Callable[[], float | None] = lambda: None,
        journal_bytes: int = int(JOURNAL_MB * 1e6),
        software: str = "",
    ) -> None:
        self._device, self.clock, self._quiet, self._uplink_bps = device, clock, quiet, uplink_bps
        self._journal = FieldJournal(folder.path / FOLDER, journal_bytes, nonce)
        self.orders = FieldOrders(device, folder, clock, self.add)
        self.orders.software = software
        self._rows: deque[Row] = deque()
        self._refused: set[type] = set()
        self._connected = self._ended = False
        self._out: Batch | None = None
        self._keep_s = self._sync_s = self._due_s = float("-inf")
        self._since_s: float | None = None
        self._wait_s = RECEIPT_S
        self._failure = ""
        self._ahead_s: float | None = None

    def add(self, row: Row) -> None:
        """Keep a row; from any thread. One that no receiver would take is dropped, and told once a kind: it would hold up all others."""
        if self._ended:
            return
        try:
            decode_rows(b"\x91" + _encode(row))
        except (PeerError, TypeError) as error:
            if type(row) not in self._refused:
                self._refused.add(type(row))
                log.error("an observation is dropped, and others like it will be: %s", error)
            return
        self._rows.append(row)

    def step(self, event: Event | None, now: float) -> list[Effect]:
        """Take an event in, or None for the time alone."""
        if self._ended:
            return []
        effects: list[Effect] = []
        self._watch_clock(now)
        if isinstance(event, Connected):
            self._connected = True
            effects.append(Subscribe((topics.observations_receipt(self._device),)))
            self.add(Mark(self.clock(), "connected"))
            if self._wait_s <= 4 * RECEIPT_S:  # a gateway that has not answered for long is not asked at every reconnect
                self._due_s = now
        elif isinstance(event, Disconnected):
            if self._connected:
                self.add(Mark(self.clock(), f"cut: {event.reason}"[:1000]))
            self._connected = False
        elif isinstance(event, Received) and event.topic == topics.observations_receipt(self._device):
            self._hear(event, now)
        effects += self.orders.step(event, now)
        self._keep(now)
        return [*effects, *self._send(now)]

    def close(self) -> None:
        """Make everything durable; nothing is kept any more."""
        if not self._ended:
            self._keep(float("inf"))
            self._ended = True
            self._journal.close()

    def abandon(self) -> None:
        """Keep nothing any more: the device is being wiped."""
        self._ended = True
        self._journal.close()

    def _watch_clock(self, now: float) -> None:
        """Mark the start, and when the clock is set: rows before that go by another one."""
        before_s, self._ahead_s = self._ahead_s, self.clock() - now
        if before_s is None:
            self.add(Mark(self.clock(), "start"))
        elif abs(self._ahead_s - before_s) >= CLOCK_SET_S:
            self.add(Mark(self.clock(), f"clock set by {self._ahead_s - before_s:+.1f} s"))

    # ---- keeping -------------------------------------------------------------------------------------------------------------------

    def _keep(self, now: float) -> None:
        """Write what was added, now and then."""
        if now < self._keep_s:
            return
        self._keep_s = now + KEEP_S
        for name, reason in self._journal.rejected:
            log.warning("observations: set aside %s: %s", name, reason)
            self.add(Mark(self.clock(), f"journal damaged: {reason}"[:1000]))
        self._journal.rejected.clear()
        rows: list[Row] = []
        while self._rows:
            rows.append(self._rows.popleft())
        self._journal.batch_bytes = self._fitting()
        try:
            self._journal.append(rows)
            if now >= self._sync_s:
                self._sync_s = now + SYNC_S
                self._journal.sync()
        except (LocalError, OSError) as error:
            if not self._failure:
                log.error("observations are not kept: %s", error)
            self._failure = str(error)
            return
        if rows:
            self._failure = ""
            self._since_s = now if self._since_s is None else self._since_s

    def _fitting(self) -> int:
        bps = self._uplink_bps()
        return UNKNOWN_LINK_BATCH_BYTES if bps is None else int(min(max(bps / 8 * LINK_S, MIN_BATCH_BYTES), MAX_BATCH_BYTES))

    # ---- sending -------------------------------------------------------------------------------------------------------------------

    def _send(self, now: float) -> list[Effect]:
        if not self._connected or now < self._due_s or self.orders.still or not self._quiet():
            return []
        if self._out is None:
            gathered = self._since_s is not None and now >= self._since_s + GATHER_S
            if not (self._journal.has_whole or gathered):
                return []
            self._out = self._oldest(now)
            if self._out is None:
                return []
        self._due_s, self._wait_s = now + self._wait_s, min(2 * self._wait_s, RECEIPT_MOST_S)
        said = Observations(journal=self._out.journal, number=self._out.number, sent_s=max(self.clock(), 0.0))
        return [Publish(topics.observations(self._device), wire.encode(said, encode_rows(self._out.rows)))]

    def _oldest(self, now: float) -> Batch | None:
        try:
            batch = self._journal.oldest()
        except LocalError as error:
            log.error("%s", error)
            self._due_s = now + RECEIPT_MOST_S
            return None
        if not self._journal.is_open:
            self._since_s = None
        return batch

    def _hear(self, event: Received, now: float) -> None:
        """Forget what the gateway has; one that says less than was sent takes nothing now."""
        try:
            receipt = wire.decode(event.payload, ObservationsReceipt)[0]
        except PeerError as error:
            log.warning("refused: %s", error)
            return
        out = self._out
        if out is None or receipt.journal != out.journal:
            return
        if receipt.number < out.number:
            self._wait_s = RECEIPT_MOST_S
            self._due_s = max(self._due_s, now + RECEIPT_MOST_S)
            return
        self._journal.receipted(out.journal, out.number)
        self._out, self._wait_s, self._due_s = None, RECEIPT_S, now
