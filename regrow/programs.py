"""The names of programs and of their files."""

from __future__ import annotations

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
