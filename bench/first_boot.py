"""Do a gateway and a device become a fleet at their first boot, with no hand on either? Stock Debians with cloud-init stand for them.

The gateway's files come from `regrow image gateway`, with its wheels and .deb files, so that it needs no internet; its data go to an SSD,
an ext4 file system on a loop device. Its power fails in the middle of the installation. Then a person logs in as they would, by SSH, and
runs `regrow fleet add`; the device's files come from that claim by `regrow image pi`. When the device has trained, a release with a higher
version is staged, and when it trains with that, the gateway restarts, and then loses its power; the fleet must go on by itself. (What was
written before a cut is in the kernel, so that a cut is one for processes, not for disks.)

Each boots under systemd-nspawn in a network namespace of its own, with one cable between the two. Needs root, and of Debian: debootstrap,
systemd-container, iproute2, openssh-client, e2fsprogs. What only hardware has is not tried: radios (the access point's settings are given
to the cable: address, DHCP, names), cards, sensors, and the setting of a clock, which a container may not (chronyd runs with -x, and
fake-hwclock only keeps the time).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from containers import ROOT, SUITE, Board, Login, cable, check_programs, clock_in, fail, fetch_debs, flashed, said, ssd, text, unpack
from machine import write_result

from export.models import digits_mlp
from export.task import save_model

PACKAGES = (
    "systemd systemd-sysv systemd-resolved dbus cloud-init netplan.io openssh-server sudo "
    "python3 python3-venv iproute2 netbase ca-certificates"
)
GATEWAY_PACKAGES = f"{PACKAGES} network-manager dnsmasq-base systemd-timesyncd e2fsprogs"  # which Raspberry Pi OS brings
SYSTEM, PYTHON = "pi-os-trixie", "3.13"
DEVICE, GATEWAY, ADDRESS, NEW_VERSION = "pi-07", "gateway.internal", "10.42.0.1", "0.1.1"
REGROW = "sudo -u regrow /opt/regrow/bin/regrow"
RUNS = "/var/lib/regrow/runs"
PATIENCE_S = 300.0
TASK = """name = "first-boot"
model = "model.onnx"
[method]
name = "fedgmr"
ladder = [0.3, 1.0]
full_density_bps = 1e12
[training]
local_steps = 1000
[trigger]
kind = "all"
[fleet]
join_s = 0.0
[stop]
aggregations = 100000
[store]
keep_updates = true
"""
LOOK = r"""
import json, pathlib, stat, subprocess
def said(*words): return subprocess.run(words, capture_output=True, text=True).stdout.strip()
identity = next(pathlib.Path("/var/lib/private").glob("regrow-*/**/device.crt")).parent
print("FACTS " + json.dumps({
    "host_name": said("hostname"),
    "systemd": said("systemctl", "--version").split()[1],
    "cloud_init": said("cloud-init", "--version").split()[-1],
    "state": said("systemctl", "is-system-running"),
    "failed_units": [line.split()[0] for line in said("systemctl", "list-units", "--failed", "--plain", "--no-legend").splitlines()],
    "agent": said("systemctl", "is-active", "regrow-agent"),
    "version": said("/opt/regrow/bin/regrow", "--version"),
    "updater": said("systemctl", "show", "-P", "Result", "regrow-update"),
    "agent_restarts": int(said("systemctl", "show", "-P", "NRestarts", "regrow-agent")),
    "identity_modes": {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in sorted(identity.iterdir()) if path.is_file()},
    "claims_left": [str(path) for path in pathlib.Path("/boot").rglob("claim.json")],
    "logins_with_a_password": [line.split(":")[0] for line in open("/etc/shadow") if line.split(":")[1][:1] == "$"],
    "may_log_in_by_password": "passwordauthentication yes" in said("sshd", "-T").lower(),
    "listens": sorted({line.split()[3] for line in said("ss", "-Hltn").splitlines()}),
}))
"""
GATEWAY_LOOK = r"""
import json, pathlib, stat, subprocess
def said(*words): return subprocess.run(words, capture_output=True, text=True).stdout.strip()
fleet = pathlib.Path("/var/lib/regrow/runs/.gateway/fleet")
print(json.dumps({
    "host_name": said("hostname"),
    "state": said("systemctl", "is-system-running"),
    "failed_units": [line.split()[0] for line in said("systemctl", "list-units", "--failed", "--plain", "--no-legend").splitlines()],
    "gateway": said("systemctl", "is-active", "regrow-gateway"),
    "gateway_restarts": int(said("systemctl", "show", "-P", "NRestarts", "regrow-gateway")),
    "runs_as": said("systemctl", "show", "-P", "User", "regrow-gateway"),
    "exposure": said("systemd-analyze", "security", "--no-pager", "regrow-gateway").split(": ")[-1].split()[0],
    "version": said("/opt/regrow/bin/regrow", "--version"),
    "broker": said("mosquitto", "-h").splitlines()[0],
    "broker_of_debian": said("systemctl", "is-enabled", "mosquitto"),
    "chrony": said("systemctl", "is-active", "chrony"),
    "data_on": said("findmnt", "-no", "FSTYPE,LABEL", "/var/lib/regrow"),
    "fleet_modes": {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in sorted(fleet.glob("*.key"))},
    "logins_with_a_password": [line.split(":")[0] for line in open("/etc/shadow") if line.split(":")[1][:1] == "$"],
    "may_log_in_by_password": "passwordauthentication yes" in said("sshd", "-T").lower(),
    "listens": sorted({line.split()[3] for line in said("ss", "-Hltn").splitlines()}),
}))
"""
# What a device without a clock asks, and what it is told: stratum, seconds since 1900.
ASK_TIME = f"""
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.settimeout(5)
    s.sendto(bytes([0x23]) + bytes(47), ("{ADDRESS}", 123))
    answer = s.recv(48)
print(answer[1], int.from_bytes(answer[40:48], "big") / 2**32 - 2208988800)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "first_boot.json", help="where the JSON goes")
    parser.add_argument("--systems", type=Path, metavar="DIR", help="where the unpacked Debians and packages are kept for another time")
    parser.add_argument("--log", type=Path, metavar="FILE", help="where the two consoles' words go")
    options = parser.parse_args()
    check_programs()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is cleaned up
    started_s = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        systems = options.systems or folder / "systems"
        unpack(systems / "device", PACKAGES)
        unpack(systems / "gateway", GATEWAY_PACKAGES)
        fetch_debs(systems / "gateway", "mosquitto chrony fake-hwclock", systems / "debs")
        try:
            found = first_boot(stack, folder, systems)
        finally:
            if options.log is not None:
                options.log.write_text("".join(text(folder / f"{name}.log") for name in ("gateway", "device")))
    result = {"command": "sudo .venv/bin/python bench/first_boot.py", **found, "seconds_in_all": round(time.monotonic() - started_s)}
    write_result(options.out, result)
    print(json.dumps(result, indent=1))


def regrow(folder: Path, *words: str) -> str:
    return said(sys.executable, "-m", "cli.main", *words, cwd=folder)


# ---- the gateway -----------------------------------------------------------------------------------------------------------------------


def gateway_card(folder: Path, debs: Path) -> Path:
    """What `regrow image gateway` writes, with the cable in the place of the radio."""
    (folder / "task").mkdir()
    (folder / "task" / "task.toml").write_text(TASK)
    save_model(digits_mlp(1), folder / "task" / "model.onnx")
    (folder / "passphrase").write_text("correct horse battery\n")
    wheels = ["image", "wheels", "--python", PYTHON, "--architecture", os.uname().machine]
    regrow(folder, *wheels, "--role", "gateway", "--out", "gateway-wheels")
    regrow(folder, *wheels, "--out", "wheels")
    card = folder / "gateway-card"
    words = ["--fleet-name", "field", "--task", "task", "--access-point", "Fleet", "--country", "DE", "--wifi-passphrase", "passphrase"]
    words += [
        "--architecture",
        os.uname().machine,
        "--ssd",
        "regrow-data",
        "--ssh-key",
        "key.pub",
        "--wheels",
        "gateway-wheels",
        "--debs",
        str(debs),
        "--out",
        str(card),
    ]
    regrow(folder, "image", "gateway", *words)
    point = card / "regrow" / "access-point.nmconnection"
    wired = point.read_text().replace("type=wifi", "type=ethernet").replace("wlan0", "lan0")
    point.write_text(re.sub(r"\[wifi(-security)?\]\n(.+\n)*\n", "", wired))
    return card


def gateway_boots(board: Board, person: Login, seconds: dict[str, float]) -> None:
    """Power on, a power cut in the middle of the installation, and power on again, until the service runs."""
    board.shows("regrow-gateway.service")
    # As a radio that nobody has told of a network, the cable waits for its settings.
    (board.root / "etc/NetworkManager/conf.d/cable.conf").write_text("[main]\nno-auto-default=*\n")
    drop_in = board.root / "etc/systemd/system/chrony.service.d"
    drop_in.mkdir(parents=True)
    (drop_in / "container.conf").write_text("[Unit]\nConditionCapability=\n[Service]\nExecStart=\nExecStart=!/usr/sbin/chronyd -x -F 1\n")
    drop_in = board.root / "etc/systemd/system/fake-hwclock-load.service.d"
    drop_in.mkdir(parents=True)
    (drop_in / "container.conf").write_text("[Unit]\nConditionCapability=CAP_SYS_TIME\n")
    print("booting the gateway", flush=True)
    board.power_on()
    board.wait(lambda: (board.root / "opt/regrow/a/bin").is_dir(), PATIENCE_S)
    board.cut()
    print("its power failed during the installation; booting it again", flush=True)
    began_s = time.monotonic()
    board.power_on()
    board.wait(lambda: person.run("systemctl is-active regrow-gateway").stdout == "active\n", PATIENCE_S)
    seconds["gateway_power_on_to_serving"] = round(time.monotonic() - began_s, 1)


# ---- the device ------------------------------------------------------------------------------------------------------------------------


def device_card(folder: Path, person: Login) -> Path:
    """A claim from the gateway, and what `regrow image pi` writes of it."""
    print(person.says(f"{REGROW} fleet add {DEVICE} --runs {RUNS} --out /var/lib/regrow/claims"), end="", flush=True)
    claim = f"/var/lib/regrow/claims/{DEVICE}.claim.json"
    (folder / f"{DEVICE}.claim.json").write_text(person.says(f"sudo cat {claim} && sudo rm {claim}"))
    rng = np.random.default_rng(1)
    patterns, y = rng.standard_normal((10, 64)), rng.integers(0, 10, 300)
    np.savez(folder / "samples.npz", x=(patterns[y] + rng.standard_normal((300, 64))).astype(np.float32), y=y)
    card = folder / "device-card"
    words = [
        "--os",
        SYSTEM,
        "--architecture",
        os.uname().machine,
        "--ssh-key",
        "key.pub",
        "--wheels",
        "wheels",
        "--data",
        "samples.npz",
        "--out",
        str(card),
    ]
    regrow(folder, "image", "pi", "--device", DEVICE, *words)
    return card


def leave_a_look(board: Board) -> None:
    """What a person would look at afterwards, printed to the console when the new version has proved itself; it changes nothing."""
    (board.root / "root/look.py").write_text(LOOK)
    (board.root / "etc/systemd/system/look.service").write_text(
        "[Unit]\nAfter=cloud-final.service\n[Service]\nType=oneshot\nStandardOutput=journal+console\n"
        'ExecStart=/bin/sh -c "until [ $(readlink /opt/regrow/good) = b ]; do sleep 1; done; '
        'python3 /root/look.py"\n'
        "[Install]\nWantedBy=cloud-init.target\n"
    )
    said("systemctl", "--root", str(board.root), "enable", "look")
    board.shows("regrow-agent.service")


def newer_wheel(folder: Path) -> Path:
    """This clone's wheel under a higher version."""
    for room in ("regrow", "edge_agent", "broker_server", "export", "testbed", "cli", "deploy"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    project = (ROOT / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(re.sub(r'^version = ".*"$', f'version = "{NEW_VERSION}"', project, count=1, flags=re.MULTILINE))
    said(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder / "out"), str(folder))
    (wheel,) = (folder / "out").glob("regrow-*.whl")
    return wheel


def write_data(path: Path) -> None:
    rng = np.random.default_rng(1)
    patterns, y = rng.standard_normal((10, 64)), rng.integers(0, 10, 300)
    np.savez(path, x=(patterns[y] + rng.standard_normal((300, 64))).astype(np.float32), y=y)


# ---- the whole -------------------------------------------------------------------------------------------------------------------------


def first_boot(stack: ExitStack, folder: Path, systems: Path) -> dict[str, Any]:
    near, far = stack.enter_context(cable("lan0", "eth0"))
    disk = stack.enter_context(ssd(folder / "ssd.img", "regrow-data"))
    gateway = Board(folder / "gateway", near, "lan0", folder / "gateway.log", disk)
    device = Board(folder / "device", far, "eth0", folder / "device.log", [])
    for board in (gateway, device):
        stack.callback(board.power_off)
    said("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    person, seconds = Login(far, folder / "key", "pi", ADDRESS), dict[str, float]()

    print("making the gateway's card", flush=True)
    flashed(systems / "gateway", gateway_card(folder, systems / "debs"), gateway.root)
    said("ip", "-n", far, "address", "add", "10.42.0.200/24", "dev", "eth0")  # the person's own machine, until the device takes its place
    said("ip", "-n", far, "link", "set", "eth0", "up")
    gateway_boots(gateway, person, seconds)

    print("making the device's card", flush=True)
    flashed(systems / "device", device_card(folder, person), device.root)
    leave_a_look(device)
    print("booting the device", flush=True)
    booted_s, booted = time.monotonic(), time.time()
    device.power_on()
    device.wait(lambda: " aggregated version=2" in text(gateway.console), PATIENCE_S)
    seconds["device_power_on_to_second_aggregation"] = round(time.monotonic() - booted_s, 1)
    times = timeline(text(gateway.console), booted)
    seconds["staged_to_trained_with_version_2"] = update(folder, person, gateway, device)
    before = look(person)
    seconds["gateway_restart_to_next_aggregation"] = restarted(person, gateway, orderly=True)
    seconds["gateway_power_cut_to_next_aggregation"] = restarted(person, gateway, orderly=False)
    return {
        "system": f"Debian {SUITE}, stands for {SYSTEM}",
        "seconds": seconds,
        "device_timeline_s": times,
        "gateway_at_first": before,
        "gateway_at_last": look(person),
        "time_for_devices": time_told(far),
        "device": json.loads(re.findall(r"FACTS (\{.*\})", text(device.console))[-1]),
        "fleet": json.loads(person.says(f"{REGROW} fleet show {DEVICE} --runs {RUNS} --json"))["state"],
        "verify": verified(person),
        "gateway_without_its_ssd": without_its_ssd(person, gateway),
    }


def update(folder: Path, person: Login, gateway: Board, device: Board) -> float:
    """Bring version 2 out from the gateway; seconds until the device has trained with it."""
    print(f"staging version {NEW_VERSION}", flush=True)
    wheel = newer_wheel(folder / "newer")
    person.copy(wheel, folder / "wheels")
    person.says(f"sudo mv {wheel.name} wheels /srv")  # where the service's user may read
    print(
        person.says(f"{REGROW} fleet update --runs {RUNS} --wheel /srv/{wheel.name} --wheels /srv/wheels --percent 100"), end="", flush=True
    )
    staged_s = time.monotonic()
    device.wait(lambda: "said=healthy" in text(gateway.console), PATIENCE_S)
    took_s = round(time.monotonic() - staged_s, 1)
    device.wait(lambda: "FACTS " in text(device.console), 60)
    return took_s


def restarted(person: Login, gateway: Board, *, orderly: bool) -> float:
    """Restart the gateway as a person would, or cut its power; seconds until the fleet has a next version."""
    print("restarting the gateway" if orderly else "the gateway's power fails", flush=True)
    told, began_s = len(text(gateway.console)), time.monotonic()
    if orderly:
        person.run("sudo systemctl reboot")
        gateway.wait_for_end(PATIENCE_S)  # systemd-nspawn ends, for whoever runs it to start it again
    else:
        gateway.cut()
    gateway.power_on()
    gateway.wait(lambda: " aggregated version=" in text(gateway.console)[told:].partition("going on with")[2], PATIENCE_S)
    return round(time.monotonic() - began_s, 1)


def look(person: Login) -> dict[str, Any]:
    """What a person sees on the gateway, and what its doctor says there; ends this script where something failed."""
    facts: dict[str, Any] = json.loads(person.says(f"echo {shlex.quote(GATEWAY_LOOK)} | sudo python3 -"))
    sums = person.says(f"sudo sh -c 'sha256sum {RUNS}/.gateway/fleet/ca.crt {RUNS}/.gateway/fleet/broker.crt'").split()[::2]
    findings = json.loads(person.run(f"{REGROW} doctor --runs {RUNS} --json").stdout)
    told = {state: [f"{found['check']}: {found['said']}" for found in findings if found["state"] == state] for state in ("fail", "warn")}
    if told["fail"]:
        fail(f"the gateway's doctor: {told['fail']}")
    by_state = {state: sum(found["state"] == state for found in findings) for state in ("ok", "warn", "unknown", "fail")}
    return {**facts, "certificates": [digest[:16] for digest in sums], "doctor": by_state, "doctor_warns": told["warn"]}


def time_told(network: str) -> dict[str, float]:
    """What the gateway's clock says to a device that asks."""
    stratum, now = said("ip", "netns", "exec", network, sys.executable, "-c", ASK_TIME).split()
    return {"stratum": int(stratum), "differs_s": round(float(now) - time.time(), 1)}


def verified(person: Login) -> str:
    """Whether the run's log, through the restart, gives the model that the gateway has."""
    person.says("sudo systemctl stop regrow-gateway")
    runs = person.says(f"sudo find {RUNS} -mindepth 2 -maxdepth 2 -name log.sqlite").split()
    if len(runs) != 1:
        fail(f"expected one run, found {runs}")
    return person.says(f"{REGROW} verify {Path(runs[0]).parent}").strip().splitlines()[-1].partition(": ")[2]


def without_its_ssd(person: Login, gateway: Board) -> dict[str, Any]:
    """The board without the disk: somebody can log in, and no second fleet begins on the card."""
    print("booting the gateway without its SSD", flush=True)
    gateway.power_off()
    gateway.plugged = []
    gateway.power_on()
    asked = ("is-system-running --wait", "is-active regrow-gateway")
    gateway.wait(lambda: person.run("true").returncode == 0, PATIENCE_S)
    state, service = (person.run(f"systemctl {words}").stdout.strip() for words in asked)
    left = person.says("sudo ls -A /var/lib/regrow").split()
    if service == "active" or left:
        fail(f"without its SSD the gateway is {service}, and wrote {left} on the card")
    return {"state": state, "gateway": service, "written_on_the_card": left}


def timeline(log: str, booted: float) -> dict[str, float]:
    """Seconds from power-on to what the gateway's log tells, each the first time."""
    found: dict[str, float] = {}
    words = {"enrolled": " enrolled from ", "joined": " joined ", "first update": " update ", "aggregated": " aggregated "}
    day = time.strftime("%Y-%m-%d ", time.localtime(booted))
    for line in log.splitlines():
        clock = clock_in(line)
        for name, word in words.items():
            if name not in found and clock and word in f"{line} ":
                found[name] = round(time.mktime(time.strptime(day + clock, "%Y-%m-%d %H:%M:%S")) - booted)
    return found


if __name__ == "__main__":
    main()
