"""The agent's energy, as its options ask for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from edge_agent.board import board_name
from edge_agent.energy.account import Energy
from edge_agent.energy.board_file import read_board_file
from edge_agent.energy.choose import meter_or_why
from edge_agent.energy.external import MqttMeter
from regrow import power_model
from regrow.errors import PeerError, UsageError
from regrow.observations import Row
from regrow.power_model import PowerModel


def energy_of(options: argparse.Namespace, clock: Callable[[], float], tell: Callable[[Row], None]) -> Energy:
    """What measures this device for its agent; without a meter it says why in its rows.

    Raises:
        UsageError: --meter, --calibration or --power-model name something wrong.
    """
    board = board_name()
    known = None if options.calibration is None else read_board_file(options.calibration, board)
    guess = None if options.power_model is None else read_power_model(options.power_model, board)
    meter = meter_or_why(options.meter)
    if isinstance(meter, MqttMeter) and options.identity is not None:
        raise UsageError("--meter mqtt:... needs a device with a bundle: with --identity nothing unsealed is heard; use serial:...")
    return Energy(meter, tell, known=known, guess=guess, unix_s=clock)


def read_power_model(path: Path, board: str) -> PowerModel:
    """The model in a file, for this board.

    Raises:
        UsageError: it is absent, no model, or of another board.
    """
    try:
        model = power_model.from_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; `regrow measure fit` makes one") from error
    except PeerError as error:
        raise UsageError(f"{path}: {error}") from error
    if model.board != board:
        raise UsageError(f"{path} is a model of {model.board}, this board is {board}")
    return model
