"""Runs in which one device has really trained one round, made without a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from broker_server.runs import create_run, load_task, recover
from broker_server.store import Store
from cli.deployable import write_deployable
from edge_agent.trainer import Trainer
from export.models import digits_mlp
from export.task import build_task, save_model
from regrow import records, values
from regrow.ledger import Ledger
from regrow.levels import unit_densities_of
from regrow.records import Entry, to_record
from regrow.task import parse_task
from tests.testbed.processes import write_digits

Arrays = dict[str, NDArray]  # type: ignore[type-arg]  # of any dtype
TASK = 'name = "digits"\n\n[method]\nladder = [0.1, 0.5, 1.0]\n{method}\n\n[training]\n{training}\n\n[store]\nkeep_updates = true\n{more}'


def make_run(
    folder: Path,
    *,
    model: onnx.ModelProto | None = None,
    arrays: Arrays | None = None,
    method: str = "",
    training: str = "",
    more: str = "",
    density: float = 1.0,
    rate: float = 0.1,
) -> Path:
    """A run in which one device has trained one round at this density.

    Args:
        model: the digits perceptron by default.
        arrays: x and y of the device, 400 digits by default; they are in FOLDER/device.npz, the gateway's are the digits of task/test.npz.
        method, training, more: lines of task.toml, `more` being whole tables.
        rate: of learning.
    """
    task = folder / "task"
    task.mkdir(parents=True)
    text = TASK.format(method=method, training=training, more=more)
    (task / "task.toml").write_text(text)
    save_model(model or digits_mlp(1), task / "model.onnx")
    write_digits(task / "test.npz", seed=50)
    write_digits(folder / "device.npz", seed=1, rows=400)
    if arrays is not None:
        for file in (task / "test.npz", folder / "device.npz"):
            np.savez(file, **arrays)
    parsed = parse_task(text)
    build_task(task, task / "model.onnx", unit_densities_of(parsed), parsed.training)
    run = create_run(folder / "runs", load_task(task), "one")
    with Store.open(run) as store:
        loaded = load_task(run / "task")
        ledger = recover(store, loaded)

        def take(entry: Entry, payload: bytes = b"") -> None:
            ledger.apply(entry, payload)
            store.append([to_record(entry, payload)])

        take(records.Joined(device="d1", install="00" * 16, uplink_bps=1e6, density=density))
        level = ledger.level_of(density)
        take(records.Published(version=0, chunk_bytes=16384))
        take(records.Assigned(device="d1", number=1, version=0, epoch=0, level=level, dtype="float32", deadline_s=30.0))
        take(*_update(ledger, level, folder / "device.npz", loaded.programs, rate))
        take(records.Aggregated(version=1, elapsed_s=1.0))
        write_deployable(loaded, ledger, run / "model.onnx")
    return run


def _update(ledger: Ledger, level: int, data: Path, programs: dict[str, bytes], rate: float) -> tuple[records.Accepted, bytes]:
    """A round of SGD on the whole of this level, in the full graph."""
    arrays, order = np.load(data), ledger.order
    length = order.lengths[level]
    flat = np.zeros(order.size, np.float32)
    flat[order.coordinates[:length]] = ledger.published[0].base(length)
    batches = [(arrays["x"][start : start + 20], arrays["y"][start : start + 20]) for start in range(0, len(arrays["x"]), 20)] * 10
    kept = None
    if length < order.size:
        kept = np.zeros(order.size, np.bool_)
        kept[order.coordinates[:length]] = True
    trained = Trainer(programs).train(flat, kept, batches, rate).vector[order.coordinates[:length]]
    entry = records.Accepted(
        device="d1", install="00" * 16, sequence=0, version=0, epoch=0, level=level, dtype="float32", examples=400, norm=0.1, loss=1.0,
        seconds=0.1, round_s=1.0, uplink_bps=1e6, scores=[],
    )  # fmt: skip
    return entry, values.encode(trained, "float32", order.always_kept)
