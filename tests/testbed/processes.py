"""A whole Regrow on this machine as real processes, and the ways to hurt it: kill, cut, stall, fill the disk.

Every device reaches the broker through a relay of its own, which counts its bytes and can be cut. Tests wait on conditions with a
deadline, never for a time; whatever is started is ended by its process id.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from broker_server.audit import Outcome, audit
from broker_server.broker import Broker, Kind
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.store import Store
from export.task import build_task, save_model
from regrow import records

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 45.0
POLL_S = 0.01


def until(condition: Callable[[], Any], what: str | Callable[[], str], timeout_s: float = PATIENCE_S) -> Any:
    """The first true value of the condition; an AssertionError that says what did not happen."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what() if callable(what) else what}"
        time.sleep(POLL_S)


class Child:
    """`regrow ...` as a process whose output goes to a file. module: what is run in place of the command."""

    def __init__(
        self,
        arguments: Sequence[object],
        output: Path,
        *,
        prefix: Sequence[object] = (),
        module: str = "cli.main",
        more: Mapping[str, str] | None = None,
    ) -> None:
        self.output = output
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **(more or {})}
        self._start = output.stat().st_size if output.exists() else 0
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                [str(part) for part in (*prefix, sys.executable, "-m", module, *arguments)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                cwd=output.parent,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def text(self) -> str:
        """What this process (not an earlier one with the same file) has said."""
        with self.output.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def said(self, pattern: str) -> re.Match[str]:
        """Wait until a line matches."""

        def look() -> re.Match[str] | None:
            alive = self.running
            found = re.search(pattern, self.text(), re.MULTILINE)
            assert found or alive, f"ended with {self.process.returncode} before it said {pattern!r}:\n{self.text()[-3000:]}"
            return found

        found: re.Match[str] = until(look, f"{self.output.name}: {pattern!r} after\n{self.text()[-2000:]}")
        return found

    def ended(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status, once it has ended by itself."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.output.name} did not end in {timeout_s:g} s:\n{self.text()[-3000:]}") from None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, as a service manager would; SIGKILL and an AssertionError if it does not listen."""
        if self.running:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"{self.output.name} ignored SIGTERM") from None
        return self.process.returncode


class Relay:
    """A link: one listening port, forwarded to `target`. `cut` closes what is open and refuses; `stall` lets nothing through."""

    def __init__(self) -> None:
        self.target = 0
        self.bytes_up = self.bytes_down = 0
        self._closed = self._cut = False
        self._flows = threading.Event()
        self._flows.set()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._cut = True
        self._drop()

    def stall(self) -> None:
        self._flows.clear()

    def restore(self) -> None:
        self._cut = False
        self._flows.set()

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._flows.set()
        self._drop()

    def _drop(self) -> None:
        for sock in list(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._cut:
                    raise ConnectionRefusedError
                broker = socket.create_connection(("127.0.0.1", self.target), timeout=5)
                broker.settimeout(None)
            except OSError:
                device.close()
                continue
            self._open |= {device, broker}
            for pair in ((device, broker), (broker, device)):
                threading.Thread(target=self._pump, args=(*pair, pair[0] is device), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                self._flows.wait()
                if self._cut or self._closed:
                    break
                sink.sendall(data)
                if up:
                    self.bytes_up += len(data)
                else:
                    self.bytes_down += len(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._open.discard(source)
        source.close()


class Fleet:
    """A task, a gateway and devices in one folder; a context manager that ends every process.

    Args:
        folder: everything goes below it.
        model: what is trained, [batch, 64] -> [batch, 10].
        task: text of task.toml.
        kind: the broker; `shared` starts it here, so that it outlives `serve`, else `serve` starts its own.
    """

    def __init__(self, folder: Path, model: onnx.ModelProto, task: str, *, kind: Kind = "amqtt", shared: bool = False) -> None:
        self.folder, self.task, self.runs, self.kind = folder, folder / "task", folder / "runs", kind
        self.task.mkdir(parents=True)
        (self.task / "task.toml").write_text(task)
        save_model(model, self.task / "model.onnx")
        build_task(self.task, self.task / "model.onnx")
        self.credentials = Credentials(self.runs / ".gateway")
        self.devices: dict[str, Child] = {}
        self.relays: dict[str, Relay] = {}
        self._links: dict[str, float] = {}
        self._children: list[Child] = []
        self.broker: Broker | None = None
        self.port = 0
        if shared:
            self.broker = Broker(folder / "broker", self.credentials, kind=kind)
            self.broker.start()
            self._reach(self.broker.port)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        for child in self._children:
            child.kill()
        for relay in self.relays.values():
            relay.close()
        if self.broker is not None:
            self.broker.stop()

    def _reach(self, port: int) -> None:
        self.port = port
        for relay in self.relays.values():
            relay.target = port

    # ---- starting --------------------------------------------------------------------------------------------------------------

    def start(self, arguments: Sequence[object], output: str, prefix: Sequence[object] = ()) -> Child:
        child = Child(arguments, self.folder / output, prefix=prefix)
        self._children.append(child)
        return child

    def serve(self, *more: object, task: Path | None = None, runs: Path | None = None, prefix: Sequence[object] = ()) -> Child:
        """The gateway, ready: its broker answers and it names its run."""
        command: list[object] = ["serve", task or self.task, "--plain", "--runs", runs or self.runs]
        command += ["--broker", self.broker_url] if self.broker is not None else ["--port", 0, "--broker-kind", self.kind]
        child = self.start([*command, *more], "serve.log", prefix)
        if self.broker is None:
            self._reach(int(child.said(rf"{self.kind} on 127.0.0.1:(\d+)")[1]))
        child.said(r"^run ")
        return child

    @property
    def broker_url(self) -> str:
        return f"mqtt://{COORDINATOR}:{self.credentials.coordinator_password}@127.0.0.1:{self.port}"

    def add(self, names: Mapping[str, float]) -> None:
        """Devices by name, each with its link in kbit/s up (four times that down), its data and its password."""
        for number, (name, link) in enumerate(names.items()):
            self.credentials.add_device(name)
            relay = self.relays[name] = Relay()
            relay.target = self.port
            self._links[name] = 1000 * link
            self.credentials.write_bundle(name, f"mqtt://127.0.0.1:{relay.port}", self.folder)
            write_digits(self.folder / f"{name}.npz", seed=number)
        if self.broker is not None:
            self.broker.reload(self.credentials)

    def device(self, name: str) -> Child:
        """Start a device, or start it again with the state that it left."""
        link = self._links[name]
        command = ["--log", "agent", "--bundle", f"{name}.json", "--data", f"{name}.npz", "--state", f"{name}.state"]
        child = self.start([*command, "--max-uplink-bps", link, "--max-downlink-bps", 4 * link], f"{name}.log")
        self.devices[name] = child
        return child

    # ---- looking ---------------------------------------------------------------------------------------------------------------

    @property
    def run(self) -> Path:
        (log,) = self.runs.glob("*/log.sqlite")
        return log.parent

    def version(self) -> int:
        """Aggregations that the log holds."""
        return count(self.run, "aggregated")

    def reach_version(self, version: int) -> None:
        until(lambda: self.version() >= version, lambda: f"version {version}; there is {self.version()}\n{self._tails()}")

    def _tails(self) -> str:
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-600:]}" for file in sorted(self.folder.glob("*.log")))

    def receipted(self) -> set[tuple[str, str, int]]:
        """(device, install, sequence) of every update that a device was told was accepted, over all its lives."""
        told: set[tuple[str, str, int]] = set()
        for name in self._links:
            log = self.folder / f"{name}.log"
            for fields in notes(log.read_text(errors="replace"), "accepted") if log.exists() else ():
                told.add((name, fields["install"], fields["sequence"]))
        return told

    def check(self, run: Path | None = None) -> Outcome:
        """No receipted update is lost, none counts twice, and the model is the one that they give."""
        run = run or self.run
        held = accepted(run)
        assert held
        assert len(set(held)) == len(held), "an update counts twice"
        assert self.receipted() <= set(held), "a receipted update is not in the log"
        outcome = audit(run)
        assert outcome.updates == len(held)
        assert outcome.worst <= 1.0
        return outcome


def notes(text: str, kind: str) -> list[dict[str, Any]]:
    """The fields of every note of this kind in an agent's log."""
    return [ast.literal_eval(found) for found in re.findall(rf"edge_agent\.agent: {kind} (\{{.*\}})$", text, re.MULTILINE)]


def accepted(run: Path) -> list[tuple[str, str, int]]:
    """(device, install, sequence) of every accepted update in a run's log."""
    with Store.open(run, read_only=True) as store:
        entries = [records.from_record(record) for _, record in store.replay()]
    return [(entry.device, entry.install, entry.sequence) for entry in entries if isinstance(entry, records.Accepted)]


def count(run: Path, kind: str, containing: str = "") -> int:
    """Records of a kind whose header contains a text; 0 while there is no log yet."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{(run / 'log.sqlite').as_uri()}?mode=ro", uri=True)) as db:
        query = "SELECT count(*) FROM log WHERE kind = ? AND instr(header, ?) > 0"
        return int(db.execute(query, (kind, containing)).fetchone()[0])
    return 0


def wide_mlp(seed: int, hidden: int = 512) -> onnx.ModelProto:
    """64 -> hidden -> 10: large enough that a slow link needs seconds for it."""
    rng = np.random.default_rng(seed)
    shapes = {"fc1.weight": (hidden, 64), "fc1.bias": (hidden,), "fc2.weight": (10, hidden), "fc2.bias": (10,)}
    weights = [numpy_helper.from_array(0.1 * rng.standard_normal(shape).astype(np.float32), name) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["fc1"], transB=1),
        helper.make_node("Relu", ["fc1"], ["relu1"]),
        helper.make_node("Gemm", ["relu1", "fc2.weight", "fc2.bias"], ["logits"], transB=1),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in (("x", 64), ("logits", 10))]
    graph = helper.make_graph(nodes, "wide_mlp", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def peak_memory_bytes(pid: int) -> int:
    """The most memory that a process has held so far (Linux: VmHWM)."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def write_digits(path: Path, seed: int, rows: int = 200) -> None:
    """Ten noisy patterns of 8 x 8, the same ones for every device: float32 [rows, 64] and int64 [rows]."""
    patterns = np.random.default_rng(0).random((10, 64), np.float32)
    rng = np.random.default_rng(1000 + seed)
    y = rng.integers(0, 10, rows)
    x = patterns[y] + 0.3 * rng.standard_normal((rows, 64)).astype(np.float32)
    np.savez(path, x=x.astype(np.float32), y=y)


def task_text(name: str, **changes: str) -> str:
    """A task.toml for these tests; `changes` are more lines of a table, by its name."""
    tables = {
        "training": "local_steps = 3\nbatch = 20\nlearning_rate = 0.05",
        "trigger": "interval_s = 0.2",
        "method": "refresh_every = 8",
        "restoration": "every = 5",
        "fleet": "join_s = 0\nheartbeat_s = 0.5\nmin_deadline_s = 3",
        "wire": "",
        "stop": "aggregations = 25",
        "store": "keep_updates = true\nsnapshot_every = 4",
    }
    tables.update({table: f"{tables[table]}\n{more}" if table != "stop" else more for table, more in changes.items()})
    return f'name = "{name}"\n' + "".join(f"\n[{table}]\n{lines}\n" for table, lines in tables.items())


@contextmanager
def suspended(child: Child) -> Iterator[None]:
    """Let nothing of the process run for as long as the block takes."""
    os.kill(child.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(child.pid, signal.SIGCONT)
