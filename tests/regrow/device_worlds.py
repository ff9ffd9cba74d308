"""Small fleets of which one device is looked at: on a link so slow that every phase lasts, or with a model of many chunks."""

from __future__ import annotations

import numpy as np

from regrow import records
from regrow.coordinator import Coordinator
from regrow.device import Device, Phase
from regrow.ledger import Ledger
from regrow.machine import Train, Trained
from regrow.parameters import Layout, Tensor
from testbed.memory import COORDINATOR
from tests.regrow.fleet import identity, task
from tests.regrow.harness import Tape, begin, check_run, leftovers, phase_reached

SLOW = {"d0": 400_000.0, "d1": 40_000.0}
"""d1 takes about a second for a full upload, so that every phase lasts."""
RUN = task(fleet={"min_devices": 2, "min_deadline_s": 30.0}, stop={"aggregations": 6}, method={"ladder": (1.0,)})


def running() -> Tape:
    return begin(RUN, SLOW, persist_s=0.05)


def until(phase: Phase, name: str = "d1") -> Tape:
    world = running()
    world.run(100, stop=phase_reached(world, name, phase))
    assert world.device(name).phase is phase
    return world


def ended(world: Tape) -> None:
    world.finish()
    check_run(world, RUN)
    assert leftovers(world) == []
    assert accepted_by(world, "d1") >= 1


def accepted_by(world: Tape, name: str) -> int:
    entries = [records.from_record(record) for record in world.log]
    return sum(isinstance(entry, records.Accepted) and entry.device == name for entry in entries)


BIG = Layout((Tensor("a.weight", (400, 500)), Tensor("a.bias", (400,), always_kept=True)))


def big_world(links: dict[str, float] | None = None) -> Tape:
    """A model of 200 000 parameters on slow links: several chunks each way."""
    settings = task(fleet={"min_devices": 1}, stop={"aggregations": 3}, method={"ladder": (1.0,)}, wire={"up": "float16"})

    def learn(_: str, job: Train) -> tuple[float, Trained]:
        return 0.5, Trained(job.number, job.values[: job.length] + np.float32(0.01), 10, 0.5, 0.5, ())

    initial = np.random.default_rng(4).normal(size=BIG.size).astype(np.float32)
    world = Tape(learn)
    world.add(COORDINATOR, Coordinator(Ledger.start(settings, BIG, initial), "r1", {"layout": BIG.to_json(), "train": b"T" * 150_000}, 7))
    for name, bps in (links or {"d0": 400_000.0}).items():
        world.add(name, Device(identity(name), {}), up_bps=bps, down_bps=bps)
    return world
