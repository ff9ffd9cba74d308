"""How many SGD steps a second do the simulator's trainers make: onnxruntime, torch, and torch with the clients of a wave as one batch?

Every trainer does the same jobs: `clients` devices, each with its own batches, `steps` steps of `batch` examples; half of the devices train
a masked sub-model. One thread. The trainers take turns, so that a noisy neighbour hits all alike, and medians are compared: by the clock,
and by the processor time of this process, which a busy machine disturbs less (it says nothing about a GPU). What is built once for a run
(sessions, graphs) is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_result

from edge_agent.trainer import Trainer
from export.models import MODELS
from export.programs import build_programs, initial_vector
from export.torch_trainer import Share, TorchTrainer


def shares_of(trainer: TorchTrainer, vector: Any, shape: tuple[int, ...], args: argparse.Namespace) -> list[Share]:
    shares = []
    for client in range(args.clients):
        rng = np.random.default_rng(client)
        kept = None
        if client % 2:
            kept = rng.random(vector.size) < 0.25
            kept[trainer.layout.always_kept_coordinates] = True
        x = rng.random((args.steps, args.batch, *shape), np.float32)
        batches = list(zip(x, rng.integers(0, 10, (args.steps, args.batch)), strict=True))
        shares.append(Share(vector, kept, batches, 0.01))
    return shares


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Client steps per second and per second of processor time of every trainer, medians of interleaved repetitions."""
    model = MODELS[name](1)
    programs, vector = build_programs(model), initial_vector(model)
    shape = tuple(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)[1:]
    onnx, torch = Trainer(programs), TorchTrainer(programs)
    shares = shares_of(torch, vector, shape, args)
    contenders: dict[str, Callable[[], Any]] = {
        "onnxruntime": lambda: [onnx.train(s.vector, s.kept, s.batches, s.learning_rate) for s in shares],
        "torch": lambda: [torch.train(s.vector, s.kept, s.batches, s.learning_rate) for s in shares],
        "torch_wave": lambda: torch.train_together(shares),
    }
    if args.cuda:
        cuda = TorchTrainer(programs, device="cuda")
        contenders["torch_cuda"] = lambda: [cuda.train(s.vector, s.kept, s.batches, s.learning_rate) for s in shares]
        contenders["torch_cuda_wave"] = lambda: cuda.train_together(shares)
    vectors = {key: np.stack([result.vector for result in work()]) for key, work in contenders.items()}  # and everything is warm
    for key, found in vectors.items():
        np.testing.assert_allclose(found, vectors["onnxruntime"], rtol=1e-2, atol=1e-4, err_msg=key)
    times: dict[str, list[float]] = {f"{key}_steps_per_{unit}": [] for key in contenders for unit in ("s", "cpu_s")}
    for _ in range(args.repetitions):
        for key, work in contenders.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            work()
            times[f"{key}_steps_per_s"].append(time.perf_counter() - started)
            times[f"{key}_steps_per_cpu_s"].append(time.process_time() - started_cpu)
    return {key: round(args.clients * args.steps / statistics.median(taken), 1) for key, taken in times.items()}


def main() -> None:
    default = Path(__file__).resolve().parent / "results" / "trainers.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reduced_cnn"], choices=MODELS, help="by name (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=10, help="of one wave (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="of each client (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=20, help="examples of a step (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each trainer, interleaved (default: %(default)s)")
    parser.add_argument("--cuda", action="store_true", help="torch on the GPU too")
    parser.add_argument("--out", type=Path, default=default, help="where the JSON goes (default: bench/results/trainers.json)")
    args = parser.parse_args()
    figures = {name: measure(name, args) for name in args.models}
    setting = {"clients": args.clients, "steps": args.steps, "batch": args.batch, "repetitions": args.repetitions, "threads": 1}
    write_result(args.out, {"setting": setting, "torch": version("torch"), "models": figures})
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
