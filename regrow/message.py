"""What every header of the wire is made of: its base, and numbers and texts with their bounds."""

from __future__ import annotations

from typing import Annotated

import msgspec

DIGEST_BYTES = 16

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Length = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Serial = Annotated[bytes, msgspec.Meta(max_length=20)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
Text = Annotated[str, msgspec.Meta(max_length=1000)]
# Seconds, or bit/s; bounded, so that what is computed from a peer's number stays finite.
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Celsius = Annotated[float, msgspec.Meta(ge=-100, le=200)]
Density = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is a header: a map, in which defaults are left out."""
