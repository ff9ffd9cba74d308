"""`regrow image`: what makes a board a device."""

from __future__ import annotations

import argparse
import getpass
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from broker_server.durable import disk_failed
from broker_server.fleet import boards, images
from broker_server.fleet.boards import PYTHONS, SYSTEMS, System, pythons
from broker_server.fleet.gateway_image import GatewayImage, write_gateway
from broker_server.fleet.jetson_image import base_of, write_jetson
from regrow.errors import UsageError

STAGE = ".regrow-image"
BOOT_FILES = ("cmdline.txt", "config.txt", "user-data")


def pi(options: argparse.Namespace) -> int:
    """Write what goes on a Pi's boot partition."""
    host = _host(options, options.device)
    image = _image(options, host)
    left = ""
    with _whole(options.out) as out:
        _payload(options, image, out / "regrow")
        if host.system.form == "cloud-init":
            images.write_cloud_init(host, image.claim, out)
        else:
            left = images.write_first_run(host, out, options.out)
    print(f"{options.out}: the boot partition of {host.name}, for {host.system.title}, Python {host.system.python}; {_size(options.out)}")
    print(left or "put its contents on the boot partition of the flashed card, then power the board on")
    return 0


def gateway(options: argparse.Namespace) -> int:
    """Write what goes on the boot partition of a Pi that is the gateway."""
    host = _host(options, options.name)
    if host.system.form != "cloud-init":
        raise UsageError(f"--os {host.system.name}: a gateway needs one that reads cloud-init, such as pi-os-trixie")
    boards.lock_of(host.system.python, options.architecture, "gateway")  # before anything is written
    point = None
    if options.access_point is not None:
        point = images.wifi_of(options.access_point, _passphrase(options.wifi_passphrase), options.country)
    image = GatewayImage(host, options.fleet_name, options.task, point, tuple(options.host), options.ssd)
    with _whole(options.out) as out:
        instance = write_gateway(image, out / "regrow", options.debs)
        print("collecting the wheels", flush=True)
        images.collect_wheels(host.system, out / "regrow" / "wheels", options.wheels, options.wheel, options.architecture, "gateway")
        images.write_cloud_init(host, instance, out)
    print(f"{options.out}: the boot partition of the gateway {host.name}, for {host.system.title}; {_size(options.out)}")
    if options.debs is None:
        print("its first boot needs the internet for mosquitto, chrony and fake-hwclock; --debs DIR puts their .deb files into the image")
    return 0


def generic(options: argparse.Namespace) -> int:
    """Write one installer script."""
    system = replace(SYSTEMS["generic"], python=options.python or "")
    if options.wheels is None and not system.python:
        raise UsageError(f"--python X.Y of the machines, one of {', '.join(PYTHONS)}, or --wheels DIR with their wheels")
    image = _image(options, images.Host(system, options.device))
    path = options.out / f"install-{options.device}.sh"
    with _whole(options.out) as out:
        _payload(options, image, out / "regrow")
        images.write_script(out / "regrow", out / path.name)
    print(f"{path}: copy it to {options.device} over a channel that you trust and run it there as root; {_size(path)}")
    return 0


def jetson(options: argparse.Namespace) -> int:
    """Write a Jetson's container."""
    image = _image(options, images.Host(SYSTEMS["jetpack-6"], options.device))
    data, base = Path(options.data), options.base or base_of(options.jetpack)
    with _whole(options.out) as out:
        write_jetson(image, base, options.torch, out, data if data.is_file() else None)
        print("collecting the wheels", flush=True)
        images.collect_wheels(image.host.system, out / "wheels", options.wheels, options.wheel, boards.BOARDS)
    print(f"{options.out}: copy it to the flashed Jetson and run `sudo sh install.sh` in it; {_size(options.out)}")
    return 0


def wifi(options: argparse.Namespace) -> int:
    """Write a network onto a boot partition."""
    if not (options.out / "regrow").is_dir():
        raise UsageError(f"--out {options.out}: no boot partition that `regrow image pi` wrote to; mount the card's first partition")
    network = images.wifi_of(options.ssid, _passphrase(options.wifi_passphrase), options.country)
    images.write_wifi(network, options.out / "regrow" / "wifi")
    print(f"{options.out}: the device takes {options.ssid} over at its next boot")
    return 0


def wheels(options: argparse.Namespace) -> int:
    """Download a wheelhouse."""
    with _whole(options.out, any_folder=True) as out:
        boards.download(options.python, out, options.architecture, options.role)
    found = len(list(options.out.glob("*.whl")))
    print(f"{options.out}: {found} wheels, Python {options.python}, {options.architecture}; {_size(options.out)}")
    return 0


def lock(options: argparse.Namespace) -> int:
    """Check the locks against the package index, or write them."""
    for role, architecture in ((role, architecture) for role in boards.WANTED for architecture in boards.ARCHITECTURES):
        for python in [options.python] if options.python else pythons(role):
            if options.write:
                path = boards.lock_path(python, architecture, role)
                path.write_text(boards.resolve(python, architecture, role))
                print(f"{path} written", flush=True)
            else:
                found = boards.check_lock(python, architecture, role)
                print(f"{role}, Python {python}, {architecture}: {' '.join(found)}", flush=True)
    return 0


def systems(_: argparse.Namespace) -> int:
    """Print the matrix."""
    for system in SYSTEMS.values():
        python = f"Python {system.python}" if system.python else "Python 3.10 to 3.13"
        print(f"{system.name:15} {system.title}; {system.boards}; {python}; {system.form}. Tried: {system.tried}")
    return 0


def _system(name: str) -> System:
    found = {key: system for key, system in SYSTEMS.items() if system.form in ("cloud-init", "firstrun")}
    if name not in found:
        raise UsageError(f"--os {name!r}: one of {', '.join(found)}")
    return found[name]


def _host(options: argparse.Namespace, name: str) -> images.Host:
    wifi = None
    if options.wifi is not None:
        wifi = images.wifi_of(options.wifi, _passphrase(options.wifi_passphrase), options.country)
    keys = images.ssh_keys_of(options.ssh_key) if options.ssh_key is not None else ()
    return images.Host(_system(options.os), name, wifi, options.user, keys, options.timezone)


def _image(options: argparse.Namespace, host: images.Host) -> images.Image:
    claim: Path = options.claim or Path(f"{options.device}.claim.json")
    if not claim.is_file():
        raise UsageError(f"{claim} is not there: `regrow fleet add {options.device}` writes it")
    data = Path(options.data)
    if not data.is_file() and not data.is_absolute() and ":" not in options.data:
        raise UsageError(f"--data {options.data}: no such file here; a path on the device begins with /")
    where = f"/srv/regrow/{data.name}" if data.is_file() else options.data
    return images.Image(host, claim.read_bytes(), where, options.agent_options)


def _payload(options: argparse.Namespace, image: images.Image, folder: Path) -> None:
    data = Path(options.data)
    images.write_payload(image, folder, data if data.is_file() else None)
    print("collecting the wheels", flush=True)
    images.collect_wheels(image.host.system, folder / "wheels", options.wheels, options.wheel, options.architecture)


@contextmanager
def _whole(out: Path, *, any_folder: bool = False) -> Iterator[Path]:
    """A folder whose contents take their places in `out` when the block ends; when it fails nothing of it stays, and no folder made for it.

    Raises:
        LocalError: `out` has other things in it, and is no boot partition, or cannot be written.
    """
    stage = out / STAGE
    made = next((folder for folder in reversed((out, *out.parents)) if not folder.exists()), stage)
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o777 if any_folder else 0o700)
        _rid(stage)  # of a command that was killed
        boot = any((out / name).exists() for name in BOOT_FILES)
        if any(out.iterdir()) and not (boot or any_folder):
            raise UsageError(f"--out {out}: neither empty nor a boot partition; name a new folder")
        stage.mkdir(mode=0o777 if any_folder else 0o700)
        yield stage
        if not (boot or any_folder):
            with suppress(PermissionError):  # of a file system without owners
                out.chmod(0o700)  # an empty folder that was there
        for entry in sorted(stage.iterdir()):
            _rid(out / entry.name)
            entry.replace(out / entry.name)
        stage.rmdir()
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError):
            raise disk_failed(f"--out {out} was not written", error, out) from error
        raise


def _rid(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _passphrase(path: Path | None) -> str:
    if path is None:
        if not sys.stdin.isatty():
            raise UsageError("--wifi-passphrase FILE: the Wi-Fi passphrase cannot be asked for here")
        return getpass.getpass("Wi-Fi passphrase: ")
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    return data.decode(errors="replace").strip("\r\n")  # what is not UTF-8 is refused with all else that is not ASCII


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.0f} MB"
