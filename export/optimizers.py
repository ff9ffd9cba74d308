"""One optimizer step as graph nodes, from the gradients of all parameters to their new values and the new state.

In order, as torch does it with the FedProx term in the loss, torch.nn.utils.clip_grad_norm_ and torch.optim: gradient, proximal term, norm
clipping, weight decay, optimizer. Coordinates outside the mask have no part in the norm, and whatever the state says they do not move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.emitter import Emitter
from export.gradients import Gradient, Product, materialise
from regrow.local_step import Step
from regrow.parameters import Layout

CLIP_EPSILON = 1e-6
"""Of torch.nn.utils.clip_grad_norm_."""


@dataclass(frozen=True)
class Slots:
    """The inputs and outputs that an optimizer adds to a training program; every state input has its `new:` output."""

    inputs: tuple[onnx.ValueInfoProto, ...]
    outputs: tuple[onnx.ValueInfoProto, ...]


def slots_of(step: Step, layout: Layout) -> Slots:
    """state:<slot>:<parameter>, state:step (float32 []), anchor:<parameter>, in this order."""
    shapes: dict[str, tuple[int, ...]] = {f"state:{slot}:{t.name}": t.shape for slot in step.slots for t in layout.tensors}
    if step.counts_steps:
        shapes["state:step"] = ()
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info(f"new:{name}", TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    if step.proximal_mu:
        inputs += [helper.make_tensor_value_info(f"anchor:{t.name}", TensorProto.FLOAT, t.shape) for t in layout.tensors]
    return Slots(tuple(inputs), tuple(outputs))


def emit_bare_sgd(graph: Emitter, updates: Mapping[str, Gradient], masks: Mapping[str, str]) -> None:
    """new:<parameter> from gradients that are already -learning_rate times themselves.

    Args:
        masks: parameter -> name of its mask; those without one are free.
    """
    for name, update in updates.items():
        if name in masks:
            update = graph.emit("Mul", materialise(graph, update), masks[name])
        if isinstance(update, Product):
            # onnxruntime may write the sum in place of its operand; an input of the program it leaves alone.
            materialise(graph, update, plus=name, output=f"new:{name}")
        else:
            graph.emit("Add", name, update, output=f"new:{name}")


def emit_optimizer(graph: Emitter, step: Step, gradients: Mapping[str, Gradient], masks: Mapping[str, str]) -> None:
    """new:<parameter> and the new state, from the gradients of the loss."""
    plain = {name: _pulled(graph, step, name, materialise(graph, gradient)) for name, gradient in gradients.items()}
    if step.clip_norm is not None:
        plain = _clipped(graph, step.clip_norm, plain, masks)
    rates = _adam_rates(graph, step) if step.counts_steps else None
    for name, gradient in plain.items():
        if step.weight_decay and step.optimizer != "adamw":
            gradient = graph.emit("Add", gradient, graph.emit("Mul", name, graph.real(step.weight_decay)))
        if rates is not None:
            move = _adam_move(graph, step, name, gradient, rates)
        else:
            move = graph.emit("Mul", _sgd_direction(graph, step, name, gradient), "learning_rate")
        if name in masks:
            move = graph.emit("Mul", move, masks[name])
        graph.emit("Sub", name, move, output=f"new:{name}")


def _pulled(graph: Emitter, step: Step, name: str, gradient: str) -> str:
    """With the gradient of proximal_mu / 2 times the squared distance from where the round began (FedProx, arXiv 1812.06127)."""
    if not step.proximal_mu:
        return gradient
    away = graph.emit("Sub", name, f"anchor:{name}")
    return graph.emit("Add", gradient, graph.emit("Mul", away, graph.real(step.proximal_mu)))


def _clipped(graph: Emitter, norm: float, gradients: Mapping[str, str], masks: Mapping[str, str]) -> dict[str, str]:
    """All gradients, masked, scaled down so that their common norm is at most `norm`."""
    kept = {name: graph.emit("Mul", value, masks[name]) if name in masks else value for name, value in gradients.items()}
    squares = [graph.emit("ReduceSumSquare", value, keepdims=0) for value in kept.values()]
    found = graph.emit("Sqrt", graph.emit("Sum", *squares))
    scale = graph.emit("Div", graph.real(norm), graph.emit("Add", found, graph.real(CLIP_EPSILON)))
    scale = graph.emit("Min", scale, graph.real(1.0))
    return {name: graph.emit("Mul", value, scale) for name, value in kept.items()}


def _sgd_direction(graph: Emitter, step: Step, name: str, gradient: str) -> str:
    if not step.slots:
        return gradient
    slot, decay = f"state:momentum:{name}", graph.real(step.momentum)
    velocity = graph.emit("Add", graph.emit("Mul", slot, decay), gradient, output=f"new:{slot}")
    return graph.emit("Add", gradient, graph.emit("Mul", velocity, decay)) if step.optimizer == "nesterov" else velocity


@dataclass(frozen=True)
class _AdamRates:
    """Scalars of this step: the learning rate over 1 - beta1^t, the root of 1 - beta2^t, and learning_rate * weight_decay or ""."""

    size: str
    root: str
    decay: str


def _adam_rates(graph: Emitter, step: Step) -> _AdamRates:
    """Powers in float64: 1 - 0.999 has only five digits in float32."""
    count = graph.emit("Add", "state:step", graph.real(1.0), output="new:state:step")
    exponent = graph.emit("Cast", count, to=TensorProto.DOUBLE)
    one = graph.constant(1.0, np.float64)
    bias1, bias2 = (
        graph.emit("Sub", one, graph.emit("Pow", graph.constant(beta, np.float64), exponent)) for beta in (step.beta1, step.beta2)
    )
    size = graph.emit("Div", "learning_rate", graph.emit("Cast", bias1, to=TensorProto.FLOAT))
    root = graph.emit("Cast", graph.emit("Sqrt", bias2), to=TensorProto.FLOAT)
    decoupled = step.optimizer == "adamw" and step.weight_decay
    decay = graph.emit("Mul", "learning_rate", graph.real(step.weight_decay)) if decoupled else ""
    return _AdamRates(size, root, decay)


def _adam_move(graph: Emitter, step: Step, name: str, gradient: str, rates: _AdamRates) -> str:
    """What to take off a parameter."""
    means, squares = f"state:mean:{name}", f"state:square:{name}"
    drift = graph.emit("Mul", graph.emit("Sub", gradient, means), graph.real(1 - step.beta1))
    mean = graph.emit("Add", means, drift, output=f"new:{means}")
    fresh = graph.emit("Mul", graph.emit("Mul", gradient, gradient), graph.real(1 - step.beta2))
    square = graph.emit("Add", graph.emit("Mul", squares, graph.real(step.beta2)), fresh, output=f"new:{squares}")
    spread = graph.emit("Add", graph.emit("Div", graph.emit("Sqrt", square), rates.root), graph.real(step.epsilon))
    move = graph.emit("Mul", graph.emit("Div", mean, spread), rates.size)
    return graph.emit("Add", move, graph.emit("Mul", name, rates.decay)) if rates.decay else move
