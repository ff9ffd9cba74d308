"""Gradients of LSTM and GRU over a fixed number of steps.

The forward node stays what it is, for onnxruntime has a fast kernel for it. It gives out every h, so all gates are computed again in one
matrix product over all steps, and only what truly waits for the step before is unrolled: the cells, and the gradient of h. In between,
*rows* are [steps * batch, ...], steps in the order of the data.

Source: Hochreiter and Schmidhuber, "Long Short-Term Memory" (Neural Computation 9, 1997), and Cho et al. (arXiv 1406.1078), in the form of
onnx/docs/Operators.md; back-propagation through time with everything taken out of the loop that can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from export.emitter import Emitter
from export.forward import Forward
from export.gradients import Gradient, Site

_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}


@dataclass(frozen=True)
class _Pass:
    """One direction of a node: names of its values.

    Attributes:
        order: the steps as they are taken.
        x: rows of inputs; before: rows of h before each step.
        w, r: [gates * hidden, inputs or hidden].
        bias_w, bias_r: [gates * hidden], or "".
        zeros: [batch, hidden].
        cell: c before the first step, [batch, hidden], or "".
        h: gradient of h after each step, by step, as far as it comes from outside; "" where there is none.
        last_cell: gradient of the last c, or "".
    """

    order: Sequence[int]
    x: str
    before: str
    w: str
    r: str
    bias_w: str
    bias_r: str
    zeros: str
    cell: str
    h: Sequence[str]
    last_cell: str


@dataclass(frozen=True)
class _Back:
    """Gradients of one direction: rows of those before the activations, of the input's part and of h's part; of the first h and c."""

    inputs: str
    states: str
    first_h: str
    first_cell: str = ""


def lstm(site: Site) -> dict[int, Gradient]:
    """By X, W, R, B and the initial states; any of the three outputs may be in use."""
    return _differentiated(site, _lstm_pass)


def gru(site: Site) -> dict[int, Gradient]:
    """By X, W, R, B and the initial state, with linear_before_reset = 1 as torch has it."""
    return _differentiated(site, _gru_pass)


def recurrent_biases(forward: Forward) -> set[str]:
    """Parameters that are biases though they have two axes, [directions, ...]: of every sub-model, as other biases."""
    nodes = (node for node in forward.nodes if node.op_type in _ACTIVATIONS and len(node.input) > 3)
    return {node.input[3] for node in nodes if node.input[3] in forward.parameters}


# ---- the node ------------------------------------------------------------------------------------------------------------------------


def _differentiated(site: Site, backward: Callable[[Emitter, _Pass], _Back]) -> dict[int, Gradient]:
    directions = _checked(site)
    graph, count = site.graph, len(directions)
    passes = _passes(site, directions)
    backs = [backward(graph, each) for each in passes]
    gradients: dict[int, Gradient] = {}
    if 0 in site.wanted:
        parts = [graph.emit("Gemm", back.inputs, each.w) for each, back in zip(passes, backs, strict=True)]
        gradients[0] = graph.reshape_like(parts[0] if count == 1 else graph.emit("Add", *parts), site.node.input[0])
    if 1 in site.wanted:
        products = [graph.emit("Gemm", back.inputs, each.x, transA=1) for each, back in zip(passes, backs, strict=True)]
        gradients[1] = _stacked(graph, products)
    if 2 in site.wanted:
        products = [graph.emit("Gemm", back.states, each.before, transA=1) for each, back in zip(passes, backs, strict=True)]
        gradients[2] = _stacked(graph, products)
    if 3 in site.wanted:
        gradients[3] = _stacked(graph, [_bias(graph, back) for back in backs])
    if 5 in site.wanted:
        gradients[5] = _stacked(graph, [back.first_h for back in backs])
    if 6 in site.wanted:
        gradients[6] = _stacked(graph, [back.first_cell for back in backs])
    return gradients


def _checked(site: Site) -> list[bool]:
    """Whether each direction runs backwards; LocalError for what the rule does not cover."""
    op, names = site.node.op_type, {item.name for item in site.node.attribute}
    known = {"hidden_size": 0, "direction": "forward", "activations": None, "layout": 0, "input_forget": 0, "linear_before_reset": 0}
    if "clip" in names:
        raise site.unsupported("attribute 'clip'", "leave it out")
    found = site.attributes(**known)
    directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[found["direction"]]
    given = [name.decode() for name in found["activations"] or ()]
    if given not in ([], _ACTIVATIONS[op] * len(directions)):
        raise site.unsupported(f"activations {given}", f"use {_ACTIVATIONS[op]}")
    if found["layout"] or found["input_forget"]:
        raise site.unsupported("layout = 1" if found["layout"] else "input_forget", "leave it at 0, and transpose outside of the node")
    if op == "GRU" and not found["linear_before_reset"]:
        raise site.unsupported("linear_before_reset = 0", "use 1, as torch does")
    inputs = [*site.node.input, *[""] * 8]
    if inputs[4]:
        raise site.unsupported("sequence lengths that vary (sequence_lens)", "leave the input out: every sequence has the full length")
    if inputs[7]:
        raise site.unsupported("peepholes (input P)", "leave them out")
    return directions


def _passes(site: Site, directions: Sequence[bool]) -> list[_Pass]:
    graph, count = site.graph, len(directions)
    x, w, r, bias, _, first_h, first_cell = [*site.node.input, *[""] * 4][:7]
    shape = graph.static_shape(x)
    if shape is None or shape[0] is None or shape[2] is None:
        raise site.unsupported("a sequence length that is only known at run time", "fix every axis but the batch")
    steps, hidden = shape[0], site.fixed_size(r, 2)
    y = site.output(0)
    zeros = graph.emit("Expand", graph.real(0), graph.emit("Shape", y, start=2))
    rows = graph.emit("Reshape", x, graph.integers(-1, shape[2]))
    of_y, of_h, of_cell = (*site.gradients, None, None, None)[:3]

    def apart(name: str | None, axis: int = 0) -> list[str]:
        return _apart(graph, name, axis, count)

    values = zip(apart(w), apart(r), apart(bias), apart(first_h), apart(first_cell), apart(y, 1), strict=True)
    ends = zip(apart(of_y, 1), apart(of_h), apart(of_cell), strict=True)
    passes = []
    for is_reverse, value, (every, last, last_cell) in zip(directions, values, ends, strict=True):
        one_w, one_r, one_bias, h0, c0, one_y = value
        order = range(steps - 1, -1, -1) if is_reverse else range(steps)
        bias_w, bias_r = graph.emit_all("Split", one_bias, outputs=2, num_outputs=2) if one_bias else ("", "")
        before = _states_before(graph, one_y, h0 or zeros, order, hidden)
        h = _h_from_outside(graph, every, last, order, hidden)
        passes.append(_Pass(order, rows, before, one_w, one_r, bias_w, bias_r, zeros, c0, h, last_cell))
    return passes


def _apart(graph: Emitter, name: str | None, axis: int, count: int) -> list[str]:
    """The parts of each direction, without the axis of directions; "" for what is not there."""
    if not name:
        return [""] * count
    parts = [name] if count == 1 else graph.emit_all("Split", name, outputs=count, axis=axis, num_outputs=count)
    return [graph.emit("Squeeze", part, graph.integers(axis)) for part in parts]


def _states_before(graph: Emitter, y: str, first: str, order: range, hidden: int) -> str:
    """Rows of h before each step, of all h after each step, [steps, batch, hidden], and the first one, [batch, hidden]."""
    if len(order) == 1:
        return first
    one, end = graph.integers(0), graph.integers(len(order))
    inner = (one, graph.integers(len(order) - 1)) if order.step == 1 else (graph.integers(1), end)
    others = graph.emit("Reshape", graph.emit("Slice", y, *inner, one), graph.integers(-1, hidden))
    return graph.emit("Concat", *((first, others) if order.step == 1 else (others, first)), axis=0)


def _h_from_outside(graph: Emitter, every: str, last: str, order: range, hidden: int) -> list[str]:
    h = [""] * len(order)
    if every:
        h = _steps(graph, graph.emit("Reshape", every, graph.integers(-1, hidden)), len(order))
    if last:
        h[order[-1]] = graph.emit("Add", last, h[order[-1]]) if every else last
    return h


def _backwards(p: _Pass) -> Iterable[tuple[int, str]]:
    """The steps from the last one taken to the first, each with the gradient from outside of the h before it."""
    order = [*reversed(p.order)]
    return zip(order, [*(p.h[step] for step in order[1:]), ""], strict=True)


def _steps(graph: Emitter, rows: str, steps: int) -> list[str]:
    """[batch, ...] of each step."""
    return [rows] if steps == 1 else graph.emit_all("Split", rows, outputs=steps, num_outputs=steps)


def _rows(graph: Emitter, steps: Sequence[str]) -> str:
    return steps[0] if len(steps) == 1 else graph.emit("Concat", *steps, axis=0)


def _parts(graph: Emitter, rows: str, count: int) -> list[str]:
    """The gates side by side in rows."""
    return graph.emit_all("Split", rows, outputs=count, axis=1, num_outputs=count)


def _stacked(graph: Emitter, parts: Sequence[str]) -> str:
    """With an axis of directions in front."""
    whole = [graph.emit("Unsqueeze", part, graph.integers(0)) for part in parts]
    return whole[0] if len(whole) == 1 else graph.emit("Concat", *whole, axis=0)


def _bias(graph: Emitter, back: _Back) -> str:
    first = graph.emit("ReduceSum", back.inputs, graph.integers(0), keepdims=0)
    if back.states == back.inputs:
        return graph.emit("Concat", first, first, axis=0)
    return graph.emit("Concat", first, graph.emit("ReduceSum", back.states, graph.integers(0), keepdims=0), axis=0)


def _gemm(graph: Emitter, rows: str, weight: str, added: str) -> str:
    return graph.emit("Gemm", rows, weight, *([added] if added else []), transB=1)


def _one_less(graph: Emitter, value: str) -> str:
    return graph.emit("Sub", graph.real(1), value)


def _bell(graph: Emitter, value: str) -> str:
    """s (1 - s), the slope of a sigmoid."""
    return graph.emit("Mul", value, _one_less(graph, value))


def _tanh_slope(graph: Emitter, value: str) -> str:
    return _one_less(graph, graph.emit("Mul", value, value))


# ---- LSTM ----------------------------------------------------------------------------------------------------------------------------


def _lstm_pass(graph: Emitter, p: _Pass) -> _Back:
    """c = f c' + i g and h = o tanh(c), with i, o, f = sigmoid and g = tanh of W x + R h' + the biases, in ONNX's order i, o, f, g."""
    steps = len(p.order)
    bias = graph.emit("Add", p.bias_w, p.bias_r) if p.bias_w else ""
    gates = _parts(graph, _gemm(graph, p.before, p.r, _gemm(graph, p.x, p.w, bias)), 4)
    i, o, f = (graph.emit("Sigmoid", gate) for gate in gates[:3])
    g = graph.emit("Tanh", gates[3])
    cells, before = _cells(graph, p, f, graph.emit("Mul", i, g))
    t = graph.emit("Tanh", cells)
    # Everything that the gradients of c and h are multiplied with: by c through h, and before the activations of i, o, f, g.
    by_cell = _steps(graph, graph.emit("Mul", o, _tanh_slope(graph, t)), steps)
    factors = [(g, _bell(graph, i)), (t, _bell(graph, o)), (before, _bell(graph, f)), (i, _tanh_slope(graph, g))]
    slopes = _steps(graph, graph.emit("Concat", *(graph.emit("Mul", *pair) for pair in factors), axis=1), steps)
    forget = _steps(graph, f, steps)
    found = [""] * steps
    cell, h = p.last_cell, p.h[p.order[-1]] or p.zeros
    for step, outside in _backwards(p):
        through = graph.emit("Mul", h, by_cell[step])
        cell = graph.emit("Add", cell, through) if cell else through
        found[step] = graph.emit("Mul", graph.emit("Concat", cell, h, cell, cell, axis=1), slopes[step])
        h = graph.emit("Gemm", found[step], p.r, *([outside] if outside else []))
        cell = graph.emit("Mul", cell, forget[step])
    rows = _rows(graph, found)
    return _Back(rows, rows, h, cell)


def _cells(graph: Emitter, p: _Pass, forget: str, entering: str) -> tuple[str, str]:
    """Rows of c after each step, and before it."""
    steps = len(p.order)
    kept, new = _steps(graph, forget, steps), _steps(graph, entering, steps)
    after, before = [""] * steps, [""] * steps
    cell = p.cell
    for step in p.order:
        before[step] = cell or p.zeros
        after[step] = cell = graph.emit("Add", graph.emit("Mul", kept[step], cell), new[step]) if cell else new[step]
    return _rows(graph, after), _rows(graph, before)


# ---- GRU -----------------------------------------------------------------------------------------------------------------------------


def _gru_pass(graph: Emitter, p: _Pass) -> _Back:
    """h = (1 - z) n + z h', with z, r = sigmoid(W x + R h') and n = tanh(W x + r q), q = R h', the biases with their products."""
    steps = len(p.order)
    of_x, of_h = (_parts(graph, _gemm(graph, *product), 3) for product in ((p.x, p.w, p.bias_w), (p.before, p.r, p.bias_r)))
    z, r = (graph.emit("Sigmoid", graph.emit("Add", of_x[gate], of_h[gate])) for gate in (0, 1))
    q = of_h[2]
    n = graph.emit("Tanh", graph.emit("Add", of_x[2], graph.emit("Mul", r, q)))
    by_z = graph.emit("Mul", graph.emit("Sub", p.before, n), _bell(graph, z))
    by_n = graph.emit("Mul", _one_less(graph, z), _tanh_slope(graph, n))
    by_r = graph.emit("Mul", by_n, graph.emit("Mul", q, _bell(graph, r)))
    slopes = graph.emit("Concat", by_z, by_r, graph.emit("Mul", by_n, r), axis=1)
    slope, update = _steps(graph, slopes, steps), _steps(graph, z, steps)
    found, states = [""] * steps, [""] * steps
    h = p.h[p.order[-1]] or p.zeros
    for step, outside in _backwards(p):
        states[step] = h
        found[step] = graph.emit("Mul", graph.emit("Concat", h, h, h, axis=1), slope[step])
        kept = graph.emit("Mul", h, update[step])
        h = graph.emit("Gemm", found[step], p.r, graph.emit("Add", kept, outside) if outside else kept)
    of_states = _rows(graph, found)
    # What enters n through W x has no r before it.
    of_z, of_r, _ = _parts(graph, of_states, 3)
    of_inputs = graph.emit("Concat", of_z, of_r, graph.emit("Mul", _rows(graph, states), by_n), axis=1)
    return _Back(of_inputs, of_states, h)
