"""Runs with a past, made record by record, without a broker or a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from broker_server.runs import create_run, load_task, recover
from broker_server.store import Store
from export.models import digits_mlp
from export.task import build_task, save_model
from regrow import checkpoint, personal, records, values
from regrow.ledger import Ledger
from regrow.records import Entry, to_record

INSTALL = "00" * 16
TASK = 'name = "digits"\n\n[wire]\nup = "float32"\n\n[store]\nkeep_updates = true\nkeep_snapshots = 3\n'


def make_task(folder: Path, text: str = TASK) -> Path:
    """A built task folder around the digits perceptron."""
    folder.mkdir()
    (folder / "task.toml").write_text(text)
    save_model(digits_mlp(1), folder / "model.onnx")
    build_task(folder, folder / "model.onnx")
    return folder


def new_run(folder: Path, name: str = "one") -> Path:
    """A run without a past."""
    return create_run(folder / "runs", load_task(make_task(folder / "task")), name)


def play(run: Path, versions: int, *, snapshot: bool = True) -> Ledger:
    """Let one device train the next `versions` versions; snapshots after each."""
    folder = load_task(run / "task")
    with Store.open(run) as store:
        ledger = recover(store, folder)

        def take(entry: Entry, payload: bytes = b"") -> None:
            ledger.apply(entry, payload)
            store.append([to_record(entry, payload)])

        if "d1" not in ledger.devices:
            take(records.Joined(device="d1", install=INSTALL, uplink_bps=1e6, density=1.0))
        for _ in range(versions):
            version = ledger.version
            number, epoch = ledger.devices["d1"].number + 1, ledger.order.epoch
            level = 0 if ledger.task.method.local == "personal_masks" else len(ledger.order.lengths) - 1
            take(records.Published(version=version, chunk_bytes=16384))
            take(records.Assigned(device="d1", number=number, version=version, epoch=epoch, level=level, dtype="float32", deadline_s=30.0))
            entry, payload = update(ledger, version, level)
            take(entry, payload)
            take(records.Aggregated(version=version + 1, elapsed_s=float(version + 1)))
            take(records.Retired(version=version))
            if snapshot:
                store.save_snapshot(store.last_id, *checkpoint.dump(ledger))
    return ledger


def update(ledger: Ledger, version: int, level: int) -> tuple[records.Accepted, bytes]:
    """What d1 sends for a published version: its base, moved a little; with personal masks about half of it."""
    publication = ledger.published[version]
    length = ledger.reach(publication.order, level)
    moved = publication.base(length) + np.random.default_rng(version).normal(0, 0.01, length).astype(np.float32)
    entry = records.Accepted(
        device="d1",
        install=INSTALL,
        sequence=ledger.devices["d1"].last_sequence + 1,
        version=version,
        epoch=publication.order.epoch,
        level=level,
        dtype="float32",
        examples=60,
        norm=0.1,
        loss=1.0,
        seconds=0.1,
        round_s=1.0,
        uplink_bps=1e6,
        scores=[],
    )
    mask = b""
    if ledger.task.method.local == "personal_masks":
        kept = np.random.default_rng(1000 + version).random(length) < 0.5
        kept[: publication.order.always_kept] = True
        mask, moved = personal.bitmap(kept), moved[kept]
    return entry, mask + values.encode(moved, "float32", publication.order.always_kept)
