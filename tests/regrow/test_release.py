"""Which wheels fit a device, how versions are ordered, and what the head of a bundle may be."""

from __future__ import annotations

import io
import itertools
import random

import pytest

from regrow.errors import LocalError, PeerError
from regrow.release import Wheel, fitting, head, split_head, targets_of, version_key, wheel_of

SHA = "0" * 64
PI = ("3.11", "aarch64", (2, 36))


def wheels(*names: str) -> list[Wheel]:
    return [wheel_of(name, 1, SHA) for name in names]


def test_versions_sort_as_pep_440_says() -> None:
    ordered = ["0.9", "1.0.dev1", "1.0a1.dev1", "1.0a1", "1.0b2", "1.0rc1", "1.0", "1.0.post1.dev2", "1.0.post1", "1.0.1", "1.10", "2.0"]
    for smaller, larger in itertools.pairwise(ordered):
        assert version_key(smaller) < version_key(larger)
    assert version_key("1.0.0") == version_key("1.0") == version_key("1.0+local.7")


@pytest.mark.parametrize("version", ["", "v1", "1.0-beta", "1..0", "1.0\n", "1.0+UP", "9" * 11, "1.0.dev"])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(PeerError, match="version"):
        version_key(version)


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-py2-none-any.whl", False),
        ("a-1-py311-none-any.whl", True),
        ("a-1-py310-none-any.whl", False),
        ("a-1-cp311-cp311-manylinux_2_28_aarch64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_36_aarch64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_37_aarch64.whl", False),
        ("a-1-cp311-cp311-manylinux2014_aarch64.manylinux_2_99_aarch64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", False),
        ("a-1-cp311-cp311-musllinux_1_2_aarch64.whl", False),
        ("a-1-cp311-cp311-linux_aarch64.whl", True),
        ("a-1-cp310-cp310-manylinux_2_28_aarch64.whl", False),
        ("a-1-cp311-cp311t-manylinux_2_28_aarch64.whl", False),
        ("a-1-cp36-abi3-manylinux2010_aarch64.whl", True),
        ("a-1-cp312-abi3-manylinux2014_aarch64.whl", False),
        ("a-1-7-cp311-none-manylinux2014_aarch64.whl", True),
    ],
)
def test_a_wheel_fits_by_its_tags(name: str, fits: bool) -> None:
    assert bool(fitting(wheels(name), *PI)) == fits


def test_two_wheels_for_one_device_are_a_question_that_is_not_answered_by_a_guess() -> None:
    with pytest.raises(PeerError, match=r"two wheels of a-b fit Python 3\.11"):
        fitting(wheels("a_b-1-py3-none-any.whl", "A.B-2-cp311-cp311-linux_aarch64.whl"), *PI)


def test_the_targets_are_those_for_which_nothing_lacks() -> None:
    numpy = [f"numpy-2-cp3{minor}-cp3{minor}-manylinux_2_28_aarch64.whl" for minor in (10, 11)]
    one = ["regrow-1-py3-none-any.whl", *numpy, "psutil-7-cp36-abi3-manylinux2014_aarch64.whl"]
    assert targets_of(wheels(*one)) == [("3.10", "aarch64"), ("3.11", "aarch64")]
    assert targets_of(wheels(*one, "onnxruntime-1-cp313-cp313-manylinux_2_28_aarch64.whl")) == []


@pytest.mark.parametrize(
    "name", ["../a-1-py3-none-any.whl", "a/b-1-py3-none-any.whl", ".a-1-py3-none-any.whl", "a-1-py3-none-any.whl\n", "a.whl", ""]
)
def test_a_name_that_is_no_wheels_is_refused(name: str) -> None:
    with pytest.raises(LocalError, match="not a wheel"):
        wheel_of(name, 1, SHA)


def test_any_bytes_are_a_head_or_a_peer_error() -> None:
    whole = head(b'{"format": 1}', bytes(range(64)))
    assert split_head(io.BytesIO(whole).read) == (b'{"format": 1}', bytes(range(64)))
    rng = random.Random(1)
    for cut in range(len(whole)):
        with pytest.raises(PeerError):
            split_head(io.BytesIO(whole[:cut]).read)
    for _ in range(500):
        data = bytearray(whole)
        data[rng.randrange(16)] = rng.randrange(256)
        try:
            split_head(io.BytesIO(bytes(data)).read)
        except PeerError:
            continue
