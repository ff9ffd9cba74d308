"""Containers that stand for boards: a stock Debian under systemd-nspawn, with a cable between two of them, and a disk image for an SSD."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

from broker_server.stopping import ending_with_parent

ROOT = Path(__file__).resolve().parent.parent
SUITE = "trixie"
PROGRAMS = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
}
BOOT = "boot/firmware"
SSD_BYTES = 2 * 1024**3


def fail(why: str) -> NoReturn:
    """End with one line."""
    sys.exit(f"{Path(sys.argv[0]).stem}: {why}")


def said(*words: str, cwd: Path | None = None) -> str:
    """Standard output of a command; ends this script with what was said where it fails."""
    done = subprocess.run(words, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def check_programs() -> None:
    """Ends this script where something is missing."""
    if os.geteuid():
        fail("root is needed: namespaces, and systems that boot")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None and not Path("/usr/sbin", program).exists():
            fail(f"{program} is not installed here; on Debian: apt-get install {package}")


def text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# ---- the systems -----------------------------------------------------------------------------------------------------------------------


def unpack(system: Path, packages: str) -> None:
    """A stock Debian that reads cloud-init from its boot partition, as Raspberry Pi OS does; kept where it is there already."""
    if (system / "etc/hostname").is_file() and (system / "etc/cloud/cloud.cfg.d/99-boot-partition.cfg").is_file():
        return
    print(f"unpacking Debian {SUITE} into {system}", flush=True)
    said("debootstrap", "--variant=minbase", f"--include={','.join(packages.split())}", SUITE, str(system))
    said("systemctl", "--root", str(system), "enable", "systemd-networkd", "systemd-resolved")
    (system / "etc/hostname").write_text("raspberrypi\n")
    for key in (system / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    (system / "etc/cloud/cloud.cfg.d/99-boot-partition.cfg").write_text(
        "datasource_list: [NoCloud]\ndatasource:\n  NoCloud:\n    seedfrom: file:///boot/firmware/\n"
    )


def fetch_debs(system: Path, names: str, debs: Path) -> None:
    """The .deb files of packages and of what else of theirs the system lacks, as its own apt finds them."""
    if debs.is_dir() and any(debs.glob("*.deb")):
        return
    print(f"fetching {names}", flush=True)
    scratch = debs / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    options = {
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
        "Dir::Etc::sourcelist": str(system / "etc/apt/sources.list"),
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": str(scratch / "lists"),
        "Dir::State::status": str(system / "var/lib/dpkg/status"),
        "Dir::Cache": str(scratch / "cache"),
    }
    apt = ["apt-get", "-q", "-y", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    said(*apt, "update")
    said(*apt, "--download-only", "install", *names.split())
    for path in (scratch / "cache/archives").glob("*.deb"):
        path.rename(debs / path.name)
    shutil.rmtree(scratch)


def flashed(system: Path, card: Path, board: Path) -> None:
    """A card: the stock system, with what was written for its boot partition."""
    said("cp", "-a", "--reflink=auto", str(system), str(board))
    shutil.copytree(card, board / BOOT, dirs_exist_ok=True)


# ---- what they are plugged into --------------------------------------------------------------------------------------------------------


@contextmanager
def cable(left: str, right: str) -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by one cable with these ends; nothing else is reachable from either."""
    names = f"rg{os.getpid()}a", f"rg{os.getpid()}b"
    try:
        for name in names:
            said("ip", "netns", "add", name)
            said("ip", "-n", name, "link", "set", "lo", "up")
        said("ip", "link", "add", left, "netns", names[0], "type", "veth", "peer", "name", right, "netns", names[1])
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextmanager
def ssd(image: Path, label: str) -> Iterator[list[str]]:
    """An ext4 file system with this label on a loop device; yields systemd-nspawn's options that plug it in.

    No udev runs in a container, so the link that udev would make by the label is given, too.
    """
    with image.open("wb") as file:
        file.truncate(SSD_BYTES)
    said("mkfs.ext4", "-q", "-L", label, str(image))
    device = said("losetup", "--find", "--show", str(image)).strip()
    try:
        yield [f"--bind={device}", f"--bind={device}:/dev/disk/by-label/{label}"]
    finally:
        subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)


# ---- power -----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Board:
    """A container that can be switched on, asked to restart, and cut off.

    Args:
        root: its file system.
        network: the namespace at its end of the cable.
        plug: its end of the cable.
        console: where its words go.
        plugged: further options of systemd-nspawn.
    """

    root: Path
    network: str
    plug: str
    console: Path
    plugged: list[str]
    child: subprocess.Popen[bytes] | None = None

    def power_on(self) -> None:
        for words in (["address", "flush", "dev", self.plug], ["link", "set", self.plug, "down"]):  # as a board that was off
            said("ip", "-n", self.network, *words)
        # NetworkManager forwards between networks, for which it writes below /proc/sys/net.
        environment = {**os.environ, "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"}
        words = [str(shutil.which("systemd-nspawn")), "--quiet", "--directory", str(self.root), "--boot", "--register=no", "--keep-unit"]
        words += ["--capability=CAP_NET_ADMIN", f"--network-namespace-path=/run/netns/{self.network}", *self.plugged]
        with self.console.open("ab") as output:
            self.child = subprocess.Popen(
                ending_with_parent(words), env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def power_off(self, patience_s: float = 60.0) -> None:
        """Ask for a shutdown, and cut the power where that takes too long."""
        if self.child is None:
            return
        self.child.terminate()
        try:
            self.child.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.cut()

    def wait_for_end(self, patience_s: float) -> None:
        """Until it has shut itself down."""
        try:
            if self.child is not None:
                self.child.wait(patience_s)
        except subprocess.TimeoutExpired:
            fail(f"{self.root.name} does not shut down: {text(self.console).splitlines()[-8:]}")

    def cut(self) -> None:
        """The power is gone: nothing in it runs any more."""
        if self.child is None or self.child.poll() is not None:
            return
        for inside in psutil.Process(self.child.pid).children():  # its first process, with which the kernel ends all others
            inside.kill()
        self.child.kill()
        self.child.wait()

    def wait(self, over: Callable[[], bool], patience_s: float) -> None:
        """Until it is over; ends this script when the container ends or it takes too long."""
        deadline_s = time.monotonic() + patience_s
        while not over():
            if self.child is not None and self.child.poll() is not None and not over():
                fail(f"{self.root.name} ended with {self.child.returncode}: {text(self.console).splitlines()[-8:]}")
            if "Failed to run module scripts-user" in text(self.console):
                fail(f"{self.root.name} was not installed: {re.findall('regrow install: .*|E: .*', text(self.console))}")
            if time.monotonic() > deadline_s:
                fail(f"{self.root.name}: nothing after {patience_s:.0f} s: {text(self.console).splitlines()[-8:]}")
            time.sleep(0.2)

    def shows(self, unit: str) -> None:
        """Have it print a unit's words to the console, too; nothing else of the unit changes."""
        folder = self.root / f"etc/systemd/system/{unit}.d"
        folder.mkdir(parents=True)
        (folder / "console.conf").write_text("[Service]\nStandardOutput=journal+console\nStandardError=journal+console\n")


@dataclass(frozen=True)
class Login:
    """A person at the other end of the cable, who may log in with a key. network: the namespace that they are in."""

    network: str
    key: Path
    user: str
    address: str

    def words(self, program: str) -> list[str]:
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=3", "BatchMode=yes")
        return ["ip", "netns", "exec", self.network, program, "-i", str(self.key), *(word for o in options for word in ("-o", o))]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        words = [*self.words("ssh"), f"{self.user}@{self.address}", command]
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    def says(self, command: str) -> str:
        """Standard output; ends this script where the command fails."""
        done = self.run(command)
        if done.returncode:
            fail(f"{command}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def copy(self, *paths: Path) -> None:
        """Copy files and folders into the home folder."""
        said(*self.words("scp"), "-qr", *map(str, paths), f"{self.user}@{self.address}:")


def clock_in(line: str) -> str | None:
    """The time of day in a line of a log, "HH:MM:SS"."""
    found = re.search(r"\b(\d\d:\d\d:\d\d)\b", line)
    return None if found is None else found[1]
