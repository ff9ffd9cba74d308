"""`regrow backup` of a gateway at work, and `regrow restore`: elsewhere, over another, of bad files, and killed at any moment."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker_server.backup import HEAD, LIST
from broker_server.credentials import Credentials
from broker_server.promotions import Promotions
from broker_server.runs import create_run, load_task
from broker_server.store import Store
from cli.main import main
from export.models import digits_mlp
from export.task import build_task, save_model
from regrow import records
from regrow.claim import restores_of
from regrow.records import to_record
from tests.testbed.processes import ROOT, Fleet, audit, count, task_text, until


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUNS of a gateway that has a run, a device, a fleet's folder and a promoted model."""
    folder = tmp_path_factory.mktemp("gateway")
    task = folder / "task"
    task.mkdir()
    (task / "task.toml").write_text(task_text("digits"))
    save_model(digits_mlp(0), task / "model.onnx")
    build_task(task, task / "model.onnx")
    runs = folder / "runs"
    run = create_run(runs, load_task(task), "one")
    with Store.open(run) as store:
        store.append([to_record(records.Led(term=5 << 31 | 7))])
    Credentials(runs / ".gateway").add_device("d1")
    fleet = runs / ".gateway" / "fleet"
    fleet.mkdir(mode=0o700)
    (fleet / "ca.key").touch(mode=0o600)
    (fleet / "ca.key").write_text("secret")
    Promotions(runs, "digits").sign_off(b"a model", run="one", version=1, who="w", file="f")
    return runs


@pytest.fixture(scope="module")
def file(gateway: Path) -> Path:
    path = gateway.parent / "backup.tar"
    assert main(["backup", str(path), "--runs", str(gateway)]) == 0
    return path


def contents(folder: Path) -> dict[str, str]:
    """Digest and mode of every file but locks and databases, which are equal only as databases."""
    wanted = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock" and ".sqlite" not in path.name)
    return {str(path.relative_to(folder)): f"{path.stat().st_mode:o} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in wanted}


def fails(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails (1) or was wrongly asked for (2); tests/cli/test_exit_status.py tells them apart."""
    capsys.readouterr()
    assert main([str(word) for word in words]) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_what_comes_back_is_what_was_there(gateway: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in gateway.parent.iterdir() if path.name.startswith(".")] == []
    target = tmp_path / "elsewhere" / "runs"
    assert main(["restore", str(file), "--runs", str(target)]) == 0
    assert "1 run" in capsys.readouterr().out
    assert contents(target) == contents(gateway)
    assert stat.S_IMODE((target / ".gateway").stat().st_mode) == 0o700
    assert Credentials(target / ".gateway").password("d1") == Credentials(gateway / ".gateway").password("d1")
    assert Promotions(target, "digits").history() == Promotions(gateway, "digits").history()
    with Store.open(target / "one") as store:
        terms = [records.from_record(record) for _, record in store.replay()]
    assert isinstance(terms[-1], records.Led)
    assert isinstance(terms[0], records.Led)
    assert (terms[0].term, restores_of(terms[-1].term)) == (5 << 31 | 7, 1)


def test_a_folder_in_use_or_not_empty_is_left_alone(gateway: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "runs"
    assert main(["restore", str(file), "--runs", str(target)]) == 0
    (target / "mine").write_text("mine")
    before = contents(target)
    assert "is not empty" in fails(["restore", file, "--runs", target], capsys)
    with Store.open(target / "one"):
        assert "in use by process" in fails(["restore", file, "--runs", target, "--replace"], capsys)
    assert contents(target) == before
    assert main(["restore", str(file), "--runs", str(target), "--replace"]) == 0
    (aside,) = tmp_path.glob("runs.replaced-*")
    assert contents(aside) == before
    assert contents(target) == contents(gateway)


def test_a_backup_says_what_it_cannot_do(gateway: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to back up" in fails(["backup", tmp_path / "b", "--runs", tmp_path / "none"], capsys)
    assert "is there already" in fails(["backup", file, "--runs", gateway], capsys)
    assert "a part of itself" in fails(["backup", gateway / "b", "--runs", gateway], capsys)
    assert "is not there" in fails(["restore", tmp_path / "none", "--runs", tmp_path / "r"], capsys)
    odd = tmp_path / "runs"
    odd.mkdir()
    (odd / "there").symlink_to(gateway)
    assert "is a link" in fails(["backup", tmp_path / "b", "--runs", odd], capsys)
    assert not list(tmp_path.glob(".b*"))


def test_a_damaged_database_is_not_backed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "bad"
    run.mkdir(parents=True)
    (run / "log.sqlite").write_bytes(b"no database at all" * 100)
    assert "log.sqlite" in fails(["backup", tmp_path / "b", "--runs", tmp_path / "runs"], capsys)
    assert not (tmp_path / "b").exists()


def test_whoever_was_put_out_since_is_named_when_a_backup_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cryptography")
    from broker_server.fleet import members
    from broker_server.fleet.registry import Device, Registry

    runs = tmp_path / "runs"
    members.init(runs / ".gateway" / "fleet", "yard", ["127.0.0.1"])
    registry = Registry(runs / ".gateway" / "fleet")
    with registry.change() as devices:
        devices.update({name: Device(state="active", added_s=1) for name in ("a", "b", "c")})
    members.revoke(registry, "a")
    assert main(["backup", str(tmp_path / "b.tar"), "--runs", str(runs)]) == 0
    members.revoke(registry, "b")
    capsys.readouterr()
    assert main(["restore", str(tmp_path / "b.tar"), "--runs", str(runs), "--replace"]) == 0
    said = capsys.readouterr().out
    assert "may connect again: `regrow fleet revoke NAME` once more, before `regrow serve`" in said
    assert "by what was there before: regrow fleet revoke b\n" in said
    assert "coordinator's key was changed since" in said
    assert main(["restore", str(tmp_path / "b.tar"), "--runs", str(tmp_path / "elsewhere")]) == 0
    said = capsys.readouterr().out
    assert "may connect again" in said
    assert "by what was there before" not in said


def test_without_a_fleet_nobody_can_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Credentials(tmp_path / "runs" / ".gateway").add_device("d1")
    assert main(["backup", str(tmp_path / "b.tar"), "--runs", str(tmp_path / "runs")]) == 0
    assert main(["restore", str(tmp_path / "b.tar"), "--runs", str(tmp_path / "other")]) == 0
    assert "may connect again" not in capsys.readouterr().out


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_named_with_the_place_where_space_lacks(
    gateway: Path, file: Path, tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: object, *_: object) -> None:
        raise OSError(28, "No space left on device", str(source)) if named else OSError(28, "No space left on device")

    monkeypatch.setattr("broker_server.backup.shutil.copy2", full)
    said = fails(["backup", tmp_path / "b", "--runs", gateway], capsys)
    where = f"No space left on device ({tmp_path}); free space at {tmp_path}\n"
    assert said == f"regrow: {tmp_path / 'b'} was not written, which takes twice its size meanwhile: {where}"
    monkeypatch.setattr("broker_server.restore.os.fsync", full)
    said = fails(["restore", file, "--runs", tmp_path / "runs"], capsys)
    assert said == f"regrow: {file} was not restored, and nothing has changed: {where}"
    assert list(tmp_path.iterdir()) == []


# ---- bad files -----------------------------------------------------------------------------------------------------------------------


def made(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def entry(name: str, **fields: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def lying(member: tarfile.TarInfo, data: bytes = b"") -> bytes:
    """A backup that lists this member honestly."""
    head = json.dumps({"format": 1, "made": "", "runs": []}).encode()
    listed = json.dumps({"files": {member.name: [len(data), hashlib.sha256(data).hexdigest()]}}).encode()
    return made((entry(HEAD), head), (member, data), (entry(LIST), listed))


GOOD_HEAD = b'{"format": 1, "made": "", "runs": []}'
HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "foreign": lambda _: b"PK\3\4 something else" * 1000,
    "a tar of others": lambda _: made((entry("etc/passwd"), b"x")),
    "cut in the middle": lambda good: good[: len(good) // 2],
    "cut at the end": lambda good: good[: good.rindex(LIST.encode())],
    "one byte else": lambda good: good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :],
    "upwards": lambda _: lying(entry("runs/../../evil"), b"x"),
    "absolute": lambda _: lying(entry("/tmp/evil"), b"x"),
    "outside": lambda _: lying(entry("evil"), b"x"),
    "a symlink": lambda _: lying(entry("runs/evil", type=tarfile.SYMTYPE, linkname="/etc")),
    "a hard link": lambda _: lying(entry("runs/evil", type=tarfile.LNKTYPE, linkname="runs/a")),
    "a device": lambda _: lying(entry("runs/evil", type=tarfile.CHRTYPE)),
    "newer": lambda _: made((entry(HEAD), b'{"format": 2, "made": "", "runs": []}')),
    "a head that is none": lambda _: made((entry(HEAD), b"[]")),
    "a run that is none": lambda _: lying(entry("runs/one/log.sqlite"), b"no database"),
    "unlisted": lambda _: made(
        (entry(HEAD), b'{"format": 1, "made": "", "runs": []}'), (entry("runs/a"), b""), (entry(LIST), b'{"files": {}}')
    ),
    "twice": lambda _: made((entry(HEAD), b'{"format": 1, "made": "", "runs": []}'), (entry("runs/a"), b""), (entry("runs/a"), b"")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_changes_nothing(name: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.tar"
    bad.write_bytes(HOSTILE[name](file.read_bytes()))
    inner = tmp_path / "inner"
    inner.mkdir()
    said = fails(["restore", bad, "--runs", inner / "runs"], capsys)
    assert "bad.tar" in said or "in the backup does not check out" in said
    assert list(inner.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"bad.tar", "inner"}
    assert not Path("/tmp/evil").exists()


# ---- a gateway at work ---------------------------------------------------------------------------------------------------------------


@contextmanager
def fleet(folder: Path, aggregations: int) -> Iterator[Fleet]:
    with Fleet(folder, digits_mlp(0), task_text("digits", stop=f"aggregations = {aggregations}")) as fleet:
        yield fleet


@pytest.mark.timeout(240)
def test_a_run_goes_on_elsewhere_from_a_backup_under_load(tmp_path: Path) -> None:
    with fleet(tmp_path / "old", 80) as old:
        gateway = old.serve()
        old.add({"d1": 4000, "d2": 2000})
        for name in ("d1", "d2"):
            old.device(name)
        old.reach_version(6)
        files = [tmp_path / f"{number}.tar" for number in range(4)]
        for file in files:  # while updates come in, versions are made and snapshots pruned
            backup = old.start(["backup", file, "--runs", old.runs], f"{file.stem}.log")
            assert backup.ended() == 0, backup.text()
        before = old.version()
        old.reach_version(before + 40)  # what the backups know nothing of
        gateway.kill()
        until(
            lambda: "connection lost" in old.devices["d1"].text() or "cannot connect" in old.devices["d1"].text(),
            "a device without gateway",
        )
        for file in files:
            restored = tmp_path / file.stem
            assert main(["restore", str(file), "--runs", str(restored)]) == 0
            (run,) = restored.glob("*/log.sqlite")
            assert audit(run.parent).worst <= 1.0
        there = count(run.parent, "aggregated")
        assert 6 <= there <= before
        again = old.serve(task=run.parent)
        until(lambda: count(run.parent, "aggregated") >= there + 10, "ten versions more", 30)
        assert again.ended(100) == 0, again.text()[-2000:]
        assert count(run.parent, "aggregated") == 80
        assert audit(run.parent).worst <= 1.0
        assert len({entry[0] for entry in entries_after(run.parent, there)}) == 2, "both devices, ahead of the backup, work on"


@pytest.mark.timeout(240)
def test_a_fleet_with_identities_comes_back_with_its_keys(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from tests.testbed.certified import CertifiedFleet

    with CertifiedFleet(tmp_path / "old", digits_mlp(0), task_text("digits", stop="aggregations = 12"), kind="amqtt") as old:
        gateway = old.serve()
        for name in ("d1", "d2"):
            old.member(name)
        old.reach_version(3)
        assert main(["backup", str(tmp_path / "b.tar"), "--runs", str(old.runs)]) == 0
        gateway.kill()
        new = tmp_path / "new"
        assert main(["restore", str(tmp_path / "b.tar"), "--runs", str(new)]) == 0
        assert (new / ".gateway/fleet/ca.key").read_bytes() == (old.keys / "ca.key").read_bytes()
        (run,) = new.glob("*/log.sqlite")
        old.runs.rename(tmp_path / "gone")
        again = old.start(
            ["serve", run.parent, "--plain", "--runs", new, "--port", 0, "--broker-kind", "amqtt", "--host", "127.0.0.1"], "new.log"
        )
        assert again.ended(150) == 0, again.text()[-2000:]
        assert count(run.parent, "aggregated") == 12
        assert audit(run.parent).worst <= 1.0


def entries_after(run: Path, version: int) -> list[tuple[str, int]]:
    """(device, version) of every update that was accepted after a version was made."""
    made_yet, found = 0, []
    with Store.open(run, read_only=True) as store:
        for _, record in store.replay():
            entry = records.from_record(record)
            made_yet += isinstance(entry, records.Aggregated)
            if isinstance(entry, records.Accepted) and made_yet > version:
                found.append((entry.device, entry.version))
    return found


# ---- killed --------------------------------------------------------------------------------------------------------------------------

# Ends the process without a word at the n-th call that changes names on the disk, or makes something durable.
DYING = """
import os, sys, ctypes
from pathlib import Path
left = int(sys.argv[1])
def counted(call):
    def dying(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return call(*args, **kwargs)
    return dying
os.fsync, os.open = counted(os.fsync), counted(os.open)
Path.rename, Path.mkdir = counted(Path.rename), counted(Path.mkdir)
import broker_server.restore as restore
restore._exchange = counted(restore._exchange)
restore._leap = counted(restore._leap)
from cli.main import main
status = main(sys.argv[2:])
print("calls", int(sys.argv[1]) - left)
sys.exit(status)
"""
MANY = 1_000_000


@pytest.mark.timeout(240)
@pytest.mark.parametrize("there", [False, True], ids=["into nothing", "over another"])
def test_killed_at_any_moment_there_is_the_old_or_the_new(gateway: Path, file: Path, tmp_path: Path, there: bool) -> None:
    def killed_at(step: int) -> bool:
        """Whether the new folder is there when the process dies at this call; it must be whole, or the old one."""
        folder = tmp_path / f"{step}"
        target = folder / "runs"
        folder.mkdir(exist_ok=True)
        if there:
            target.mkdir()
            (target / "mine").write_text("mine")
        words = ["restore", str(file), "--runs", str(target), *(["--replace"] if there else [])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DYING, str(step), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if step == MANY:
            calls.append(int(done.stdout.split()[-1]))
        assert done.returncode == (0 if step == MANY else -9), done.stderr
        is_new = (target / ".gateway").exists()
        if is_new:
            assert contents(target) == contents(gateway)
        else:
            assert [path.name for path in target.iterdir()] == ["mine"] if there else not target.exists()
        if there and is_new:
            (aside,) = folder.glob("runs.replaced-*")
            assert (aside / "mine").read_text() == "mine"
        assert main(["restore", str(file), "--runs", str(target), "--replace"]) == 0
        assert contents(target) == contents(gateway)
        assert not list(folder.glob(".runs.restoring-*"))
        return is_new

    calls: list[int] = []
    assert killed_at(MANY)
    early, late = range(0, calls[0] - 8, 9), range(calls[0] - 8, calls[0])
    assert {killed_at(step) for step in (*early, *late)} == {False, True}
