"""The messages of protocol v1, byte by byte: frame, header, payload. docs/protocol.md is the same in prose.

A message is `b"RG"`, a version byte, a kind byte, the header's length as u32 little-endian, the header (a msgpack map) and the payload
(what is left). Receivers MUST refuse another magic, version or kind, MUST check every length before they allocate, and MUST ignore header
fields that they do not know, so that v1 can grow. In a fleet with keys the whole frame travels inside a seal (regrow.seal).

Chunks of the model, index sets and programs travel as bare bytes: their digest stands in a manifest.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Annotated, TypeVar, Union

import msgspec

from regrow.errors import LocalError, PeerError
from regrow.findings import Finding
from regrow.local_rules import LocalRule
from regrow.machine import Payload
from regrow.message import DIGEST_BYTES as DIGEST_BYTES
from regrow.message import Celsius, Count, Density, Digest, Length, Name, Positive, Rate, Serial, Text
from regrow.message import Message as Message
from regrow.observations import Field as Field
from regrow.observations import FieldReport as FieldReport
from regrow.observations import Observations as Observations
from regrow.observations import ObservationsReceipt as ObservationsReceipt
from regrow.programs import StorageRule
from regrow.values import WireDtype

MAGIC = b"RG"
VERSION = 1
MAX_HEADER_BYTES = 1 << 20
MAX_CHUNK_BYTES = 256 * 1024
MIN_CHUNK_BYTES = 16 * 1024
MAX_CHUNKS = 1 << 16
MAX_PROGRAMS = 256  # 64 levels of whole units with three each, and those of the full model
MAX_MODEL_BYTES = 256 * 1024 * 1024  # of an inference model, or of a program of its head
MAX_WITHDRAWN = 64
_FRAME = struct.Struct("<2sBBI")


class Hello(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Device -> coordinator after every connect; of two, the newest boot wins. Not retained."""

    boot: Digest
    install: Digest
    uplink_bps: Rate | None = None
    examples: Count = 0
    validation_examples: Count = 0
    step_s: Rate | None = None
    software: Text = ""
    memory_bytes: Count | None = None
    storage: StorageRule = "float32"


class Status(Message, frozen=True, kw_only=True, omit_defaults=True):
    """The last will: a hint that the device's connection broke."""

    online: bool = False


class TaskRef(msgspec.Struct, frozen=True, kw_only=True):
    task: Name
    run: Name
    term: Positive


class Tasks(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device, retained: what there is to train, best first."""

    tasks: Annotated[list[TaskRef], msgspec.Meta(max_length=64)] = []
    heartbeat_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 10.0


class Claim(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator, retained: who leads this task. A live leader raises `beat` every few seconds; a higher term wins."""

    run: Name
    term: Positive
    beat: Count = 0


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Positions [start, stop) of one version and the digest of their bytes."""

    start: Length
    stop: Length
    digest: Digest


class Blob(msgspec.Struct, frozen=True, array_like=True):
    """A named byte string in pieces, each with its digest; `digest` is that of the whole."""

    name: Text
    size: Length
    digest: Digest
    pieces: Annotated[list[Digest], msgspec.Meta(max_length=MAX_CHUNKS)]


class Manifest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator, retained: everything that a device needs in order to fetch and check one version."""

    term: Positive
    version: Count
    epoch: Count
    dtype: WireDtype
    always_kept: Length
    lengths: Annotated[list[Length], msgspec.Meta(min_length=1, max_length=256)]
    chunks: Annotated[list[Chunk], msgspec.Meta(min_length=1, max_length=MAX_CHUNKS)]
    levels: Annotated[list[Blob], msgspec.Meta(min_length=1, max_length=256)]
    programs: Annotated[list[Blob], msgspec.Meta(max_length=MAX_PROGRAMS)]
    local: LocalRule = "plain"
    float32_bytes: Annotated[list[Count], msgspec.Meta(max_length=256)] = []


class Assignment(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device, retained: train this prefix of this version. `number` grows with every assignment of the device."""

    term: Positive
    number: Positive
    version: Count
    epoch: Count
    level: Count
    steps: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    batch: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1000)]
    seed: Count
    dtype: WireDtype
    chunk_bytes: Annotated[int, msgspec.Meta(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)]
    deadline_s: Rate
    evaluate_level: Count | None = None


class Score(msgspec.Struct, frozen=True, array_like=True):
    """What a device found on its own validation data for the prefix of one level, before it trained."""

    level: Count
    loss: float
    accuracy: Annotated[float, msgspec.Meta(ge=0, le=1)]
    examples: Count


class UpdateHead(msgspec.Struct, frozen=True, array_like=True):
    """What an update is; travels in its chunk 0."""

    assignment: Positive
    version: Count
    epoch: Count
    level: Count
    dtype: WireDtype
    examples: Positive
    size: Length
    digest: Digest
    seconds: Rate = 0.0
    loss: float = 0.0
    scores: Annotated[list[Score], msgspec.Meta(max_length=8)] = []


class UpdateChunk(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Device -> coordinator; sequence and index stand in the topic, the bytes are the payload."""

    install: Digest
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNKS)]
    chunk_bytes: Annotated[int, msgspec.Meta(ge=MIN_CHUNK_BYTES, le=MAX_CHUNK_BYTES)]
    head: UpdateHead | None = None


class Range(msgspec.Struct, frozen=True, array_like=True):
    start: Count
    stop: Count


class Receipt(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device: what became of an update. Not retained: a device that missed it asks again."""

    term: Positive
    install: Digest
    sequence: Count
    outcome: Annotated[str, msgspec.Meta(pattern=r"^(accepted|rejected|missing)\Z")]
    reason: Text = ""
    blame: bool = False
    missing: Annotated[list[Range], msgspec.Meta(max_length=MAX_CHUNKS)] = []


class Pending(msgspec.Struct, frozen=True, array_like=True):
    """An update whose receipt the device still waits for."""

    sequence: Count
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNKS)]


DECLINED = "declined"
"""Telemetry.phase of a device that can train nothing of this task, so that another assignment would be in vain."""


class LinkState(msgspec.Struct, frozen=True, array_like=True):
    """How sure a device is of its uplink: the 95 % interval of the mean, and the round trip of its connection."""

    low_bps: Rate
    high_bps: Rate
    rtt_s: Rate | None = None


class PowerState(msgspec.Struct, frozen=True, array_like=True):
    """What a device draws, as its meter has it since the last telemetry; None is unknown, and the meter's name then says why."""

    watts: Rate | None
    meter: Text
    temperature_c: Celsius | None = None
    throttled: bool = False


class Limit(msgspec.Struct, frozen=True, array_like=True):
    """A limit of the device's owner that makes it do less than it could, or nothing; in words.

    density: the largest share of the model that it may train now; None: it rests. seconds: until it may work again, None where it works, or
    nobody knows.
    """

    said: Text
    seconds: Rate | None = None
    density: Density | None = None


class Telemetry(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Device -> coordinator: heartbeat, phase, meters. With `pending` it asks for that update's receipt."""

    install: Digest
    phase: Text
    assignment: Count = 0
    uplink_bps: Rate | None = None
    bytes_up: Count = 0
    bytes_down: Count = 0
    disk_bytes: Count = 0
    memory_bytes: Count = 0
    step_s: Rate | None = None
    failed: Text = ""
    pending: Pending | None = None
    link: LinkState | None = None
    power: PowerState | None = None
    limit: Limit | None = None


class Head(msgspec.Struct, frozen=True, array_like=True):
    """How a device may train the last layer of a promoted model on its own data: its programs, and the steps of SGD to take."""

    programs: Annotated[list[Blob], msgspec.Meta(min_length=1, max_length=8)]
    steps: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    batch: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1000)]


class Promotion(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator, retained: the inference model of a task that is signed off for use; without `model` there is none (any more)."""

    number: Positive
    run: Name
    version: Count = 0
    model: Blob | None = None
    step: Text = ""
    withdrawn: Annotated[list[Digest], msgspec.Meta(max_length=MAX_WITHDRAWN)] = []
    head: Head | None = None


class ModelScore(msgspec.Struct, frozen=True, array_like=True):
    """What a device found for an inference model on its own validation data."""

    loss: float
    accuracy: Annotated[float, msgspec.Meta(ge=0, le=1)]
    examples: Positive


class PromotionReport(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Device -> coordinator: what became of a promotion. Said again whenever its announcement is heard again."""

    number: Positive
    outcome: Annotated[str, msgspec.Meta(pattern=r"^(placed|kept|failed|removed)\Z")]
    reason: Text = ""
    current: Digest | None = None
    new: ModelScore | None = None
    old: ModelScore | None = None
    tuned: ModelScore | None = None


class Control(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device, retained: what the device shall do beside its tasks. A lower number than one heard before is the past.

    action: "work"; "pause", keep the connection and train nothing; "drain", finish the job at hand and take no other; "wipe", remove
    everything and at last the keys. replace: serial of a certificate that the device shall replace, with new keys, if it uses it.
    """

    number: Positive
    action: Annotated[str, msgspec.Meta(pattern=r"^(work|pause|drain|wipe)\Z")]
    replace: Serial = b""


class ControlReport(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Device -> coordinator after every connect and every Control: the last one it heard, what it does, the certificate it uses.

    keys: number of the CoordinatorKeys that it believes, heard or in its claim, 0: there were none yet.
    """

    number: Count
    doing: Annotated[str, msgspec.Meta(pattern=r"^(working|finishing|paused|drained|wiped)\Z")]
    serial: Serial = b""
    keys: Count = 0


class CertificateRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Device -> coordinator: another certificate, please. csr: DER; proof: the new signing key's signature, as at the enrolment."""

    csr: Annotated[bytes, msgspec.Meta(min_length=1, max_length=4096)]
    signing_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    proof: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class Certificate(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device: the certificate that was asked for (PEM), or why there is none."""

    certificate: Annotated[bytes, msgspec.Meta(max_length=8192)] = b""
    reason: Text = ""


class Release(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device, retained: the software that the device shall install; without `files` it is withdrawn.

    manifest, signed: the bytes and their signature, as in regrow.release; files: the wheels that the manifest names, each a Blob.
    """

    number: Positive
    manifest: Annotated[bytes, msgspec.Meta(max_length=256 * 1024)] = b""
    signed: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    files: Annotated[list[Blob], msgspec.Meta(max_length=256)] = []


class ReleaseReport(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Device -> coordinator: how far it is with a release, after every connect and every change.

    number: of the release, 0 none; percent: of its bytes that are here; version, python, machine, board: what this device is.
    """

    number: Count
    state: Annotated[
        str, msgspec.Meta(pattern=r"^(none|waiting|fetching|verified|installing|trial|healthy|rolled back|failed|refused|withdrawn)\Z")
    ]
    percent: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    reason: Text = ""
    version: Text = ""
    python: Text = ""
    machine: Text = ""
    board: Text = ""


class DoctorRequest(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device, not retained: say what ails you. number: grows; now_s: the gateway's clock, unix seconds."""

    number: Positive
    now_s: Rate


class DoctorReport(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Device -> coordinator: what its checks found. memory_bytes: that it offers to training."""

    number: Positive
    findings: Annotated[list[Finding], msgspec.Meta(max_length=64)] = []
    memory_bytes: Count | None = None


class Older(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device: what it says is refused as old, for this stamp of its key was heard. Not retained."""

    stamp: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class CoordinatorKeys(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device, retained: whose seals count from now on. A number that is not above the one known is the past.

    keys: Ed25519 public keys, two while the coordinator changes its own.
    """

    number: Positive
    keys: Annotated[list[Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]], msgspec.Meta(min_length=1, max_length=2)]


KINDS: dict[int, type[Message]] = {
    1: Hello,
    2: Status,
    3: Tasks,
    4: Claim,
    5: Manifest,
    6: Assignment,
    7: UpdateChunk,
    8: Receipt,
    9: Telemetry,
    10: Promotion,
    11: PromotionReport,
    12: Control,
    13: ControlReport,
    14: CertificateRequest,
    15: Certificate,
    16: Release,
    17: ReleaseReport,
    18: DoctorRequest,
    19: DoctorReport,
    20: Older,
    21: Observations,
    22: ObservationsReceipt,
    23: Field,
    24: FieldReport,
    25: CoordinatorKeys,
}
_KIND_OF = {message: kind for kind, message in KINDS.items()}
_DECODERS = {message: msgspec.msgpack.Decoder(message) for message in KINDS.values()}
_ENCODER = msgspec.msgpack.Encoder()
AnyMessage = Union[  # noqa: UP007 (3.10 evaluates it)
    Hello,
    Status,
    Tasks,
    Claim,
    Manifest,
    Assignment,
    UpdateChunk,
    Receipt,
    Telemetry,
    Promotion,
    PromotionReport,
    Control,
    ControlReport,
    CertificateRequest,
    Certificate,
    Release,
    ReleaseReport,
    DoctorRequest,
    DoctorReport,
    Older,
    Observations,
    ObservationsReceipt,
    Field,
    FieldReport,
    CoordinatorKeys,
]
M = TypeVar("M", bound=Message)


def encode(message: Message, payload: Payload = b"") -> bytes:
    """Bytes of one message.

    Raises:
        LocalError: the header would be longer than a receiver accepts.
    """
    header = _ENCODER.encode(message)
    if len(header) > MAX_HEADER_BYTES:
        raise LocalError(f"{type(message).__name__} header has {len(header)} bytes, at most {MAX_HEADER_BYTES} travel: use larger chunks")
    return b"".join((_FRAME.pack(MAGIC, VERSION, _KIND_OF[type(message)], len(header)), header, payload))


def decode(data: bytes, expected: type[M]) -> tuple[M, memoryview]:
    """The message and its payload, a view into `data`.

    Raises:
        PeerError: whatever else the bytes are; the message names the field.
    """
    if len(data) < _FRAME.size:
        raise PeerError(f"{expected.__name__}: {len(data)} bytes, a frame has at least {_FRAME.size}")
    magic, version, kind, header_bytes = _FRAME.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise PeerError(f"{expected.__name__}: not a Regrow v{VERSION} message (starts {data[:3].hex()})")
    if KINDS.get(kind) is not expected:
        raise PeerError(f"{expected.__name__}: kind {kind} on this topic, expected {_KIND_OF[expected]}")
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - _FRAME.size):
        raise PeerError(f"{expected.__name__}: header of {header_bytes} bytes in a message of {len(data)}")
    body = memoryview(data)[_FRAME.size :]
    try:
        message = _DECODERS[expected].decode(body[:header_bytes])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerError(f"{expected.__name__}: {error}") from error
    assert_finite(message)
    return message, body[header_bytes:]  # type: ignore[return-value]  # the decoder of `expected` returns `expected`


def digest(data: Payload) -> bytes:
    """The first 16 bytes of SHA-256: what names a chunk, a piece or an update."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def assert_finite(message: Message) -> None:
    """Raise PeerError if any number of the header is NaN or infinite: none may reach a mean or a deadline."""
    numbers: list[tuple[str, float | None]] = []
    if isinstance(message, (Hello, Telemetry)):
        numbers = [("uplink_bps", message.uplink_bps), ("step_s", message.step_s)]
        if isinstance(message, Telemetry):
            parts = [part for part in (message.link, message.power, message.limit) if part is not None]
            numbers += [
                (name, value) for part in parts for name in part.__struct_fields__ if isinstance(value := getattr(part, name), float)
            ]
    elif isinstance(message, Assignment):
        numbers = [("learning_rate", message.learning_rate), ("deadline_s", message.deadline_s)]
    elif isinstance(message, UpdateChunk) and message.head is not None:
        head = message.head
        numbers = [("seconds", head.seconds), ("loss", head.loss)]
        numbers += [("scores", number) for score in head.scores for number in (score.loss, score.accuracy)]
    elif isinstance(message, (DoctorRequest, Observations, Field, FieldReport)):
        numbers = [(name, value) for name in message.__struct_fields__ if isinstance(value := getattr(message, name), float)]
    elif isinstance(message, Promotion) and message.head is not None:
        numbers = [("head", message.head.learning_rate)]
    elif isinstance(message, PromotionReport):
        found = (message.new, message.old, message.tuned)
        numbers = [("score", number) for score in found if score is not None for number in (score.loss, score.accuracy)]
    for name, number in numbers:
        if number is not None and not abs(number) < float("inf"):
            raise PeerError(f"{type(message).__name__}: {name} is {number}, a finite number is needed")


def pieces(data: Payload, piece_bytes: int) -> list[memoryview]:
    """Consecutive slices of at most `piece_bytes`; one empty slice for empty data, so that a count is never 0."""
    view = memoryview(data)
    return [view[start : start + piece_bytes] for start in range(0, max(len(view), 1), piece_bytes)]
