"""`regrow compare`: many runs in virtual time, on the same splits and link draws, several at once.

Every finished run is a JSON file of its own, named by its specification; what is there already is not run again. A run that fails is
reported with its specification and stops no other.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

import msgspec
import tomllib

from broker_server.runs import load_task
from regrow.errors import LocalError, RegrowError
from testbed.journal import Journal
from testbed.outcome import Outcome, Spec, write_outcome
from testbed.simulate import Simulation, open_journal, task_of


@dataclass(frozen=True)
class Failure:
    """A run that gave no outcome, and why."""

    spec: Spec
    message: str

    def __str__(self) -> str:
        settings = "".join(f" {key}={value}" for key, value in self.spec.settings.items())
        return f"{self.spec.method or 'task'} seed {self.spec.seed}{settings}: {self.message}"


Engine = Callable[[Path, Sequence[Spec], Path], Iterator[tuple[Spec, str | None]]]
"""(task folder, specifications, folder for outcomes): runs them all; yields each as it ends, with what went wrong, or None when its
outcome lies at `result_path`. Closing the iterator ends what still runs."""


def result_path(out: Path, folder: Path, spec: Spec) -> Path:
    """Where the outcome of this specification of this task lies: the name tells method and seed, the digest everything else."""
    tables = tomllib.loads((folder / "task.toml").read_text())
    task = task_of(load_task(folder), tables, spec)  # with all defaults: a name whose meaning has changed is another run
    content = msgspec.json.encode(spec) + msgspec.json.encode(task) + (folder / "build" / "build.json").read_bytes()
    return out / f"{spec.method or 'task'}-s{spec.seed}-{hashlib.sha256(content).hexdigest()[:10]}.json"


def read_outcome(path: Path) -> Outcome | None:
    """A finished run, or None where there is none.

    Raises:
        LocalError: the file is not an outcome.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Outcome)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise LocalError(f"{path}: {error}; delete it, and it will be run again") from error


def run_spec(folder_path: Path, spec: Spec, out: Path, journal_bytes: int = 0) -> Path:
    """Run one specification, unless its outcome is there; returns where it is. With a journal, an interrupted run goes on where it was."""
    path = result_path(out, folder_path, spec)
    if read_outcome(path) is None:
        journal = open_journal(path, journal_bytes, resume=True)
        write_outcome(path, outcome_of(folder_path, spec, journal), journal)
    return path


def outcome_of(folder_path: Path, spec: Spec, journal: Journal | None = None) -> Outcome:
    """Run one specification, here and now."""
    folder = load_task(folder_path)
    tables = tomllib.loads((folder_path / "task.toml").read_text())
    return Simulation(folder, task_of(folder, tables, spec), spec, journal).run()


def run_all(folder: Path, specs: Sequence[Spec], out: Path, engine: Engine) -> Generator[tuple[int, Outcome | Failure], None, None]:
    """Run what is missing; yields the number of every specification with its outcome as it is there, those that were there first.

    Leaving early (Ctrl-C, or closing the iterator) ends the processes; what is finished stays.
    """
    out.mkdir(parents=True, exist_ok=True)
    missing: dict[Path, list[int]] = {}
    for number, spec in enumerate(specs):
        path = result_path(out, folder, spec)
        if path in missing:
            missing[path].append(number)
            continue
        found = _result(path, spec)
        if found is None:
            missing[path] = [number]
        else:
            yield number, found
    for spec, wrong in engine(folder, [specs[numbers[0]] for numbers in missing.values()], out) if missing else ():
        path = result_path(out, folder, spec)
        result = Failure(spec, wrong) if wrong is not None else _result(path, spec) or Failure(spec, f"{path} is gone; run it again")
        for number in missing[path]:
            yield number, result


def _result(path: Path, spec: Spec) -> Outcome | Failure | None:
    try:
        return read_outcome(path)
    except LocalError as error:
        return Failure(spec, str(error))


# ---- this machine's processes ------------------------------------------------------------------------------------------------------


def in_processes(processes: int, journal_bytes: int = 0) -> Engine:
    """An engine of so many processes of this machine at once: one for each run, so that one which dies takes no other with it."""

    def run(folder: Path, specs: Sequence[Spec], out: Path) -> Iterator[tuple[Spec, str | None]]:
        waiting = list(reversed(specs))
        running: dict[object, tuple[BaseProcess, connection.Connection, Spec]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    spec = waiting.pop()
                    process, said = _started(folder, spec, out, journal_bytes)
                    running[process.sentinel] = process, said, spec
                for sentinel in connection.wait([process.sentinel for process, _, _ in running.values()]):
                    process, said, spec = running.pop(sentinel)
                    process.join()
                    yield spec, _wrong(process, said)
        finally:
            for process, _, _ in running.values():
                process.terminate()
            for process, _, _ in running.values():
                process.join()

    return run


def _started(folder: Path, spec: Spec, out: Path, journal_bytes: int) -> tuple[BaseProcess, connection.Connection]:
    # A fresh interpreter: onnxruntime's threads do not survive a fork. Ctrl-C is for the parent, which ends its processes; a child
    # inherits that it ignores it, from its first moment.
    context = get_context("spawn")
    said, say = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(say, folder, spec, out, journal_bytes), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    say.close()
    return process, said


def _work(say: connection.Connection, folder: Path, spec: Spec, out: Path, journal_bytes: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        run_spec(folder, spec, out, journal_bytes)
    except (RegrowError, OSError) as error:
        say.send_bytes(str(error).encode())


def _end_with_parent() -> None:
    """A parent that was killed cannot end its processes; its end of the pipe closes nevertheless."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _wrong(process: BaseProcess, said: connection.Connection) -> str | None:
    """What a process that ended has to report; nothing when all is well."""
    with said:
        try:
            return said.recv_bytes().decode()
        except EOFError:
            code = process.exitcode
    if not code:
        return None
    if code < 0:
        return f"its process was ended by signal {-code}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")
    return f"its process ended with exit status {code}; its traceback is above"
