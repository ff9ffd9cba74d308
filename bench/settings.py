"""What the settings of a training step change on this machine: ways, onnxruntime's memory, float16 storage.

    python bench/settings.py

CPU time of a step relative to the default's, settings taking turns step by step, medians; one thread. Memory: what a process takes more
(VmHWM) for the programs' session and five steps, one process for each. float16: parameters come and go as float16, with Casts in the
program, and all arithmetic stays float32. Zoo models are those of export/zoo.py.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import onnxruntime as ort
import torch
from machine import write_result
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge_agent.trainer import Trainer
from edge_agent.tuning import Setting
from export.from_torch import from_torch
from export.programs import initial_vector
from export.task import published_programs
from export.zoo import ZOO
from regrow.local_training import Batch
from regrow.parameters import Layout
from regrow.programs import ways_of
from regrow.task import Training

RESULT = Path(__file__).parent / "results" / "settings.json"
SESSIONS: Mapping[str, Mapping[str, bool]] = {
    "default": {},
    "no memory pattern": {"enable_mem_pattern": False},
    "no arena": {"enable_cpu_mem_arena": False},
    "neither": {"enable_mem_pattern": False, "enable_cpu_mem_arena": False},
    "float16": {},
}
STEPS = 4
MEMORY_OF = "leaf_cnn"


def model_of(name: str) -> tuple[onnx.ModelProto, Training]:
    zoo = ZOO[name]
    training = Training(loss="mse", target="input") if zoo.loss == "mse" else Training()
    return from_torch(zoo.module(zoo.real, 0), torch.zeros(1, *zoo.real.shape)), training


def ways_row(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """CPU time of a step in every way, with all parameters and with a fifth of them."""
    model, training = model_of(name)
    programs, vector = published_programs(model, training=training), initial_vector(model)
    layout = Layout.from_json(programs["layout"])
    rng = np.random.default_rng(1)
    kept = rng.random(layout.size) < 0.2
    kept[layout.always_kept_coordinates] = True
    zoo = ZOO[name]
    batches: list[Batch] = [
        (rng.standard_normal((batch, *zoo.real.shape)).astype(np.float32), rng.integers(0, zoo.real.classes or 1, batch))
    ]
    calls: dict[str, Callable[[], object]] = {}
    for program, mask in (("train", None), ("train_masked", kept)):
        for way in ["", *ways_of(programs, program)]:
            trainer = Trainer(Setting(1, {program: way} if way else {}).programs(programs))
            values = vector if mask is None else np.where(mask, vector, np.float32(0))
            calls[f"{program} {way or 'default'}"] = lambda t=trainer, v=values, m=mask: t.train(v, m, batches, 0.01)
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            started = time.process_time()
            call()
            if number:
                seconds[key].append(time.process_time() - started)
    default = median(seconds["train default"])
    return {"model": name, "batch": batch} | {key: round(median(took) / default, 3) for key, took in seconds.items()}


def half_stored(program: bytes, layout: Layout) -> bytes:
    """The program with parameters that are float16 outside of it."""
    model = onnx.ModelProto.FromString(program)
    names = {tensor.name for tensor in layout.tensors}
    for node in model.graph.node:
        node.input[:] = [f"wide:{name}" if name in names else name for name in node.input]
        node.output[:] = [f"wide:{name}" if name.startswith("new:") else name for name in node.output]
    before = [helper.make_node("Cast", [name], [f"wide:{name}"], to=TensorProto.FLOAT) for name in sorted(names)]
    after = [helper.make_node("Cast", [f"wide:new:{name}"], [f"new:{name}"], to=TensorProto.FLOAT16) for name in sorted(names)]
    nodes = [*before, *model.graph.node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.removeprefix("new:") in names:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def measure(program: Path, layout: Path, setting: str, batch: int) -> None:
    """Print bytes and seconds of five steps, in a fresh process."""
    tensors = Layout.from_json(layout.read_bytes()).tensors
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    base = status_bytes("VmRSS")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for name, value in SESSIONS[setting].items():
        setattr(options, name, value)
    session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])
    dtype = np.float16 if setting == "float16" else np.float32
    moving: dict[str, NDArray[Any]] = {tensor.name: np.full(tensor.shape, 0.01, dtype) for tensor in tensors}
    feed = data_of(session, batch)
    took = []
    for _ in range(5):
        started = time.process_time()
        _, *moved = session.run(["loss", *(f"new:{name}" for name in moving)], feed | moving)
        moving = dict(zip(moving, moved, strict=True))
        took.append(time.process_time() - started)
    print(status_bytes("VmHWM") - base, median(took))


def data_of(session: ort.InferenceSession, batch: int) -> dict[str, NDArray[Any]]:
    """The inputs of one step but the parameters."""
    x = next(item for item in session.get_inputs() if item.name == "x")
    shape = (batch, *x.shape[1:])
    ones = np.ones(batch, np.float32)
    return {
        "x": np.ones(shape, np.float32),
        "y": np.zeros(batch, np.int64),
        "sample_weight": ones,
        "learning_rate": np.array(0.01, np.float32),
    }


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def memory_rows(batch: int, rounds: int) -> list[dict[str, Any]]:
    """Memory and CPU time by session setting, settings taking turns process by process."""
    model, training = model_of(MEMORY_OF)
    programs = published_programs(model, training=training)
    found: dict[str, list[tuple[int, float]]] = {setting: [] for setting in SESSIONS}
    with tempfile.TemporaryDirectory() as scratch:
        layout, plain, half = (Path(scratch) / name for name in ("layout", "plain", "half"))
        layout.write_bytes(programs["layout"])
        plain.write_bytes(programs["train"])
        half.write_bytes(half_stored(programs["train"], Layout.from_json(programs["layout"])))
        for _ in range(rounds):
            for setting in SESSIONS:
                program = half if setting == "float16" else plain
                arguments = [sys.executable, __file__, "--batch", str(batch), "--measure", str(program), str(layout), setting]
                taken, seconds = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()
                found[setting].append((int(taken), float(seconds)))
    default = median(seconds for _, seconds in found["default"])
    return [
        {
            "model": MEMORY_OF,
            "batch": batch,
            "setting": setting,
            "mb": round(median(taken for taken, _ in each) / 1e6, 1),
            "cpu": round(median(seconds for _, seconds in each) / default, 3),
        }
        for setting, each in found.items()
    ]


def main() -> None:
    """Measure all and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["leaf_cnn", "ds_cnn", "watch_cnn", "autoencoder", "mobilenet_v2"]
    parser.add_argument("--models", nargs="+", default=models, choices=list(ZOO), help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=20, help="examples of a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="times 4 steps of each (default: %(default)s)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        program, layout, setting = options.measure
        measure(Path(program), Path(layout), setting, options.batch)
        return
    ways = []
    for name in options.models:
        ways.append(ways_row(name, options.batch, options.rounds))
        print(ways[-1], flush=True)
    sessions = memory_rows(options.batch, 3)
    print(*sessions, sep="\n")
    write_result(RESULT, {"command": "python bench/settings.py", "ways": ways, "sessions": sessions})


if __name__ == "__main__":
    main()
