"""A small synthetic image set and short runs on it: ten bright bars, one a class, in noise."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import msgspec
import numpy as np

from broker_server.runs import load_task
from testbed.outcome import Outcome, Spec
from testbed.simulate import Simulation, task_of

SHORT = Spec(
    seconds=60.0,
    points=3,
    data="fashion-mnist",
    split="dirichlet:0.5",
    clients=5,
    settings={"training.local_steps": 3, "trigger.interval_s": 0.5},
)


def write_images(folder: Path) -> None:
    """Files as Fashion-MNIST's."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 400), ("t10k", 80)):
        y = np.arange(count) % 10
        x = rng.integers(0, 60, (count, 28, 28))
        for index, label in enumerate(y):
            x[index, 2 * label + 3 : 2 * label + 6] = 220
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + x.astype(np.uint8).tobytes(), 1))
        labels = struct.pack(">II", 0x801, count) + y.astype(np.uint8).tobytes()
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 1))


def spec(images: Path, **changes: object) -> Spec:
    """SHORT on these images, but for the changes."""
    return msgspec.structs.replace(SHORT, data_folder=str(images), **changes)


def outcome_of(task: Path, spec: Spec) -> Outcome:
    """A whole run."""
    folder = load_task(task)
    return Simulation(folder, task_of(folder, {"name": "bars"}, spec), spec).run()


def outcome_bytes(task: Path, spec: Spec) -> bytes:
    """A whole run as JSON."""
    return msgspec.json.encode(outcome_of(task, spec))
