"""Two virtual environments side by side, and the links that say which one is used.

    PREFIX/a, PREFIX/b     environments; release.json in one says that it is whole, and what it is
    PREFIX/current -> a    what the agent runs
    PREFIX/good -> a       the last that proved itself: what the updater runs, so that a broken release never judges itself
    PREFIX/wheels/         the wheels of what is installed, so that the next release brings only what has changed

An environment is built in the place that nobody uses; links are replaced by a rename.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_agent.state import sync_folder
from regrow.errors import LocalError

NAMES = ("a", "b")
CURRENT, GOOD, WHEELS = "current", "good", "wheels"
MARKER = "release.json"
INSTALL_S, SMOKE_S = 3600.0, 300.0


@dataclass(frozen=True, slots=True)
class About:
    """What release.json says of an environment: its release, the version, and the names of the wheels that it was made from."""

    number: int
    version: str
    wheels: list[str]


class Slots:
    """The environments below a prefix.

    Args:
        prefix: their folder.
        held: descriptors that every program started here inherits: while one of them lives, so does the lock behind it.
    """

    def __init__(self, prefix: Path, held: Sequence[int] = ()) -> None:
        self.prefix = prefix
        self.wheels = prefix / WHEELS
        self._held = tuple(held)

    def linked(self, link: str) -> str:
        """The name of the environment behind a link.

        Raises:
            LocalError: there is none.
        """
        path = self.prefix / link
        try:
            name = os.readlink(path)  # noqa: PTH115 - as it stands, not resolved
        except OSError:
            name = ""
        if name not in NAMES:
            raise LocalError(f"{path} is no link to one of {' or '.join(NAMES)}: install the first version as docs/updates.md says")
        return name

    def other(self) -> str:
        """The environment that the agent does not run."""
        return NAMES[1 - NAMES.index(self.linked(CURRENT))]

    def point(self, link: str, name: str, linked: Callable[[], None] = lambda: None) -> None:
        """Make the link name that environment, in one step and durably. linked: called before that step."""
        aside = self.prefix / f".{link}"
        aside.unlink(missing_ok=True)
        aside.symlink_to(name)
        linked()
        aside.replace(self.prefix / link)
        sync_folder(self.prefix)

    def about(self, name: str) -> About | None:
        """What release.json says of an environment; None of one that is not whole, or that no release has made."""
        try:
            said = json.loads((self.prefix / name / MARKER).read_bytes())
            return About(int(said["number"]), str(said["version"]), [str(wheel) for wheel in said["wheels"]])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def version(self, name: str) -> str:
        """The version in an environment; "" when it does not say."""
        about = self.about(name)
        if about is not None:
            return about.version
        try:
            return self._run([self.prefix / name / "bin" / "regrow", "--version"], SMOKE_S).split()[-1]
        except (LocalError, IndexError):
            return ""

    def build(self, name: str, wheels: Iterable[str], made: Callable[[], None] = lambda: None) -> None:
        """Make the environment anew from these wheels, without a network; durable when it returns. made: called before they are installed.

        Raises:
            LocalError: the disk is full, or they do not install.
        """
        folder = self.prefix / name
        self.remove(name)
        self._run([sys.executable, "-I", "-m", "venv", folder], INSTALL_S)
        made()
        files = [self.wheels / wheel for wheel in wheels]
        offline = ["install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir"]
        self._run([folder / "bin" / "python", "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", *offline, *files], INSTALL_S)
        os.sync()  # pip does not: after a power cut its files could be empty

    def smoke(self, name: str, about: About) -> None:
        """See that the environment starts, has that version, all that it depends on and onnxruntime; then mark it as whole.

        Raises:
            LocalError: it does not.
        """
        folder = self.prefix / name
        said = self._run([folder / "bin" / "regrow", "--version"], SMOKE_S).split()
        if not said or said[-1] != about.version:
            raise LocalError(f"`regrow --version` says {' '.join(said)!r}, the release is {about.version}")
        self._run([folder / "bin" / "python", "-I", "-c", "import onnxruntime"], SMOKE_S)
        self._run([folder / "bin" / "python", "-I", "-m", "pip", "--disable-pip-version-check", "check"], SMOKE_S)
        aside = folder / f".{MARKER}"
        with aside.open("w") as file:
            json.dump(asdict(about), file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / MARKER)
        sync_folder(folder)

    def remove(self, name: str) -> None:
        """Take an environment away; its mark first, so that half of one is never taken for a whole one."""
        folder = self.prefix / name
        (folder / MARKER).unlink(missing_ok=True)
        if folder.is_dir():
            sync_folder(folder)
            shutil.rmtree(folder)

    def sweep(self) -> None:
        """Remove the wheels that the current environment was not made from, if it says which ones these are."""
        about = self.about(self.linked(CURRENT))
        for file in self.wheels.iterdir() if about is not None else ():
            if about is not None and file.name not in about.wheels:
                file.unlink()

    def _run(self, command: Sequence[object], limit_s: float) -> str:
        """What a program of an environment says. Nothing of our surroundings can lead it to an index or to other packages."""
        plain = {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": str(self.prefix), "PIP_CONFIG_FILE": os.devnull, "PYTHONNOUSERSITE": "1"}
        words = [str(word) for word in command]
        try:
            ended = subprocess.run(
                words,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit_s,
                env=plain,
                cwd=self.prefix,
                pass_fds=self._held,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LocalError(f"{Path(words[0]).name}: {error}") from error
        if ended.returncode:
            last = " / ".join((ended.stderr or ended.stdout).strip().splitlines()[-3:])
            raise LocalError(f"{' '.join(words[:4])} ended with {ended.returncode}: {last[-600:]}")
        return ended.stdout
