"""Messages: what is encoded decodes, and whatever else arrives is a PeerError."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fuzz_wire import fuzz
from regrow import outgoing, values, wire
from regrow.errors import LocalError, PeerError
from regrow.values import WireDtype
from tests.golden.examples import EXAMPLES, INSTALL

CORPUS = {name: (wire.encode(message, payload), type(message)) for name, (message, payload) in EXAMPLES.items()}
COMMON = settings(max_examples=40)
count = st.integers(0, 2**53)
finite = st.floats(0, 1e12)
sixteen = st.binary(min_size=16, max_size=16)


@COMMON
@given(
    st.builds(
        wire.Telemetry,
        install=sixteen,
        phase=st.text(max_size=50),
        assignment=count,
        uplink_bps=st.none() | finite,
        bytes_up=count,
        step_s=st.none() | finite,
        failed=st.text(max_size=200),
        pending=st.none() | st.builds(wire.Pending, count, st.integers(1, wire.MAX_CHUNKS)),
    ),
    st.binary(max_size=300),
)
def test_a_message_survives_the_wire(message: wire.Telemetry, payload: bytes) -> None:
    decoded, rest = wire.decode(wire.encode(message, payload), wire.Telemetry)
    assert decoded == message
    assert bytes(rest) == payload


def with_header(message: wire.Message, **fields: Any) -> bytes:
    """The message with header fields replaced or added, whether or not they are allowed."""
    header = msgspec.msgpack.encode({**msgspec.msgpack.decode(msgspec.msgpack.encode(message)), **fields})
    kind = next(number for number, known in wire.KINDS.items() if known is type(message))
    return struct.pack("<2sBBI", b"RG", 1, kind, len(header)) + header


@pytest.mark.parametrize("name", EXAMPLES)
def test_unknown_header_fields_are_ignored(name: str) -> None:
    message = EXAMPLES[name][0]
    data = with_header(message, future={"nested": [1, "two", None]}, another=b"\x00")
    assert wire.decode(data, type(message))[0] == message


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_other_kind_is_refused(name: str) -> None:
    data, kind = CORPUS[name]
    for other in set(wire.KINDS.values()) - {kind}:
        with pytest.raises(PeerError, match="kind"):
            wire.decode(data, other)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "frame"),
        (b"RG\x01\x04\0\0\0", "frame"),
        (b"XG" + CORPUS["claim"][0][2:], "not a Regrow"),
        (b"RG\x02" + CORPUS["claim"][0][3:], "not a Regrow"),
        (b"RG\x01\x00" + CORPUS["claim"][0][4:], "kind 0"),
        (b"RG\x01\xff" + CORPUS["claim"][0][4:], "kind 255"),
        (CORPUS["claim"][0][:4] + b"\xff\xff\xff\xff" + CORPUS["claim"][0][8:], "header of 4294967295"),
        (CORPUS["claim"][0][:-1], "header of"),
        (CORPUS["claim"][0][:4] + b"\0\0\0\0" + CORPUS["claim"][0][8:], "Claim"),
        (b"RG\x01\x04\x01\0\0\0\x80", "run"),
        (b"RG\x01\x04\x01\0\0\0\xc0", "object"),
    ],
)
def test_a_frame_that_lies_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(PeerError, match=why):
        wire.decode(data, wire.Claim)


def test_a_header_length_that_eats_the_payload_is_refused() -> None:
    data = bytearray(CORPUS["update"][0])
    data[4:8] = (len(data) - 8).to_bytes(4, "little")
    with pytest.raises(PeerError, match="trailing"):
        wire.decode(bytes(data), wire.UpdateChunk)


def test_a_header_longer_than_the_limit_is_neither_sent_nor_taken() -> None:
    names = [wire.TaskRef(task="a" * 63, run="b" * 63, term=1)] * 10_000
    with pytest.raises(LocalError, match="larger chunks"):
        wire.encode(wire.Tasks(tasks=names))
    data = b"RG\x01\x03" + (wire.MAX_HEADER_BYTES + 1).to_bytes(4, "little") + bytes(wire.MAX_HEADER_BYTES + 1)
    with pytest.raises(PeerError, match="header of"):
        wire.decode(data, wire.Tasks)


FLOATS = [
    ("hello", "uplink_bps"),
    ("hello", "step_s"),
    ("telemetry", "uplink_bps"),
    ("telemetry", "step_s"),
    ("tasks", "heartbeat_s"),
    ("assignment", "learning_rate"),
    ("assignment", "deadline_s"),
]


@pytest.mark.parametrize(("name", "field"), FLOATS)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e300, -1.0])
def test_numbers_outside_their_range_are_refused(name: str, field: str, number: float) -> None:
    message = EXAMPLES[name][0]
    with pytest.raises(PeerError, match=field):
        wire.decode(with_header(message, **{field: number}), type(message))


@pytest.mark.parametrize("position", [8, 9])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_an_update_head_is_finite(position: int, number: float) -> None:
    message = EXAMPLES["update"][0]
    head: list[Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(message))["head"]
    assert isinstance(head[position], float)
    head[position] = number
    with pytest.raises(PeerError):
        wire.decode(with_header(message, head=head), wire.UpdateChunk)


@pytest.mark.parametrize("score", [[1, float("nan"), 0.5, 1], [1, float("inf"), 0.5, 1], [1, 0.5, float("nan"), 1], [1, 0.5, 1.5, 1]])
def test_a_score_is_finite(score: list[float]) -> None:
    message = EXAMPLES["update"][0]
    head: list[Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(message))["head"]
    with pytest.raises(PeerError):
        wire.decode(with_header(message, head=[*head[:10], [score]]), wire.UpdateChunk)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("claim", "run", "r1\n"),
        ("claim", "run", "R1"),
        ("claim", "run", "a/b"),
        ("claim", "run", "+"),
        ("claim", "term", 0),
        ("assignment", "dtype", "int8\n"),
        ("assignment", "dtype", "float64"),
        ("assignment", "chunk_bytes", 1),
        ("assignment", "chunk_bytes", 1 << 30),
        ("assignment", "steps", 0),
        ("manifest", "lengths", []),
        ("manifest", "lengths", [2**31]),
        ("manifest", "dtype", "float16\n"),
        ("receipt-accepted", "outcome", "accepted\n"),
        ("receipt-accepted", "install", b"short"),
        ("update", "count", 0),
        ("update", "count", wire.MAX_CHUNKS + 1),
        ("tasks", "tasks", [{"task": "a", "run": "b", "term": 1}] * 65),
        ("hello", "software", "x" * 1001),
    ],
)
def test_fields_outside_their_bounds_are_refused(name: str, field: str, value: Any) -> None:
    message = EXAMPLES[name][0]
    with pytest.raises(PeerError, match=rf"\$\.{field}"):
        wire.decode(with_header(message, **{field: value}), type(message))


def test_deep_nesting_is_a_peer_error() -> None:
    header = b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0"
    data = struct.pack("<2sBBI", b"RG", 1, 4, len(header)) + header
    with pytest.raises(PeerError):
        wire.decode(data, wire.Claim)


def test_100_000_mutated_messages_decode_or_raise_peer_error_in_bounded_memory() -> None:
    outcomes = fuzz(CORPUS, 95_000, seed=1)
    tracemalloc.start()
    try:
        for name, number in fuzz(CORPUS, 5_000, seed=2).items():
            outcomes[name] += number
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert outcomes["decoded"] + outcomes["refused"] == 100_000
    assert min(outcomes.values()) > 1_000, "the mutations reach only one side of the decoder"
    assert peak < 4 * wire.MAX_HEADER_BYTES


@pytest.mark.parametrize("claim", [b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff"])
def test_an_array_that_claims_four_billion_items_takes_no_memory(claim: bytes) -> None:
    whole = msgspec.msgpack.encode({"lengths": 0})[:-1] + claim
    data = struct.pack("<2sBBI", b"RG", 1, 5, len(whole)) + whole
    tracemalloc.start()
    try:
        with pytest.raises(PeerError):
            wire.decode(data, wire.Manifest)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("chunk_bytes", [wire.MIN_CHUNK_BYTES, 60_000, wire.MAX_CHUNK_BYTES])
def test_an_update_costs_at_most_a_hundredth_and_300_bytes_a_chunk_more_than_its_values(dtype: WireDtype, chunk_bytes: int) -> None:
    n, always_kept = 300_000, 2_000
    generator = np.random.default_rng(3)
    for density in (0.01, 0.05, 0.1, 0.2, 0.5, 1.0):
        length = max(round(density * n), always_kept)
        assignment = msgspec.structs.replace(_assignment(), dtype=dtype, chunk_bytes=chunk_bytes)
        sent = outgoing.make(
            assignment,
            run="a" * 63,
            sequence=10**9,
            trained=generator.normal(size=length).astype(np.float32),
            base=np.zeros(length, np.float32),
            coordinates=np.arange(length, dtype=np.uint32),
            size=n,
            always_kept=always_kept,
            owed=None,
            examples=1000,
            loss=0.123456,
            seconds=1.234567,
            scores=[wire.Score(level, 0.5, 0.25, 100) for level in (3, 4)],
        )
        topic = f"regrow/v1/{'t' * 20}/{'r' * 30}/device/{'d' * 20}/update/{sent.sequence}/"
        travelled = sum(len(sent.chunk(index, INSTALL)) + len(topic) + len(str(index)) for index in range(sent.count))
        assert travelled <= 1.01 * values.encoded_size(dtype, length, always_kept) + 300 * sent.count


def _assignment() -> wire.Assignment:
    message = EXAMPLES["assignment"][0]
    if not isinstance(message, wire.Assignment):
        raise TypeError("example")
    return message


@given(st.binary(max_size=1000), st.integers(1, 100))
@COMMON
def test_pieces_are_never_none_and_join_to_the_whole(data: bytes, piece_bytes: int) -> None:
    cut = wire.pieces(data, piece_bytes)
    assert b"".join(cut) == data
    assert len(cut) == max(1, -(-len(data) // piece_bytes))


@pytest.mark.parametrize("memory_bytes", [None, 0, 2**53])
def test_a_hello_says_what_memory_there_is_or_is_as_long_as_ever(memory_bytes: int | None) -> None:
    hello = wire.Hello(boot=bytes(16), install=bytes(16), memory_bytes=memory_bytes)
    assert wire.decode(wire.encode(hello), wire.Hello)[0] == hello
    assert (b"memory_bytes" in wire.encode(hello)) == (memory_bytes is not None)
    with pytest.raises(PeerError, match="memory_bytes"):
        wire.decode(with_header(hello, memory_bytes=-1), wire.Hello)
