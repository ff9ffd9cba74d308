"""A snapshot is the ledger, bit for bit, and one that does not fit is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from regrow import checkpoint
from regrow.errors import LocalError
from regrow.machine import Record
from regrow.parameters import Layout, Tensor
from regrow.task import Task
from tests.regrow.fleet import LAYOUT, task
from tests.regrow.harness import TWO, begin, check_run, fingerprint, replay, replay_with_snapshot

SETTINGS = {
    "mask": task(fleet={"min_devices": 2}, stop={"aggregations": 12}, method={"refresh_every": 3, "refresh_min_rounds": 0}),
    "gradient": task(
        fleet={"min_devices": 2},
        stop={"aggregations": 8},
        method={"refresh_every": 3, "refresh_min_rounds": 0, "aggregation": "gradient", "importance": "g"},
        restoration={"every": 1, "patience": 1, "min_delta": 0.3},
    ),
}


@pytest.fixture(scope="module", params=sorted(SETTINGS))
def run(request: pytest.FixtureRequest) -> tuple[list[Record], Task]:
    settings = SETTINGS[request.param]
    world = begin(settings, TWO)
    world.finish()
    check_run(world, settings)
    return world.log, settings


def test_a_snapshot_anywhere_and_the_rest_of_the_log_give_the_same_bits(run: tuple[list[Record], Task]) -> None:
    log, settings = run
    whole = fingerprint(replay(log, settings))
    assert {"refreshed", "aggregated", "retired", "restored"} <= {record.kind for record in log}
    for at in range(0, len(log) + 1, 3):
        assert fingerprint(replay_with_snapshot(log, settings, at)) == whole, f"snapshot after {at} records"


def test_the_ledger_never_changes_a_dumped_array(run: tuple[list[Record], Task]) -> None:
    log, settings = run
    middle = len(log) // 2
    ledger = replay(log[:middle], settings)
    _, arrays = checkpoint.dump(ledger)
    before = {name: array.tobytes() for name, array in arrays.items()}
    for record in log[middle:]:
        ledger.apply_record(record)
    assert {name: array.tobytes() for name, array in arrays.items()} == before


def broken(meta: bytes, arrays: dict[str, NDArray[Any]], how: str) -> tuple[bytes, dict[str, NDArray[Any]]]:
    if how == "json":
        return meta[:-20], arrays
    if how == "field":
        return meta.replace(b'"version"', b'"verzion"', 1), arrays
    if how == "weights":
        return meta, {name: array for name, array in arrays.items() if name != "weights"}
    return meta, {name: array for name, array in arrays.items() if not name.startswith("order.")}


@pytest.mark.parametrize("how", ["json", "field", "weights", "order"])
def test_a_snapshot_that_is_incomplete_is_refused(run: tuple[list[Record], Task], how: str) -> None:
    log, settings = run
    meta, arrays = broken(*checkpoint.dump(replay(log, settings)), how)
    with pytest.raises(LocalError, match="rollback"):
        checkpoint.load(settings, LAYOUT, meta, arrays)


def test_a_snapshot_of_another_model_is_refused(run: tuple[list[Record], Task]) -> None:
    log, settings = run
    meta, arrays = checkpoint.dump(replay(log, settings))
    with pytest.raises(LocalError, match=r"task\.toml"):
        checkpoint.load(settings, Layout((Tensor("a", (3, 3)),)), meta, arrays)


def test_a_log_of_another_kind_is_refused() -> None:
    ledger = replay([], SETTINGS["mask"])
    with pytest.raises(LocalError, match="unknown record"):
        ledger.apply_record(Record("nonsense", b"{}"))
    with pytest.raises(LocalError, match="record aggregated"):
        ledger.apply_record(Record("aggregated", b"{}"))
    assert np.isfinite(ledger.flat_weights).all()
