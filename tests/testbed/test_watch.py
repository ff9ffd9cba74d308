"""The watch data: windows that cannot leak, a parser that runs nothing, and the real data's counts."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from regrow.errors import LocalError
from testbed import watch


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    watch.obtain(folder)  # from the cache, or by pip
    return folder


def clock(length: int) -> watch.Recording:
    """A recording whose every sample is its own time."""
    samples = np.repeat(np.arange(length, dtype=np.float32)[:, None], 6, axis=1)
    return watch.Recording(wearer=3, label=4, samples=samples)


def times(part: watch.Windows, group: int) -> NDArray[np.int64]:
    """The times inside the windows of one recording, from the standardised first channel."""
    x = part.x[part.group == group, 0]
    whole: NDArray[np.int64] = np.rint(x * watch.CHANNEL_STD[0] + watch.CHANNEL_MEAN[0]).astype(np.int64)
    return whole


@pytest.mark.parametrize("length", [1000, 1333, 2458, 650])
def test_no_raw_sample_is_in_two_parts_and_time_only_goes_forward(length: int) -> None:
    person = watch.split(3, [clock(700), clock(length)])
    train, validation, test = (times(part, 1) for part in (person.train, person.validation, person.test))
    assert train.max() < int(length * 0.64) == validation.min()
    assert validation.max() < int(length * 0.8) == test.min()
    for part, step in ((train, 10), (validation, 50), (test, 50)):
        assert (np.diff(part, axis=1) == 1).all()
        assert (np.diff(part[:, 0]) == step).all()
    assert len(train) == (int(length * 0.64) - 100) // 10 + 1
    assert set(person.train.y.tolist()) == {4}


def test_a_part_shorter_than_a_window_gives_none() -> None:
    person = watch.split(3, [clock(200)])
    assert [len(part.y) for part in (person.train, person.validation, person.test)] == [3, 0, 0]
    assert person.test.x.shape == (0, 6, 100)


def test_the_real_data_has_these_counts(real: Path) -> None:
    people = watch.wearers(real)
    assert [person.id for person in people] == list(range(1, 11))
    assert sum(len(r.samples) for r in watch.load_recordings(real)) == 244_102
    assert sum(len(person.train.y) for person in people) == 14_297
    assert sum(len(person.validation.y) for person in people) == 573
    assert sum(len(person.test.y) for person in people) == 770
    for person in people:
        for part in (person.train, person.validation, person.test):
            assert part.x.dtype == np.float32
            assert part.x.shape[1:] == (6, 100)
            assert part.y.dtype == np.int64
            assert set(part.y.tolist()) == set(range(7))


def test_the_constants_are_the_training_parts_statistics(real: Path) -> None:
    mean, deviation = watch.training_statistics(watch.load_recordings(real))
    np.testing.assert_allclose(mean, watch.CHANNEL_MEAN, rtol=1e-5)
    np.testing.assert_allclose(deviation, watch.CHANNEL_STD, rtol=1e-5)


def test_device_files_hold_no_test_data(real: Path) -> None:
    files = watch.write_device_files(real)
    assert [file.name for file in files] == [f"wearer-{i:02d}.npz" for i in range(1, 11)] + ["test.npz"]
    person = watch.wearers(real)[2]
    with np.load(files[2]) as device:
        assert set(device) == {"x", "y", "group", "part"}
        assert len(device["y"]) == len(person.train.y) + len(person.validation.y)
        np.testing.assert_array_equal(device["x"][device["part"] == 0], person.train.x)
        np.testing.assert_array_equal(device["x"][device["part"] == 1], person.validation.x)
        assert (np.diff(device["group"]) >= 0).all()
    with np.load(files[-1]) as test:
        assert test["x"].shape == (770, 6, 100)
        np.testing.assert_array_equal(test["x"][test["wearer"] == 3], person.test.x)


def test_a_conversion_is_done_once_and_damage_is_reported(real: Path, tmp_path: Path) -> None:
    stamp = (real / "recordings.npz").stat().st_mtime_ns
    assert watch.obtain(real, tmp_path / "not needed").stat().st_mtime_ns == stamp
    (tmp_path / "recordings.npz").write_bytes((real / "recordings.npz").read_bytes()[:1000])
    with pytest.raises(LocalError, match="delete it and run"):
        watch.wearers(tmp_path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.npy").write_bytes(b"anything")
    with pytest.raises(LocalError, match="neither the known wheel"):
        watch.obtain(tmp_path, tmp_path / "other.npy")
    with pytest.raises(LocalError, match="cannot read"):
        watch.obtain(tmp_path, tmp_path / "none.npy")


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(LocalError, match="--file"):
        watch.obtain(tmp_path)
    assert not (tmp_path / "recordings.npz").exists()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_parser_runs_nothing(tmp_path: Path, protocol: int) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
    content = stream.getvalue() + pickle.dumps(_Evil(tmp_path / "made"), protocol=protocol)
    with pytest.raises(LocalError, match="not the known"):
        watch.parse(content)
    assert not (tmp_path / "made").exists()
