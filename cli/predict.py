"""`regrow predict`: runs the promoted model that is in place on a device, as an application there would."""

from __future__ import annotations

import argparse
import csv
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.bundle import read_bundle
from edge_agent.data.source import DataSource
from edge_agent.data.sources import open_source
from edge_agent.inference import Inference
from edge_agent.model_folder import ModelFolder, Placed
from regrow.errors import LocalError
from regrow.local_step import Step
from regrow.scoring import score_name, score_outputs


def predict(options: argparse.Namespace) -> int:
    """Print or write what the model says of every example."""
    if options.out is not None and options.out.suffix not in (".npz", ".csv"):
        raise LocalError(f"--out {options.out}: name a file that ends in .npz or .csv")
    placed = _placed(_state(options.state), options.task)
    head = {} if options.no_head else placed.head()
    x, y = samples(options.data)
    scores = Inference(placed.model(), options.threads).run(x, head)
    step = Step.from_metadata(placed.about.step or None)
    if options.out is not None:
        _write(options.out, scores)
    else:
        _print(scores, classes=step.classifies)
    said = f"{len(x)} examples, {placed.path}{' with its local head' if head else ''}"
    if y is not None or step.target == "input":
        score = score_outputs(scores, x, x if y is None else y, step)
        said = f"{said}: {score_name(step)} {score.accuracy:.3f}, loss {score.loss:.3f}"
    print(said, file=sys.stderr)
    return 0


def _state(path: Path) -> Path:
    """The state folder that is named, or that of a bundle."""
    if path.is_dir():
        return path
    name = f"regrow-state-{read_bundle(path).device}"
    for folder in (Path(name), path.parent / name):
        if folder.is_dir():
            return folder
    raise LocalError(f"{path}: there is no {name} here or beside it; name the folder that the agent was given with --state")


def _placed(state: Path, task: str | None) -> Placed:
    folders = ModelFolder.all(state)
    there = {name: placed for name, folder in folders.items() if (placed := folder.current()) is not None}
    if task is None and len(there) > 1:
        raise LocalError(f"{state} holds models of {', '.join(there)}: say which with --task")
    chosen = there.get(task or next(iter(there), ""))
    if chosen is None:
        which = f" of {task}" if task else ""
        lost = [name for name, folder in folders.items() if name not in there and (folder.path / "current").is_symlink()]
        if task in lost or (task is None and lost):
            raise LocalError(
                f"{state}: the promoted model{which} is damaged: start the agent, which takes the one before it or fetches anew"
            )
        raise LocalError(f"{state} holds no promoted model{which}: `regrow promote RUN` on the gateway sends one")
    return chosen


def samples(spec: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """(x [n, ...], y or None) of a data source; an .npz without y, or a csv: without label=, has none.

    Raises:
        LocalError: as open_source.
    """
    x = _unlabelled(spec)
    if x is None:
        return open_source(spec, validation_fraction=0.0).everything()
    if not len(x):
        raise LocalError(f"{spec} holds no samples")
    source = DataSource(len(x), 0.0)
    try:
        source.append(x, np.zeros(len(x), np.int64))
    except LocalError as error:
        raise LocalError(f"{spec}: {error}") from error
    return source.everything()[0], None


def _unlabelled(spec: str) -> NDArray[Any] | None:
    kind, _, rest = spec.partition(":")
    try:
        if kind == "csv" and "?" not in rest:
            with Path(rest).open(newline="", encoding="utf-8") as file:
                table: NDArray[Any] = np.loadtxt(file, np.float32, delimiter=",", skiprows=1, ndmin=2)
            return table
        if not spec.endswith(".npz"):
            return None
        with zipfile.ZipFile(spec) as archive:
            labelled = "y.npy" in archive.namelist()
        if labelled:
            return None
        with np.load(spec, allow_pickle=False) as arrays:
            x: NDArray[Any] = arrays["x"]
        return x
    except KeyError as error:
        raise LocalError(f"{spec} has no array 'x': write it with numpy.savez(file, x=...)") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise LocalError(f"cannot read {spec}: {error}") from error


def _print(scores: NDArray[np.float32], *, classes: bool) -> None:
    """A line for each example: its class and that one's score, or the numbers of its output."""
    for row in scores:
        if classes:
            print(f"{int(row.argmax())} {float(row.max()):.6g}")
        else:
            print(" ".join(f"{float(value):.6g}" for value in row.reshape(-1)))


def _write(path: Path, scores: NDArray[np.float32]) -> None:
    if path.suffix == ".npz":
        np.savez(path, scores=scores)
        return
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        flat = scores.reshape(len(scores), -1)
        rows.writerow([f"output{place}" for place in range(flat.shape[1])])
        rows.writerows([float(value) for value in row] for row in flat)
