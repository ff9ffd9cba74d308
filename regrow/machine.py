"""What the two state machines say and hear: events in, effects out.

The coordinator and the device are pure: `effects = step(state, event, now)`. A runtime (MQTT, simulator or test) carries the
effects out and brings the answers back as events. `now` is monotonic seconds. Nothing here touches a socket, a file or a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regrow.budget import Allowed

Payload = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a durable log: a kind, a readable JSON header and raw bytes."""

    kind: str
    header: bytes
    payload: Payload = b""


# ---- effects -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Publish:
    """Send at QoS 1. An empty retained payload clears the topic. With a token, `Acknowledged(token)` comes back after the PUBACK."""

    topic: str
    payload: Payload
    retain: bool = False
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Subscribe:
    topics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    topics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Persist:
    """Append the records to the durable log in one transaction; `Persisted(id)` comes back once they would survive a power cut."""

    id: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Save:
    """Keep these bytes under this name. With an id they are durable before `Persisted(id)`; without, a torn write is harmless."""

    name: str
    data: Payload
    id: int | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget what was saved under this name."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Train:
    """Evaluate the prefixes, then train the first one; `Trained` or `TrainingFailed` with the same number comes back.

    Args:
        number: the device's own count of its jobs; a result of an earlier one is not taken for this one's.
        level: of the sub-model.
        programs: name -> bytes, as export writes them.
        values: float32 [longest], the downloaded prefix in position order.
        coordinates: uint32 [longest], their flat coordinates.
        length: positions that are trained.
        evaluate: prefix lengths to score on validation data, by level.
        widths: prefix lengths to draw from in every step, by level (ordered dropout); empty: always `length`.
        kept: bool [length], the device's own mask of the prefix (personal masks); None: all of it.
    """

    number: int
    level: int
    programs: Mapping[str, bytes]
    values: NDArray[np.float32]
    coordinates: NDArray[np.uint32]
    length: int
    evaluate: Mapping[int, int]
    steps: int
    batch: int
    learning_rate: float
    seed: int
    widths: Mapping[int, int] = field(default_factory=dict)
    kept: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Evaluate:
    """Score prefixes of the global model on the gateway's held-out data; `Evaluated` of the same version comes back.

    Args:
        version: k.
        values: float32 [n], W_k in position order.
        coordinates: uint32 [n], their flat coordinates.
        lengths: level -> prefix length.
    """

    version: int
    values: NDArray[np.float32]
    coordinates: NDArray[np.uint32]
    lengths: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Steer:
    """How the job of training at hand, and any that comes, shall go on: as usual, not before it is cooler, or not at all (this one)."""

    action: Literal["go on", "stand still", "give up"]


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Send `Woken` at this monotonic time; a newer SetTimer replaces an older one."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth a line in the log and a row in the metrics; never needed for correctness."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    reason: str


# ---- events --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connected:
    pass


@dataclass(frozen=True, slots=True)
class Disconnected:
    """There is no connection, or another attempt has failed. needs_help: trying again helps only when a person has done something."""

    reason: str = ""
    needs_help: bool = False


@dataclass(frozen=True, slots=True)
class Received:
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The broker has acknowledged a publish: `started_s` its first byte left, `acked_s` the PUBACK came; `sent_bytes` of payload."""

    token: int
    started_s: float
    acked_s: float
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Persisted:
    id: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The meter's estimate of the uplink has changed."""

    uplink_bps: float


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """The outcome of a Train effect. values: float32 [length]; scores: (level, loss, accuracy, examples)."""

    number: int
    values: NDArray[np.float32]
    examples: int
    loss: float
    seconds: float
    scores: tuple[tuple[int, float, float, int], ...]


@dataclass(frozen=True, slots=True)
class TrainingFailed:
    """It could not be trained here, and why. declined: no other job could either, until what is wrong on this side has changed."""

    number: int
    reason: str
    declined: bool = False


@dataclass(frozen=True, slots=True)
class DataChanged:
    """Data that could not be trained on are others now. boot: a new nonce of 16 bytes, for it is as good as another start."""

    boot: bytes
    examples: int
    validation_examples: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an Evaluate effect found: level -> accuracy on the gateway's held-out data."""

    version: int
    accuracies: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Limited:
    """What the owner's limits allow the device has changed; heard before the first connection where there are any."""

    allowed: Allowed


@dataclass(frozen=True, slots=True)
class Woken:
    pass


# ---- both: what a companion tells the machine that it accompanies -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """Tells a coordinator which devices get no new work: paused ones do nothing, draining ones finish what they have."""

    paused: frozenset[str] = frozenset()
    draining: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Told:
    """Tells a device to "work", to "pause" at once, or to "drain": finish what it has and take nothing new."""

    action: str


Effect = Publish | Subscribe | Unsubscribe | Persist | Save | Drop | Train | Steer | Evaluate | SetTimer | Note | Finished | Standing | Told
Event = (
    Connected
    | Disconnected
    | Received
    | Acknowledged
    | Persisted
    | Measured
    | Trained
    | TrainingFailed
    | DataChanged
    | Limited
    | Evaluated
    | Woken
    | Standing
    | Told
)
