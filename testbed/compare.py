"""`regrow compare`: many runs in virtual time, on the same splits and link draws, several at once.

Every finished run is a JSON file of its own, named by its specification; what is there already is not run again. A run that fails is
reported with its specification and stops no other.
"""

from __future__ import annotations

import hashlib
import logging
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

from broker_server.runs import TaskFolder, load_task
from regrow.errors import LocalError, RegrowError
from regrow.task import parse_task
from testbed.inputs import inputs_digest, same_inputs
from testbed.journal import Journal
from testbed.outcome import Outcome, Spec, write_outcome
from testbed.simulate import Simulation, open_journal, task_of

_log = logging.getLogger(__name__)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A run and the name of its outcome, both decided once: task.toml may be edited while runs go on.

    It has the text, not the task made of it: in a task that multiprocessing handed over, text is equal to the defaults of wire messages,
    but not the very same object, which is what msgspec leaves out. Messages would be longer than in a run of this process.

    Args:
        toml: what task.toml said.
        build: digest of the folder's build.json.
        name: of the outcome's file.
        inputs: `testbed.inputs.inputs_digest`.
    """

    spec: Spec
    toml: str
    build: str
    name: str
    inputs: str


@dataclass(frozen=True)
class Failure:
    """A run that gave no outcome, and why."""

    spec: Spec
    message: str

    def __str__(self) -> str:
        settings = "".join(f" {key}={value}" for key, value in self.spec.settings.items())
        return f"{self.spec.method or 'task'} seed {self.spec.seed}{settings}: {self.message}"


Engine = Callable[[Path, Sequence[Job], Path], Iterator[tuple[Job, str | None]]]
"""(task folder, jobs, folder for outcomes): runs them all; yields each as it ends, with what went wrong, or None when its outcome lies
under the job's name. Closing the iterator ends what still runs."""


def jobs_of(folder: TaskFolder, specs: Sequence[Spec]) -> list[Job]:
    """What is to be run, in this order; data is read once for all that share it.

    Raises:
        LocalError: a method or setting that there is not.
    """
    toml, build = (folder.path / "task.toml").read_text(), _build_json(folder.path)
    tables = tomllib.loads(toml)
    digests: dict[str, str] = {}
    jobs = []
    for spec in specs:
        task = task_of(folder, tables, spec)  # with all defaults: a name whose meaning has changed is another run
        content = msgspec.json.encode(spec) + msgspec.json.encode(task) + build
        name = f"{spec.method or 'task'}-s{spec.seed}-{hashlib.sha256(content).hexdigest()[:10]}.json"
        read = repr((spec.data, spec.data_folder, spec.links, spec.steps_trace, spec.attend))
        if read not in digests:
            digests[read] = inputs_digest(spec)
        built_as = hashlib.sha256(build).hexdigest()
        jobs.append(Job(spec=spec, toml=toml, build=built_as, name=name, inputs=digests[read]))
    return jobs


def _build_json(folder: Path) -> bytes:
    return (folder / "build" / "build.json").read_bytes()


def result_path(out: Path, folder: Path, spec: Spec) -> Path:
    """Where the outcome of this specification of this task lies: the name tells method and seed, the digest everything else."""
    return out / jobs_of(load_task(folder), [spec])[0].name


def read_outcome(path: Path) -> Outcome | None:
    """A finished run, or None where there is none.

    Raises:
        LocalError: the file is not an outcome.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Outcome)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LocalError(f"{path}: {error}; delete it, and it will be run again") from error


def finished_run(job: Job, out: Path) -> Outcome | None:
    """The job's outcome, if it is there and was made from the data that lies there now.

    Raises:
        LocalError: the file is not an outcome.
    """
    outcome = read_outcome(out / job.name)
    return outcome if outcome is not None and same_inputs(outcome.inputs_digest, job.inputs) else None


def run_spec(folder: Path, spec: Spec, out: Path, journal_bytes: int = 0) -> Path:
    """Run one specification, unless its outcome is there; returns where it is. With a journal, an interrupted run goes on where it was."""
    job = jobs_of(load_task(folder), [spec])[0]
    run_job(folder, job, out, journal_bytes)
    return out / job.name


def run_job(folder: Path, job: Job, out: Path, journal_bytes: int = 0) -> None:
    """As `run_spec`, whatever task.toml says by now."""
    if finished_run(job, out) is None:
        journal = open_journal(out / job.name, journal_bytes, resume=True)
        write_outcome(out / job.name, outcome_of(folder, job, journal), journal)


def outcome_of(folder: Path, job: Job, journal: Journal | None = None) -> Outcome:
    """Run one job, here and now.

    Raises:
        LocalError: the programs of the folder are no longer those of the job.
    """
    if hashlib.sha256(_build_json(folder)).hexdigest() != job.build:
        raise LocalError(f"{folder}: its programs were built anew while runs were going on; start the command again")
    loaded = load_task(folder, parse_task(job.toml, str(folder / "task.toml")))
    task = task_of(loaded, tomllib.loads(job.toml), job.spec)
    return msgspec.structs.replace(Simulation(loaded, task, job.spec, journal).run(), inputs_digest=job.inputs)


def run_all(folder: Path, specs: Sequence[Spec], out: Path, engine: Engine) -> Generator[tuple[int, Outcome | Failure], None, None]:
    """Run what is missing; yields the number of every specification with its outcome as it is there, those that were there first.

    Leaving early (Ctrl-C, or closing the iterator) ends the processes; what is finished stays.
    """
    out.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(load_task(folder), specs)
    missing: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        if job.name in missing:
            missing[job.name].append(number)
            continue
        found = _result(job, out)
        if found is None:
            missing[job.name] = [number]
            if (out / job.name).exists():
                _log.warning("%s: the data has changed since; it is run again", out / job.name)
        else:
            yield number, found
    for job, wrong in engine(folder, [jobs[numbers[0]] for numbers in missing.values()], out) if missing else ():
        gone = f"{out / job.name} is gone; run it again"
        result = Failure(job.spec, wrong) if wrong is not None else _result(job, out) or Failure(job.spec, gone)
        for number in missing[job.name]:
            yield number, result


def _result(job: Job, out: Path) -> Outcome | Failure | None:
    try:
        return finished_run(job, out)
    except LocalError as error:
        return Failure(job.spec, str(error))


# ---- this machine's processes ------------------------------------------------------------------------------------------------------


def in_processes(processes: int, journal_bytes: int = 0) -> Engine:
    """An engine of so many processes of this machine at once: one for each run, so that one which dies takes no other with it."""

    def run(folder: Path, jobs: Sequence[Job], out: Path) -> Iterator[tuple[Job, str | None]]:
        waiting = list(reversed(jobs))
        running: dict[object, tuple[BaseProcess, connection.Connection, Job]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    job = waiting.pop()
                    process, said = _started(folder, job, out, journal_bytes)
                    running[process.sentinel] = process, said, job
                for sentinel in connection.wait([process.sentinel for process, _, _ in running.values()]):
                    process, said, job = running.pop(sentinel)
                    process.join()
                    yield job, _wrong(process, said)
        finally:
            for process, _, _ in running.values():
                process.terminate()
            for process, _, _ in running.values():
                process.join()

    return run


def _started(folder: Path, job: Job, out: Path, journal_bytes: int) -> tuple[BaseProcess, connection.Connection]:
    # A fresh interpreter: onnxruntime's threads do not survive a fork. Ctrl-C is for the parent, which ends its processes; a child
    # inherits that it ignores it, from its first moment.
    context = get_context("spawn")
    said, say = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(say, folder, job, out, journal_bytes), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    say.close()
    return process, said


def _work(say: connection.Connection, folder: Path, job: Job, out: Path, journal_bytes: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        run_job(folder, job, out, journal_bytes)
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
