"""`regrow image`: what makes a board a device."""

from __future__ import annotations

import argparse
import getpass
import sys
from dataclasses import replace
from pathlib import Path

from broker_server.fleet import boards, images
from broker_server.fleet.boards import PYTHONS, SYSTEMS, System
from regrow.errors import LocalError


def pi(options: argparse.Namespace) -> int:
    """Write what goes on a Pi's boot partition."""
    system = _system(options.os)
    wifi = None
    if options.wifi is not None:
        wifi = images.wifi_of(options.wifi, _passphrase(options.wifi_passphrase), options.country)
    image = replace(
        _image(options, system),
        wifi=wifi,
        user=options.user,
        ssh_keys=images.ssh_keys_of(options.ssh_key) if options.ssh_key is not None else (),
        timezone=options.timezone,
    )
    _check_out(options.out)
    _payload(options, image, options.out / "regrow")
    left = ""
    if system.form == "cloud-init":
        images.write_cloud_init(image, options.out)
    else:
        left = images.write_first_run(image, options.out)
    print(f"{options.out}: the boot partition of {image.device}, for {system.title}, Python {system.python}; {_size(options.out)}")
    print(left or "put its contents on the boot partition of the flashed card, then power the board on")
    return 0


def generic(options: argparse.Namespace) -> int:
    """Write one installer script."""
    system = replace(SYSTEMS["generic"], python=options.python or "")
    if options.wheels is None and not system.python:
        raise LocalError(f"--python X.Y of the machines, one of {', '.join(PYTHONS)}, or --wheels DIR with their wheels")
    image = _image(options, system)
    _check_out(options.out)
    payload = options.out / "regrow"
    _payload(options, image, payload, options.architecture)
    path = options.out / f"install-{image.device}.sh"
    images.write_script(payload, path)
    print(f"{path}: copy it to {image.device} over a channel that you trust and run it there as root; {_size(path)}")
    return 0


def wifi(options: argparse.Namespace) -> int:
    """Write a network onto a boot partition."""
    if not (options.out / "regrow").is_dir():
        raise LocalError(f"--out {options.out}: no boot partition that `regrow image pi` wrote to; mount the card's first partition")
    network = images.wifi_of(options.ssid, _passphrase(options.wifi_passphrase), options.country)
    images.write_wifi(network, options.out / "regrow" / "wifi")
    print(f"{options.out}: the device takes {options.ssid} over at its next boot")
    return 0


def wheels(options: argparse.Namespace) -> int:
    """Download a wheelhouse."""
    options.out.mkdir(parents=True, exist_ok=True)
    boards.download(options.python, options.out, options.architecture)
    print(
        f"{options.out}: {len(list(options.out.glob('*.whl')))} wheels for Python {options.python} on {options.architecture}; {_size(options.out)}"
    )
    return 0


def lock(options: argparse.Namespace) -> int:
    """Check the locks against the package index, or write them."""
    for python in [options.python] if options.python else PYTHONS:
        for architecture in boards.ARCHITECTURES:
            if options.write:
                path = boards.lock_path(python, architecture)
                path.write_text(boards.resolve(python, architecture))
                print(f"{path} written")
            else:
                print(f"Python {python}, {architecture}: {' '.join(boards.check_lock(python, architecture))}")
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
        raise LocalError(f"--os {name!r}: one of {', '.join(found)}")
    return found[name]


def _image(options: argparse.Namespace, system: System) -> images.Image:
    claim: Path = options.claim or Path(f"{options.device}.claim.json")
    if not claim.is_file():
        raise LocalError(f"{claim} is not there: `regrow fleet add {options.device}` writes it")
    data = Path(options.data)
    where = f"/srv/regrow/{data.name}" if data.is_file() else options.data
    return images.Image(system, options.device, claim.read_bytes(), where, options.agent_options)


def _payload(options: argparse.Namespace, image: images.Image, folder: Path, architecture: str = boards.BOARDS) -> None:
    data = Path(options.data)
    images.write_payload(image, folder, data if data.is_file() else None)
    print("collecting the wheels", flush=True)
    images.collect_wheels(image.system, folder / "wheels", options.wheels, options.wheel, architecture)


def _check_out(out: Path) -> None:
    """A folder with other things in it is taken only where it is a boot partition."""
    out.mkdir(parents=True, exist_ok=True)
    boot = any((out / name).exists() for name in ("cmdline.txt", "config.txt", "user-data"))
    if any(out.iterdir()) and not boot:
        raise LocalError(f"--out {out}: neither empty nor a boot partition; name a new folder")


def _passphrase(path: Path | None) -> str:
    if path is None:
        if not sys.stdin.isatty():
            raise LocalError("--wifi-passphrase FILE: the Wi-Fi passphrase cannot be asked for here")
        return getpass.getpass("Wi-Fi passphrase: ")
    return (sys.stdin.read() if str(path) == "-" else path.read_text()).strip("\r\n")


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.0f} MB"
