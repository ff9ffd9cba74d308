"""Training data from files, by a one-line name: `open_source("csv:rows.csv?label=y")`.

    file.npz                              arrays x, y, optional group and part (see DataSource.append)
    idx:images,labels                     a pair of IDX files, plain or .gz; [N, H, W] becomes [N, 1, H, W]
    csv:file.csv?label=y&group=g          a header, numbers; `group` is optional; see load_csv for float=1 and tokens=1
    images:folder?size=32x32&gray=1&classes=cat,dog    a folder per class, needs Pillow
    entry:NAME                            a Python entry point of group "regrow.data", installed on the device

Whole numbers (uint8, uint16) are scaled to 0..1; floats and tokens (int32, int64) are used as they are. y is class numbers, or, of a float
type, values to come near to. Sizes are checked against `limit_bytes`
before anything is allocated, and nothing is ever unpickled. Every malformed input is one LocalError with place and cure.
"""

from __future__ import annotations

import csv
import gzip
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from edge_agent.data.source import DataSource
from regrow.errors import LocalError, UsageError

LIMIT_BYTES = 2 * 2**30
_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_READ_BYTES = 2**20
_IMAGE_PIXELS = 64 * 2**20
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Samples:
    """What a file holds; the arguments of DataSource.append."""

    x: NDArray[Any]
    y: NDArray[Any]
    group: NDArray[Any] | None = None
    part: NDArray[Any] | None = None


def open_source(
    spec: str,
    capacity: int | None = None,
    *,
    validation_fraction: float = 0.2,
    gap: int = 0,
    limit_bytes: int = LIMIT_BYTES,
) -> DataSource:
    """The data that `spec` names (see the module's text) as a DataSource.

    Args:
        spec: as above.
        capacity: samples kept, the newest; by default all of a file's, 10 000 for an entry point.
        validation_fraction, gap: see DataSource.
        limit_bytes: the most that one array of a file may take.

    Raises:
        LocalError: the place in the input, and the cure.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "entry" and colon:
        source = DataSource(capacity or 10_000, validation_fraction, gap, spec)
        _entry_point(rest)(source)
        return source
    place, _, query = rest.partition("?")
    check_named(spec)
    if kind in _LOADERS and colon:
        samples = _LOADERS[kind](place, _options(spec, query, _OPTIONS[kind]), limit_bytes)
    elif spec.endswith(".npz"):
        samples = load_npz(Path(spec), limit_bytes)
    else:
        raise UsageError(f"data {spec!r} is none of FILE.npz, idx:, csv:, images:, entry:")
    if not len(samples.y):
        raise LocalError(f"{spec} holds no samples")
    source = DataSource(capacity or len(samples.y), validation_fraction, gap, spec)
    try:
        source.append(samples.x, samples.y, samples.group, samples.part)
    except LocalError as error:
        raise LocalError(f"{spec}: {error}") from error
    return source


def check_named(spec: str) -> None:
    """Refuse a spec that names a file or folder that is not there.

    Raises:
        UsageError: it does.
    """
    kind, colon, rest = spec.partition(":")
    named = rest.partition("?")[0] if kind in _LOADERS and colon else spec if spec.endswith(".npz") else ""
    for place in [named] if kind != "idx" else named.split(",") if "," in named else []:
        if place and not Path(place).exists():
            raise UsageError(f"data {spec!r}: there is no file or folder {place}")


def load_npz(file: Path, limit_bytes: int = LIMIT_BYTES) -> Samples:
    """x, y and, when there, group and part of a NumPy .npz file; other arrays are not read."""
    arrays = npz_arrays(file, ("x", "y", "group", "part"), limit_bytes)
    return Samples(arrays["x"], arrays["y"], arrays.get("group"), arrays.get("part"))


def npz_arrays(file: Path, wanted: tuple[str, ...], limit_bytes: int = LIMIT_BYTES) -> dict[str, NDArray[Any]]:
    """Those of the wanted arrays that a NumPy .npz file holds, x and y among them; other arrays are not read.

    Raises:
        LocalError: x or y is not there, or one of them cannot be read or is larger than the limit.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())
            arrays = {name: _npy(archive, f"{name}.npy", file, limit_bytes) for name in wanted if f"{name}.npy" in names}
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise LocalError(f"cannot read {file} as .npz: {error}; write it with numpy.savez") from error
    if missing := {"x", "y"} - set(arrays):
        raise LocalError(f"{file} has no array {min(missing)!r}: write it with numpy.savez(file, x=..., y=...)")
    return arrays


def _npy(archive: zipfile.ZipFile, name: str, file: Path, limit_bytes: int) -> NDArray[Any]:
    """One array, whose header is read and judged before anything of its size is allocated."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(name) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            if version not in readers:
                raise ValueError(f"format version {version} is not supported")
            shape, column_major, dtype = readers[version](stream)
            if dtype.hasobject:
                raise LocalError(f"{file}: {name} holds Python objects, which are never loaded: store numbers")
            if min(shape, default=0) < 0 or not dtype.itemsize:
                raise ValueError(f"shape {shape}, dtype {dtype}")
            data = _exactly(stream, math.prod(shape) * dtype.itemsize, f"{file}: {name}", limit_bytes)
            array: NDArray[Any] = np.frombuffer(data, dtype).reshape(shape, order="F" if column_major else "C")
        except ValueError as error:
            raise LocalError(f"{file}: {name} is no NumPy array: {error}; write it with numpy.savez") from error
    return array.astype(dtype.newbyteorder("="), copy=False)


def load_idx(images: Path, labels: Path, limit_bytes: int = LIMIT_BYTES) -> Samples:
    """The MNIST family's pair of IDX files, plain or gzipped; images without a channel axis get one."""
    x, y = _idx(images, limit_bytes), _idx(labels, limit_bytes)
    if y.ndim != 1 or len(x) != len(y):
        raise LocalError(f"{labels} has shape {list(y.shape)} for {len(x)} images in {images}: the files do not match")
    return Samples(x[:, np.newaxis] if x.ndim == 3 else x, y)


def _idx(file: Path, limit_bytes: int) -> NDArray[Any]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            magic = stream.read(4)
            if len(magic) != 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or magic[3] == 0:
                raise LocalError(f"{file} does not begin as an IDX file: check that images and labels are in order")
            shape = np.frombuffer(_exactly(stream, 4 * magic[3], f"{file}: header", limit_bytes, last=False), ">u4")
            dtype = np.dtype(_IDX_TYPES[magic[2]])
            data = _exactly(stream, math.prod(shape.tolist()) * dtype.itemsize, str(file), limit_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise LocalError(f"cannot read {file}: {error}; fetch it again") from error
    return np.frombuffer(data, dtype).reshape(shape.tolist()).astype(dtype.newbyteorder("="), copy=False)


def _exactly(stream: IO[bytes] | Any, size: int, place: str, limit_bytes: int, *, last: bool = True) -> bytearray:
    """The `size` bytes that a header declares, read piecewise: memory grows with what is really there."""
    if size > limit_bytes:
        raise LocalError(f"{place} declares {size} bytes, more than the limit of {limit_bytes}: split the file")
    data = bytearray()
    while len(data) < size and (piece := stream.read(min(_READ_BYTES, size - len(data)))):
        data += piece
    if len(data) < size or (last and stream.read(1)):
        found = f"ends after {len(data)}" if len(data) < size else "goes on after that"
        raise LocalError(f"{place} declares {size} bytes but {found}: the file is damaged, fetch it again")
    return data


def load_csv(
    file: Path, label: str, group: str | None = None, limit_bytes: int = LIMIT_BYTES, *, values: bool = False, tokens: bool = False
) -> Samples:
    """A table with a header: column `label` holds class numbers, `group` whole numbers, every other one a feature.

    Args:
        values: `label` names one or more columns, with commas between, that hold numbers to come near to: y is float32 [N, columns].
        tokens: features are whole numbers, x is int64.
    """
    targets = label.split(",") if values else [label]
    read = (_whole, np.int64) if tokens else (_number, np.float32)
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = csv.reader(stream, strict=True)
            header = next(rows, [])
            for column in (*targets, *([group] if group else [])):
                if header.count(column) != 1:
                    raise LocalError(f"{file}: the header has column {column!r} {header.count(column)} times: {header}")
            features = [i for i, column in enumerate(header) if column not in (*targets, group)]
            if file.stat().st_size > limit_bytes:
                raise LocalError(f"{file} has more than the limit of {limit_bytes} bytes: split it")
            x, y, groups = [], list[Any](), []
            for row in rows:
                where = f"{file} line {rows.line_num}"
                if len(row) != len(header):
                    raise LocalError(f"{where}: {len(row)} values for {len(header)} columns")
                x.append(np.array([read[0](row[i], where, header[i]) for i in features], read[1]))
                found = [(_number if values else _whole)(row[header.index(column)], where, column) for column in targets]
                y.append(found if values else found[0])
                groups.append(_whole(row[header.index(group)], where, group) if group else 0)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LocalError(f"cannot read {file} as CSV: {error}") from error
    table = np.stack(x) if x else np.zeros((0, len(features)), read[1])
    return Samples(table, np.array(y, np.float32 if values else np.int64), np.array(groups, np.int64))


def _number(text: str, where: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= _FLOAT32_MAX:
        raise LocalError(f"{where}, column {column!r}: {text!r} is not a finite number")
    return value


def _whole(text: str, where: str, column: str) -> int:
    if not (text.strip().isdecimal() and len(text) < 19):
        raise LocalError(f"{where}, column {column!r}: {text!r} is not a whole number from 0")
    return int(text)


def load_images(
    folder: Path,
    size: tuple[int, int] | None = None,
    gray: bool = False,
    classes: tuple[str, ...] = (),
    limit_bytes: int = LIMIT_BYTES,
) -> Samples:
    """One subfolder per class, uint8 [N, 1 or 3, height, width] in the order of class, then file name.

    Args:
        folder: holds the subfolders.
        size: (width, height) to resize to; without it all images must have one size.
        gray: one channel instead of three.
        classes: names in the order of their labels; by default the sorted subfolders. Name them where devices hold
            different classes, or their labels would mean different things.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise LocalError(f"reading images in {folder} needs Pillow: python -m pip install pillow") from error
    if not folder.is_dir():
        raise LocalError(f"{folder} is no folder: name the one that holds a subfolder per class")
    x: list[NDArray[np.uint8]] = []
    y: list[int] = []
    for label, file in _image_files(folder, classes):
        try:
            with Image.open(file) as image:
                if image.width * image.height > _IMAGE_PIXELS:
                    raise LocalError(f"{file} has {image.width} x {image.height} pixels: make it smaller")
                plain = image.convert("L" if gray else "RGB")
                pixels = np.asarray(plain.resize(size) if size else plain)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
            raise LocalError(f"cannot read {file} as an image: {error}; remove or repair it") from error
        if (x and pixels.size != x[0].size) or (x and (pixels.shape[:2] != x[0].shape[1:])):
            raise LocalError(f"{file} is {pixels.shape[1]} x {pixels.shape[0]}, unlike those before: add ?size=WxH")
        x.append(pixels[np.newaxis] if gray else pixels.transpose(2, 0, 1))
        y.append(label)
        if len(x) * x[0].size > limit_bytes:
            raise LocalError(f"the images in {folder} take more than {limit_bytes} bytes: resize them with ?size=WxH")
    return Samples(np.stack(x) if x else np.zeros((0, 1, 1, 1), np.uint8), np.array(y, np.int64))


def _image_files(folder: Path, classes: tuple[str, ...]) -> Iterator[tuple[int, Path]]:
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if unknown := set(found) - set(classes or found):
        raise LocalError(f"{folder / min(unknown)} is none of the classes {', '.join(classes)}: name it there or move it")
    for label, name in enumerate(classes or found):
        files = (folder / name).iterdir() if name in found else iter(())
        for file in sorted(file for file in files if file.is_file() and not file.name.startswith(".")):
            yield label, file


def _entry_point(name: str) -> Callable[[DataSource], object]:
    """The function that fills a source; it may keep the source and append to it later, from its own thread."""
    found = entry_points(group="regrow.data")
    for entry in found:
        if entry.name == name:
            try:
                function = entry.load()
            except (ImportError, AttributeError) as error:
                raise LocalError(f"entry point {name!r} of regrow.data cannot be loaded: {error}") from error
            if not callable(function):
                raise LocalError(f"entry point {name!r} of regrow.data is no function of one DataSource")
            return function  # type: ignore[no-any-return]  # what is installed on the device is its owner's word
    known = ", ".join(sorted(entry.name for entry in found)) or "none"
    raise UsageError(f"no entry point {name!r} in group regrow.data; installed: {known}")


def _options(spec: str, query: str, known: tuple[str, ...]) -> dict[str, str]:
    try:
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError as error:
        raise UsageError(f"data {spec!r}: {error}; write ?name=value&name=value") from error
    if unknown := set(options) - set(known):
        raise UsageError(f"data {spec!r}: option {min(unknown)!r} is none of {', '.join(known) or 'none'}")
    return options


def _open_idx(place: str, _: dict[str, str], limit_bytes: int) -> Samples:
    images, comma, labels = place.partition(",")
    if not comma:
        raise UsageError(f"idx:{place} names one file: write idx:IMAGES,LABELS")
    return load_idx(Path(images), Path(labels), limit_bytes)


def _open_csv(place: str, options: dict[str, str], limit_bytes: int) -> Samples:
    if "label" not in options:
        raise UsageError(f"csv:{place} does not say which column is the label: add ?label=NAME")
    for option in ("float", "tokens"):
        if options.get(option, "0") not in ("0", "1"):
            raise UsageError(f"csv:{place}: {option}={options[option]} is neither 0 nor 1")
    kinds = {"values": options.get("float") == "1", "tokens": options.get("tokens") == "1"}
    return load_csv(Path(place), options["label"], options.get("group"), limit_bytes, **kinds)


def _open_images(place: str, options: dict[str, str], limit_bytes: int) -> Samples:
    width, x, height = options.get("size", "").partition("x")
    size = (int(width), int(height)) if width.isdecimal() and height.isdecimal() else None
    if "size" in options and (not x or size is None or not 0 < size[0] * size[1] <= _IMAGE_PIXELS):
        raise UsageError(f"images:{place}: size={options['size']} is not WIDTHxHEIGHT, for example 32x32")
    if options.get("gray", "0") not in ("0", "1"):
        raise UsageError(f"images:{place}: gray={options['gray']} is neither 0 nor 1")
    classes = tuple(options["classes"].split(",")) if "classes" in options else ()
    return load_images(Path(place), size, options.get("gray") == "1", classes, limit_bytes)


_LOADERS: dict[str, Callable[[str, dict[str, str], int], Samples]] = {
    "idx": _open_idx,
    "csv": _open_csv,
    "images": _open_images,
}
_OPTIONS = {"idx": (), "csv": ("label", "group", "float", "tokens"), "images": ("size", "gray", "classes")}
