"""From a manifest to the values that a device trains: which parts are needed, where they lie, and how they fit together.

Parts (chunks, pieces of programs and of level sets) are known by the digest of their bytes, so what a device already has, from
whichever version or before whichever reboot, is never fetched again, and nothing unchecked is ever used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regrow import indexset, topics, values, wire
from regrow.errors import LocalError, PeerError
from regrow.parameters import Layout

FILTERS_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class Shopping:
    """What one assignment needs. `parts`: digest -> topic, in the order of fetching."""

    assignment: wire.Assignment
    manifest: wire.Manifest
    longest: int
    levels: int
    parts: Mapping[bytes, str]


@dataclass(frozen=True, eq=False)
class Fetched:
    """Everything there: the programs, the layout, float32 [longest] base values and uint32 [longest] flat coordinates."""

    programs: dict[str, bytes]
    layout: Layout
    base: NDArray[np.float32]
    coordinates: NDArray[np.uint32]


def shopping(assignment: wire.Assignment, manifest: wire.Manifest, names: topics.Run) -> Shopping:
    """The parts that an assignment needs of its version.

    Raises:
        PeerError: assignment and manifest do not belong together, or the manifest contradicts itself.
    """
    if (manifest.version, manifest.epoch) != (assignment.version, assignment.epoch):
        raise PeerError(f"manifest of version {manifest.version}, epoch {manifest.epoch} for assignment {assignment.number}")
    highest = max(assignment.level, assignment.evaluate_level or 0)
    _check(manifest, highest)
    longest = manifest.lengths[highest]
    parts: dict[bytes, str] = {}
    for blob in manifest.programs:
        parts.update({digest: names.program(blob.digest, piece) for piece, digest in enumerate(blob.pieces)})
    for level, blob in enumerate(manifest.levels[: highest + 1]):
        if blob.size:
            parts.update({digest: names.order(manifest.epoch, level, piece) for piece, digest in enumerate(blob.pieces)})
    for index, chunk in enumerate(manifest.chunks):
        if chunk.stop <= longest:
            parts[chunk.digest] = names.chunk(manifest.version, index)
    return Shopping(assignment, manifest, longest, highest + 1, parts)


def _check(manifest: wire.Manifest, highest: int) -> None:
    lengths = manifest.lengths
    if highest >= len(lengths) or len(manifest.levels) != len(lengths) or sorted(lengths) != lengths:
        raise PeerError(f"manifest {manifest.version}: {len(lengths)} lengths, {len(manifest.levels)} level sets, level {highest}")
    if manifest.dtype == "int8" or not manifest.always_kept <= lengths[0]:
        raise PeerError(f"manifest {manifest.version}: {manifest.dtype} values, {manifest.always_kept} of {lengths[0]} always kept")
    stops = [0, *(chunk.stop for chunk in manifest.chunks)]
    if [chunk.start for chunk in manifest.chunks] != stops[:-1] or stops != sorted(set(stops)) or stops[-1] != lengths[-1]:
        raise PeerError(f"manifest {manifest.version}: the chunks do not cover the model once")
    if not set(lengths) <= set(stops):
        raise PeerError(f"manifest {manifest.version}: a chunk crosses a level")


def assemble(wanted: Shopping, parts: Mapping[bytes, bytes]) -> Fetched:
    """Put the parts together.

    Raises:
        PeerError: they are not what the manifest says, whoever made them.
    """
    manifest = wanted.manifest
    programs = {blob.name: _whole(blob, parts) for blob in manifest.programs}
    if "layout" not in programs:
        raise PeerError(f"manifest {manifest.version}: no program named 'layout'")
    layout = Layout.from_json(programs["layout"])
    always_kept = layout.always_kept_coordinates
    if layout.size != manifest.lengths[-1] or always_kept.size != manifest.always_kept:
        raise PeerError(f"manifest {manifest.version}: {manifest.lengths[-1]} positions, the layout has {layout.size}")
    sets = [_whole(blob, parts) if blob.size else b"" for blob in manifest.levels[: wanted.levels]]
    coordinates = indexset.decode_prefix(layout.size, always_kept, manifest.lengths, sets)
    data = b"".join(parts[chunk.digest] for chunk in manifest.chunks if chunk.stop <= wanted.longest)
    try:
        base = values.decode(data, manifest.dtype, wanted.longest, manifest.always_kept)
    except LocalError as error:  # an impossible dtype or length came from the manifest, not from us
        raise PeerError(f"manifest {manifest.version}: {error}") from error
    return Fetched(programs, layout, base, coordinates)


def _whole(blob: wire.Blob, parts: Mapping[bytes, bytes]) -> bytes:
    data = b"".join(parts[digest] for digest in blob.pieces)
    if len(data) != blob.size or wire.digest(data) != blob.digest:
        raise PeerError(f"{blob.name}: the pieces do not make the whole that the manifest names")
    return data
