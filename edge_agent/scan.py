"""Reads what must be known of an ONNX file before onnxruntime sees it, without onnx: a walk over the few protobuf fields that matter.

Programs and models come over the network and are untrusted: whatever our exporter never writes is refused (tensors in other files, control
flow, functions, operators outside ai.onnx), so that none can read a file of the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from regrow.errors import PeerError
from regrow.programs import IN_ORDER

_TENSOR, _ATTRIBUTE, _NODE, _GRAPH, _MODEL = "tensor", "attribute", "node", "graph", "model"

_CHILDREN: dict[tuple[str, int], str] = {
    (_MODEL, 7): _GRAPH,
    (_GRAPH, 1): _NODE,
    (_GRAPH, 5): _TENSOR,
    (_NODE, 5): _ATTRIBUTE,
    (_ATTRIBUTE, 5): _TENSOR,
    (_ATTRIBUTE, 10): _TENSOR,
}
"""Field numbers of onnx.proto that lead to something that must be scanned."""

_REFUSED: dict[tuple[str, int], str] = {
    (_MODEL, 20): "training information",
    (_MODEL, 25): "functions",
    (_GRAPH, 15): "sparse tensors",
    (_ATTRIBUTE, 6): "a subgraph",
    (_ATTRIBUTE, 11): "subgraphs",
    (_ATTRIBUTE, 22): "a sparse tensor",
    (_ATTRIBUTE, 23): "sparse tensors",
    (_TENSOR, 13): "a tensor in another file",
}


def scan_program(name: str, program: bytes) -> None:
    """Return if the program holds only what our exporter writes.

    Raises:
        PeerError: it is not well-formed protobuf, refers to files, or has control flow, functions, sparse tensors or
            foreign operators.

    Source: onnx/onnx.proto and the protobuf wire format. Differs from a parser in looking at the fields above only.
    """
    pending = [(_MODEL, memoryview(program))]
    while pending:
        kind, message = pending.pop()
        for number, value in _fields(name, message):
            if (kind, number) in _REFUSED:
                raise PeerError(f"program {name!r} contains {_REFUSED[kind, number]}, which no program of ours does")
            if kind == _TENSOR and number == 14 and value != 0:
                raise PeerError(f"program {name!r} contains a tensor in another file, which no program of ours does")
            child = _CHILDREN.get((kind, number))
            if isinstance(value, int):
                if child:
                    raise PeerError(f"program {name!r} is malformed: field {number} of a {kind} is a number")
                continue
            if kind == _NODE and number == 7 and bytes(value) not in (b"", b"ai.onnx"):
                raise PeerError(f"program {name!r} uses an operator outside ai.onnx, which no program of ours does")
            if child:
                pending.append((child, value))


def asks_for_order(name: str, program: bytes) -> bool:
    """Whether a program that has been scanned says in its metadata that its nodes shall run as they stand in it."""
    entries = [value for number, value in _fields(name, memoryview(program)) if number == 14 and not isinstance(value, int)]
    keys = [value for entry in entries for number, value in _fields(name, entry) if number == 1 and not isinstance(value, int)]
    return IN_ORDER.encode() in map(bytes, keys)


def _fields(name: str, message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, number or bytes) of each field of one protobuf message."""
    at = 0
    while at < len(message):
        key, at = _varint(name, message, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(name, message, at)
            yield key >> 3, value
            continue
        if wire_type == 2:
            length, at = _varint(name, message, at)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise PeerError(f"program {name!r} is malformed: protobuf wire type {wire_type}")
        if length > len(message) - at:
            raise PeerError(f"program {name!r} is malformed: a field of {length} bytes runs past its end")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(name: str, message: memoryview, at: int) -> tuple[int, int]:
    """(value, position after it) of the varint at `at`."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise PeerError(f"program {name!r} is malformed: a number runs past its end")


# ---- tokens ------------------------------------------------------------------------------------------------------------------------

_SAME_ROWS = ("Identity", "Cast", "DequantizeLinear")
_SAME_NUMBERS = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose")


def vocabulary(name: str, program: bytes, source: str, rows: Mapping[str, int]) -> int:
    """How many tokens the tables know that the input indexes: the rows of the smallest; 0 where it indexes none directly.

    Args:
        name: of the program, for errors.
        program: scanned.
        source: the name of the input.
        rows: of the program's other inputs, the size of the first axis; the tables among them are parameters.

    Raises:
        PeerError: it is not well-formed protobuf.
    """
    rows, tokens, found = dict(rows), {source}, list[int]()
    for graph in _of(name, memoryview(program), 7):
        for tensor in _of(name, graph, 5):
            size = next(_numbers(name, tensor, 1), None)
            if size is not None:
                rows |= {_text(label): size for label in _of(name, tensor, 8)}
        for node in _of(name, graph, 1):
            inputs, outputs = ([_text(value) for value in _of(name, node, number)] for number in (1, 2))
            op = "".join(_text(value) for value in _of(name, node, 4))
            if op == "Gather" and len(inputs) == 2 and inputs[1] in tokens and inputs[0] in rows and not _axis(name, node):
                found.append(rows[inputs[0]])
            elif op in _SAME_ROWS and inputs[:1] and inputs[0] in rows:
                rows |= dict.fromkeys(outputs, rows[inputs[0]])
            if op in _SAME_NUMBERS and inputs[:1] and inputs[0] in tokens:
                tokens.update(outputs)
    return min(found, default=0)


def _axis(name: str, node: memoryview) -> int:
    """The attribute of a Gather, 0 where it is left out."""
    attributes = (attribute for attribute in _of(name, node, 5) if [_text(label) for label in _of(name, attribute, 1)] == ["axis"])
    return next((value for attribute in attributes for value in _numbers(name, attribute, 3)), 0)


def _of(name: str, message: memoryview, field: int) -> Iterator[memoryview]:
    return (value for number, value in _fields(name, message) if number == field and not isinstance(value, int))


def _numbers(name: str, message: memoryview, field: int) -> Iterator[int]:
    """The whole numbers of a field, packed or not."""
    for number, value in _fields(name, message):
        if number != field:
            continue
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            found, at = _varint(name, value, at)
            yield found


def _text(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "replace")
