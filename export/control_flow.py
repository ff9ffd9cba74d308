"""Nodes that carry graphs of their own (If, Loop, Scan): a trained graph has none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from regrow.errors import LocalError, shortened

CURES = {"If": "export one branch", "Loop": "unroll the loop", "Scan": "unroll the loop"}


@dataclass(frozen=True)
class Carrier:
    """A node with graphs of its own. where: the nodes that hold it, from the outermost; () in the model's own graph."""

    node: onnx.NodeProto
    where: tuple[str, ...]

    @property
    def refusal(self) -> str:
        """Why it cannot be trained, and what to do."""
        op, name = self.node.op_type, shortened(self.node.name)
        held = "".join(f" inside {holder}" for holder in reversed(self.where))
        cure = CURES.get(op, "write it with ops that have no graph of their own")
        return f"cannot train {op} (node {name!r}{held}): it carries a graph of its own, and a trained graph has no control flow; {cure}"


def carriers(graph: onnx.GraphProto, where: tuple[str, ...] = ()) -> Iterator[Carrier]:
    """Every such node of a graph, and of the graphs within."""
    for node in graph.node:
        inner = graphs_of(node)
        if inner:
            yield Carrier(node, where)
        for part in inner:
            yield from carriers(part, (*where, f"{node.op_type} {shortened(node.name)!r}"))


def graphs_of(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs that a node carries."""
    kinds = onnx.AttributeProto
    found = [[item.g] if item.type == kinds.GRAPH else item.graphs if item.type == kinds.GRAPHS else [] for item in node.attribute]
    return [graph for graphs in found for graph in graphs]


def refuse_control_flow(graph: onnx.GraphProto) -> None:
    """Raises LocalError for the first of them, naming it and the cure."""
    first = next(carriers(graph), None)
    if first is not None:
        raise LocalError(first.refusal)
