"""Data of one's own for simulations: train.npz and test.npz in a folder, written with numpy.savez.

Arrays x and y are those of a device's file (docs/bring-your-own.md): x uint8 or uint16, scaled to 0..1, floats, used as they are, or
int32 or int64, tokens; y labels from 0, or floats to come near to, which only the splits iid and user can deal. train.npz may also have
`user`, whole numbers that say whose an example is (for --split user), and `part`, 0 training and 1 validation. Other arrays are not read.
Without `part`, validation data is drawn from each client's examples: give it where neighbours overlap in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.data.source import check_samples, given_out, stored, stored_target
from edge_agent.data.sources import npz_arrays
from regrow.errors import LocalError

CURE = "put train.npz and test.npz into one folder, each with arrays x and y, and name it with --data-folder"


@dataclass(frozen=True)
class Part:
    """One file's examples: x float32 or int64 [N, ...], y int64 [N] or float32 [N, ...], user and part int64 [N] where they are there."""

    file: Path
    x: NDArray[Any]
    y: NDArray[Any]
    user: NDArray[np.int64] | None
    part: NDArray[np.int64] | None


def files(folder: Path) -> list[Path]:
    """The two files.

    Raises:
        LocalError: one of them is not there.
    """
    found = [folder / name for name in ("train.npz", "test.npz")]
    for file in found:
        if not file.is_file():
            raise LocalError(f"no {file}: {CURE}")
    return found


def parts(folder: Path) -> tuple[Part, Part]:
    """Training and test data.

    Raises:
        LocalError: a file that is not there or malformed, with its name and the cure.
    """
    train_file, test_file = files(folder)
    train, test = _part(train_file, ("user", "part")), _part(test_file, ())
    if train.x.shape[1:] != test.x.shape[1:]:
        raise LocalError(
            f"{test_file}: an example has shape {list(test.x.shape[1:])}, in train.npz {list(train.x.shape[1:])}: make them alike"
        )
    if train.part is not None and not np.isin(train.part, (0, 1)).all():
        raise LocalError(f"{train_file}: part must be 0 (training) or 1 (validation) for every example")
    return train, test


def _part(file: Path, more: tuple[str, ...]) -> Part:
    arrays = npz_arrays(file, ("x", "y", *more))
    x, y = arrays["x"], arrays["y"]
    try:
        check_samples(x, y)
    except LocalError as error:
        raise LocalError(f"{file}: {error}") from error
    if not len(y):
        raise LocalError(f"{file} holds no examples: {CURE}")
    extra = (_whole_numbers(arrays.get(name), name, len(y), file) for name in ("user", "part"))
    return Part(file, given_out(stored(x)), stored_target(y), *extra)


def _whole_numbers(array: NDArray[Any] | None, name: str, count: int, file: Path) -> NDArray[np.int64] | None:
    if array is not None and (array.dtype.kind not in "iu" or array.shape != (count,)):
        raise LocalError(f"{file}: {name} is {array.dtype}{list(array.shape)}; give a whole number for each of the {count} examples")
    return None if array is None else array.astype(np.int64)
