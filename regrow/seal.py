"""The seal around a message in a fleet with keys: who said it, on which topic, when, and until when it holds.

A sealed message is `b"RS"`, a version byte, the id of the key, the stamp, the expiry, the signature and then the frame of regrow.wire.
The signature also covers the topic, so that nothing can be moved to another device, task, run, version or sequence number, for these
stand in topics. Whether a stamp is fresh is not decided here but in regrow.guards; docs/protocol.md has the same in prose.

Signing is handed in: this module knows no cryptography library.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from regrow.errors import LocalError, PeerError
from regrow.machine import Payload

MAGIC = b"RS"
VERSION = 1
KEY_BYTES = 32
KEY_ID_BYTES = 8
SIGNATURE_BYTES = 64
MAX_TOPIC_BYTES = 65_535  # of MQTT
UNKNOWN_KEY = "unknown key"
_DOMAIN = b"regrow seal v1\0"  # nothing else that these keys sign begins so
_TERMS = struct.Struct("<8sQQ")
_ENVELOPE = struct.Struct("<2sB8sQQ64s")
SEAL_BYTES = _ENVELOPE.size

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes, bytes], bool]


class SealError(PeerError):
    """A message that is not what it must be. kind: in one or two words, so that many can be counted as one."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Opened:
    """What a seal that holds says. key: who signed; expires_s: unix seconds, 0: it never does."""

    key: bytes
    stamp: int
    expires_s: int
    frame: bytes


def key_id(key: bytes) -> bytes:
    """What names a public key in a seal: the first 8 bytes of its SHA-256."""
    return hashlib.sha256(key).digest()[:KEY_ID_BYTES]


def seal(topic: str, frame: Payload, *, stamp: int, expires_s: int, key: bytes, sign: Sign) -> bytes:
    """The sealed message, SEAL_BYTES longer than its frame.

    Args:
        topic: that it is published on, and no other.
        stamp: larger than that of every message before on this topic.
        expires_s: unix seconds in the coordinator's clock, 0: never.
        key: the public half of what `sign` signs with (Ed25519).
        sign: data -> signature, 64 bytes.

    Raises:
        LocalError: a number, the topic, the key or the signature does not fit.
    """
    if not (0 <= stamp < 1 << 64 and 0 <= expires_s < 1 << 64):
        raise LocalError(f"cannot seal with stamp {stamp} and expiry {expires_s}: both are 0 to 2^64 - 1")
    if len(key) != KEY_BYTES:
        raise LocalError(f"cannot seal with a public key of {len(key)} bytes, Ed25519 has {KEY_BYTES}")
    terms = _TERMS.pack(key_id(key), stamp, expires_s)
    signature = sign(_signed(topic, terms, frame))
    if len(signature) != SIGNATURE_BYTES:
        raise LocalError(f"cannot seal with a signature of {len(signature)} bytes, Ed25519 gives {SIGNATURE_BYTES}")
    return b"".join((MAGIC, bytes([VERSION]), terms, signature, frame))


def open_seal(topic: str, data: Payload, keys: Iterable[bytes], verify: Verify) -> Opened:
    """What one of the keys has sealed for this topic.

    Args:
        topic: that it came on.
        data: whatever came.
        keys: public keys that may speak here.
        verify: (key, data, signature) -> whether the signature is that key's.

    Raises:
        SealError: it is not sealed, by none of the keys, or altered or moved; the frame must not be looked at.
    """
    if len(data) < SEAL_BYTES or bytes(data[:2]) != MAGIC:
        raise SealError("unsealed", f"{topic}: {len(data)} bytes without a seal")
    _, version, name, stamp, expires_s, signature = _ENVELOPE.unpack_from(data)
    if version != VERSION:
        raise SealError("unknown version", f"{topic}: a seal of version {version}, this is version {VERSION}: update the older side")
    known = [key for key in keys if key_id(key) == name]
    if not known:
        raise SealError(UNKNOWN_KEY, f"{topic}: sealed by key {name.hex()}, which may not speak here")
    frame = bytes(data[SEAL_BYTES:])
    if len(topic.encode(errors="surrogatepass")) <= MAX_TOPIC_BYTES:
        signed = _signed(topic, _TERMS.pack(name, stamp, expires_s), frame)
        for key in known:
            if verify(key, signed, signature):
                return Opened(key, stamp, expires_s, frame)
    raise SealError("altered", f"{topic}: the seal does not fit: the message was altered or made for another topic")


def _signed(topic: str, terms: bytes, frame: Payload) -> bytes:
    """What is signed. Everything before the frame has a length of its own, so that no two messages have the same bytes."""
    name = topic.encode(errors="surrogatepass")
    if len(name) > MAX_TOPIC_BYTES:
        raise LocalError(f"cannot seal for a topic of {len(name)} bytes, MQTT has at most {MAX_TOPIC_BYTES}")
    return b"".join((_DOMAIN, terms, struct.pack("<H", len(name)), name, frame))
