"""How its owner's limits bear on a device's work: which job may begin, which update may leave, and what the coordinator hears of it.

What a round takes is known to the byte from the manifest, so a job that today's bytes do not hold is given back before its first part is
fetched, together with the largest share of the model that they do hold.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import msgspec

from regrow import personal, topics, values, wire
from regrow.budget import BYTES, JOULES, Allowed
from regrow.fetching import Shopping, shopping
from regrow.presence import Identity

MESSAGE_BYTES = 512  # besides its payload: topics, seal, acknowledgements, asking for a part and letting go of it
SAID_MOST = 900


@dataclass(slots=True)
class Restraint:
    """What holds now.

    Args:
        allowed: by the runtime's latest look at sensors and counters.
        costs: (share of the model, bytes of a round of it whose version is not here yet), ascending; empty while nobody knows or counts.
        waiting_bytes: of what is ready and may not leave.
    """

    allowed: Allowed = field(default_factory=Allowed)
    costs: tuple[tuple[float, int], ...] = ()
    waiting_bytes: int = 0

    @property
    def refuses(self) -> str:
        """Why no job may begin now, or nothing."""
        limit = self.limit(0.0)
        return "" if limit is None or limit.density is not None else f"limit: {limit.said}"

    def may_send(self, more_bytes: int) -> bool:
        """Whether so many bytes of an update may leave now; those that may not wait."""
        left = self.allowed.bytes_left
        may = self.allowed.link and (left is None or more_bytes <= left)
        self.waiting_bytes = 0 if may else more_bytes
        return may

    def weigh(self, wanted: Shopping, parts: Container[bytes], names: topics.Run, me: Identity) -> str:
        """Why this job must not be fetched, or nothing; from now on it is known what rounds take.

        Args:
            parts: digests of what is here.
        """
        manifest, assignment = wanted.manifest, wanted.assignment
        share = manifest.lengths[assignment.level] / manifest.lengths[-1]
        if share > self.allowed.density * (1 + 1e-9):
            return f"limit: {self.allowed.said or JOULES}"
        left, self.costs = self.allowed.bytes_left, ()
        if left is None:
            return ""
        found = []
        for level, length in enumerate(manifest.lengths):
            other = msgspec.structs.replace(assignment, level=level, evaluate_level=None)
            anew = shopping(other, manifest, names, me.storage, me.memory_bytes)
            found.append((length / manifest.lengths[-1], round_bytes(anew, parts, anew=True)))
        self.costs = tuple(found)
        needed = round_bytes(wanted, parts)
        return "" if needed <= left else f"limit: {BYTES}: this round takes {needed}, {left} are left today"

    def limit(self, now: float) -> wire.Limit | None:
        """What the coordinator is told; None where nothing holds the device back."""
        allowed, left = self.allowed, self.allowed.bytes_left
        if not (allowed.train and allowed.cool and allowed.link):
            return wire.Limit(allowed.said[:SAID_MOST], _until(allowed.until_s, now), None)
        density, said = allowed.density, allowed.said
        if left is not None:
            least = max(self.costs[0][1] if self.costs else 0, self.waiting_bytes)
            if least > left:
                what = "what waits to be sent" if self.waiting_bytes == least else "the smallest round"
                return wire.Limit(f"{BYTES}: {left} are left today, {what} takes {least}", _until(allowed.day_end_s, now), None)
            affordable = max((share for share, cost in self.costs if cost <= left), default=1.0)
            if affordable < density:
                density, said = affordable, f"{BYTES}: {left} are left today, a round of everything takes {self.costs[-1][1]}"
        return None if density >= 1.0 else wire.Limit(said[:SAID_MOST], None, density)


def essence(limit: wire.Limit | None) -> tuple[str, float | None] | None:
    """(which limit holds, the density that it leaves): what is news when it changes."""
    return None if limit is None else (limit.said.partition(":")[0], limit.density)


def round_bytes(wanted: Shopping, parts: Container[bytes], *, anew: bool = False) -> int:
    """What a round takes at most: the parts that are not here, and the update.

    Args:
        parts: digests of what is here.
        anew: as if the values were those of another version, so that none is here.
    """
    manifest, assignment = wanted.manifest, wanted.assignment
    down = [size for digest, size, is_value in _sizes(wanted) if (anew and is_value) or digest not in parts]
    whole = manifest.local == "personal_masks"
    length = manifest.lengths[-1 if whole else assignment.level]
    up = values.encoded_size(assignment.dtype, length, manifest.always_kept) + (personal.bitmap_bytes(length) if whole else 0)
    messages = len(down) + math.ceil(up / assignment.chunk_bytes) + 4  # the assignment, the manifest, the receipt, and its question
    return sum(down) + up + MESSAGE_BYTES * messages


def _sizes(wanted: Shopping) -> Iterator[tuple[bytes, int, bool]]:
    """(digest, bytes, whether it is values) of every part."""
    manifest = wanted.manifest
    for blob in (*wanted.programs.values(), *manifest.levels[: wanted.levels]):
        for digest in blob.pieces if blob.size else ():
            yield digest, math.ceil(blob.size / len(blob.pieces)), False
    kept = manifest.always_kept
    item = values.encoded_size(manifest.dtype, kept + 1, kept) - 4 * kept
    for chunk in manifest.chunks:
        if chunk.stop <= wanted.longest:
            first = max(min(chunk.stop, kept) - chunk.start, 0)
            yield chunk.digest, 4 * first + item * (chunk.stop - chunk.start - first), True


def _until(at_s: float | None, now: float) -> float | None:
    return None if at_s is None or at_s == math.inf else max(at_s - now, 0.0)
