"""Fetching: exactly the parts that are needed, and nothing that the manifest does not vouch for."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from regrow import topics, wire
from regrow.errors import PeerError
from regrow.fetching import Shopping, assemble, shopping
from regrow.ledger import Ledger
from regrow.levels import next_order
from regrow.publication import PIECE_BYTES, CodedOrder, Publication, manifest, program_blobs
from tests.golden.examples import EXAMPLES
from tests.regrow.fleet import INITIAL, LAYOUT, PROGRAMS, task

NAMES = topics.Run("toy", "r1")
LEDGER = Ledger.start(task(), LAYOUT, INITIAL)
VERSION = Publication.of(3, LEDGER.order, LEDGER.weights, "float16", 500)
MANIFEST = manifest(VERSION, LEDGER.coded, program_blobs(PROGRAMS), 9)


def assignment(level: int, evaluate_level: int | None = None) -> wire.Assignment:
    message = EXAMPLES["assignment"][0]
    if not isinstance(message, wire.Assignment):
        raise TypeError("example")
    return msgspec.structs.replace(message, version=3, epoch=0, level=level, evaluate_level=evaluate_level)


def lies() -> dict[str, bytes]:
    """topic -> bytes, everything that lies on the broker."""
    found = {}
    for data in PROGRAMS.values():
        for piece, body in enumerate(wire.pieces(data, PIECE_BYTES)):
            found[NAMES.program(wire.digest(data), piece)] = bytes(body)
    for level, data in enumerate(LEDGER.coded.levels):
        for piece, body in enumerate(wire.pieces(data, PIECE_BYTES)):
            found[NAMES.order(0, level, piece)] = bytes(body)
    for index, chunk in enumerate(VERSION.chunks):
        found[NAMES.chunk(3, index)] = bytes(VERSION.chunk_data(chunk.start, chunk.stop))
    return found


def fetched(wanted: Shopping) -> dict[bytes, bytes]:
    broker = lies()
    return {digest: broker[topic] for digest, topic in wanted.parts.items()}


def test_with_personal_masks_every_level_fetches_everything() -> None:
    manifest_of_masks = manifest(VERSION, LEDGER.coded, program_blobs(PROGRAMS), 9, "personal_masks")
    wanted = shopping(assignment(0), manifest_of_masks, NAMES)
    assert wanted.parts == shopping(assignment(4), MANIFEST, NAMES).parts
    assert assemble(wanted, fetched(wanted)).base.size == LAYOUT.size
    with pytest.raises(PeerError, match="level 5"):
        shopping(assignment(5), manifest_of_masks, NAMES)


@pytest.mark.parametrize("level", range(5))
def test_a_level_gets_its_prefix_and_nothing_more(level: int) -> None:
    wanted = shopping(assignment(level), MANIFEST, NAMES)
    parts = fetched(wanted)
    assert {wire.digest(data) for data in parts.values()} == set(parts)
    got = assemble(wanted, parts)
    length = LEDGER.order.lengths[level]
    assert np.array_equal(got.coordinates, LEDGER.order.coordinates[:length])
    assert np.array_equal(got.base, VERSION.base(length))
    assert got.programs == PROGRAMS
    chunks = [topic for topic in wanted.parts.values() if "/chunk/" in topic]
    assert len(chunks) == sum(chunk.stop <= length for chunk in MANIFEST.chunks)
    assert sum(len(parts[wire.digest(lies()[topic])]) for topic in chunks) == VERSION.offset(length)


def test_to_evaluate_a_higher_level_its_parts_are_needed_too() -> None:
    plain, wide = shopping(assignment(0), MANIFEST, NAMES), shopping(assignment(0, 4), MANIFEST, NAMES)
    assert set(plain.parts) < set(wide.parts)
    assert wide.longest == LAYOUT.size


def changed(**fields: Any) -> wire.Manifest:
    return msgspec.structs.replace(MANIFEST, **fields)


CHUNKS = MANIFEST.chunks
LENGTHS = MANIFEST.lengths


@pytest.mark.parametrize(
    ("bad", "level", "why"),
    [
        (changed(version=4), 0, "for assignment"),
        (changed(epoch=4), 0, "for assignment"),
        (MANIFEST, 5, "level 5"),
        (changed(levels=MANIFEST.levels[:-1]), 0, "level sets"),
        (changed(lengths=LENGTHS[::-1]), 0, "lengths"),
        (changed(dtype="int8"), 0, "int8"),
        (changed(dtype="int4"), 0, "int4"),
        (changed(always_kept=LENGTHS[0] + 1), 0, "always kept"),
        (changed(chunks=CHUNKS[1:]), 0, "cover"),
        (changed(chunks=CHUNKS[:-1]), 0, "cover"),
        (changed(chunks=[CHUNKS[0], *CHUNKS]), 0, "cover"),
        (changed(chunks=[wire.Chunk(0, 0, bytes(16)), *CHUNKS]), 0, "cover"),
        (changed(chunks=[wire.Chunk(0, LENGTHS[-1], bytes(16))]), 0, "crosses"),
        (changed(float32_bytes=[1, 2]), 0, "memory of 2"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(bad: wire.Manifest, level: int, why: str) -> None:
    with pytest.raises(PeerError, match=why):
        shopping(assignment(level), bad, NAMES)


def of(name: str, data: bytes) -> wire.Blob:
    digests = [wire.digest(piece) for piece in wire.pieces(data, PIECE_BYTES)]
    return wire.Blob(name, len(data), wire.digest(data), digests)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (changed(programs=[]), "no program named 'layout'"),
        (changed(programs=[of("layout", PROGRAMS["train"])]), "layout"),
        (changed(programs=[msgspec.structs.replace(MANIFEST.programs[0], size=3), *MANIFEST.programs[1:]]), "whole"),
        (changed(programs=[msgspec.structs.replace(MANIFEST.programs[0], digest=bytes(16)), *MANIFEST.programs[1:]]), "whole"),
        (changed(always_kept=MANIFEST.always_kept - 1), "layout has"),
        (changed(levels=[of("0", PROGRAMS["train"]), *MANIFEST.levels[1:]]), "level|index"),
        (changed(dtype="float32"), "values"),
    ],
)
def test_parts_that_are_not_what_the_manifest_says_are_refused(bad: wire.Manifest, why: str) -> None:
    wanted = shopping(assignment(0), bad, NAMES)
    parts = {wire.digest(data): data for data in [*lies().values(), *PROGRAMS.values()]}
    with pytest.raises(PeerError, match=why):
        assemble(wanted, parts)


def test_what_an_assembly_has_decoded_serves_the_next_ones_of_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = shopping(assignment(4), MANIFEST, NAMES)
    known = assemble(wide, fetched(wide)).known
    monkeypatch.delattr("regrow.indexset.decode_prefix")  # nothing is decoded any more
    for level in range(5):
        wanted = shopping(assignment(level), MANIFEST, NAMES)
        got = assemble(wanted, fetched(wanted), known)
        assert np.array_equal(got.coordinates, LEDGER.order.coordinates[: LEDGER.order.lengths[level]])
        assert got.known is known


def test_other_level_sets_more_of_them_or_another_layout_are_decoded_anew() -> None:
    weights = INITIAL[::-1].copy()
    other = CodedOrder.of(next_order(LEDGER.task, LAYOUT, None, abs(weights), weights, 0))
    publication = Publication.of(3, other.order, weights, "float16", 500)
    narrow = shopping(assignment(1), MANIFEST, NAMES)
    known = assemble(narrow, fetched(narrow)).known
    assert not np.array_equal(other.order.coordinates, LEDGER.order.coordinates)
    parts = {wire.digest(data): data for data in [*lies().values(), *other.levels, publication.data, *PROGRAMS.values()]}
    parts |= {chunk.digest: bytes(publication.chunk_data(chunk.start, chunk.stop)) for chunk in publication.chunks}
    for order, coded, version in ((other.order, other, publication), (LEDGER.order, LEDGER.coded, VERSION)):
        for level in (1, 2, 4):
            wanted = shopping(assignment(level), manifest(version, coded, program_blobs(PROGRAMS), 9), NAMES)
            got = assemble(wanted, parts, known)
            assert np.array_equal(got.coordinates, order.coordinates[: order.lengths[level]])
            known = got.known
    renamed = LAYOUT.to_json().replace(b'"name":"', b'"name":"my-', 1)
    programs = program_blobs({**PROGRAMS, "layout": renamed})
    wanted = shopping(assignment(1), manifest(VERSION, LEDGER.coded, programs, 9), NAMES)
    assert assemble(wanted, {**parts, wire.digest(renamed): renamed}, known).layout != LAYOUT


@pytest.mark.parametrize("field", ["size", "digest"])
def test_level_sets_that_are_known_are_still_checked(field: str) -> None:
    wanted = shopping(assignment(1), MANIFEST, NAMES)
    known = assemble(wanted, fetched(wanted)).known
    wrong = {"size": MANIFEST.levels[0].size + 1} if field == "size" else {"digest": bytes(16)}
    bad = changed(levels=[msgspec.structs.replace(MANIFEST.levels[0], **wrong), *MANIFEST.levels[1:]])
    with pytest.raises(PeerError, match="whole"):
        assemble(shopping(assignment(1), bad, NAMES), fetched(wanted), known)


def test_the_joint_of_several_pieces_is_checked() -> None:
    data = b"".join(PROGRAMS.values())
    half = len(data) // 2
    pieces = [wire.digest(data[:half]), wire.digest(data[half:])]
    parts = {wire.digest(part): part for part in (*lies().values(), data[:half], data[half:])}
    for whole, digests, fits in ((data, pieces, True), (data, pieces[::-1], False)):
        blob = wire.Blob("more", len(whole), wire.digest(whole), digests)
        wanted = shopping(assignment(0), changed(programs=[*MANIFEST.programs, blob]), NAMES)
        if fits:
            assert assemble(wanted, parts).programs["more"] == data
        else:
            with pytest.raises(PeerError, match="whole"):
                assemble(wanted, parts)


def test_a_manifest_of_another_model_is_refused() -> None:
    lengths = [*LENGTHS[:-1], LENGTHS[-1] + 1]
    chunks = [*CHUNKS, wire.Chunk(LENGTHS[-1], LENGTHS[-1] + 1, bytes(16))]
    wanted = shopping(assignment(0), changed(lengths=lengths, chunks=chunks), NAMES)
    with pytest.raises(PeerError, match="the layout has"):
        assemble(wanted, {wire.digest(data): data for data in [*lies().values(), *PROGRAMS.values()]})


def test_chunks_never_cross_a_level_and_cover_the_model_once() -> None:
    stops = [chunk.stop for chunk in CHUNKS]
    assert [chunk.start for chunk in CHUNKS] == [0, *stops[:-1]]
    assert set(LENGTHS) <= set(stops)
    assert all(len(VERSION.chunk_data(chunk.start, chunk.stop)) <= 500 for chunk in CHUNKS)
    assert b"".join(bytes(VERSION.chunk_data(chunk.start, chunk.stop)) for chunk in CHUNKS) == VERSION.data
