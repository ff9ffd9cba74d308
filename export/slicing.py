"""The really smaller forward model that remains when some units are kept: slices of the weights, in a graph that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from export.forward import read_forward
from export.programs import layout_of
from export.units import Walk, left_of, statistics_units, units_of, walk_of
from regrow.errors import LocalError
from regrow.parameters import Layout, Tensor
from regrow.units import Kept, Units, gather


def sliced_model(model: onnx.ModelProto, units: Units, kept: Kept) -> onnx.ModelProto:
    """The smaller forward model of the kept units, with the full model's values for what is left.

    Its shapes depend on how many units each group keeps, not on which: programs built from it serve every choice of as many units, and the
    flat vector of such a choice is `vector[unit_coordinates(...)]`.

    Args:
        model: the full model. Not modified.
        units: of this model, from find_units.

    Raises:
        LocalError: as find_units; or the units are of another model, or `kept` is not a choice of them.
    """
    forward = read_forward(model)
    walk = walk_of(forward)
    if units_of(walk) != units:
        raise LocalError("the units are not those of this model; find them again with export.units.find_units")
    layout = layout_of(forward)
    tensors = gather(layout, units, kept, layout.flatten(forward.parameters)) | _statistics_left(walk, kept)
    sliced = onnx.ModelProto()
    sliced.CopyFrom(model)
    for tensor in sliced.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    for value in sliced.graph.input:
        if value.name in tensors:
            value.CopyFrom(helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, tensors[value.name].shape))
    _refit(sliced.graph, walk, kept)
    _drop_unused(sliced.graph)
    onnx.checker.check_model(sliced, full_check=True)
    return sliced


def _statistics_left(walk: Walk, kept: Kept) -> dict[str, NDArray[np.float32]]:
    """The running means and variances of the kept channels."""
    found = walk.forward.statistics
    if not found:
        return {}
    layout = Layout(tuple(Tensor(name, array.shape, always_kept=True) for name, array in found.items()))
    return gather(layout, statistics_units(walk), kept, layout.flatten(found))


def _refit(graph: onnx.GraphProto, walk: Walk, kept: Kept) -> None:
    """Whatever the graph says about the number of its channels, in terms of the smaller model."""
    size = partial(left_of, walk, kept)
    known = []
    for value in graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if f"forward:{value.name}" in walk.values and len(dims) > 1 and dims[1].HasField("dim_value"):
            dims[1].dim_value = size(f"forward:{value.name}", dims[1].dim_value)
            known.append(value)
    del graph.value_info[:]  # what is not known is inferred again
    graph.value_info.extend(known)
    nodes = [part for node in graph.node for part in (*_refit_node(node, walk, size), node)]
    del graph.node[:]
    graph.node.extend(nodes)


def _refit_node(node: onnx.NodeProto, walk: Walk, size: Callable[[str, int], int]) -> Iterator[onnx.NodeProto]:
    """Change one node; yields the constants that it needs from now on."""
    output = f"forward:{node.output[0]}"
    if output not in walk.values:
        return
    made: dict[int, NDArray[Any]] = {}
    if node.op_type == "Reshape":
        _, entries, *behind = walk.forward.shapes[output]
        made[1] = np.array([-1, size(output, entries or 0), *behind], np.int64)
    for index in (1, 2) if node.op_type in ("BatchNormalization", "GroupNormalization", "InstanceNormalization") else ():
        same = walk.forward.constants.get(f"forward:{node.input[index]}")
        if same is not None:
            made[index] = same[: size(output, same.size)]
    for attribute in node.attribute:
        if node.op_type == "GroupNormalization" and attribute.name == "num_groups":
            attribute.i = size(output, attribute.i)
    for index, array in made.items():
        name = f"{node.output[0]}:{index}"
        yield helper.make_node("Constant", [], [name], name=name, value=numpy_helper.from_array(array))
        node.input[index] = name


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove what only the old shapes needed."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    idle_nodes = [node for node in graph.node if node.op_type == "Constant" and node.output[0] not in used]
    idle_tensors = [tensor for tensor in graph.initializer if tensor.name not in used]
    for node in idle_nodes:
        graph.node.remove(node)
    for tensor in idle_tensors:
        graph.initializer.remove(tensor)
