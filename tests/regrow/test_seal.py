"""Seals: what is sealed opens with its key on its topic, and whatever else arrives is a PeerError."""

from __future__ import annotations

import hashlib
import hmac
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fuzz_wire import fuzz_seals
from regrow import seal, wire
from regrow.errors import LocalError, PeerError
from regrow.seal import SEAL_BYTES, Opened, SealError, open_seal
from tests.golden.examples import EXAMPLES

COMMON = settings(max_examples=60)
KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
TOPIC = "regrow/v1/toy/r1/device/d1/update/4/0"
FRAME = wire.encode(*EXAMPLES["update"])
numbers = st.integers(0, 2**64 - 1)
topics = st.text(max_size=80)


def sign_by(key: bytes) -> seal.Sign:
    """A signature for tests without a library for real ones: whoever knows the key can make it."""
    return lambda data: hmac.digest(key, data, hashlib.sha512)


def verify(key: bytes, data: bytes, signature: bytes) -> bool:
    return hmac.compare_digest(sign_by(key)(data), signature)


def sealed(topic: str = TOPIC, frame: bytes = FRAME, *, stamp: int = 7, expires_s: int = 9, key: bytes = KEY) -> bytes:
    return seal.seal(topic, frame, stamp=stamp, expires_s=expires_s, key=key, sign=sign_by(key))


@COMMON
@given(topics, st.binary(max_size=300), numbers, numbers)
def test_what_is_sealed_opens(topic: str, frame: bytes, stamp: int, expires_s: int) -> None:
    data = sealed(topic, frame, stamp=stamp, expires_s=expires_s)
    assert len(data) == SEAL_BYTES + len(frame)
    assert open_seal(topic, data, [OTHER, KEY], verify) == Opened(KEY, stamp, expires_s, frame)


def test_views_are_sealed_and_opened_like_bytes() -> None:
    data = seal.seal(TOPIC, memoryview(bytearray(FRAME)), stamp=7, expires_s=9, key=KEY, sign=sign_by(KEY))
    assert data == sealed()
    assert open_seal(TOPIC, memoryview(data), [KEY], verify).frame == FRAME


@COMMON
@given(topics, st.binary(max_size=300))
def test_any_bytes_are_refused_with_a_peer_error_and_nothing_else(topic: str, data: bytes) -> None:
    for start in (b"", b"RS", b"RS\x01", sealed()[:27]):
        with pytest.raises(SealError):
            open_seal(topic, start + data, [KEY], verify)


def test_every_single_bit_counts() -> None:
    """Of the envelope and the frame; the positive control stands first."""
    data = sealed(frame=b"frame")
    assert open_seal(TOPIC, data, [KEY], verify).frame == b"frame"
    for at in range(8 * len(data)):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(PeerError):
            open_seal(TOPIC, bytes(changed), [KEY], verify)


@pytest.mark.parametrize("cut", [1, len(FRAME), len(FRAME) + 1, len(FRAME) + SEAL_BYTES])
def test_what_is_cut_or_longer_is_refused(cut: int) -> None:
    for data in (sealed()[:-cut], sealed() + b"\0" * cut):
        with pytest.raises(SealError):
            open_seal(TOPIC, data, [KEY], verify)


@pytest.mark.parametrize(
    "elsewhere",
    [
        "regrow/v1/toy/r1/device/d2/update/4/0",
        "regrow/v1/other/r1/device/d1/update/4/0",
        "regrow/v1/toy/r2/device/d1/update/4/0",
        "regrow/v1/toy/r1/device/d1/update/5/0",
        "regrow/v1/toy/r1/device/d1/update/4/1",
        "regrow/v1/toy/r1/device/d1/update/4/0\0",
        "",
        "x" * 70_000,
        "\ud800",
    ],
)
def test_it_cannot_be_moved_to_another_topic(elsewhere: str) -> None:
    assert open_seal(TOPIC, sealed(), [KEY], verify).stamp == 7
    with pytest.raises(SealError, match="another topic") as refused:
        open_seal(elsewhere, sealed(), [KEY], verify)
    assert refused.value.kind == "altered"


def test_bytes_do_not_slide_between_topic_and_frame() -> None:
    whole = sealed("ab", b"cd")
    with pytest.raises(SealError):
        open_seal("a", whole[:SEAL_BYTES] + b"bcd", [KEY], verify)


@pytest.mark.parametrize(
    ("data", "keys", "kind"),
    [
        (FRAME, [KEY], "unsealed"),
        (b"", [KEY], "unsealed"),
        (sealed(), [], "unknown key"),
        (sealed(), [OTHER], "unknown key"),
        (sealed()[:2] + b"\x02" + sealed()[3:], [KEY], "unknown version"),
        (sealed(key=OTHER)[:11] + sealed()[11:], [KEY, OTHER], "altered"),
    ],
)
def test_the_kind_of_a_refusal_can_be_counted(data: bytes, keys: list[bytes], kind: str) -> None:
    with pytest.raises(SealError) as refused:
        open_seal(TOPIC, data, keys, verify)
    assert refused.value.kind == kind


def test_two_keys_with_one_id_do_not_shut_each_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "key_id", lambda _: bytes(8))
    assert open_seal(TOPIC, sealed(key=OTHER), [KEY, OTHER], verify).key == OTHER


@pytest.mark.parametrize(
    "wrong", [{"stamp": -1}, {"stamp": 2**64}, {"expires_s": -1}, {"expires_s": 2**64}, {"key": b"short"}, {"topic": "x" * 70_000}]
)
def test_what_does_not_fit_is_not_sealed(wrong: dict[str, object]) -> None:
    with pytest.raises(LocalError, match="cannot seal"):
        sealed(**wrong)  # type: ignore[arg-type]


def test_a_signer_that_gives_something_else_is_refused() -> None:
    with pytest.raises(LocalError, match="signature of 3 bytes"):
        seal.seal(TOPIC, FRAME, stamp=1, expires_s=0, key=KEY, sign=lambda _: b"abc")


def test_mutated_seals_never_open() -> None:
    corpus = {name: sealed(frame=wire.encode(message, payload)) for name, (message, payload) in EXAMPLES.items()}
    outcomes = fuzz_seals(corpus, 20_000, seed=1, topic=TOPIC, keys=[KEY], verify=verify)
    assert outcomes["unchanged"] + outcomes["refused"] == 20_000
    assert outcomes["unchanged"] < 200  # a mutation may put a byte back
    assert outcomes["refused"] > 19_000


def test_the_library_that_signs_in_the_field_agrees() -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    invalid = pytest.importorskip("cryptography.exceptions").InvalidSignature
    private = ed25519.Ed25519PrivateKey.from_private_bytes(random.Random(0).randbytes(32))
    key = private.public_key().public_bytes_raw()

    def check(key: bytes, data: bytes, signature: bytes) -> bool:
        try:
            ed25519.Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
        except invalid:
            return False
        return True

    data = seal.seal(TOPIC, FRAME, stamp=7, expires_s=0, key=key, sign=private.sign)
    assert open_seal(TOPIC, data, [key], check) == Opened(key, 7, 0, FRAME)
    with pytest.raises(SealError):
        open_seal(TOPIC, data[:-1] + b"\x00", [key], check)
