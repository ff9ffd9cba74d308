"""How much memory a device's training job takes, by level: the exporter's figures (export/memory.py), and the largest level that fits.

Only the coordinator reads them, from the task's build. Where programs with float16 storage are published too, the manifest says what
float32 takes at each level, so that both sides choose alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated

import msgspec

from regrow.errors import LocalError
from regrow.levels import densities_of
from regrow.programs import MEMORY, Storage, StorageRule
from regrow.task import Task

SCORED_AT_ONCE = 256
"""Examples of a forward pass when a device scores the model on its validation data."""

_Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class JobBytes(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the job of one model takes: whatever the batch, for each example of a training step, and for each scored at once."""

    fixed: _Bytes
    trained: _Bytes
    scored: _Bytes


class StepMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`levels`: one entry for each level of whole units; a single one where every level trains the full model, with masks or without.

    None at all where the exporter could not tell; then memory binds nobody. `float16`: the same with float16 storage, where that is there.
    """

    levels: Annotated[list[JobBytes], msgspec.Meta(max_length=256)]
    float16: Annotated[list[JobBytes], msgspec.Meta(max_length=256)] = []

    def to_json(self) -> bytes:
        return msgspec.json.encode(self) + b"\n"

    @staticmethod
    def from_json(data: bytes) -> StepMemory:
        """The inverse of to_json.

        Raises:
            LocalError: these bytes are not that.
        """
        try:
            return msgspec.json.decode(data, type=StepMemory)
        except msgspec.DecodeError as error:
            raise LocalError(f"memory.json: {error}; run `regrow task build`") from error


def memory_of(programs: Mapping[str, bytes], task: Task) -> StepMemory:
    """What the build of a task says; builds of earlier versions say nothing.

    Raises:
        LocalError: it is malformed, or of another number of levels.
    """
    memory = StepMemory.from_json(programs[MEMORY]) if MEMORY in programs else StepMemory([])
    least_bytes(memory, task, "auto")
    return memory


def needs_bytes(memory: StepMemory, task: Task, storage: Storage = "float32") -> tuple[int, ...]:
    """What a round takes at every level, bytes.

    Scoring counts with all that is scored at once: a device's validation data may grow after it has said how many they are.
    Ordered dropout draws among all widths up to the device's, and the program of each keeps its memory.

    Raises:
        LocalError: the figures are those of another number of levels.
    """
    count = len(densities_of(task))
    found = memory.float16 if storage == "float16" and memory.float16 else memory.levels
    levels = (found or [JobBytes(0, 0, 0)]) * (count if len(found) <= 1 else 1)
    if len(levels) != count:
        raise LocalError(f"memory.json is of {len(levels)} levels, the task has {count}; run `regrow task build`")
    needs = tuple(each.fixed + each.trained * task.training.batch + each.scored * SCORED_AT_ONCE for each in levels)
    return tuple(accumulate(needs)) if task.method.local == "ordered_dropout" and len(found) > 1 else needs


def least_bytes(memory: StepMemory, task: Task, rule: StorageRule) -> tuple[int, ...]:
    """What a round takes at every level on a device whose owner has this rule, in whichever storage it then takes less."""
    storages: tuple[Storage, ...] = ("float32", "float16") if rule == "auto" else (rule,)
    return tuple(map(min, zip(*(needs_bytes(memory, task, storage) for storage in storages), strict=True)))


def chosen_storage(rule: StorageRule, float32_bytes: int, memory_bytes: int | None) -> Storage:
    """What a device stores activations as: float16 where its owner wants that, or allows it and float32 does not fit."""
    if rule != "auto":
        return rule
    return "float16" if memory_bytes is not None and float32_bytes > memory_bytes else "float32"


def largest_density(needs: Sequence[int], densities: Sequence[float], memory_bytes: int) -> float:
    """The largest of the levels' densities whose need fits, 0.0 where none does.

    Args:
        needs: bytes of every level.
        densities: of these levels, ascending.
        memory_bytes: that the device can spare.
    """
    return max((density for need, density in zip(needs, densities, strict=True) if need <= memory_bytes), default=0.0)
