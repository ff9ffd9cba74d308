"""Data of one's own in simulations: train.npz and test.npz."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.data import open_source
from regrow.errors import LocalError
from testbed import datasets
from testbed.splits import split


def test_data_of_ones_own_is_what_a_device_makes_of_it(tmp_path: Path) -> None:
    pixels, y = np.arange(48, dtype=np.uint8).reshape(6, 2, 4), np.array([0, 2, 1, 0, 1, 2])
    np.savez(tmp_path / "train.npz", x=pixels, y=y, user=np.array([7, 7, 7, 9, 9, 9], np.int32), part=np.array([0, 0, 1, 0, 0, 1]))
    np.savez(tmp_path / "test.npz", x=pixels[:2], y=np.array([0, 3], np.uint8))
    loaded = datasets.load("npz", tmp_path)
    on_device = open_source(str(tmp_path / "train.npz"))
    x, labels = on_device.validation()
    assert (loaded.train.x[loaded.train.part == 1] == x).all()
    assert (loaded.train.y[loaded.train.part == 1] == labels).all()
    assert loaded.train.user is not None
    assert loaded.train.user.tolist() == [7, 7, 7, 9, 9, 9]
    assert (loaded.train.classes, loaded.test.classes, loaded.test.user) == (4, 4, None)
    assert datasets.files_of("npz", tmp_path) == [tmp_path / "train.npz", tmp_path / "test.npz"]
    floats = np.array([[-1.5, 300.0]])
    np.savez(tmp_path / "train.npz", x=floats, y=np.array([0]))
    np.savez(tmp_path / "test.npz", x=floats, y=np.array([0]))
    assert datasets.load("npz", tmp_path).train.x.tolist() == [[-1.5, 300.0]]


def test_values_are_dealt_at_random_but_not_by_label(tmp_path: Path) -> None:
    for name, count in (("train", 40), ("test", 5)):
        np.savez(tmp_path / f"{name}.npz", x=np.arange(2 * count).reshape(count, 2), y=np.linspace(0, 1, count).reshape(count, 1))
    train = datasets.load("npz", tmp_path).train
    assert (train.x.dtype, train.y.dtype, train.classes) == (np.int64, np.float32, 0)
    assert sorted(np.concatenate(split(train, 4, "iid", 0)).tolist()) == list(range(40))
    for kind in ("dirichlet:0.3", "shards:2"):
        with pytest.raises(LocalError, match="take iid or user"):
            split(train, 4, kind, 0)


@pytest.mark.parametrize(
    ("file", "arrays", "said"),
    [
        ("train", {"x": np.zeros((2, 3))}, r"train\.npz has no array 'y'"),
        ("train", {"x": np.zeros((2, 3)), "y": np.zeros(3, int)}, r"train\.npz: y"),
        ("test", {"x": np.full((2, 3), np.nan), "y": np.zeros(2, int)}, r"test\.npz: x\[0, 0\] is not a finite"),
        ("test", {"x": np.zeros((2, 4)), "y": np.zeros(2, int)}, r"test\.npz: an example has shape \[4\], in train\.npz \[3\]"),
        ("test", {"x": np.zeros((0, 3)), "y": np.zeros(0, int)}, r"test\.npz holds no examples"),
        ("train", {"x": np.zeros((2, 3)), "y": np.zeros(2, int), "user": np.zeros(2)}, r"train\.npz: user is float64\[2\]"),
        ("train", {"x": np.zeros((2, 3)), "y": np.zeros(2, int), "part": np.array([0, 2])}, "part must be 0"),
        ("test", {"x": np.zeros((2, 3), np.int16), "y": np.zeros(2, int)}, r"test\.npz: x is int16"),
        ("test", {"x": np.zeros((2, 3)), "y": np.zeros(2)}, r"test\.npz: x or y is of another kind"),
        ("test", None, r"no .*test\.npz: put train\.npz and test\.npz"),
    ],
)
def test_mistakes_in_ones_own_data_name_the_file(tmp_path: Path, file: str, arrays: dict[str, NDArray[Any]] | None, said: str) -> None:
    for name in ("train", "test"):
        np.savez(tmp_path / f"{name}.npz", x=np.zeros((2, 3)), y=np.zeros(2, int))
    if arrays is None:
        (tmp_path / f"{file}.npz").unlink()
    else:
        np.savez(tmp_path / f"{file}.npz", **arrays)  # type: ignore[arg-type]  # NumPy's stub takes the keywords for allow_pickle
    with pytest.raises(LocalError, match=said):
        datasets.load("npz", tmp_path)
    with pytest.raises(LocalError, match="npz needs a folder"):
        datasets.load("npz")
