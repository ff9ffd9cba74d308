"""A device with little memory trains with float16 storage, one with enough or with another wish does not; with real programs throughout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_agent.data.source import DataSource
from edge_agent.worker import LevelTrainers, train_job
from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.ledger import Ledger
from regrow.machine import Train, Trained
from regrow.parameters import Layout
from regrow.programs import MEMORY, StorageRule, program_file, variant
from regrow.step_memory import StepMemory, needs_bytes
from testbed.memory import COORDINATOR
from tests.regrow.fleet import identity, task
from tests.regrow.harness import Tape

pytest.importorskip("onnx")

from export.memory import step_memory
from export.models import watch_cnn
from export.programs import build_programs, initial_vector
from export.storage import stored_as_float16

SETTINGS = task(
    fleet={"min_devices": 1},
    method={"name": "fedasync"},
    training={"local_steps": 2, "batch": 8},
    stop={"aggregations": 2},
)


@pytest.fixture(scope="module")
def programs() -> dict[str, bytes]:
    found = build_programs(watch_cnn(1))
    for name in ("train", "train_masked"):
        half = stored_as_float16(found[name], least_bytes=1)
        assert half is not None
        found[variant(name, "float16")] = half
    return found | {MEMORY: step_memory(found).to_json()}


def needs(programs: dict[str, bytes]) -> tuple[int, int]:
    memory = StepMemory.from_json(programs[MEMORY])
    return max(needs_bytes(memory, SETTINGS)), max(needs_bytes(memory, SETTINGS, "float16"))


def fleet(programs: dict[str, bytes], rule: StorageRule, memory_bytes: int | None) -> tuple[Tape, list[Train]]:
    """A coordinator and one device, whose jobs a real trainer does."""
    source, jobs = DataSource(100), list[Train]()
    rng = np.random.default_rng(0)
    source.append(rng.standard_normal((100, 6, 100)).astype(np.float32), rng.integers(0, 7, 100))

    def train(_: str, job: Train) -> tuple[float, Trained]:
        jobs.append(job)
        return 0.5, train_job(LevelTrainers(job.programs), source, job)

    world = Tape(train)
    ledger = Ledger.start(SETTINGS, Layout.from_json(programs["layout"]), initial_vector(watch_cnn(1)))
    world.add(COORDINATOR, Coordinator(ledger, "r1", programs, 7))
    me = replace(identity("d0"), storage=rule, memory_bytes=memory_bytes)
    world.add("d0", Device(me, {}), up_bps=4e6, down_bps=16e6)
    return world, jobs


def test_float16_takes_less_here(programs: dict[str, bytes]) -> None:
    plain, half = needs(programs)
    assert half < plain


@pytest.mark.parametrize(
    ("rule", "spare", "storage"),
    [
        ("auto", "plain", "float32"),
        ("auto", "half", "float16"),
        ("auto", None, "float32"),
        ("float16", "plain", "float16"),
        ("float32", "plain", "float32"),
    ],
)
def test_memory_or_the_owner_decides(programs: dict[str, bytes], rule: StorageRule, spare: str | None, storage: str) -> None:
    plain, _ = needs(programs)
    world, jobs = fleet(programs, rule, {"plain": plain, "half": plain - 1, None: None}[spare])
    world.finish()
    wanted = {name: programs[variant(name, "float16") if storage == "float16" else name] for name in ("train", "train_masked")}
    assert jobs
    assert {name: program for name, program in jobs[0].programs.items() if name.startswith("train")} == wanted, "and no other is fetched"
    told: list[dict[str, Any]] = world.notes_of("storage")
    assert [note["activations"] for note in told] == [storage], "with the first job, float32 too"
    assert (told[0]["float32_needs_bytes"], told[0]["rule"]) == (plain, rule)
    assert world.coordinator().ledger.version >= 2, "updates of it are taken"


@pytest.mark.parametrize(("rule", "spare"), [("auto", -1), ("float32", 0), ("float16", -1)])
def test_what_fits_in_no_storage_is_declined_with_both_figures(programs: dict[str, bytes], rule: StorageRule, spare: int) -> None:
    plain, half = needs(programs)
    world, jobs = fleet(programs, rule, half + spare)
    world.run(30.0)
    assert not jobs
    assert world.notes_of("declined") == [
        {"device": "d0", "needs_bytes": plain, "needs_bytes_float16": half, "storage": rule, "memory_bytes": half + spare}
    ]


def test_their_files_have_names_of_their_own() -> None:
    assert program_file("train~float16") == "train~float16.onnx"
