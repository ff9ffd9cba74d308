"""The bytes of protocol v1 do not change: what a device in the field sends today must be understood tomorrow."""

from __future__ import annotations

from pathlib import Path

import pytest

from regrow import wire
from tests.golden.examples import EXAMPLES

HEX = Path(__file__).with_name("messages.hex")


def golden() -> dict[str, bytes]:
    """name -> bytes, one message a line."""
    pairs = (line.split() for line in HEX.read_text().splitlines())
    return {name: bytes.fromhex(text) for name, text in pairs}


def test_every_example_and_every_kind_has_golden_bytes() -> None:
    assert set(golden()) == set(EXAMPLES)
    assert {type(message) for message, _ in EXAMPLES.values()} == set(wire.KINDS.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_encoding_gives_the_golden_bytes_and_they_decode(name: str) -> None:
    message, payload = EXAMPLES[name]
    data = golden()[name]
    assert wire.encode(message, payload) == data
    decoded, rest = wire.decode(data, type(message))
    assert decoded == message
    assert bytes(rest) == payload


def test_the_frame_is_magic_version_kind_and_length() -> None:
    data = golden()["claim"]
    assert data[:4] == b"RG\x01\x04"
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
