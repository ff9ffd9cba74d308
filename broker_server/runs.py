"""A run is a folder: the task as it was when the run began, the durable log, snapshots. Everything here works without a broker."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from broker_server.field.progress import field_of
from broker_server.run_record import facts_of, newest_score
from broker_server.store import Store
from regrow import checkpoint, records
from regrow.errors import LocalError, PeerError, UsageError
from regrow.ledger import Ledger
from regrow.parameters import Layout
from regrow.programs import MEMORY, UNITS, program_file, program_name
from regrow.records import to_record
from regrow.scoring import score_name
from regrow.shelf import Shelf, in_memory
from regrow.task import Task, parse_task
from regrow.units import Units


@dataclass(frozen=True, eq=False)
class TaskFolder:
    """A built task: task.toml, its model, and what was built from it; `units` where the granularity is "unit".

    Among the programs is `memory` (regrow.step_memory), which older builds lack.
    """

    path: Path
    task: Task
    layout: Layout
    programs: dict[str, bytes]
    initial: NDArray[np.float32]
    units: Units | None = None

    @property
    def model_path(self) -> Path:
        return self.path / self.task.model


def read_task(folder: Path) -> Task:
    """The task.toml of a task folder.

    Raises:
        LocalError: there is none, or it is not valid; with its line.
    """
    file = folder / "task.toml"
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        cure = "a task is a folder with task.toml and a forward ONNX model: `regrow task new` makes one"
        raise UsageError(f"{file}: {error}; {cure}") from error
    return parse_task(text, str(file))


def load_task(folder: Path, task: Task | None = None) -> TaskFolder:
    """A task folder that `regrow task build` has been through.

    Args:
        task: what its task.toml said earlier, so that it is not read again.

    Raises:
        LocalError: something of it is missing or does not fit together.
    """
    task = read_task(folder) if task is None else task
    build = folder / "build"
    try:
        programs = {program_name(file.name): file.read_bytes() for file in _program_files(build)}
        initial = np.load(build / "initial.npy", allow_pickle=False)
        layout = Layout.from_json(programs["layout"])
        units_json = programs.pop(UNITS, None)
        units = None if units_json is None else Units.from_json(units_json, layout)
        missing = {"train", "evaluate", *(() if units is not None else ("train_masked",))} - programs.keys()
    except (OSError, ValueError, KeyError, PeerError) as error:
        raise LocalError(f"{build}: {error}; run `regrow task build {folder}`") from error
    if missing:
        raise LocalError(f"{build}: {program_file(min(missing))} is missing; run `regrow task build {folder}`")
    return TaskFolder(folder, task, layout, programs, initial, units)


def _program_files(build: Path) -> list[Path]:
    """Layouts, units, memory and graphs; a missing folder, or one without a layout, is an error of the system's."""
    optional = [build / program_file(name) for name in (UNITS, MEMORY)]
    there = [file for file in optional if file.is_file()]
    return [*sorted(build.glob("*.onnx")), *sorted(build.glob("layout.*.json")), *there, build / "layout.json"]


def create_run(runs: Path, source: TaskFolder, run_id: str | None = None) -> Path:
    """A new run folder with its own copy of the task, so that later edits of the task never change a run.

    Raises:
        LocalError: the run exists already, or the folder cannot be written.
    """
    name = run_id or f"{source.task.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = runs / name
    if path.exists():
        raise UsageError(f"{path} exists already: choose another --run name")
    try:
        temporary = runs / f".{name}.new"
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "task" / "build").mkdir(parents=True)
        shutil.copy2(source.path / "task.toml", temporary / "task")
        (temporary / "task" / source.task.model).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source.model_path, temporary / "task" / source.task.model)
        if source.task.evaluation.data is not None:
            held_out = source.path / source.task.evaluation.data
            shutil.copy2(held_out, temporary / "task" / held_out.name)
        for file in (*_program_files(source.path / "build"), source.path / "build" / "initial.npy"):
            shutil.copy2(file, temporary / "task" / "build")
        Store.open(temporary, create=True).close()
        temporary.rename(path)
    except OSError as error:
        raise LocalError(f"cannot make the run {path}: {error}; check the owner and the permissions of {runs} and the disk") from error
    return path


def newest_unfinished(runs: Path, task: str) -> Path | None:
    """The newest run of this task that has not ended, or None; those of a field run are left to it."""
    for info in sorted(list_runs(runs), key=lambda info: info.started_s, reverse=True):
        if info.task == task and not info.finished and field_of(info.path) is None:
            return info.path
    return None


def recover(store: Store, folder: TaskFolder, shelf: Shelf = in_memory) -> Ledger:
    """The ledger as the store has it, its latest updates on the shelf: the newest snapshot that checks out and every record after it.

    Raises:
        LocalError: the log does not check out.
    """
    snapshot = store.load_snapshot()
    after = 0
    if snapshot is None:
        ledger = Ledger.start(folder.task, folder.layout, folder.initial, folder.units, shelf)
    else:
        after, meta, arrays = snapshot
        ledger = checkpoint.load(folder.task, folder.layout, meta, arrays, folder.units, shelf)
    for log_id, record in store.replay(after):
        try:
            ledger.apply_record(record)
        except (KeyError, PeerError) as error:
            raise LocalError(f"{store.path}: record {log_id} ({record.kind}) cannot be replayed: {error!r}") from error
    return ledger


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A line of `regrow runs`; score_name says what the score is: accuracy for classes, R^2 for values."""

    path: Path
    task: str
    method: str
    started_s: float
    version: int
    devices: int
    updates: int
    score: float | None
    score_name: str
    finished: str


def list_runs(runs: Path) -> Iterator[RunInfo]:
    """Every run below a folder, read without its lock: one that is being served is listed as well."""
    for run in run_folders(runs):
        yield known_of(run)


def run_folders(runs: Path) -> list[Path]:
    """Every run below a folder by its name; what a deletion that was cut off has left is hidden, and none."""
    return [log.parent for log in sorted(runs.glob("*/log.sqlite")) if not log.parent.name.startswith(".")] if runs.is_dir() else []


def known_of(path: Path) -> RunInfo:
    """What can be said about a run; one that cannot be read says why in `finished`."""
    try:
        return run_info(path)
    except LocalError as error:
        return RunInfo(path, "?", "?", 0.0, 0, 0, 0, None, "score", f"unreadable: {error}")


def run_info(path: Path) -> RunInfo:
    """What a run's log and metrics say about it.

    Raises:
        LocalError: it cannot be read.
    """
    task, facts = read_task(path / "task"), facts_of(path)
    score = None if facts.rolled_back else newest_score(path)
    started = (path / "task" / "task.toml").stat().st_ctime
    name = score_name(task.training)
    return RunInfo(
        path, task.name, task.method.name, started, facts.version, len(facts.devices), facts.updates, score, name, facts.finished
    )


def joined_devices(path: Path) -> frozenset[str]:
    """Every device that has ever joined a run, read without its lock."""
    return facts_of(path).devices


def rollback(path: Path, to_version: int | None = None) -> tuple[int, int]:
    """Go back to the model of an earlier snapshot; returns (version that it had, version that it now is).

    The past stays in the log: the old model becomes the newest version, and updates that were made from later ones no longer count.

    Raises:
        LocalError: the run is being served, or has no such snapshot.
    """
    folder = load_task(path / "task")
    with Store.open(path) as store:
        ledger = recover(store, folder)
        older = [info for info in store.snapshots() if info.version is not None and info.version < ledger.version]
        if to_version is not None:
            older = [info for info in store.snapshots() if info.version == to_version]
        if not older:
            have = ", ".join(str(info.version) for info in store.snapshots()) or "none"
            raise UsageError(f"{path}: no such snapshot; versions with one: {have}")
        chosen = older[-1]
        snapshot = store.load_snapshot(chosen.log_id)
        if snapshot is None:
            raise LocalError(f"{path}: the snapshot of version {chosen.version} does not check out; choose an older one")
        _, _, arrays = snapshot
        entry = records.RolledBack(version=ledger.version + 1, to_version=chosen.version or 0)
        payload = arrays["flat_weights"].astype("<f4").tobytes()
        ledger.apply(entry, payload)
        log_id = store.append([to_record(entry, payload)])
        store.save_snapshot(log_id, *checkpoint.dump(ledger))
        return entry.to_version, entry.version
