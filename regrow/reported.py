"""What devices report of themselves, as notes for people and for metrics."""

from __future__ import annotations

from typing import Any

from regrow import wire
from regrow.machine import Note
from regrow.restraint import essence


def telemetry_fields(who: str, telemetry: wire.Telemetry) -> dict[str, Any]:
    """The part of a telemetry message that people look at. None is unknown, or nothing; `limit` is "" where no limit holds."""
    link, power, limit = telemetry.link, telemetry.power, telemetry.limit
    return {
        "device": who,
        "phase": telemetry.phase,
        "uplink_bps": telemetry.uplink_bps,
        "uplink_low_bps": None if link is None else link.low_bps,
        "uplink_high_bps": None if link is None else link.high_bps,
        "rtt_s": None if link is None else link.rtt_s,
        "bytes_up": telemetry.bytes_up,
        "bytes_down": telemetry.bytes_down,
        "disk_bytes": telemetry.disk_bytes,
        "memory_bytes": telemetry.memory_bytes,
        "step_s": telemetry.step_s,
        "watts": None if power is None else power.watts,
        "meter": None if power is None else power.meter,
        "temperature_c": None if power is None else power.temperature_c,
        "throttled": None if power is None else power.throttled,
        "limit": "" if limit is None else limit.said,
        "limit_s": None if limit is None else limit.seconds,
        "limit_density": None if limit is None else limit.density,
        "failed": telemetry.failed,
    }


def limit_note(who: str, before: wire.Limit | None, limit: wire.Limit | None) -> Note | None:
    """That a device's owner has begun or ceased to limit it, or does so otherwise; None where that is no news."""
    if essence(before) == essence(limit):
        return None
    if limit is None:
        return Note("free again", {"device": who})
    does = f"trains at most {limit.density:.2g} of the model" if limit.density is not None else "rests"
    again = "" if limit.seconds is None else f", {limit.seconds:.0f} s more"
    return Note("limited", {"device": who, "does": does + again, "reason": limit.said, "seconds": limit.seconds, "most": limit.density})
