"""One run's durable memory: a SQLite log of records, and snapshots as safetensors files.

Strategy. The log is the truth: `append` is one transaction with synchronous=FULL, so what it returns for survives a
power cut. A snapshot only shortens the replay: it is written aside, fsynced, renamed, the folder fsynced, and *then*
named in the database with its digest; a file that the database does not name is rubbish from a crash and goes at the
next open. After a failed write the store refuses every further one (fail-stop): once fsync has failed, nobody knows
what reached the disk, and only a fresh open reads the truth.

Threads: one mutex around the one writing connection, so `append` may come from a writer thread while others read or
save snapshots; a second one around snapshot files, so that `append` never waits for those. Schema: docs/store.md.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from numpy.typing import NDArray

from broker_server import snapshot
from broker_server.durable import sync_folder
from broker_server.run_files import CURE, connect, no_access, take_lock
from broker_server.snapshot import SnapshotFile
from regrow.errors import LocalError
from regrow.machine import Record

_T = TypeVar("_T")
# Metrics wait for the next append; without any append they are written once this many wait.
_METRICS_WAITING = 1000


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot that the database names; `version` is the integer "version" of its meta, if that has one."""

    log_id: int
    version: int | None
    wall_time: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the metrics table."""

    id: int
    wall_time: float
    kind: str
    fields: dict[str, Any]


class Store:
    """The log, metrics and snapshots of one run; made by `Store.open`, given back by `close` or a with block."""

    def __init__(self, path: Path, db: sqlite3.Connection, lock: IO[str] | None, wall_clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.snapshot_folder = path / "snapshots"
        self._db = db
        self._lock = lock
        self._wall_clock = wall_clock
        self._mutex = threading.RLock()
        self._snapshot_mutex = threading.Lock()
        self._failure = "" if lock else "it is open for reading only"
        self._metrics: list[tuple[float, str, str]] = []
        self._bytes_written = 0

    @classmethod
    def open(
        cls,
        path: str | Path,
        create: bool = False,
        *,
        read_only: bool = False,
        wall_clock: Callable[[], float] = time.time,
    ) -> Store:
        """Open the run in folder `path`; the lock is held until `close`, and ends with the process.

        Args:
            path: the run's folder.
            create: make the run when the folder has none; an existing run is opened as it is.
            read_only: take no lock and write nothing: for looking at a run that another process may be running, or that lies
                where this user may not write.
            wall_clock: seconds since 1970, for the wall_time columns.

        Raises:
            LocalError: no run there, taken by another process, a newer schema, not readable as a database, or no right
                to read or write there.
        """
        path = Path(path)
        if not create and not (path / "log.sqlite").is_file():
            raise LocalError(f"{path} holds no run (no log.sqlite): check the path, or start one with --new-run")
        if read_only:
            return cls(path, connect(path, read_only=True), None, wall_clock)
        try:
            (path / "snapshots").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise no_access(path, "written", error) from error
        lock = take_lock(path)
        try:
            store = cls(path, connect(path, create=create), lock, wall_clock)
            sync_folder(path)
            store._remove_unnamed_files()
        except BaseException:
            lock.close()
            raise
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write the waiting metrics, close the database and release the lock; further calls do nothing."""
        with self._mutex:
            if self._metrics and not self._failure:
                with suppress(LocalError):  # metrics are not promised, and close must release the lock
                    self._transaction(lambda _: None)
            self._failure = "it is closed"
            self._db.close()
            if self._lock:
                self._lock.close()

    @property
    def bytes_written(self) -> int:
        """Bytes that this process gave to the disk, by our own count: headers, payloads, metrics, snapshot files.

        SQLite writes each log byte about twice (journal, then database), which is not counted here.
        """
        return self._bytes_written

    @property
    def last_id(self) -> int:
        """The id of the newest record, 0 in an empty log."""
        with self._reading():
            return int(self._db.execute("SELECT coalesce(max(id), 0) FROM log").fetchone()[0])

    # ---- log ---------------------------------------------------------------------------------------------------------

    def append(self, records: Sequence[Record]) -> int:
        """Write the records in one transaction and return the last one's id, once they would survive a power cut.

        Metrics that wait go into the same transaction. Without records nothing new is promised: returns `last_id`.

        Raises:
            LocalError: a header is not UTF-8 (nothing is written), or the disk failed (the store is then finished).
        """
        now = self._wall_clock()
        try:
            rows = [(record.kind, bytes(record.header).decode(), record.payload, now) for record in records]
        except UnicodeDecodeError as error:
            raise LocalError(f"a record's header is not UTF-8: {error}") from error

        def insert(db: sqlite3.Connection) -> int:
            last = 0
            for row in rows:
                last = db.execute("INSERT INTO log (kind, header, payload, wall_time) VALUES (?, ?, ?, ?)", row).lastrowid or 0
            return last

        last = self._transaction(insert)
        with self._mutex:
            self._bytes_written += sum(len(row[1]) + memoryview(row[2]).nbytes for row in rows)
        return last or self.last_id

    def replay(self, after: int = 0, *, emptied_too: bool = False) -> Iterator[tuple[int, Record]]:
        """Yield (id, record) of every record with id > `after`, oldest first, one in memory at a time.

        Raises:
            LocalError: damage, a gap in the ids, or `after` lies before payloads that `prune` has emptied and
                `emptied_too` is False: such a replay would silently compute something else.
        """
        emptied = self._emptied_up_to()
        if after < emptied and not emptied_too:
            raise LocalError(
                f"{self.path}: payloads up to record {emptied} were freed, so a replay starts from a snapshot there or "
                f"later, not from {after}: {CURE}"
            )
        return self._replay(after)

    def _replay(self, after: int) -> Iterator[tuple[int, Record]]:
        # A connection of its own: a slow reader neither holds the mutex nor mixes with the writer's transactions.
        with self._translated(), closing(connect(self.path, read_only=True)) as db:
            expected = after + 1
            query = "SELECT id, kind, header, payload FROM log WHERE id > ? ORDER BY id"
            for id_, kind, header, payload in db.execute(query, (after,)):
                if id_ != expected:
                    raise LocalError(f"{self.path}: record {expected} is missing: {CURE}")
                expected += 1
                yield id_, Record(kind, header.encode(), payload)

    # ---- metrics -----------------------------------------------------------------------------------------------------

    def metric(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Note a row for the metrics table; it is written with the next append (or `close`) and not durable before."""
        row = (self._wall_clock(), kind, json.dumps(dict(fields), separators=(",", ":")))
        with self._mutex:
            self._metrics.append(row)
            if len(self._metrics) >= _METRICS_WAITING:
                self._transaction(lambda _: None)

    def metrics(self, after: int = 0, kind: str | None = None) -> Iterator[Metric]:
        """Yield the written metrics with id > `after`, oldest first; only those of `kind` when given."""
        with self._translated(), closing(connect(self.path, read_only=True)) as db:
            query = "SELECT id, wall_time, kind, fields FROM metrics WHERE id > ? AND (? IS NULL OR kind = ?) ORDER BY id"
            for id_, wall_time, row_kind, fields in db.execute(query, (after, kind, kind)):
                yield Metric(id_, wall_time, row_kind, json.loads(fields))

    # ---- snapshots ---------------------------------------------------------------------------------------------------

    def save_snapshot(self, log_id: int, meta: bytes, arrays: Mapping[str, NDArray[Any]]) -> SnapshotInfo:
        """Keep the state after record `log_id`; durable when this returns.

        Args:
            log_id: the last record that the state contains, at most `last_id`; an earlier snapshot of it is replaced.
            meta: a JSON object; its integer "version" is shown in listings.
            arrays: numeric or bool arrays by name.

        Raises:
            LocalError: `log_id` or `meta` is wrong, or the disk failed; the older snapshots stay.
        """
        if not 0 <= log_id <= self.last_id:
            raise LocalError(f"a snapshot at record {log_id}, but the log ends at {self.last_id}")
        version = _version_of(meta)
        with self._snapshot_mutex:
            self._check_writable()
            file = snapshot.write(self.snapshot_folder, log_id, arrays)
            info = SnapshotInfo(log_id, version, self._wall_clock(), file.bytes)
            row = (log_id, version, info.wall_time, file.name, file.bytes, file.sha256, meta.decode())
            self._transaction(lambda db: db.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?)", row))
            self._remove_unnamed_files()
        with self._mutex:
            self._bytes_written += file.bytes + len(meta)
        return info

    def snapshots(self) -> list[SnapshotInfo]:
        """The kept snapshots, oldest first; their files are only checked by `load_snapshot`."""
        with self._reading():
            rows = self._db.execute("SELECT log_id, version, wall_time, bytes FROM snapshots ORDER BY log_id").fetchall()
        return [SnapshotInfo(*row) for row in rows]

    def load_snapshot(self, log_id: int | None = None) -> tuple[int, bytes, dict[str, NDArray[Any]]] | None:
        """The newest snapshot that checks out (at most `log_id`, when given) as (log_id, meta, arrays), or None.

        One that does not check out is renamed *.rejected, with the reason in *.rejected.txt, and the next older one is
        tried; opened read-only, it is passed over and left alone. The arrays are writable and the caller's own.
        """
        query = "SELECT log_id, file, bytes, sha256, meta FROM snapshots WHERE ? IS NULL OR log_id <= ? ORDER BY 1 DESC"
        with self._snapshot_mutex:
            with self._reading():
                rows = self._db.execute(query, (log_id, log_id)).fetchall()
            for at, name, size, digest, meta in rows:
                arrays = self._load_or_set_aside(at, SnapshotFile(name, size, digest))
                if arrays is not None:
                    return at, meta.encode(), arrays
        return None

    def _load_or_set_aside(self, log_id: int, file: SnapshotFile) -> dict[str, NDArray[Any]] | None:
        try:
            return snapshot.load(self.snapshot_folder, file)
        except ValueError as error:
            if self._lock:
                snapshot.set_aside(self.snapshot_folder / file.name, str(error))
                self._transaction(lambda db: db.execute("DELETE FROM snapshots WHERE log_id = ?", (log_id,)))
            return None

    def prune(self, keep_snapshots: int, keep_payloads: bool = True) -> None:
        """Forget all but the newest `keep_snapshots` (>= 1) snapshots, and bound the log when payloads need not stay.

        With `keep_payloads` False, the payloads of 'accepted' records up to the oldest kept snapshot become empty;
        their rows stay, so ids and headers remain, and SQLite reuses the space.
        """
        if keep_snapshots < 1:
            raise LocalError(f"prune must keep at least one snapshot, not {keep_snapshots}")
        with self._snapshot_mutex:
            kept = self.snapshots()[-keep_snapshots:]
            if not kept:
                return
            oldest, emptied = kept[0].log_id, self._emptied_up_to()
            empty = "UPDATE log SET payload = x'' WHERE kind = 'accepted' AND id > ? AND id <= ?"

            def forget(db: sqlite3.Connection) -> None:
                db.execute("DELETE FROM snapshots WHERE log_id < ?", (oldest,))
                if not keep_payloads and oldest > emptied:
                    db.execute(empty, (emptied, oldest))
                    db.execute("UPDATE emptied SET up_to = ?", (oldest,))

            self._transaction(forget)
            self._remove_unnamed_files()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _emptied_up_to(self) -> int:
        with self._reading():
            return int(self._db.execute("SELECT up_to FROM emptied").fetchone()[0])

    def _remove_unnamed_files(self) -> None:
        """Remove what a crash, `prune` or a replacement left: snapshot files that the database does not name."""
        with self._reading():
            named = {row[0] for row in self._db.execute("SELECT file FROM snapshots")}
        for file in self.snapshot_folder.iterdir():
            if file.suffix in (".safetensors", ".tmp") and file.name not in named:
                with suppress(OSError):  # only space is at stake, and the next open tries again
                    file.unlink()

    def _check_writable(self) -> None:
        if self._failure:
            raise LocalError(f"{self.path} takes no more writes: {self._failure}")

    def _transaction(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run `work` and write the waiting metrics in one durable transaction; any failure ends the store."""
        with self._mutex:
            self._check_writable()
            try:
                self._db.execute("BEGIN IMMEDIATE")
                result = work(self._db)
                self._db.executemany("INSERT INTO metrics (wall_time, kind, fields) VALUES (?, ?, ?)", self._metrics)
                self._db.execute("COMMIT")
            except (sqlite3.Error, OverflowError, BufferError) as error:
                self._failure = f"a write failed ({error}); free space or check the disk, then start the gateway again"
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise LocalError(f"{self.path} takes no more writes: {self._failure}") from error
            self._bytes_written += sum(len(row[2]) for row in self._metrics)
            self._metrics.clear()
            return result

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._mutex, self._translated():
            yield

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LocalError(f"cannot read {self.path / 'log.sqlite'}: {error}; {CURE}") from error


def _version_of(meta: bytes) -> int | None:
    try:
        fields = json.loads(meta)
    except ValueError as error:
        raise LocalError(f"a snapshot's meta is not JSON: {error}") from error
    version = fields.get("version") if isinstance(fields, dict) else None
    return version if type(version) is int else None
