"""What can be asked of any Linux machine: clock, disk, memory, heat, power. Read below a root, so that a tree of files stands for a board.

What is not there is `unknown`, never a number.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from edge_agent.doctor.checks import Check, Tell
from edge_agent.energy.hwmon import CHIPS
from edge_agent.firmware import said_by
from edge_agent.heat import PI_FLAGS, Zones, pi_flags
from edge_agent.memory import spare_bytes
from regrow.findings import Finding

EARLIEST_YEAR, LATEST_YEAR = 2025, 2100
MB = 1_000_000
DISK_FAIL_BYTES, DISK_WARN_BYTES = 50 * MB, 500 * MB
MEMORY_FAIL_BYTES, MEMORY_WARN_BYTES = 64 * MB, 200 * MB  # an agent of a small model takes 100 MB
HOT_C, TOO_HOT_C = 75.0, 85.0
SLOW_WRITE_S = 2.0
_TIME_ERROR = 5  # of adjtimex: the clock is not synchronised
_SKEW_WARN_S, _SKEW_FAIL_S = 60.0, 86_400.0
_OFF_S = 30 * 86_400.0  # a device that was off that long is nothing odd
_CARD_TROUBLE = re.compile(r"mmcblk\d.*(error|timed? ?out)|I/O error|EXT4-fs error|remounting filesystem read-only", re.IGNORECASE)
_SD_CURE = "copy the state folder away and replace the card"


def host_checks(
    folder: Path, root: Path = Path("/"), reference: Callable[[], float | None] | None = None, fleet_s: float = 0.0
) -> list[Check]:
    """Checks of this machine.

    Args:
        folder: where the state, or the runs, are kept.
        root: below which proc, sys, run and dev lie.
        reference: the gateway's time (unix seconds), None when it could not be asked; without it this is the gateway.
        fleet_s: the fleet's time as this device knows it, unix seconds: it is later now; 0: there is none.
    """
    clock = [] if reference is None else [Check(("clock.difference",), lambda tell: tell(clock_difference(time.time, reference)))]
    return [
        Check(("clock.year",), lambda tell: tell(clock_year(time.time(), fleet_s))),
        Check(("clock.synchronised",), lambda tell: tell(clock_synchronised(root))),
        *clock,
        Check(("disk.free", "disk.write"), lambda tell: disk(folder, tell)),
        Check(("disk.card",), lambda tell: tell(card(root))),
        Check(("memory.free", "memory.killed"), lambda tell: memory(root, tell)),
        Check(("temperature",), lambda tell: tell(temperature(root))),
        Check(("throttling",), lambda tell: tell(throttling(root))),
        Check(("power.sensor",), lambda tell: tell(power_sensor(root))),
    ]


# ---- clock -------------------------------------------------------------------------------------------------------------------------


def clock_year(now_s: float, fleet_s: float = 0.0) -> Finding:
    """Whether the clock can be right at all; an agent of a fleet goes by the fleet's time. now_s, fleet_s: unix seconds."""
    said, ahead_s = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now_s)), now_s - fleet_s
    cure = "without a battery the clock starts anywhere: let it reach a time server (timedatectl set-ntp true), or the gateway's chrony"
    if not fleet_s:
        right = EARLIEST_YEAR <= time.gmtime(now_s).tm_year <= LATEST_YEAR
        return Finding("clock.year", "ok", said) if right else Finding("clock.year", "fail", f"the clock says {said}", cure)
    if -_SKEW_WARN_S <= ahead_s <= _OFF_S:
        return Finding("clock.year", "ok", said)
    how_far = f"{abs(ahead_s) / 86_400:.1f} days {'ahead of' if ahead_s > 0 else 'behind'} the fleet's time"
    known = f"as this device knows it ({time.strftime('%Y-%m-%d', time.gmtime(fleet_s))})"
    off = "; right only if the device was off or alone all that time" if ahead_s > 0 else ""
    return Finding("clock.year", "warn", f"the clock says {said}, {how_far} {known}{off}", cure)


def clock_synchronised(root: Path) -> Finding:
    """Whether something keeps the clock right."""
    name = "clock.synchronised"
    if (root / "run/systemd/timesync/synchronized").exists():
        return Finding(name, "ok", "by systemd-timesyncd")
    if root != Path("/"):
        return Finding(name, "unknown", "the kernel cannot be asked here")
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))  # modes = 0: only looks
    if state < 0:
        return Finding(name, "unknown", "the service may not ask the kernel", "`timedatectl` as root says it")
    if state != _TIME_ERROR:
        return Finding(name, "ok", "the kernel's clock is being kept right")
    return Finding(name, "warn", "nothing keeps the clock right", "timedatectl set-ntp true, or point chrony at the gateway")


def clock_difference(clock: Callable[[], float], reference: Callable[[], float | None]) -> Finding:
    """How far the clock is from the gateway's."""
    name = "clock.difference"
    theirs = reference()
    if theirs is None:
        return Finding(name, "unknown", "no other clock to compare with", "ask through the gateway: regrow doctor --device NAME")
    ahead_s = clock() - theirs
    said = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s >= 0 else 'behind'} the gateway's"
    if abs(ahead_s) <= _SKEW_WARN_S:
        return Finding(name, "ok", said)
    return Finding(name, "fail" if abs(ahead_s) > _SKEW_FAIL_S else "warn", said, "set the clock that is wrong: timedatectl")


# ---- disk --------------------------------------------------------------------------------------------------------------------------


def disk(folder: Path, tell: Tell, look: Callable[[Path], os.statvfs_result] = os.statvfs) -> None:
    """How much of the folder's disk is free, and whether it really takes what is written."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    tell(disk_free(there, look(there)))
    tell(disk_write(there))


def disk_free(place: Path, usage: os.statvfs_result) -> Finding:
    """What statvfs says: bytes, names, and whether it may be written."""
    name = "disk.free"
    if usage.f_flag & os.ST_RDONLY:
        cure = f"a card that fails is mounted read-only by the kernel: look at dmesg, {_SD_CURE}"
        return Finding(name, "fail", f"the disk of {place} is read-only", cure)
    free, size = usage.f_bavail * usage.f_frsize, usage.f_blocks * usage.f_frsize
    said = f"{_size(free)} of {_size(size)} are free at {place}"
    if usage.f_files and not usage.f_favail:
        return Finding(name, "fail", f"no file can be made at {place}: its inodes are used up", "delete the many small files that fill it")
    if free < DISK_FAIL_BYTES:
        return Finding(name, "fail", said, "delete what is not needed, or use a larger disk")
    return Finding(name, "warn" if free < DISK_WARN_BYTES else "ok", said, "make room soon" if free < DISK_WARN_BYTES else "")


def disk_write(place: Path) -> Finding:
    """Write a small file as the agent does: it must be there after a power cut."""
    name = "disk.write"
    if not place.is_dir():
        return Finding(name, "fail", f"{place} is no folder", "name another --state")
    file = place / f"doctor-{os.getpid()}.tmp"
    began_s = time.monotonic()
    try:
        with file.open("wb") as stream:
            stream.write(os.urandom(65_536))
            stream.flush()
            os.fsync(stream.fileno())
    except PermissionError:
        return Finding(name, "unknown", f"this user may not write to {place}", "ask as root, or as the user of the service")
    except OSError as error:
        return Finding(name, "fail", f"{place}: {error.strerror or error}", "make room on the disk, or replace the card")
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
    took_s = time.monotonic() - began_s
    said = f"64 KiB are safe on the disk after {took_s:.2f} s"
    return Finding(name, "warn", said, "a card this slow is worn or busy") if took_s > SLOW_WRITE_S else Finding(name, "ok", said)


def card(root: Path) -> Finding:
    """Errors that the kernel has counted on the disks, and the wear that an eMMC reports."""
    name = "disk.card"
    looked = []
    for count in sorted((root / "sys/fs/ext4").glob("*/errors_count")):
        errors = _number(count)
        if errors:
            return Finding(name, "fail", f"the file system of {count.parent.name} had {errors:.0f} errors", f"fsck it; {_SD_CURE}")
        looked += [] if errors is None else ["ext4's errors"]
    for wear in sorted((root / "sys/block").glob("mmcblk*/device/pre_eol_info")):
        level = _number(wear, 16)
        if level is not None and level > 1:
            return Finding(name, "fail" if level > 2 else "warn", f"{wear.parts[-3]} says that it is near its end", _SD_CURE)
        looked += [] if not level else ["the card's wear"]
    lines = _kernel_log(root)
    troubled = [line for line in lines or () if _CARD_TROUBLE.search(line)]
    if troubled:
        return Finding(name, "fail", f"{len(troubled)} errors in the kernel's log, the last: {troubled[-1][:160]}", _SD_CURE)
    looked += [] if lines is None else ["the kernel's log"]
    if looked:
        return Finding(name, "ok", f"no errors ({', '.join(dict.fromkeys(looked))})")
    return Finding(name, "unknown", "nothing that counts errors can be read here", "as root, `dmesg` shows them")


def _kernel_log(root: Path) -> list[str] | None:
    """Its lines; None where it may not be read."""
    try:
        descriptor = os.open(root / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    lines: list[str] = []
    try:
        record = os.read(descriptor, 8192)
        while record:
            lines += record.decode(errors="replace").splitlines()
            record = b"" if len(lines) > 100_000 else _next_record(descriptor)
    except OSError:
        return lines or None
    finally:
        os.close(descriptor)
    return lines


def _next_record(descriptor: int) -> bytes:
    """The next of the kernel's records; nothing at their end."""
    while True:
        try:
            return os.read(descriptor, 8192)
        except BlockingIOError:
            return b""
        except BrokenPipeError:  # overwritten while we read: the next call goes on behind the gap
            continue


# ---- memory ------------------------------------------------------------------------------------------------------------------------


def memory(root: Path, tell: Tell) -> None:
    """What a training job could take now, and whether the kernel had to end processes."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text(root / "proc/meminfo") or "", re.MULTILINE))
    if "MemAvailable" not in fields or "MemTotal" not in fields:
        tell(Finding("memory.free", "unknown", "/proc/meminfo does not say"))
    else:
        spare = spare_bytes(1024 * int(fields["MemAvailable"]), root)
        said = f"{_size(spare)} to spare for training, of {_size(1024 * int(fields['MemTotal']))}"
        short = spare < MEMORY_WARN_BYTES
        state = "fail" if spare < MEMORY_FAIL_BYTES else "warn" if short else "ok"
        tell(Finding("memory.free", state, said, "end other programs, or raise MemoryMax= of the unit" if short else ""))  # type: ignore[arg-type]
    killed = re.search(r"^oom_kill (\d+)$", _text(root / "proc/vmstat") or "", re.MULTILINE)
    if killed is None:
        tell(Finding("memory.killed", "unknown", "/proc/vmstat does not say"))
    elif int(killed[1]):
        cure = "give the agent less (--memory-mb), or end other programs"
        tell(Finding("memory.killed", "warn", f"the kernel ended {killed[1]} processes for want of memory since the start", cure))
    else:
        tell(Finding("memory.killed", "ok", "no process was ended for want of memory"))


# ---- heat and power ----------------------------------------------------------------------------------------------------------------


def hottest(root: Path) -> tuple[str, float] | None:
    """(name, degrees Celsius) of the hottest of the thermal zones; None where none can be read."""
    with closing(Zones(root)) as zones:
        return max(zones.celsius().items(), key=lambda zone: zone[1], default=None)


def temperature(root: Path) -> Finding:
    """Whether the hottest of the thermal zones is too hot."""
    found = hottest(root)
    if found is None:
        return Finding("temperature", "unknown", "no thermal zone can be read")
    where, celsius = found
    said = f"{celsius:.0f} C at {where}"
    if celsius < HOT_C:
        return Finding("temperature", "ok", said)
    return Finding("temperature", "fail" if celsius >= TOO_HOT_C else "warn", said, "a heat sink, a fan, shade, or fewer --threads")


def throttling(root: Path) -> Finding:
    """Whether the board runs slower than it could, for want of current or for heat."""
    flags = pi_flags(root)
    if flags is not None:
        now = [word for bit, word in PI_FLAGS if flags >> bit & 1]
        before = [word for bit, word in PI_FLAGS if flags >> (16 + bit) & 1 and word not in now]
        cure = "use the board's own power supply and a short cable; cool it"
        if now:
            return Finding("throttling", "fail" if flags & 0b101 else "warn", f"now: {', '.join(now)}", cure)
        if before:
            return Finding("throttling", "warn", f"since the start: {', '.join(before)}", cure)
        return Finding("throttling", "ok", "none since the start")
    capped = []
    policies = sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*"))
    for policy in policies:
        allowed, possible = _number(policy / "scaling_max_freq"), _number(policy / "cpuinfo_max_freq")
        if allowed is not None and possible is not None and allowed < 0.95 * possible:
            capped.append(f"{policy.name} at {allowed / possible:.0%} of its frequency")
    if capped:
        return Finding("throttling", "warn", ", ".join(capped), "a power mode or heat caps it: nvpmodel on a Jetson, cpupower elsewhere")
    if any(_number(policy / "scaling_max_freq") for policy in policies):
        return Finding("throttling", "ok", "no core's frequency is capped")
    return Finding("throttling", "unknown", "this machine does not tell")


def power_sensor(root: Path) -> Finding:
    """What measures the board's power, if anything does."""
    found = []
    for hwmon in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        chip = (_text(hwmon / "name") or "").strip()
        if chip in (*CHIPS, "ina3221"):
            labels = [(_text(label) or "").strip() for label in sorted(hwmon.glob("in*_label"))]
            found.append(f"{chip} ({', '.join(labels)})" if labels else chip)
    found += ["intel-rapl (the package, not the wall)"] if list((root / "sys/class/powercap").glob("intel-rapl:*/energy_uj")) else []
    if not found and root == Path("/") and "_A current" in said_by("vcgencmd", "pmic_read_adc"):
        found.append("the Pi 5's power chip (estimated: without USB loads)")
    if found:
        return Finding("power.sensor", "ok", ", ".join(found))
    return Finding("power.sensor", "unknown", "none, so energy stays unmeasured", "an INA219 or INA260 on I2C measures it")


# ---- reading -----------------------------------------------------------------------------------------------------------------------


def _text(file: Path) -> str | None:
    try:
        if stat.S_ISREG(file.stat().st_mode):
            return file.read_text(errors="replace")
    except OSError:  # a sensor that sleeps gives EAGAIN
        pass
    return None


def _number(file: Path, base: int = 10) -> float | None:
    """The whole number in a file of sysfs; None when there is none."""
    try:
        return float(int((_text(file) or "").strip(), base))
    except ValueError:
        return None


def _size(count: float) -> str:
    """Bytes in words: "1.2 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
