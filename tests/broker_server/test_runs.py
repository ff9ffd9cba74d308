"""Run folders: made whole, recovered to the same bits, listed while damaged, rolled back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from broker_server import runs
from broker_server.store import Store
from regrow import checkpoint, records
from regrow.errors import LocalError
from regrow.ledger import Ledger
from regrow.machine import Record
from regrow.records import to_record
from tests.broker_server.histories import make_task, new_run, play


def recovered(run: Path) -> Ledger:
    with Store.open(run) as store:
        return runs.recover(store, runs.load_task(run / "task"))


def test_a_run_keeps_its_task_whatever_becomes_of_the_folder(tmp_path: Path) -> None:
    task = make_task(tmp_path / "task")
    run = runs.create_run(tmp_path / "runs", runs.load_task(task), "one")
    (task / "task.toml").write_text('name = "other"\n')
    (task / "model.onnx").write_bytes(b"")
    assert runs.load_task(run / "task").task.name == "digits"
    assert runs.load_task(run / "task").model_path.stat().st_size > 0
    assert not list(run.parent.glob(".*"))


def test_a_run_that_could_not_be_made_leaves_none(tmp_path: Path) -> None:
    task = runs.load_task(make_task(tmp_path / "task"))
    task.model_path.unlink()
    with pytest.raises(LocalError, match="cannot make the run"):
        runs.create_run(tmp_path / "runs", task, "one")
    assert not list(runs.list_runs(tmp_path / "runs"))


def test_two_runs_do_not_share_a_name(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(LocalError, match="exists already"):
        runs.create_run(run.parent, runs.load_task(run / "task"), "one")


def test_recovery_gives_the_same_bits_from_a_snapshot_as_from_the_whole_log(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    live = play(run, 4)
    play_more = play(run, 1, snapshot=False)
    from_snapshot = recovered(run)
    for file in (run / "snapshots").iterdir():
        file.write_bytes(b"torn")
    from_log = recovered(run)
    assert live.version == 4
    assert from_log.version == from_snapshot.version == 5
    for ledger in (from_snapshot, from_log):
        np.testing.assert_array_equal(ledger.flat_weights, play_more.flat_weights)
        assert checkpoint.dump(ledger)[0] == checkpoint.dump(play_more)[0]


def test_the_term_outlives_a_restart(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with Store.open(run) as store:
        store.append([to_record(records.Led(term=7 << 31))])
    play(run, 1)
    assert recovered(run).term == 7 << 31


@pytest.mark.parametrize(
    "entry",
    [
        records.Retired(version=9),
        records.Released(device="nobody", reason="x"),
        records.Published(version=9, chunk_bytes=16384),
    ],
    ids=lambda entry: type(entry).__name__,
)
def test_a_log_that_cannot_be_replayed_names_its_record(tmp_path: Path, entry: records.Entry) -> None:
    run = new_run(tmp_path)
    with Store.open(run) as store:
        store.append([to_record(entry)])
    with pytest.raises(LocalError, match=r"record 1|out of order"):
        recovered(run)


def test_an_unknown_record_is_an_error_not_a_crash(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with Store.open(run) as store:
        store.append([Record("novelty", b"{}")])
    with pytest.raises(LocalError, match="unknown record kind 'novelty'"):
        recovered(run)


def test_the_list_shows_what_the_log_says(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    play(run, 3)
    damaged = runs.create_run(run.parent, runs.load_task(run / "task"), "damaged")
    (damaged / "log.sqlite").write_bytes(b"not a database" * 500)
    bad, good = runs.list_runs(run.parent)
    assert (good.path, good.task, good.version, good.devices, good.updates, good.finished) == (run, "digits", 3, 1, 3, "")
    assert "unreadable" in bad.finished
    assert runs.newest_unfinished(run.parent, "digits") == run
    assert runs.newest_unfinished(run.parent, "other") is None
    with Store.open(run) as store:
        store.append([to_record(records.Finished(reason="enough", elapsed_s=9.0))])
    assert runs.newest_unfinished(run.parent, "digits") is None


def test_rollback_takes_the_snapshot_before_the_newest(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    play(run, 2)
    wanted = recovered(run).flat_weights.copy()
    play(run, 1)
    assert runs.rollback(run) == (2, 4)
    ledger = recovered(run)
    assert ledger.version == 4
    assert not ledger.buffer
    assert not ledger.published
    np.testing.assert_array_equal(ledger.flat_weights, wanted)
    assert play(run, 2).version == 6


def test_rollback_to_a_version_and_back_again(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    last = play(run, 3).flat_weights.copy()
    assert runs.rollback(run, 1) == (1, 4)
    assert runs.rollback(run, 3) == (3, 5)
    np.testing.assert_array_equal(recovered(run).flat_weights, last)
    with pytest.raises(LocalError, match="versions with one: "):
        runs.rollback(run, 17)


def test_rollback_of_a_finished_run_makes_it_unfinished(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    play(run, 2)
    with Store.open(run) as store:
        store.append([to_record(records.Finished(reason="enough", elapsed_s=9.0))])
    assert recovered(run).finished
    runs.rollback(run)
    assert not recovered(run).finished
    assert runs.newest_unfinished(run.parent, "digits") == run


def test_rollback_says_when_the_snapshot_is_damaged(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    play(run, 2)
    for file in (run / "snapshots").glob("*.safetensors"):
        file.write_bytes(b"torn")
    with pytest.raises(LocalError, match=r"no such snapshot|does not check out"):
        runs.rollback(run, 1)
