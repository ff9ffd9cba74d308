"""What the store promises: acknowledged records survive, snapshots are whole or set aside, one holder, fail-stop."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from broker_server.run_files import SCHEMA_VERSION
from broker_server.store import Store
from regrow.errors import LocalError
from regrow.machine import Record
from tests.broker_server.rights import no_root, public, read_only

__all__ = ["public"]
ROOT = Path(__file__).parents[2]
APPENDER = """
import resource, sys
from broker_server.store import Store
from regrow.errors import LocalError
from regrow.machine import Record
store = Store.open(sys.argv[1], create=True)
limit = int(sys.argv[2])
print(0, flush=True)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # SQLite meets EFBIG, as it would meet ENOSPC
try:
    while True:
        payload = bytes([store.last_id % 251]) * 20000
        print(store.append([Record("accepted", b'{"seq":1}', payload), Record("note", b"{}")]), flush=True)
except LocalError as error:
    print("refused", error, flush=True)
    for again in (lambda: store.append([]), lambda: store.save_snapshot(0, b"{}", {})):
        try:
            again()
        except LocalError:
            print("refused", flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "run", create=True, wall_clock=lambda: 1.5) as opened:
        yield opened


def child(folder: Path, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPENDER, str(folder), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def fill(store: Store, count: int) -> int:
    return store.append([Record("accepted", b'{"i":%d}' % i, bytes([i]) * 10) for i in range(count)])


def test_records_come_back_as_they_went_in_and_after_reopening(tmp_path: Path) -> None:
    records = [
        Record("accepted", '{"name":"é"}'.encode(), b"\x00\xff" * 3),
        Record("note", b"{}", b""),
        Record("a", b"{}", bytearray(b"xy")),
        Record("b", b"{}", memoryview(np.arange(3, dtype=np.float32).tobytes())),
    ]
    with Store.open(tmp_path, create=True) as store:
        assert store.append(records[:2]) == 2
        assert store.append(records[2:]) == 4
        assert store.append([]) == 4
    with Store.open(tmp_path) as store:
        assert list(store.replay()) == [
            (i, Record(record.kind, record.header, bytes(record.payload))) for i, record in enumerate(records, 1)
        ]
        assert [id_ for id_, _ in store.replay(after=3)] == [4]


def test_a_replay_under_way_is_not_disturbed_by_appends(store: Store) -> None:
    fill(store, 5)
    replay = store.replay()
    first = next(replay)
    fill(store, 5)
    assert [first[0], *(id_ for id_, _ in replay)] == [1, 2, 3, 4, 5]


def test_a_header_that_is_not_text_writes_nothing(store: Store) -> None:
    with pytest.raises(LocalError, match="UTF-8"):
        store.append([Record("ok", b"{}"), Record("bad", b"\xff")])
    assert store.append([Record("ok", b"{}")]) == 1


def test_appends_from_threads_are_all_there(store: Store) -> None:
    threads = [threading.Thread(target=lambda: [fill(store, 1) for _ in range(10)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [id_ for id_, _ in store.replay()] == list(range(1, 31))


def test_every_acknowledged_record_survives_kill_9(tmp_path: Path) -> None:
    process = child(tmp_path / "run")
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(30)][-1]
    os.kill(process.pid, signal.SIGKILL)
    acknowledged = max([acknowledged, *(int(line) for line in process.stdout.read().split())])
    process.wait()
    with Store.open(tmp_path / "run") as store:
        records = dict(store.replay())
        assert len(records) >= acknowledged >= 58
        assert len(records) % 2 == 0, "a transaction came back in half"
        assert all(records[i].payload == bytes([(i - 1) % 251]) * 20000 for i in range(1, acknowledged, 2))
        assert store.append([Record("note", b"{}")]) == len(records) + 1


def test_a_full_disk_stops_the_store_and_loses_nothing_acknowledged(tmp_path: Path) -> None:
    process = child(tmp_path / "run", limit=600_000)
    output, _ = process.communicate(timeout=60)
    lines = output.splitlines()
    assert process.returncode == 0
    assert "takes no more writes" in lines[-3]
    assert lines[-2:] == ["refused", "refused"]
    acknowledged = int(lines[-4])
    assert acknowledged > 10
    with Store.open(tmp_path / "run") as store:
        assert [id_ for id_, _ in store.replay()][:acknowledged] == list(range(1, acknowledged + 1))


def test_a_second_process_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    process = child(tmp_path / "run")
    assert process.stdout is not None
    process.stdout.readline()
    try:
        with pytest.raises(LocalError, match=f"process {process.pid}: stop it"):
            Store.open(tmp_path / "run")
        with Store.open(tmp_path / "run", read_only=True) as reader:
            assert reader.last_id >= 0
            with pytest.raises(LocalError, match="reading only"):
                reader.append([Record("note", b"{}")])
    finally:
        process.kill()
        process.communicate()
    Store.open(tmp_path / "run").close()


def test_opening_what_is_not_a_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="--new-run"):
        Store.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "log.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(LocalError, match=r"backup.*--new-run"):
        Store.open(tmp_path)
    (tmp_path / "log.sqlite").write_bytes(b"")
    with pytest.raises(LocalError, match="never finished"):
        Store.open(tmp_path)


def test_a_run_that_may_not_be_written_can_be_read(public: Path) -> None:
    with Store.open(public / "run", create=True) as store:
        fill(store, 3)
        store.save_snapshot(3, b'{"version":7}', {"w": np.ones(2)})
        store.metric("note", {})
    with read_only(public / "run"):
        with Store.open(public / "run", read_only=True) as reader:
            assert [id_ for id_, _ in reader.replay()] == [1, 2, 3]
            assert [metric.kind for metric in reader.metrics()] == ["note"]
            assert [info.version for info in reader.snapshots()] == [7]
            assert reader.load_snapshot() is not None
        with pytest.raises(LocalError, match=f"the run folder {public / 'run'} cannot be written .*mounted read-only"):
            Store.open(public / "run")


@pytest.mark.parametrize("only", ["the log", "the folder"])
def test_a_run_of_which_only_a_part_may_be_written_is_refused_before_work_begins(public: Path, only: str) -> None:
    run = public / "run"
    Store.open(run, create=True).close()
    for path in (run, run / "lock", run / "log.sqlite", run / "snapshots"):
        path.chmod(0o777)
    (run / "log.sqlite" if only == "the log" else run).chmod(0o555)
    with no_root(), pytest.raises(LocalError, match=f"the run folder {run} cannot be written .*check the owner and the permissions"):
        Store.open(run)
    run.chmod(0o755)


def test_a_read_only_run_with_a_journal_that_only_a_writer_can_use_says_so(public: Path) -> None:
    """Its newest records are in the journal: to leave them out without a word would be a lie."""
    with Store.open(public / "run", create=True) as store:
        fill(store, 3)
        (public / "copy").mkdir()
        for name in ("log.sqlite", "log.sqlite-wal"):
            shutil.copy(public / "run" / name, public / "copy")
    with (
        read_only(public / "copy"),
        pytest.raises(LocalError, match=f"the run folder {public / 'copy'} cannot be read .*a copy of it in a folder of your own"),
    ):
        Store.open(public / "copy", read_only=True)
    with Store.open(public / "copy", read_only=True) as reader:
        assert reader.last_id == 3


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path, create=True).close()
    with sqlite3.connect(tmp_path / "log.sqlite") as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(LocalError, match="newer Regrow"):
        Store.open(tmp_path)


def test_damage_inside_the_log_is_reported_not_skipped(tmp_path: Path) -> None:
    with Store.open(tmp_path, create=True) as store:
        fill(store, 3)
    with sqlite3.connect(tmp_path / "log.sqlite") as db:
        db.execute("DELETE FROM log WHERE id = 2")
    db.close()
    with Store.open(tmp_path) as store, pytest.raises(LocalError, match="record 2 is missing"):
        list(store.replay())
    content = bytearray((tmp_path / "log.sqlite").read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    (tmp_path / "log.sqlite").write_bytes(content)
    with pytest.raises(LocalError, match="--new-run"), Store.open(tmp_path) as store:
        list(store.replay())


def test_snapshots_come_back_with_dtype_shape_and_meta(store: Store) -> None:
    fill(store, 4)
    arrays = {
        "W": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "order": np.array([3, 1, 2], np.uint32),
        "presence": np.array([True, False]),
        "empty": np.zeros((0, 2), np.float64),
    }
    info = store.save_snapshot(3, b'{"version": 7}', arrays)
    assert (info.log_id, info.version, info.wall_time) == (3, 7, 1.5)
    assert store.snapshots() == [info]
    loaded = store.load_snapshot()
    assert loaded is not None
    assert loaded[:2] == (3, b'{"version": 7}')
    assert loaded[2].keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[2][name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[2][name], array)
    loaded[2]["W"] += 1  # the caller's own


def test_a_snapshot_of_the_same_record_replaces_the_first(store: Store) -> None:
    for value in (1.0, 2.0):
        store.save_snapshot(0, b"{}", {"W": np.full(3, value)})
    loaded = store.load_snapshot()
    assert loaded is not None
    assert loaded[2]["W"][0] == 2.0
    assert len(list(store.snapshot_folder.iterdir())) == 1


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_a_damaged_snapshot_is_set_aside_and_the_older_one_used(store: Store, damage: str) -> None:
    fill(store, 2)
    for log_id in (1, 2):
        store.save_snapshot(log_id, b"{}", {"W": np.full(100, log_id)})
    newest = sorted(store.snapshot_folder.iterdir())[-1]
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    if damage == "gone":
        newest.unlink()
    else:
        newest.write_bytes(content[:-9] if damage == "torn" else content)
    with Store.open(store.path, read_only=True) as reader:
        found = reader.load_snapshot()
        assert found is not None
        assert found[0] == 1
        assert len(reader.snapshots()) == 2, "a reader changed the run"
    loaded = store.load_snapshot()
    assert loaded is not None
    assert loaded[0] == 1
    assert [info.log_id for info in store.snapshots()] == [1]
    assert Path(f"{newest}.rejected.txt").read_text().strip()
    assert Path(f"{newest}.rejected").exists() == (damage != "gone")


@pytest.mark.parametrize(("log_id", "meta"), [(1, b"{}"), (-1, b"{}"), (0, b"no json")])
def test_a_wrong_snapshot_is_refused(store: Store, log_id: int, meta: bytes) -> None:
    with pytest.raises(LocalError):
        store.save_snapshot(log_id, meta, {"W": np.zeros(1)})
    with pytest.raises(LocalError, match="not written"):
        store.save_snapshot(0, b"{}", {"W": np.array(["text"])})
    assert store.load_snapshot() is None
    assert list(store.snapshot_folder.iterdir()) == []


def test_files_of_a_crash_before_the_database_knew_are_removed_at_opening(tmp_path: Path) -> None:
    with Store.open(tmp_path, create=True) as store:
        store.save_snapshot(0, b"{}", {"W": np.zeros(1)})
        for name in ("000000000009.tmp", "000000000009-00.safetensors"):
            (store.snapshot_folder / name).write_bytes(b"x")
    with Store.open(tmp_path) as store:
        assert len(list(store.snapshot_folder.iterdir())) == 1
        assert store.load_snapshot() is not None


def test_prune_bounds_the_disk_and_a_replay_that_needs_the_freed_part_is_refused(store: Store) -> None:
    for log_id in range(1, 7):
        store.append([Record("accepted", b'{"keep":1}', b"x" * 1000)])
        store.append([Record("version", b"{}", b"y" * 1000)])
        store.save_snapshot(2 * log_id, b"{}", {"W": np.zeros(1)})
    store.prune(keep_snapshots=3)
    assert [info.log_id for info in store.snapshots()] == [8, 10, 12]
    assert len(list(store.snapshot_folder.iterdir())) == 3
    assert all(record.payload for _, record in store.replay())
    store.prune(keep_snapshots=2, keep_payloads=False)
    with pytest.raises(LocalError, match="from a snapshot"):
        store.replay(after=8)
    assert [len(record.payload) for _, record in store.replay(after=10)] == [1000, 1000]
    lengths = [(len(record.header), len(record.payload)) for _, record in store.replay(emptied_too=True)]
    assert lengths == [(10, 0), (2, 1000)] * 5 + [(10, 1000), (2, 1000)]
    with pytest.raises(LocalError, match="at least one"):
        store.prune(0)


def test_the_file_stops_growing_when_payloads_are_pruned(store: Store) -> None:
    sizes = []
    for _ in range(6):
        last = store.append([Record("accepted", b"{}", os.urandom(500_000))])
        store.save_snapshot(last, b"{}", {"W": np.zeros(1)})
        store.prune(1, keep_payloads=False)
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        sizes.append((store.path / "log.sqlite").stat().st_size)
    assert sizes[-1] == sizes[1]


def test_metrics_ride_with_the_next_append(store: Store) -> None:
    store.metric("evaluation", {"accuracy": 0.5})
    store.metric("device", {"id": "pi"})
    assert list(store.metrics()) == []
    store.append([Record("note", b"{}")])
    assert [(row.kind, row.fields, row.wall_time) for row in store.metrics()] == [
        ("evaluation", {"accuracy": 0.5}, 1.5),
        ("device", {"id": "pi"}, 1.5),
    ]
    assert [row.id for row in store.metrics(after=1)] == [2]
    assert [row.id for row in store.metrics(kind="evaluation")] == [1]
    for i in range(1000):
        store.metric("many", {"i": i})
    assert len(list(store.metrics(kind="many"))) == 1000


def test_close_writes_waiting_metrics_and_ends_the_store(store: Store) -> None:
    store.metric("last", {})
    store.close()
    store.close()
    with pytest.raises(LocalError, match="closed"):
        store.append([])
    with Store.open(store.path) as again:
        assert [row.kind for row in again.metrics()] == ["last"]


def test_bytes_written_counts_headers_payloads_and_snapshots(store: Store) -> None:
    store.append([Record("note", b"12345", b"x" * 95)])
    assert store.bytes_written == 100
    info = store.save_snapshot(1, b"{}", {"W": np.zeros(1000, np.float32)})
    assert store.bytes_written == 102 + info.bytes
