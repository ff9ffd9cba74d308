"""What the coordinator promises to remember: one struct per kind of durable record, readable JSON in the store.

The log of these records *is* the run: the ledger is a fold over it, a restart replays it, and an audit feeds it to reference.py.
Whatever is decided from clocks, links or floating point stands in a record as its outcome, so that a replay cannot decide otherwise.
"""

from __future__ import annotations

from typing import Union

import msgspec

from regrow.density import Bound
from regrow.errors import LocalError
from regrow.machine import Payload, Record
from regrow.values import WireDtype
from regrow.wire import Score


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One durable fact."""


class Led(Entry, frozen=True, kw_only=True):
    """A coordinator leads under this term; devices ignore lower ones, so a restart must never use one again."""

    term: int


class Joined(Entry, frozen=True, kw_only=True):
    """A device got its first density, or has started anew.

    With another boot nonce nothing is held against it any more; with another install nonce its sequence starts anew too.
    `memory_density`: the largest that fits its memory, which nothing ever exceeds, 0.0 where none does; `bound_by`: what the first density
    comes from; `uncut_density`, `uncut_by`: the same with any memory, 0.0 in logs of before, which did not keep it; `step_s`: of the full
    model, as far as the device has measured it. Of a device that starts anew no density is read.
    """

    device: str
    install: str
    boot: str = ""
    uplink_bps: float
    density: float
    step_s: float | None = None
    memory_density: float = 1.0
    bound_by: Bound = "link"
    uncut_density: float = 0.0
    uncut_by: Bound = "link"


class Assigned(Entry, frozen=True, kw_only=True):
    """A device leases a version: its base stays until the update, the deadline or expiry.

    `version`, here and in Accepted, Published and Retired, is the number of a model (publication.number_of): k, unless k has several.
    `dtype` is that of its update; logs from before there was a choice have none.
    """

    device: str
    number: int
    version: int
    epoch: int
    level: int
    deadline_s: float
    evaluate_level: int | None = None
    dtype: WireDtype | None = None


class Limited(Entry, frozen=True, kw_only=True):
    """The largest density that a device's owner allows now, which its next assignments keep to; 1.0: any. What it cuts off comes back."""

    device: str
    density: float


class Accepted(Entry, frozen=True, kw_only=True):
    """An update that counts; the payload is the bytes that travelled."""

    device: str
    install: str
    sequence: int
    version: int
    epoch: int
    level: int
    dtype: WireDtype
    examples: int
    norm: float
    loss: float
    seconds: float
    round_s: float
    uplink_bps: float
    scores: list[Score]


class Rejected(Entry, frozen=True, kw_only=True):
    """An update that does not count. `blame`: it is held against the device (bad values), not against circumstances (too late)."""

    device: str
    install: str
    sequence: int
    reason: str
    blame: bool


class Released(Entry, frozen=True, kw_only=True):
    """A lease ended without an update: expired, or the device gave up. `blame` as in Rejected; `declined`: it can train nothing of this
    task until it starts anew."""

    device: str
    reason: str
    blame: bool = False
    declined: bool = False


class Aggregated(Entry, frozen=True, kw_only=True):
    """W_version was made from the buffer as the log has it at this point."""

    version: int
    elapsed_s: float


class Refreshed(Entry, frozen=True, kw_only=True):
    """A new order epoch; the payload is its coded level sets, `sizes` bytes each."""

    epoch: int
    lengths: list[int]
    sizes: list[int]


class Restored(Entry, frozen=True, kw_only=True):
    """The outcome of one evaluation: every changed density, and the counters as restoration.py keeps them."""

    densities: dict[str, float]
    state: msgspec.Raw
    scores: dict[str, float]
    global_score: float | None
    reasons: list[str]
    finished: bool


class Published(Entry, frozen=True, kw_only=True):
    """A version was rounded and offered to devices, in chunks of at most chunk_bytes."""

    version: int
    chunk_bytes: int


class Retired(Entry, frozen=True, kw_only=True):
    """No device needs this version any more."""

    version: int


class Finished(Entry, frozen=True, kw_only=True):
    """The run ended."""

    reason: str
    elapsed_s: float


class RolledBack(Entry, frozen=True, kw_only=True):
    """A person returned to an earlier model: the payload is that model, float32 [n] by flat coordinate; buffer and leases are emptied."""

    version: int
    to_version: int


AnyEntry = Union[  # noqa: UP007 (3.10 evaluates it)
    Led, Joined, Limited, Assigned, Accepted, Rejected, Released, Aggregated, Refreshed, Restored, Published, Retired, Finished, RolledBack
]
KINDS: dict[str, type[Entry]] = {
    entry.__name__.lower(): entry
    for entry in (
        Led, Joined, Limited, Assigned, Accepted, Rejected, Released, Aggregated, Refreshed, Restored, Published, Retired, Finished,
        RolledBack,
    )
}  # fmt: skip


def to_record(entry: Entry, payload: Payload = b"") -> Record:
    return Record(type(entry).__name__.lower(), msgspec.json.encode(entry), payload)


def from_record(record: Record) -> Entry:
    """The entry that a stored record holds.

    Raises:
        LocalError: our own log does not check out; the message names the record's kind.
    """
    kind = KINDS.get(record.kind)
    if kind is None:
        raise LocalError(f"store: unknown record kind {record.kind!r}; was it written by a newer Regrow?")
    try:
        return msgspec.json.decode(record.header, type=kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise LocalError(f"store: record {record.kind}: {error}; restore the run from a backup or start a new one") from error
