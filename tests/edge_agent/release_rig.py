"""Small releases for true environments: wheels of a few lines, signed bundles, and a device's prefix with its first version in place."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.board import look_here
from regrow.release import Manifest, Wheel, head, signed_bytes, wheel_of

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
HERE = look_here()
# What the small `regrow` does: says its version, and as `regrow agent FILE` leaves the word of a healthy agent.
PROGRAM = """
import json, sys, time, pathlib
def main():
    if sys.argv[1] == "--version":
        print("regrow {version}")
        return
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    now = time.monotonic()
    said = dict(version="{version}", boot=boot, connected_s=now, round_s={round_s})
    pathlib.Path(sys.argv[2]).write_text(json.dumps(said))
"""


def make_wheel(
    folder: Path, name: str, version: str, module: str, source: str, *, needs: Sequence[str] = (), tag: str = "py3-none-any"
) -> Path:
    """A wheel of one module; with `main` in it, the command of its name."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{module}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(f"Requires-Dist: {n}\n" for n in needs),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if "def main" in source:
        files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{name} = {module}:main\n"
    record = f"{info}/RECORD"
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text.encode())}\n"
        for path, text in files.items()
    ]
    files[record] = "".join(lines) + f"{record},,\n"
    wheel = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(zipfile.ZipInfo(path), text)
    return wheel


def wheels_of(folder: Path, version: str, *, healthy: bool = True, needs: Sequence[str] = ("onnxruntime",)) -> list[Path]:
    """`regrow` of that version, and what stands for onnxruntime."""
    folder.mkdir(parents=True, exist_ok=True)
    program = PROGRAM.format(version=version, round_s="now" if healthy else "None")
    return [
        make_wheel(folder, "regrow", version, "small_regrow", program, needs=needs),
        make_wheel(folder, "onnxruntime", "1.0", "onnxruntime", "ready = True\n"),
    ]


def described(wheels: Sequence[Path]) -> list[Wheel]:
    return [wheel_of(file.name, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for file in wheels]


def manifest_of(wheels: Sequence[Path], number: int, version: str, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "format": 1,
        "fleet": "test",
        "number": number,
        "name": "regrow",
        "version": version,
        "created": "2026-01-01T00:00:00Z",
        "targets": [(HERE.python, HERE.machine)],
        "min_free_bytes": 1000,
        "trial_minutes": 0.5,
        "files": described(wheels),
    }
    return msgspec.convert(fields | changes, Manifest)


def bundle_of(manifest: Manifest, wheels: Sequence[Path], key: Ed25519PrivateKey = KEY) -> bytes:
    said = msgspec.json.encode(manifest)
    body = b"".join(bytes.fromhex(described([file])[0].sha256) + file.read_bytes() for file in wheels)
    return head(said, key.sign(signed_bytes(said))) + body


class Board:
    """A device's prefix with a first version in environment a. `boot` runs what the current link names, as its unit would."""

    def __init__(self, path: Path, version: str = "1.0.0") -> None:
        self.path, self.prefix, self.spool, self.health = path, path / "opt", path / "spool", path / "health.json"
        self.settings = path / "update.json"
        self.prefix.mkdir(parents=True)
        self.spool.mkdir()
        subprocess.run([sys.executable, "-m", "venv", self.prefix / "a"], check=True)
        pip = [self.prefix / "a" / "bin" / "python", "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*pip, *wheels_of(path / "first", version)], check=True)
        for link in ("current", "good"):
            (self.prefix / link).symlink_to("a")
        fields = {
            "keys": [PUBLIC.hex()],
            "prefix": str(self.prefix),
            "spool": str(self.spool),
            "health": str(self.health),
            "restart": ["true"],
        }
        self.settings.write_text(json.dumps(fields))
        self.settings.chmod(0o644)

    def lay(self, bundle: bytes, number: int) -> Path:
        """Put a bundle into the spool."""
        file = self.spool / f"{number}.bundle"
        file.write_bytes(bundle)
        return file

    def offer(self, number: int, version: str, *, healthy: bool = True, **changes: Any) -> None:
        """A right release lies in the spool."""
        wheels = wheels_of(self.path / f"release-{number}", version, healthy=healthy)
        self.lay(bundle_of(manifest_of(wheels, number, version, **changes), wheels), number)

    def runs(self) -> str:
        """What `PREFIX/current/bin/regrow --version` says: this must always work."""
        return self._current("--version").split()[-1]

    def boot(self) -> None:
        """The agent starts, and trains where it is healthy."""
        self._current("agent", str(self.health))

    def _current(self, *words: str) -> str:
        return subprocess.run([self.prefix / "current" / "bin" / "regrow", *words], check=True, capture_output=True, text=True).stdout
