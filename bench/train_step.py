"""Is a training step on plain onnxruntime as fast and as small as torch's? Every model of the zoo, one thread and two.

    python bench/train_step.py                  # about ten minutes
    python bench/train_step.py --models lstm    # only these; what is known of the others stays

For each model and number of threads two processes are started that do nothing else: one trains with the programs as a device does
(edge_agent.trainer; torch is never imported), one with torch.optim.SGD. They take turns, so that both meet the same machine; the ratio is
the median over the turns. Peaks are of the whole processes (VmHWM): interpreter, libraries, weights, step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "train_step.json"
BATCH = 20
LEARNING_RATE = 1e-3
TURNS = 9
TURN_S = 0.4


def build(name: str, folder: Path) -> None:
    """Write what the onnxruntime process needs: programs, first weights, a batch."""
    import numpy as np
    import torch

    from export.from_torch import from_torch
    from export.programs import build_programs, initial_vector
    from export.zoo import ZOO
    from regrow.programs import program_file
    from regrow.task import Training

    model = ZOO[name]
    module = model.module(model.real, 0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, *model.real.shape)).astype(np.float32)
    training = Training() if model.loss == "cross_entropy" else Training(loss=model.loss, target="input")
    forward = from_torch(module, torch.from_numpy(x))
    for program, content in build_programs(forward, training=training).items():
        (folder / program_file(program)).write_bytes(content)
    np.save(folder / "vector.npy", initial_vector(forward))
    np.savez(folder / "batch.npz", x=x, y=x if model.loss == "mse" else rng.integers(0, model.real.classes, BATCH))


def serve_onnxruntime(folder: Path, threads: int) -> None:
    """Answer every number on standard input by the seconds of so many steps."""
    import numpy as np

    from edge_agent.trainer import Trainer
    from regrow.programs import program_name

    programs = {program_name(path.name): path.read_bytes() for path in folder.glob("*.onnx")}
    programs["layout"] = (folder / "layout.json").read_bytes()
    trainer, vector = Trainer(programs, threads), np.load(folder / "vector.npy")
    with np.load(folder / "batch.npz") as arrays:
        batch = arrays["x"], arrays["y"]

    def steps(count: int) -> None:
        trainer.train(vector, None, [batch] * count, LEARNING_RATE)

    _answer(steps)


def serve_torch(folder: Path, threads: int, name: str) -> None:
    """The same with torch."""
    import numpy as np
    import torch

    from export.zoo import ZOO

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    model = ZOO[name]
    module = model.module(model.real, 0).train()
    with np.load(folder / "batch.npz") as arrays:
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    loss = torch.nn.MSELoss() if model.loss == "mse" else torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss(module(x), y).backward()
            optimizer.step()

    _answer(steps)


def _answer(steps: Any) -> None:
    steps(2)
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        steps(int(line))
        print(time.perf_counter() - started, _peak_mb(), flush=True)


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


class Child:
    """One process that trains when told to."""

    def __init__(self, kind: str, name: str, folder: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--serve", kind, "--models", name, "--folder", str(folder), "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._line()
        self.peak_mb = 0.0

    def step_s(self, count: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        seconds, self.peak_mb = map(float, self._line().split())
        return seconds / count

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a child ended with status {self._process.wait()}; its message is above")
        return line


def row(name: str, threads: int, folder: Path) -> dict[str, Any]:
    children = []
    try:
        for kind in ("onnxruntime", "torch"):
            children.append(Child(kind, name, folder, threads))
        counts = [max(1, round(TURN_S / child.step_s(1))) for child in children]
        turns = [[child.step_s(count) for child, count in zip(children, counts, strict=True)] for _ in range(TURNS)]
    finally:
        for child in children:
            child.close()
    ours, theirs = (statistics.median(column) for column in zip(*turns, strict=True))
    peaks = [child.peak_mb for child in children]
    return {
        "model": name,
        "threads": threads,
        "ort_ms": round(ours * 1e3, 3),
        "torch_ms": round(theirs * 1e3, 3),
        "time_ratio": round(statistics.median(a / b for a, b in turns), 3),
        "ort_peak_mb": round(peaks[0], 1),
        "torch_peak_mb": round(peaks[1], 1),
        "peak_ratio": round(peaks[0] / peaks[1], 3),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over the models, for each number of threads."""
    found: dict[str, Any] = {}
    for threads in sorted({row["threads"] for row in rows}):
        mine = [row for row in rows if row["threads"] == threads]
        for key in ("time_ratio", "peak_ratio"):
            mean = math.exp(statistics.mean(math.log(row[key]) for row in mine))
            found[f"{key}_{threads}_thread{'s' * (threads > 1)}"] = round(mean, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of export/zoo.py (default: all)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    parser.add_argument("--serve", choices=["onnxruntime", "torch", "build"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.serve == "build":
        return build(args.models[0], args.folder)
    if args.serve == "onnxruntime":
        return serve_onnxruntime(args.folder, args.threads[0])
    if args.serve == "torch":
        return serve_torch(args.folder, args.threads[0], args.models[0])
    from machine import write_result

    from export.zoo import ZOO

    known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = {(old["model"], old["threads"]): old for old in known}
    for name in args.models or ZOO:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, __file__, "--serve", "build", "--models", name, "--folder", scratch]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
            for threads in args.threads:
                rows[name, threads] = found = row(name, threads, Path(scratch))
                print(json.dumps(found), flush=True)
        kept = [rows[key] for key in ((model, threads) for model in ZOO for threads in (1, 2)) if key in rows]
        write_result(args.out, {"command": "python bench/train_step.py", "batch": BATCH, "means": summary(kept), "rows": kept})
    print(json.dumps(summary(kept)))


if __name__ == "__main__":
    main()
