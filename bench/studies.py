"""What the smaller studies of simulated runs share: the setting of bench/methods.py, and rows of it with a report."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from rich.console import Console

from cli.main import main as regrow
from testbed.compare import Failure, in_processes, run_all
from testbed.outcome import Outcome, Spec
from testbed.report import Comparison, write_report

RESULTS = Path(__file__).parent / "results"
FOLDER = Path("runs/methods")
FLOAT32 = {"wire.up": "float32", "wire.down": "float32"}
BASE = Spec(data="fashion-mnist", split="dirichlet:0.3", links="high", seconds=3000.0, points=100, validation=0.05)


def task_folder(name: str = "fashion", model: str = "reduced_cnn", folder: Path = FOLDER) -> Path:
    """The task, made where it is not yet."""
    task = folder / name
    if not (task / "task.toml").exists() and regrow(["task", "new", str(task), "--model", model]):
        raise SystemExit(f"{task} could not be made")
    return task


def tuned_rate(method: str) -> float:
    """The learning rate that `bench/methods.py` chose."""
    found = json.loads((RESULTS / "methods-fashion.json").read_text())["methods"][method]["tuned"]
    return float(found["training.learning_rate"])


def with_settings(spec: Spec, settings: Mapping[str, Any]) -> Spec:
    """The specification with these keys of task.toml above its own."""
    return replace(spec, settings={**spec.settings, **settings})


def outcomes_of(task: Path, rows: Mapping[str, Spec], seeds: int, out: Path) -> dict[str, list[Outcome]]:
    """Every row with seeds 1..seeds; what lies in `out` already is not run again. A failed run ends the study."""
    console = Console()
    specs = [replace(spec, seed=seed) for seed in range(1, seeds + 1) for spec in rows.values()]
    names = [name for _ in range(seeds) for name in rows]
    found: dict[str, list[Outcome]] = {name: [] for name in rows}
    results: list[Outcome | None] = [None] * len(specs)
    for done, (number, result) in enumerate(run_all(task, specs, out, in_processes(os.cpu_count() or 1)), 1):
        if isinstance(result, Failure):
            raise SystemExit(str(result))
        results[number] = result
        said = f"{done}/{len(specs)}: {names[number]} seed {specs[number].seed}: accuracy {result.final_accuracy:.4f}"
        console.print(said, highlight=False, markup=False)
    for name, result in zip(names, results, strict=True):
        if result is not None:
            found[name].append(result)
    return found


def report(outcomes: Mapping[str, list[Outcome]], target: float, reference: str, out: Path) -> dict[str, Any]:
    """`regrow compare`'s report of these rows in `out`; returns its summary."""
    return write_report(Comparison(outcomes, target, reference, command()), out)


def command() -> str:
    """This bench as it was called."""
    return shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
