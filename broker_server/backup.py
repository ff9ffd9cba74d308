"""All that a gateway keeps, in one file that was true at one moment, made while the gateway runs.

A backup is a tar file: first `regrow-backup.json` (what this is), then `runs/...`, last `regrow-backup.sha256.json` (size and digest of
every file), so that a cut or damaged one is noticed. It holds passwords and keys. `broker_server.restore` reads it.

Order: each database by SQLite's own backup, which sees one transaction and disturbs no writer; the snapshots that this copy names; then
everything else, copied again until nothing has changed since it was copied. Locks, journals and half-written files stay behind.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import sqlite3
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from broker_server.durable import disk_failed, sync_folder
from regrow.errors import LocalError, UsageError

FORMAT = 1
HEAD, LIST = "regrow-backup.json", "regrow-backup.sha256.json"
RUNS = "runs"
FLEET = ".gateway/fleet"
_TRIES = 50
_LEFT_OUT = re.compile(r"lock|broker\.log|.*\.sqlite(-wal|-shm|-journal)?|.*\.tmp|\..*\.[0-9]+\.[0-9a-f]{8}|\..*\.new")
_Seen = dict[Path, tuple[int, int, int]]


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a backup is. secrets: it holds passwords and keys in plain."""

    format: int
    made: str
    runs: list[str]
    secrets: bool = True


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """Size and SHA-256 of every file in a backup, by its name there."""

    files: dict[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def write_backup(runs: Path, file: Path, fleet: Path | None = None) -> tuple[Head, Contents]:
    """Write `file` (0600), whole or not at all; needs the space of two of it meanwhile.

    Args:
        runs: the folder with the runs and the gateway's secrets; a gateway may be at work there.
        fleet: the fleet's folder, where it is not below `runs`; it then comes back at its usual place there.

    Raises:
        LocalError: there is nothing to back up, the file is there already, or something does not check out.
    """
    if not runs.is_dir() or not any(runs.iterdir()):
        raise UsageError(f"{runs} holds nothing to back up: --runs names the folder that `regrow serve` has")
    if file.exists():
        raise UsageError(f"{file} is there already: choose another name")
    if file.resolve().is_relative_to(runs.resolve()):
        raise UsageError(f"{file} would be a part of itself: put it outside {runs}")
    with _staging(file) as stage:
        _stage(runs, stage / RUNS)
        if fleet is not None and not fleet.resolve().is_relative_to(runs.resolve()):
            _stage(fleet, stage / RUNS / FLEET)
        names = sorted((log.parent.name for log in stage.glob(f"{RUNS}/*/log.sqlite")), key=lambda name: _started(runs / name))
        head = Head(format=FORMAT, made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), runs=names)
        packed = stage / "packed"
        contents = _pack(stage, packed, head)
        packed.rename(file)
        sync_folder(file.parent)
    return head, contents


@contextmanager
def _staging(file: Path) -> Iterator[Path]:
    """A folder beside the file for what will be in it, gone when the block ends."""
    stage = None
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{file.name}.", dir=file.parent))
        yield stage
    except OSError as error:
        raise disk_failed(f"{file} was not written, which takes twice its size meanwhile", error, file.parent) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _started(run: Path) -> int:
    """When a run began, as `runs.run_info` has it; restored in this order, the newest stays the newest."""
    try:
        return (run / "task" / "task.toml").stat().st_ctime_ns
    except OSError:
        return 0


# ---- a copy that was true at one moment ----------------------------------------------------------------------------------------------


def _stage(source: Path, stage: Path) -> None:
    """Copy a folder while others write there."""
    stage.mkdir(parents=True, mode=0o700)
    databases = sorted(path for path in source.rglob("*.sqlite") if path.is_file())
    for database in databases:
        target = stage / database.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy_database(database, target)
    homes = {database.parent for database in databases if database.name == "log.sqlite"}
    copied: _Seen = {}
    for _ in range(_TRIES):
        found = dict(_others(source, homes))
        for path in copied.keys() - found.keys():
            (stage / path.relative_to(source)).unlink()
        changed = [path for path, seen in found.items() if copied.get(path) != seen]
        if not changed:
            for folder in (path for path in stage.rglob("*") if path.is_dir()):
                shutil.copymode(source / folder.relative_to(stage), folder)
            return
        copied = {path: seen for path, seen in found.items() if path not in changed}
        for path in changed:
            target = stage / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copy2(path, target)
            except FileNotFoundError:
                continue
            copied[path] = found[path]
    raise LocalError(f"{source} keeps changing: {min(changed)}; try again when less is going on")


def _copy_database(database: Path, target: Path) -> None:
    """SQLite's own copy, and the snapshots that it names; a gateway may remove some of them between the two."""
    for _ in range(_TRIES):
        target.unlink(missing_ok=True)
        try:
            with (
                closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as db,
                closing(sqlite3.connect(target)) as copy,
            ):
                db.backup(copy)
                said = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
                named = [row[0] for row in copy.execute("SELECT file FROM snapshots")] if database.name == "log.sqlite" else []
        except sqlite3.Error as error:
            raise LocalError(f"{database} cannot be backed up: {error}; is there space for a copy at {target.parents[1]}?") from error
        if said != "ok":
            raise LocalError(f"{database} is damaged ({said}): restore an older backup, or move the run away")
        target.chmod(stat.S_IMODE(database.stat().st_mode))
        snapshots = target.parent / "snapshots"
        try:
            for name in named:
                snapshots.mkdir(exist_ok=True)
                shutil.copy2(database.parent / "snapshots" / name, snapshots / name)
        except FileNotFoundError:
            shutil.rmtree(snapshots)
            continue
        return
    raise LocalError(f"{database.parent} makes snapshots faster than they are copied; raise snapshot_every, or stop the gateway meanwhile")


def _others(source: Path, homes: set[Path]) -> Iterator[tuple[Path, tuple[int, int, int]]]:
    """Every file that is no database, lock, journal or snapshot, and what tells whether it changes."""
    for folder, inner, names in os.walk(source):
        here = Path(folder)
        inner[:] = [name for name in inner if _is_wanted(here, name, homes)]
        for name in names:
            path = here / name
            if _LEFT_OUT.fullmatch(name):
                continue
            try:
                seen = path.lstat()
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(seen.st_mode):
                raise LocalError(f"{path} is no plain file, and a backup holds only those: move it out of {source}")
            yield path, (seen.st_size, seen.st_mtime_ns, seen.st_ino)


def _is_wanted(here: Path, name: str, homes: set[Path]) -> bool:
    folder = here / name
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link, and a backup holds only what is really there: name what it points to with --runs")
    begun_since = folder not in homes and (folder / "log.sqlite").exists()
    return not (begun_since or _LEFT_OUT.fullmatch(name) or (name == "snapshots" and here in homes))


# ---- one file ------------------------------------------------------------------------------------------------------------------------


class _Hashing(io.RawIOBase):
    """A file that is hashed as it is read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


def _pack(stage: Path, packed: Path, head: Head) -> Contents:
    files: dict[str, tuple[int, str]] = {}
    order = {name: place for place, name in enumerate(head.runs)}
    paths = [path for path in (stage / RUNS).rglob("*") if not path.is_symlink()]
    paths.sort(key=lambda path: (order.get(path.relative_to(stage).parts[1], -1), path))
    with os.fdopen(os.open(packed, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, HEAD, msgspec.json.encode(head))
            for path in paths:
                entry = tarfile.TarInfo(path.relative_to(stage).as_posix())
                entry.mode, entry.mtime = stat.S_IMODE(path.stat().st_mode), int(path.stat().st_mtime)
                if path.is_dir():
                    entry.type = tarfile.DIRTYPE
                    tar.addfile(entry)
                    continue
                entry.size = path.stat().st_size
                with path.open("rb") as file:
                    hashing = _Hashing(file)
                    tar.addfile(entry, hashing)
                files[entry.name] = (entry.size, hashing.digest.hexdigest())
            contents = Contents(files=files)
            _add(tar, LIST, msgspec.json.encode(contents))
        out.flush()
        os.fsync(out.fileno())
    return contents


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    tar.addfile(entry, io.BytesIO(data))
