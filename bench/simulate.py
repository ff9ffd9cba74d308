"""Where does the time of a simulated run go, and how many rounds does it make in a second? One process, one thread.

    python bench/simulate.py

Seconds are the process's own (its CPU time), so that other work on the machine does not count; on an idle one they are wall time.
Share outside training: everything but edge_agent.worker.train_job, that is the two state machines, the world around them, and scoring the
curve on test data, where the end of the run scores all of it. Inside training, SGD steps and a device's validation data are told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

from machine import write_result

import testbed.trainers
from broker_server.runs import load_task
from cli.main import main as regrow
from edge_agent.trainer import Trainer
from regrow.coordinator import Coordinator
from regrow.device import Device
from testbed.outcome import Spec
from testbed.simulate import Simulation, task_of

RESULT = Path(__file__).parent / "results" / "simulate.json"
METHODS = ("fedgmr", "fedasync")
PLACES: tuple[tuple[Any, str, str], ...] = (
    (Trainer, "train", "sgd"),
    (Trainer, "evaluate", "validation"),
    (testbed.trainers, "train_job", "training"),
    (Coordinator, "step", "coordinator"),
    (Device, "step", "devices"),
)
SETTINGS = {"training.local_steps": 5, "training.batch": 20, "wire.up": "float32", "wire.down": "float32"}


class Stopwatch:
    """Seconds spent inside wrapped functions, by name; `inside` tells evaluation within a job from that of the curve."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}
        self.inside = False

    def wrap(self, name: str, function: Callable[..., Any], *, job: bool = False) -> Callable[..., Any]:
        """The same function, timed; the time of `evaluate` outside a job counts for the curve."""

        def run(*arguments: Any, **options: Any) -> Any:
            label = "curve" if name == "validation" and not self.inside else name
            self.inside |= job
            started = time.process_time()
            result = function(*arguments, **options)
            self.spent_s[label] = self.spent_s.get(label, 0.0) + time.process_time() - started
            if job:
                self.inside = False
            return result

        return run


def measure(task: Path, method: str, seconds: float) -> dict[str, Any]:
    """One run of `seconds` virtual seconds."""
    folder = load_task(task)
    spec = Spec(method=method, settings=SETTINGS, data="fashion-mnist", split="dirichlet:0.3", links="high", seconds=seconds, points=10)
    watch = Stopwatch()
    with ExitStack() as stack:
        for owner, name, label in PLACES:
            timed = watch.wrap(label, getattr(owner, name), job=label == "training")
            stack.enter_context(patch.object(owner, name, timed))
        begun = time.perf_counter()
        simulation = Simulation(folder, task_of(folder, {"name": "bench"}, spec), spec)
        watch.spent_s.clear()
        started, started_wall = time.process_time(), time.perf_counter()
        outcome = simulation.run()
        run_s, wall_s = time.process_time() - started, time.perf_counter() - started_wall
    last, spent = outcome.points[-1], watch.spent_s
    machinery_s = run_s - spent["training"] - spent["curve"]
    return {
        "virtual_seconds": last.time_s,
        "loading_wall_s": started_wall - begun,
        "run_wall_s": wall_s,
        "run_s": run_s,
        "training_s": spent["training"],
        "sgd_s": spent["sgd"],
        "validation_s": spent["validation"],
        "curve_s": spent["curve"],
        "coordinator_s": spent["coordinator"],
        "devices_s": spent["devices"],
        "world_s": machinery_s - spent["coordinator"] - spent["devices"],
        "share_outside_training": 1 - spent["training"] / run_s,
        "share_outside_training_and_scoring": machinery_s / run_s,
        "aggregations": last.version,
        "updates": last.updates,
        "aggregations_per_s": last.version / run_s,
        "updates_per_s": last.updates / run_s,
        "final_accuracy": outcome.final_accuracy,
    }


def main() -> None:
    """Measure both methods and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=300.0, help="virtual seconds of each run")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "fashion"
        if regrow(["task", "new", str(task), "--model", "reduced_cnn"]):
            raise SystemExit("the task could not be made")
        methods = {method: measure(task, method, options.seconds) for method in METHODS}
    result = {"command": f"python bench/simulate.py --seconds {options.seconds:g}", "settings": SETTINGS, "methods": methods}
    write_result(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
