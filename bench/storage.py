"""What does float16 storage of activations save on a device, and what does it cost?

    python bench/storage.py                         # fifteen minutes
    python bench/storage.py --models leaf_cnn       # only these; what is known of the others stays

For each model processes that do nothing else train with the program of float32 storage, with that of float16 storage, with the same where
values beyond float16 would become inf ("unsaturated": what the clipping costs), and with one that stores nothing as float16, but runs in
the order of its nodes and compares early like those ("in order": how much of the saving is that). They take turns, and the ratio is the
median over the turns. Peaks are of the whole processes (VmHWM). The gradient's error is that of one step from the first weights: the worst
of a tensor, relative to the tensor's own gradient, among those with a hundredth of the whole gradient's norm at least.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_result
from train_step import BATCH, ROOT, TURN_S, Child

from edge_agent.trainer import Trainer
from export.storage import stored_as_float16
from regrow.programs import program_name

RESULT = Path(__file__).parent / "results" / "storage.json"
MODELS = ("leaf_cnn", "vgg11", "resnet18_gn", "mobilenet_v2")
STORAGES = ("float32", "float16", "unsaturated", "in order")
NOTHING_BYTES = 1 << 50
TURNS = 7
LEAST_SHARE = 0.01


def stored(float32: Path, folder: Path, **options: Any) -> Path:
    """A copy of the folder with the training program of float16 storage."""
    shutil.copytree(float32, folder)
    program = stored_as_float16((folder / "train.onnx").read_bytes(), **options)
    if program is None:
        raise SystemExit("the shape of some value is not known")
    (folder / "train.onnx").write_bytes(program)
    return folder


def gradient_error(float32: Path, float16: Path) -> float:
    """The worst of a tensor with a hundredth of the gradient's norm."""
    vector = np.load(float32 / "vector.npy")
    with np.load(float32 / "batch.npz") as arrays:
        batch = arrays["x"], arrays["y"]
    steps = []
    for folder in (float32, float16):
        programs = {program_name(path.name): path.read_bytes() for path in folder.glob("*.onnx")}
        trainer = Trainer(programs | {"layout": (folder / "layout.json").read_bytes()})
        steps.append(trainer.train(vector, None, [batch], 1.0).vector - vector)
    exact, rounded = (trainer.layout.unflatten(step) for step in steps)
    least = LEAST_SHARE * np.linalg.norm(steps[0])
    heavy = [name for name, value in exact.items() if np.linalg.norm(value) >= least]
    return max(float(np.linalg.norm(rounded[name] - exact[name]) / np.linalg.norm(exact[name])) for name in heavy)


def rows_of(name: str, scratch: Path) -> list[dict[str, Any]]:
    folders = {"float32": scratch / "float32"}
    folders["float32"].mkdir()
    command = [sys.executable, str(ROOT / "bench" / "train_step.py"), "--serve", "build", "--models", name]
    subprocess.run([*command, "--folder", str(folders["float32"])], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    folders["float16"] = stored(folders["float32"], scratch / "float16")
    folders["unsaturated"] = stored(folders["float32"], scratch / "unsaturated", saturated=False)
    folders["in order"] = stored(folders["float32"], scratch / "in order", least_bytes=NOTHING_BYTES)
    children: dict[str, Child] = {}
    try:
        for storage in STORAGES:
            children[storage] = Child("onnxruntime", name, folders[storage], 1)
        count = max(1, round(TURN_S / children["float32"].step_s(1)))
        turns = [{storage: child.step_s(count) for storage, child in children.items()} for _ in range(TURNS)]
    finally:
        for child in children.values():
            child.close()
    return [
        {
            "model": name,
            "storage": storage,
            "ms": round(1e3 * statistics.median(turn[storage] for turn in turns), 3),
            "time_ratio": round(statistics.median(turn[storage] / turn["float32"] for turn in turns), 3),
            "peak_mb": round(child.peak_mb, 1),
            "gradient_error": gradient_error(folders["float32"], folders[storage]),
        }
        for storage, child in children.items()
    ]


def main() -> None:
    """Measure the models and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    known = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    rows = {(row["model"], row["storage"]): row for row in known}
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            for row in rows_of(name, Path(scratch)):
                rows[name, row["storage"]] = row
                print(json.dumps(row), flush=True)
        kept = [rows[key] for key in ((name, storage) for name in MODELS for storage in STORAGES) if key in rows]
        write_result(RESULT, {"command": "python bench/storage.py", "batch": BATCH, "rows": kept})


if __name__ == "__main__":
    main()
