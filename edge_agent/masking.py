"""Masked training with the plain program: what it moves outside the mask is put back after every step.

Against masks in the program (`train_masked`) this lets the update ride on the gradient's own matrix product, and spares one more set of
parameters; which of the two is faster depends on the model and the board (edge_agent.tuning).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def held_values(parameters: Arrays, masks: Arrays) -> dict[str, NDArray[Any]]:
    """The parameters outside the masks, by mask, 0 inside; only where one is not 0, of which a sub-model has none.

    Args:
        parameters: float32, by name.
        masks: float32, 0 or 1, by `mask:<parameter>`.
    """
    held = {name: np.where(mask, 0, parameters[name.removeprefix("mask:")]) for name, mask in masks.items()}
    return {name: values for name, values in held.items() if values.any()}


def put_back(moved: Arrays, masks: Arrays, held: Arrays) -> None:
    """Give `moved` its held values again, in place."""
    for name, mask in masks.items():
        values = moved[name.removeprefix("mask:")]
        np.multiply(values, mask, out=values)  # an assignment by a mask takes several times as long
        if name in held:
            values += held[name]
