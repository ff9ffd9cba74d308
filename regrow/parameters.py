"""The model's parameters as one flat float32 vector: which tensor lies where, and which is never pruned.

A *flat coordinate* is an index into this vector. Tensors follow each other in the order of the forward graph's
initializers, each row-major. Everything else in this room speaks of coordinates only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError, PeerError, shortened

MAX_COORDINATES = 2**31 - 1  # coordinates travel as uint32 and are counted in int64 sums without overflow
MAX_JSON_BYTES = 1024 * 1024
MAX_TENSORS = 10_000
MAX_NAME_CHARACTERS = 256
MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named tensor of the model; `always_kept` marks biases, normalisation weights and statistics.

    Raises:
        LocalError: the name is empty, too long or not printable, or a dimension is not positive.
    """

    name: str
    shape: tuple[int, ...]
    always_kept: bool = False

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > MAX_NAME_CHARACTERS or not self.name.isprintable():
            raise LocalError(f"tensor name {shortened(self.name)!r}: needs 1 to {MAX_NAME_CHARACTERS} printable characters")
        if len(self.shape) > MAX_DIMENSIONS or any(type(d) is not int or d <= 0 for d in self.shape):
            raise LocalError(f"tensor {self.name}: shape {self.shape} needs up to {MAX_DIMENSIONS} positive dimensions")
        if self.size > MAX_COORDINATES:
            raise LocalError(f"tensor {self.name}: {self.size} elements, at most {MAX_COORDINATES} are possible")

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The tensors of a model in their flat order.

    Raises:
        LocalError: no tensors, too many, two of one name, or more than 2**31 - 1 coordinates together.
    """

    tensors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.tensors) <= MAX_TENSORS:
            raise LocalError(f"layout: {len(self.tensors)} tensors, needs 1 to {MAX_TENSORS}")
        seen: set[str] = set()
        for tensor in self.tensors:
            if tensor.name in seen:
                raise LocalError(f"layout: two tensors are named {tensor.name!r}")
            seen.add(tensor.name)
        if self.size > MAX_COORDINATES:
            raise LocalError(f"layout: {self.size} coordinates, at most {MAX_COORDINATES} are possible")

    @cached_property
    def size(self) -> int:
        """n, the number of parameters of the full model."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each tensor lies in the flat vector."""
        slices: dict[str, slice] = {}
        start = 0
        for tensor in self.tensors:
            slices[tensor.name] = slice(start, start + tensor.size)
            start += tensor.size
        return slices

    @cached_property
    def always_kept_coordinates(self) -> NDArray[np.uint32]:
        """uint32, ascending: the flat coordinates that belong to every sub-model."""
        spans = [self.slices[tensor.name] for tensor in self.tensors if tensor.always_kept]
        pieces = [np.arange(span.start, span.stop, dtype=np.uint32) for span in spans]
        coordinates = np.concatenate(pieces) if pieces else np.empty(0, np.uint32)
        coordinates.setflags(write=False)
        return coordinates

    def flatten(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """All tensors copied into one vector.

        Args:
            arrays: float32, exactly the tensors of this layout in exactly their shapes.

        Returns:
            float32 [n].

        Raises:
            LocalError: a tensor is missing, unknown, of another shape or not float32.
        """
        unknown = sorted(arrays.keys() - self.slices.keys())
        if unknown:
            raise LocalError(f"flatten: no tensor {unknown[0]!r} in the layout")
        vector = np.empty(self.size, np.float32)
        for tensor in self.tensors:
            array = arrays.get(tensor.name)
            if array is None:
                raise LocalError(f"flatten: tensor {tensor.name!r} is missing")
            if array.dtype != np.float32 or array.shape != tensor.shape:
                raise LocalError(f"flatten: tensor {tensor.name!r} is {array.dtype}{array.shape}, not float32{tensor.shape}")
            vector[self.slices[tensor.name]] = array.reshape(-1)
        return vector

    def unflatten(self, vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Views into the vector, one per tensor, in the tensor's shape; writing to one writes to the vector.

        Args:
            vector: float32 [n], contiguous.

        Raises:
            LocalError: the vector is not contiguous float32 [n].
        """
        if vector.dtype != np.float32 or vector.shape != (self.size,) or not vector.flags.c_contiguous:
            raise LocalError(f"unflatten: {vector.dtype}{vector.shape}, not contiguous float32({self.size},)")
        return {tensor.name: vector[self.slices[tensor.name]].reshape(tensor.shape) for tensor in self.tensors}

    def to_json(self) -> bytes:
        """The layout as one line of JSON, the inverse of `from_json`.

        Raises:
            LocalError: the JSON would exceed the 1 MiB that `from_json` accepts.
        """
        tensors = [_TensorJson(tensor.name, tensor.shape, tensor.always_kept) for tensor in self.tensors]
        text = msgspec.json.encode(_LayoutJson(tensors))
        if len(text) > MAX_JSON_BYTES:
            raise LocalError(f"layout: {len(text)} bytes of JSON, at most {MAX_JSON_BYTES} may travel")
        return text

    @staticmethod
    def from_json(data: bytes) -> Layout:
        """The layout that `to_json` wrote.

        Raises:
            PeerError: anything is wrong with the bytes; the message names the place.
        """
        if len(data) > MAX_JSON_BYTES:
            raise PeerError(f"layout: {len(data)} bytes of JSON, at most {MAX_JSON_BYTES} are accepted")
        try:
            parsed = _layout_decoder.decode(data)
            return Layout(tuple(Tensor(entry.name, entry.shape, entry.always_kept) for entry in parsed.tensors))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, LocalError) as error:
            raise PeerError(f"layout: {error}") from error


_Dimension = Annotated[int, msgspec.Meta(ge=1, le=MAX_COORDINATES)]


class _TensorJson(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARACTERS)]
    shape: Annotated[tuple[_Dimension, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    always_kept: bool


class _LayoutJson(msgspec.Struct, forbid_unknown_fields=True):
    tensors: Annotated[list[_TensorJson], msgspec.Meta(min_length=1, max_length=MAX_TENSORS)]


_layout_decoder = msgspec.json.Decoder(_LayoutJson)
