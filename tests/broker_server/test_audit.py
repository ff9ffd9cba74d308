"""The audit finds a model that is not what its updates give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from broker_server.audit import audit
from broker_server.runs import create_run, load_task, recover, rollback
from broker_server.store import Store
from regrow import aggregate, checkpoint, records
from regrow.errors import LocalError, RegrowError
from regrow.publication import number_of
from regrow.recombination import recombine
from regrow.records import to_record
from tests.broker_server.histories import TASK, make_task, new_run, play, update


def test_an_honest_run_checks_out(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    play(run, 4)
    rollback(run)
    play(run, 2)
    outcome = audit(run)
    assert (outcome.updates, outcome.aggregations) == (6, 6)
    assert outcome.worst <= 1.0


def test_a_long_run_of_gradients_does_not_drift_out_of_tolerance(tmp_path: Path) -> None:
    task = make_task(tmp_path / "task", TASK + '\n[method]\naggregation = "gradient"\n')
    run = create_run(tmp_path / "runs", load_task(task), "one")
    play(run, 60, snapshot=False)
    assert audit(run).worst <= 1.0


def test_personal_masks_check_out(tmp_path: Path) -> None:
    task = make_task(tmp_path / "task", TASK + '\n[method]\nname = "subfedavg"\n')
    run = create_run(tmp_path / "runs", load_task(task), "one")
    held = play(run, 4).buffer["d1"].update
    assert held.presence is not None
    assert 0.4 < held.presence.mean() < 0.6
    outcome = audit(run)
    assert (outcome.updates, outcome.aggregations) == (4, 4)
    assert outcome.worst <= 1.0


def test_a_wrong_mean_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    play(run, 2, snapshot=False)
    right = aggregate.mask_fed_avg

    def wrong(previous: NDArray[np.float32], *arguments: Any, **options: Any) -> NDArray[np.float32]:
        result = right(previous, *arguments, **options)
        result[7] *= 1 + 1e-4
        return result

    monkeypatch.setattr(aggregate, "mask_fed_avg", wrong)
    assert audit(run).worst > 50


def play_shuffled(run: Path, versions: int) -> None:
    """Three devices train every version's models, which FedMR shuffles."""
    devices = ("d1", "d2", "d3")
    with Store.open(run) as store:
        ledger = recover(store, load_task(run / "task"))

        def take(entry: records.Entry, payload: bytes = b"") -> None:
            ledger.apply(entry, payload)
            store.append([to_record(entry, payload)])

        for who in devices:
            take(records.Joined(device=who, install="00" * 16, uplink_bps=1e6, density=1.0))
        for version in range(versions):
            numbers = [number_of(version, slot if version else 0) for slot in range(len(devices))]
            for number in sorted(set(numbers)):
                take(records.Published(version=number, chunk_bytes=16384))
            for sequence, (who, number) in enumerate(zip(devices, numbers, strict=True)):
                take(records.Assigned(device=who, number=version + 1, version=number, epoch=0, level=0, dtype="float32", deadline_s=30.0))
                entry, payload = update(ledger, number, 0)
                take(msgspec.structs.replace(entry, device=who, sequence=sequence), payload)
            take(records.Aggregated(version=version + 1, elapsed_s=float(version + 1)))


def test_shuffled_layers_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path / "task", TASK + '\n[method]\nname = "fedmr"\nrecombine_after = 0\n')
    run = create_run(tmp_path / "runs", load_task(task), "one")
    play_shuffled(run, 4)
    outcome = audit(run)
    assert (outcome.updates, outcome.aggregations) == (12, 4)
    assert outcome.worst <= 1.0
    monkeypatch.setattr("regrow.ledger.recombine", lambda *arguments: recombine(*arguments)[::-1])
    assert audit(run).worst == np.inf


def test_a_snapshot_that_is_not_of_this_log_is_found(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    play(run, 2)
    with Store.open(run) as store:
        ledger = recover(store, load_task(run / "task"))
        ledger.weights = ledger.weights * np.float32(1.001)
        store.save_snapshot(store.last_id, *checkpoint.dump(ledger))
    with pytest.raises(LocalError, match="is not what the log gives"):
        audit(run)


def test_a_log_without_its_payloads_cannot_be_audited(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    play(run, 3)
    with Store.open(run) as store:
        store.prune(1, keep_payloads=False)
    with pytest.raises(LocalError, match="payloads up to record"):
        audit(run)


def _orphan(store: Store, run: Path, payload_change: Sequence[int]) -> None:
    ledger = recover(store, load_task(run / "task"))
    ledger.apply(records.Published(version=ledger.version, chunk_bytes=16384))
    entry, payload = update(ledger, ledger.version, len(ledger.order.lengths) - 1)
    store.append([to_record(entry, payload[: len(payload) - sum(payload_change)])])


@pytest.mark.parametrize("cut", [[0], [4]], ids=["unpublished", "short"])
def test_an_update_of_a_version_that_the_log_does_not_hold_is_an_error(tmp_path: Path, cut: list[int]) -> None:
    run = new_run(tmp_path)
    play(run, 1)
    with Store.open(run) as store:
        _orphan(store, run, cut)
    with pytest.raises(RegrowError, match="refers to"):
        audit(run)
