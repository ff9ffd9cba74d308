"""The state folder: old or new after a crash, damage set aside with its reason, one agent at a time."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.state import MAGIC, StateFolder
from regrow.errors import LocalError

ROOT = Path(__file__).parents[2]
# Dies at the n-th of the system calls that `put` makes after opening, as kill -9 would.
DYING = """
import os, sys
from edge_agent.state import StateFolder
folder, die_at, durable = StateFolder(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1"
calls = 0
def dying(real):
    def call(*arguments):
        global calls
        calls += 1
        if calls == die_at:
            os._exit(9)
        return real(*arguments)
    return call
os.fsync, os.replace = dying(os.fsync), dying(os.replace)
folder.put("update", b"new" * 1000, durable=durable)
os._exit(0)
"""
HOLDER = """
import sys
from edge_agent.state import StateFolder
folder = StateFolder(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[StateFolder]:
    with StateFolder(tmp_path / "state") as opened:
        yield opened


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_put_is_there_after_reopening(folder: StateFolder, durable: bool) -> None:
    for data in (b"", b"x", bytes(range(256)) * 100):
        folder.put("update.3", data, durable=durable)
        assert folder.get("update.3") == data
    folder.close()
    with StateFolder(folder.path) as again:
        assert again.get("update.3") == bytes(range(256)) * 100
        assert again.get("other") is None
        assert again.rejected == []


def test_list_and_delete(folder: StateFolder) -> None:
    for name in ("chunk-2", "chunk-1", "update"):
        folder.put(name, b"x", durable=False)
    assert folder.list("chunk-") == ["chunk-1", "chunk-2"]
    folder.delete("chunk-1")
    folder.delete("chunk-1", durable=False)
    assert folder.list() == ["chunk-2", "update"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/x", "a\0b", ".x", "lock", "x.tmp", "x.rejected", "é"])
def test_names_cannot_leave_the_folder_or_meet_its_own_files(folder: StateFolder, name: str) -> None:
    for use in (folder.get, folder.delete, lambda n: folder.put(n, b"")):
        with pytest.raises(LocalError, match="no name for a state file"):
            use(name)


@pytest.mark.parametrize("where", ["magic", "digest", "data", "torn", "empty"])
def test_damage_is_set_aside_with_its_reason(folder: StateFolder, where: str) -> None:
    folder.put("order", b"data" * 10)
    file = folder.path / "order"
    content = bytearray(file.read_bytes())
    position = {"magic": 0, "digest": len(MAGIC), "data": -1}.get(where)
    if position is not None:
        content[position] ^= 1
    file.write_bytes({"torn": bytes(content[:-1]), "empty": b""}.get(where, bytes(content)))
    assert folder.get("order") is None
    assert [name for name, _ in folder.rejected] == ["order"]
    assert folder.rejected[0][1]
    assert (folder.path / "order.rejected").exists()
    assert folder.list() == []
    folder.put("order", b"fetched again")
    assert folder.get("order") == b"fetched again"


def test_every_truncation_is_noticed(folder: StateFolder) -> None:
    folder.put("order", b"data")
    content = (folder.path / "order").read_bytes()
    for length in range(len(content)):
        (folder.path / "order").write_bytes(content[:length])
        assert folder.get("order") is None
    assert len(folder.rejected) == len(content)


@pytest.mark.parametrize(("durable", "steps"), [("1", 3), ("0", 1)])
def test_a_death_between_any_two_steps_leaves_old_or_new(tmp_path: Path, durable: str, steps: int) -> None:
    seen = []
    for die_at in range(1, steps + 2):
        with StateFolder(tmp_path) as before:
            before.put("update", b"old")
        command = [sys.executable, "-c", DYING, str(tmp_path), str(die_at), durable]
        code = subprocess.run(command, cwd=ROOT, timeout=60).returncode
        assert code == (9 if die_at <= steps else 0)
        with StateFolder(tmp_path) as after:
            seen.append(after.get("update"))
            assert after.rejected == []
            assert after.list() == ["update"]
            assert not list(tmp_path.glob("*.tmp"))
    renamed = steps if durable == "1" else steps + 1  # dying at the last fsync, the rename has happened
    assert seen == [b"old"] * (renamed - 1) + [b"new" * 1000] * (steps + 2 - renamed)


def test_a_failed_write_keeps_the_old_file(folder: StateFolder) -> None:
    folder.put("update", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(LocalError, match="free space"):
            folder.put("update", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folder.get("update") == b"old"
    assert not (folder.path / "update.tmp").exists()


@pytest.mark.parametrize("accident", ["deleted", "moved", "replaced", "replaced by a file"])
def test_a_folder_that_is_gone_is_said_to_be_gone(folder: StateFolder, accident: str) -> None:
    folder.put("update", b"old")
    folder.check()
    if accident == "moved":
        folder.path.rename(folder.path.with_name("elsewhere"))
    else:
        shutil.rmtree(folder.path)
    if accident == "replaced":
        with StateFolder(folder.path) as other:
            other.put("update", b"another agent's")
    elif accident == "replaced by a file":
        folder.path.write_text("in the way")
    for attempt in (folder.check, lambda: folder.put("update", b"new"), lambda: folder.put("part", b"new", durable=False)):
        with pytest.raises(LocalError, match=f"the state folder {folder.path} is gone: .*start the agent again") as caught:
            attempt()
        assert "free space" not in str(caught.value)


def test_a_folder_that_goes_while_a_file_is_written_is_said_to_be_gone(folder: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def delete(descriptor: int) -> None:
        sync(descriptor)
        shutil.rmtree(folder.path)

    monkeypatch.setattr(os, "fsync", delete)
    with pytest.raises(LocalError, match="is gone"):
        folder.put("update", b"new")


def test_a_second_agent_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(LocalError, match=f"process {holder.pid}: stop that agent"):
            StateFolder(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    StateFolder(tmp_path).close()


def test_opening_names_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LocalError, match="cannot use the state folder"):
        StateFolder(tmp_path / "file")


def test_a_closed_folder_is_not_written(folder: StateFolder) -> None:
    folder.close()
    with pytest.raises(LocalError, match="closed"):
        folder.put("update", b"x")


def test_bytes_written_counts_what_wears_the_card(folder: StateFolder) -> None:
    folder.put("update", b"x" * 100)
    assert folder.bytes_written == 140 == os.stat(folder.path / "update").st_size  # noqa: PTH116


def test_clear_removes_everything_and_the_folder_is_still_held(folder: StateFolder) -> None:
    for name in ("identity", "part-1", "outgoing"):
        folder.put(name, b"x")
    (folder.path / "models" / "t" / "1").mkdir(parents=True)
    (folder.path / "models" / "t" / "1" / "model.onnx").write_bytes(b"x")
    (folder.path / "models" / "t" / "current").symlink_to("1")
    (folder.path / "old.rejected").write_bytes(b"x")
    folder.clear()
    assert [entry.name for entry in folder.path.iterdir()] == ["lock"]
    folder.check()
    with pytest.raises(LocalError, match="in use"):
        StateFolder(folder.path)
