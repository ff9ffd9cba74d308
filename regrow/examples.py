"""What a program takes as examples: features, and the target that its loss compares with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow.errors import LocalError


@dataclass(frozen=True)
class Examples:
    """The form of one program's batches.

    Attributes:
        x_dtype: "float32", or "int64" for tokens.
        x_shape: of one example.
        y_dtype: "int64" for class numbers, "float32", or None where the target is x itself.
        y_shape: of one example's target; () with class numbers.
        classes: with class numbers, how many.
        tokens: with x of tokens, how many the model knows; 0: it does not say.
    """

    x_dtype: str
    x_shape: tuple[int, ...]
    y_dtype: str | None = "int64"
    y_shape: tuple[int, ...] = ()
    classes: int = 0
    tokens: int = 0

    def check(self, x: NDArray[Any], y: NDArray[Any], *, may_be_empty: bool = False, first: int = 0) -> None:
        """Refuse what is not a batch of this form; y is not looked at where the target is x.

        Args:
            x: [batch, *x_shape].
            y: [batch, *y_shape].
            may_be_empty: a batch of no examples will do.
            first: the number of the first example in what it was taken from.

        Raises:
            LocalError: which of the two is wrong, what it is, and what it must be.
        """
        wanted = f"{self.x_dtype} {_words('batch', self.x_shape)}"
        if not isinstance(x, np.ndarray) or x.dtype != self.x_dtype or not x.ndim or x.shape[1:] != self.x_shape:
            raise LocalError(f"x: expected {wanted}, got {described(x)}")
        if not len(x) and not may_be_empty:
            raise LocalError(f"x: expected {wanted} with at least one example, got none")
        check_tokens(x, self.tokens, first)
        if self.y_dtype is None:
            return
        if not isinstance(y, np.ndarray) or y.dtype != self.y_dtype or y.shape != (len(x), *self.y_shape):
            expected = f"{self.y_dtype} {_words(len(x), self.y_shape)}, as long as x"
            raise LocalError(f"y: expected {expected}, got {described(y)}{self._cure(y)}")
        check_labels(y, self.classes, first)

    def _cure(self, y: object) -> str:
        """What to do where y is of another kind than the loss of the task wants."""
        if not isinstance(y, np.ndarray) or y.dtype.kind == np.dtype(self.y_dtype).kind:
            return ""
        if y.dtype.kind == "i":
            return '; whole numbers are class labels: with those the task needs loss = "cross_entropy" in [training] of task.toml'
        return "; class labels are integers, the floats of other losses have the shape of the model's output"

    def target(self, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        """What outputs are compared with."""
        return x if self.y_dtype is None else y

    def padded(self, x: NDArray[Any], y: NDArray[Any], size: int) -> dict[str, NDArray[Any]]:
        """The feed of a batch of `size` examples, those that are missing all zero and of weight 0."""
        weight = np.zeros(size, np.float32)
        weight[: len(x)] = 1
        feed = {"x": _filled(x, size), "sample_weight": weight}
        return feed if self.y_dtype is None else feed | {"y": _filled(y, size)}


def check_labels(y: NDArray[Any], classes: int, first: int = 0) -> None:
    """Refuse labels that the task has no class for.

    Args:
        y: int64 [m].
        classes: how many there are; 0: nothing is looked at.
        first: the number of y[0] in what it was taken from.

    Raises:
        LocalError: which row, its label, and the labels that there are.
    """
    if not classes or not len(y) or (y.min() >= 0 and y.max() < classes):
        return
    place = int(np.flatnonzero((y < 0) | (y >= classes))[0])
    raise LocalError(f"row {first + place} (the first is 0): label {y[place]}, but the task's labels are 0 to {classes - 1}")


def check_tokens(x: NDArray[Any], tokens: int, first: int = 0) -> None:
    """Refuse tokens that the model does not know.

    Args:
        x: int64 [m, ...].
        tokens: how many it knows; 0: nothing is looked at.
        first: the number of x[0] in what it was taken from.

    Raises:
        LocalError: which row, the token, and the tokens that there are.
    """
    if not tokens or not x.size or (x.min() >= 0 and x.max() < tokens):
        return
    place = tuple(np.argwhere((x < 0) | (x >= tokens))[0].tolist())
    raise LocalError(f"row {first + place[0]} (the first is 0): token {x[place]}, but the model's tokens are 0 to {tokens - 1}")


def r_squared(squared_error: float, target: NDArray[Any]) -> float:
    """The coefficient of determination over all outputs together, cut to 0..1; NaN where the error is.

    1 - squared_error / (sum of squared distances of every output's targets from their mean). Where the targets do not vary: whether there
    is no error.

    Args:
        squared_error: summed over examples and outputs.
        target: [m, ...], m >= 1.
    """
    rows = target.reshape(len(target), -1)
    spread = float(((rows - rows.mean(0, dtype=np.float64)) ** 2).sum(dtype=np.float64))
    if not spread:
        return float(squared_error == 0)
    return float(np.clip(1 - squared_error / spread, 0.0, 1.0))


def described(value: object) -> str:
    """dtype and shape of an array, or what else it is."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _words(first: object, rest: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in (first, *rest)) + "]"


def _filled(array: NDArray[Any], size: int) -> NDArray[Any]:
    if len(array) == size:
        return array
    return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])
