"""A software release: the signed manifest, the wheels that it names, which of them fit a device, and whether a device may take it.

A bundle is MAGIC, the manifest's length as u32 little-endian, the manifest (JSON; these exact bytes were signed), the Ed25519 signature
(64 bytes), and then for each wheel its SHA-256 (32 bytes) and its bytes, as many as the manifest says. Nothing in a bundle is a path, a
link or a mode: a wheel's name is checked by a pattern that has no room for a folder. Wheels that the reader has already may be left out.
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec

from regrow.errors import LocalError, PeerError

MAGIC = b"RGRELEASE1\n"
DOMAIN = b"regrow release v1\0"  # what was signed can be taken for nothing else
SIGNATURE_BYTES = 64
SHA_BYTES = 32
MAX_MANIFEST_BYTES = 256 * 1024
MAX_WHEEL_BYTES = 1 << 30
MAX_WHEELS = 256
PYTHONS = tuple(f"3.{minor}" for minor in range(10, 16))
MACHINES = ("aarch64", "x86_64")
_LENGTH = struct.Struct("<I")
_WHEEL = r"^[A-Za-z0-9][A-Za-z0-9_.]*-[A-Za-z0-9_.!+]+(-[0-9][A-Za-z0-9_]*)?-[A-Za-z0-9_.]+-[A-Za-z0-9_.]+-[A-Za-z0-9_.]+\.whl\Z"
_VERSION = re.compile(r"(\d{1,9}(?:\.\d{1,9})*)(?:(a|b|rc)(\d{1,9}))?(?:\.post(\d{1,9}))?(?:\.dev(\d{1,9}))?(?:\+[a-z0-9.]+)?\Z")
_OLD_GLIBC = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
Verify = Callable[[bytes, bytes, bytes], bool]  # (public key, data, signature)


class Wheel(msgspec.Struct, frozen=True):
    """A file of a release. sha256: hexadecimal."""

    name: Annotated[str, msgspec.Meta(pattern=_WHEEL, max_length=250)]
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_WHEEL_BYTES)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]

    @property
    def distribution(self) -> str:
        """What it installs, normalised."""
        return re.sub(r"[-_.]+", "-", self.name.split("-")[0]).lower()


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is signed.

    number: grows with every release of the fleet; targets: (Python, machine) that it is complete for; boards: that may take it, all when
    empty; min_free_bytes: of disk, for the wheels and the environment; forced: it may be older than what is installed; trial_minutes: how
    long a device may take for `wants`; wants: what a healthy device has done after the switch.
    """

    format: Annotated[int, msgspec.Meta(ge=1, le=1)]
    fleet: Annotated[str, msgspec.Meta(max_length=100)]
    number: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,60}\Z")]
    version: Annotated[str, msgspec.Meta(max_length=60)]
    created: Annotated[str, msgspec.Meta(max_length=40)]
    targets: Annotated[list[tuple[str, str]], msgspec.Meta(min_length=1, max_length=64)]
    boards: Annotated[list[Annotated[str, msgspec.Meta(max_length=60)]], msgspec.Meta(max_length=64)] = []
    min_free_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**50)]
    forced: bool = False
    trial_minutes: Annotated[float, msgspec.Meta(gt=0, le=10_080)]
    wants: Annotated[str, msgspec.Meta(pattern=r"^(contact|round)\Z")] = "round"
    files: Annotated[list[Wheel], msgspec.Meta(min_length=1, max_length=MAX_WHEELS)]


@dataclass(frozen=True, slots=True)
class Here:
    """What a device is. python: "3.11"; glibc: of its C library; version: installed, "" unknown; number: of the newest release tried."""

    python: str
    machine: str
    glibc: tuple[int, int]
    board: str
    version: str
    number: int


# ---- signing and reading -------------------------------------------------------------------------------------------------------------


def signed_bytes(manifest: bytes) -> bytes:
    """What is signed of a manifest."""
    return DOMAIN + manifest


def head(manifest: bytes, signature: bytes) -> bytes:
    """How a bundle begins."""
    return b"".join((MAGIC, _LENGTH.pack(len(manifest)), manifest, signature))


def split_head(read: Callable[[int], bytes]) -> tuple[bytes, bytes]:
    """(manifest, signature) at the beginning of a bundle.

    Args:
        read: gives that many bytes, fewer only at the end.

    Raises:
        PeerError: it is no bundle, or ends too early.
    """
    start = read(len(MAGIC) + _LENGTH.size)
    if len(start) != len(MAGIC) + _LENGTH.size or not start.startswith(MAGIC):
        raise PeerError("not a release bundle; make one with `regrow fleet update`")
    (length,) = _LENGTH.unpack(start[len(MAGIC) :])
    if not 0 < length <= MAX_MANIFEST_BYTES:
        raise PeerError(f"the bundle's manifest would have {length} bytes, at most {MAX_MANIFEST_BYTES} are taken")
    manifest, signature = read(length), read(SIGNATURE_BYTES)
    if len(signature) != SIGNATURE_BYTES:
        raise PeerError("the bundle ends within its manifest: it was cut off; send it again")
    return manifest, signature


def open_manifest(manifest: bytes, signature: bytes, keys: Iterable[bytes], verify: Verify) -> Manifest:
    """The manifest, if one of the keys signed it.

    Raises:
        PeerError: nobody of them did, or it is not one.
    """
    if len(signature) != SIGNATURE_BYTES or signature == bytes(SIGNATURE_BYTES):
        raise PeerError("the release is not signed; a device takes only what its fleet's key has signed")
    if not any(verify(key, signed_bytes(manifest), signature) for key in keys):
        raise PeerError("the release is not signed by this fleet's key, or was altered after it was signed")
    try:
        opened = msgspec.json.decode(manifest, type=Manifest)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerError(f"the release's manifest: {error}") from error
    version_key(opened.version)
    names = [wheel.name for wheel in opened.files]
    if len(set(names)) != len(names):
        raise PeerError("the release's manifest names a wheel twice")
    return opened


# ---- fitting -------------------------------------------------------------------------------------------------------------------------


def check_fit(manifest: Manifest, here: Here) -> list[Wheel]:
    """The wheels that this device installs.

    Raises:
        PeerError: it must not or cannot take this release; the message says which and why.
    """
    of = f"release {manifest.number} ({manifest.name} {manifest.version})"
    if manifest.number <= here.number:
        raise PeerError(f"{of} is not newer than release {here.number}, which was tried here already")
    if manifest.boards and here.board not in manifest.boards:
        raise PeerError(f"{of} is for the boards {', '.join(manifest.boards)}; this one is {here.board!r}")
    if (here.python, here.machine) not in manifest.targets:
        offered = ", ".join(f"Python {python} on {machine}" for python, machine in manifest.targets)
        raise PeerError(f"{of} is for {offered}; this device has Python {here.python} on {here.machine}")
    if here.version and not manifest.forced and version_key(manifest.version) < version_key(here.version):
        raise PeerError(f"{of} is older than {here.version}, which is installed; `regrow fleet update --force-downgrade` allows that")
    wheels = fitting(manifest.files, here.python, here.machine, here.glibc)
    lacking = {wheel.distribution for wheel in manifest.files} - {wheel.distribution for wheel in wheels}
    if lacking:
        raise PeerError(f"{of} has no wheel of {', '.join(sorted(lacking))} for the C library here (glibc {here.glibc[0]}.{here.glibc[1]})")
    return wheels


def fitting(wheels: Sequence[Wheel], python: str, machine: str, glibc: tuple[int, int]) -> list[Wheel]:
    """Those that Python `python` ("3.11") on this machine installs.

    Raises:
        PeerError: two of the same distribution do, and which one would be a guess.
    """
    found: dict[str, list[Wheel]] = defaultdict(list)
    for wheel in wheels:
        if wheel_fits(wheel.name, python, machine, glibc):
            found[wheel.distribution].append(wheel)
    for distribution, several in found.items():
        if len(several) > 1:
            names = " and ".join(wheel.name for wheel in several)
            raise PeerError(f"two wheels of {distribution} fit Python {python} on {machine}: {names}; leave one out")
    return [several[0] for several in found.values()]


def targets_of(wheels: Sequence[Wheel]) -> list[tuple[str, str]]:
    """(Python, machine) for which every distribution has a wheel. Raises PeerError as `fitting`."""
    wanted = {wheel.distribution for wheel in wheels}
    newest = (2, 1000)  # a device compares its own C library
    return [
        (python, machine)
        for python in PYTHONS
        for machine in MACHINES
        if {wheel.distribution for wheel in fitting(wheels, python, machine, newest)} == wanted
    ]


def wheel_fits(name: str, python: str, machine: str, glibc: tuple[int, int]) -> bool:
    """Whether Python `python` ("3.11") on this machine installs the wheel of this name; nobody does what is no wheel's name."""
    if not re.match(_WHEEL, name):
        return False
    minor = int(python.split(".")[1])
    pythons, abis, platforms = name.removesuffix(".whl").split("-")[-3:]
    right_platform = any(_platform_fits(platform, machine, glibc) for platform in platforms.split("."))
    return right_platform and any(_python_fits(python, abi, minor) for python in pythons.split(".") for abi in abis.split("."))


def _python_fits(python: str, abi: str, minor: int) -> bool:
    if python in ("py3", f"py3{minor}"):
        return abi == "none"
    made_for = re.fullmatch(r"cp3(\d+)", python)
    if made_for is None:
        return False
    if abi == "abi3":
        return int(made_for[1]) <= minor
    return int(made_for[1]) == minor and abi in (python, "none")


def _platform_fits(platform: str, machine: str, glibc: tuple[int, int]) -> bool:
    if platform in ("any", f"linux_{machine}"):
        return True
    if not platform.endswith(f"_{machine}"):
        return False
    made_on = platform.removesuffix(f"_{machine}")
    numbers = re.fullmatch(r"manylinux_(\d+)_(\d+)", made_on)
    needs = (int(numbers[1]), int(numbers[2])) if numbers else _OLD_GLIBC.get(made_on)
    return needs is not None and needs <= glibc


# ---- versions ------------------------------------------------------------------------------------------------------------------------


def version_key(version: str) -> tuple[tuple[int, ...], int, tuple[str, int], int, float]:
    """Sorts versions as PEP 440 does: 1.0.dev1 < 1.0a1.dev1 < 1.0a1 < 1.0rc1 < 1.0 < 1.0.post1; what stands behind "+" does not count.

    Raises:
        PeerError: it is none of that form.
    """
    match = _VERSION.match(version)
    if match is None:
        raise PeerError(f"version {version!r}: expected N.N.N, with aN, bN or rcN, .postN and .devN behind it if need be")
    numbers, stage, stage_number, post, dev = match.groups()
    release = tuple(int(number) for number in numbers.split("."))
    while len(release) > 1 and release[-1] == 0:
        release = release[:-1]
    final = post is not None or dev is None
    rank = 1 if stage is not None else 2 if final else 0
    return release, rank, (stage or "", int(stage_number or 0)), int(post) + 1 if post is not None else 0, float(dev or "inf")


def wheel_of(name: str, size: int, sha256: str) -> Wheel:
    """A file of a release that is being made. Raises LocalError: it cannot be one."""
    try:
        return msgspec.convert({"name": name, "size": size, "sha256": sha256}, Wheel)
    except msgspec.ValidationError as error:
        raise LocalError(f"{name}: not a wheel that a release may have: {error}") from error
