"""A device's observations on its own disk until the gateway has them: bounded, and whole after any crash.

Strategy: one file is one batch, so that a batch keeps its number and its rows however often it is sent, also by a later life. Files are
only appended to, and a file that was handed out never again; it goes when its receipt comes. Every life draws a new journal nonce for its
own files, so that no number is used twice whatever a power cut took. A file is

    MAGIC, journal nonce (16), number (u64), CRC-32 of these (u32), then for each row: bytes (u32), CRC-32 (u32), the row in msgpack

What a power cut may lose: the rows since the last `sync`. Kind to SD cards: rows go to the kernel once a call, and to the card when a
file is full, about to be sent, or `sync` is called. A tail that does not check out is set aside; the rows before it stay.

When the journal is full the oldest files go, but for the very first, which may be on its way and count at the gateway. How many rows went,
and of which stretch, is a `Missing` row at the end, on the card before they go: a crash between says too much, never too little.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edge_agent.state import sync_folder
from regrow.errors import LocalError, PeerError
from regrow.message import DIGEST_BYTES
from regrow.observations import MAX_BATCH_BYTES, MAX_ROWS, LinkSeen, Mark, Missing, PowerSeen, Row, UplinkSeen, decode_rows

MAGIC = b"REGROWJ1"
SUFFIX, ASIDE = ".rows", ".rejected"
MIN_BATCH_BYTES = 4096
MIN_JOURNAL_BYTES = 4 * MAX_BATCH_BYTES
RESERVE_BYTES = 64 * 10**6  # of the disk, left to what training needs
_HEAD = struct.Struct("<8s16sQ")
_CRC = struct.Struct("<I")
_ENTRY = struct.Struct("<II")
_HEAD_BYTES = _HEAD.size + _CRC.size
_ARRAY_BYTES = 3  # what a batch's array begins with
_MISSING_BYTES = 64  # at most, with its entry
_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class Batch:
    """What one message carries. journal, number: what its receipt names."""

    journal: bytes
    number: int
    rows: tuple[Row, ...]


@dataclass(slots=True)
class _File:
    path: Path
    size: int
    synced: bool = False


@dataclass(slots=True)
class _Lost:
    """Rows that were let go and are not told yet."""

    rows: int = 0
    start_s: float = float("inf")
    end_s: float = 0.0

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            start_s, end_s = span(row)
            self.rows += row.rows if isinstance(row, Missing) else 1
            self.start_s, self.end_s = min(self.start_s, start_s), max(self.end_s, end_s)

    def told(self) -> list[Row]:
        return [Missing(self.start_s, max(self.end_s - self.start_s, 0.0), min(self.rows, 2**53))] if self.rows else []


class FieldJournal:
    """The journal in one folder; one thread owns it.

    Args:
        folder: of its files alone; made if need be.
        most_bytes: that its files may have.
        nonce: 16 bytes drawn for this life.
        reserve_bytes: of the disk that it leaves free.

    Attributes:
        batch_bytes: how large a new batch becomes; for a slow link they are smaller.
        rejected: (name, reason) of what was set aside, for the caller to tell and clear.

    Raises:
        LocalError: the folder cannot be used.
    """

    def __init__(self, folder: Path, most_bytes: int, nonce: bytes, reserve_bytes: int = RESERVE_BYTES) -> None:
        if len(nonce) != DIGEST_BYTES:
            raise LocalError(f"a journal's nonce has {DIGEST_BYTES} bytes, not {len(nonce)}")
        self._folder, self._nonce, self._reserve_bytes = folder, nonce, reserve_bytes
        self._most_bytes = max(most_bytes, MIN_JOURNAL_BYTES)
        self.batch_bytes = MAX_BATCH_BYTES
        self.rejected: list[tuple[str, str]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = deque(_File(path, path.stat().st_size) for path in sorted(folder.glob(f"*{SUFFIX}")))
        except OSError as error:
            raise LocalError(f"cannot use the journal {folder}: {error}; check its owner and the disk") from error
        self._bytes = sum(file.size for file in self._files)
        self._sequence = max((int(file.path.stem) for file in self._files if file.path.stem.isdecimal()), default=0)
        self._number = 0
        self._open: int | None = None
        self._open_rows = self._open_bytes = 0
        self._lost = _Lost()

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return self._bytes

    @property
    def has_whole(self) -> bool:
        """Whether there is a batch that nothing is added to any more."""
        return len(self._files) > (self._open is not None)

    @property
    def is_open(self) -> bool:
        """Whether there is one that rows are added to."""
        return self._open is not None

    # ---- writing -------------------------------------------------------------------------------------------------------------------

    def append(self, rows: Sequence[Row]) -> None:
        """Keep these rows, letting the oldest go where there is no room.

        Raises:
            LocalError: the disk failed or has no room; the rows are gone, and are told as `Missing` with the next ones.
        """
        group: list[Row] = []
        entries: list[bytes] = []
        for row in rows:
            group.append(row)
            entries.append(_entry(row))
            if sum(map(len, entries)) >= MAX_BATCH_BYTES // 2:
                self._append(group, entries)
                group, entries = [], []
        if group:
            self._append(group, entries)

    def _append(self, rows: Sequence[Row], entries: Sequence[bytes]) -> None:
        lost = replace(self._lost)
        try:
            going = self._too_many(sum(map(len, entries)) + 2 * _HEAD_BYTES + _MISSING_BYTES)
            for file in going:
                lost.add(self._rows_of(file))
            self._write([*map(_entry, lost.told()), *entries])
            if going:
                self.sync()
                for file in going:
                    self._forget(file)
        except OSError as error:
            self._give_up_open()
            self._lost.add(rows)
            raise LocalError(f"cannot write the journal {self._folder}: {error}; free space on the disk or replace the card") from error
        self._lost = _Lost()

    def sync(self) -> None:
        """Make what was appended durable.

        Raises:
            OSError: the disk failed.
        """
        if self._open is not None and not self._files[-1].synced:
            os.fsync(self._open)
            sync_folder(self._folder)
            self._files[-1].synced = True

    def close(self) -> None:
        """Make everything durable, as far as the disk does, and end."""
        with suppress(OSError):
            self.sync()
        self._give_up_open()

    def _too_many(self, more_bytes: int) -> list[_File]:
        """What must go to make room for that much; raises OSError where nothing makes enough."""
        free = shutil.disk_usage(self._folder).free
        room = min(self._most_bytes, self._bytes + free - self._reserve_bytes) - more_bytes - self._bytes
        going = []
        for file in list(self._files)[1 : -1 if self._open is not None else None]:
            if room >= 0:
                break
            going.append(file)
            room += file.size
        if room < 0:
            raise OSError(f"{free / 1e6:.0f} MB are free, and {self._reserve_bytes / 1e6:.0f} MB are left to training")
        return going

    def _write(self, entries: Sequence[bytes]) -> None:
        """Append, in as many files as it takes."""
        waiting: list[bytes] = []
        for entry in entries:
            row_bytes = len(entry) - _ENTRY.size
            full = self._open_rows >= MAX_ROWS or self._open_bytes + row_bytes > min(self.batch_bytes, MAX_BATCH_BYTES)
            if self._open is None or (full and self._open_rows):
                self._put(waiting)
                waiting = []
                self._begin()
            waiting.append(entry)
            self._open_rows, self._open_bytes = self._open_rows + 1, self._open_bytes + row_bytes
        self._put(waiting)

    def _put(self, entries: Sequence[bytes]) -> None:
        data = memoryview(b"".join(entries))
        if self._open is None or not data:
            return
        file, before = self._files[-1], self._files[-1].size
        file.synced = False
        try:
            while data:
                written = os.write(self._open, data)
                file.size, self._bytes, data = file.size + written, self._bytes + written, data[written:]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._open, before)
                self._bytes, file.size = self._bytes - file.size + before, before
            raise

    def _begin(self) -> None:
        """Open the next file; the one before is full."""
        self._seal()
        self._sequence, self._number = self._sequence + 1, self._number + 1
        head = _HEAD.pack(MAGIC, self._nonce, self._number)
        path = self._folder / f"{self._sequence:010d}{SUFFIX}"
        self._open = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._files.append(_File(path, 0))
        self._open_rows, self._open_bytes = 0, _ARRAY_BYTES
        self._put([head + _CRC.pack(zlib.crc32(head))])

    def _seal(self) -> None:
        self.sync()
        self._give_up_open()

    def _give_up_open(self) -> None:
        """Nothing more goes into this file: what comes behind a torn row could not be read."""
        if self._open is not None:
            with suppress(OSError):
                os.close(self._open)
            self._open = None

    # ---- sending -------------------------------------------------------------------------------------------------------------------

    def oldest(self) -> Batch | None:
        """The batch to be sent next, or None: durable, and the same at every call until it is `receipted`.

        Raises:
            LocalError: the disk failed, so it could not be made durable.
        """
        while self._files:
            file = self._files[0]
            try:
                if len(self._files) == 1 and self._open is not None:
                    self._seal()
                _make_durable(file)
            except OSError as error:
                raise LocalError(f"cannot write the journal {self._folder}: {error}; check the disk") from error
            batch = self._read_or_set_aside(file)
            if batch is not None and batch.rows:
                return batch
            if file in self._files:
                self._forget(file)
        return None

    def _read_or_set_aside(self, file: _File) -> Batch | None:
        try:
            return self._read(file)
        except OSError as error:
            self._set_aside(file, f"cannot be read: {error.strerror or error}")
            return None

    def receipted(self, journal: bytes, number: int) -> None:
        """The gateway has this journal's batches up to this number: forget them."""
        while self._files and not (len(self._files) == 1 and self._open is not None):
            try:
                with self._files[0].path.open("rb") as stream:
                    head = _head_of(stream.read(_HEAD_BYTES))
            except OSError:
                return
            if head is None or head[0] != journal or head[1] > number:
                return
            self._forget(self._files[0])

    def _forget(self, file: _File) -> None:
        with suppress(OSError):  # found again by the next life, it is sent once more and counts once
            file.path.unlink(missing_ok=True)
        self._files.remove(file)
        self._bytes -= file.size

    # ---- reading -------------------------------------------------------------------------------------------------------------------

    def _rows_of(self, file: _File) -> tuple[Row, ...]:
        batch = self._read(file)
        return () if batch is None else batch.rows

    def _read(self, file: _File) -> Batch | None:
        """What checks out of a file; the rest is cut off and set aside."""
        data = file.path.read_bytes()
        head = _head_of(data)
        if head is None:
            if data:
                self._set_aside_tail(file, data, 0, "does not begin as a journal file of this version")
            return None
        rows: list[Row] = []
        place, reason = _HEAD_BYTES, ""
        while place < len(data) and not reason:
            row = _row_at(data, place)
            if isinstance(row, str):
                reason = row
            else:
                rows.append(row[0])
                place = row[1]
        if reason:
            self._set_aside_tail(file, data, place, f"{len(data) - place} bytes behind row {len(rows)}: {reason}")
        return Batch(*head, tuple(rows))

    def _set_aside_tail(self, file: _File, data: bytes, place: int, reason: str) -> None:
        """Keep what is bad for who wants to look, only the last such, and cut the file there."""
        self.rejected.append((file.path.name, reason))
        for older in self._folder.glob(f"*{ASIDE}"):
            older.unlink(missing_ok=True)
        with suppress(OSError):
            file.path.with_name(f"{file.path.name}{ASIDE}").write_bytes(data[place:])
        os.truncate(file.path, place)
        self._bytes, file.size, file.synced = self._bytes - file.size + place, place, False

    def _set_aside(self, file: _File, reason: str) -> None:
        self.rejected.append((file.path.name, reason))
        with suppress(OSError):
            file.path.rename(file.path.with_name(f"{file.path.name}{ASIDE}"))
        self._files.remove(file)
        self._bytes -= file.size


def span(row: Row) -> tuple[float, float]:
    """From when to when a row says something."""
    if isinstance(row, (Mark, UplinkSeen)):
        return row.at_s, row.at_s
    if isinstance(row, (LinkSeen, PowerSeen)):  # what they say is of the time before
        return max(row.at_s - row.seconds, 0.0), row.at_s
    return row.at_s, row.at_s + row.seconds


def _entry(row: Row) -> bytes:
    data = _encode(row)
    return _ENTRY.pack(len(data), zlib.crc32(data)) + data


def _head_of(data: bytes) -> tuple[bytes, int] | None:
    """(journal, number) when a file begins as it must."""
    if len(data) < _HEAD_BYTES or _CRC.unpack_from(data, _HEAD.size)[0] != zlib.crc32(data[: _HEAD.size]):
        return None
    magic, journal, number = _HEAD.unpack_from(data)
    return (journal, number) if magic == MAGIC and number else None


def _row_at(data: bytes, place: int) -> tuple[Row, int] | str:
    """(the row there, where the next one begins), or what is wrong."""
    begin = place + _ENTRY.size
    if begin > len(data):
        return "cut short"
    size, digest = _ENTRY.unpack_from(data, place)
    body = data[begin : begin + size]
    if size > MAX_BATCH_BYTES or len(body) < size:
        return "cut short"
    if zlib.crc32(body) != digest:
        return "its digest differs"
    try:
        return decode_rows(b"\x91" + body)[0], begin + size
    except PeerError as error:
        return str(error)


def _make_durable(file: _File) -> None:
    """Before it is sent: a number that the gateway has must not be used again for other rows."""
    if file.synced:
        return
    descriptor = os.open(file.path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(file.path.parent)
    file.synced = True
