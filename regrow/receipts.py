"""What a device is told of an update that it sent: accepted, rejected with the reason, or which chunks are missing."""

from __future__ import annotations

from regrow import wire
from regrow.member import Device
from regrow.uploads import Assembly


def missing_of(assembly: Assembly | None, install: bytes, pending: wire.Pending) -> list[wire.Range]:
    """The chunks that are not here of an update that a device asks about."""
    if assembly is not None and (assembly.install, assembly.sequence) == (install, pending.sequence):
        return assembly.missing()
    return [wire.Range(0, pending.count)]


def receipt(known: Device, term: int, install: bytes, sequence: int, missing: list[wire.Range] | None = None) -> wire.Receipt:
    """The receipt of a device's update. known: what the ledger holds of the device; missing: chunks to send, if any."""
    if missing:
        outcome, reason = "missing", ""
    elif sequence == known.last_sequence:
        outcome, reason = ("accepted" if known.last_accepted else "rejected"), known.last_reason
    else:
        outcome, reason = "rejected", "a newer update of this device is already here"
    blame = outcome == "rejected" and sequence == known.last_sequence and known.last_blamed
    return wire.Receipt(term=term, install=install, sequence=sequence, outcome=outcome, reason=reason, blame=blame, missing=missing or [])
