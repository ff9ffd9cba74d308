"""What software the fleet's devices are to run: releases that are staged on the gateway, and what the devices say of them.

    FLEET/releases/00000003.json     one a release: the signed manifest, for how many devices, whether it is halted
    FLEET/releases/files/NAME.whl    the wheels
    FLEET/releases/3.bundle          everything of it in one file, for devices that somebody visits
    FLEET/releases/reports/DEVICE    the newest ReleaseReport of a device, as it came

The newest release is the one that is offered. Which devices a stage of so many percent reaches is drawn from a digest of fleet, release and
device, so that a wider stage keeps all of the narrower one, and another release begins with other devices.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from typing import Annotated

import msgspec

from broker_server.durable import write_private
from broker_server.fleet.registry import MEMBERS, Registry
from regrow import wire
from regrow.errors import LocalError, PeerError, UsageError
from regrow.publication import blob
from regrow.release import MAX_MANIFEST_BYTES, Manifest, Wheel, head, signed_bytes, targets_of, version_key, wheel_of

_STAGED = re.compile(r"(\d{8})\.json")
_NAME = "regrow"
_DISTRIBUTION = re.compile(r"[A-Za-z0-9._-]+")
_FOR_FLEETS = re.compile(r""";\s*extra\s*==\s*["']fleet["']\s*\Z""")


class Staged(msgspec.Struct, frozen=True, kw_only=True):
    """One release. manifest: the exact text that was signed; signed: base64; percent: of the devices that it may be for."""

    manifest: str
    signed: str
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)]
    halted: bool = False

    def opened(self) -> Manifest:
        """Raises LocalError: it does not check out."""
        try:
            return msgspec.json.decode(self.manifest, type=Manifest)
        except msgspec.DecodeError as error:
            raise LocalError(f"a staged release does not check out: {error}; restore FLEET/releases from a backup") from error


@dataclass(frozen=True, slots=True)
class Wish:
    """How a release is to be: see Manifest."""

    percent: float
    boards: tuple[str, ...] = ()
    forced: bool = False
    trial_minutes: float = 10.0
    wants: str = "round"


class Releases:
    """The releases of one fleet, which any process may read; who changes them holds the registry's lock."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.path = registry.folder / "releases"
        self._files = self.path / "files"

    # ---- staging -------------------------------------------------------------------------------------------------------------------

    def newest(self) -> Staged | None:
        """The release that is offered, unless it is halted. Raises LocalError: its file does not check out."""
        number = self.newest_number()
        return None if not number else self._read(number)

    def newest_number(self) -> int:
        names = (_STAGED.fullmatch(file.name) for file in self.path.iterdir()) if self.path.is_dir() else ()
        return max((int(found[1]) for found in names if found is not None), default=0)

    def stamp(self) -> tuple[int, int]:
        """Another one whenever the newest release, or its stage, has changed."""
        number = self.newest_number()
        return (number, self._staged(number).stat().st_mtime_ns) if number else (0, 0)

    def stage(self, wheel: Path, others: Sequence[Path], wish: Wish, sign: Callable[[bytes], bytes]) -> tuple[Staged, bool]:
        """Sign a release of these wheels, or widen the one that is the newest and the same; (it, whether it is new). Durable.

        Args:
            wheel: of regrow itself; others: of what it depends on.
            sign: by the fleet's signing key, as Authority.sign.

        Raises:
            LocalError: the wheels are none that devices could install.
        """
        files = [wheel, *(other for other in others if other.name != wheel.name)]
        wheels = [_described(file) for file in files]
        version = _version_of(wheel)
        try:
            version_key(version)
            targets = targets_of(wheels)
        except PeerError as error:
            raise UsageError(str(error)) from error
        if not targets:
            raise UsageError(
                "no Python and machine has a wheel of each of these distributions; `pip download` them for every board of the fleet"
            )
        with self.registry.change():  # its lock
            before = self.newest()
            known = None if before is None else before.opened()
            if before is not None and known is not None and not before.halted and _same(known, wheels, wish):
                return self._write(known.number, msgspec.structs.replace(before, percent=max(before.percent, wish.percent))), False
            manifest = Manifest(
                format=1,
                fleet=self.registry.fleet().id,
                number=self.newest_number() + 1,
                name=_NAME,
                version=version,
                created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                targets=targets,
                boards=list(wish.boards),
                min_free_bytes=_room(files, wheels),
                forced=wish.forced,
                trial_minutes=wish.trial_minutes,
                wants=wish.wants,
                files=wheels,
            )
            return self._sign(manifest, files, wish.percent, sign), True

    def halt(self) -> Staged:
        """Offer the newest release to nobody any more. Raises LocalError: there is none."""
        with self.registry.change():
            newest = self.newest()
            if newest is None:
                raise UsageError("no release was ever staged, so there is none to halt")
            return self._write(newest.opened().number, msgspec.structs.replace(newest, halted=True))

    def _sign(self, manifest: Manifest, files: Sequence[Path], percent: float, sign: Callable[[bytes], bytes]) -> Staged:
        text = msgspec.json.encode(manifest)
        if len(text) > MAX_MANIFEST_BYTES:
            raise LocalError(f"{len(files)} wheels are too many for one release")
        signed = sign(signed_bytes(text))
        self._files.mkdir(parents=True, exist_ok=True, mode=0o700)
        bodies = [(wheel, file.read_bytes()) for wheel, file in zip(manifest.files, files, strict=True)]
        for wheel, data in bodies:
            if hashlib.sha256(data).hexdigest() != wheel.sha256:
                raise LocalError(f"{wheel.name} was changed while it was staged; stage it again")
            write_private(self._files / f"{wheel.sha256}.whl", data)
        whole = head(text, signed) + b"".join(bytes.fromhex(wheel.sha256) + data for wheel, data in bodies)
        write_private(self.path / f"{manifest.number}.bundle", whole)
        staged = Staged(manifest=text.decode(), signed=base64.b64encode(signed).decode(), percent=percent)
        return self._write(manifest.number, staged)

    def _staged(self, number: int) -> Path:
        return self.path / f"{number:08d}.json"

    def _write(self, number: int, staged: Staged) -> Staged:
        write_private(self._staged(number), msgspec.json.format(msgspec.json.encode(staged), indent=1) + b"\n")
        return staged

    def _read(self, number: int) -> Staged:
        try:
            return msgspec.json.decode(self._staged(number).read_bytes(), type=Staged)
        except (OSError, msgspec.DecodeError) as error:
            raise LocalError(f"{self._staged(number)} does not check out: {error}; restore it from a backup") from error

    # ---- what travels --------------------------------------------------------------------------------------------------------------

    def announcement(self, staged: Staged) -> wire.Release:
        """What devices hear of a release. Raises LocalError: a wheel is missing or damaged."""
        manifest = staged.opened()
        blobs = [blob(wheel.name, self.wheel(wheel)) for wheel in manifest.files]
        return wire.Release(number=manifest.number, manifest=staged.manifest.encode(), signed=base64.b64decode(staged.signed), files=blobs)

    def wheel(self, wheel: Wheel) -> bytes:
        """Raises LocalError: it is missing or damaged."""
        file = self._files / f"{wheel.sha256}.whl"
        try:
            data = file.read_bytes()
        except OSError as error:
            raise LocalError(f"{file}: {error.strerror}; stage the release again") from error
        if hashlib.sha256(data).hexdigest() != wheel.sha256:
            raise LocalError(f"{file} is damaged; stage the release again")
        return data

    def offered(self, staged: Staged) -> list[str]:
        """The devices of the fleet that its stage reaches. A device whose board is not known is asked; it knows itself."""
        if staged.halted:
            return []
        manifest = staged.opened()
        found = []
        for name, device in self.registry.devices().items():
            right_board = not manifest.boards or not device.board or device.board in manifest.boards
            if device.state in MEMBERS and device.state != "wiping" and right_board and percentile(manifest, name) < staged.percent:
                found.append(name)
        return found

    # ---- what devices said ---------------------------------------------------------------------------------------------------------

    def note_report(self, device: str, report: wire.ReleaseReport) -> None:
        """Keep the newest word of a device. Not durable: it is said again after every connect."""
        folder = self.path / "reports"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = folder / f".{device}"
        aside.write_bytes(wire.encode(report))
        aside.replace(folder / device)

    def reports(self) -> dict[str, wire.ReleaseReport]:
        """The newest word of every device, by name; what does not check out is left out."""
        folder, found = self.path / "reports", {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not file.name.startswith("."):
                with suppress(OSError, PeerError):
                    found[file.name] = wire.decode(file.read_bytes(), wire.ReleaseReport)[0]
        return found


def percentile(manifest: Manifest, device: str) -> float:
    """0 to below 100: the stage from which on a release reaches a device."""
    drawn = hashlib.sha256(f"{manifest.fleet}|{manifest.number}|{device}".encode()).digest()
    return 100 * int.from_bytes(drawn[:8], "big") / 2**64


def in_words(report: wire.ReleaseReport) -> str:
    """fetching 40 %; rolled back: within 10 minutes ...; healthy"""
    said = f"fetching {report.percent} %" if report.state == "fetching" else report.state
    return f"{said}: {report.reason}" if report.reason else said


def _same(manifest: Manifest, wheels: Sequence[Wheel], wish: Wish) -> bool:
    said = (tuple(manifest.boards), manifest.forced, manifest.trial_minutes, manifest.wants)
    return manifest.files == list(wheels) and said == (wish.boards, wish.forced, wish.trial_minutes, wish.wants)


def _described(file: Path) -> Wheel:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    return wheel_of(file.name, len(data), hashlib.sha256(data).hexdigest())


def _version_of(wheel: Path) -> str:
    parts = wheel.name.split("-")
    if parts[0] != _NAME or not zipfile.is_zipfile(wheel):
        raise UsageError(f"--wheel {wheel}: expected the wheel of {_NAME}, as `pip wheel --no-deps .` makes it")
    return parts[1]


def required_by(wheel: Path) -> list[str]:
    """The distributions, normalised, that a device of a fleet needs with this wheel; those of other extras or some Pythons are left out.

    Raises:
        UsageError: it is no wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            metadata = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{wheel} is no wheel: {error}") from error
    needs = message_from_bytes(metadata).get_all("Requires-Dist", [])
    names = (_DISTRIBUTION.match(need) for need in needs if ";" not in need or _FOR_FLEETS.search(need))
    return sorted({re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name is not None})


def _room(files: Sequence[Path], wheels: Sequence[Wheel]) -> int:
    """Bytes that a device needs: of each distribution the largest wheel, packed and unpacked, and half as much again for bytecode."""
    largest: dict[str, int] = {}
    for file, wheel in zip(files, wheels, strict=True):
        try:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except (OSError, zipfile.BadZipFile) as error:
            raise UsageError(f"{file} is no wheel: {error}") from error
        largest[wheel.distribution] = max(largest.get(wheel.distribution, 0), wheel.size + unpacked * 3 // 2)
    return sum(largest.values())
