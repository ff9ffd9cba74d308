"""A round over a real broker has its joules by phase: a gateway's process, a real agent, and a board whose sensor says 1.08 W."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.agent import Agent
from edge_agent.bundle import read_bundle
from edge_agent.data.sources import open_source
from edge_agent.energy.account import Energy
from edge_agent.energy.hwmon import Hwmon
from edge_agent.heat import Heat
from edge_agent.state import StateFolder
from export.models import digits_mlp
from regrow.observations import PhaseSeen, PowerSeen, Row
from tests.edge_agent.energy import boards
from tests.edge_agent.energy.boards import write
from tests.edge_agent.listening import Listening
from tests.testbed.processes import PATIENCE_S, Fleet, task_text, until

BOARD_W = 1.08


def test_a_rounds_joules_by_phase(tmp_path: Path) -> None:
    root = write(tmp_path / "board", {**boards.ZERO_WITH_INA219, **boards.HEAT})
    rows: list[Row] = []

    def measured(tell: Callable[[Row], None]) -> Energy:
        energy = Energy(Hwmon(root), tell, heat=Heat(root))
        energy.record(100.0)
        return energy

    senses = Listening(rows.append, measured)
    with Fleet(tmp_path / "fleet", digits_mlp(1), task_text("digits", stop="aggregations = 10000")) as fleet:
        fleet.serve()
        fleet.add({"d1": 400.0})
        source = open_source(str(fleet.folder / "d1.npz"))
        with StateFolder(tmp_path / "state") as state:
            agent = Agent(read_bundle(fleet.folder / "d1.json"), state, source, max_uplink_bps=4e5, max_downlink_bps=1.6e6, senses=senses)
            running = threading.Thread(target=agent.run)
            running.start()
            try:
                until(lambda: {"train", "transmit", "receive"} <= {row.phase for row in phases(rows)}, lambda: str(rows[-20:]))
            finally:
                agent.stop()
                running.join(PATIENCE_S)
        run = fleet.run.name
    assert not running.is_alive()
    found = phases(rows)
    for row in found:
        assert row.joules is not None
        if "overlaps" not in row.marked:
            assert row.joules == pytest.approx(BOARD_W * row.seconds)
        if row.phase in ("train", "receive"):
            assert (row.run, row.number >= 1) == (run, True)
        if row.phase == "train":
            assert row.density is not None
            assert row.steps == 3
    power = [row for row in rows if isinstance(row, PowerSeen) and row.watts is not None]
    assert sum(row.joules or 0.0 for row in found) == pytest.approx(sum(BOARD_W * row.seconds for row in power))
    assert senses.power is not None
    assert senses.power.watts is None or senses.power.watts == pytest.approx(BOARD_W)


def phases(rows: list[Row]) -> list[PhaseSeen]:
    return [row for row in rows if isinstance(row, PhaseSeen) and row.joules is not None]
