"""Grows an ONNX graph node by node; every gradient rule writes through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import helper, numpy_helper

from export.forward import Shape
from export.lowering import OPSET_VERSION
from export.ways import DEFAULT, Ways
from regrow.errors import LocalError

IR_VERSION = 9


@dataclass
class Emitter:
    """The graph under construction.

    Attributes:
        nodes: in execution order.
        constants: initializers of the program, by name.
        shapes: what is known of the forward values' shapes; rules read it, nobody extends it.
        ways: which of several equal computations rules choose.
    """

    nodes: list[onnx.NodeProto]
    constants: dict[str, NDArray[Any]]
    shapes: Mapping[str, Shape]
    ways: Ways = DEFAULT
    _by_content: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    _count: int = 0
    _prefix: str = "step"

    def fresh(self) -> str:
        """A value name that nothing uses yet."""
        self._count += 1
        return f"{self._prefix}:{self._count}"

    def emit(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node with one output and return that output's name."""
        output = output or self.fresh()
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def emit_all(self, op: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Append a node with several outputs and return their names."""
        names = [self.fresh() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names

    @contextmanager
    def in_place_of(self, node: onnx.NodeProto) -> Iterator[None]:
        """What is emitted meanwhile takes the place of a node of the forward pass, is named "ahead:", and has to give its outputs."""
        begin, self._prefix = len(self.nodes), "ahead"
        yield
        self._prefix = "step"
        made = self.nodes[begin:]
        del self.nodes[begin:]
        place = next(number for number, other in enumerate(self.nodes) if other is node)
        self.nodes[place : place + 1] = made

    def constant(self, value: ArrayLike, dtype: type[np.generic]) -> str:
        """The name of a constant; equal constants are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._by_content:
            self._by_content[key] = self.fresh()
            self.constants[self._by_content[key]] = array
        return self._by_content[key]

    def integers(self, *values: int) -> str:
        """An int64 vector: axes, shapes, starts."""
        return self.constant(values, np.int64)

    def real(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(value, np.float32)

    def static_shape(self, name: str) -> Shape | None:
        return self.shapes.get(name)

    def reshape_like(self, value: str, model: str) -> str:
        """`value` in the shape of `model`, in constants where at most one axis is dynamic."""
        shape = self.shapes.get(model)
        if shape is None or shape.count(None) > 1:
            return self.emit("Reshape", value, self.emit("Shape", model))
        return self.emit("Reshape", value, self.integers(*(-1 if size is None else size for size in shape)))

    def program(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto], metadata: Mapping[str, str]) -> bytes:
        """The finished program, serialised, after onnx.checker."""
        initializers = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "regrow", inputs, outputs, initializers)
        opset = [helper.make_opsetid("", OPSET_VERSION)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="regrow")
        helper.set_model_props(model, dict(metadata))
        try:
            onnx.checker.check_model(model, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise LocalError(f"the program that we derived from this model is invalid, which is our bug: {error}") from error
        return bytes(model.SerializeToString(deterministic=True))
