"""What a device has observed of itself: transfers, its link, watts, phases; and how a field run speaks to devices.

Rows are kept in the device's journal and travel in batches, oldest first, when the link is not needed for training: the payload of
`Observations` is the msgpack array of a batch's rows, each an array that begins with the letter of its kind. A batch is sent again until
`ObservationsReceipt` says that it is durable. What is not known is None or a text that says why, never 0. Times are unix seconds in the
fleet's time, as far as the device knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Union

import msgspec

from regrow.errors import LocalError, PeerError
from regrow.machine import Payload
from regrow.message import Celsius, Count, Density, Digest, Message, Positive, Rate, Text

MAX_ROWS = 500
MAX_BATCH_BYTES = 48 * 1024
Word = Annotated[str, msgspec.Meta(max_length=64)]
Decibels = Annotated[float, msgspec.Meta(ge=-200, le=100)]
What = Literal["update", "model", "probe", "telemetry", "observations", "measurement", "other"]
Phase = Literal["train", "transmit", "receive", "idle", "baseline"]
Certainty = Literal["measured", "estimated", "modelled", "unmeasured"]


class TransferSeen(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """A transfer, from its first byte to its last acknowledgement: application bytes and what the packets around them make it.

    up: from the device. number: the assignment that it belongs to, 0 none. retransmitted: TCP segments meanwhile, None where unknown.
    """

    at_s: Rate
    seconds: Rate
    up: bool
    what: What
    payload_bytes: Count
    packet_bytes: Count
    run: Word = ""
    number: Count = 0
    retransmitted: Count | None = None
    rtt_s: Rate | None = None


class UplinkSeen(msgspec.Struct, frozen=True, array_like=True, tag="u"):
    """What the device takes its uplink for: robust mean and 95 % interval, and whether it has just drifted away from an older estimate."""

    at_s: Rate
    mean_bps: Rate
    low_bps: Rate
    high_bps: Rate
    drifted: bool = False


class LinkSeen(msgspec.Struct, frozen=True, array_like=True, tag="l"):
    """The interface over `seconds` before `at_s`: its own counters, TCP's view, and the radio's without any network's name."""

    at_s: Rate
    seconds: Rate
    interface: Word
    sent_bytes: Count | None = None
    received_bytes: Count | None = None
    rtt_s: Rate | None = None
    retransmitted: Count | None = None
    congestion: Word = ""
    signal_dbm: Decibels | None = None
    radio_bps: Rate | None = None
    radio_hz: Rate | None = None
    technology: Word = ""


class PowerSeen(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """Mean watts over `seconds` before `at_s`. marked: why the interval does not count for step times, such as "under-voltage"."""

    at_s: Rate
    seconds: Rate
    watts: Rate | None
    meter: Word
    certainty: Certainty
    temperature_c: Celsius | None = None
    marked: Word = ""


class PhaseSeen(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """A stretch of one phase that began at `at_s` and its joules; low_j and high_j: their 95 % interval where they are modelled."""

    at_s: Rate
    seconds: Rate
    phase: Phase
    joules: Rate | None
    meter: Text
    certainty: Certainty
    run: Word = ""
    number: Count = 0
    density: Density | None = None
    steps: Count = 0
    low_j: Rate | None = None
    high_j: Rate | None = None
    marked: Word = ""


class Missing(msgspec.Struct, frozen=True, array_like=True, tag="m"):
    """The journal was full: `rows` rows from `at_s` on were let go, so this stretch is unknown."""

    at_s: Rate
    seconds: Rate
    rows: Positive


class Mark(msgspec.Struct, frozen=True, array_like=True, tag="k"):
    """Something happened: "start", "sync pulse", "cut", "limit: ..."."""

    at_s: Rate
    text: Text


Row = Union[TransferSeen, UplinkSeen, LinkSeen, PowerSeen, PhaseSeen, Missing, Mark]  # noqa: UP007 (3.10 evaluates it)
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[Row])


class Observations(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Device -> coordinator: one batch of its journal, the rows as payload. Not retained.

    journal: drawn when the journal was begun; number: grows by one with every batch of it; sent_s: the device's clock now.
    """

    journal: Digest
    number: Positive
    sent_s: Rate


class ObservationsReceipt(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device: batches of this journal are durable up to this number, so the device may forget them."""

    journal: Digest
    number: Count


class Field(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Coordinator -> device, retained: what is being recorded. Without `name` nothing is, and journals go on as on other days.

    phase: "baseline", keep still, "run", train. It holds from start_s to end_s (the coordinator's clock; 0: until told otherwise).
    sample_hz: of the meters. pulse_s: when to make a sync pulse, 0 never. sent_s: the coordinator's clock now.
    """

    number: Positive
    name: Annotated[str, msgspec.Meta(max_length=63)] = ""
    phase: Literal["", "baseline", "run"] = ""
    start_s: Rate = 0.0
    end_s: Rate = 0.0
    sample_hz: Annotated[float, msgspec.Meta(gt=0, le=100)] = 10.0
    pulse_s: Rate = 0.0
    sent_s: Rate = 0.0


class FieldReport(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Device -> coordinator, in answer to a `Field`: what it does, and its clock when it heard it and when it says this.

    With the coordinator's own two times these give the offset of the device's clock and half the round trip as its error (as NTP has it).
    """

    number: Positive
    phase: Literal["", "baseline", "run"] = ""
    heard_s: Rate = 0.0
    said_s: Rate = 0.0
    meter: Text = ""
    software: Text = ""


def phase_at(field: Field, now_s: float) -> Literal["", "baseline", "run"]:
    """Which phase of a field run holds at this time of the coordinator's clock, "" none."""
    return field.phase if field.name and field.start_s <= now_s and not _is_over(field, now_s) else ""


def keeps_still(field: Field, now_s: float) -> bool:
    """Whether the device trains nothing then: in a baseline, and until a run begins, so that all begin at once."""
    if field.phase == "run":
        return bool(field.name) and now_s < field.start_s
    return phase_at(field, now_s) == "baseline"


def _is_over(field: Field, now_s: float) -> bool:
    return 0 < field.end_s <= now_s


def encode_rows(rows: Sequence[Row]) -> bytes:
    """The payload of one batch.

    Raises:
        LocalError: more rows or bytes than a receiver takes.
    """
    data = _ENCODER.encode(list(rows))
    if len(rows) > MAX_ROWS or len(data) > MAX_BATCH_BYTES:
        raise LocalError(f"{len(rows)} rows of {len(data)} bytes, a batch has at most {MAX_ROWS} of {MAX_BATCH_BYTES}")
    return data


def decode_rows(payload: Payload) -> list[Row]:
    """The rows of one batch.

    Raises:
        PeerError: whatever else the bytes are.
    """
    if len(payload) > MAX_BATCH_BYTES:
        raise PeerError(f"Observations: {len(payload)} bytes of rows, at most {MAX_BATCH_BYTES}")
    try:
        rows = _DECODER.decode(payload)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerError(f"Observations: {error}") from error
    if len(rows) > MAX_ROWS:
        raise PeerError(f"Observations: {len(rows)} rows, at most {MAX_ROWS}")
    for row in rows:
        for name in row.__struct_fields__:
            value = getattr(row, name)
            if isinstance(value, float) and not abs(value) < float("inf"):
                raise PeerError(f"Observations: {name} of {type(row).__name__} is {value}, a finite number is needed")
    return rows
