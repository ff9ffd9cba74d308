"""Data sets from files made here in the published formats, what is wrong with a damaged one, and the real data where it is installed."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from regrow.errors import LocalError
from testbed import datasets, watch
from testbed.datasets import Dataset, load
from testbed.splits import split, train_validation

RNG = np.random.default_rng(0)


def refused(name: str, folder: Path | None, *parts: str) -> None:
    """`load` refuses with one message that has all these parts, the cure among them."""
    with pytest.raises(LocalError) as caught:
        load(name, folder)
    for part in parts:
        assert part in str(caught.value)


# ---- Fashion-MNIST ---------------------------------------------------------------------------------------------------


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def fashion(folder: Path, suffix: str = ".gz", size: int = 28) -> dict[str, NDArray[np.uint8]]:
    arrays: dict[str, NDArray[np.uint8]] = {}
    for part, examples in (("train", 30), ("t10k", 10)):
        arrays[f"{part}-images-idx3-ubyte"] = RNG.integers(0, 256, (examples, size, size)).astype(np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = (np.arange(examples) % 10).astype(np.uint8)
    for name, array in arrays.items():
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(idx(array), 1) if suffix else idx(array))
    return arrays


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist_of_a_folder(tmp_path: Path, suffix: str) -> None:
    arrays = fashion(tmp_path, suffix)
    loaded = load("fashion-mnist", tmp_path)
    for dataset, part in ((loaded.train, "train"), (loaded.test, "t10k")):
        pixels, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
        assert dataset.x.dtype == np.float32
        assert (dataset.classes, dataset.user is None, dataset.part is None) == (10, True, True)
        np.testing.assert_allclose(dataset.x[:, 0], (pixels / 255 - 0.2860) / 0.3530, atol=1e-5)
        np.testing.assert_array_equal(dataset.y, labels)


def test_a_damaged_fashion_mnist_is_named(tmp_path: Path) -> None:
    refused("fashion-mnist", tmp_path / "none", "train-images-idx3-ubyte.gz", "dataset-fashion-mnist")
    fashion(tmp_path)
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    damaged = (whole[:-9], gzip.compress(idx(np.arange(9, dtype=np.uint8))), gzip.compress(idx(np.arange(1, 11, dtype=np.uint8))))
    for content in damaged:
        file.write_bytes(content)
        refused("fashion-mnist", tmp_path, str(file), "dataset-fashion-mnist")
    file.unlink()
    refused("fashion-mnist", tmp_path, str(file), "dataset-fashion-mnist")
    fashion(tmp_path, size=27)
    refused("fashion-mnist", tmp_path, "train-images-idx3-ubyte.gz", "[30, 1, 27, 27]", "dataset-fashion-mnist")


@pytest.mark.network  # needs Debian's dataset-fashion-mnist
def test_the_real_fashion_mnist_has_these_statistics() -> None:
    loaded = load("fashion-mnist")
    assert (loaded.train.x.shape, loaded.test.x.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert np.bincount(loaded.train.y).tolist() == [6000] * 10
    assert abs(loaded.train.x.mean(dtype=np.float64)) < 2e-4
    assert abs(loaded.train.x.std(dtype=np.float64) - 1) < 2e-4


# ---- watch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def watch_folder(tmp_path: Path) -> Path:
    """Recordings of two wearers whose first channel is the time, unique over all recordings, as `watch.obtain` converts them."""
    lengths = [1000, 1300, 900, 1700]
    samples = np.repeat(np.arange(sum(lengths), dtype=np.float32)[:, None], 6, axis=1)
    length, label, wearer = np.array(lengths), np.array([0, 6, 3, 3]), np.array([1, 1, 2, 2])
    np.savez(tmp_path / "recordings.npz", samples=samples, length=length, label=label, wearer=wearer)
    return tmp_path


def times(dataset: Dataset, indices: NDArray[np.int64]) -> set[int]:
    x = dataset.x[indices, 0] * watch.CHANNEL_STD[0] + watch.CHANNEL_MEAN[0]
    return set(np.rint(x).astype(int).ravel().tolist())


def test_watch_keeps_its_wearers_and_its_three_parts_disjoint_in_time(watch_folder: Path) -> None:
    loaded = load("watch", watch_folder)
    train, test, people = loaded.train, loaded.test, watch.wearers(watch_folder)
    assert (train.classes, train.x.shape[1:], test.part) == (7, (6, 100), None)
    assert train.user is not None
    assert train.part is not None
    for person in people:
        for number, windows in enumerate((person.train, person.validation)):
            own = (train.user == person.id) & (train.part == number)
            np.testing.assert_array_equal(train.x[own], windows.x)
            np.testing.assert_array_equal(train.y[own], windows.y)
    np.testing.assert_array_equal(test.y, np.concatenate([person.test.y for person in people]))
    np.testing.assert_array_equal(test.user, np.repeat([1, 2], [len(person.test.y) for person in people]))
    for kind in ("user", "iid"):  # whoever holds what: no raw sample is in two of the three parts
        both = train_validation(split(train, 2, kind, 0, min_examples=5), 0.2, 0, train.part)
        seen = [times(train, np.concatenate(parts)) for parts in zip(*both, strict=True)]
        assert min(map(len, seen)) > 100
        assert not seen[0] & seen[1]
        assert not (seen[0] | seen[1]) & times(test, np.arange(len(test.y)))


def test_without_a_folder_the_watch_data_is_in_the_cache(watch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_CACHE", str(watch_folder / "cache"))
    (watch_folder / "cache" / "watch").mkdir(parents=True)
    shutil.copy(watch_folder / "recordings.npz", watch_folder / "cache" / "watch")
    np.testing.assert_array_equal(load("watch").train.x, load("watch", watch_folder).train.x)


# ---- LEAF FEMNIST ----------------------------------------------------------------------------------------------------


def leaf(users: dict[str, list[int]]) -> dict[str, Any]:
    return {
        "users": list(users),
        "num_samples": [len(labels) for labels in users.values()],
        "user_data": {user: {"x": RNG.random((len(labels), 784)).round(4).tolist(), "y": labels} for user, labels in users.items()},
        "hierarchies": [["x", "y"]],
    }


def write_leaf(folder: Path, part: str, name: str, content: object) -> Path:
    (folder / part).mkdir(exist_ok=True)
    file = folder / part / name
    file.write_text(json.dumps(content))
    return file


def test_femnist_of_a_folder(tmp_path: Path) -> None:
    first, second = leaf({"f03": [0, 61, 5], "f01": [7]}), leaf({"f02": [9, 9], "f07": []})
    test = leaf({"f02": [1], "f09": [2, 3]})
    write_leaf(tmp_path, "train", "all_data_0.json", first)
    write_leaf(tmp_path, "train", "all_data_1.json", second)
    write_leaf(tmp_path, "test", "all_data_0.json", test)
    loaded = load("femnist", tmp_path)
    assert loaded.train.x.dtype == np.float32
    assert (loaded.train.x.shape, loaded.train.classes) == ((6, 1, 28, 28), 62)
    np.testing.assert_array_equal(loaded.train.y, [0, 61, 5, 7, 9, 9])
    np.testing.assert_array_equal(loaded.train.user, [2, 2, 2, 0, 1, 1])  # f01, f02, f03, f07, f09
    np.testing.assert_array_equal(loaded.test.user, [1, 4, 4])
    np.testing.assert_array_equal(loaded.train.x[:3].reshape(3, 784), np.array(first["user_data"]["f03"]["x"], np.float32))
    np.testing.assert_array_equal(loaded.test.x[0].ravel(), np.array(test["user_data"]["f02"]["x"][0], np.float32))


def _declared(content: dict[str, Any]) -> None:
    content["num_samples"] = [3]


def _listed(content: dict[str, Any]) -> None:
    content["users"] = ["b"]


def _twice(content: dict[str, Any]) -> None:
    content["users"], content["num_samples"] = ["a", "a"], [2, 2]


def _short(content: dict[str, Any]) -> None:
    content["user_data"]["a"]["x"][1].pop()


def _dark(content: dict[str, Any]) -> None:
    content["user_data"]["a"]["x"][1][0] = -0.1


def _label(content: dict[str, Any]) -> None:
    content["user_data"]["a"]["y"][1] = 10**30


def _text(content: dict[str, Any]) -> None:
    content["user_data"]["a"]["x"][1][3] = "0.5"


def _without(content: dict[str, Any]) -> None:
    del content["user_data"]


@pytest.mark.parametrize("damage", [_declared, _listed, _twice, _short, _dark, _label, _text, _without])
def test_a_damaged_femnist_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    write_leaf(tmp_path, "test", "all_data_0.json", leaf({"a": [1]}))
    content = leaf({"a": [1, 2]})
    write_leaf(tmp_path, "train", "all_data_0.json", content)
    assert len(load("femnist", tmp_path).train.y) == 2
    damage(content)
    file = write_leaf(tmp_path, "train", "all_data_0.json", content)
    refused("femnist", tmp_path, str(file), "TalwalkarLab/leaf")


def test_a_missing_femnist_is_named(tmp_path: Path) -> None:
    refused("femnist", None, "needs a folder", "TalwalkarLab/leaf")
    refused("femnist", tmp_path, f"{tmp_path}/train/*.json", "TalwalkarLab/leaf")
    file = write_leaf(tmp_path, "train", "all_data_0.json", leaf({"a": []}))
    refused("femnist", tmp_path, f"{tmp_path}/train/*.json hold no examples", "TalwalkarLab/leaf")
    for content in ("{", "[" * 100_000, '{"users": 1}'):
        file.write_text(content)
        refused("femnist", tmp_path, str(file), "TalwalkarLab/leaf")


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


def short(text: str) -> bytes:
    """A byte string as Python 2 pickled it."""
    return b"U" + bytes([len(text)]) + text.encode()


def python2_batch(x: NDArray[np.uint8], y: NDArray[np.int64], column_major: bool = False) -> bytes:
    """The opcodes of a published batch file, written by cPickle of Python 2 with protocol 2; memo numbers included."""
    memo = iter(range(1, 2**31))

    def put() -> bytes:
        number = next(memo)
        return b"q" + bytes([number]) if number < 256 else b"r" + number.to_bytes(4, "little")

    def number(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + value.to_bytes(2, "little")

    array = b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put()
    array += b"K\x00\x85" + put() + short("b") + b"\x87" + put() + b"R" + put()
    dtype = b"cnumpy\ndtype\n" + put() + short("u1") + b"K\x00K\x01\x87" + put() + b"R" + put()
    dtype += b"(K\x03" + short("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    values = x.tobytes("F" if column_major else "C")
    array += b"(K\x01" + number(len(x)) + number(3072) + b"\x86" + put() + dtype + (b"\x88" if column_major else b"\x89")
    array += b"T" + len(values).to_bytes(4, "little") + values + put() + b"tb"
    labels = b"]" + put() + b"(" + b"".join(number(label) for label in y.tolist()) + b"e"
    names = b"]" + put() + b"(" + b"".join(short(f"camion_s_{i:06d}.png") + put() for i in range(len(x))) + b"e"
    fields = short("batch_label") + put() + short("training batch 1 of 5") + put() + short("labels") + put() + labels
    fields += short("data") + put() + array + short("filenames") + put() + names
    return b"\x80\x02}" + put() + b"(" + fields + b"u."


def batch(examples: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return RNG.integers(0, 256, (examples, 3072)).astype(np.uint8), RNG.integers(0, 10, examples)


def binary_batch(x: NDArray[np.uint8], y: NDArray[np.int64]) -> bytes:
    return np.concatenate([y[:, None].astype(np.uint8), x], axis=1).tobytes()


WRITERS: dict[str, Callable[[NDArray[np.uint8], NDArray[np.int64]], bytes]] = {".bin": binary_batch, "": python2_batch}


def cifar(folder: Path, suffix: str, examples: int = 4) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All six files; returns what the five training batches hold."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = [batch(examples) for _ in range(5)]
    for i, (x, y) in enumerate(batches, 1):
        (folder / f"data_batch_{i}{suffix}").write_bytes(WRITERS[suffix](x, y))
    (folder / f"test_batch{suffix}").write_bytes(WRITERS[suffix](*batch(3)))
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


@pytest.mark.parametrize(("suffix", "sub"), [(".bin", "."), ("", "."), (".bin", "cifar-10-batches-bin"), ("", "cifar-10-batches-py")])
def test_cifar10_in_both_published_formats(tmp_path: Path, suffix: str, sub: str) -> None:
    pixels, labels = cifar(tmp_path / sub, suffix, examples=260)
    loaded = load("cifar10", tmp_path)
    assert loaded.train.x.dtype == np.float32
    assert (loaded.train.x.shape, loaded.test.x.shape) == ((1300, 3, 32, 32), (3, 3, 32, 32))
    assert (loaded.train.classes, loaded.train.user) == (10, None)
    np.testing.assert_array_equal(loaded.train.y, labels)
    for channel, (mean, std) in enumerate([(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]):
        plane = pixels[:, channel * 1024 : (channel + 1) * 1024].reshape(-1, 32, 32)
        np.testing.assert_allclose(loaded.train.x[:, channel], (plane / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize("column_major", [False, True])
def test_the_batch_made_here_is_what_a_pickle_would_be(column_major: bool) -> None:
    x, y = batch(300)
    content = python2_batch(x, y, column_major)
    fields = pickle.loads(content, encoding="latin1")  # noqa: S301 - our own bytes: checks the writer above, not the reader
    np.testing.assert_array_equal(fields["data"], x)
    assert fields["labels"] == y.tolist()
    for ours, right in zip(datasets._cifar_python(content, "here"), (x, y), strict=True):
        np.testing.assert_array_equal(ours, right)


@pytest.mark.parametrize("suffix", [".bin", ""])
def test_a_damaged_cifar10_is_named(tmp_path: Path, suffix: str) -> None:
    cifar(tmp_path, suffix)
    file = tmp_path / f"data_batch_3{suffix}"
    x, y = batch(4)
    for content in (b"", file.read_bytes()[:-1], WRITERS[suffix](x, y + 10), WRITERS[suffix](x[:0], y[:0]), b"K\x01."):
        file.write_bytes(content)
        refused("cifar10", tmp_path, str(file), "cs.toronto.edu")
    file.unlink()
    refused("cifar10", tmp_path, str(file), "cs.toronto.edu")


def test_a_missing_cifar10_is_named(tmp_path: Path) -> None:
    refused("cifar10", None, "needs a folder", "cs.toronto.edu")
    refused("cifar10", tmp_path, str(tmp_path), "data_batch_1", "cs.toronto.edu")


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_runs_nothing(tmp_path: Path, protocol: int) -> None:
    cifar(tmp_path, "")
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": _Evil(tmp_path / "made"), "labels": [1]}, protocol=protocol))
    refused("cifar10", tmp_path, str(tmp_path / "test_batch"), "cs.toronto.edu")
    assert not (tmp_path / "made").exists()


_BATCH = python2_batch(*batch(1))
_HEADER = _BATCH.index(b"T\x00\x0c")  # the pixels follow; before and after them is structure


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")  # pickletools, of a damaged text opcode
@given(st.integers(0, len(_BATCH) - 3072), st.binary(max_size=3), st.integers(0, 4))
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_the_structure_is_a_batch_or_a_local_error(place: int, replacement: bytes, removed: int) -> None:
    at = place if place <= _HEADER else place + 3072
    content = _BATCH[:at] + replacement + _BATCH[at + removed :]
    try:
        x, y = datasets._cifar_python(content, "here")
    except LocalError:
        return
    assert x.shape == (len(y), 3072)
    assert x.dtype == np.uint8
    assert y.dtype == np.int64


@pytest.mark.parametrize(
    "change", [(b"u1", b"i1"), (b"ndarray\n", b"matrix\n"), (b"_reconstruct", b"_other"), (b"M\x00\x0c", b"M\x01\x0c")]
)
def test_another_kind_of_array_is_refused(change: tuple[bytes, bytes]) -> None:
    assert change[0] in _BATCH
    with pytest.raises(LocalError, match="here is no batch"):
        datasets._cifar_python(_BATCH.replace(*change, 1), "here")


def test_text_in_place_of_a_label_is_refused() -> None:
    start = _BATCH.index(b"labels") + len(b"labelsq.]q.(")
    content = _BATCH[:start] + short("1") + _BATCH[start:]
    with pytest.raises(LocalError, match="a label is a str"):
        datasets._cifar_python(content, "here")


# ---- names and values ------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert datasets.NAMES == ("fashion-mnist", "watch", "femnist", "cifar10", "npz")
    refused("mnist", None, "no data set 'mnist'", "fashion-mnist, watch, femnist, cifar10")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((3, 2))}, "x is float64"),
        ({"x": np.zeros(3, np.float32)}, "not float32"),
        ({"y": np.zeros(2, np.int64)}, "y is int64"),
        ({"y": np.zeros(3, np.int32)}, "y is int32"),
        ({"y": np.array([0, 1, 2])}, "label 2, not in 0..1"),
        ({"y": np.array([0, -1, 1])}, "label -1, not in 0..1"),
        ({"user": np.zeros((3, 1), np.int64)}, "user is int64"),
        ({"part": np.zeros(4, np.int64)}, "part is int64"),
        ({"x": np.zeros((0, 2), np.float32), "y": np.zeros(0, np.int64)}, "holds no examples"),
    ],
)
def test_a_data_set_that_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    fields = {"name": "made", "x": np.zeros((3, 2), np.float32), "y": np.zeros(3, np.int64), "user": None, "classes": 2}
    Dataset(**fields)  # type: ignore[arg-type]  # one dict for all fields
    with pytest.raises(LocalError, match=message):
        Dataset(**{**fields, **change})
