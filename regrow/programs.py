"""The names of programs, of their variants and of their files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, TypeVar

VARIANT = "~"
"""Between a program and the way it is computed: `train~convolve`, `train:0~convolve`. The same step, up to rounding (export/ways.py)."""
FLOAT16 = "float16"
"""The variant that stores activations as float16 (export/storage.py). It is slower, so it never races: memory decides."""
IN_ORDER = "regrow.in_order"
"""A key of a program's metadata: its nodes should run as they stand, which takes the least memory."""
TRAINING = ("train", "train_masked")
UNITS = "units"
MEMORY = "memory"
"""Not a program: what jobs take (step_memory). It stays with the coordinator, and build.json, which names a build, leaves it out."""


def program_file(name: str) -> str:
    """The file of a program in a task's build folder: `train:0` lies in train.0.onnx, `layout` in layout.json."""
    kind = name.partition(":")[0]
    return f"{name.replace(':', '.')}.{'json' if kind in ('layout', UNITS, MEMORY) else 'onnx'}"


def program_name(file: str) -> str:
    """The inverse of program_file."""
    return file.rpartition(".")[0].replace(".", ":")


def variant(name: str, way: str) -> str:
    """The name of a program computed in another way."""
    return f"{name}{VARIANT}{way}"


def ways_of(programs: Mapping[str, bytes], name: str) -> list[str]:
    """The other ways that a program is there in, sorted."""
    found = (other.partition(VARIANT)[2] for other in programs if other.startswith(f"{name}{VARIANT}"))
    return sorted(way for way in found if way != FLOAT16)


def without_variants(programs: Mapping[str, bytes]) -> dict[str, bytes]:
    """Each program in its default way only."""
    return {name: program for name, program in programs.items() if VARIANT not in name}


Storage = Literal["float32", "float16"]
"""Of activations, between the two passes of a training step."""
StorageRule = Literal["float32", "float16", "auto"]
"""What a device's owner asks for; "auto": float16 where float32 does not fit."""
_T = TypeVar("_T")


def offers_float16(names: Collection[str]) -> bool:
    """Whether there is a program that stores activations as float16."""
    return any(name.endswith(variant("", FLOAT16)) for name in names)


def stored_as(programs: Mapping[str, _T], storage: Storage) -> dict[str, _T]:
    """The programs of one storage, by the names that they are run by; those without float16 stay as they are, with all their ways."""
    ending = variant("", FLOAT16)
    if storage == "float32":
        return {name: program for name, program in programs.items() if not name.endswith(ending)}
    half = {name.removesuffix(ending): program for name, program in programs.items() if name.endswith(ending)}
    return {name: program for name, program in programs.items() if name.partition(VARIANT)[0] not in half} | half
