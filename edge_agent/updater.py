"""Installs signed releases beside what runs, tries them, and goes back by itself; killed or cut off anywhere, it goes on where it was.

It runs as root, apart from the agent, and believes nothing that the agent says: it trusts the keys in its own settings file, and checks
bundles while it copies their wheels. A journal names the step that is to be done; every step can be done again. Until `switch` the old
version runs, from then on the new one; the link is replaced by one rename, so there is never none.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.board import look_here
from edge_agent.release_bundle import has_wheel, open_bundle, read_wheels
from edge_agent.slots import CURRENT, GOOD, About, Slots
from edge_agent.update_files import SUFFIX, Journal, Settings, read_journal, write_journal
from regrow.errors import LocalError, PeerError, RegrowError
from regrow.release import Manifest, Wheel, check_fit

# Every place where a cut is tried (tests/edge_agent/test_updater.py, bench/update_kills.py). NAME:begin: the journal names the step and
# nothing of it is done; NAME:done: it is done, and the journal does not know.
PLACES = (
    *("take", "copied", "taken"),
    *("build:begin", "build:empty", "build:done", "smoke:begin", "smoke:done"),
    *("switch:begin", "switch:linked", "switch:done", "restart:begin", "restart:done"),
    *("trial:begin", "trial:waiting", "trial:done", "confirm:begin", "confirm:linked", "confirm:done", "idle"),
)
PLACES_BACK = ("back:begin", "back:linked", "back:done", "back-restart:begin", "back-restart:done")
POLL_S = 1.0
MOST_STARTS = 3  # of a trial: a release that restarts the device must not do so for ever
BY_HAND = "by hand"
RESERVE_BYTES = 32 * 1024 * 1024
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
HEALTH_BYTES = 64 * 1024


class Updater:
    """One device's; `apply` does all that is to be done.

    Args:
        at: called at every place where a cut matters, with its name (PLACES); tests end the process there.
        say: takes a line for people.
    """

    def __init__(self, settings: Settings, *, at: Callable[[str], None] = lambda _: None, say: Callable[[str], None] = print) -> None:
        self._settings, self._at, self._say = settings, at, say
        self._folder = settings.prefix / "update"
        self._journal = Journal()
        self._slots = Slots(settings.prefix)
        self._steps = {
            "build": self._build,
            "smoke": self._smoke,
            "switch": self._switch,
            "restart": self._restart,
            "trial": self._trial,
            "confirm": self._confirm,
            "back": self._back,
            "back-restart": self._back_restart,
        }

    # ---- what can be asked for -----------------------------------------------------------------------------------------------------

    def apply(self, bundle: Path | None = None) -> Journal:
        """Go on with what was begun, then take a bundle that a person brought, and what lies in the spool, until nothing is left to do.

        Raises:
            LocalError: nothing is installed here, or the disk failed; the journal keeps the place, and another call goes on.
        """
        if bundle is not None and not bundle.is_file():
            raise LocalError(f"{bundle}: no such file")
        with self._locked():
            self._journal = read_journal(self._settings.prefix)
            if not (self._settings.prefix / GOOD).is_symlink():
                self._slots.point(GOOD, self._slots.linked(CURRENT))
            self._go_on()
            if bundle is not None and self._take(bundle.name, bundle.resolve().parent, keep=True):
                self._go_on()
            while (waiting := self._waiting()) is not None:
                if self._take(waiting, self._settings.spool):
                    self._go_on()
        return self._journal

    def check(self, bundle: Path) -> Manifest:
        """Return the manifest of a bundle that `apply` would take.

        Raises:
            RegrowError: why it would not.
        """
        try:
            with bundle.open("rb") as stream:
                return self._accept(stream.fileno(), None)[0]
        except OSError as error:
            raise LocalError(f"{bundle}: {error.strerror}") from error

    def rollback(self) -> str:
        """Run the version before this one again, and keep it; returns it.

        Raises:
            LocalError: there is none, or an update is under way.
        """
        with self._locked():
            journal = self._journal = read_journal(self._settings.prefix)
            if journal.step:
                raise LocalError(f"release {journal.number} is at its step {journal.step!r}; `regrow update apply` ends it first")
            current, other = self._slots.linked(CURRENT), self._slots.other()
            if not self._slots.version(other):
                raise LocalError(f"{self._settings.prefix / other} holds no whole version to go back to")
            self._save(step="back", slot=current, before=other, reason=BY_HAND)
            self._go_on()
            return self._slots.version(other)

    # ---- taking a bundle -----------------------------------------------------------------------------------------------------------

    def _waiting(self) -> str | None:
        """The newest bundle in the spool."""
        try:
            with os.scandir(self._settings.spool) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(SUFFIX) and not entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return None
        return max(names, key=lambda name: (len(name), name), default=None)

    def _take(self, name: str, folder: Path, *, keep: bool = False) -> bool:
        """Copy the wheels of a bundle, checked, and journal it as begun. The spool is the agent's: no link in it is followed."""
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            self._at("take")
            taken = self._try_to_take(name, opened)
            self._at("taken")
            if not keep:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=opened)
                os.fsync(opened)
            return taken
        finally:
            os.close(opened)

    def _try_to_take(self, name: str, folder: int) -> bool:
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            try:
                manifest, wheels = self._accept(descriptor, self._slots.wheels)
            finally:
                os.close(descriptor)
        except (RegrowError, OSError) as error:
            self._say(f"{name} is refused: {error}")
            self._save(refused_file=name, refused=str(error)[:1000])
            return False
        self._at("copied")
        before, slot = self._slots.linked(CURRENT), self._slots.other()
        self._say(f"release {manifest.number}: {manifest.name} {manifest.version} goes to {self._settings.prefix / slot}")
        self._journal = Journal(
            number=manifest.number,
            version=manifest.version,
            slot=slot,
            before=before,
            trial_minutes=manifest.trial_minutes,
            wants=manifest.wants,
            wheels=[wheel.name for wheel in wheels],
        )
        self._save(step="build")
        return True

    def _accept(self, descriptor: int, wheels: Path | None) -> tuple[Manifest, list[Wheel]]:
        """The manifest of a bundle that is right to the last byte, and the wheels that fit. wheels: where these go; None: nowhere."""
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            manifest = open_bundle(stream, self._settings.keys)
            version = self._slots.version(self._slots.linked(CURRENT))
            number = read_journal(self._settings.prefix).number
            fitting = check_fit(manifest, look_here(board=self._settings.board, version=version, number=number))
            self._check_room(manifest)
            read_wheels(stream, fitting, wheels)
            if wheels is not None:
                lacking = [wheel.name for wheel in fitting if not has_wheel(wheels, wheel)]
                if lacking:
                    raise PeerError(f"the bundle lacks {', '.join(lacking)}, which this device has not either")
        return manifest, fitting

    def _check_room(self, manifest: Manifest) -> None:
        found = os.statvfs(self._settings.prefix)
        free = found.f_bavail * found.f_frsize
        other = self._settings.prefix / self._slots.other()
        makes_room = sum(file.lstat().st_size for file in other.rglob("*")) if other.is_dir() else 0
        if free + makes_room < manifest.min_free_bytes + RESERVE_BYTES:
            raise LocalError(
                f"release {manifest.number} needs {manifest.min_free_bytes / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are free"
            )

    # ---- the steps -----------------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        while step := self._journal.step:
            self._at(f"{step}:begin")
            try:
                following = self._steps[step]()
            except (RegrowError, OSError) as error:
                following = self._give_up(step, str(error))
            self._at(f"{step}:done")
            self._save(step=following)
        self._slots.sweep()
        self._at("idle")

    def _give_up(self, step: str, reason: str) -> str:
        """What comes instead of the rest: before the switch nothing has to be undone."""
        if step in ("back", "back-restart"):
            raise LocalError(f"going back from release {self._journal.number}: {reason}; `regrow update apply` tries again")
        self._say(f"release {self._journal.number}: {step}: {reason}")
        self._journal = replace_journal(self._journal, reason=f"{step}: {reason}"[:1000])
        if step in ("build", "smoke"):
            with suppress(OSError):
                self._slots.remove(self._journal.slot)
            self._journal = replace_journal(self._journal, outcome="failed")
            return ""
        return "back"

    def _build(self) -> str:
        self._slots.build(self._journal.slot, self._journal.wheels, lambda: self._at("build:empty"))
        return "smoke"

    def _smoke(self) -> str:
        self._slots.smoke(self._journal.slot, About(self._journal.number, self._journal.version, self._journal.wheels))
        return "switch"

    def _switch(self) -> str:
        self._slots.point(CURRENT, self._journal.slot, lambda: self._at("switch:linked"))
        return "restart"

    def _restart(self) -> str:
        self._start_agent()
        self._say(f"release {self._journal.number} is on trial for {self._journal.trial_minutes:g} minutes")
        return "trial"

    def _trial(self) -> str:
        """Wait until the agent has done what it must; in the same boot of the machine the time runs on, in another it begins anew."""
        journal, boot = self._journal, _boot()
        if journal.boot != boot:
            self._save(boot=boot, began_s=time.monotonic(), starts=journal.starts + 1)
            if self._journal.starts > MOST_STARTS:
                raise LocalError(f"the device was started {MOST_STARTS} times during the trial")
        journal = self._journal
        while True:
            self._at("trial:waiting")
            lacks = lacking(self._settings.health, journal, boot)
            if not lacks:
                return "confirm"
            if time.monotonic() >= journal.began_s + 60 * journal.trial_minutes:
                raise LocalError(f"within {journal.trial_minutes:g} minutes the agent {lacks}")
            time.sleep(POLL_S)

    def _confirm(self) -> str:
        self._slots.point(GOOD, self._journal.slot, lambda: self._at("confirm:linked"))
        self._journal = replace_journal(self._journal, outcome="healthy", reason="")
        self._say(f"release {self._journal.number} is healthy; {self._journal.version} stays")
        return ""

    def _back(self) -> str:
        self._slots.point(CURRENT, self._journal.before, lambda: self._at("back:linked"))
        self._slots.point(GOOD, self._journal.before)
        return "back-restart"

    def _back_restart(self) -> str:
        """Not being able to start the agent does not keep us from having gone back: whoever supervises it starts the old version."""
        try:
            self._start_agent()
        except LocalError as error:
            self._say(str(error))
        self._journal = replace_journal(self._journal, outcome="rolled back")
        if self._journal.reason != BY_HAND:  # what did not work is nothing to go back to
            self._slots.remove(self._journal.slot)
        self._say(
            f"release {self._journal.number} is rolled back ({self._journal.reason}); {self._slots.version(self._journal.before)} runs"
        )
        return ""

    # ---- journal, lock, agent ------------------------------------------------------------------------------------------------------

    def _save(self, **changes: Any) -> None:
        self._journal = replace_journal(self._journal, **changes)
        write_journal(self._settings.prefix, self._journal)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One updater at a time. Programs that it starts inherit the lock: what a killed one left running is waited for."""
        os.umask(0o022)
        for folder in (self._settings.prefix, self._folder, self._slots.wheels):
            folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._slots = Slots(self._settings.prefix, [lock.fileno()])
            yield

    def _start_agent(self) -> None:
        try:
            ended = subprocess.run(self._settings.restart, capture_output=True, text=True, errors="replace", timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LocalError(f"cannot start the agent anew: {error}") from error
        if ended.returncode:
            raise LocalError(f"{' '.join(self._settings.restart)} ended with {ended.returncode}: {ended.stderr.strip()[-300:]}")


def lacking(health: Path, journal: Journal, boot: str) -> str:
    """What the agent has not done in this trial, in words; "" when it is healthy."""
    try:
        with health.open("rb") as file:
            said: Any = json.loads(file.read(HEALTH_BYTES))
        version, booted = said["version"], said["boot"]
        connected, rounded = (said[name] if isinstance(said[name], (int, float)) else float("-inf") for name in ("connected_s", "round_s"))
    except (OSError, ValueError, KeyError, TypeError):
        return f"left no word in {health.name}"
    if booted != boot or version != journal.version or max(connected, rounded) < journal.began_s:
        return f"of version {journal.version} did not connect to the broker"
    if connected < journal.began_s:
        return "did not connect to the broker"
    if journal.wants == "round" and rounded < journal.began_s:
        return "connected, but finished no round"
    return ""


def replace_journal(journal: Journal, **changes: Any) -> Journal:
    """The journal with some fields changed."""
    return msgspec.structs.replace(journal, **changes)


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
