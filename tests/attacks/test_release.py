"""Whoever owns the broker, or the agent, cannot bring software onto a device: only the fleet's signing key can, and only what fits.

First over the link (an attacker with the coordinator's password), then straight into the spool (an attacker who is the agent).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker_server.broker import Kind
from edge_agent.update_files import read_settings
from edge_agent.updater import Updater
from regrow import topics, wire
from regrow.machine import Publish, Subscribe
from regrow.publication import blob
from regrow.release import SIGNATURE_BYTES, Manifest, signed_bytes
from tests.attacks.release_world import DEVICE, World
from tests.edge_agent.release_rig import HERE, bundle_of, manifest_of, wheels_of

OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"\x55" * 32)
OTHER_PYTHON = [("3.10", "aarch64"), ("3.99", HERE.machine)]


@contextmanager
def opened(folder: Path, kind: Kind) -> Iterator[World]:
    world = World(folder, kind)
    try:
        world.until(lambda: world.said() is not None, "the device's first word")
        yield world
    finally:
        world.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """On the embedded broker."""
    with opened(tmp_path, "amqtt") as world:
        yield world


@pytest.fixture
def real(tmp_path: Path) -> Iterator[World]:
    """On mosquitto."""
    with opened(tmp_path, "mosquitto") as world:
        yield world


def made(world: World, *, number: int = 6, version: str = "2.0.0", **changes: Any) -> tuple[Manifest, dict[str, bytes]]:
    """A release as the fleet would make it, but for the changes."""
    wheels = wheels_of(world.folder / "forged", version)
    return manifest_of(wheels, number, version, **changes), {file.name: file.read_bytes() for file in wheels}


def release(manifest: bytes, signed: bytes, files: dict[str, bytes], number: int = 6) -> wire.Release:
    return wire.Release(number=number, manifest=manifest, signed=signed, files=[blob(name, data) for name, data in files.items()])


def by_digest(files: dict[str, bytes]) -> dict[bytes, bytes]:
    return {wire.digest(data): data for data in files.values()}


def then_the_right_one_comes(world: World) -> None:
    """The positive control: what the operator stages reaches the spool, and the updater would install it."""
    right = world.stage("2.0.1")
    world.told(right.number, "verified")
    (bundle,) = world.spool.glob("*.bundle")
    assert Updater(read_settings(world.settings)).check(bundle).version == "2.0.1"


# ---- over the link -----------------------------------------------------------------------------------------------------------------


def unsigned(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    manifest, files = made(world)
    return release(msgspec.json.encode(manifest), b"", files), files


def zero_signature(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    manifest, files = made(world)
    return release(msgspec.json.encode(manifest), bytes(SIGNATURE_BYTES), files), files


def wrong_key(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    manifest, files = made(world)
    said = msgspec.json.encode(manifest)
    return release(said, OTHER_KEY.sign(signed_bytes(said)), files), files


def signed_for_another_purpose(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    manifest, files = made(world)
    said = msgspec.json.encode(manifest)
    return release(said, world.authority.sign(said), files), files


def altered_manifest(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    manifest, files = made(world)
    said = msgspec.json.encode(manifest)
    return release(said.replace(b'"2.0.0"', b'"9.0.0"'), world.authority.sign(signed_bytes(said)), files), files


def signed(world: World, manifest: Manifest, files: dict[str, bytes]) -> wire.Release:
    said = msgspec.json.encode(manifest)
    return release(said, world.authority.sign(signed_bytes(said)), files, manifest.number)


def altered_wheel(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    manifest, files = made(world)
    twisted = {name: data.replace(b"2.0.0", b"6.6.6") for name, data in files.items()}
    return signed(world, manifest, twisted), twisted


def other_board(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    manifest, files = made(world, boards=["nvidia-jetson-orin-nano"])
    return signed(world, manifest, files), files


def other_python(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    manifest, files = made(world, targets=OTHER_PYTHON)
    return signed(world, manifest, files), files


def downgrade(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    manifest, files = made(world, version="1.4.9")
    return signed(world, manifest, files), files


def replayed(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    """An older release that the fleet really signed, even one that was forced."""
    manifest, files = made(world, number=4, forced=True, version="1.0.0")
    return signed(world, manifest, files), files


def renumbered(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    manifest, files = made(world, number=4)
    return msgspec.structs.replace(signed(world, manifest, files), number=6), files


def path_traversal(world: World) -> tuple[wire.Release, dict[str, bytes]]:
    """Signed by the fleet's own key, which never makes one like that."""
    manifest, files = made(world)
    said = msgspec.json.encode(manifest).replace(b"regrow-2.0.0-py3", b"../../tmp/regrow-2.0.0-py3")
    return release(said, world.authority.sign(signed_bytes(said)), {f"../../tmp/{name}": data for name, data in files.items()}), files


OVER_THE_LINK: list[tuple[Callable[[World], tuple[wire.Release, dict[str, bytes]]], str]] = [
    (unsigned, "is not signed"),
    (zero_signature, "is not signed"),
    (wrong_key, "not signed by this fleet's key"),
    (signed_for_another_purpose, "not signed by this fleet's key"),
    (altered_manifest, "not signed by this fleet's key"),
    (altered_wheel, "contradicts the signed manifest"),
    (other_board, "is for the boards nvidia-jetson-orin-nano"),
    (other_python, "is for Python 3.10 on aarch64"),
    (downgrade, "is older than 1.5.0"),
    (replayed, "not newer than release 5"),
    (renumbered, "announced as 6, but its manifest says 4"),
    (path_traversal, "manifest: "),
]


def refuses(world: World, attack: Callable[[World], tuple[wire.Release, dict[str, bytes]]], reason: str) -> None:
    forged, files = attack(world)
    world.forge(forged, by_digest(files))
    world.until(
        lambda: (said := world.said()) is not None and said.state == "refused" and reason in said.reason, f"{attack.__name__}: {reason}"
    )
    assert not [topic for topic in world.heard if topic.startswith("regrow/v1/release/")], "nothing of it is even fetched"
    world.untouched()


@pytest.mark.network
@pytest.mark.parametrize(("attack", "reason"), OVER_THE_LINK, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_release_is_refused_on_mosquitto(real: World, attack: Any, reason: str) -> None:
    refuses(real, attack, reason)
    then_the_right_one_comes(real)


def test_wrong_releases_are_refused_before_a_byte_of_them_is_fetched(world: World) -> None:
    for attack, reason in OVER_THE_LINK:
        refuses(world, attack, reason)
    then_the_right_one_comes(world)


def half_of_it(world: World) -> None:
    manifest, files = made(world)
    whole = signed(world, manifest, files)
    first, *_ = files
    cut = {wire.digest(data): data for name, data in files.items() if name == first}
    world.forge(whole, cut)
    world.until(lambda: (said := world.said()) is not None and said.state == "fetching" and said.percent == 50, "half of it")
    world.untouched()
    world.forge(whole, by_digest(files))  # the positive control: with the rest it is whole
    world.told(6, "verified")
    assert Updater(read_settings(world.settings)).check(world.spool / "6.bundle").number == 6


@pytest.mark.network
def test_a_truncated_release_is_not_handed_over_on_mosquitto(real: World) -> None:
    half_of_it(real)


def test_a_truncated_release_is_not_handed_over(world: World) -> None:
    half_of_it(world)


def test_altered_pieces_are_not_taken_and_pieces_that_make_another_whole_are_not_handed_over(world: World) -> None:
    manifest, files = made(world)
    whole = signed(world, manifest, files)
    name = next(iter(files))
    twisted = files[name].replace(b"2.0.0", b"6.6.6")
    world.forge(whole, {wire.digest(files[name]): twisted})
    assert "does not name" in world.until(lambda: (said := world.said()) is not None and said.reason, "a refused piece")
    world.untouched()
    lie = blob(name, twisted)
    lying = [msgspec.structs.replace(found, pieces=lie.pieces) if found.name == name else found for found in whole.files]
    others = {wire.digest(data): data for other, data in files.items() if other != name}
    world.forge(msgspec.structs.replace(whole, files=lying), {**others, wire.digest(files[name]): twisted})
    assert "not the file that was signed" in world.told(6, "refused")
    world.untouched()
    then_the_right_one_comes(world)


def test_a_device_cannot_publish_a_release_to_another_one_or_pieces_to_all(world: World) -> None:
    heard: list[str] = []
    world.bus._on_event = lambda event: heard.append(getattr(event, "topic", ""))  # what the coordinator, who may read all, hears
    world.bus.perform(Subscribe(("regrow/v1/#",)))
    world.link.perform(Publish(topics.release("d2"), b"forged"))
    world.link.perform(Publish(topics.release_file(bytes(16), 0), b"forged"))
    world.link.perform(Publish(topics.release_report(DEVICE), b"control"))
    world.until(lambda: topics.release_report(DEVICE) in heard, "the device's own topic")
    assert topics.release("d2") not in heard
    assert topics.release_file(bytes(16), 0) not in heard


# ---- straight into the spool -------------------------------------------------------------------------------------------------------


def bundle(world: World, key: Any = None, **changes: Any) -> bytes:
    manifest, files = made(world, **changes)
    wheels = [world.folder / "forged" / name for name in files]
    return bundle_of(manifest, wheels, key or world.authority)


def traversing(world: World) -> bytes:
    manifest, _ = made(world)
    said = msgspec.json.encode(manifest).replace(b"regrow-2.0.0-py3", b"../../tmp/regrow-2.0.0-py3")
    start = b"RGRELEASE1\n" + len(said).to_bytes(4, "little") + said + world.authority.sign(signed_bytes(said))
    return start + bundle(world)[-1000:]


SPOOLED: list[tuple[str, Callable[[World], bytes], str]] = [
    ("nothing", lambda _: b"", "not a release bundle"),
    ("noise", lambda _: b"RGRELEASE1\n" + b"\xff" * 100, "manifest would have"),
    ("unsigned", lambda world: bundle(world, _Unsigned()), "is not signed"),
    ("wrong key", lambda world: bundle(world, OTHER_KEY), "not signed by this fleet's key"),
    ("altered manifest", lambda world: bundle(world).replace(b'"2.0.0"', b'"9.0.0"', 1), "not signed by this fleet's key"),
    ("altered wheel", lambda world: bundle(world)[:-1] + b"!", "not the file that was signed"),
    ("cut in the manifest", lambda world: bundle(world)[:200], "cut off"),
    ("cut in a wheel", lambda world: bundle(world)[:-1], "cut off"),
    ("cut between wheels", lambda world: _without_last(world), "lacks"),
    ("cut in a digest", lambda world: bundle(world) + b"\x01" * 7, "cut off"),
    ("with something more", lambda world: bundle(world) + b"\x01" * 64, "was not to get"),
    ("other board", lambda world: bundle(world, boards=["nvidia-jetson-orin-nano"]), "is for the boards"),
    ("other Python", lambda world: bundle(world, targets=OTHER_PYTHON), "is for Python 3.10"),
    ("downgrade", lambda world: bundle(world, version="1.4.9"), "is older than 1.5.0"),
    ("replayed", lambda world: bundle(world, number=5, forced=True), "not newer than release 5"),
    ("path traversal", traversing, "manifest: "),
    ("too large for the disk", lambda world: bundle(world, min_free_bytes=2**49), "of disk"),
]


class _Unsigned:
    def sign(self, _: bytes) -> bytes:
        return bytes(SIGNATURE_BYTES)


def _without_last(world: World) -> bytes:
    manifest, files = made(world)
    return bundle_of(manifest, [world.folder / "forged" / next(iter(files))], world.authority)  # type: ignore[arg-type]


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, "amqtt")
    try:
        yield world
    finally:
        world.close()


def test_the_updater_believes_no_agent(quiet: World) -> None:
    for name, forge, reason in SPOOLED:
        (quiet.spool / "6.bundle").write_bytes(forge(quiet))
        journal = quiet.apply()
        assert reason in journal.refused, name
        quiet.untouched()
        assert quiet.device._begun(6) == ("refused", journal.refused), "the agent tells the gateway"
    (quiet.spool / "6.bundle").write_bytes(bundle(quiet))
    assert Updater(read_settings(quiet.settings)).check(quiet.spool / "6.bundle").number == 6


def test_the_updater_follows_no_link_and_waits_for_no_pipe(quiet: World, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere.bundle"
    real.write_bytes(bundle(quiet))
    (quiet.spool / "6.bundle").symlink_to(real)
    os.mkfifo(quiet.spool / "7.bundle")
    (quiet.spool / "8.bundle").mkdir()
    journal = quiet.apply()
    assert journal.number == 5
    assert real.read_bytes() == bundle(quiet)
    assert [entry.name for entry in quiet.spool.iterdir()] == ["8.bundle"]
    quiet.spool.rename(tmp_path / "moved")
    quiet.spool.symlink_to(tmp_path / "moved")
    (tmp_path / "moved" / "9.bundle").write_bytes(bundle(quiet))
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        quiet.apply()


def test_a_device_of_another_fleet_takes_nothing(world: World) -> None:
    world.keys = (bytes(32),)
    world.start_again()
    right = world.stage()
    assert "not signed by this fleet's key" in world.told(right.number, "refused")
    world.untouched()
