"""The mapped shelf keeps arrays apart, uses places again, and leaves nothing behind; a ledger on it is the same to the bit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from broker_server import shelf
from broker_server.shelf import MappedShelf
from regrow import checkpoint
from regrow.errors import LocalError
from regrow.ledger import Ledger
from tests.regrow.fleet import INITIAL, LAYOUT, task
from tests.regrow.harness import TWO, begin, fingerprint


def test_arrays_keep_their_values_while_others_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "BLOCK_BYTES", 1000)
    mapped = MappedShelf(tmp_path, 400)
    rng = np.random.default_rng(0)
    held: dict[int, tuple[np.ndarray, bytes]] = {}
    for step in range(600):
        size = int(rng.integers(0, 101))
        array = rng.normal(size=size).astype(np.float32) if step % 3 else rng.integers(0, 2, size).astype(np.bool_)
        held[int(rng.integers(0, 40))] = (mapped(array), array.tobytes())
        assert all(kept.tobytes() == wanted for kept, wanted in held.values())
    assert len(mapped._holds) <= 41
    assert len(mapped._blocks) <= 6


def test_a_slice_or_a_snapshot_keeps_its_place(tmp_path: Path) -> None:
    mapped = MappedShelf(tmp_path, 40)
    first = mapped(np.full(10, 1.0, np.float32))
    part = first[2:5]
    del first
    mapped(np.full(10, 2.0, np.float32))
    assert part.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="read-only"):
        part[0] = 3.0


def test_nothing_lies_in_the_folder(tmp_path: Path) -> None:
    mapped = MappedShelf(tmp_path, 4000)
    kept = mapped(np.ones(1000, np.float32))
    assert list(tmp_path.iterdir()) == []
    del mapped
    assert kept.sum() == 1000


def test_what_does_not_fit_is_an_error_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LocalError, match="slot"):
        MappedShelf(tmp_path, 40)(np.ones(100, np.float32))
    with pytest.raises(LocalError, match="free space"):
        MappedShelf(tmp_path / "missing", 40)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    mapped = MappedShelf(tmp_path, 40)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(LocalError, match="No space left"):
        mapped(np.ones(10, np.float32))


@pytest.mark.parametrize("aggregation", ["mask", "gradient"])
def test_a_ledger_on_the_shelf_is_the_same_to_the_bit(tmp_path: Path, aggregation: str) -> None:
    method = {"refresh_every": 3, "refresh_min_rounds": 0, "aggregation": aggregation}
    settings = task(fleet={"min_devices": 2}, stop={"aggregations": 12}, method=method)
    world = begin(settings, TWO)
    world.finish()
    in_file = Ledger.start(settings, LAYOUT, INITIAL, shelf=MappedShelf(tmp_path, 4 * LAYOUT.size))
    for number, record in enumerate(world.log):
        in_file.apply_record(record)
        if number == len(world.log) // 2:
            meta, arrays = checkpoint.dump(in_file)
            before = {name: array.tobytes() for name, array in arrays.items()}
    assert {name: array.tobytes() for name, array in arrays.items()} == before, "the ledger changed a dumped array"
    assert fingerprint(in_file) == fingerprint(world.coordinator().ledger)
    assert all(isinstance(held.update.values.base, memoryview) for held in in_file.buffer.values())
    again = checkpoint.load(settings, LAYOUT, meta, arrays, shelf=MappedShelf(tmp_path, 4 * LAYOUT.size))
    for record in world.log[len(world.log) // 2 + 1 :]:
        again.apply_record(record)
    assert fingerprint(again) == fingerprint(in_file)
