"""The one harness of gradient rules: an op in a small graph, its gradients by onnxruntime, by torch and by finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from hypothesis import Phase, settings
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.depthwise import with_depthwise_products
from export.emitter import Emitter
from export.forward import read_forward
from export.gradients import differentiate, materialise
from export.rules import CURES, RULES
from export.torch_graph import graph_of_model
from export.turned import with_turned_products
from export.ways import DEFAULT, Ways
from tests.export.running import Arrays, assert_close, session_of, step

CLASSES = 4
STEP = 1e-6
Values = dict[str, torch.Tensor]
Doubles = dict[str, NDArray[np.float64]]
Function = Callable[[torch.Tensor, Values], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """An op with its surroundings.

    Attributes:
        nodes: from "a", which is x + p, to "o", [batch, ...].
        forward: the same in torch, from (a, parameters).
        weights: further parameters; p is one always.
        p: when given, shows the gradient at chosen values of x + p.
        smooth: whether differences of x + p of STEP lead to no corner.
        reference: whether onnx.reference computes the op in float64; where it does not, differences are taken in torch.
        opset: of the model.
    """

    nodes: Sequence[onnx.NodeProto]
    forward: Function
    x: NDArray[np.float32]
    weights: Arrays = field(default_factory=dict)
    p: NDArray[np.float32] | None = None
    smooth: bool = True
    reference: bool = True
    opset: int = 18


def drawn(examples: int) -> settings:
    """Without shrinking: the networks are small, and a failing example says which numbers were drawn."""
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=examples, phases=phases)


def numbers(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """float32 odd multiples of 2**-13 in [-1, 1): sums of two meet no corner at 0, and float32 holds them and their sums exactly."""
    return np.asarray(rng.integers(-4096, 4096, shape) / 4096 + 2**-13, np.float32)


def constant(name: str, value: Any, dtype: type[np.generic] = np.int64) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value, dtype)))


def network(
    nodes: Sequence[onnx.NodeProto], weights: Mapping[str, NDArray[Any]], sizes: Sequence[int], opset: int = 18, features: int | None = None
) -> onnx.ModelProto:
    """x + p = "a", the nodes from "a" to "o", flat; and a linear head where the weights have one."""
    ends = [helper.make_node("Flatten", ["o"], ["flat" if "head" in weights else "logits"])]
    ends += [helper.make_node("MatMul", ["flat", "head"], ["logits"])] * ("head" in weights)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "p"], ["a"]), *nodes, *ends],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *sizes])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", features])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    domains = {"": opset} | {each.domain: 1 for each in nodes if each.domain}
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*pair) for pair in domains.items()], ir_version=8)
    return model if features is not None else onnx.shape_inference.infer_shapes(model, data_prop=True)


def check(
    nodes: Sequence[onnx.NodeProto],
    forward: Function,
    x: NDArray[np.float32],
    weights: Arrays | None = None,
    *,
    p: NDArray[np.float32] | None = None,
) -> set[str]:
    return check_case(Case(nodes, forward, x, weights or {}, p))


def check_case(case: Case, ways: Ways = DEFAULT) -> set[str]:
    """Check every gradient of seed * o; returns the op types of the gradient program."""
    rng = np.random.default_rng(case.x.size)
    p = numbers(rng, *case.x.shape[1:]) / np.float32(4) if case.p is None else case.p
    weights = {"p": p, **case.weights}
    doubles: Doubles = {name: array.astype(np.float64) for name, array in weights.items()}

    def hidden(x: torch.Tensor, q: Values) -> torch.Tensor:
        return case.forward(x + q["p"], q).reshape(len(x), -1)

    features = hidden(torch.tensor(case.x), {name: torch.tensor(array) for name, array in weights.items()}).shape[1]
    # Mostly of one sign, so that the terms of a summed gradient do not cancel.
    seed = numbers(rng, len(case.x), features) + np.float32(1.5)
    exact = _by_torch(hidden, case.x, doubles, seed)
    model = network(case.nodes, weights, case.x.shape[1:], case.opset, features)
    program = gradient_program(model, ways)
    read = _by_torch(lambda x, q: graph_of_model(model).forward(q, x), case.x, doubles, seed)
    ours = step(session_of(program), {"x": case.x, "seed": seed, **weights})
    np.testing.assert_allclose(ours["logits"], _numpy(hidden, case.x, doubles), rtol=1e-4, atol=1e-5)
    for name, gradient in exact.items():
        assert_close(ours[f"gradient:{name}"], gradient, f"gradient of {name}")
        np.testing.assert_allclose(read[name], gradient, rtol=1e-5, atol=1e-6)  # attributes of nodes are float32
    if case.smooth:
        _check_differences(case, _reference(model) if case.reference else hidden, doubles, seed, exact)
    return {node.op_type for node in onnx.load_from_string(program).graph.node}


def gradient_program(model: onnx.ModelProto, ways: Ways = DEFAULT) -> bytes:
    """x, seed, <parameter>... -> logits, gradient:<parameter>...

    Raises:
        LocalError: some op cannot be trained.
    """
    forward = with_turned_products(with_depthwise_products(read_forward(model), ways.product_pairs))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in forward.program_nodes]
    graph = Emitter(nodes, dict(forward.constants), forward.shapes, ways)
    gradients = differentiate(graph, RULES, list(forward.parameters), forward.logits, "seed", CURES)
    for name, gradient in gradients.items():
        graph.emit("Identity", materialise(graph, gradient), output=f"gradient:{name}")
    graph.emit("Identity", forward.logits, output="logits")
    inputs = {"x": ("batch", *forward.input_shape[1:]), "seed": ("batch", forward.classes)}
    shapes = {name: array.shape for name, array in forward.parameters.items()}
    outputs = {"logits": inputs["seed"], **{f"gradient:{name}": shape for name, shape in shapes.items()}}
    given, got = ([helper.make_tensor_value_info(*pair) for pair in _infos(infos)] for infos in (inputs | shapes, outputs))
    return graph.program(given, got, {})


def _infos(shapes: Mapping[str, Sequence[Any]]) -> list[tuple[str, int, Sequence[Any]]]:
    return [(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]


def _by_torch(forward: Function, x: NDArray[np.float32], weights: Doubles, seed: NDArray[np.float32]) -> Doubles:
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in weights.items()}
    total = (forward(torch.tensor(x, dtype=torch.float64), leaves) * torch.tensor(seed, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {name: gradient.numpy() for name, gradient in zip(leaves, gradients, strict=True)}


def _numpy(forward: Function, x: NDArray[np.float32], weights: Doubles) -> NDArray[np.float64]:
    tensors = {name: torch.tensor(array) for name, array in weights.items()}
    return np.asarray(forward(torch.tensor(x, dtype=torch.float64), tensors).numpy())


def _reference(model: onnx.ModelProto) -> Function:
    """The model by onnx.reference, which computes in the precision of what it is given: here float64."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    bare.graph.input.extend(helper.make_tensor_value_info(t.name, TensorProto.DOUBLE, t.dims) for t in model.graph.initializer)
    del bare.graph.initializer[:]
    for tensor in (attribute.t for each in bare.graph.node if each.op_type == "Constant" for attribute in each.attribute):
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    evaluator = ReferenceEvaluator(bare)

    def forward(x: torch.Tensor, q: Values) -> torch.Tensor:
        return torch.tensor(evaluator.run(None, {"x": x.numpy(), **{name: tensor.numpy() for name, tensor in q.items()}})[0])

    return forward


def _check_differences(case: Case, forward: Function, weights: Doubles, seed: NDArray[np.float32], exact: Doubles) -> None:
    """Along one drawn direction of all parameters together."""
    rng = np.random.default_rng(1)
    along = {name: rng.normal(size=array.shape) for name, array in weights.items()}
    moved = ({name: array + way * along[name] for name, array in weights.items()} for way in (STEP, -STEP))
    ahead, behind = (_numpy(forward, case.x, each) for each in moved)
    slope = float(((ahead - behind) * seed).sum()) / (2 * STEP)
    terms = np.concatenate([(exact[name] * along[name]).ravel() for name in weights])
    size = float(np.linalg.norm(terms)) + 1e-4 * float(np.linalg.norm(ahead * seed))
    assert abs(slope - terms.sum()) <= 1e-5 * size, f"finite differences give {slope:.8g}, gradients {terms.sum():.8g}"
