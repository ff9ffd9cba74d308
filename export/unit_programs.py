"""Programs for sub-models of whole units: for every level a really smaller graph, so that a low density saves time and memory too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import onnx

from export.forward import read_forward
from export.programs import build_programs, layout_of
from export.slicing import sliced_model
from export.units import find_units
from export.ways import Ways
from regrow.errors import LocalError
from regrow.programs import VARIANT
from regrow.task import DEFAULT_TRAINING, Training
from regrow.unit_order import level_sizes, level_units

LEVEL_PROGRAMS = ("layout", "train", "evaluate", "statistics")


def build_unit_programs(
    model: onnx.ModelProto,
    densities: Sequence[float],
    training: Training = DEFAULT_TRAINING,
    others: Mapping[str, Ways] = MappingProxyType({}),
) -> dict[str, bytes]:
    """The programs of a model, as build_programs, with granularity "unit".

        layout, train, evaluate          of the full model; tensors that units are part of are not always kept
        statistics                       of the full model, and statistics:L, for models with BatchNormalization
        layout:L, train:L, evaluate:L    of level L, for all levels but the last: the sliced model, whichever its units are
        units                            JSON, regrow.units.Units
        train~NAME, train:L~NAME         the training programs in the other ways

    The flat vector of a sliced model is that of its coordinates in ascending order.

    Args:
        densities: of the levels, ascending, the last 1.0.
        training, others: as build_programs; all layers are trained.

    Raises:
        LocalError: as build_programs, or the model has no units that could be dropped (export.units.find_units); or not all layers are
            trained.
    """
    if training.train_last is not None:
        raise LocalError("train_last: whole units are of all layers; build for single weights")
    units = find_units(model)
    programs = dict(_kept(build_programs(model, units, training, others)))
    programs["units"] = units.to_json()
    layout = layout_of(read_forward(model), units)
    for level, sizes in enumerate(level_sizes(layout, units, densities)[:-1]):
        small = sliced_model(model, units, level_units(sizes))
        for name, program in _kept(build_programs(small, units, training, others)):
            kind, mark, way = name.partition(VARIANT)
            programs[f"{kind}:{level}{mark}{way}"] = program
    return programs


def _kept(built: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Those of LEVEL_PROGRAMS, in whichever way: sub-models of whole units need no masks."""
    for name, program in built.items():
        if name.partition(VARIANT)[0] in LEVEL_PROGRAMS:
            yield name, program
