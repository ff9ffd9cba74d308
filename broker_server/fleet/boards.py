"""Which boards and systems images are made for: the matrix, and the wheels that each Python of it gets.

Every Python has locks in deploy/locks: exact versions and hashes of what a device installs, resolved to wheels alone, because a board at
its first boot has neither a compiler nor a network.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from regrow.errors import LocalError, UsageError

Form = Literal["cloud-init", "firstrun", "container", "script"]

BOARDS = "aarch64"
ARCHITECTURES = (BOARDS, "x86_64")
Role = Literal["agent", "gateway"]
# What is installed beside Regrow's own wheel; pip, because a stock system's venv may come without one. A test compares with pyproject.toml.
ARTICLES: Mapping[Role, str] = {"agent": "an agent", "gateway": "a gateway"}
AGENT = ("numpy>=1.26", "onnxruntime>=1.23", "paho-mqtt>=2.1", "msgspec>=0.19", "psutil>=5.9", "cryptography>=42", "pip>=24")
WANTED: Mapping[Role, tuple[str, ...]] = {
    "agent": AGENT,
    "gateway": (
        *(*AGENT, "onnx>=1.18", "amqtt>=0.11.3", "rich>=13", "matplotlib>=3.8"),
        *("prometheus-client>=0.21", "pyarrow>=17", "safetensors>=0.5"),
    ),
}
_GLIBC_MINOR = range(28, 16, -1)  # manylinux_2_28 down to 2_17; the oldest system of the matrix has glibc 2.35
_PIP_TIMEOUT_S = 900.0
# Versions and digests are settled; older pips hold the files' requires-python against the Python that runs pip.
PINNED = ("--require-hashes", "--ignore-requires-python")


@dataclass(frozen=True, slots=True)
class System:
    """A stock system that an image is made for.

    Args:
        name: what `--os` takes.
        title: in words.
        python: its own, such as "3.13".
        form: what its first boot reads.
        boot: where it mounts the boot partition; "" where it has none.
        boards: that it runs on.
        tried: what was really run, in words; the matrix in docs says so too.
    """

    name: str
    title: str
    python: str
    form: Form
    boot: str
    boards: str
    tried: str


SYSTEMS = {
    system.name: system
    for system in (
        System(
            "pi-os-trixie",
            "Raspberry Pi OS 64-bit, Debian 13 (from November 2025)",
            "3.13",
            "cloud-init",
            "/boot/firmware",
            "Pi 3, 4, 5, Zero 2 W",
            "first boots of a gateway and a device on Debian 13 with cloud-init in containers; no board",
        ),
        System(
            "pi-os-bookworm",
            "Raspberry Pi OS 64-bit, Debian 12",
            "3.11",
            "firstrun",
            "/boot/firmware",
            "Pi 3, 4, 5, Zero 2 W",
            "first boot of Debian 12 by systemd.run in a container; no board",
        ),
        System("ubuntu-24.04", "Ubuntu Server 24.04", "3.12", "cloud-init", "/boot/firmware", "Pi 3, 4, 5, Zero 2 W", "wheels resolved"),
        System("ubuntu-22.04", "Ubuntu Server 22.04", "3.10", "cloud-init", "/boot/firmware", "Pi 3, 4, Zero 2 W", "wheels resolved"),
        System("jetpack-6", "JetPack 6 (L4T 36, Ubuntu 22.04)", "3.10", "container", "", "Jetson Orin", "wheels resolved; CUDA untried"),
        System("generic", "any Linux with systemd", "", "script", "", "aarch64 and x86-64", "installed in a Debian 13 container"),
    )
}
PYTHONS = tuple(sorted({system.python for system in SYSTEMS.values() if system.python}, key=lambda text: int(text.split(".")[1])))


def deploy_folder() -> Path:
    """Where units, scripts and locks lie: beside the rooms in a clone, under the environment's share/ when installed.

    Raises:
        LocalError: neither is there.
    """
    for folder in (Path(__file__).resolve().parents[2] / "deploy", Path(sysconfig.get_path("data")) / "share" / "regrow" / "deploy"):
        if (folder / "regrow-agent.service").is_file():
            return folder
    raise LocalError("this installation has no deploy files; install Regrow again from its wheel or a clone")


def lock_of(python: str, architecture: str, role: Role) -> Path:
    """The lock of the wheels for this Python, such as "3.13".

    Raises:
        LocalError: there is none.
    """
    path = lock_path(python, architecture, role)
    if not path.is_file():
        raise UsageError(f"no wheels of the {role} are locked for Python {python!r}; there are locks for {', '.join(pythons(role))}")
    return path


def lock_path(python: str, architecture: str, role: Role) -> Path:
    """Where that lock lies, or would."""
    return deploy_folder() / "locks" / f"{role}-{architecture}-py{python.replace('.', '')}.txt"


def pythons(role: Role) -> tuple[str, ...]:
    """The Pythons that this role runs on, of the systems here; the gateway's rooms want 3.11."""
    return tuple(python for python in PYTHONS if role == "agent" or python != "3.10")


def resolve(python: str, architecture: str, role: Role) -> str:
    """The text of a lock: the newest wheels for this Python, with hashes. Asks the package index, downloads metadata only.

    Raises:
        LocalError: something has no such wheel, or the index cannot be reached.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        words = ("--dry-run", "--ignore-installed", "--target", scratch, "--report", str(report))
        _pip("install", *words, *_for(python, architecture), *WANTED[role])
        found: Any = json.loads(report.read_text())["install"]
    lines = []
    for item in sorted(found, key=lambda item: item["metadata"]["name"].lower()):
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{item['metadata']['name']}=={item['metadata']['version']} --hash=sha256:{digest}\n")
    return f"# What {ARTICLES[role]} with Python {python} installs on {architecture}. Written by `regrow image lock`.\n{''.join(lines)}"


def check_lock(python: str, architecture: str, role: Role) -> list[str]:
    """Resolve every wheel of the lock, as a download would; returns their names. Asks the package index.

    Raises:
        LocalError: a wheel is gone, or another file has its name.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        words = (*PINNED, "--dry-run", "--ignore-installed", "--target", scratch, "--report", str(report))
        _pip("install", *words, *_for(python, architecture), "-r", str(lock_of(python, architecture, role)))
        found: Any = json.loads(report.read_text())["install"]
    return sorted(f"{item['metadata']['name']}=={item['metadata']['version']}" for item in found)


def download(python: str, folder: Path, architecture: str, role: Role) -> None:
    """Put the wheels of the lock into a folder, each checked against its hash.

    Raises:
        LocalError: one cannot be had.
    """
    words = (*PINNED, "--no-deps", "--dest", str(folder))
    _pip("download", *words, *_for(python, architecture), "-r", str(lock_of(python, architecture, role)))


def own_wheel(folder: Path) -> Path:
    """Build Regrow's own wheel from the clone that this runs from; returns its path.

    Raises:
        LocalError: this is no clone.
    """
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "pyproject.toml").is_file():
        raise LocalError("Regrow's own wheel: this is an installation, not a clone; name the wheel that it was installed from with --wheel")
    with tempfile.TemporaryDirectory() as scratch:
        _pip("wheel", "--no-deps", "--wheel-dir", scratch, str(clone))
        (made,) = Path(scratch).glob("regrow-*.whl")
        path = folder / made.name
        path.write_bytes(made.read_bytes())
    return path


def _for(python: str, architecture: str) -> tuple[str, ...]:
    platforms = [f"manylinux_2_{minor}_{architecture}" for minor in _GLIBC_MINOR] + [f"manylinux2014_{architecture}"]
    words = [word for platform in platforms for word in ("--platform", platform)]
    return ("--only-binary=:all:", "--implementation", "cp", "--python-version", python, *words)


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", words[0], "--disable-pip-version-check", "--quiet", *words[1:]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise LocalError(f"pip {words[0]} took more than {_PIP_TIMEOUT_S:.0f} s; check this machine's connection") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-3:]
        raise LocalError(f"pip {words[0]}: {' '.join(said) or 'failed without a word'}")
