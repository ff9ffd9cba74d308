"""The device's durable memory: small files, each whole with its digest, old or new and never neither.

A file is MAGIC, the SHA-256 digest of the data (32 bytes), the data. It is written aside, fsynced, renamed, and the
folder fsynced, so a power cut leaves the old or the new one. What does not check out on reading is set aside.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from regrow.errors import LocalError

# The digit is the format's version: a file of another version is set aside like any other that does not check out.
MAGIC = b"REGROW1\n"
_DIGEST_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_OWN_SUFFIXES = (".tmp", ".rejected")
_LOCK = "lock"


class StateFolder:
    """Files by name in one folder that one agent holds; `close` or the end of the process gives it back.

    Not thread-safe: one thread of the agent owns it.

    Attributes:
        rejected: (name, reason) of every file that was set aside since opening.
        bytes_written: bytes given to the disk since opening, headers included: what wears an SD card.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the folder, making it if need be, and remove what a crash left half written.

        Raises:
            LocalError: another agent holds it, or it cannot be made or written.
        """
        self.path = Path(path)
        self.rejected: list[tuple[str, str]] = []
        self.bytes_written = 0
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self.path)
            for leftover in self.path.glob("*.tmp"):
                leftover.unlink()
            sync_folder(self.path)
        except OSError as error:
            raise LocalError(f"cannot use the state folder {self.path}: {error}; check its owner and the disk") from error

    def __enter__(self) -> StateFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the folder; harmless when done twice."""
        self._lock.close()

    def check(self) -> None:
        """See that the folder is still the one that was opened; a new one in its place has none of what was promised.

        Raises:
            LocalError: it was deleted, moved or replaced, or cannot be looked at; the agent cannot go on.
        """
        try:
            there = os.path.samestat((self.path / _LOCK).stat(), os.fstat(self._lock.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except OSError as error:
            raise LocalError(f"cannot use the state folder {self.path}: {error}; check its owner and the disk") from error
        if not there:
            raise LocalError(
                f"the state folder {self.path} is gone: it was deleted, moved or replaced while this agent ran, and without it "
                "no update can be kept; put it back if it was moved, and start the agent again"
            )

    def put(self, name: str, data: bytes, durable: bool = True) -> None:
        """Replace the file by `data`; when this returns it survives a power cut, unless `durable` is False.

        Without `durable` a power cut may leave the old, the new or a torn file, and `get` finds out which: for caches
        that can be fetched again, it spares the card two fsyncs.

        Raises:
            LocalError: a wrong name, the folder is gone, or the disk failed; the old file then stays.
        """
        file = self._file(name)
        self.check()  # also before: a folder that somebody made anew could be written
        temporary = self.path / f"{name}.tmp"
        try:
            with temporary.open("wb") as stream:
                stream.write(MAGIC + hashlib.sha256(data).digest())
                stream.write(data)
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            os.replace(temporary, file)  # noqa: PTH105 - the os calls in this order are what the crash tests interrupt
            if durable:
                sync_folder(self.path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            self.check()
            raise LocalError(f"cannot write {file}: {error}; free space on the disk or replace the card") from error
        self.bytes_written += len(MAGIC) + _DIGEST_BYTES + len(data)

    def get(self, name: str) -> bytes | None:
        """The file's data, or None when there is none; one that does not check out is set aside as name.rejected."""
        file = self._file(name)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._set_aside(file, f"cannot be read: {error}")
            return None
        if not content.startswith(MAGIC):
            self._set_aside(file, "does not begin as a state file of this version")
            return None
        data = content_of(content)
        if data is None:
            self._set_aside(file, f"digest differs: torn or changed ({len(content) - len(MAGIC) - _DIGEST_BYTES} bytes of data)")
        return data

    def delete(self, name: str, durable: bool = True) -> None:
        """Remove the file if it is there; `durable` False spares the fsync, and a power cut may bring it back."""
        file = self._file(name)
        try:
            file.unlink(missing_ok=True)
            if durable:
                sync_folder(self.path)
        except OSError as error:
            self.check()
            raise LocalError(f"cannot delete {file}: {error}") from error

    def clear(self) -> None:
        """Remove everything in the folder, models too, except that it is held.

        Raises:
            LocalError: something cannot be removed.
        """
        try:
            for entry in self.path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != _LOCK:
                    entry.unlink()
            sync_folder(self.path)
        except OSError as error:
            raise LocalError(f"cannot remove {error.filename or self.path}: {error.strerror or error}") from error

    def list(self, prefix: str = "") -> list[str]:
        """Names that start with `prefix`, sorted; nothing is read, so one of them may still be set aside by `get`."""
        names = (file.name for file in self.path.iterdir())
        return sorted(n for n in names if n.startswith(prefix) and n != _LOCK and not n.endswith(_OWN_SUFFIXES))

    def _file(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name == _LOCK or name.endswith(_OWN_SUFFIXES):
            raise LocalError(
                f"{name!r} is no name for a state file: 1 to 120 letters, digits, '.', '_', '-', beginning with a letter "
                "or digit; not 'lock', '*.tmp' or '*.rejected'"
            )
        if self._lock.closed:
            raise LocalError(f"the state folder {self.path} is closed")
        return self.path / name

    def _set_aside(self, file: Path, reason: str) -> None:
        self.rejected.append((file.name, reason))
        # When even the rename fails the file stays in the way of nothing: the next `put` replaces it.
        with suppress(OSError):
            file.rename(f"{file}.rejected")
            sync_folder(self.path)


def content_of(file: bytes) -> bytes | None:
    """The data of a state file's bytes; None where they do not check out."""
    data = file[len(MAGIC) + _DIGEST_BYTES :]
    whole = file.startswith(MAGIC) and hashlib.sha256(data).digest() == file[len(MAGIC) : len(MAGIC) + _DIGEST_BYTES]
    return data if whole else None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_lock(path: Path) -> IO[str]:
    lock = (path / _LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise LocalError(
            f"the state folder {path} is in use by process {holder}: stop that agent, or give this one its own --state"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock
