"""Reverse-mode differentiation of an ONNX graph into more ONNX: from the gradient of one value to that of every parameter.

The walk is the textbook one: nodes in reverse order, each turned by the rule of its op from the gradient of its output
into those of its inputs, contributions to the same value summed. Only values that depend on a parameter are followed, so
the first layer never computes the gradient of the data.

A rule is a function Site -> {input index: gradient}. To support another op, write its rule and name it in rules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnx

from export.emitter import Emitter
from export.forward import Shape
from regrow.errors import LocalError, shortened


@dataclass(frozen=True)
class Product:
    """A gradient that is one GEMM, `a' @ b'`, not yet emitted, so that the update `W + a' @ b'` can ride on it for free.

    Attributes:
        transpose_a, transpose_b: as Gemm's transA and transB.
        shape: what the product's two axes stand for, when the parameter is not a matrix; None when it is.
        alpha: factor of the product.
    """

    a: str
    b: str
    transpose_a: bool = False
    transpose_b: bool = False
    alpha: float = 1.0
    shape: tuple[int, ...] | None = None


Gradient = str | Product


@dataclass(frozen=True)
class Site:
    """One node to differentiate.

    Attributes:
        graph: where the rule writes its nodes.
        node: the forward node as it stands in the graph; a rule may give it a further output (MaxPool's indices).
        gradients: names of the gradients of the node's outputs; None for an output that the loss does not depend on.
        wanted: indices of the inputs that depend on a parameter.
    """

    graph: Emitter
    node: onnx.NodeProto
    gradients: tuple[str | None, ...]
    wanted: Collection[int]

    @property
    def gradient(self) -> str:
        """Name of the gradient of the first output, for the many ops that have one output only.

        Raises:
            LocalError: another output is in use.
        """
        first, *others = self.gradients
        if first is None or any(others):
            raise cannot_train(self.node, "has a second output in use, which no gradient rule covers; use its first output only")
        return first

    def output(self, index: int) -> str:
        """Name of an output of the forward node, which from now on gives it even if the model left it out."""
        outputs = self.node.output
        outputs.extend([""] * (index + 1 - len(outputs)))
        outputs[index] = name = str(outputs[index]) or self.graph.fresh()
        return name

    def integers(self, index: int, default: Iterable[int] = ()) -> list[int]:
        """The numbers of an optional input that has to be constant: axes, bounds, sizes.

        Raises:
            LocalError: they are computed.
        """
        names = self.node.input
        if index >= len(names) or not names[index]:
            return list(default)
        value = self.graph.constants.get(names[index])
        if value is None:
            what = f"{names[index].removeprefix('forward:')!r}, which is computed,"
            raise self.unsupported(what, "give it as a constant; fix every axis but the batch")
        return [int(number) for number in value.ravel()]

    def attributes(self, **defaults: Any) -> dict[str, Any]:
        """The node's attributes over their defaults; strings decoded.

        Raises:
            LocalError: the node has an attribute that the rule does not know.
        """
        found = {item.name: onnx.helper.get_attribute_value(item) for item in self.node.attribute}
        unknown = sorted(found.keys() - defaults.keys())
        if unknown:
            raise self.unsupported(f"attribute {unknown[0]!r}", "leave it at its default")
        return defaults | {name: item.decode() if isinstance(item, bytes) else item for name, item in found.items()}

    def shape(self, name: str, *, static_from: int = 0) -> tuple[int, ...]:
        """Shape of a forward value, axes below `static_from` reported as 0; all others must be fixed."""
        shape = self.graph.static_shape(name)
        if shape is None or None in shape[static_from:]:
            raise self.unsupported(f"a shape of {name!r} that is only known at run time", "fix every axis but the batch")
        return tuple(size or 0 if axis < static_from else int(size or 0) for axis, size in enumerate(shape))

    def fixed_size(self, name: str, axis: int) -> int:
        """Size of one axis of a forward value."""
        shape = self.graph.static_shape(name)
        size = None if shape is None else shape[axis]
        if size is None:
            what = f"axis {axis} of {name.removeprefix('forward:')!r} with a size that is only known at run time"
            raise self.unsupported(what, "use a fixed axis")
        return size

    def rank(self, name: str) -> int:
        shape = self.graph.static_shape(name)
        if shape is None:
            raise self.unsupported(f"{name!r} of unknown rank", "run onnx.shape_inference and fix every axis but the batch")
        return len(shape)

    def unsupported(self, what: str, cure: str) -> LocalError:
        return cannot_train(self.node, f"has {what}, which no gradient rule covers; {cure}")


Rule = Callable[[Site], Mapping[int, Gradient]]


def cannot_train(node: onnx.NodeProto, why: str) -> LocalError:
    """The one error for everything that cannot be differentiated: op, node, reason and cure."""
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    output = node.output[0].removeprefix("forward:")
    return LocalError(f"cannot train {op} (node {shortened(node.name)!r}, output {shortened(output)!r}): it {why}")


def _cure(node: onnx.NodeProto, rules: Mapping[str, Rule], cures: Mapping[str, str]) -> str:
    if node.domain not in ("", "ai.onnx"):
        return "it is of another domain than ai.onnx; write it with ops of ai.onnx"
    return cures.get(node.op_type) or f"replace it by supported ops ({', '.join(sorted(rules))}) or add a rule in export/rules.py"


def differentiate(
    graph: Emitter,
    rules: Mapping[str, Rule],
    parameters: Collection[str],
    output: str,
    seed: str,
    cures: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Gradient]:
    """Gradients of every parameter, given `seed`, the gradient of `output`; the backward nodes are appended to the graph.

    Backward is linear in its seed: a seed scaled by -learning_rate gives the SGD updates themselves.

    Args:
        graph: holds the forward nodes, in execution order.
        rules: gradient rule by op type of the ai.onnx domain.
        parameters: names of the graph inputs to differentiate by.
        output: name of the value whose gradient is given.
        seed: name of that gradient, same shape as `output`.
        cures: what to do about ops without a rule, by op type.

    Raises:
        LocalError: an op on the way from a parameter to the output has no rule, or `output` does not depend on some parameter.
    """
    forward = list(graph.nodes)
    active = set(parameters)
    for node in forward:
        if active.intersection(node.input):
            active.update(filter(None, node.output))
    contributions: dict[str, list[Gradient]] = {output: [seed]}
    for node in reversed(forward):
        wanted = [index for index, name in enumerate(node.input) if name in active]
        if not wanted or not any(name in contributions for name in node.output):
            continue
        if node.domain not in ("", "ai.onnx") or node.op_type not in rules:
            raise cannot_train(node, f"has no gradient rule; {_cure(node, rules, cures)}")
        gradients = tuple(_total(graph, contributions.pop(name)) if name in contributions else None for name in node.output)
        site = Site(graph, node, gradients, wanted)
        for index, gradient in rules[node.op_type](site).items():
            contributions.setdefault(node.input[index], []).append(gradient)
    unreached = [name for name in parameters if name not in contributions]
    if unreached:
        raise LocalError(f"the output does not depend on parameter {shortened(unreached[0])!r}; remove it from the model")
    return {name: _lone(graph, contributions[name]) for name in parameters}


def materialise(graph: Emitter, gradient: Gradient, *, plus: str | None = None, output: str | None = None) -> str:
    """The name of a gradient as a tensor; a Product takes `plus` (a tensor of the parameter's shape) into its GEMM.

    A gradient that already is a tensor gets an Add.
    """
    if isinstance(gradient, str):
        return gradient if plus is None else graph.emit("Add", plus, gradient, output=output)
    inputs = [gradient.a, gradient.b]
    if plus is not None:
        inputs.append(plus if gradient.shape is None else graph.emit("Reshape", plus, _as_matrix(graph, gradient.shape)))
    flags: dict[str, Any] = {"transA": int(gradient.transpose_a), "transB": int(gradient.transpose_b), "alpha": gradient.alpha}
    if gradient.shape is None:
        return graph.emit("Gemm", *inputs, output=output, **flags)
    return graph.emit("Reshape", graph.emit("Gemm", *inputs, **flags), graph.integers(*gradient.shape), output=output)


def reduce_to(site: Site, gradient: str, source: str, target: str) -> str:
    """`gradient`, shaped like `source`, summed over the axes along which `target` was broadcast to `source`."""
    large, small = site.graph.static_shape(source), site.graph.static_shape(target)
    if large is None or small is None:
        raise site.unsupported("broadcast operands of unknown shape", "fix every axis but the batch")
    added = len(large) - len(small)
    stretched = [axis for axis, size in enumerate(small, added) if size == 1 and large[axis] != 1]
    if added:
        gradient = site.graph.emit("ReduceSum", gradient, site.graph.integers(*range(added)), keepdims=0)
    if stretched:
        axes = site.graph.integers(*(axis - added for axis in stretched))
        gradient = site.graph.emit("ReduceSum", gradient, axes, keepdims=1)
    return gradient


def _as_matrix(graph: Emitter, shape: Shape) -> str:
    return graph.integers(shape[0] or 0, -1)


def _total(graph: Emitter, gradients: list[Gradient]) -> str:
    names = [materialise(graph, gradient) for gradient in gradients]
    return names[0] if len(names) == 1 else graph.emit("Sum", *names)


def _lone(graph: Emitter, gradients: list[Gradient]) -> Gradient:
    return gradients[0] if len(gradients) == 1 else _total(graph, gradients)
