"""Data sets by name, from local folders in their published formats: `load("fashion-mnist")`.

    fashion-mnist   four IDX files, gzipped or not; without a folder, those of Debian's package dataset-fashion-mnist
    watch           testbed/watch.py: ten wearers; without a folder, in the user's cache (fetched at the first call)
    femnist         LEAF's JSON: train/*.json and test/*.json, as its preprocess.sh writes them; natural users
    cifar10         the binary or the Python version, six files; the latter is a pickle, and is read as data, never unpickled
    npz             data of one's own: train.npz and test.npz, see testbed/own_data.py

Nothing is downloaded here but the watch data. Every missing or malformed file is one LocalError with its name and the cure.
Pixels become float32: divided by 255 and standardised per channel with the fixed statistics below, so that a sample means
the same on every client and nothing of the test part is used. FEMNIST's pixels stay the 0..1 that LEAF publishes, and of
one's own data becomes what a device makes of it.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.data.sources import load_idx
from regrow.errors import LocalError, UsageError
from testbed import own_data, watch

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# Of the 60 000 training images, on 0..1 (the test recomputes them where the data is installed).
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)
# Of the 50 000 training images, per channel over all pixels, on 0..1: the figures in common use for this data.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

_FASHION_CURE = (
    "install Debian's package dataset-fashion-mnist, or put the four files of github.com/zalandoresearch/fashion-mnist into one folder"
)
_FEMNIST_CURE = "make the data with LEAF (github.com/TalwalkarLab/leaf, data/femnist/preprocess.sh), and name its folder data/femnist/data"
_CIFAR_CURE = "fetch cifar-10-binary.tar.gz or cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html, unpack it, name its folder"
_CIFAR_FOLDERS = (".", "cifar-10-batches-bin", "cifar-10-batches-py")  # the folder itself, or where the archives unpack to
_CIFAR_VALUES = 3 * 32 * 32


@dataclass(frozen=True)
class Dataset:
    """Examples in the order that index arrays refer to.

    Attributes:
        name: the data set's.
        x: float32 [N, ...], standardised; or int64, tokens.
        y: int64 [N], 0 <= y < classes; float32 [N, ...] where classes is 0.
        user: int64 [N], who an example belongs to by nature; None where the data has no users.
        classes: number of labels; 0: y is values to come near to.
        part: int64 [N], 0 training and 1 validation where neighbours overlap in time and a random choice would leak;
            None where any example may be either. `testbed.splits.train_validation` takes it.

    Raises:
        LocalError: shapes, dtypes or labels that do not fit each other.
    """

    name: str
    x: NDArray[Any]
    y: NDArray[Any]
    user: NDArray[np.int64] | None
    classes: int
    part: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.x.dtype not in (np.float32, np.int64) or self.x.ndim < 2:
            raise LocalError(f"{self.name}: x is {self.x.dtype} {list(self.x.shape)}, not float32 or int64 [N, ...]")
        if not self.classes and (self.y.dtype != np.float32 or self.y.shape[:1] != self.x.shape[:1]):
            raise LocalError(f"{self.name}: y is {self.y.dtype} {list(self.y.shape)}, not float32 [{len(self.x)}, ...]")
        for field, array in (("y", self.y if self.classes else None), ("user", self.user), ("part", self.part)):
            if array is not None and (array.dtype != np.int64 or array.shape != (len(self.x),)):
                raise LocalError(f"{self.name}: {field} is {array.dtype} {list(array.shape)}, not int64 [{len(self.x)}]")
        if self.classes:
            _check_labels(self.y, self.classes, self.name, "give labels 0..classes-1")


@dataclass(frozen=True)
class Loaded:
    """Training data, to be split over clients, and test data, for the final report only."""

    train: Dataset
    test: Dataset


def load(name: str, folder: Path | None = None) -> Loaded:
    """The data set `name` (see the module's text).

    Args:
        name: one of NAMES.
        folder: where its files lie; None means the default place, where there is one.

    Raises:
        LocalError: an unknown name; a missing or malformed file, named, with where to get it.
    """
    if name not in _LOADERS:
        raise UsageError(f"no data set {name!r}: take one of {', '.join(NAMES)}")
    return _LOADERS[name](folder)


def files_of(name: str, folder: Path | None = None) -> list[Path]:
    """The files that `load` would read, in a fixed order.

    Raises:
        LocalError: an unknown name, or files that are not there; nothing is fetched here.
    """
    if name not in _LOADERS:
        raise UsageError(f"no data set {name!r}: take one of {', '.join(NAMES)}")
    return _FILES[name](folder)


def _check_labels(y: NDArray[np.int64], classes: int, place: str, cure: str) -> None:
    if not len(y):
        raise LocalError(f"{place} holds no examples: {cure}")
    if y.min() < 0 or y.max() >= classes:
        raise LocalError(f"{place} has label {int(y.min() if y.min() < 0 else y.max())}, not in 0..{classes - 1}: {cure}")


def _standardise(pixels: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """uint8 [N, channels, height, width] as (pixel / 255 - mean) / std, with one copy only."""
    x = pixels.astype(np.float32)
    shape = (1, -1, 1, 1)
    x -= 255 * np.array(mean, np.float32).reshape(shape)
    x /= 255 * np.array(std, np.float32).reshape(shape)
    return x


# ---- Fashion-MNIST ---------------------------------------------------------------------------------------------------


def _fashion_mnist(folder: Path | None) -> Loaded:
    place = folder or FASHION_FOLDER
    return Loaded(_fashion_part(place, "train"), _fashion_part(place, "t10k"))


def _fashion_files(folder: Path, part: str) -> list[Path]:
    return [_plain_or_gz(folder / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]


def _fashion_part(folder: Path, part: str) -> Dataset:
    images, labels = _fashion_files(folder, part)
    try:
        samples = load_idx(images, labels)
    except LocalError as error:
        raise LocalError(f"{error}; {_FASHION_CURE}") from error
    if samples.x.dtype != np.uint8 or samples.x.shape[1:] != (1, 28, 28):
        raise LocalError(f"{images} holds {samples.x.dtype} {list(samples.x.shape)}, not 28 x 28 bytes each: {_FASHION_CURE}")
    y = samples.y.astype(np.int64)
    _check_labels(y, 10, str(labels), _FASHION_CURE)
    return Dataset("fashion-mnist", _standardise(samples.x, FASHION_MEAN, FASHION_STD), y, None, 10)


def _plain_or_gz(file: Path) -> Path:
    compressed = file.with_name(f"{file.name}.gz")
    for candidate in (compressed, file):
        if candidate.is_file():
            return candidate
    raise LocalError(f"no {compressed} (or without .gz): {_FASHION_CURE}")


# ---- the smartwatch data ---------------------------------------------------------------------------------------------


def _watch_folder(folder: Path | None) -> Path:
    return folder or watch.cache_folder() / "watch"


def _watch(folder: Path | None) -> Loaded:
    people = watch.wearers(_watch_folder(folder))

    def together(parts: tuple[str, ...]) -> Dataset:
        pieces = [(person.id, part, getattr(person, name)) for person in people for part, name in enumerate(parts)]
        counts = [len(piece.y) for _, _, piece in pieces]
        return Dataset(
            "watch",
            np.concatenate([piece.x for _, _, piece in pieces]),
            np.concatenate([piece.y for _, _, piece in pieces]),
            np.repeat(np.array([wearer for wearer, _, _ in pieces], np.int64), counts),
            len(watch.CLASSES),
            np.repeat(np.array([part for _, part, _ in pieces], np.int64), counts) if len(parts) > 1 else None,
        )

    return Loaded(together(("train", "validation")), together(("test",)))


# ---- LEAF FEMNIST ----------------------------------------------------------------------------------------------------


class _LeafUser(msgspec.Struct):
    x: list[list[float]]
    y: list[int]


class _LeafFile(msgspec.Struct):  # fields of other names, such as "hierarchies", are passed over
    users: list[str]
    num_samples: list[int]
    user_data: dict[str, _LeafUser]


@dataclass(frozen=True)
class _LeafRows:
    user: str
    x: NDArray[np.float32]
    y: NDArray[np.int64]


def _femnist(folder: Path | None) -> Loaded:
    place = _given(folder, "femnist", _FEMNIST_CURE)
    parts = {part: _leaf_part(place / part) for part in ("train", "test")}
    # One number per writer, the same in both parts: LEAF can split each writer's examples as well as the writers.
    number = {user: i for i, user in enumerate(sorted({rows.user for part in parts.values() for rows in part}))}

    def together(part: list[_LeafRows]) -> Dataset:
        x = np.concatenate([rows.x for rows in part]).reshape(-1, 1, 28, 28)
        user = np.repeat(np.array([number[rows.user] for rows in part], np.int64), [len(rows.y) for rows in part])
        return Dataset("femnist", x, np.concatenate([rows.y for rows in part]), user, 62)

    return Loaded(together(parts["train"]), together(parts["test"]))


def _leaf_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise LocalError(f"no {folder}/*.json: {_FEMNIST_CURE}")
    return files


def _leaf_part(folder: Path) -> list[_LeafRows]:
    part = [rows for file in _leaf_files(folder) for rows in _leaf_file(file)]
    if not any(len(rows.y) for rows in part):
        raise LocalError(f"{folder}/*.json hold no examples: {_FEMNIST_CURE}")
    return part


def _leaf_file(file: Path) -> list[_LeafRows]:
    try:
        content = msgspec.json.decode(file.read_bytes(), type=_LeafFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LocalError(f"cannot read {file} as LEAF's JSON: {error}; {_FEMNIST_CURE}") from error
    if sorted(content.users) != sorted(content.user_data) or len(content.num_samples) != len(content.users):
        raise LocalError(f"{file}: users, num_samples and user_data do not list the same writers; {_FEMNIST_CURE}")
    return [
        _leaf_user(user, content.user_data[user], declared, f"{file}, user {user!r}")
        for user, declared in zip(content.users, content.num_samples, strict=True)
    ]


def _leaf_user(user: str, data: _LeafUser, declared: int, place: str) -> _LeafRows:
    if not len(data.x) == len(data.y) == declared:
        raise LocalError(f"{place}: {len(data.x)} images, {len(data.y)} labels, num_samples {declared}; {_FEMNIST_CURE}")
    if any(len(row) != 784 for row in data.x):
        raise LocalError(f"{place}: an image does not have 784 values; {_FEMNIST_CURE}")
    x = np.array(data.x, np.float64).reshape(-1, 784)
    if not ((x >= 0) & (x <= 1)).all():
        raise LocalError(f"{place}: a pixel is outside 0..1; {_FEMNIST_CURE}")
    if any(not 0 <= label < 62 for label in data.y):
        raise LocalError(f"{place}: a label is outside 0..61; {_FEMNIST_CURE}")
    return _LeafRows(user, x.astype(np.float32), np.array(data.y, np.int64))


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


def _cifar10(folder: Path | None) -> Loaded:
    files = _cifar_files(folder)
    read = _cifar_binary if files[0].suffix == ".bin" else _cifar_python
    return Loaded(_cifar_part(files[:5], read), _cifar_part(files[5:], read))


def _cifar_files(folder: Path | None) -> list[Path]:
    """Five of training data, one of test data."""
    given = _given(folder, "cifar10", _CIFAR_CURE)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for place in (given / sub for sub in _CIFAR_FOLDERS):
        for suffix in (".bin", ""):
            if (place / f"{names[0]}{suffix}").is_file():
                return [place / f"{name}{suffix}" for name in names]
    raise LocalError(f"{given} holds neither data_batch_1.bin nor data_batch_1: {_CIFAR_CURE}")


_Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]


def _cifar_part(files: list[Path], read: Callable[[bytes, str], _Batch]) -> Dataset:
    pixels, labels = [], []
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise LocalError(f"cannot read {file}: {error}; {_CIFAR_CURE}") from error
        x, y = read(content, str(file))
        _check_labels(y, 10, str(file), _CIFAR_CURE)
        pixels.append(x.reshape(-1, 3, 32, 32))
        labels.append(y)
    return Dataset("cifar10", _standardise(np.concatenate(pixels), CIFAR_MEAN, CIFAR_STD), np.concatenate(labels), None, 10)


def _cifar_binary(content: bytes, place: str) -> _Batch:
    """Records of one label byte and 3072 pixels, channel by channel."""
    if len(content) % (1 + _CIFAR_VALUES):
        raise LocalError(f"{place} has {len(content)} bytes, not a multiple of {1 + _CIFAR_VALUES}: {_CIFAR_CURE}")
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _CIFAR_VALUES)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _cifar_python(content: bytes, place: str) -> _Batch:
    """The dict of a batch: "data" uint8 [N, 3072] and "labels", a list of N; its other entries are not looked at."""
    try:
        fields = watch.walk_pickle(_unicode_strings(content))
        function, arguments, state = fields["data"]
        _, shape, (dtype_name, (code, *_), _), column_major, text = state
        known = (function, arguments[0], dtype_name, code)
        if known != ("numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "u1"):
            raise ValueError(f"data is no array of bytes: {known}")
        y = np.array([_whole(label) for label in fields["labels"]], np.int64)
        if shape != (len(y), _CIFAR_VALUES):
            raise ValueError(f"data has shape {shape} for {len(y)} labels")
        return np.frombuffer(text.encode("latin1"), np.uint8).reshape(shape, order="F" if column_major else "C"), y
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LocalError(f"{place} is no batch of CIFAR-10's Python version: {str(error)[:200]!r}; {_CIFAR_CURE}") from error


def _whole(label: Any) -> int:
    if type(label) is not int:
        raise ValueError(f"a label is a {type(label).__name__}")
    return label


def _unicode_strings(pickled: bytes) -> bytes:
    """The same pickle with Python 2's byte strings as text (Latin-1), which is what the walker of the watch data knows."""
    operations = list(pickletools.genops(pickled))
    stream = io.BytesIO()
    for index, (opcode, argument, start) in enumerate(operations):
        if opcode.name in ("SHORT_BINSTRING", "BINSTRING"):
            text = str(argument).encode("utf-8")
            stream.write(b"X" + len(text).to_bytes(4, "little") + text)
        else:
            end = operations[index + 1][2] if index + 1 < len(operations) else None
            stream.write(pickled[start:end])
    return stream.getvalue()


# ---- one's own -------------------------------------------------------------------------------------------------------


def _npz(folder: Path | None) -> Loaded:
    train, test = own_data.parts(_given(folder, "npz", own_data.CURE))
    if (train.y.dtype, train.y.shape[1:]) != (test.y.dtype, test.y.shape[1:]) or train.x.dtype != test.x.dtype:
        raise LocalError(f"{test.file}: x or y is of another kind than in train.npz: make them alike")
    classes = 1 + int(max(train.y.max(), test.y.max())) if train.y.dtype == np.int64 else 0
    return Loaded(
        Dataset(str(train.file), train.x, train.y, train.user, classes, train.part), Dataset(str(test.file), test.x, test.y, None, classes)
    )


def _given(folder: Path | None, name: str, cure: str) -> Path:
    if folder is None:
        raise UsageError(f"{name} needs a folder: {cure}")
    return folder


_LOADERS: dict[str, Callable[[Path | None], Loaded]] = {
    "fashion-mnist": _fashion_mnist,
    "watch": _watch,
    "femnist": _femnist,
    "cifar10": _cifar10,
    "npz": _npz,
}
_FILES: dict[str, Callable[[Path | None], list[Path]]] = {
    "fashion-mnist": lambda folder: [file for part in ("train", "t10k") for file in _fashion_files(folder or FASHION_FOLDER, part)],
    "watch": lambda folder: [_watch_folder(folder) / "recordings.npz"],
    "femnist": lambda folder: [file for part in ("train", "test") for file in _leaf_files(_given(folder, "femnist", _FEMNIST_CURE) / part)],
    "cifar10": _cifar_files,
    "npz": lambda folder: own_data.files(_given(folder, "npz", own_data.CURE)),
}
NAMES = tuple(_LOADERS)
