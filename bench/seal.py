"""What does a seal cost: time to seal and to open beside that of writing and reading the bare message, and bytes on the wire?

    python bench/seal.py

Ed25519 by the cryptography library, as the agent and the gateway use it, over the two guards: `seal` is what the device or the gateway
does to a message that leaves, `open` what the other end does to it, with all that is checked. The best of many rounds each, so that what
else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from machine import write_result

from edge_agent.identity import verify
from regrow import seal, topics, wire
from regrow.fleet_time import FleetTime
from regrow.guards import FromCoordinator, FromDevices
from regrow.machine import Received

RUN = topics.Run("toy", "r1")
CHUNK_BYTES = 256 * 1024
NOW_MS = 1_800_000_000_000
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = PRIVATE.public_key().public_bytes_raw()
DIGEST = bytes(range(16))
HEAD = wire.UpdateHead(
    assignment=3, version=12, epoch=2, level=1, dtype="int8", examples=100, size=CHUNK_BYTES, digest=DIGEST, seconds=1.5, loss=0.25
)
ASSIGNMENT = wire.Assignment(
    term=1 << 31,
    number=3,
    version=12,
    epoch=2,
    level=1,
    steps=20,
    batch=16,
    learning_rate=0.05,
    seed=7,
    dtype="int8",
    chunk_bytes=CHUNK_BYTES,
    deadline_s=30.0,
)
ROWS: dict[str, tuple[str, wire.Message, bytes, bool]] = {
    "claim": (topics.claim("toy"), wire.Claim(run="r1", term=1 << 31, beat=41), b"", False),
    "assignment": (RUN.assignment("d1"), ASSIGNMENT, b"", False),
    "telemetry": (
        RUN.telemetry("d1"),
        wire.Telemetry(install=DIGEST, phase="sending", assignment=3, uplink_bps=8e5, bytes_up=1000, bytes_down=2000, step_s=0.5),
        b"",
        True,
    ),
    "update chunk of 256 KiB": (
        RUN.update("d1", 4, 0),
        wire.UpdateChunk(install=DIGEST, count=1, chunk_bytes=CHUNK_BYTES, head=HEAD),
        bytes(CHUNK_BYTES),
        True,
    ),
}


def best_us(work: Callable[[int], object], rounds: int) -> float:
    """The quickest of many calls, in microseconds; each gets its number, for stamps must rise."""
    best_s = float("inf")
    for number in range(rounds):
        started_s = time.perf_counter()
        work(number)
        best_s = min(best_s, time.perf_counter() - started_s)
    return round(1e6 * best_s, 1)


def save(_: Mapping[str, int], __: Mapping[str, int]) -> None:
    """The gateway's write, once in ten seconds for the whole fleet, is not part of a message's price."""


def guards() -> tuple[FromCoordinator, FromDevices]:
    time_ = FleetTime(NOW_MS, 0.0)
    return FromCoordinator("d1", lambda: (KEY,), verify, time_), FromDevices(lambda _: (KEY,), verify, {}, save)


def measure(topic: str, message: wire.Message, payload: bytes, rounds: int, *, by_device: bool) -> dict[str, Any]:
    """One kind of message. by_device: the gateway opens it, else the device."""
    frame = wire.encode(message, payload)

    def sealed(stamp: int) -> bytes:
        return seal.seal(topic, frame, stamp=stamp, expires_s=0, key=KEY, sign=PRIVATE.sign)

    ready = [Received(topic, sealed(NOW_MS + number)) for number in range(rounds)]
    device, gateway = guards()

    def opened(number: int) -> None:
        guard = gateway if by_device else device
        if guard.open(ready[number], number / 1000) is None:
            raise SystemExit(f"{topic} was refused: {guard.refusals.notes(0.0)}")

    figures = {
        "encode_us": best_us(lambda _: wire.encode(message, payload), rounds),
        "seal_us": best_us(lambda number: sealed(NOW_MS + number), rounds),
        "decode_us": best_us(lambda _: wire.decode(frame, type(message)), rounds),
        "open_us": best_us(opened, rounds),
    }
    return {
        "bytes": len(frame),
        "sealed_bytes": len(frame) + seal.SEAL_BYTES,
        **figures,
        "seal_to_encode": round(figures["seal_us"] / figures["encode_us"], 1),
        "open_to_decode": round(figures["open_us"] / figures["decode_us"], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000, help="of each measurement (default: %(default)s)")
    options = parser.parse_args()
    result = {
        name: measure(topic, message, payload, options.rounds, by_device=by_device)
        for name, (topic, message, payload, by_device) in ROWS.items()
    }
    out = Path(__file__).resolve().parent / "results" / "seal.json"
    write_result(out, {"rounds": options.rounds, "seal_bytes": seal.SEAL_BYTES, "messages": result})
    for name, row in result.items():
        print(name, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
