"""docs/protocol.md against the code: the golden bytes are what the code writes, and the code reads them."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.identity import verify
from regrow import indexset, personal, seal, topics, values, wire
from regrow.order import Order
from regrow.seal import open_seal
from tests.docs.generate import ROOT

PAGE = (ROOT / "docs" / "protocol.md").read_text()
INSTALL, BOOT = bytes(range(16)), bytes(range(16, 32))
HEAD = wire.UpdateHead(
    assignment=5, version=12, epoch=1, level=0, dtype="int8", examples=400, size=3, digest=wire.digest(b"\1\2\3"), loss=0.5, seconds=1.5
)
MESSAGES: dict[str, tuple[wire.Message, bytes]] = {
    "claim": (wire.Claim(run="watch-1", term=1 << 31 | 7, beat=3), b""),
    "hello": (wire.Hello(boot=BOOT, install=INSTALL, uplink_bps=250_000.0), b""),
    "update": (wire.UpdateChunk(install=INSTALL, count=1, chunk_bytes=16384, head=HEAD), b"\1\2\3"),
    "missing": (
        wire.Receipt(term=1 << 31 | 7, install=INSTALL, sequence=4, outcome="missing", missing=[wire.Range(0, 2), wire.Range(7, 8)]),
        b"",
    ),
}
PREFIX = np.array([1.0, 0.5, -2.0], np.float32)
ORDER = Order(0, np.array([0, 2, 5, 1, 3, 4, 6, 7, 8, 9], np.uint32), (3, 10), 1)


def golden() -> dict[str, bytes]:
    """Name -> bytes of every golden block; what follows a # is for people."""
    blocks = re.findall(r"```golden (\S+)\n(.*?)```", PAGE, re.DOTALL)
    return {name: bytes.fromhex("".join(line.partition("#")[0] for line in text.splitlines())) for name, text in blocks}


def floats(*numbers: float) -> NDArray[np.float32]:
    return np.array(numbers, np.float32)


def test_golden_blocks_are_these_and_no_others() -> None:
    assert golden().keys() == {*MESSAGES, "sealed-claim", "float32", "float16", "int8", "int4", "index-set", "personal-mask"}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name: str) -> None:
    message, payload = MESSAGES[name]
    assert wire.encode(message, payload) == golden()[name]
    decoded, rest = wire.decode(golden()[name], type(message))
    assert (decoded, bytes(rest)) == (message, payload)


def test_sealed_message() -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    private = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    key, topic, expires_s = private.public_key().public_bytes_raw(), topics.claim("watch"), 1_800_000_600
    data = seal.seal(topic, golden()["claim"], stamp=1_800_000_000_000, expires_s=expires_s, key=key, sign=private.sign)
    assert data == golden()["sealed-claim"]
    assert f"{seal.SEAL_BYTES - 1} | Ed25519 signature |" in PAGE
    assert open_seal(topic, data, [key], verify).frame == golden()["claim"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_values(dtype: values.WireDtype) -> None:
    assert values.encode(PREFIX, dtype, 1) == golden()[dtype]
    decoded = values.decode(golden()[dtype], dtype, 3, 1)
    np.testing.assert_allclose(decoded, PREFIX, rtol=0, atol={"int8": 1 / 128, "int4": 1 / 7}.get(dtype, 0))


def test_index_set() -> None:
    assert indexset.encode_levels(ORDER) == [golden()["index-set"], b""]
    coordinates = indexset.decode_prefix(10, ORDER.coordinates[:1], ORDER.lengths, [golden()["index-set"]])
    assert coordinates.tolist() == [0, 2, 5]


def test_personal_mask() -> None:
    kept = np.array([True, False, True])
    assert personal.bitmap(kept) + values.encode(PREFIX[kept], "float16", 1) == golden()["personal-mask"]
    mask, rest = personal.split(golden()["personal-mask"], 3, 1, 2)
    assert mask.tolist() == kept.tolist()
    assert values.decode(rest, "float16", 2, 1).tolist() == [1.0, -2.0]


def test_digest_and_topic_examples() -> None:
    assert f"`{wire.digest(b'regrow').hex()}`" in PAGE
    assert f"`{topics.Run('watch', 'watch-1').update('wearer-03', 4, 0)}`" in PAGE


@pytest.mark.parametrize(("number", "kind"), wire.KINDS.items())
def test_every_kind_has_its_number_and_table(number: int, kind: type[wire.Message]) -> None:
    assert f"### {number} {kind.__name__}\n" in PAGE
    assert f"<!-- generated: wire:{kind.__name__} -->" in PAGE


@pytest.mark.parametrize("name", ["Chunk", "Blob", "Score", "UpdateHead", "Range", "Pending", "TaskRef", "Head", "ModelScore"])
def test_every_part_of_a_header_has_its_table(name: str) -> None:
    assert f"<!-- generated: wire:{name} -->" in PAGE


def test_maps_ignore_unknown_fields_and_arrays_what_is_behind() -> None:
    """The page promises both, so that v1 can grow."""
    fields = {"term": 1, "install": INSTALL, "sequence": 0, "outcome": "missing", "missing": [[0, 1, 99]], "new": True}
    header = wire._ENCODER.encode(fields)
    decoded, _ = wire.decode(wire._FRAME.pack(b"RG", 1, 8, len(header)) + header, wire.Receipt)
    assert decoded.missing == [wire.Range(0, 1)]
