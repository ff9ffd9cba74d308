"""A backup put back: checked whole in a folder of its own, then put in place at once.

Killed at any moment, there is the old folder or the new one. What was there before is set aside by exchanging the two names in one call
of the kernel; a half-made copy is removed by the next restore. Nothing in the file is trusted: only plain files and folders below
`runs/`, each with the size and digest that the list at its end says.

A restored run knows nothing of what was promised after the backup, so its terms and assignment numbers begin above everything that
devices can have heard since (`regrow.claim.term_after_restore`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tarfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from broker_server.backup import FORMAT, HEAD, LIST, RUNS, Contents, Head
from broker_server.durable import disk_failed, sync_folder
from broker_server.run_files import take_lock
from broker_server.store import Store
from regrow import records
from regrow.claim import term_after_restore
from regrow.errors import LocalError, RegrowError, UsageError
from regrow.records import to_record

_BLOCK_BYTES = 1024 * 1024
_HEAD_LIMIT_BYTES = 64 * _BLOCK_BYTES
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def restore_backup(file: Path, runs: Path, *, replace: bool = False) -> tuple[Head, Contents, Path | None]:
    """Put a backup in place of `runs`; returns what it holds, and where the old folder is now.

    Args:
        replace: set aside what is there; without it a folder that is not empty is refused.

    Raises:
        LocalError: the file is no whole backup, or the place is taken or in use; nothing has changed then.
    """
    there = runs.exists() and (not runs.is_dir() or any(runs.iterdir()))
    if there and not replace:
        raise UsageError(f"{runs} is not empty: restore into another folder with --runs, or set it aside with --replace")
    runs.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        held.enter_context(_alone(runs.parent))
        for log in sorted(runs.rglob("log.sqlite")) if there else ():
            held.enter_context(take_lock(log.parent))
        for left in runs.parent.glob(f".{runs.name}.restoring-*"):
            shutil.rmtree(left)
        stage = runs.parent / f".{runs.name}.restoring-{secrets.token_hex(4)}"
        stage.mkdir(mode=0o700)
        (stage / RUNS).mkdir(mode=0o700)
        try:
            head, contents = _unpack(file, stage)
            for log in sorted((stage / RUNS).glob("*/log.sqlite")):
                _leap(log.parent)
            _sync(stage / RUNS)
            return head, contents, _put_in_place(stage / RUNS, runs, there)
        except OSError as error:
            raise disk_failed(f"{file} was not restored, and nothing has changed", error, runs.parent) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One restore at a time beside each other."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(f"another restore is at work in {folder}") from None
        yield
    finally:
        os.close(descriptor)


def _put_in_place(new: Path, runs: Path, there: bool) -> Path | None:
    aside = None
    if there:
        aside = runs.with_name(f"{runs.name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
        new.rename(aside)  # the name under which the old folder is found, whenever the power goes
        sync_folder(runs.parent)
        try:
            _exchange(aside, runs)
        except OSError as error:
            aside.rename(new)
            cure = f"move {runs} away yourself and restore without --replace"
            raise LocalError(f"this system cannot exchange two folders at once ({error.strerror}): {cure}") from error
    else:
        new.rename(runs)
    sync_folder(runs.parent)
    return aside


def _exchange(one: Path, other: Path) -> None:
    """Linux: renameat2 with RENAME_EXCHANGE."""
    names = [os.fsencode(path.absolute()) for path in (one, other)]
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# ---- the file ------------------------------------------------------------------------------------------------------------------------


def _unpack(file: Path, stage: Path) -> tuple[Head, Contents]:
    try:
        with file.open("rb") as stream:
            if stream.read(len(HEAD)) != HEAD.encode():
                raise LocalError(f"{file} is no backup of Regrow: `regrow backup` makes one")
            stream.seek(0)
            return _read(stream, stage, file)
    except (tarfile.TarError, EOFError, msgspec.MsgspecError, ValueError) as error:
        raise LocalError(f"{file} is cut short or damaged ({error}): use another backup") from error


def _read(stream: BinaryIO, stage: Path, file: Path) -> tuple[Head, Contents]:
    """Raises LocalError, or what tarfile and msgspec raise: it does not check out."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        members = iter(tar)
        head = _head(_small(tar, next(members)), file)
        found: dict[str, tuple[int, str]] = {}
        for member in members:
            if member.name == LIST:
                contents = msgspec.json.decode(_small(tar, member), type=Contents)
                break
            _place(tar, member, stage, found, file)
        else:
            raise EOFError("its end is missing")
    if contents.files != found:
        wrong = min(name for name in {*contents.files, *found} if contents.files.get(name) != found.get(name))
        raise ValueError(f"{wrong} is not what was backed up")
    return head, contents


def _head(data: bytes, file: Path) -> Head:
    known = msgspec.json.decode(data, type=dict[str, object]).get("format")
    if isinstance(known, int) and known > FORMAT:
        raise LocalError(f"{file} was made by a newer Regrow (format {known}, this one reads {FORMAT}): update this one")
    return msgspec.json.decode(data, type=Head)


def _small(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member) if member.isreg() and member.size <= _HEAD_LIMIT_BYTES else None
    if stream is None:
        raise ValueError(f"{member.name} is not what it should be")
    return stream.read()


def _place(tar: tarfile.TarFile, member: tarfile.TarInfo, stage: Path, found: dict[str, tuple[int, str]], file: Path) -> None:
    """Write one file or folder of the backup below the stage."""
    parts = member.name.split("/")
    if parts[0] != RUNS or any(part in ("", ".", "..") for part in parts) or "\0" in member.name or not (member.isreg() or member.isdir()):
        raise LocalError(f"{file} is no backup of Regrow: {member.name!r} has no place in one; nothing was restored")
    target = stage.joinpath(*parts)
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        target.chmod(0o700 | (member.mode & 0o755))
        return
    if member.name in found:
        raise ValueError(f"{member.name} is there twice")
    target.parent.mkdir(parents=True, exist_ok=True)
    stream, digest, size = tar.extractfile(member), hashlib.sha256(), 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        while stream is not None and (block := stream.read(_BLOCK_BYTES)):
            out.write(block)
            digest.update(block)
            size += len(block)
        out.flush()
        os.fsync(out.fileno())
        os.fchmod(out.fileno(), stat.S_IMODE(member.mode) & 0o755 | 0o600)
    found[member.name] = (size, digest.hexdigest())


def _sync(folder: Path) -> None:
    """Make every name durable; the contents are."""
    for inner in folder.rglob("*"):
        if inner.is_dir():
            sync_folder(inner)
    sync_folder(folder)


# ---- the runs ------------------------------------------------------------------------------------------------------------------------


def _leap(run: Path) -> None:
    """Let an unfinished run lead under a term that no device has heard yet."""
    term, finished = 0, False
    try:
        with Store.open(run) as store:
            for record in (record for _, record in store.replay(emptied_too=True) if record.kind in ("led", "finished", "rolledback")):
                entry = records.from_record(record)
                term = entry.term if isinstance(entry, records.Led) else term
                finished = isinstance(entry, records.Finished) or (finished and isinstance(entry, records.Led))
            if term and not finished:
                store.append([to_record(records.Led(term=term_after_restore(term)))])
    except RegrowError as error:
        raise LocalError(f"{run.name} in the backup does not check out: {error}") from error
