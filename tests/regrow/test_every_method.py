"""Whole runs in memory of every method and kind of restoration, each against the reference."""

from __future__ import annotations

from typing import Any

import pytest

from regrow import methods
from regrow.device import Device
from regrow.methods import ABLATIONS, METHODS
from testbed.memory import COORDINATOR
from tests.regrow.fleet import LINKS, identity, new_coordinator, task, train
from tests.regrow.harness import Tape, begin, check_run, leftovers


@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"aggregation": "mask", "buffered": True}},
        {"method": {"aggregation": "mask", "buffered": False, "staleness": "constant"}},
        {"method": {"aggregation": "gradient", "staleness": "hinge"}},
        {"method": {"aggregation": "plain", "ladder": (0.5, 1.0)}},
        {"method": {"aggregation": "plain", "ladder": (0.5, 1.0), "buffered": False}},
        {"method": {"granularity": "unit"}},
        {"method": {"granularity": "unit", "importance": "g", "density": "relative"}},
        {"method": {"aggregation": "mix"}, "trigger": {"kind": "arrival"}},
        {"method": {"aggregation": "delta", "eta_g": 0.5}, "trigger": {"kind": "count", "count": 3}},
        {"method": {"aggregation": "adaptive"}, "trigger": {"kind": "arrival"}},
        {"method": {"importance": "w", "eta_g": 0.5, "weigh_by_examples": True, "max_staleness": 2, "layer_floor": 0.01}},
        {"wire": {"up": "float32", "down": "float32"}},
        {"wire": {"up": "float16", "down": "float16"}},
        {"wire": {"up": "int8", "down": "float32"}},
        {"method": {"local": "personal_masks", "aggregation": "gradient"}, "wire": {"up": "float32"}},
        {"method": {"local": "personal_masks"}, "wire": {"up": "float16"}},
        {"wire": {"up": "int4", "down": "float32"}},
        {"wire": {"up": "int4"}, "method": {"aggregation": "plain", "ladder": (0.5, 1.0)}},
        {"wire": {"up": "int4"}, "method": {"granularity": "unit"}},
        {"restoration": {"every": 1, "patience": 1, "min_delta": 0.5, "full_model_every": 2}},
        {"restoration": {"trigger": "mixed", "planned_s": 10.0, "every": 1}},
    ],
    ids=lambda sections: "-".join(str(value) for section in sections.values() for value in section.values()),
)
def test_every_method_runs_to_its_end_and_matches_the_reference(sections: dict[str, dict[str, Any]]) -> None:
    method = {"refresh_every": 6, "refresh_min_rounds": 0, **sections.get("method", {})}
    settings = task(stop={"aggregations": 20}, **{**sections, "method": method})
    world = begin(settings)
    world.finish()
    assert world.coordinator().ledger.version == 20
    assert {record.kind for record in world.log} >= {"accepted", "aggregated", "published", "retired"}
    assert not world.notes_of("rejected")
    check_run(world, settings)
    assert leftovers(world) == []


NAMES_TO_RUN = [
    *METHODS,
    *(f"{name}+restore" for name in ("fiarse", "fedasync", "heterofl", "fedrolex", "fjord", "subfedavg")),
    "fjord+async",
    "subfedavg+async",
    *(f"fedgmr-{part}" for part in ABLATIONS),
]


@pytest.mark.parametrize(
    ("name", "up"),
    [
        *((name, "int8") for name in NAMES_TO_RUN),
        *((name, "int4") for name in ("fedgmr", "prfl", "heterofl", "fedavg", "fedasync", "fedbuff", "asyncfeded", "fedgmr-ga")),
    ],
)
def test_every_named_method_runs_to_its_end_and_matches_the_reference(name: str, up: str) -> None:
    tables = methods.named(name)
    tables["wire"] = {"up": up}
    if tables.get("restoration", {}).get("trigger") == "fixed":
        tables["restoration"]["planned_s"] = 20.0
    tables.setdefault("trigger", {}).setdefault("interval_s", 1.0)
    settings = task(stop={"aggregations": 15}, **tables)
    world = begin(settings)
    world.finish()
    assert not world.notes_of("rejected")
    check_run(world, settings)
    assert leftovers(world) == []


def test_restoration_ends_the_run_when_nothing_else_does() -> None:
    settings = task(stop={"aggregations": None}, restoration={"every": 1, "patience": 1, "min_delta": 0.2})
    world = begin(settings)
    world.finish()
    assert world.coordinator().ledger.finished == "the full model no longer improves"
    assert all(device.density == 1.0 for device in world.coordinator().ledger.devices.values())
    check_run(world, settings)


def test_prfl_keeps_the_density_that_devices_train() -> None:
    world = begin(task(method={"name": "prfl"}, stop={"aggregations": 60}), LINKS)
    world.finish()
    ledger = world.coordinator().ledger
    trained = {note.fields["device"]: note.fields["density"] for _, _, note in world.notes if note.kind == "assigned"}
    raised = {who for _, _, note in world.notes if note.kind == "restored" for who in [note.fields["device"]]}
    for who, device in ledger.devices.items():
        assert device.density >= trained[who]
        assert device.density == trained[who] or who in raised, "only a raise after the last assignment may differ"
        assert ledger.level_of(trained[who]) in device.reports, "reports are of the level that is looked up"
    assert set(trained.values()) & set(ledger.level_scores), "and they count"
    assert all(density >= ledger.restoration.rho_min - 1e-9 for density in trained.values()) or ledger.restoration.rho_min <= 0.05


def test_pace_counts_from_the_first_aggregation_however_long_the_gateway_waited_for_its_fleet() -> None:
    def raised(wait_s: float) -> list[Any]:
        world = Tape(train)
        world.add(COORDINATOR, new_coordinator(task(restoration={"trigger": "pace"}, stop={"aggregations": 30})))
        world.run(wait_s)
        for name, bps in LINKS.items():
            world.add(name, Device(identity(name), {}), up_bps=bps, down_bps=4 * bps)
        world.finish()
        return [(note.fields["device"], note.fields["density"]) for _, _, note in world.notes if note.kind == "restored"]

    assert raised(0.0)
    assert raised(7200.0)[:3] == raised(0.0)[:3]
