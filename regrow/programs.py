"""The names of programs and of their files."""

from __future__ import annotations

UNITS = "units"


def program_file(name: str) -> str:
    """The file of a program in a task's build folder: `train:0` lies in train.0.onnx, `layout` in layout.json."""
    kind = name.partition(":")[0]
    return f"{name.replace(':', '.')}.{'json' if kind in ('layout', UNITS) else 'onnx'}"


def program_name(file: str) -> str:
    """The inverse of program_file."""
    return file.rpartition(".")[0].replace(".", ":")
