"""The networks that a run has made, ready for use: what `serve` leaves as model.onnx, `promote` signs off and `export` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker_server.runs import TaskFolder
from edge_agent.data.sources import open_source
from edge_agent.trainer import Trainer
from export.inference import level_model
from export.task import read_model, save_model
from regrow.errors import LocalError
from regrow.ledger import Ledger
from regrow.levels import densities_of, only_prefix
from regrow.local_training import Statistics, statistics_from

WITHOUT_DATA = (
    "the trained weights, but the running means and variances of the model that the run began with: they come from data, and none is here"
)


@dataclass(frozen=True, eq=False)
class Sample:
    """Features [m, ...] that running means and variances are computed from; `name` is their file, for errors."""

    name: str
    x: NDArray[Any]


def network(folder: TaskFolder, ledger: Ledger, level: int, sample: Sample | None) -> Any:
    """The ONNX model of a level, with the running means and variances that this level's weights have on the sample.

    Args:
        level: of the ledger's order; the last is the global model.
        sample: None: the file's own means and variances stay. A model without batch normalisation needs none.

    Raises:
        LocalError: the sample does not fit the model.
    """
    slicing = None if folder.units is None else (folder.layout, folder.units, densities_of(folder.task))
    statistics = _statistics(folder, ledger, level, sample)
    train_last = folder.task.training.train_last
    return level_model(
        read_model(folder.model_path), ledger.trained_weights, ledger.order, level, slicing, train_last=train_last, statistics=statistics
    )


def has_statistics(folder: TaskFolder) -> bool:
    """Whether running means and variances of the model change with what is trained."""
    return "statistics" in folder.programs


def held_out(folder: TaskFolder) -> tuple[str, NDArray[Any], NDArray[Any]] | None:
    """(file, x, y) of the evaluation data, which a run keeps beside its task.toml; None where it has none."""
    if folder.task.evaluation.data is None:
        return None
    named = folder.path / folder.task.evaluation.data
    file = str(named if named.is_file() else folder.path / named.name)
    return file, *open_source(file, validation_fraction=0.0).everything()


def write_deployable(folder: TaskFolder, ledger: Ledger, path: Path) -> None:
    """The global model, with the statistics of the evaluation data; without such data a line says whose they are."""
    own = held_out(folder) if has_statistics(folder) else None
    save_model(network(folder, ledger, len(ledger.order.lengths) - 1, None if own is None else Sample(*own[:2])), path)
    if own is None and has_statistics(folder):
        print(
            f"model.onnx has {WITHOUT_DATA}. Name held-out data in [evaluation] of task.toml before the next run, or let "
            "`regrow export RUN --calibrate DATA` compute them"
        )


def _statistics(folder: TaskFolder, ledger: Ledger, level: int, sample: Sample | None) -> Statistics:
    order, flat_weights = ledger.order, ledger.trained_weights
    length = order.lengths[level]
    suffix, vector = "", only_prefix(order, flat_weights, length)
    if folder.units is not None and length < order.size:
        suffix, vector = f":{level}", flat_weights[np.sort(order.coordinates[:length])]
    if sample is None or f"statistics{suffix}" not in folder.programs:
        return {}
    trainer = Trainer({name: folder.programs[f"{name}{suffix}"] for name in ("layout", "statistics")})
    try:
        return statistics_from(trainer, vector, sample.x)
    except LocalError as error:
        raise LocalError(f"{sample.name}: {error}") from error
