"""Builds one-op models, runs programs in onnxruntime and compares with torch in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.programs import build_programs
from export.torch_graph import graph_of_program

Arrays = dict[str, NDArray[np.float32]]


def model_of(
    nodes: Sequence[onnx.NodeProto], weights: Mapping[str, NDArray[Any]], input_shape: Sequence[int], classes: int, opset: int = 18
) -> onnx.ModelProto:
    """A model from `x` [batch, *input_shape] to `logits` [batch, classes]."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *input_shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def session_of(program: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])


def step(session: ort.InferenceSession, feed: Mapping[str, Any]) -> dict[str, Any]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def feed_of(
    x: NDArray[np.float32], y: NDArray[np.int64], weights: Mapping[str, NDArray[np.float32]], learning_rate: float = 1.0
) -> dict[str, Any]:
    weight = np.ones(len(x), np.float32)
    return {"x": x, "y": y, "sample_weight": weight, "learning_rate": np.array(learning_rate, np.float32), **weights}


def assert_close(ours: NDArray[Any], exact: NDArray[Any], what: str) -> None:
    """1e-5 relative by norm; 1e-6 absolute where the exact gradient is 0 because terms of size 0.1 to 1 cancel."""
    error = float(np.linalg.norm(np.asarray(ours, np.float64) - exact))
    size = float(np.linalg.norm(exact))
    allowed = 1e-5 * size if size > 1e-9 else 1e-6
    assert error <= allowed, f"{what}: off by {error:.3g} of {size:.3g}"


def check_against_torch(model: onnx.ModelProto, torch_forward: Any, weights: Arrays, x: NDArray[np.float32], y: NDArray[np.int64]) -> None:
    """Both training programs (all masks 1) move every parameter as float64 autograd says, at learning rate 1.

    And so does the forward graph as export.torch_graph reads it.
    """
    exact = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in weights.items()}
    loss = torch.nn.functional.cross_entropy(torch_forward(torch.tensor(x, dtype=torch.float64), exact), torch.tensor(y))
    loss.backward()
    programs = build_programs(model)
    read = {name: tensor.detach().clone().requires_grad_() for name, tensor in exact.items()}
    logits = graph_of_program(programs["evaluate"]).forward(read, torch.tensor(x, dtype=torch.float64))
    torch.nn.functional.cross_entropy(logits, torch.tensor(y)).backward()
    for key, tensor in exact.items():  # attributes of nodes are float32
        torch.testing.assert_close(read[key].grad, tensor.grad, rtol=1e-5, atol=1e-7)
    for name in ("train", "train_masked"):
        # A large step makes the update nearly all of the new value, which then shows the gradient without cancellation.
        session = session_of(programs[name])
        masks = {item.name: np.ones(item.shape, np.float32) for item in session.get_inputs() if item.name.startswith("mask:")}
        rate = 2.0**20
        got = step(session, {**feed_of(x, y, weights, rate), **masks})
        assert math.isclose(float(got["loss"]), loss.item(), rel_tol=1e-5), name
        for key, tensor in exact.items():
            assert tensor.grad is not None
            update = (weights[key].astype(np.float64) - got[f"new:{key}"]) / rate
            assert_close(update, tensor.grad.numpy(), f"{name}, gradient of {key}")
