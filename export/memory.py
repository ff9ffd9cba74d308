"""How much memory a training job takes on the device: arithmetic over its programs, meant as an upper bound.

A job scores the model and trains it, each with a session of its own, whose memory onnxruntime keeps. Counted are, for both, what is alive
when most is (activations, gradients, new parameters), with a factor for how onnxruntime hands memory out; the vectors that the worker holds
around them; and what onnxruntime itself takes. `python bench/step_memory.py` measures how far above the truth this is. The sum over all
values, nothing used again, would be simpler, but for deep models it is three to six times what is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
from onnx import helper

from export.programs import BATCH
from regrow.programs import VARIANT, offers_float16, stored_as
from regrow.step_memory import JobBytes, StepMemory

SESSIONS_BYTES = 16_000_000
"""The agent's first sessions: onnxruntime's own heap and code, of which a small model's job consists (measured: 11 to 14 MB)."""
ARENA = 2.5
"""Its arena holds the first run's values one by one, those of later runs in one planned block (measured: up to 2.3 times what is alive)."""
WORKER_VECTORS = 5
"""float32 [n] around a step: the job's own, what the program reads, what the step before gave, the flat result and its gathering."""
MASK_VECTORS = 3
"""float32 [n] more with masks, at most: as the programs take them, as they are cut from, and as bool."""
STATE_COPIES = 2
"""Of the optimizer's state, what the step before gave and what the program reads, beside what it makes; as much for the FedProx anchor."""
CONSTANT_COPIES = 2
"""Of what a program holds itself, such as layers that are not trained: in its bytes and in its session."""

Values = dict[str, int]


class UnknownShapeError(Exception):
    """The shape of this value is only known at run time."""


def step_memory(programs: Mapping[str, bytes]) -> StepMemory:
    """The figures of a model's programs: of every level with programs of its own, the full model last; else of the full one with masks.

    Where the shape of some value does not follow from the batch, there are no figures, and memory binds nobody.
    """
    try:
        levels = _levels(stored_as(programs, "float32"))
        return StepMemory(levels, _levels(stored_as(programs, "float16")) if offers_float16(programs) else [])
    except UnknownShapeError:
        return StepMemory([])


def _levels(programs: Mapping[str, bytes]) -> list[JobBytes]:
    small = sum(name.startswith("layout:") for name in programs)
    found = [(programs[f"train:{level}"], programs[f"evaluate:{level}"], programs.get(f"statistics:{level}")) for level in range(small)]
    found.append((programs.get("train_masked", programs["train"]), programs["evaluate"], programs.get("statistics")))
    return [_job_bytes(*of_level) for of_level in found]


def lean_variants(programs: Mapping[str, bytes]) -> dict[str, bytes]:
    """The programs without those variants that take more memory than their default, by which devices are taken in; unknown is more."""
    return {name: program for name, program in programs.items() if VARIANT not in name or _is_lean(programs, name)}


def _is_lean(programs: Mapping[str, bytes], name: str) -> bool:
    try:
        sizes = [most_alive(onnx.ModelProto.FromString(programs[each])) for each in (name, name.partition(VARIANT)[0])]
    except UnknownShapeError:
        return False
    (fixed, trained), (default_fixed, default_trained) = sizes
    return trained <= default_trained and fixed + trained <= default_fixed + default_trained  # whatever the batch


def _job_bytes(train: bytes, evaluate: bytes, statistics: bytes | None) -> JobBytes:
    model = onnx.ModelProto.FromString(train)
    made = {name: size for name, size in _bytes_of(model, 1).items() if name.startswith("new:")}
    state = sum(size for name, size in made.items() if name.startswith("new:state:"))
    parameters = sum(made.values()) - state
    inputs = [value.name for value in model.graph.input]
    masked = any(name.startswith("mask:") for name in inputs)
    anchored = any(name.startswith("anchor:") for name in inputs)
    vectors = (WORKER_VECTORS + MASK_VECTORS * masked) * parameters + STATE_COPIES * (state + anchored * parameters)
    fixed, trained = most_alive(model)
    scoring = onnx.ModelProto.FromString(evaluate)
    also, scored = most_alive(scoring)
    programs = [model, scoring]
    if statistics is not None:  # a third session, with batches of the size that is trained
        programs.append(onnx.ModelProto.FromString(statistics))
        once, more = most_alive(programs[-1])
        fixed, trained = fixed + once, trained + more
    vectors += CONSTANT_COPIES * sum(len(tensor.raw_data) for each in programs for tensor in each.graph.initializer)
    return JobBytes(SESSIONS_BYTES + vectors + math.ceil(ARENA * (fixed + also)), math.ceil(ARENA * trained), math.ceil(ARENA * scored))


def most_alive(model: onnx.ModelProto) -> tuple[int, int]:
    """(a, b) so that a + b * batch bytes bound what is alive at any time, the program's inputs not counted.

    The two are the most over the steps, each for itself, so their sum is at least the most of the sum.
    """
    fixed, each = fixed_and_each(model)
    return _peak(model, fixed), _peak(model, each)


def fixed_and_each(model: onnx.ModelProto) -> tuple[Values, Values]:
    """Bytes of every value that a node makes: whatever the batch, and for each example.

    Raises:
        UnknownShapeError: the shape of some value does not follow from the batch.
    """
    one, two = _bytes_of(model, 1), _bytes_of(model, 2)
    each = {name: two[name] - one[name] for name in one}
    return {name: one[name] - each[name] for name in one}, each


def _peak(model: onnx.ModelProto, sizes: Values) -> int:
    """The most bytes that are alive at once: from the node that makes a value to the last that reads it, outputs to the end."""
    last = {name: number for number, node in enumerate(model.graph.node) for name in node.input}
    last |= {value.name: len(model.graph.node) for value in model.graph.output}
    made: set[str] = set()
    alive = most = 0
    for number, node in enumerate(model.graph.node):
        alive += sum(sizes[name] for name in node.output if name)
        made.update(node.output)
        most = max(most, alive)
        ended = {name for name in (*node.input, *node.output) if name in made and last.get(name, number) <= number}
        alive -= sum(sizes[name] for name in ended if name)
    return most


def _bytes_of(model: onnx.ModelProto, batch: int) -> Values:
    """Bytes of every value that a node makes, at this batch."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == BATCH:
                dim.dim_value = batch
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    known = {value.name: value for value in (*graph.value_info, *graph.output)}
    return {name: _bytes(known.get(name), name) for node in graph.node for name in node.output if name}


def _bytes(value: onnx.ValueInfoProto | None, name: str) -> int:
    dims = value.type.tensor_type.shape.dim if value is not None else ()
    if value is None or not value.type.tensor_type.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
        raise UnknownShapeError(name)
    item_bytes: int = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
    return item_bytes * math.prod(int(dim.dim_value) for dim in dims)
