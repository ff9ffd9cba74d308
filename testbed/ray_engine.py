"""`regrow compare --engine ray`: the same runs on a Ray cluster.

Workers may be other machines that share no disk: a task carries its folder's files and its specification, and its result is the bytes
of the outcome's file. Data sets do not travel: a worker loads them from the same place as this machine would. Ray passes tasks as pickles
between its processes, so a cluster's members trust each other; a cluster that we start ourselves listens on this machine only.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import UNSET

import broker_server
import edge_agent
import export
import regrow
import testbed
from broker_server.runs import read_task
from regrow.errors import LocalError, RegrowError
from testbed.compare import Engine, Job, outcome_of
from testbed.conditions import NIGHTLY
from testbed.inputs import inputs_digest, same_inputs
from testbed.outcome import Spec, outcome_text, write_text
from testbed.scenario import TRACES

LOCALHOST = "127.0.0.1"
OBJECT_STORE_BYTES = 1 << 29  # of a cluster of ours; it holds one task folder's files and outcomes


def on_ray(processes: int, address: str | None) -> Engine:
    """An engine of Ray tasks, one CPU each.

    Args:
        processes: CPUs of the Ray that is started here; a cluster that is joined says itself how many it has.
        address: of a running cluster (`auto`: this machine's), or None to start one here for as long as the runs take.

    Raises:
        LocalError: Ray is not installed; (by the engine) it does not start, or nothing answers at the address.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        # Ray replaces a loopback address by the machine's own; with this, which it reads when imported, it listens on loopback only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ModuleNotFoundError as error:
        raise LocalError("--engine ray needs Ray: pip install 'regrow[ray]', on every machine of the cluster") from error

    def run(folder: Path, jobs: Sequence[Job], out: Path) -> Iterator[tuple[Job, str | None]]:
        others = set(psutil.Process().children(recursive=True))
        pending: dict[Any, Job] = {}
        try:
            _connect(ray, processes, address)
            task = ray.remote(num_cpus=1, max_retries=1)(_work)
            files = ray.put(task_files(folder))
            pending |= {task.remote(files, msgspec.json.encode(job), str(Path.cwd())): job for job in jobs}
            while pending:
                for reference in ray.wait(list(pending), num_returns=1)[0]:
                    yield _finished(ray, reference, pending.pop(reference), out)
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)
            ours = set(psutil.Process().children(recursive=True)) - others  # none, where a cluster was joined
            ray.shutdown()
            _end(ours)

    return run


def task_files(folder: Path) -> dict[str, bytes]:
    """What a simulation reads of a task folder, by path in it."""
    model = read_task(folder).model
    files = [folder / "task.toml", folder / model, *sorted(file for file in (folder / "build").rglob("*") if file.is_file())]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _connect(ray: Any, processes: int, address: str | None) -> None:
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address is None:
            ray.init(
                address="local",  # even where the environment names a cluster
                num_cpus=processes,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address=LOCALHOST,
                **quiet,
            )
        else:
            # The cluster's machines have Regrow's dependencies; Regrow itself travels, so that all run the same code.
            rooms = [str(Path(room.__path__[0])) for room in (regrow, edge_agent, broker_server, export, testbed)]
            ray.init(address=address, runtime_env={"py_modules": rooms}, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "--engine ray: Ray does not start here" if address is None else f"--ray-address {address}"
        raise LocalError(f"{where}: {' '.join(str(error).split())}") from error


def _end(processes: set[psutil.Process]) -> None:
    """What Ray's shutdown leaves: agents that had not finished starting notice the end of their parent only minutes later."""
    _, left = psutil.wait_procs(processes, timeout=1.0)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5.0)


def _finished(ray: Any, reference: Any, job: Job, out: Path) -> tuple[Job, str | None]:
    try:
        text, wrong = ray.get(reference)
    except ray.exceptions.RayError as error:
        return job, " ".join(str(error).split())
    if text is not None:
        path = out / job.name
        write_text(path, text)
        path.with_suffix(".journal").unlink(missing_ok=True)  # of a run on this machine that was interrupted
    return job, wrong


def _work(files: dict[str, bytes], encoded: bytes, place: str) -> tuple[bytes | None, str | None]:
    """One run, on whatever machine: the outcome's file, or what went wrong there."""
    job = msgspec.json.decode(encoded, type=Job)
    here = msgspec.structs.replace(job, spec=_here(job.spec, Path(place)))
    with tempfile.TemporaryDirectory(prefix="regrow-") as name:
        folder = Path(name)
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        try:
            if not same_inputs(inputs_digest(here.spec), job.inputs):
                raise LocalError("its data or recordings are not those of the machine where the command was given; make them the same")
            outcome = outcome_of(folder, here)
        except (RegrowError, OSError) as error:
            return None, f"on node {socket.gethostname()}: {error}"
    return outcome_text(msgspec.structs.replace(outcome, spec=job.spec)), None


def _here(spec: Spec, place: Path) -> Spec:
    """Relative paths mean what they mean where the command was given, not in a worker's own folder."""
    data_folder = None if spec.data_folder is None else str(place / spec.data_folder)
    links = f"{TRACES}{place / spec.links.removeprefix(TRACES)}" if spec.links.startswith(TRACES) else spec.links
    steps = spec.steps_trace if spec.steps_trace is UNSET else str(place / spec.steps_trace)
    attend = spec.attend if spec.attend is UNSET or spec.attend.startswith(NIGHTLY) else str(place / spec.attend)
    return msgspec.structs.replace(spec, data_folder=data_folder, links=links, steps_trace=steps, attend=attend)
