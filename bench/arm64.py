"""Does the bare device install train on arm64? Its real packages, emulated; no board, no root rights, no network but the registries'.

Unpacks an arm64 Debian with Python into a folder, by this machine's own apt configuration; lets the arm64 Python install the wheel of this
repository and what it needs; then `regrow agent` runs there, under qemu's user emulation, for a gateway on this machine, until its updates
were accepted and aggregated. The same with an agent of this machine tells how far the two models differ. Then, with the cryptography
library beside it, it joins a fleet with a claim, by `regrow serve` on this machine with mosquitto, and trains as a member. Functional only:
times under emulation mean nothing on a board, and memory counts the emulator.

Where the root lacks a file, the emulated process sees this machine's: so libraries loaded from outside it are looked for, and there must
be none. /proc/cpuinfo is such a file, and onnxruntime crashes on one of another architecture; the root therefore gets that of the emulated
Cortex-A72.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
from machine import write_result
from numpy.typing import NDArray

from broker_server.broker import Broker
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.gateway import Gateway
from broker_server.runs import create_run, load_task, recover
from broker_server.stopping import ending_with_parent
from broker_server.store import Store
from export.models import digits_mlp, watch_cnn
from export.task import build_task, save_model
from regrow.coordinator import Coordinator
from regrow.records import Accepted, from_record

ROOT = Path(__file__).resolve().parent.parent
QEMU = "qemu-aarch64-static"
CPU = "cortex-a72"  # of a Raspberry Pi 4
CPUINFO = """processor\t: {core}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
DEBIAN_PACKAGES = ("python3", "libstdc++6")
WHEELS = ("manylinux_2_28_aarch64", "manylinux2014_aarch64")
PATIENCE_S = 240.0
NONCE = 1
OWN = ("--data", "data.npz", "--state", "state")
DEVICE = "board"
STEPS, UPDATES = 5, 2
# No uplink deserves the second level here: masks are at work.
TASK = f"""name = "arm64"
[method]
name = "fedgmr"
ladder = [0.3, 1.0]
full_density_bps = 1e12
[training]
local_steps = {STEPS}
[trigger]
kind = "all"
[restoration]
trigger = "none"
[wire]
up = "float32"
down = "float32"
[fleet]
join_s = 0.0
min_deadline_s = 600.0
[stop]
aggregations = {UPDATES}
[store]
keep_updates = true
"""
MODELS: Mapping[str, tuple[Callable[[int], onnx.ModelProto], tuple[int, ...], int]] = {
    "digits_mlp": (digits_mlp, (64,), 10),
    "watch_cnn": (watch_cnn, (6, 100), 7),
}
"""Name -> the model, the shape of an example, classes."""

PROBE = """
import json, platform, ssl, sys
from importlib.metadata import distributions
import cli.device
if "identity" in sys.argv:
    import cryptography.hazmat.bindings._rust
libraries = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(json.dumps({
    "architecture": platform.machine(),
    "python": platform.python_version(),
    "libc": " ".join(platform.libc_ver()),
    "packages": {found.name: found.version for found in sorted(distributions(), key=lambda found: found.name)},
    "imported_torch_or_onnx": sorted({"torch", "onnx"} & sys.modules.keys()),
    "openssl": ssl.OPENSSL_VERSION,
    "libraries": sorted(libraries),
}))
"""


@dataclass(frozen=True)
class Python:
    """An interpreter that can run `cli.main`: the words before its arguments, and its environment beside ours."""

    command: tuple[str, ...]
    environment: Mapping[str, str]

    def run(self, *arguments: str, cwd: Path) -> str:
        """Standard output; ends this script with what was said where it fails."""
        return said([*self.command, *arguments], cwd, self.environment)


@dataclass(frozen=True)
class Trained:
    """What a run left: its first and last model, float32 [n], and ms of a step in every update."""

    initial: NDArray[np.float32]
    weights: NDArray[np.float32]
    step_ms: list[float]


def fail(message: str) -> NoReturn:
    sys.exit(f"arm64: {message}")


def said(command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        fail(f"{' '.join(command[:3])} ... ended with {done.returncode}: {last}")
    return done.stdout


# ---- the root --------------------------------------------------------------------------------------------------------------------------


def unpack_debian(root: Path, scratch: Path) -> None:
    """An arm64 Python and what it needs, from the sources that apt is configured for; no maintainer script runs, so nothing needs root."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
        "Dir::State::lists": f"{scratch}/lists",
        "Dir::State::status": f"{scratch}/status",
        "Dir::Cache": f"{scratch}/cache",
    }
    apt = ["apt-get", "-q", "-y", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    said([*apt, "update"], scratch)
    said([*apt, "--download-only", "install", *DEBIAN_PACKAGES], scratch)
    for name in ("bin", "lib", "sbin"):  # merged, as installed systems are; packages come in either form
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in sorted((scratch / "cache" / "archives").glob("*.deb")):
        said(["dpkg-deb", "-x", str(package), str(root)], scratch)
    (root / "proc").mkdir()
    (root / "proc" / "cpuinfo").write_text("".join(CPUINFO.format(core=core) for core in range(os.cpu_count() or 1)))


def fetch(python: Python, scratch: Path) -> Path:
    """This repository's wheel and what a device in a fleet needs, for the arm64 Python; the folder with them."""
    wheels, source = scratch / "wheels", scratch / "source"
    rooms = ("regrow", "edge_agent", "broker_server", "export", "testbed", "cli")
    for room in rooms:  # a copy: building leaves files beside the source
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    said([*pip, "wheel", "--no-deps", "-w", str(wheels), str(source)], scratch)
    (ours,) = wheels.glob("regrow-*.whl")
    version = python.run("-c", "import sys; print('%d.%d' % sys.version_info[:2])", cwd=scratch).strip()
    platforms = [word for wheel in WHEELS for word in ("--platform", wheel)]
    constraints = ["-c", str(ROOT / "constraints.txt")] if version == f"{sys.version_info[0]}.{sys.version_info[1]}" else []
    chosen = ["--only-binary=:all:", "--python-version", version, "--implementation", "cp", *platforms, *constraints]
    said([*pip, "download", "-d", str(wheels), *chosen, f"{ours}[fleet]"], scratch)
    return wheels


def install(python: Python, name: str, wheels: Path, site: Path) -> None:
    """A distribution and its needs into `site`, chosen and installed by the arm64 Python."""
    found = importlib.util.find_spec("pip")
    if found is None or found.origin is None:
        fail("this Python has no pip")
    options = ["-q", "--root-user-action", "ignore", "--no-compile", "--no-index", "--find-links", str(wheels), "--target", str(site)]
    python.run(str(Path(found.origin).parent), "--isolated", "install", *options, name, cwd=wheels)


def probed(python: Python, inside: Path, *words: str) -> dict[str, Any]:
    """What the agent consists of there; ends this script where that is not an install on arm64. words: "identity", or none."""
    found: dict[str, Any] = json.loads(python.run("-c", PROBE, *words, cwd=inside))
    found["libraries_from_outside"] = [name for name in found["libraries"] if not name.startswith(f"{inside}/")]
    found["libraries"] = len(found["libraries"])
    if found["architecture"] != "aarch64" or found["libraries_from_outside"] or found["imported_torch_or_onnx"] or not found["libraries"]:
        fail(f"this is not an agent's install on arm64: {found}")
    return found


# ---- the rounds ------------------------------------------------------------------------------------------------------------------------


def make_task(folder: Path, name: str) -> Path:
    """A task with this model, and a device's data beside it."""
    make, shape, classes = MODELS[name]
    task = folder / "task"
    task.mkdir(parents=True)
    (task / "task.toml").write_text(TASK)
    save_model(make(1), task / "model.onnx")
    build_task(task, task / "model.onnx")
    rng = np.random.default_rng(1)
    patterns, y = rng.standard_normal((classes, *shape)), rng.integers(0, classes, 200)
    np.savez(folder / "data.npz", x=(patterns[y] + rng.standard_normal((200, *shape))).astype(np.float32), y=y)
    return task


def trained(folder: Path, name: str, python: Python) -> Trained:
    """Serve a model until an agent run by `python` has trained it UPDATES times."""
    task = make_task(folder, name)
    path = create_run(folder / "runs", load_task(task), "run")
    loaded, credentials = load_task(path / "task"), Credentials(folder / "gateway")
    credentials.add_device(DEVICE)
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(path))
        broker = Broker(folder / "gateway", credentials, kind="amqtt")
        stack.callback(broker.stop)
        broker.start()
        coordinator = Coordinator(recover(store, loaded), path.name, loaded.programs, NONCE)
        gateway = Gateway(coordinator, store, url=broker.url, username=COORDINATOR, password=credentials.coordinator_password)
        agent = _started(stack, python, folder, "agent", "--bundle", str(credentials.write_bundle(DEVICE, broker.url, folder)), *OWN)
        watchdog = threading.Timer(PATIENCE_S, gateway.stop)
        stack.callback(watchdog.cancel)
        watchdog.start()
        gateway.run(housekeeping=lambda: broker.poll() or (None if agent.poll() is None else f"the agent ended with {agent.returncode}"))
        accepted = [entry for _, record in store.replay() if isinstance(entry := from_record(record), Accepted)]
        if coordinator.ledger.version < UPDATES:
            lines = (folder / "agent.log").read_text(errors="replace").strip().splitlines()
            fail(f"{name}: {len(accepted)} updates within {PATIENCE_S:g} s; the agent's last words: {(lines or ['none'])[-1]}")
    return Trained(loaded.initial, coordinator.ledger.flat_weights.copy(), [1000 * entry.seconds / STEPS for entry in accepted])


def _started(stack: ExitStack, python: Python, folder: Path, command: str, *words: str) -> subprocess.Popen[bytes]:
    """A `regrow` command that runs until the stack ends; its words go to COMMAND.log."""
    with (folder / f"{command}.log").open("wb") as log:
        child = subprocess.Popen(
            ending_with_parent([*python.command, "-m", "cli.main", "--log", command, *words]),
            cwd=folder,
            env={**os.environ, **python.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    stack.callback(_end, child)
    return child


def _end(agent: subprocess.Popen[bytes]) -> None:
    agent.terminate()
    try:
        agent.wait(20)
    except subprocess.TimeoutExpired:
        agent.kill()


def joined(folder: Path, name: str, python: Python, here: Python) -> dict[str, Any]:
    """A member's rounds: the emulated agent has a claim, and this machine's `regrow` is the gateway; what became of it."""
    make_task(folder, name)
    regrow = ("-m", "cli.main")
    here.run(*regrow, "fleet", "init", "emulated", "--host", "127.0.0.1", *_free_ports(), cwd=folder)
    here.run(*regrow, "fleet", "add", DEVICE, cwd=folder)
    with ExitStack() as stack:
        serve = _started(stack, here, folder, "serve", "task", "--plain", "--port", "0", "--run", "run", "--broker-kind", "mosquitto")
        agent = _started(stack, python, folder, "agent", "--identity", "identity", "--claim", f"{DEVICE}.claim.json", *OWN)
        try:
            code = serve.wait(PATIENCE_S)  # it ends with its last aggregation
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            lines = [(folder / f"{log}.log").read_text(errors="replace").strip().splitlines()[-3:] for log in ("serve", "agent")]
            fail(f"{name}, with an identity: no {UPDATES} aggregations; gateway and agent said {lines}; the agent ended: {agent.poll()}")
    member = json.loads(here.run(*regrow, "fleet", "show", DEVICE, "--json", cwd=folder))
    checks = here.run(*regrow, "verify", "runs/run", cwd=folder).strip().splitlines()[-1]
    files = sorted(path.name for path in (folder / "identity").iterdir() if path.is_file())
    return {
        "model": name,
        "broker": "mosquitto, TLS with certificates",
        "state": member["state"],
        "certificates_used": [certificate["used"] for certificate in member["certificates"]],
        "identity": files,
        "verify": checks.partition(": ")[2],
    }


def _free_ports() -> list[str]:
    """Options with two ports that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return ["--tls-port", str(one.getsockname()[1]), "--enrol-port", str(other.getsockname()[1])]


def row(name: str, emulated: Trained, here: Trained) -> dict[str, Any]:
    return {
        "model": name,
        "parameters": emulated.weights.size,
        "changed": int(np.count_nonzero(emulated.weights != emulated.initial)),
        "updates": len(emulated.step_ms),
        "emulated_step_ms": [round(step_ms, 2) for step_ms in emulated.step_ms],
        "largest_change": float(np.abs(here.weights - here.initial).max()),
        "largest_difference": float(np.abs(emulated.weights - here.weights).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "arm64.json", help="where the JSON goes")
    parser.add_argument("--bare", action="store_true", help="leave out the member of a fleet, which takes longest")
    arguments = parser.parse_args()
    for program, package in ((QEMU, "qemu-user-static"), ("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("mosquitto", "mosquitto")):
        if shutil.which(program) is None and not Path("/usr/sbin", program).exists():
            fail(f"{program} is not installed here; on Debian: apt-get install {package}")
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is cleaned up
    with tempfile.TemporaryDirectory() as folder:
        scratch, inside = Path(folder, "scratch"), Path(folder, "arm64")
        scratch.mkdir()
        print("unpacking an arm64 Debian with Python", flush=True)
        unpack_debian(inside, scratch)
        site, more = inside / "opt" / "regrow", inside / "opt" / "fleet"
        command = (str(shutil.which(QEMU)), "-L", str(inside), str(inside / "usr/bin/python3"))
        python = Python(command, {"QEMU_CPU": CPU, "PYTHONPATH": str(site)})
        print("installing regrow in it", flush=True)
        wheels = fetch(python, scratch)
        install(python, "regrow", wheels, site)
        found = probed(python, inside)
        print(json.dumps(found), flush=True)
        here_python = Python((sys.executable,), {"PYTHONPATH": str(ROOT)})
        rows = []
        for name in MODELS:
            print(f"{name}: training", flush=True)
            emulated = trained(Path(folder, name, "arm64"), name, python)
            here = trained(Path(folder, name, "here"), name, here_python)
            rows.append(row(name, emulated, here))
            print(json.dumps(rows[-1]), flush=True)
        identity = None
        if not arguments.bare:
            print("joining a fleet", flush=True)
            install(python, "cryptography", wheels, more)
            member = Python(command, {**python.environment, "PYTHONPATH": f"{site}:{more}"})
            identity = {**probed(member, inside, "identity"), **joined(Path(folder, "fleet"), "digits_mlp", member, here_python)}
            print(json.dumps(identity), flush=True)
        qemu = said([QEMU, "--version"], scratch).splitlines()[0]
    result = {
        "command": "python bench/arm64.py",
        "qemu": qemu,
        "cpu": CPU,
        "agent": found,
        "rows": rows,
        "with_an_identity": identity,
        "seconds": round(time.monotonic() - started),
    }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
