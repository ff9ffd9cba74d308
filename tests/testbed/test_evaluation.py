"""Restoration by the gateway's own held-out data instead of the devices' reports."""

from __future__ import annotations

import json

import numpy as np

from regrow.machine import Evaluate, Evaluated
from testbed.memory import COORDINATOR, World
from tests.regrow import fleet


def test_the_gateway_scores_every_level_in_use_and_restores_by_it() -> None:
    asked: list[Evaluate] = []

    def evaluate(effect: Evaluate) -> Evaluated:
        asked.append(effect)
        return Evaluated(effect.version, dict.fromkeys(effect.lengths, 0.5))  # no progress ever: everybody is raised in the end

    settings = fleet.task(evaluation={"data": "held-out.npz"}, restoration={"every": 2, "patience": 2}, stop={"aggregations": 60})
    world = World(fleet.train, evaluate=evaluate)
    world.add(COORDINATOR, fleet.new_coordinator(settings))
    for name, bps in fleet.LINKS.items():
        world.add(name, fleet.Device(fleet.identity(name), {}), up_bps=bps, down_bps=4 * bps)
    world.run(300, stop=lambda: COORDINATOR in world.finished)
    assert world.finished[COORDINATOR] == "60 aggregations"
    assert [effect.version for effect in asked] == list(range(2, 61, 2))
    assert all(effect.values.dtype == np.float32 and max(effect.lengths.values()) == fleet.LAYOUT.size for effect in asked)
    restored = [json.loads(record.header) for record in world.log if record.kind == "restored"]
    assert {record["global_score"] for record in restored} == {0.5}
    ledger = world.clients[COORDINATOR].machine.ledger  # type: ignore[union-attr]
    assert {device.density for device in ledger.devices.values()} == {1.0}
