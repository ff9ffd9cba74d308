"""Training programs that keep what the backward pass needs as float16, for devices whose memory does not hold the plain ones.

Only storage changes. An activation is cast down behind its last use in the forward pass, and up again where the backward pass first needs
it; arithmetic, weights, gradients and everything without a batch axis (statistics of a batch normalisation, say) stay float32. What
compares activations (is this the maximum, was this clipped?) is computed in the forward pass, from exact values, and kept as bool.

It saves memory only if the nodes run as they stand, which onnxruntime does if asked to: the metadata says so (regrow.programs.IN_ORDER),
and each parameter's update stands directly behind its gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.memory import UnknownShapeError, fixed_and_each, most_alive
from regrow.programs import FLOAT16, IN_ORDER, TRAINING, VARIANT, variant

LARGEST = 65504.0
"""Of float16. A Cast makes anything beyond 65520 inf, and inf times a gradient of 0 is NaN: what may be larger is clipped first."""
LEAST_BYTES = 4096
"""Of a value for each example; below, two more nodes cost more than they save."""
USUAL_BATCH = 20
LEAST_SAVING = 0.25
"""Of what is alive in a step of that many examples. Onnxruntime's arena makes less of it, and nothing of a tenth (bench/storage.py)."""

_BOUNDED = frozenset({"Sigmoid", "HardSigmoid", "Tanh", "Softmax", "Softsign", "Erf", "LSTM", "GRU"})
"""Ops whose output is at most 1, the cell of an LSTM at most the number of steps."""
_PASSING = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "AveragePool", "GlobalAveragePool"})
"""Ops whose output is within the bounds of their input."""

Nodes = list[onnx.NodeProto]


def float16_programs(programs: Mapping[str, bytes]) -> dict[str, bytes]:
    """`train~float16` and the like of every training program that takes clearly less memory so."""
    found = {}
    for name, program in programs.items():
        if name.partition(":")[0] in TRAINING and VARIANT not in name:
            half = stored_as_float16(program)
            if half is not None and _saving(program, half) >= LEAST_SAVING:
                found[variant(name, FLOAT16)] = half
    return found


def stored_as_float16(program: bytes, *, least_bytes: int = LEAST_BYTES, saturated: bool = True) -> bytes | None:
    """The same training step with large activations kept as float16 between the passes; None if the shape of some value is not known.

    Args:
        program: of export.programs, in a default way.
        least_bytes: of a value for each example, to be large.
        saturated: values beyond float16 are stored as its largest, not as inf.
    """
    model = onnx.ModelProto.FromString(program)
    try:
        _, each = fixed_and_each(model)
    except UnknownShapeError:
        return None
    graph = model.graph
    first = next(number for number, node in enumerate(graph.node) if _is_ours(node))
    kinds = _kinds(model)
    given = {"", *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    forward, backward = _with_masks_in_front(list(graph.node[:first]), list(graph.node[first:]), given, kinds)
    backward = _updates_early(backward, given)
    needed = {name for node in backward for name in node.input}
    large = {name for name, size in each.items() if size >= least_bytes and kinds[name] == TensorProto.FLOAT}
    stored = [name for node in forward for name in node.output if name in needed & large]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    safe = _bounded(forward, constants) if saturated else set(stored)
    nodes = [*_narrowed(forward, stored, safe), *_widened(backward, stored)]
    del graph.node[:]
    graph.node.extend(nodes)
    bounds = (("half:least", -LARGEST), ("half:largest", LARGEST))
    graph.initializer.extend(numpy_helper.from_array(np.array(bound, np.float32), name) for name, bound in bounds)
    model.metadata_props.add(key=IN_ORDER, value="1")
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _saving(program: bytes, other: bytes) -> float:
    """How much less a step takes in the other program, at most 1."""
    alive = [most_alive(onnx.ModelProto.FromString(each)) for each in (program, other)]
    plain, half = (fixed + USUAL_BATCH * each for fixed, each in alive)
    return 1 - half / plain


def _is_ours(node: onnx.NodeProto) -> bool:
    """Whether a node is of the loss, the backward pass or the optimizer: the names that export.emitter gives."""
    return bool(node.output[0] == "loss" or node.output[0].startswith(("step:", "new:")))


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output, *graph.input)}


def _with_masks_in_front(forward: Nodes, backward: Nodes, given: Collection[str], kinds: Mapping[str, int]) -> tuple[Nodes, Nodes]:
    """The two passes, with comparisons of activations moved to where these are made.

    Whether an activation is 0 survives float16 (what is below 3e-8 becomes 0), so that is taken from the stored value where there is one.
    """
    made = {name for node in forward for name in node.output} | set(given)
    shared = {name for node in backward if not _is_gate(node, kinds) for name in node.input}
    makers: dict[str, onnx.NodeProto] = {}
    for node in backward:
        if all(name in made or name in makers for name in node.input):
            makers |= dict.fromkeys(node.output, node)
    moved: dict[int, onnx.NodeProto] = {}
    masks = [node for name, node in makers.items() if kinds[name] == TensorProto.BOOL]
    pending = [node for node in masks if not (_is_gate(node, kinds) and node.input[0] in shared)]
    while pending:
        node = pending.pop()
        moved[id(node)] = node
        pending += [makers[name] for name in node.input if name in makers]
    return _placed(forward, [node for node in backward if id(node) in moved]), [node for node in backward if id(node) not in moved]


def _is_gate(node: onnx.NodeProto, kinds: Mapping[str, int]) -> bool:
    return bool(node.op_type == "Cast" and kinds[node.output[0]] == TensorProto.BOOL)


def _placed(nodes: Nodes, more: Iterable[onnx.NodeProto]) -> Nodes:
    """The nodes, and each of `more` directly behind those that make its inputs."""
    at = {name: number for number, node in enumerate(nodes) for name in node.output}
    behind: dict[int, Nodes] = {}
    for node in more:
        place = max((at.get(name, -1) for name in node.input), default=-1)
        at |= dict.fromkeys(node.output, place)
        behind.setdefault(place, []).append(node)
    return [*behind.get(-1, []), *(each for number, node in enumerate(nodes) for each in (node, *behind.get(number, [])))]


def _updates_early(nodes: Nodes, given: Collection[str]) -> Nodes:
    """The nodes in an order in which what only one parameter needs stands behind the last that others need too.

    The programs update all parameters at their end, and what the updates are made of would be kept until then.
    """
    owners = _parameters_reached(nodes)
    rates = {name for name in given if name in ("learning_rate", "state:step") or name.startswith("step:")}
    made_at: dict[str, int] = {}
    complete_at: dict[str, int] = {}
    keys: list[tuple[int | str, int]] = []
    for number, (node, reached) in enumerate(zip(nodes, owners, strict=True)):
        if rates.issuperset(node.input):  # numbers such as Adam's rates, made of nothing else
            rates.update(node.output)
            keys.append((-1, number))
        elif len(reached) == 1:
            (parameter,) = reached
            complete_at[parameter] = max([complete_at.get(parameter, -1), *(made_at.get(name, -1) for name in node.input)])
            keys.append((parameter, number))
        else:
            made_at |= dict.fromkeys(node.output, number)
            keys.append((number, number))
    placed = [(complete_at[place], 1, number) if isinstance(place, str) else (place, 0, number) for place, number in keys]
    return [nodes[number] for *_, number in sorted(placed)]


def _parameters_reached(nodes: Nodes) -> list[frozenset[str]]:
    """For every node, whose new values depend on it."""
    reached: dict[str, frozenset[str]] = {}
    owners: list[frozenset[str]] = []
    for node in reversed(nodes):
        mine = frozenset[str]().union(*(reached.get(name, frozenset()) | _parameter_of(name) for name in node.output))
        reached |= {name: reached.get(name, frozenset()) | mine for name in node.input}
        owners.append(mine)
    return owners[::-1]


def _parameter_of(output: str) -> frozenset[str]:
    """new:<parameter> and new:state:<slot>:<parameter> are its own."""
    if not output.startswith("new:"):
        return frozenset()
    name = output.removeprefix("new:")
    return frozenset({name.split(":", 2)[-1] if name.startswith("state:") else name})


def _bounded(forward: Nodes, constants: Mapping[str, NDArray[Any]]) -> set[str]:
    """Values that float16 holds whatever the weights are."""
    found: set[str] = set()
    for node in forward:
        bounds = [constants.get(name) for name in node.input[1:3]] if node.op_type == "Clip" else []
        is_cut = len(bounds) == 2 and all(bound is not None and np.all(np.abs(bound) <= LARGEST) for bound in bounds)
        if is_cut or node.op_type in _BOUNDED or (node.op_type in _PASSING and node.input[0] in found):
            found.update(node.output)
    return found


def _narrowed(forward: Nodes, stored: Collection[str], safe: Collection[str]) -> Nodes:
    """The forward pass, and each stored value as half:<value> behind its last use."""
    last = {name: number for number, node in enumerate(forward) for name in (*node.input, *node.output)}
    behind: dict[int, Nodes] = {}
    for name in stored:
        source, nodes = name, behind.setdefault(last[name], [])
        if name not in safe:
            source = f"half:{name}:cut"
            nodes.append(helper.make_node("Clip", [name, "half:least", "half:largest"], [source]))
        nodes.append(helper.make_node("Cast", [source], [f"half:{name}"], to=TensorProto.FLOAT16))
    return [each for number, node in enumerate(forward) for each in (node, *behind.get(number, []))]


def _widened(backward: Nodes, stored: Collection[str]) -> Nodes:
    """The backward pass reading half:<value>, cast in front of its first use."""
    wide = {name: f"half:{name}:wide" for name in stored}
    there: set[str] = set()
    nodes: Nodes = []
    for node in backward:
        for name in dict.fromkeys(node.input):
            if name in wide and name not in there:
                there.add(name)
                nodes.append(helper.make_node("Cast", [f"half:{name}"], [wide[name]], to=TensorProto.FLOAT))
        node.input[:] = [wide.get(name, name) for name in node.input]
        nodes.append(node)
    return nodes
