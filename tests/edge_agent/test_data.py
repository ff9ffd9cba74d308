"""Data on the device: no leak across time, whole epochs, and one clear error for every malformed input."""

from __future__ import annotations

import gzip
import io
import sys
import threading
import zipfile
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_agent.data import DataSource, open_source, sources
from regrow.errors import LocalError
from regrow.examples import Examples


def numbered(start: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Samples that carry their own number, label = number modulo 3."""
    numbers = np.arange(start, start + count)
    return numbers.astype(np.float32)[:, None], numbers % 3


def trained(source: DataSource, seed: int = 0) -> set[int]:
    if not source.training_size:
        return set()
    batches = source.batches(np.random.default_rng(seed), source.training_size, 1)
    return {int(v) for x, _ in batches for v in x[:, 0]}


def validated(source: DataSource) -> set[int]:
    return {int(v) for v in source.validation()[0][:, 0]}


# ---- the split -------------------------------------------------------------------------------------------------------


def test_the_last_part_of_each_recording_is_validation() -> None:
    source = DataSource(100, validation_fraction=0.2, gap=1)
    source.append(*numbered(0, 10), group=7)
    source.append(*numbered(10, 5), group=-1)
    assert trained(source) == {0, 1, 2, 3, 4, 5, 6, 10, 11, 12}
    assert validated(source) == {8, 9, 14}
    assert (source.training_size, source.validation_size, len(source)) == (10, 3, 15)
    assert source.class_counts() == {0: 4, 1: 3, 2: 3}


def test_an_explicit_part_overrides_the_rule() -> None:
    source = DataSource(100)
    source.append(*numbered(0, 4), part=np.array([1, 0, 0, 1]))
    assert (trained(source), validated(source)) == ({1, 2}, {0, 3})


@settings(max_examples=60)
@given(
    capacity=st.integers(1, 40),
    fraction=st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]),
    gap=st.integers(0, 3),
    arrivals=st.lists(st.tuples(st.integers(1, 15), st.integers(0, 2), st.sampled_from([-1, -1, 0, 1])), max_size=20),
)
def test_what_was_trained_on_never_becomes_validation(
    capacity: int, fraction: float, gap: int, arrivals: list[tuple[int, int, int]]
) -> None:
    source = DataSource(capacity, fraction, gap)
    ever: set[int] = set()
    group_of: dict[int, int] = {}
    by_rule: set[int] = set()
    start = 0
    for count, group, part in arrivals:
        source.append(*numbered(start, count), group=group, part=None if part < 0 else np.full(count, part))
        group_of.update(dict.fromkeys(range(start, start + count), group))
        by_rule |= set(range(start, start + count)) if part < 0 else set()
        start += count
        now, validation = trained(source), validated(source)
        ever |= now
        assert not ever & validation
        assert now | validation <= set(range(max(0, start - capacity), start))
        for number in now & by_rule:  # training lies before validation, by more than the gap
            later = [v for v in validation & by_rule if group_of[v] == group_of[number]]
            assert all(number < v for v in later)
            between = [n for n in by_rule if group_of[n] == group_of[number] and number < n < min(later, default=0)]
            assert not later or len(between) >= gap


def test_the_ring_drops_the_oldest_and_still_has_both_parts() -> None:
    source = DataSource(10, validation_fraction=0.2)
    for start in range(0, 100, 4):
        source.append(*numbered(start, 4))
    assert trained(source) | validated(source) == set(range(90, 100))
    assert validated(source) == {98, 99}
    source.append(*numbered(100, 33))  # more than fits at once
    assert trained(source) | validated(source) == set(range(123, 133))


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_epochs_are_shuffled_whole_and_repeatable() -> None:
    source = DataSource(100, validation_fraction=0.0)
    source.append(*numbered(0, 10))
    drawn = list(source.batches(np.random.default_rng(1), batch=4, steps=6))
    assert [len(y) for _, y in drawn] == [4, 4, 2, 4, 4, 2]
    first, second = (np.concatenate([x[:, 0] for x, _ in part]) for part in (drawn[:3], drawn[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert all(x.dtype == np.float32 and y.dtype == np.int64 and (x[:, 0] % 3 == y).all() for x, y in drawn)
    again = list(source.batches(np.random.default_rng(1), batch=4, steps=6))
    assert all((a[0] == b[0]).all() for a, b in zip(drawn, again, strict=True))


def test_training_never_sees_what_took_the_slot_of_a_sample_that_left() -> None:
    source = DataSource(10, validation_fraction=0.0)
    source.append(*numbered(0, 10))
    batches = source.batches(np.random.default_rng(1), batch=2, steps=9)
    next(batches)
    source.append(*numbered(10, 6), part=np.ones(6, np.int64))  # validation samples in the places of 0 to 5
    seen = [set(x[:, 0].astype(int).tolist()) for x, _ in batches]
    assert len(seen) == 8
    assert set.union(*seen) == {6, 7, 8, 9}


def test_training_that_lost_all_its_samples_says_so() -> None:
    source = DataSource(4, validation_fraction=0.0)
    source.append(*numbered(0, 4))
    batches = source.batches(np.random.default_rng(1), batch=2, steps=9)
    next(batches)
    source.append(*numbered(4, 4), part=np.ones(4, np.int64))
    with pytest.raises(LocalError, match="took all their places"):
        next(batches)


def test_appending_while_training_keeps_samples_whole() -> None:
    source = DataSource(50)
    source.append(*numbered(0, 50))

    def feed() -> None:
        for start in range(50, 3050, 7):
            source.append(*numbered(start, 7))

    thread = threading.Thread(target=feed)
    thread.start()
    for x, y in source.batches(np.random.default_rng(0), 8, 300):
        assert len(y) > 0
        assert (x[:, 0] % 3 == y).all()
    x, y = source.validation()
    assert (x[:, 0] % 3 == y).all()
    thread.join()


def test_whole_numbers_are_scaled_and_floats_are_not() -> None:
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        source = DataSource(4, validation_fraction=0.0)
        source.append(np.array([[0], [top]], dtype), np.array([0, 1]))
        ((x, _),) = source.batches(np.random.default_rng(0), 2, 1)
        assert x.dtype == np.float32
        assert sorted(x[:, 0]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 1), np.int16)}, "store it as uint8"),
        ({"x": np.zeros((2, 1), np.int64)}, "earlier ones float32"),
        ({"x": np.zeros(2, np.float32)}, "first axis counts samples"),
        ({"x": np.array([[0.0], [np.nan]])}, r"x\[1, 0\] is not a finite"),
        ({"x": np.array([[0.0], [1e300]])}, r"x\[1, 0\] is not a finite"),
        ({"x": np.zeros((2, 5), np.float32)}, "earlier ones"),
        ({"y": np.array([0, -1])}, r"y\[1\] is -1"),
        ({"y": np.array([0.0, 1.0])}, "earlier ones were int64"),
        ({"y": np.array([True, False])}, "as integers"),
        ({"y": np.zeros((3, 2))}, "one target per sample"),
        ({"y": np.array([0.0, np.inf])}, r"y\[1\] is not a finite"),
        ({"y": np.array([0, 1, 2])}, "x has 2 samples"),
        ({"y": np.array([0, 2**40])}, "below 2"),
        ({"group": np.array([0, 1, 2])}, "x has 2 samples"),
        ({"part": np.array([0, 2])}, "part must be 0"),
        ({"part": np.array([0, 256])}, "part must be 0"),
    ],
)
def test_wrong_samples_are_named_and_change_nothing(change: dict[str, Any], message: str) -> None:
    source = DataSource(10)
    source.append(*numbered(0, 3))
    arguments: dict[str, Any] = {"x": np.zeros((2, 1), np.float32), "y": np.array([0, 1])}
    with np.errstate(over="ignore"), pytest.raises(LocalError, match=message):
        source.append(**(arguments | change))
    assert len(source) == 3


def test_a_source_without_samples_says_so() -> None:
    source = DataSource(10)
    with pytest.raises(LocalError, match="no training samples"):
        source.batches(np.random.default_rng(0), 1, 1)
    with pytest.raises(LocalError, match="no samples yet"):
        source.validation()
    assert (source.class_counts(), len(source)) == ({}, 0)
    for arguments in ((0,), (1, 1.0), (1, 0.2, -1)):
        with pytest.raises(LocalError, match="capacity"):
            DataSource(*arguments)
    source.append(*numbered(0, 5))
    with pytest.raises(LocalError, match="at least 1"):
        source.batches(np.random.default_rng(0), 0, 1)


def test_values_and_tokens_come_out_as_they_are() -> None:
    source = DataSource(3, validation_fraction=0.0)
    source.append(np.array([[7, 300], [1, 70_000]], np.int32), np.array([[0.5], [-1.5]]))
    ((x, y),) = source.batches(np.random.default_rng(0), 2, 1)
    assert (x.dtype, y.dtype) == (np.int64, np.float32)
    assert sorted(zip(x.tolist(), y.tolist(), strict=True)) == [([1, 70_000], [-1.5]), ([7, 300], [0.5])]
    assert source.class_counts() == {}
    with pytest.raises(LocalError, match=r"y is float32\[2\], earlier ones were float32\[1\]"):
        source.append(np.zeros((1, 2), np.int64), np.zeros((1, 2)))


# ---- files -----------------------------------------------------------------------------------------------------------


def idx(array: NDArray[Any], code: int = 8) -> bytes:
    return bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_npz(tmp_path: Path) -> None:
    x, y = numbered(0, 6)
    np.savez_compressed(tmp_path / "a.npz", x=np.asfortranarray(np.hstack([x, x])), y=y, part=np.array([1, 0, 0, 0, 0, 1]))
    source = open_source(str(tmp_path / "a.npz"))
    assert validated(source) == {0, 5}
    assert source.validation()[0].tolist() == [[0, 0], [5, 5]]
    assert source.capacity == 6
    assert len(open_source(str(tmp_path / "a.npz"), capacity=4)) == 4


def test_npz_group_and_gap(tmp_path: Path) -> None:
    x, y = numbered(0, 20)
    np.savez(tmp_path / "a.npz", x=x, y=y, group=np.repeat([1, 2], 10))
    source = open_source(str(tmp_path / "a.npz"), gap=2, validation_fraction=0.3)
    assert validated(source) == {7, 8, 9, 17, 18, 19}
    assert trained(source) == {0, 1, 2, 3, 4, 10, 11, 12, 13, 14}


def bomb(file: Path, shape: tuple[int, ...], body: bytes = b"") -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + body)


@pytest.mark.parametrize(
    ("shape", "body", "message"),
    [((10**12, 2), b"", "more than the limit"), ((10**6, 2), b"abc", "ends after 3"), ((1,), b"12345", "goes on")],
)
def test_npz_sizes_are_checked_before_memory_is_taken(tmp_path: Path, shape: tuple[int, ...], body: bytes, message: str) -> None:
    bomb(tmp_path / "bomb.npz", shape, body)
    with pytest.raises(LocalError, match=message):
        open_source(str(tmp_path / "bomb.npz"))


def test_npz_malformed(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    for content in (b"", b"PK\x03\x04 torn"):
        file.write_bytes(content)
        with pytest.raises(LocalError, match=r"cannot read .*a\.npz"):
            open_source(str(file))
    np.savez(file, x=np.zeros((1, 1), np.float32))
    with pytest.raises(LocalError, match="no array 'y'"):
        open_source(str(file))
    np.savez(file, x=np.array([[{}]], dtype=object), y=np.zeros(1, np.int64))
    with pytest.raises(LocalError, match="Python objects"):
        open_source(str(file))
    np.savez(file, x=np.zeros((0, 1), np.float32), y=np.zeros(0, np.int64))
    with pytest.raises(LocalError, match="no samples"):
        open_source(str(file))
    np.savez(file, x=np.zeros((1, 1), np.float32), y=np.array([-3]))
    with pytest.raises(LocalError, match=r"a\.npz: y\[0\] is -3"):
        open_source(str(file))
    bomb(file, (-1, 2))
    with pytest.raises(LocalError, match="no NumPy array"):
        open_source(str(file))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", b"no array")
    with pytest.raises(LocalError, match="no NumPy array"):
        open_source(str(file))


def test_a_flipped_byte_in_npz_is_a_local_error(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(50, dtype=np.float32)[:, None], y=np.zeros(50, np.int64))
    content = (tmp_path / "a.npz").read_bytes()
    refused = 0
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 0x41
        (tmp_path / "b.npz").write_bytes(flipped)
        try:
            open_source(str(tmp_path / "b.npz"))
        except LocalError:
            refused += 1
    assert refused > len(content) / 6


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path: Path, suffix: str) -> None:
    images, labels = tmp_path / f"images{suffix}", tmp_path / f"labels{suffix}"
    pack = gzip.compress if suffix else bytes
    images.write_bytes(pack(idx(np.full((5, 3, 2), 255, np.uint8))))
    labels.write_bytes(pack(idx(np.arange(5, dtype=np.uint8))))
    source = open_source(f"idx:{images},{labels}")
    x, y = source.validation()
    assert x.tolist() == [[[[1.0, 1.0]] * 3]]
    assert y.tolist() == [4]
    labels.write_bytes(pack(idx(np.arange(4, dtype=np.uint8))))
    with pytest.raises(LocalError, match="do not match"):
        open_source(f"idx:{images},{labels}")
    for content, message in ((b"xyzw", "does not begin"), (idx(np.zeros(9, np.uint8))[:-1], "ends after 8")):
        labels.write_bytes(pack(content))
        with pytest.raises(LocalError, match=message):
            open_source(f"idx:{images},{labels}")
    images.write_bytes(pack(b"\0\0\x08\x03" + b"\xff" * 12))
    with pytest.raises(LocalError, match="more than the limit"):
        open_source(f"idx:{images},{labels}")


def test_idx_torn_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(np.zeros((50, 3, 3), np.uint8)))[:-10])
    with pytest.raises(LocalError, match=r"a\.gz"):
        open_source(f"idx:{tmp_path / 'a.gz'},{tmp_path / 'a.gz'}")
    with pytest.raises(LocalError, match="IMAGES,LABELS"):
        open_source("idx:one")


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a,kind,b,g\n1,0,2.5,7\n-3,1,1e2,7\n4,2,5,8\n")
    source = open_source(f"csv:{file}?label=kind&group=g", validation_fraction=0.0)
    ((x, y),) = source.batches(np.random.default_rng(0), 3, 1)
    assert sorted(zip(y.tolist(), x.tolist(), strict=True)) == [(0, [1, 2.5]), (1, [-3, 100]), (2, [4, 5])]


def test_csv_of_values_and_of_tokens(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a,left,b,right\n3,0.5,9,-2\n70000,1e3,8,0\n")
    x, y = open_source(f"csv:{file}?label=right,left&float=1&tokens=1").everything()
    assert (x.dtype, x.tolist()) == (np.int64, [[3, 9], [70_000, 8]])
    assert (y.dtype, y.tolist()) == (np.float32, [[-2, 0.5], [0, 1000]])


@pytest.mark.parametrize(
    ("text", "query", "message"),
    [
        ("a,y\n1.5,0\n", "?label=y&tokens=1", r"column 'a': '1.5' is not a whole"),
        ("a,y\n1,u\n", "?label=y&float=1", r"column 'y': 'u' is not a finite"),
        ("a,y\n1,0\n", "?label=y,a", "column 'y,a' 0 times"),
        ("a,y\n1,0\n", "?label=y&float=yes", "neither 0 nor 1"),
        ("a,y\n1,0\nx,1\n", "?label=y", r"line 3, column 'a': 'x' is not a finite"),
        ("a,y\nnan,0\n", "?label=y", r"line 2, column 'a': 'nan'"),
        ("a,y\n1e39,0\n", "?label=y", "finite"),
        ("a,y\n1,-1\n", "?label=y", r"line 2, column 'y': '-1' is not a whole"),
        ("a,y\n1,1.5\n", "?label=y", "whole number"),
        ("a,y\n1\n", "?label=y", "line 2: 1 values for 2 columns"),
        ("a,b\n1,2\n", "?label=y", "column 'y' 0 times"),
        ("y,y\n1,2\n", "?label=y", "column 'y' 2 times"),
        ("", "?label=y", "column 'y' 0 times"),
        ("a,y\n", "?label=y", "no samples"),
        ('a,y\n"1,2\n', "?label=y", "as CSV"),
        ("a,y\n1,0\n", "", "label=NAME"),
        ("a,y\n1,0\n", "?label=y&lable=z", "'lable' is none of"),
        ("a,y\n1,0\n", "?label", "name=value"),
    ],
)
def test_csv_malformed(tmp_path: Path, text: str, query: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(LocalError, match=message):
        open_source(f"csv:{tmp_path / 'rows.csv'}{query}")


def test_csv_beyond_the_limit_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,y\n" + "1,0\n" * 100)
    with pytest.raises(LocalError, match="limit of 50"):
        open_source(f"csv:{tmp_path / 'rows.csv'}?label=y", limit_bytes=50)
    (tmp_path / "rows.csv").write_bytes(b"a,y\n\xff,0\n")
    with pytest.raises(LocalError, match="as CSV"):
        open_source(f"csv:{tmp_path / 'rows.csv'}?label=y")


def picture(file: Path, shade: int, size: tuple[int, int] = (4, 2)) -> None:
    from PIL import Image

    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(file)


def test_images(tmp_path: Path) -> None:
    for name, shade in (("dog/b.png", 30), ("cat/a.png", 10), ("dog/a.png", 20)):
        picture(tmp_path / name, shade)
    samples = sources.load_images(tmp_path)
    assert samples.x.shape == (3, 3, 2, 4)
    assert samples.x[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert samples.y.tolist() == [0, 1, 1]
    source = open_source(f"images:{tmp_path}?size=8x6&gray=1&classes=bird,cat,dog", validation_fraction=0.0)
    ((x, y),) = source.batches(np.random.default_rng(0), 3, 1)
    assert x.shape == (3, 1, 6, 8)
    assert sorted(y.tolist()) == [1, 2, 2]


def test_images_malformed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "cat/a.png", 10)
    for query, message in (
        ("?size=8", "WIDTHxHEIGHT"),
        ("?size=0x8", "WIDTHxHEIGHT"),
        ("?gray=yes", "neither 0 nor 1"),
        ("?classes=dog", "none of the classes"),
    ):
        with pytest.raises(LocalError, match=message):
            open_source(f"images:{tmp_path}{query}")
    with pytest.raises(LocalError, match="no file or folder"):
        open_source(f"images:{tmp_path / 'none'}")
    with pytest.raises(LocalError, match="more than 5 bytes"):
        open_source(f"images:{tmp_path}", limit_bytes=5)
    picture(tmp_path / "cat/b.png", 10, (2, 4))
    with pytest.raises(LocalError, match=r"b\.png is 2 x 4"):
        open_source(f"images:{tmp_path}")
    (tmp_path / "cat/b.png").write_bytes(b"no image")
    with pytest.raises(LocalError, match=r"b\.png as an image"):
        open_source(f"images:{tmp_path}")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(LocalError, match="needs Pillow"):
        open_source(f"images:{tmp_path}")


def fill(source: DataSource) -> None:
    source.append(*numbered(0, 10))


def test_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    found = EntryPoints(
        [
            EntryPoint("mine", f"{__name__}:fill", "regrow.data"),
            EntryPoint("broken", "no_such_module:f", "regrow.data"),
            EntryPoint("number", "math:pi", "regrow.data"),
        ]
    )
    monkeypatch.setattr(sources, "entry_points", lambda group: found.select(group=group))
    source = open_source("entry:mine", capacity=5)
    assert len(source) == 5
    for name, message in (("other", "broken, mine"), ("broken", "cannot be loaded"), ("number", "no function")):
        with pytest.raises(LocalError, match=message):
            open_source(f"entry:{name}")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(LocalError, match="none of FILE"):
        open_source("data.parquet")


def test_negative_tokens_are_refused_with_their_place() -> None:
    source = DataSource(4)
    with pytest.raises(LocalError, match=r"x\[1, 2\] is -3: tokens count from 0"):
        source.append(np.array([[0, 1, 2], [3, 4, -3]]), np.zeros(2, np.int64))


# ---- against a task ------------------------------------------------------------------------------------------------------------------


def test_all_samples_are_looked_at_once_and_the_row_is_named(tmp_path: Path) -> None:
    x, y = np.zeros((50, 3), np.float32), np.zeros(50, np.int64)
    y[37] = 7
    np.savez(tmp_path / "d.npz", x=x, y=y)
    form = Examples("float32", (3,), classes=5)
    data = open_source(str(tmp_path / "d.npz"))
    with pytest.raises(LocalError, match=r"d\.npz: row 37 \(the first is 0\): label 7, but the task's labels are 0 to 4"):
        data.check(form)
    assert data.check(form, 38) == 50, "what is known to fit is not looked at again"
    with pytest.raises(LocalError, match=r"d\.npz: x: expected float32 \[batch, 4\]"):
        data.check(Examples("float32", (4,), classes=10))
    with pytest.raises(LocalError, match=r"d\.npz: y: expected float32 \[1, 2\].*whole numbers are class labels.*cross_entropy"):
        data.check(Examples("float32", (3,), "float32", (2,)))
    assert data.check(Examples("float32", (3,), None)) == 50, "an autoencoder looks at no labels"
    newest = open_source(str(tmp_path / "d.npz"), 20)
    with pytest.raises(LocalError, match="row 37"):
        newest.check(form)
    assert open_source(str(tmp_path / "d.npz"), 10).check(form) == 50, "the wrong one is no longer kept"


def test_tokens_are_looked_at_too(tmp_path: Path) -> None:
    x = np.zeros((20, 4), np.int64)
    x[11, 2] = 90
    np.savez(tmp_path / "t.npz", x=x, y=np.zeros(20, np.int64))
    data = open_source(str(tmp_path / "t.npz"))
    with pytest.raises(LocalError, match=r"t\.npz: row 11 \(the first is 0\): token 90, but the model's tokens are 0 to 89"):
        data.check(Examples("int64", (4,), classes=2, tokens=90))
    assert data.check(Examples("int64", (4,), classes=2, tokens=91)) == 20
    assert DataSource(5).check(Examples("float32", (3,))) == 0, "nothing has come yet"
