"""From a manifest to the values that a device trains: which parts are needed, where they lie, and how they fit together.

Parts (chunks, pieces of programs and of level sets) are known by the digest of their bytes, so what a device already has, from
whichever version or before whichever reboot, is never fetched again, and nothing unchecked is ever used. `Fetching` is how far it has come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from regrow import indexset, topics, values, wire
from regrow.errors import LocalError, PeerError
from regrow.machine import Drop, Effect, Note, Save, Unsubscribe
from regrow.parameters import Layout
from regrow.presence import Identity
from regrow.programs import Storage, StorageRule, offers_float16, stored_as
from regrow.publication import version_of
from regrow.step_memory import chosen_storage

FILTERS_AT_ONCE = 16
PATIENCE_S = 60.0
PART = "part-"


@dataclass(frozen=True, eq=False)
class Shopping:
    """What one assignment needs. `programs`: by the names that they are run by; `parts`: digest -> topic, in the order of fetching."""

    assignment: wire.Assignment
    manifest: wire.Manifest
    longest: int
    levels: int
    storage: Storage
    programs: Mapping[str, wire.Blob]
    parts: Mapping[bytes, str]


@dataclass(frozen=True, eq=False)
class Fetched:
    """Everything there: the programs, the layout, float32 [longest] base values and uint32 [longest] flat coordinates."""

    wanted: Shopping
    programs: dict[str, bytes]
    layout: Layout
    base: NDArray[np.float32]
    coordinates: NDArray[np.uint32]
    known: Known


@dataclass(frozen=True, eq=False)
class Known:
    """A layout and the coordinates of a prefix, with the digests and lengths that they were decoded from.

    An order lasts for many versions, so a device needs the same ones round after round. Memory: 4 bytes for each coordinate.
    """

    layout_digest: bytes
    lengths: tuple[int, ...]
    sets: tuple[bytes, ...]
    layout: Layout
    coordinates: NDArray[np.uint32]

    def begins_with(self, layout_digest: bytes, lengths: tuple[int, ...], sets: tuple[bytes, ...]) -> bool:
        """Whether these levels, whose sets have these digests, are the first of this prefix."""
        levels = len(lengths)
        return (self.layout_digest, self.lengths[:levels], self.sets[:levels]) == (layout_digest, lengths, sets)


def shopping(
    assignment: wire.Assignment,
    manifest: wire.Manifest,
    names: topics.Run,
    rule: StorageRule = "float32",
    memory_bytes: int | None = None,
) -> Shopping:
    """The parts that an assignment needs of its version; of programs only those with the storage that this device trains in.

    Args:
        rule: the owner's, for the storage of activations.
        memory_bytes: that a training job may take here; None: as much as it wants.

    Raises:
        PeerError: assignment and manifest do not belong together, or the manifest contradicts itself.
    """
    if (manifest.version, manifest.epoch) != (assignment.version, assignment.epoch):
        raise PeerError(f"manifest of version {manifest.version}, epoch {manifest.epoch} for assignment {assignment.number}")
    highest = max(assignment.level, assignment.evaluate_level or 0)
    _check(manifest, highest)
    if manifest.local == "personal_masks":  # the mask is the device's own, so it fetches the whole model; the paper sends its part
        highest = len(manifest.lengths) - 1
    longest = manifest.lengths[highest]
    parts: dict[bytes, str] = {}
    float32_bytes = manifest.float32_bytes[assignment.level] if manifest.float32_bytes else 0
    offered = {blob.name: blob for blob in manifest.programs}
    storage = chosen_storage(rule, float32_bytes, memory_bytes) if offers_float16(offered) else "float32"
    programs = stored_as(offered, storage)
    for blob in programs.values():
        parts.update({digest: names.program(blob.digest, piece) for piece, digest in enumerate(blob.pieces)})
    for level, blob in enumerate(manifest.levels[: highest + 1]):
        if blob.size:
            parts.update({digest: names.order(manifest.epoch, level, piece) for piece, digest in enumerate(blob.pieces)})
    for index, chunk in enumerate(manifest.chunks):
        if chunk.stop <= longest:
            parts[chunk.digest] = names.chunk(manifest.version, index)
    return Shopping(assignment, manifest, longest, highest + 1, storage, programs, parts)


def _check(manifest: wire.Manifest, highest: int) -> None:
    lengths = manifest.lengths
    if highest >= len(lengths) or len(manifest.levels) != len(lengths) or sorted(lengths) != lengths:
        raise PeerError(f"manifest {manifest.version}: {len(lengths)} lengths, {len(manifest.levels)} level sets, level {highest}")
    if len(manifest.float32_bytes) not in (0, len(lengths)):
        raise PeerError(f"manifest {manifest.version}: {len(lengths)} levels, memory of {len(manifest.float32_bytes)}")
    if manifest.dtype in values.DELTA_DTYPES or not manifest.always_kept <= lengths[0]:
        raise PeerError(f"manifest {manifest.version}: {manifest.dtype} values, {manifest.always_kept} of {lengths[0]} always kept")
    stops = [0, *(chunk.stop for chunk in manifest.chunks)]
    if [chunk.start for chunk in manifest.chunks] != stops[:-1] or stops != sorted(set(stops)) or stops[-1] != lengths[-1]:
        raise PeerError(f"manifest {manifest.version}: the chunks do not cover the model once")
    if not set(lengths) <= set(stops):
        raise PeerError(f"manifest {manifest.version}: a chunk crosses a level")


def assemble(wanted: Shopping, parts: Mapping[bytes, bytes], known: Known | None = None) -> Fetched:
    """Put the parts together.

    Args:
        wanted: the parts, and what they make.
        parts: digest -> bytes of that digest.
        known: what the assembly before has decoded; it is not decoded again where the manifest names the same bytes.

    Raises:
        PeerError: they are not what the manifest says, whoever made them.
    """
    manifest = wanted.manifest
    programs = {name: _whole(blob, parts) for name, blob in wanted.programs.items()}
    if "layout" not in programs:
        raise PeerError(f"manifest {manifest.version}: no program named 'layout'")
    known = _decoded(wanted, programs["layout"], parts, known)
    data = b"".join(parts[chunk.digest] for chunk in manifest.chunks if chunk.stop <= wanted.longest)
    try:
        base = values.decode(data, manifest.dtype, wanted.longest, manifest.always_kept)
    except LocalError as error:  # an impossible dtype or length came from the manifest, not from us
        raise PeerError(f"manifest {manifest.version}: {error}") from error
    return Fetched(wanted, programs, known.layout, base, known.coordinates[: wanted.longest], known)


def _decoded(wanted: Shopping, program: bytes, parts: Mapping[bytes, bytes], known: Known | None) -> Known:
    """The layout and the coordinates of at least the wanted levels."""
    manifest = wanted.manifest
    blobs = manifest.levels[: wanted.levels]
    sets = [_whole(blob, parts) if blob.size else b"" for blob in blobs]
    lengths = tuple(manifest.lengths[: wanted.levels])
    layout_digest, digests = wire.digest(program), tuple(blob.digest if blob.size else b"" for blob in blobs)
    again = known is not None and known.begins_with(layout_digest, lengths, digests)
    layout = known.layout if known is not None and again else Layout.from_json(program)
    always_kept = layout.always_kept_coordinates
    if layout.size != manifest.lengths[-1] or always_kept.size != manifest.always_kept:
        raise PeerError(f"manifest {manifest.version}: {manifest.lengths[-1]} positions, the layout has {layout.size}")
    if known is not None and again:
        return known
    coordinates = indexset.decode_prefix(layout.size, always_kept, manifest.lengths, sets)
    coordinates.setflags(write=False)
    return Known(layout_digest, lengths, digests, layout, coordinates)


def _whole(blob: wire.Blob, parts: Mapping[bytes, bytes]) -> bytes:
    """A single piece is known by its digest already; only the joint of several has one that nobody has looked at yet."""
    data = parts[blob.pieces[0]] if len(blob.pieces) == 1 else b"".join(parts[digest] for digest in blob.pieces)
    digest = blob.pieces[0] if len(blob.pieces) == 1 else wire.digest(data)
    if len(data) != blob.size or digest != blob.digest:
        raise PeerError(f"{blob.name}: the pieces do not make the whole that the manifest names")
    return data


@dataclass(slots=True)
class Fetching:
    """What a device has, what it wants, and what it waits for at the moment.

    Args:
        parts: digest -> bytes, all that is here.
        wanted: None until the manifest has come.
        subscribed: topics that are asked for now.
        progress_s: when something last came, monotonic seconds.
        known: what the last assembly has decoded.
        storage: of activations, in the job before; None before the first.
    """

    parts: dict[bytes, bytes] = field(default_factory=dict)
    wanted: Shopping | None = None
    subscribed: set[str] = field(default_factory=set)
    progress_s: float = 0.0
    known: Known | None = None
    storage: Storage | None = None

    def load(self, saved: Mapping[str, bytes]) -> list[Effect]:
        """Take in the saved parts; those whose digest is not that of their name are dropped."""
        drops: list[Effect] = []
        for name, data in saved.items():
            digest = wire.digest(data)
            if name == PART + digest.hex():
                self.parts[digest] = data
            elif name.startswith(PART):
                drops.append(Drop(name))
        return drops

    def lacking(self) -> list[str]:
        """Topics of the wanted parts that are not here."""
        wanted = self.wanted.parts if self.wanted is not None else {}
        return [topic for digest, topic in wanted.items() if digest not in self.parts]

    def ask(self, manifest_topic: str, connected: bool) -> tuple[str, ...]:
        """What to subscribe to next, some filters at a time: the manifest, then what is lacking; nothing when all is here.

        Without a connection nothing is asked for, and the next connect must ask again.
        """
        topics_wanted = [manifest_topic] if self.wanted is None else self.lacking()
        asked = tuple(topics_wanted[:FILTERS_AT_ONCE])
        self.subscribed = set(asked) if connected else set()
        return asked

    def begin(self, connected: bool, now: float) -> list[Effect]:
        """Another assignment: its manifest comes first."""
        self.wanted, self.progress_s = None, now
        return self.stop(connected)

    def stop(self, connected: bool) -> list[Effect]:
        """Ask for nothing any more; without a connection the broker has forgotten it already."""
        asked, self.subscribed = tuple(sorted(self.subscribed)), set()
        return [Unsubscribe(asked)] if asked and connected else []

    def plan(self, assignment: wire.Assignment, manifest: wire.Manifest, names: topics.Run, now: float, me: Identity) -> list[Effect]:
        """The manifest has come: want what the assignment needs, and let go of the parts that it has no use for.

        Raises:
            PeerError: as shopping.
        """
        self.wanted = shopping(assignment, manifest, names, me.storage, me.memory_bytes)
        counts = {"parts": len(self.wanted.parts), "lacking": len(self.lacking())}
        unwanted = [digest for digest in self.parts if digest not in self.wanted.parts]
        for digest in unwanted:
            del self.parts[digest]
        return [
            Note("fetching", {"number": assignment.number, "version": version_of(manifest.version), **counts}),
            self._got(names.manifest(manifest.version), now),
            *(Drop(PART + digest.hex()) for digest in unwanted),
            *self._storage_told(me),
        ]

    def _storage_told(self, me: Identity) -> list[Effect]:
        """What activations are stored as from now on, with the first job and where it is another than before, and why."""
        if self.wanted is None or self.wanted.storage == self.storage:
            return []
        self.storage = self.wanted.storage
        needed = self.wanted.manifest.float32_bytes[self.wanted.assignment.level : self.wanted.assignment.level + 1]
        fields = {"activations": self.storage, "rule": me.storage, "memory_bytes": me.memory_bytes}
        return [Note("storage", fields | {"float32_needs_bytes": needed[0] if needed else None})]

    def _got(self, topic: str, now: float) -> Unsubscribe:
        self.progress_s = now
        self.subscribed.discard(topic)
        return Unsubscribe((topic,))

    def take(self, topic: str, data: bytes, now: float) -> list[Effect]:
        """Keep a part that was asked for.

        Raises:
            PeerError: these bytes are not the ones that the manifest names.
        """
        digest = wire.digest(data)
        if self.wanted is None or self.wanted.parts.get(digest) != topic:
            raise PeerError(f"{topic}: {len(data)} bytes that the manifest does not name")
        self.parts[digest] = data
        return [Save(PART + digest.hex(), data), self._got(topic, now)]

    def assemble(self, wanted: Shopping) -> Fetched:
        """Put these parts together, which are all here, and remember what was decoded; errors as the function of this name."""
        fetched = assemble(wanted, self.parts, self.known)
        self.known = fetched.known
        return fetched

    def stalled(self, now: float) -> bool:
        return now - self.progress_s > PATIENCE_S
