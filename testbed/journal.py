"""What an unfinished simulated run has already trained and scored, so that a resumed one need not do it again.

Training is what a run's time goes into, and the rest of it is deterministic. So nothing of a run's state is saved: a resumed run starts at
virtual time 0 and takes each result from here, until there is none left. A result lies under a key that is the digest of everything it
depends on (journal keys below); what does not fit is never found, so an old journal costs time at worst.

File: MAGIC, then entries of
    key 16 bytes | header length u32 | payload length u64 | header (MessagePack) | payload (float32, little-endian) | checksum 16 bytes
The checksum, BLAKE2b, covers the rest of its entry. Entries are appended and handed to the system at once: a process that is killed loses
the entry that it was writing.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from regrow.local_training import Score
from regrow.machine import Train, Trained, TrainingFailed
from testbed.waves import Jobs, Result

MAGIC = b"regrow journal 1\n"
Wave = Callable[[Jobs], Sequence[Result]]
_FRAME = struct.Struct("<16sIQ")
_CHECKSUM_BYTES = 16
_log = logging.getLogger(__name__)


def digest(*parts: bytes | str | NDArray[np.generic]) -> bytes:
    """16 bytes that stand for these parts, each with its length, dtype and shape."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            data: bytes | memoryview = np.ascontiguousarray(part).data.cast("B") if part.size else b""
            kind = f"{part.dtype.str}{list(part.shape)}"
        else:
            data = part.encode() if isinstance(part, str) else part
            kind = f"bytes{len(data)}"
        hasher.update(f"{kind};".encode())
        hasher.update(data)
    return hasher.digest()


class Journal:
    """Results by key, in one file that is appended to.

    Args:
        path: of the file; its folder exists.
        limit_bytes: the file grows no further than this, which is logged once; what is in it stays of use.
        resume: take over what is there; without, it is thrown away.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, limit_bytes: int, resume: bool) -> None:
        self.path, self._limit_bytes, self._full = path, limit_bytes, False
        if not resume:
            path.unlink(missing_ok=True)
        self._places: dict[bytes, int] = {}
        self._told = False
        self._end = len(MAGIC)
        self._file: BinaryIO | None = None  # made with the first entry: a run that cannot begin leaves none
        if path.exists():
            self._file = path.open("r+b")
            self._scan(self._file)
        self._unused = set(self._places)

    @property
    def replaying(self) -> bool:
        """Whether results are still taken from before the interruption."""
        return bool(self._unused) and not self._told

    def recall(self, key: bytes) -> tuple[bytes, bytes] | None:
        """(header, payload) of an entry from before the interruption, or None."""
        place = self._places.get(key)
        entry = None if place is None or self._file is None else _read(self._file, place)
        if entry is not None:
            self._unused.discard(key)
        elif self._unused and not self._told:
            self._told = True
            if len(self._unused) == len(self._places):
                _log.warning("%s is of other data or code: starting over", self.path)
                self._start_over()
            else:
                _log.warning("%s: %d results do not fit (other data or code); training on", self.path, len(self._unused))
        return entry

    def append(self, key: bytes, header: bytes, payload: bytes | memoryview = b"") -> None:
        """Keep a result, unless the file is full."""
        size = _FRAME.size + len(header) + len(payload) + _CHECKSUM_BYTES
        if self._full or self._end + size > self._limit_bytes:
            self._fill("it has reached its limit (--journal-gb)")
            return
        frame = _FRAME.pack(key, len(header), len(payload))
        try:
            if self._file is None:
                self._file = self.path.open("w+b")
                self._file.write(MAGIC)
            self._file.seek(self._end)
            for part in (frame, header, payload, _checksum(frame, header, payload)):
                self._file.write(part)
            self._file.flush()
        except OSError as error:
            self._fill(str(error))
            return
        self._end += size

    def close(self) -> None:
        """The file stays, for the next process."""
        if self._file is not None:
            self._file.close()

    def delete(self) -> None:
        """Nobody needs it any more."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _fill(self, why: str) -> None:
        if not self._full:
            self._full = True
            _log.warning("%s grows no further: %s. The run goes on; --resume would repeat what is trained from here", self.path, why)

    def _start_over(self) -> None:
        self.close()
        self._file, self._end = None, len(MAGIC)
        self._places, self._unused = {}, set()

    def _scan(self, file: BinaryIO) -> None:
        """Find every whole entry, and cut off what follows them."""
        size = file.seek(0, 2)
        file.seek(0)
        if file.read(len(MAGIC)) != MAGIC:
            _log.warning("%s is no journal of this version: starting over", self.path)
            self._start_over()
            return
        while len(frame := file.read(_FRAME.size)) == _FRAME.size:
            key, header_bytes, payload_bytes = _FRAME.unpack(frame)
            following = self._end + _FRAME.size + header_bytes + payload_bytes + _CHECKSUM_BYTES
            if following > size:
                break
            self._places[key] = self._end
            self._end = file.seek(following)
        file.truncate(self._end)


def _read(file: BinaryIO, place: int) -> tuple[bytes, bytes] | None:
    """(header, payload) of the entry at `place`, or None where it was altered."""
    file.seek(place)
    frame = file.read(_FRAME.size)
    _, header_bytes, payload_bytes = _FRAME.unpack(frame)
    header, payload = file.read(header_bytes), file.read(payload_bytes)
    return (header, payload) if file.read(_CHECKSUM_BYTES) == _checksum(frame, header, payload) else None


def _checksum(*parts: bytes | memoryview) -> bytes:
    hasher = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


# ---- what is kept --------------------------------------------------------------------------------------------------------------------


class _Result(msgspec.Struct, array_like=True):
    """Of a training call; `failed` is the reason, with which nothing else is told."""

    number: int
    examples: int = 0
    loss: float = 0.0
    scores: tuple[tuple[int, float, float, int], ...] = ()
    failed: str | None = None


def remembered(train: Wave, journal: Journal, contexts: dict[str, bytes]) -> Wave:
    """The same training of several jobs, not done again for what the journal holds.

    Args:
        contexts: for each device, the digest of what its results depend on beside the job: its data, the programs, the code.
    """

    def run(jobs: Jobs) -> list[Result]:
        keys = [_job_key(contexts[name], name, job) for name, job in jobs]
        found = [journal.recall(key) for key in keys]
        known = [_result(*entry) for entry in found if entry is not None]
        if len(known) == len(jobs):
            return known
        results = list(train(jobs))  # all of them: who is trained together decides how sums are rounded
        for key, entry, result in zip(keys, found, results, strict=True):
            if entry is None:
                journal.append(key, *_entry(result))
        return results

    return run


def _entry(result: Result) -> tuple[bytes, bytes]:
    if isinstance(result, Trained):
        head = _Result(result.number, result.examples, result.loss, result.scores)
        return msgspec.msgpack.encode(head), np.ascontiguousarray(result.values, "<f4").tobytes()
    return msgspec.msgpack.encode(_Result(result.number, failed=result.reason)), b""


def _job_key(context: bytes, name: str, job: Train) -> bytes:
    """The digest of everything that the result of this job depends on; its programs are in the context."""
    numbers = (job.number, job.level, job.length, sorted(job.evaluate.items()), job.steps, job.batch, job.learning_rate, job.seed)
    mask = np.empty(0, np.bool_) if job.kept is None else job.kept
    return digest("train", context, name, repr((numbers, sorted(job.widths.items()))), job.values, job.coordinates, mask)


def _result(header: bytes, payload: bytes) -> Result:
    head = msgspec.msgpack.decode(header, type=_Result)
    if head.failed is not None:
        return TrainingFailed(head.number, head.failed)
    values = np.frombuffer(payload, "<f4").astype(np.float32)
    return Trained(head.number, values, head.examples, head.loss, 0.0, head.scores)


def remembered_score(
    evaluate: Callable[[NDArray[np.float32]], Score], journal: Journal, context: bytes
) -> Callable[[NDArray[np.float32]], Score]:
    """The same scoring of a float32 vector of parameters, not done again; context: of its data, the program and the code."""

    def run(vector: NDArray[np.float32]) -> Score:
        key = digest("score", context, vector)
        known = journal.recall(key)
        if known is not None:
            return Score(*msgspec.msgpack.decode(known[0], type=tuple[float, float, int]))
        score = evaluate(vector)
        journal.append(key, msgspec.msgpack.encode((score.loss, score.accuracy, score.examples)))
        return score

    return run
