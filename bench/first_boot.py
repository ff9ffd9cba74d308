"""Does a board join its fleet at its first boot, and take version 2, with no hand on it? A stock Debian with cloud-init stands for it.

Makes a fleet, a claim and the files of `regrow image pi`; unpacks Debian 13 with systemd, cloud-init, netplan and no more; puts the files
on its boot partition and boots it under systemd-nspawn, in a network namespace of its own. Its only neighbour is a gateway in another one:
mosquitto with mutual TLS, a coordinator, and a dnsmasq configured as `regrow image gateway` does, for its address and the gateway's name.
When the device has trained, a release with a higher version is staged; it ends when the device trains with that. Needs root, and of Debian:
debootstrap, systemd-container, dnsmasq-base, iproute2, mosquitto. No board: what only hardware has (Wi-Fi, a card, sensors) is not tried.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_result

from broker_server.stopping import ending_with_parent
from broker_server.store import Store
from export.models import digits_mlp
from export.task import save_model
from regrow.records import Accepted, from_record

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "dnsmasq": "dnsmasq-base",
    "ip": "iproute2",
    "mosquitto": "mosquitto",
}
PACKAGES = (
    "systemd systemd-sysv systemd-resolved dbus cloud-init netplan.io openssh-server sudo "
    "python3 python3-venv iproute2 netbase ca-certificates"
).replace(" ", ",")
SUITE, SYSTEM, PYTHON = "trixie", "pi-os-trixie", "3.13"
DEVICE, GATEWAY, ADDRESS, NEW_VERSION = "pi-07", "gateway.internal", "10.42.0.1", "0.1.1"
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
import json, pathlib, pwd, stat, subprocess
def said(*words): return subprocess.run(words, capture_output=True, text=True).stdout.strip()
identity = next(pathlib.Path("/var/lib/private").glob("regrow-*/**/device.crt")).parent
print("FACTS " + json.dumps({
    "host_name": said("hostname"),
    "systemd": said("systemctl", "--version").split()[1],
    "cloud_init": said("cloud-init", "--version").split()[-1],
    "state": said("systemctl", "is-system-running"),
    "failed_units": said("systemctl", "list-units", "--failed", "--plain", "--no-legend").split()[::5],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "first_boot.json", help="where the JSON goes")
    parser.add_argument("--system", type=Path, metavar="DIR", help="where the unpacked Debian is kept for another time")
    parser.add_argument("--log", type=Path, metavar="FILE", help="where the console's and the gateway's words go")
    options = parser.parse_args()
    if os.geteuid():
        fail("root is needed: namespaces, and a system that boots")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None and not Path("/usr/sbin", program).exists():
            fail(f"{program} is not installed here; on Debian: apt-get install {package}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is cleaned up
    started_s = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        system = options.system or folder / "debian"
        unpack(system)
        console, gateway_log = folder / "console.log", folder / "gateway.log"
        try:
            found = first_boot(stack, folder, system, console, gateway_log)
        finally:
            if options.log is not None:
                options.log.write_text("".join(path.read_text(errors="replace") for path in (gateway_log, console) if path.exists()))
    result = {"command": "sudo .venv/bin/python bench/first_boot.py", **found, "seconds_in_all": round(time.monotonic() - started_s)}
    write_result(options.out, result)
    print(json.dumps(result, indent=1))


def fail(why: str) -> None:
    """End with one line."""
    sys.exit(f"first_boot: {why}")


def said(*words: str, cwd: Path | None = None) -> str:
    """Standard output of a command; ends this script with what was said where it fails."""
    done = subprocess.run(words, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def regrow(folder: Path, *words: str) -> str:
    return said(sys.executable, "-m", "cli.main", *words, cwd=folder)


def unpack(system: Path) -> None:
    """A stock Debian that reads cloud-init from its boot partition, as Raspberry Pi OS does."""
    if (system / "etc" / "os-release").is_file():
        return
    print(f"unpacking Debian {SUITE}", flush=True)
    said("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(system))
    (system / "etc/cloud/cloud.cfg.d/99-boot-partition.cfg").write_text(
        "datasource_list: [NoCloud]\ndatasource:\n  NoCloud:\n    seedfrom: file:///boot/firmware/\n"
    )
    said("systemctl", "--root", str(system), "enable", "systemd-networkd", "systemd-resolved")
    (system / "etc/hostname").write_text("raspberrypi\n")
    for key in (system / "etc/ssh").glob("ssh_host_*"):
        key.unlink()


# ---- the two namespaces ----------------------------------------------------------------------------------------------------------------


@contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """(gateway's, board's) network namespaces, joined by one cable; nothing else is reachable from either."""
    hub, board = f"rg{os.getpid()}hub", f"rg{os.getpid()}pi"
    try:
        for name in (hub, board):
            said("ip", "netns", "add", name)
            said("ip", "-n", name, "link", "set", "lo", "up")
        said("ip", "link", "add", "lan0", "netns", hub, "type", "veth", "peer", "name", "eth0", "netns", board)
        said("ip", "-n", hub, "address", "add", f"{ADDRESS}/24", "dev", "lan0")
        said("ip", "-n", hub, "link", "set", "lan0", "up")
        yield hub, board
    finally:
        for name in (hub, board):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextmanager
def running(words: list[str], log: Path, cwd: Path, patience_s: float = 30.0) -> Iterator[subprocess.Popen[bytes]]:
    """A child that ends with the block."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            ending_with_parent([str(shutil.which(words[0])), *words[1:]]),
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


# ---- the boot --------------------------------------------------------------------------------------------------------------------------


def first_boot(stack: ExitStack, folder: Path, system: Path, console: Path, gateway_log: Path) -> dict[str, Any]:
    hub, board = stack.enter_context(namespaces())
    inside = ["ip", "netns", "exec", hub]
    print("making a fleet and an image", flush=True)
    make_task(folder / "task")
    regrow(folder, "fleet", "init", "field", "--host", GATEWAY, "--host", ADDRESS)
    regrow(folder, "fleet", "add", DEVICE)
    write_data(folder / "samples.npz")
    said("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    regrow(folder, "image", "wheels", "--python", PYTHON, "--architecture", os.uname().machine, "--out", "wheels")
    card = folder / "boot"
    words = ["--os", SYSTEM, "--ssh-key", "key.pub", "--wheels", "wheels", "--data", "samples.npz", "--out", str(card)]
    regrow(folder, "image", "pi", "--device", DEVICE, *words)
    copy = folder / "board"
    said("cp", "-a", "--reflink=auto", str(system), str(copy))
    shutil.copytree(card, copy / "boot" / "firmware", dirs_exist_ok=True)
    leave_a_look(copy)

    dns = ["--interface=lan0", "--bind-interfaces", "--no-resolv", "--no-hosts", "--pid-file=", f"--dhcp-leasefile={folder / 'leases'}"]
    names = ["--dhcp-range=10.42.0.10,10.42.0.100,1h", f"--address=/{GATEWAY}/{ADDRESS}", "--user=root"]
    stack.enter_context(running([*inside, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", *dns, *names], gateway_log, folder))
    serve = [sys.executable, "-m", "cli.main", "--log", "serve", "task", "--host", ADDRESS, "--plain", "--run", "first"]
    gateway = stack.enter_context(running([*inside, *serve], gateway_log, folder))
    wait(lambda: "devices find" in text(gateway_log) or "8883" in text(gateway_log), 60, gateway, gateway_log)

    print("booting the board", flush=True)
    booted_s, booted = time.monotonic(), time.time()
    nspawn = ["systemd-nspawn", "--quiet", "--directory", str(copy), "--boot", "--register=no", "--keep-unit"]
    nspawn += ["--capability=CAP_NET_ADMIN"]  # as systemd-networkd needs
    container = stack.enter_context(running([*nspawn, f"--network-namespace-path=/run/netns/{board}"], console, folder, 60.0))
    wait(lambda: " aggregated version=2" in text(gateway_log), PATIENCE_S, container, console)
    took_s = round(time.monotonic() - booted_s, 1)
    print(f"second aggregation {took_s} s after power-on; staging version {NEW_VERSION}", flush=True)
    wheel = newer_wheel(folder / "newer")
    regrow(folder, "fleet", "update", "--wheel", str(wheel), "--wheels", "wheels", "--percent", "100")
    staged_s = time.monotonic()
    wait(lambda: "said=healthy" in text(gateway_log), PATIENCE_S, container, console)
    updated_s = round(time.monotonic() - staged_s, 1)
    wait(lambda: "FACTS " in text(console), 60, container, console)
    gateway.terminate()
    gateway.wait(60)
    (facts,) = (json.loads(match) for match in re.findall(r"FACTS (\{.*\})", text(console))[-1:])
    with Store.open(folder / "runs" / "first") as store:
        accepted = [entry for _, record in store.replay() if isinstance(entry := from_record(record), Accepted)]
    checks = regrow(folder, "verify", "runs/first").strip().splitlines()[-1]
    return {
        "system": f"Debian {SUITE}, stands for {SYSTEM}",
        "power_on_to_second_aggregation_s": took_s,
        "staged_to_trained_with_version_2_s": updated_s,
        "timeline_s": timeline(text(gateway_log), booted),
        "updates_accepted": len(accepted),
        "verify": checks.partition(": ")[2],
        "board": facts,
        "fleet": json.loads(regrow(folder, "fleet", "show", DEVICE, "--json"))["state"],
    }


def make_task(folder: Path) -> None:
    folder.mkdir()
    (folder / "task.toml").write_text(TASK)
    save_model(digits_mlp(1), folder / "model.onnx")


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


def leave_a_look(board: Path) -> None:
    """What a person would look at afterwards, printed to the console when the new version has proved itself; it changes nothing."""
    (board / "root/look.py").write_text(LOOK)
    (board / "etc/systemd/system/look.service").write_text(
        "[Unit]\nAfter=cloud-final.service\n[Service]\nType=oneshot\nStandardOutput=journal+console\n"
        'ExecStart=/bin/sh -c "until [ $(readlink /opt/regrow/good) = b ]; do sleep 1; done; '
        'python3 /root/look.py"\n'
        "[Install]\nWantedBy=cloud-init.target\n"
    )
    said("systemctl", "--root", str(board), "enable", "look")
    (board / "etc/systemd/system/regrow-agent.service.d").mkdir()
    (board / "etc/systemd/system/regrow-agent.service.d/console.conf").write_text("[Service]\nStandardError=journal+console\n")


def wait(over: Any, patience_s: float, child: subprocess.Popen[bytes], log: Path) -> bool:
    """Until it is over; ends this script when the child ends or it takes too long."""
    deadline_s = time.monotonic() + patience_s
    while not over():
        if child.poll() is not None and not over():
            fail(f"ended with {child.returncode}: {text(log).splitlines()[-8:]}")
        if time.monotonic() > deadline_s:
            fail(f"nothing after {patience_s:.0f} s: {text(log).splitlines()[-8:]}")
        time.sleep(0.2)
    return True


def timeline(log: str, booted: float) -> dict[str, float]:
    """Seconds from power-on to what the gateway's log tells, each the first time."""
    found: dict[str, float] = {}
    words = {"enrolled": " enrolled from ", "joined": " joined ", "first update": " update ", "aggregated": " aggregated "}
    for line in log.splitlines():
        clock = re.search(r"(\d{4}-\d\d-\d\d )?(\d\d:\d\d:\d\d)", line)
        for name, word in words.items():
            if name not in found and clock and word in f"{line} ":
                at = time.mktime(time.strptime(time.strftime("%Y-%m-%d ", time.localtime(booted)) + clock[2], "%Y-%m-%d %H:%M:%S"))
                found[name] = round(at - booted)
    return found


def text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


if __name__ == "__main__":
    main()
