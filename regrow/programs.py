"""The names of programs, of their variants and of their files."""

from __future__ import annotations

from collections.abc import Mapping

VARIANT = "~"
"""Between a program and the way it is computed: `train~convolve`, `train:0~convolve`. The same step, up to rounding (export/ways.py)."""
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
    return sorted(other.partition(VARIANT)[2] for other in programs if other.startswith(f"{name}{VARIANT}"))


def without_variants(programs: Mapping[str, bytes]) -> dict[str, bytes]:
    """Each program in its default way only."""
    return {name: program for name, program in programs.items() if VARIANT not in name}
