"""Does a device always run the old version or the new one, and train again, wherever its update is killed? True installs.

    python -m bench.update_kills --wheels DIR --chains 20        # DIR: wheels of what regrow needs on a device

A device here is a prefix with two real virtual environments (pip, offline; NumPy, onnxruntime and all), the agent that its link `current`
names, and the updater that `good` names. A chain is one release that is killed at each of the updater's places in turn, and then one whose
agent cannot start, killed at each place of the way back. After every kill the whole process group is gone; then the device "boots":
`current` must start as the old or the new version, its agent must finish a round with a gateway over mosquitto, and the updater goes on
until the next kill. Where the release that cannot train was current, the round counts that comes once the updater has gone back.
What a power cut does to a disk's own cache is not tried here: docs/updates.md says what is fsynced, and when.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.machine import write_result
from edge_agent.update_files import read_journal
from edge_agent.updater import PLACES, PLACES_BACK
from export.models import digits_mlp
from tests.edge_agent.release_rig import PUBLIC, bundle_of, manifest_of
from tests.edge_agent.updater_child import DURING
from tests.testbed.processes import ROOT, Fleet, write_digits

CHILD = ROOT / "tests" / "edge_agent" / "updater_child.py"
ALL = (*PLACES[: PLACES.index("build:done")], DURING, *PLACES[PLACES.index("build:done") :])
OLD, NEW, BAD = "0.1.0", "0.2.0", "0.3.0"
ROUND_S = 120.0
TASK = """name = "kills"
[training]
local_steps = 3
batch = 20
learning_rate = 0.05
[method]
name = "fedasync"
[fleet]
join_s = 0
heartbeat_s = 0.5
min_devices = 1
[stop]
seconds = 100000
"""


@dataclass
class Tally:
    """What was found after the cuts at one place."""

    kills: int = 0
    old: int = 0
    new: int = 0
    neither: int = 0
    trained_again: int = 0
    seconds: list[float] = field(default_factory=list)


class Device:
    """A prefix, its agent and whoever starts it anew when the updater asks (here: through two FIFOs)."""

    def __init__(self, folder: Path, name: str, fleet: Fleet, first: Sequence[Path]) -> None:
        self.folder, self.name, self.prefix = folder, name, folder / "opt"
        self.spool, self.state = folder / "spool", folder / "state"
        self.health = self.state / "health.json"
        self.prefix.mkdir(parents=True)
        self.spool.mkdir()
        self._agent: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False
        fleet.credentials.write_bundle(name, f"mqtt://127.0.0.1:{fleet.port}", folder)
        write_digits(folder / "data.npz", seed=1)
        subprocess.run([sys.executable, "-m", "venv", self.prefix / "a"], check=True)
        pip = [str(self.prefix / "a" / "bin" / "python"), "-I", "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*pip, *first], check=True)
        for link in ("current", "good"):
            (self.prefix / link).symlink_to("a")
        self._child = shutil.copy(CHILD, folder)  # it belongs to the wheels that were made from this tree
        self._asked, self._done = folder / "asked", folder / "done"
        os.mkfifo(self._asked)
        os.mkfifo(self._done)
        self.settings = folder / "update.json"
        restart = ["/bin/sh", "-c", f"echo now > {self._asked}; read answer < {self._done}"]
        said = {
            "keys": [PUBLIC.hex()],
            "prefix": str(self.prefix),
            "spool": str(self.spool),
            "health": str(self.health),
            "restart": restart,
        }
        self.settings.write_text(json.dumps(said))
        self.settings.chmod(0o644)
        threading.Thread(target=self._supervise, daemon=True).start()

    def start(self) -> None:
        """The agent of the current version, anew."""
        with self._lock:
            self._end()
            if self._closed:
                raise SystemExit(f"{self.name} is closed")
            command = [self.prefix / "current" / "bin" / "regrow", "agent", "--bundle", self.folder / f"{self.name}.json"]
            command += ["--data", self.folder / "data.npz", "--state", self.state, "--no-tuning", "--max-uplink-bps", "200000"]
            with (self.folder / "agent.log").open("ab") as log:
                plain = {"PATH": os.defpath, "OMP_NUM_THREADS": "1"}
                self._agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=plain)

    def power_off(self) -> None:
        with self._lock:
            self._end()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._end()

    def _end(self) -> None:
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait()

    def _supervise(self) -> None:
        while not self._closed:
            self._asked.read_text()
            with suppress(SystemExit):
                self.start()
            self._answer()

    def _answer(self) -> None:
        """Say that it is done to whoever asked, unless that one was cut off meanwhile."""
        until_s = time.monotonic() + 2
        while time.monotonic() < until_s:
            with suppress(OSError):  # nobody reads yet, or any more
                descriptor = os.open(self._done, os.O_WRONLY | os.O_NONBLOCK)
                os.write(descriptor, b"done\n")
                os.close(descriptor)
                return
            time.sleep(0.01)

    def runs(self) -> str:
        """What the current version says it is; "" when it does not start."""
        command = [self.prefix / "current" / "bin" / "regrow", "--version"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": os.defpath})
        return ended.stdout.split()[-1] if ended.returncode == 0 and ended.stdout else ""

    def trained_since(self, since_s: float) -> bool:
        """Whether the agent finishes a round that it began after that moment."""
        until_s = since_s + ROUND_S
        while time.monotonic() < until_s:
            with suppress(OSError, ValueError):
                if (json.loads(self.health.read_text())["round_s"] or 0.0) > since_s:
                    return True
            time.sleep(0.05)
        return False

    def offer(self, number: int, version: str, wheels: Sequence[Path], **changes: Any) -> None:
        manifest = manifest_of(wheels, number, version, forced=True, **changes)
        aside = self.spool / ".coming"
        aside.write_bytes(bundle_of(manifest, wheels))
        aside.rename(self.spool / f"{number}.bundle")

    def update(self, place: str) -> int:
        """`regrow update apply` of the good version until the cut; then its whole process group is gone, pip too."""
        command = [self.prefix / "good" / "bin" / "python", self._child, self.settings, place]
        with (self.folder / "updater.log").open("ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env={"PATH": os.defpath}, cwd=self.folder)
            status = child.wait()
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        return status


def cut(device: Device, place: str, old: str, new: str, tally: Tally) -> None:
    """One kill and what comes of it."""
    status = device.update(place)
    if status != -signal.SIGKILL:
        raise SystemExit(f"{device.name}: the updater ended with {status} before {place}: {device.folder / 'updater.log'}")
    device.power_off()
    booted_s = time.monotonic()
    version = device.runs()
    device.start()
    tally.kills += 1
    tally.old += version == old
    tally.new += version == new
    tally.neither += version not in (old, new)
    if version != BAD:
        again = device.trained_since(booted_s)
        tally.trained_again += again
        tally.seconds.append(round(time.monotonic() - booted_s, 2))


def settle(device: Device, number: int, outcome: str) -> None:
    """Let the update end without a cut."""
    status = device.update("")
    journal = read_journal(device.prefix)
    if status or (journal.number, journal.step, journal.outcome) != (number, "", outcome):
        raise SystemExit(f"{device.name}: release {number} ended as {journal}, expected {outcome}: {device.folder / 'updater.log'}")


def chain(device: Device, number: int, old: str, new: str, good: Sequence[Path], bad: Sequence[Path], tallies: dict[str, Tally]) -> None:
    """A release that stays, cut everywhere; then one that goes back, cut everywhere."""
    device.offer(number, new, good, trial_minutes=5)
    for place in ALL:
        cut(device, place, old, new, tallies[place])
    settle(device, number, "healthy")
    device.offer(number + 1, BAD, bad, trial_minutes=0.02)
    for place in PLACES_BACK:
        cut(device, place, new, BAD, tallies[place])
    settle(device, number + 1, "rolled back")
    if device.runs() != new:
        raise SystemExit(f"{device.name} runs {device.runs()} after going back to {new}")
    again = device.trained_since(time.monotonic())
    for place in PLACES_BACK:
        tallies[place].trained_again += again * (tallies[place].kills - tallies[place].trained_again)


# ---- wheels ------------------------------------------------------------------------------------------------------------------------


def made_wheels(folder: Path) -> dict[str, Path]:
    """Wheels of this working tree by version; that of BAD has an agent that cannot start."""
    folder.mkdir(parents=True)
    tree = folder / "tree"
    rooms = ("regrow", "edge_agent", "broker_server", "export", "testbed", "cli")
    for room in rooms:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "README.md", tree / "README.md")
    found = {}
    for version in (OLD, NEW, BAD):
        text = (ROOT / "pyproject.toml").read_text()
        (tree / "pyproject.toml").write_text(text.replace('version = "0.1.0"', f'version = "{version}"'))
        if version == BAD:
            (tree / "cli" / "device.py").write_text('raise SystemExit("this release cannot train")\n')
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, tree]
        subprocess.run(command, check=True)
        shutil.rmtree(tree / "build", ignore_errors=True)
        (found[version],) = folder.glob(f"regrow-{version}-*.whl")
        if zipfile.ZipFile(found[version]).testzip():
            raise SystemExit(f"{found[version]} is damaged")
    return found


def result_of(tallies: dict[str, Tally], chains: int, seconds: float) -> dict[str, Any]:
    rows = []
    for place, tally in tallies.items():
        waited = sorted(tally.seconds)
        median = waited[len(waited) // 2] if waited else None
        row = {name: getattr(tally, name) for name in ("kills", "old", "new", "neither", "trained_again")}
        rows.append({"step": place, **row, "median_s_to_a_round": median})
    total = Counter({name: sum(row[name] for row in rows) for name in ("kills", "old", "new", "neither", "trained_again")})
    return {
        "question": "a device whose update is killed at each step: does it run the old or the new version, and train again?",
        "chains": chains,
        "total": dict(total),
        "note": "back*: the release on trial has an agent that cannot start; where it was still current, the round counts after going back",
        "seconds": round(seconds),
        "steps": rows,
    }


def combined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several results as one; waits are of the first."""
    names = ("kills", "old", "new", "neither", "trained_again")
    found = json.loads(json.dumps(results[0]))
    for other in results[1:]:
        for row, more in zip(found["steps"], other["steps"], strict=True):
            for name in names:
                row[name] += more[name]
        found["chains"] += other["chains"]
        found["seconds"] += other["seconds"]
    found["total"] = {name: sum(row[name] for row in found["steps"]) for name in names}
    found.pop("machine", None)
    each = [result.get("runs", [{"chains": result["chains"], "machine": result["machine"]}]) for result in results]
    return {**found, "runs": [run for runs in each for run in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--combine", type=Path, nargs="+", metavar="JSON", help="only add results up, of runs that were cut short")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--chains", type=int, default=20)
    parser.add_argument("--devices", type=int, default=2, help="that are cut at the same time")
    parser.add_argument("--work", type=Path, help="folder for everything; must not exist")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "update_kills.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.combine:
        write_result(options.out, combined([json.loads(file.read_text()) for file in options.combine]))
        return
    if options.wheels is None or options.work is None:
        parser.error("--wheels and --work are needed, or --combine")
    measure(options)


class Campaign:
    """The chains that are to be done, shared out among the devices; the result is written after each."""

    def __init__(self, wheels: dict[str, Path], others: Sequence[Path], chains: int, out: Path) -> None:
        self._wheels, self._others, self._left, self._out = wheels, others, chains, out
        self._tallies = {place: Tally() for place in (*ALL, *PLACES_BACK)}
        self._began_s, self._done = time.monotonic(), 0
        self._lock = threading.Lock()
        self.wrong: list[str] = []

    def work(self, device: Device) -> None:
        """Take chain after chain; from release to release the device goes from one version to the other and back."""
        versions, number = (OLD, NEW), 1
        try:
            device.start()
            while self._take():
                mine = {place: Tally() for place in self._tallies}
                good, bad = [self._wheels[versions[1]], *self._others], [self._wheels[BAD], *self._others]
                chain(device, number, *versions, good, bad, mine)
                number, versions = number + 2, versions[::-1]
                self._add(mine)
        except (SystemExit, OSError, subprocess.SubprocessError) as error:
            with self._lock:
                self.wrong.append(str(error))

    def _take(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0 and not self.wrong

    def _add(self, mine: dict[str, Tally]) -> None:
        with self._lock:
            self._done += 1
            for place, tally in mine.items():
                for name in ("kills", "old", "new", "neither", "trained_again", "seconds"):
                    setattr(self._tallies[place], name, getattr(self._tallies[place], name) + getattr(tally, name))
            result = result_of(self._tallies, self._done, time.monotonic() - self._began_s)
            print(f"{result['seconds']} s: {self._done} chains, {result['total']}", flush=True)
            write_result(self._out, result)


def measure(options: argparse.Namespace) -> None:
    """Kill as many chains as were asked for."""
    others = sorted(options.wheels.glob("*.whl"))
    wheels = made_wheels(options.work / "wheels")
    with Fleet(options.work / "fleet", digits_mlp(seed=1), TASK, kind="mosquitto") as fleet:
        names = [f"d{number}" for number in range(options.devices)]
        for name in names:
            fleet.credentials.add_device(name)
        fleet.serve()
        devices = [Device(options.work / name, name, fleet, [wheels[OLD], *others]) for name in names]
        campaign = Campaign(wheels, others, options.chains, options.out)
        threads = [threading.Thread(target=campaign.work, args=(device,), daemon=True) for device in devices]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # also after Ctrl-C and SIGTERM
            for device in devices:
                device.close()
    if campaign.wrong:
        raise SystemExit("\n".join(campaign.wrong))


if __name__ == "__main__":
    main()
