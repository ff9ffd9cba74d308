"""The latest updates of a fleet in one file, mapped into memory: how much of it is resident is the kernel's choice, not the fleet's size.

The file has slots, one for each array. It has no name (the log is the truth, a restart fills a new one), so nothing is left behind
whatever ends the process. It grows by blocks that are mapped beside the older ones, so growing copies nothing; a slot gets its space on
the disk before it is written, because a mapped page without space would kill the process. A slot is free again once nobody holds its
array any more: a snapshot that is being written keeps what it has seen.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError

BLOCK_BYTES = 16 * 2**20  # the first block's; later ones are as large as all before, so there are few of them
_ALIGNMENT_BYTES = 64


class _Hold(weakref.ref):  # type: ignore[type-arg]  # a weak reference to an array takes no parameter at run time in Python 3.11
    """Notices when the array of a slot is gone."""

    __slots__ = ("slot",)
    slot: int


class MappedShelf:
    """A `regrow.shelf.Shelf` in a nameless file.

    Args:
        folder: on the disk that shall hold it, writable.
        slot_bytes: the largest array that will come.

    Raises:
        LocalError: the folder cannot be written.
    """

    def __init__(self, folder: Path, slot_bytes: int) -> None:
        self._folder = folder
        self._slot_bytes = -(-max(slot_bytes, 1) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._firsts: list[int] = []
        self._blocks: list[tuple[int, mmap.mmap]] = []  # (where the block begins in the file, its mapping)
        self._file_bytes = 0
        self._free: list[int] = []
        self._holds: list[_Hold | None] = []
        self._slots = 0  # in the blocks; those from len(_holds) on were never used
        free = self._free
        self._give_back = lambda hold: free.append(hold.slot)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise self._no_room(error) from error
        weakref.finalize(self, os.close, self._descriptor)

    def __call__(self, array: NDArray[Any], /) -> NDArray[Any]:
        """The array's copy in the file, read-only.

        Raises:
            LocalError: it is larger than a slot, or the disk is full.
        """
        if array.nbytes > self._slot_bytes:
            raise LocalError(f"{self._folder}: an array of {array.nbytes} bytes for a slot of {self._slot_bytes}")
        slot = self._free.pop() if self._free else self._new_slot()
        number = bisect_right(self._firsts, slot) - 1
        start = (slot - self._firsts[number]) * self._slot_bytes
        kept = np.frombuffer(memoryview(self._blocks[number][1])[start : start + array.nbytes], array.dtype)
        kept[:] = array
        kept.flags.writeable = False
        hold = _Hold(kept, self._give_back)
        hold.slot = slot
        self._holds[slot] = hold
        return kept

    def _new_slot(self) -> int:
        slot = len(self._holds)
        try:
            if slot == self._slots:
                self._grow()
            offset = self._blocks[-1][0] + (slot - self._firsts[-1]) * self._slot_bytes
            os.posix_fallocate(self._descriptor, offset, self._slot_bytes)
        except OSError as error:
            raise self._no_room(error) from error
        self._holds.append(None)
        return slot

    def _grow(self) -> None:
        """One more block; slots have no space on the disk before their first use."""
        slots = max(BLOCK_BYTES // self._slot_bytes, 1, self._slots)
        page = mmap.ALLOCATIONGRANULARITY
        block_bytes = -(-slots * self._slot_bytes // page) * page
        os.ftruncate(self._descriptor, self._file_bytes + block_bytes)
        self._blocks.append((self._file_bytes, mmap.mmap(self._descriptor, block_bytes, offset=self._file_bytes)))
        self._firsts.append(self._slots)
        self._file_bytes += block_bytes
        self._slots += slots

    def _no_room(self, error: OSError) -> LocalError:
        return LocalError(f"{self._folder}: no place for the devices' latest updates ({error}); free space, then start the gateway again")
