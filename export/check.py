"""Can this model be trained on a device, and what does it cost there? `regrow model check`, apart from how it is told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from export.batch_norm import with_batch_statistics
from export.control_flow import carriers, graphs_of
from export.emitter import Emitter
from export.forward import Forward, read_forward
from export.gradients import Gradient, Rule, Site, cannot_train, differentiate
from export.losses import check_step
from export.lowering import REPLACED
from export.memory import step_memory
from export.programs import initial_vector
from export.rules import CURES, RULES
from export.storage import float16_programs
from export.timing import medians_s, random_feed, session_of
from export.units import find_units
from regrow import indexset, values
from regrow.errors import LocalError, shortened
from regrow.local_step import step_of
from regrow.order import Order
from regrow.parameters import Layout
from regrow.programs import FLOAT16, variant
from regrow.step_memory import SCORED_AT_ONCE, JobBytes
from regrow.task import DEFAULT_TRAINING, Training
from regrow.values import WireDtype

DTYPES: tuple[WireDtype, ...] = get_args(WireDtype)
_NO_NUMBERS = frozenset({"Constant", "Shape", "Size"})
"""Operators that no gradient passes, whatever their input."""
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "GRU", "Gemm", "LSTM", "MatMul", "RNN"})
"""Operators whose second and further inputs are weights, as a rule."""


@dataclass(frozen=True)
class Problem:
    """One reason why a model cannot be trained, with its cure; `op` and `node` are "" where it is not about a node."""

    message: str
    op: str = ""
    node: str = ""


@dataclass(frozen=True)
class Level:
    """What a level is on the wire: its parameters, the bytes of its index sets (down, once an epoch, those of lower levels included), and
    the payload of one update in every dtype."""

    density: float
    parameters: int
    index_bytes: int
    update_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Step:
    """One training step of a program. `seconds`: median by number of threads; empty where it was not run, and `skipped` says why.
    `memory_float16_bytes`: with float16 storage; None where that is not published, since it saves too little."""

    program: str
    parameters: int
    batch: int
    memory_bytes: int | None
    seconds: Mapping[int, float]
    skipped: str = ""
    memory_float16_bytes: int | None = None


# ---- operators -----------------------------------------------------------------------------------------------------------------------


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes of each operator there are, the most frequent first; foreign domains in front of the name."""
    return dict(Counter(_op(node) for node in model.graph.node).most_common())


def trainable_operators() -> list[str]:
    """Those that have a gradient rule, or are rewritten into such, by name."""
    return sorted(RULES.keys() | REPLACED)


def problems_of(model: onnx.ModelProto, training: Training = DEFAULT_TRAINING, *, units: bool = False) -> list[Problem]:
    """All that speaks against training this model, [] if nothing does.

    Where the model can be read at all, every node is tried that a gradient must pass, not only the first that has no rule. What is tried
    is what programs are made of: in the terms of their opset, with the statistics of the batch.

    Args:
        training: of which the step and train_last count.
        units: whether it shall also be cut into sub-models of whole units.
    """
    if inner := list(_within(model)):
        return inner
    try:
        forward = read_forward(model, training.train_last)
        trained = with_batch_statistics(forward)
    except LocalError as error:
        return [*_foreign(model), Problem(str(error))]
    found: list[Problem] = []
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in trained.program_nodes]
    for node in nodes:
        node.domain = ""  # a foreign operator has no rule either, and then comes to _Rules like any other
    graph = Emitter(nodes, dict(trained.constants), trained.shapes)
    try:
        differentiate(graph, _Rules(trained, found), list(trained.parameters), trained.logits, trained.logits)
    except LocalError as error:
        found.append(Problem(str(error)))
    try:
        check_step(step_of(training), forward)
        initial_vector(model, training.train_last)
        if units and not found:
            find_units(model)
    except LocalError as error:
        found.insert(0, Problem(str(error)))
    return found[::-1]  # the walk is backward; a reader begins in front


def notes_of(model: onnx.ModelProto, loss: str) -> list[str]:
    """What does not keep a model from being trained, and may not be what its maker meant."""
    made = {name: node for node in model.graph.node for name in node.output}
    last = made.get(model.graph.output[0].name)
    while last is not None and last.op_type == "Identity":
        last = made.get(last.input[0])
    said = []
    if last is not None and last.op_type == "Softmax" and loss == "cross_entropy":
        said.append(
            "the output is a Softmax already, and the loss cross_entropy applies another, with which a model learns slowly: "
            "export it without its last Softmax"
        )
    weighted = {name for node in model.graph.node if node.op_type in _WEIGHTED for name in node.input[1:]}
    fixed = [node for name, node in made.items() if name in weighted and node.op_type == "Constant" and _is_real(node)]
    if fixed:
        named = ", ".join(repr(shortened(node.output[0])) for node in fixed[:3]) + (" and others" if len(fixed) > 3 else "")
        said.append(
            f"weights in Constant nodes stay as they are: {named}; to train them too, export with weights as initializers "
            "(of a torch module: let them require a gradient)"
        )
    return said


def _is_real(node: onnx.NodeProto) -> bool:
    return any(item.name == "value" and item.t.data_type == onnx.TensorProto.FLOAT for item in node.attribute)


class _Rules(dict[str, Rule]):
    """A rule for everything: where there is no real one, or it refuses, that is noted and the walk goes on with some value of the right
    shape in the gradient's place (the input itself)."""

    def __init__(self, forward: Forward, found: list[Problem]) -> None:
        super().__init__(RULES)
        self._shapes = forward.shapes
        self._foreign = {node.output[0]: node for node in forward.program_nodes if node.domain not in ("", "ai.onnx")}
        self._found = found

    def __contains__(self, op: object) -> bool:
        return True

    def __getitem__(self, op: str) -> Rule:
        return partial(self._try, op)

    def _try(self, op: str, site: Site) -> Mapping[int, Gradient]:
        node = self._foreign.get(site.node.output[0], site.node)
        try:
            if op in RULES and node is site.node:
                return RULES[op](site)
            raise cannot_train(node, f"has no gradient rule; {_cure(node)}")
        except LocalError as error:
            known = all(name in self._shapes for name in (*node.input, *node.output) if name)
            if known or op not in RULES or node is not site.node or not self._foreign:  # else it only lacks a foreign operator's shape
                self._found.append(Problem(str(error), _op(node), node.name))
        return {index: site.node.input[index] for index in site.wanted}


def _cure(node: onnx.NodeProto) -> str:
    if node.domain not in ("", "ai.onnx"):
        return "export the model before it is optimised for a runtime, in plain ai.onnx operators"
    return CURES.get(node.op_type) or "replace it by operators that have one or add a rule in export/rules.py"


def _foreign(model: onnx.ModelProto) -> Iterator[Problem]:
    """Nodes of a model that cannot be read: those whose operator has no rule and that compute with a float32 weight."""
    active = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    for node in model.graph.node:
        if not active.intersection(node.input) or node.op_type in _NO_NUMBERS:
            continue
        active.update(node.output)
        if not _has_rule(node):
            yield Problem(str(cannot_train(node, f"has no gradient rule; {_cure(node)}")), _op(node), node.name)


def _within(model: onnx.ModelProto) -> Iterator[Problem]:
    """Control flow, each with the operators of its graphs that have no rule either; then those beside it."""
    found = list(carriers(model.graph))
    if not found:
        return
    for carrier in found:
        yield Problem(carrier.refusal, _op(carrier.node), carrier.node.name)
        for node in (node for graph in graphs_of(carrier.node) for node in graph.node):
            if not graphs_of(node) and node.op_type not in _NO_NUMBERS and not _has_rule(node):
                why = f"inside {carrier.node.op_type} {shortened(carrier.node.name)!r}, has no gradient rule; {_cure(node)}"
                yield Problem(str(cannot_train(node, why)), _op(node), node.name)
    yield from (problem for problem in _foreign(model) if problem.op not in {_op(carrier.node) for carrier in found})


def _has_rule(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and (node.op_type in RULES or node.op_type in REPLACED)


def _op(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def held_by(programs: Mapping[str, bytes]) -> dict[str, int]:
    """Numbers that a device holds beside the full model's parameters: the optimizer's `state`, FedProx' `anchors`, batch normalisation's
    `statistics`, and the program's float32 `constants` (of layers that are not trained, above all)."""
    train = onnx.ModelProto.FromString(programs["train"])
    scored = onnx.ModelProto.FromString(programs["evaluate"])
    return {
        "state": _numbers(train, "state:"),
        "anchors": _numbers(train, "anchor:"),
        "statistics": _numbers(scored, "stat:"),
        "constants": sum(math.prod(t.dims) for t in train.graph.initializer if t.data_type == onnx.TensorProto.FLOAT),
    }


def _numbers(program: onnx.ModelProto, prefix: str) -> int:
    shapes = [value.type.tensor_type.shape.dim for value in program.graph.input if value.name.startswith(prefix)]
    return sum(math.prod(dim.dim_value for dim in shape) for shape in shapes)


# ---- the wire ------------------------------------------------------------------------------------------------------------------------


def levels_of(order: Order, flat_weights: NDArray[np.float32], densities: Sequence[float]) -> list[Level]:
    """What every level's updates take, by encoding this model's own numbers.

    Args:
        flat_weights: float32 [n] by flat coordinate.
        densities: of the order's levels.
    """
    placed = flat_weights[order.coordinates]
    index_bytes = np.cumsum([len(payload) for payload in indexset.encode_levels(order)]).tolist()
    return [
        Level(density, length, index, {dtype: len(values.encode(placed[:length], dtype, order.always_kept)) for dtype in DTYPES})
        for density, length, index in zip(densities, order.lengths, index_bytes, strict=True)
    ]


def layers_kept(layout: Layout, order: Order) -> dict[str, list[float]]:
    """For every tensor, which share of it each level has."""
    positions = order.position_of
    shares = {}
    for tensor in layout.tensors:
        mine = np.sort(positions[layout.slices[tensor.name]])
        shares[tensor.name] = [float(np.searchsorted(mine, length)) / tensor.size for length in order.lengths]
    return shares


# ---- time and memory -----------------------------------------------------------------------------------------------------------------


def step_costs(
    programs: Mapping[str, bytes],
    order: Order,
    flat_weights: NDArray[np.float32],
    batches: Sequence[int],
    threads: Sequence[int],
    rounds: int,
    spare_bytes: int,
    most_s: float = 1.0,
) -> Iterator[Step]:
    """Memory and time of a step of every training program, at every batch size; yields as they are measured.

    The programs of a batch size take turns, so that their times can be compared; one by one where memory does not hold them all.

    Args:
        rounds: steps of which the median counts, at least three and no more than about `most_s` seconds of each; 0 runs none.
        spare_bytes: a step that may take more is not run.
    """
    works = _works(programs, order, flat_weights)
    for batch in batches:
        needs = [_job_bytes(work.job, batch) for work in works]
        fits = [need is None or need <= spare_bytes for need in needs]
        together = sum(need or 0 for need in needs) * len(threads) <= spare_bytes
        chosen = [work for work, fit in zip(works, fits, strict=True) if fit and rounds]
        took: dict[str, dict[int, float]] = {}
        for group in [chosen] if together else [[work] for work in chosen]:
            took |= _step_s(group, batch, threads, rounds, most_s)
        for work, need, fit in zip(works, needs, fits, strict=True):
            skipped = "" if fit else f"may need {need} bytes, {spare_bytes} are free here"
            yield Step(work.name, work.size, batch, need, took.get(work.name, {}), skipped, _job_bytes(work.float16_job, batch))


def _job_bytes(job: JobBytes | None, batch: int) -> int | None:
    return None if job is None else job.fixed + job.trained * batch + job.scored * SCORED_AT_ONCE


@dataclass(frozen=True, eq=False)
class _Work:
    """A training program with the weights of its level, and what its job takes, with float16 storage too where that is published."""

    name: str
    program: bytes
    parameters: Mapping[str, NDArray[np.float32]]
    size: int
    job: JobBytes | None
    float16_job: JobBytes | None


def _works(programs: Mapping[str, bytes], order: Order, flat_weights: NDArray[np.float32]) -> list[_Work]:
    """Of single weights the program of the full model and the one with masks; of whole units one for each level."""
    half = float16_programs(programs)
    memory = step_memory({**programs, **half})
    small = sum(name.startswith("train:") for name in programs)
    masked = "train_masked" in programs
    names = ["train", "train_masked"] if masked else [*(f"train:{level}" for level in range(small)), "train"]
    works = []
    for number, name in enumerate(names):
        level = name.partition(":")[2]
        coordinates = order.coordinates[: order.lengths[int(level)]] if level else order.coordinates
        layout = Layout.from_json(programs[f"layout:{level}" if level else "layout"])
        parameters = layout.unflatten(flat_weights[np.sort(coordinates)])
        place = 0 if masked else number
        job = memory.levels[place] if memory.levels else None
        float16_job = memory.float16[place] if memory.float16 and variant(name, FLOAT16) in half else None
        works.append(_Work(name, programs[name], parameters, coordinates.size, job, float16_job))
    return works


def _step_s(works: Sequence[_Work], batch: int, threads: Sequence[int], rounds: int, most_s: float) -> dict[str, dict[int, float]]:
    """Seconds of a step by program and number of threads."""
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for work in works:
        for count in threads:
            session = session_of(work.program, count)
            calls[work.name, count] = partial(session.run, None, random_feed(session, batch, work.parameters))
    found = dict(zip(calls, medians_s(list(calls.values()), rounds, most_s * len(calls)), strict=True))
    return {work.name: {count: found[work.name, count] for count in threads} for work in works}
