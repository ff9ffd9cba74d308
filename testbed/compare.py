"""`regrow compare`: methods x seeds in virtual time, on the same splits and link draws, several processes at once.

Every finished run is a JSON file of its own, named by its specification; what is there already is not run again.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import tomllib

from broker_server.runs import load_task
from regrow.errors import LocalError
from testbed.simulate import Outcome, Simulation, Spec, open_journal, task_of, write_outcome


def specs_of(base: Spec, methods: Sequence[str], seeds: int) -> list[Spec]:
    """One specification for each method and seed; seeds go outside, so that an interrupted comparison is still one of all methods."""
    return [msgspec.structs.replace(base, method=method, seed=base.seed + seed) for seed in range(seeds) for method in methods]


def result_path(out: Path, folder: Path, spec: Spec) -> Path:
    """Where the outcome of this specification of this task lies: the name tells method and seed, the digest everything else."""
    content = msgspec.json.encode(spec) + (folder / "task.toml").read_bytes() + (folder / "build" / "build.json").read_bytes()
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
        folder = load_task(folder_path)
        tables = tomllib.loads((folder_path / "task.toml").read_text())
        journal = open_journal(path, journal_bytes, resume=True)
        write_outcome(path, Simulation(folder, task_of(folder, tables, spec), spec, journal).run(), journal)
    return path


def run_all(folder: Path, specs: Sequence[Spec], out: Path, processes: int, journal_bytes: int = 0) -> Iterator[tuple[Spec, Outcome]]:
    """Run what is missing; yields every outcome as it is there, those that were there first.

    Leaving early (Ctrl-C, or closing the iterator) ends the processes; what is finished stays.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = [(spec, read_outcome(result_path(out, folder, spec))) for spec in specs]
    missing = []
    for spec, outcome in found:
        if outcome is None:
            missing.append(spec)
        else:
            yield spec, outcome
    if missing:
        yield from _in_processes(folder, missing, out, processes, journal_bytes)


def _in_processes(folder: Path, specs: Iterable[Spec], out: Path, processes: int, journal_bytes: int) -> Iterator[tuple[Spec, Outcome]]:
    # Fresh interpreters: onnxruntime's threads do not survive a fork.
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_quiet)
    try:
        futures: dict[Future[Path], Spec] = {pool.submit(run_spec, folder, spec, out, journal_bytes): spec for spec in specs}
        for future in as_completed(futures):
            outcome = read_outcome(future.result())
            if outcome is None:
                raise LocalError(f"{result_path(out, folder, futures[future])} is gone; run the same command again")
            yield futures[future], outcome
    except BaseException:
        for process in (pool._processes or {}).values():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """`table.key=value` settings, values as in TOML.

    Raises:
        LocalError: not of this form.
    """
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            settings[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise LocalError(f"--set {text!r}: write TABLE.KEY=VALUE as in task.toml, for example training.local_steps=5") from error
        if not equals or not key.strip():
            raise LocalError(f"--set {text!r}: write TABLE.KEY=VALUE as in task.toml, for example training.local_steps=5")
    return settings
