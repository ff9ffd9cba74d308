"""Gradients of ops that work number by number, with broadcasting where there are two operands.

Where the derivative can be told from the output, the rule does that: exp, tanh and others are not computed twice.
At corners the choice is torch's, named in each rule.
"""

from __future__ import annotations

import math

from onnx import TensorProto

from export.gradients import Gradient, Site, reduce_to

Gradients = dict[int, Gradient]


def constant(_: Site) -> Gradients:
    """Ops whose output does not vary with small changes of the input: comparisons, shapes, roundings, positions."""
    return {}


def cast(site: Site) -> Gradients:
    """Between floats the gradient is cast back; a whole number or a truth value does not vary."""
    target = site.attributes(to=None, saturate=1)["to"]
    if target == TensorProto.FLOAT:
        return {0: site.graph.emit("CastLike", site.gradient, site.node.input[0])}
    if target in (TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16):
        raise site.unsupported("a type that gradients are not computed in", "keep the model in float32")
    return {}


def dropout(site: Site) -> Gradients:
    """Outside of training it changes nothing."""
    site.attributes(seed=0)
    names = site.node.input
    if len(names) > 2 and names[2]:
        training = site.graph.constants.get(names[2])
        if training is None or training.any():
            raise site.unsupported(
                "training_mode, whose random numbers would repeat in every session",
                "export the model in evaluation mode, where dropout is left out",
            )
    return {0: site.gradient}


def add(site: Site) -> Gradients:
    """Y = A + B, and Sum of any number."""
    site.attributes()
    return {index: _back(site, site.gradient, index) for index in site.wanted}


def sub(site: Site) -> Gradients:
    """Y = A - B."""
    site.attributes()
    gradients: Gradients = {}
    if 0 in site.wanted:
        gradients[0] = _back(site, site.gradient, 0)
    if 1 in site.wanted:
        # Summed first, the tensor to negate is as small as the operand.
        gradients[1] = site.graph.emit("Neg", _back(site, site.gradient, 1))
    return gradients


def mul(site: Site) -> Gradients:
    """Y = A * B."""
    site.attributes()
    factors = site.node.input
    return {index: _back(site, site.graph.emit("Mul", site.gradient, factors[1 - index]), index) for index in site.wanted}


def div(site: Site) -> Gradients:
    """Y = A / B; by B it is -Y / B."""
    site.attributes()
    share = site.graph.emit("Div", site.gradient, site.node.input[1])
    gradients: Gradients = {}
    if 0 in site.wanted:
        gradients[0] = _back(site, share, 0)
    if 1 in site.wanted:
        product = site.graph.emit("Mul", share, site.node.output[0])
        gradients[1] = site.graph.emit("Neg", _back(site, product, 1))
    return gradients


def larger(site: Site) -> Gradients:
    """Max of two: the gradient goes to the larger operand; each gets half where they are equal, as in torch."""
    return _chosen(site, "Greater", "Less")


def smaller(site: Site) -> Gradients:
    """Min of two."""
    return _chosen(site, "Less", "Greater")


def where(site: Site) -> Gradients:
    """Each operand gets the gradient where it was taken; the condition itself does not vary."""
    site.attributes()
    graph, condition, zero = site.graph, site.node.input[0], site.graph.real(0)
    gradients: Gradients = {}
    if 1 in site.wanted:
        gradients[1] = _back(site, graph.emit("Where", condition, site.gradient, zero), 1)
    if 2 in site.wanted:
        gradients[2] = _back(site, graph.emit("Where", condition, zero, site.gradient), 2)
    return gradients


def negative(site: Site) -> Gradients:
    """-1."""
    site.attributes()
    return {0: site.graph.emit("Neg", site.gradient)}


def absolute(site: Site) -> Gradients:
    """The sign; 0 at 0."""
    site.attributes()
    return {0: site.graph.emit("Mul", site.gradient, site.graph.emit("Sign", site.node.input[0]))}


def reciprocal(site: Site) -> Gradients:
    """-Y^2."""
    site.attributes()
    graph, y = site.graph, site.node.output[0]
    return {0: graph.emit("Neg", graph.emit("Mul", site.gradient, graph.emit("Mul", y, y)))}


def log(site: Site) -> Gradients:
    """1 / X."""
    site.attributes()
    return {0: site.graph.emit("Div", site.gradient, site.node.input[0])}


def sine(site: Site) -> Gradients:
    """cos X."""
    site.attributes()
    return {0: site.graph.emit("Mul", site.gradient, site.graph.emit("Cos", site.node.input[0]))}


def cosine(site: Site) -> Gradients:
    """-sin X."""
    site.attributes()
    return {0: site.graph.emit("Neg", site.graph.emit("Mul", site.gradient, site.graph.emit("Sin", site.node.input[0])))}


def softplus(site: Site) -> Gradients:
    """Y = log(1 + exp(X)): sigmoid(X)."""
    site.attributes()
    return {0: site.graph.emit("Mul", site.gradient, site.graph.emit("Sigmoid", site.node.input[0]))}


def elu(site: Site) -> Gradients:
    """1 above 0; at 0 and below alpha exp(X), which is Y + alpha."""
    alpha = site.attributes(alpha=1.0)["alpha"]
    return {0: _above_0(site, site.gradient, site.graph.emit("Add", site.node.output[0], site.graph.real(alpha)))}


def selu(site: Site) -> Gradients:
    """gamma above 0; at 0 and below gamma alpha exp(X), which is Y + gamma alpha."""
    options = site.attributes(alpha=1.67326319217681884765625, gamma=1.05070102214813232421875)
    graph, gamma = site.graph, options["gamma"]
    slope = graph.emit("Add", site.node.output[0], graph.real(gamma * options["alpha"]))
    return {0: _above_0(site, graph.emit("Mul", site.gradient, graph.real(gamma)), slope)}


def celu(site: Site) -> Gradients:
    """1 above 0; at 0 and below exp(X / alpha), which is Y / alpha + 1."""
    graph, alpha = site.graph, site.attributes(alpha=1.0)["alpha"]
    slope = graph.emit("Add", graph.emit("Mul", site.node.output[0], graph.real(1 / alpha)), graph.real(1))
    return {0: _above_0(site, site.gradient, slope)}


def prelu(site: Site) -> Gradients:
    """Y = X above 0, slope X at 0 and below."""
    site.attributes()
    graph, (source, slope) = site.graph, site.node.input
    gradients: Gradients = {}
    if 0 in site.wanted:
        gradients[0] = _above_0(site, site.gradient, slope)
    if 1 in site.wanted:
        below = graph.emit("Mul", site.gradient, graph.emit("Min", source, graph.real(0)))
        gradients[1] = _back(site, below, 1)
    return gradients


def relu(site: Site) -> Gradients:
    """The gradient passes where the output is positive."""
    site.attributes()
    # The output is never negative, so what is not 0 is positive. In onnxruntime two Casts beat Sign, Greater and Where.
    return {0: _where_not_zero(site, site.gradient, site.node.output[0])}


def leaky_relu(site: Site) -> Gradients:
    """At 0 the slope is alpha."""
    alpha = site.attributes(alpha=0.01)["alpha"]
    return {0: _above_0(site, site.gradient, site.graph.real(alpha))}


def sigmoid(site: Site) -> Gradients:
    """Y (1 - Y)."""
    site.attributes()
    return {0: site.graph.emit("Mul", site.gradient, _y_times_1_minus_y(site))}


def hard_sigmoid(site: Site) -> Gradients:
    """Y = min(1, max(0, alpha X + beta)): alpha where Y is neither 0 nor 1."""
    alpha = site.attributes(alpha=0.2, beta=0.5)["alpha"]
    scaled = site.graph.emit("Mul", site.gradient, site.graph.real(alpha))
    return {0: _where_not_zero(site, scaled, _y_times_1_minus_y(site))}


def hard_swish(site: Site) -> Gradients:
    """Y = X min(1, max(0, X / 6 + 1 / 2)): X / 3 + 1 / 2 between -3 and 3, with 0 at -3 and 1 at 3."""
    site.attributes()
    graph, source = site.graph, site.node.input[0]
    slope = graph.emit("Add", graph.emit("Mul", source, graph.real(1 / 3)), graph.real(0.5))
    slope = graph.emit("Where", graph.emit("Less", source, graph.real(3)), slope, graph.real(1))
    slope = graph.emit("Where", graph.emit("Greater", source, graph.real(-3)), slope, graph.real(0))
    return {0: graph.emit("Mul", site.gradient, slope)}


def tanh(site: Site) -> Gradients:
    """1 - Y^2."""
    site.attributes()
    graph, y = site.graph, site.node.output[0]
    return {0: graph.emit("Mul", site.gradient, graph.emit("Sub", graph.real(1), graph.emit("Mul", y, y)))}


def clip(site: Site) -> Gradients:
    """The gradient passes where clipping changed nothing, at the bounds too, as torch.clamp (and not relu6) has it."""
    site.attributes()
    if list(site.wanted) != [0]:
        raise site.unsupported("a bound that would be trained", "store it in a Constant node: every float32 initializer is a parameter")
    graph = site.graph
    is_inside = graph.emit("Cast", graph.emit("Equal", site.node.input[0], site.node.output[0]), to=TensorProto.FLOAT)
    return {0: graph.emit("Mul", site.gradient, is_inside)}


def sqrt(site: Site) -> Gradients:
    """1 / (2 Y)."""
    site.attributes()
    half = site.graph.emit("Mul", site.gradient, site.graph.real(0.5))
    return {0: site.graph.emit("Div", half, site.node.output[0])}


def exp(site: Site) -> Gradients:
    """Y."""
    site.attributes()
    return {0: site.graph.emit("Mul", site.gradient, site.node.output[0])}


def erf(site: Site) -> Gradients:
    """2 / sqrt(pi) exp(-X^2)."""
    site.attributes()
    graph, source = site.graph, site.node.input[0]
    # The factor in the exponent, next to the sign, saves a pass over the tensor.
    exponent = graph.emit("Sub", graph.real(math.log(2 / math.sqrt(math.pi))), graph.emit("Mul", source, source))
    return {0: graph.emit("Mul", site.gradient, graph.emit("Exp", exponent))}


def power(site: Site) -> Gradients:
    """Y = X^p with a constant number p: p X^(p - 1)."""
    site.attributes()
    graph, (source, exponent) = site.graph, site.node.input
    value = graph.constants.get(exponent)
    if value is None or value.size != 1 or value.ndim > site.rank(source):
        raise site.unsupported(
            "an exponent that is not one constant number", "store it as a scalar in a Constant node, or multiply instead"
        )
    p = float(value.item())
    slope = source if p == 2 else graph.emit("Pow", source, graph.real(p - 1))
    return {0: graph.emit("Mul", graph.emit("Mul", site.gradient, slope), graph.real(p))}


def _back(site: Site, gradient: str, index: int) -> str:
    """A gradient shaped like the output, brought to the shape of one operand."""
    return reduce_to(site, gradient, site.node.output[0], site.node.input[index])


def _chosen(site: Site, *comparisons: str) -> Gradients:
    """The gradient by which operand was taken; `comparisons` are true where the first was, and where the second was."""
    site.attributes()
    if len(site.node.input) != 2:
        raise site.unsupported(f"{len(site.node.input)} operands", "compare two at a time")
    graph, names = site.graph, site.node.input
    won, lost = (graph.emit("Cast", graph.emit(op, *names), to=TensorProto.FLOAT) for op in comparisons)
    half = graph.emit("Mul", site.gradient, graph.real(0.5))
    lean = graph.emit("Mul", half, graph.emit("Sub", won, lost))
    shares = {0: "Add", 1: "Sub"}
    return {index: _back(site, graph.emit(shares[index], half, lean), index) for index in site.wanted}


def _above_0(site: Site, above: str, slope: str) -> str:
    """`above` where the input is positive, `slope` times the gradient elsewhere."""
    graph = site.graph
    is_positive = graph.emit("Greater", site.node.input[0], graph.real(0))
    return graph.emit("Where", is_positive, above, graph.emit("Mul", site.gradient, slope))


def _where_not_zero(site: Site, gradient: str, gate: str) -> str:
    is_open = site.graph.emit("Cast", site.graph.emit("Cast", gate, to=TensorProto.BOOL), to=TensorProto.FLOAT)
    return site.graph.emit("Mul", gradient, is_open)


def _y_times_1_minus_y(site: Site) -> str:
    y = site.node.output[0]
    return site.graph.emit("Mul", y, site.graph.emit("Sub", site.graph.real(1), y))
