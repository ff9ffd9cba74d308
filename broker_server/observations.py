"""What devices have observed of themselves, in one SQLite file of the gateway, and a machine beside the coordinator's that takes it in.

A thread of its own decodes and writes, so the coordinator never waits for this disk: what waits goes into one transaction, and a batch is
receipted only after that is durable. A batch counts once, for the file remembers (device, journal, number). What a device may fill is
bounded: in all, by rows a day, and by what the disk must leave to the runs. When the disk fails, the gateway goes on training and tries
again. One process at a time records; any number may read. Schema: docs/store.md.
"""

from __future__ import annotations

import fcntl
import logging
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import inspect

from broker_server.durable import keep_owner
from regrow import topics, wire
from regrow.errors import LocalError, PeerError
from regrow.machine import Connected, Effect, Event, Publish, Received, Subscribe
from regrow.observations import (
    LinkSeen,
    Mark,
    Missing,
    Observations,
    ObservationsReceipt,
    PhaseSeen,
    PowerSeen,
    Row,
    TransferSeen,
    UplinkSeen,
    decode_rows,
)

log = logging.getLogger(__name__)
FILE = "observations.sqlite"
LOCK = "field/lock"  # held by the process that records, and says to devices what a field run wants of them
SCHEMA_VERSION = 1
MOST_MB = 4000.0
ROWS_A_DAY = 1_000_000
RESERVE_BYTES = 256 * 10**6  # of the disk, left to the runs
RETRY_S = 60.0
CLOCK_WINDOW_S = 600.0
DAY_S = 86_400
MOST_WAITING = 256  # batches; a device whose batch is let go sends it again
BUSY_S = 10.0
TABLES: dict[str, type[Row]] = {
    "transfers": TransferSeen,
    "uplinks": UplinkSeen,
    "links": LinkSeen,
    "power": PowerSeen,
    "phases": PhaseSeen,
    "missing": Missing,
    "marks": Mark,
}
_TABLE_OF = {row: table for table, row in TABLES.items()}
_OTHERS = """
CREATE TABLE batches (device TEXT NOT NULL, journal TEXT NOT NULL, number INTEGER NOT NULL, rows INTEGER NOT NULL, received_s REAL NOT NULL,
                      PRIMARY KEY (device, journal, number)) WITHOUT ROWID;
CREATE INDEX batches_by_time ON batches (received_s);
CREATE TABLE clocks (device TEXT NOT NULL, at_s REAL NOT NULL, offset_s REAL NOT NULL, error_s REAL);
CREATE INDEX clocks_by_time ON clocks (device, at_s);
CREATE TABLE annotations (at_s REAL NOT NULL, text TEXT NOT NULL);
"""


def _column(field: Any) -> str:
    """A field of a row as SQL; the value None is NULL."""
    kinds = field.type.types if isinstance(field.type, inspect.UnionType) else (field.type,)
    names = {inspect.FloatType: "REAL", inspect.IntType: "INTEGER", inspect.BoolType: "INTEGER"}
    sql = next((names[type(kind)] for kind in kinds if type(kind) in names), "TEXT")
    return f"{field.name} {sql}" if any(isinstance(kind, inspect.NoneType) for kind in kinds) else f"{field.name} {sql} NOT NULL"


def _table(table: str, row: type[Row]) -> str:
    fields: Any = inspect.type_info(row)
    columns = ", ".join(("device TEXT NOT NULL", *map(_column, fields.fields), "received_s REAL NOT NULL"))
    return f"CREATE TABLE {table} ({columns});\nCREATE INDEX {table}_by_time ON {table} (device, at_s);\n"


SCHEMA = "".join(_table(table, row) for table, row in TABLES.items()) + _OTHERS
_INSERT = {row: f"INSERT INTO {table} VALUES ({', '.join('?' * (len(row.__struct_fields__) + 2))})" for row, table in _TABLE_OF.items()}


# ---- the file ------------------------------------------------------------------------------------------------------------------------


def open_observations(home: Path) -> sqlite3.Connection:
    """The observations of a gateway's home, to be read while they are recorded, too; closed by the caller.

    Raises:
        LocalError: there are none, or they cannot be read.
    """
    file = home / FILE
    try:
        db = _open_to_read(file) if file.is_file() else None
    except sqlite3.Error as error:
        raise LocalError(f"cannot read {file}: {error}; check its owner, or move it away if it is damaged") from error
    if db is None:
        raise LocalError(f"there are no observations in {file}: no device has sent any to this gateway yet")
    return db


def _open_to_read(file: Path) -> sqlite3.Connection | None:
    """None: it was made, but holds no tables yet."""
    try:
        db = _connect(file, "mode=ro")
        if db.execute("PRAGMA user_version").fetchone()[0]:
            return db
        db.close()
        return None
    except sqlite3.OperationalError:
        journal = file.with_name(f"{file.name}-wal")
        if journal.exists() and journal.stat().st_size:
            raise
        # Even to read, SQLite wants to write beside a file with a journal. One that was closed is all in its file.
        return _connect(file, "mode=ro&immutable=1")


def annotate(home: Path, text: str, at_s: float) -> None:
    """Keep what a person says of a moment (unix seconds, the gateway's clock); durable when this returns, whether a gateway runs or not.

    Raises:
        LocalError: it is empty or too long, or cannot be written.
    """
    if not 0 < len(text) <= 1000 or not text.isprintable():
        raise LocalError("an annotation is one line of 1 to 1000 printable characters")
    try:
        with closing(_open_to_write(home)) as db:
            db.execute("INSERT INTO annotations VALUES (?, ?)", (at_s, text))
    except (sqlite3.Error, OSError) as error:
        raise LocalError(f"cannot write {home / FILE}: {error}; check its owner and the disk, or move it away if it is damaged") from error


def _open_to_write(home: Path) -> sqlite3.Connection:
    file = home / FILE
    with file.open("ab") as made:
        keep_owner(made.fileno(), home)
    file.chmod(0o600)
    db = _connect(file, "mode=rw")
    try:
        _into_wal(db)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA journal_size_limit = 16777216")
        db.execute("BEGIN IMMEDIATE")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:
            for statement in f"{SCHEMA} PRAGMA user_version = {SCHEMA_VERSION};".split(";"):
                db.execute(statement)
        db.execute("COMMIT")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _into_wal(db: sqlite3.Connection) -> None:
    """Of all statements this one does not wait for another connection by itself; two that make the file at once meet here."""
    until_s = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= until_s:
                raise
        time.sleep(0.02)


def _connect(file: Path, how: str) -> sqlite3.Connection:
    db = sqlite3.connect(f"{file.absolute().as_uri()}?{how}", uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_S)
    try:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"it has schema version {version}, made by a newer Regrow: update this one")
    except sqlite3.Error:
        db.close()
        raise
    return db


# ---- writing -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Came:
    """A message as it came."""

    device: str
    message: bytes
    received_s: float


@dataclass(frozen=True, slots=True)
class ClockSeen:
    """A device's clock minus the gateway's, and the largest error of that: None where only the way here is known, which makes it less."""

    device: str
    at_s: float
    offset_s: float
    error_s: float | None


@dataclass(frozen=True, slots=True)
class _Receipt:
    device: str
    journal: bytes
    number: int


class _Writer:
    """The file's thread. home: where the file is; most_bytes: of it; rows_a_day: of one device."""

    def __init__(self, home: Path, most_bytes: int, rows_a_day: int, reserve_bytes: int) -> None:
        self._home, self._most_bytes, self._rows_a_day, self._reserve_bytes = home, most_bytes, rows_a_day, reserve_bytes
        self.work: queue.Queue[_Came | ClockSeen | None] = queue.Queue(MOST_WAITING)
        self.done: queue.SimpleQueue[_Receipt] = queue.SimpleQueue()
        self._db: sqlite3.Connection | None = None
        self._retry_s = float("-inf")
        self._failed = False
        self._day = -1
        self._today: dict[str, int] = {}
        self._told: set[tuple[str, str]] = set()
        self._offsets: dict[str, tuple[float, float]] = {}
        self._thread = threading.Thread(target=self._run, name="observations", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what was given, then end."""
        self.work.put(None)
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            batch = [self.work.get()]
            with suppress(queue.Empty):
                while True:
                    batch.append(self.work.get_nowait())
            ended = None in batch
            self._write([item for item in batch if item is not None])
        if self._db is not None:
            self._db.close()

    def _write(self, items: Sequence[_Came | ClockSeen]) -> None:
        """All in one transaction, or none."""
        if not items or time.monotonic() < self._retry_s:
            return
        try:
            db = self._db = self._db or _open_to_write(self._home)
            db.execute("BEGIN IMMEDIATE")
            receipts = [receipt for item in items if (receipt := self._take(db, item)) is not None]
            db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            self._fail(error)
            return
        if self._failed:
            log.warning("observations are stored again")
        self._failed = False
        for receipt in receipts:
            self.done.put(receipt)

    def _fail(self, error: Exception) -> None:
        """After a failed write nobody knows what reached the disk: only a file that is opened anew says."""
        if not self._failed:
            log.error(
                "observations are not stored, training goes on: %s: %s; free space, or move the file away if it is damaged",
                self._home / FILE,
                error,
            )
        self._failed, self._retry_s, self._day = True, time.monotonic() + RETRY_S, -1
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
        self._db = None

    def _take(self, db: sqlite3.Connection, item: _Came | ClockSeen) -> _Receipt | None:
        """What to answer once it is durable."""
        if isinstance(item, ClockSeen):
            db.execute("INSERT INTO clocks VALUES (?, ?, ?, ?)", (item.device, item.at_s, item.offset_s, item.error_s))
            return None
        try:
            said, payload = wire.decode(item.message, Observations)
            rows = decode_rows(payload)
            if not rows:
                raise PeerError("Observations: a batch without rows")
        except PeerError as error:
            self._tell(item.device, "damaged", f"refused: {error}")
            return None
        key = (item.device, said.journal.hex())
        if db.execute("SELECT 1 FROM batches WHERE device = ? AND journal = ? AND number = ?", (*key, said.number)).fetchone():
            return _Receipt(item.device, said.journal, said.number)
        if why := self._no_room(db, item, len(rows)):
            self._tell(item.device if why.startswith("it") else "", "no room", why)
            newest = db.execute("SELECT coalesce(max(number), 0) FROM batches WHERE device = ? AND journal = ?", key).fetchone()[0]
            return _Receipt(item.device, said.journal, min(newest, said.number - 1))
        for row in rows:
            db.execute(_INSERT[type(row)], (item.device, *(getattr(row, name) for name in row.__struct_fields__), item.received_s))
        db.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", (*key, said.number, len(rows), item.received_s))
        self._today[item.device] = self._today.get(item.device, 0) + len(rows)
        self._weigh_clock(db, item, said.sent_s)
        return _Receipt(item.device, said.journal, said.number)

    def _no_room(self, db: sqlite3.Connection, item: _Came, rows: int) -> str:
        """Why this batch is not taken now; "" it is."""
        day = int(item.received_s // DAY_S)
        if day != self._day:
            self._day, self._told = day, set()
            self._today = dict(db.execute("SELECT device, sum(rows) FROM batches WHERE received_s >= ? GROUP BY device", (day * DAY_S,)))
        if self._today.get(item.device, 0) + rows > self._rows_a_day:
            return f"it has sent {self._rows_a_day} rows of observations today; the others are taken tomorrow, if its journal keeps them"
        size = db.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()[0]
        if size + len(item.message) > self._most_bytes:
            return (
                f"{self._home / FILE} has reached {self._most_bytes / 1e6:.0f} MB: observations are not taken any more; "
                "raise --observations-mb, or move the file away"
            )
        free = shutil.disk_usage(self._home).free
        if free < self._reserve_bytes:
            left = f"{self._reserve_bytes / 1e6:.0f} MB are left to the runs"
            return f"{free / 1e6:.0f} MB are free for {self._home}: observations are not taken, {left}"
        return ""

    def _weigh_clock(self, db: sqlite3.Connection, item: _Came, sent_s: float) -> None:
        """Note the offset that the quickest batch of some minutes shows: what the way here took only makes it less."""
        offset_s = sent_s - item.received_s
        until_s, most = self._offsets.get(item.device, (float("-inf"), 0.0))
        if item.received_s < until_s and offset_s <= most:
            return
        self._offsets[item.device] = (until_s if item.received_s < until_s else item.received_s + CLOCK_WINDOW_S, offset_s)
        db.execute("INSERT INTO clocks VALUES (?, ?, ?, NULL)", (item.device, sent_s, offset_s))

    def _tell(self, device: str, kind: str, reason: str) -> None:
        """Once a day for each."""
        if (device, kind) not in self._told:
            self._told.add((device, kind))
            log.warning("%s", f"{device}: {reason}" if device else reason)


# ---- on the link ---------------------------------------------------------------------------------------------------------------------


class Recorder:
    """Takes in what devices have observed. `step` takes every event of the link; whoever owns the link carries the effects out.

    Args:
        home: the gateway's; the file lies in it.
        most_bytes: of the file.
        rows_a_day: of one device.
        clock: unix seconds.
        reserve_bytes: of the disk that are left to the runs.
    """

    def __init__(
        self,
        home: Path,
        most_bytes: int = int(MOST_MB * 1e6),
        rows_a_day: int = ROWS_A_DAY,
        clock: Callable[[], float] = time.time,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self._clock = clock
        self._writer = _Writer(home, most_bytes, rows_a_day, reserve_bytes)

    def step(self, event: Event | None, now: float, *, leads: bool = True) -> list[Effect]:  # noqa: ARG002 - it is about no task
        """Take an event in, or None for the time alone. leads: of no concern here."""
        if isinstance(event, Connected):
            return [Subscribe((topics.observations("+"),))]
        if isinstance(event, Received) and event.payload and (found := topics.parse_of_device(event.topic, ("observations",))):
            self._put(_Came(found[0], bytes(event.payload), self._clock()))
        effects: list[Effect] = []
        with suppress(queue.Empty):
            while True:
                receipt = self._writer.done.get_nowait()
                said = ObservationsReceipt(journal=receipt.journal, number=receipt.number)
                effects.append(Publish(topics.observations_receipt(receipt.device), wire.encode(said)))
        return effects

    def note_clock(self, seen: ClockSeen) -> None:
        """Keep what is known of a device's clock."""
        self._put(seen)

    def close(self) -> None:
        """Write what came, then end; it is receipted when it comes again."""
        self._writer.close()

    def _put(self, item: _Came | ClockSeen) -> None:
        with suppress(queue.Full):
            self._writer.work.put_nowait(item)


@contextmanager
def recorder_of(home: Path, most_bytes: int = int(MOST_MB * 1e6)) -> Iterator[Recorder | None]:
    """The one recorder of a gateway's home for as long as the block takes, or None when another process is it."""
    file = home / LOCK
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        recorder = Recorder(home, most_bytes)
        try:
            yield recorder
        finally:
            recorder.close()
