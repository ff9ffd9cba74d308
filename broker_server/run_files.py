"""Opening a run's log and taking its lock: what there is, what this user may do with it, and what to say when it is neither."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import IO, Literal

from regrow.errors import LocalError

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE log (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, header TEXT NOT NULL, payload BLOB NOT NULL,
                  wall_time REAL NOT NULL);
CREATE TABLE metrics (id INTEGER PRIMARY KEY, wall_time REAL NOT NULL, kind TEXT NOT NULL, fields TEXT NOT NULL);
CREATE TABLE snapshots (log_id INTEGER PRIMARY KEY, version INTEGER, wall_time REAL NOT NULL, file TEXT NOT NULL,
                        bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, meta TEXT NOT NULL);
CREATE TABLE emptied (up_to INTEGER NOT NULL);
INSERT INTO emptied VALUES (0);
"""
# A log that was large once should not keep a large journal beside it for ever.
JOURNAL_LIMIT_BYTES = 64 * 2**20
CURE = "restore the run folder from a backup, or start anew with --new-run"
# What SQLite says when it is the file system that refuses; the low byte of an extended code is the plain one.
_REFUSALS = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)


def connect(path: Path, *, create: bool = False, read_only: bool = False) -> sqlite3.Connection:
    """The log in folder `path`.

    Raises:
        LocalError: no right to read or write there, not a database, or of another schema.
    """
    file = path / "log.sqlite"
    try:
        db, version = _open(file, create=create, read_only=read_only)
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF in _REFUSALS:
            raise no_access(path, "read" if read_only else "written", error) from error
        raise LocalError(f"cannot open {file}: {error}; {CURE}") from error
    if version != SCHEMA_VERSION:
        db.close()
        why = "made by a newer Regrow: update this one" if version > SCHEMA_VERSION else f"never finished: {CURE}"
        raise LocalError(f"{file} has schema version {version}, this Regrow reads {SCHEMA_VERSION}; it was {why}")
    return db


def _open(file: Path, *, create: bool, read_only: bool) -> tuple[sqlite3.Connection, int]:
    """(connection, schema version); raises sqlite3.Error."""
    if not read_only:
        db, version = _query(file, "mode=rwc" if create else "mode=rw")
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA journal_size_limit = {JOURNAL_LIMIT_BYTES}")
            if version == 0 and create:
                db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
                version = SCHEMA_VERSION
            # SQLite opens a file that it may only read without a word: here it must show that it can write.
            db.executescript(f"BEGIN; PRAGMA user_version = {version}; ROLLBACK;")
        except sqlite3.Error:
            db.close()
            raise
        return db, version
    try:
        return _query(file, "mode=ro")
    except sqlite3.Error as error:
        journal = file.with_name(f"{file.name}-wal")
        if error.sqlite_errorcode & 0xFF not in _REFUSALS or (journal.exists() and journal.stat().st_size):
            raise
        # Even to read, SQLite wants to write beside a log with a journal. One that was closed is all in its file.
        return _query(file, "mode=ro&immutable=1")


def _query(file: Path, how: str) -> tuple[sqlite3.Connection, int]:
    # check_same_thread: the mutex of Store orders the threads, so the module's own check is not needed.
    db = sqlite3.connect(f"{file.absolute().as_uri()}?{how}", uri=True, isolation_level=None, check_same_thread=False)
    try:
        return db, int(db.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error:
        db.close()
        raise


def no_access(path: Path, what: Literal["read", "written"], error: Exception) -> LocalError:
    """The one error for a run folder where this user has not the rights that it takes."""
    cure = f"check the owner and the permissions of {path} and whether it is mounted read-only"
    copy = ", or read a copy of it in a folder of your own" if what == "read" else ""
    return LocalError(f"the run folder {path} cannot be {what} ({error}): {cure}{copy}")


def take_lock(path: Path) -> IO[str]:
    """The open, locked lock file of folder `path`.

    Raises:
        LocalError: another process holds it, or it cannot be made.
    """
    try:
        lock = (path / "lock").open("a+")
    except OSError as error:
        raise no_access(path, "written", error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise LocalError(f"{path} is in use by process {holder}: stop it, or name another run folder") from None
    except OSError as error:
        lock.close()
        raise LocalError(f"cannot lock {path / 'lock'}: {error}; put the run folder on a local disk") from error
    return lock
