"""A page over a real coordinator whose fleet lives in virtual time: no broker, no waiting; what the page shows is what its ledger says."""

from __future__ import annotations

import http.client
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from broker_server.gateway import Gateway
from broker_server.instructions import Instructions
from broker_server.page.access import Access
from broker_server.page.board import Board
from broker_server.page.controls import Controls
from broker_server.page.past import Runs
from broker_server.page.server import Page
from broker_server.runs import create_run, load_task, recover
from broker_server.store import Store
from export.models import digits_mlp
from export.task import build_task, save_model
from regrow import wire
from regrow.coordinator import Coordinator
from regrow.device import Device
from regrow.machine import Train, Trained
from regrow.presence import Identity
from testbed.memory import COORDINATOR, World
from tests.testbed.processes import task_text

TOKEN = "t" * 43
LINKS_BPS = (4e6, 2e6, 8e5, 4e5, 2e5)


def make_run(folder: Path, name: str = "one", **changes: str) -> Path:
    """A run of a built task, without any device."""
    task = folder / "digits"
    if not task.exists():
        task.mkdir(parents=True)
        (task / "task.toml").write_text(task_text("digits", **changes))
        save_model(digits_mlp(1), task / "model.onnx")
        build_task(task, task / "model.onnx")
    return create_run(folder / "runs", load_task(task), name)


@dataclass
class Rig:
    """A page, whose board hears what the virtual fleet does when `live` is called."""

    run: Path
    page: Page
    board: Board
    gateway: Gateway
    store: Store
    world: World
    instructions: Instructions
    told: int = 0
    power: dict[str, wire.PowerState] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return self.page.server_port

    def live(self, seconds: float) -> None:
        """Let virtual time pass, and let the board and the store hear of it."""
        self.world.run(self.world.now + seconds)
        telemetry = self.gateway.coordinator.telemetry
        for who, power in self.power.items():
            telemetry[who] = msgspec.structs.replace(telemetry[who], power=power)
        for _, who, note in self.world.notes[self.told :]:
            if who == COORDINATOR:
                self.board.note(note)
                self.store.metric(note.kind, note.fields)
        self.told = len(self.world.notes)
        self.store.append([])
        self.board._due_s = -math.inf
        self.board.look()

    def ask(
        self, path: str, method: str = "GET", body: Any = None, headers: Mapping[str, str] | None = None, *, token: str = ""
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers, what it says) of one request on a connection of its own."""
        sent = {"Authorization": f"Bearer {token}"} if token else {}
        sent |= {"Content-Type": "application/json"} if body is not None else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            data = body if body is None or isinstance(body, (str, bytes)) else json.dumps(body)
            connection.request(method, path, data, {**sent, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read()
            json_too = answer.getheader("Content-Type") == "application/json" and text
            return answer.status, dict(answer.getheaders()), json.loads(text) if json_too else text
        finally:
            connection.close()


@contextmanager
def page_of(folder: Path, devices: int = 3, *, host: str = "127.0.0.1", every_s: float = 0.02, **changes: str) -> Iterator[Rig]:
    """The page of a run with so many devices, called pi-0000 and so on; nothing has happened yet."""
    run = make_run(folder, **changes)
    speeds = np.random.default_rng(1)

    def train(_: str, job: Train) -> tuple[float, Trained]:
        scores = tuple((level, 0.5, 0.4 + 0.1 * level, 20) for level in job.evaluate)
        return float(speeds.uniform(2, 6)), Trained(job.number, job.values[: job.length] * np.float32(0.99), 20, 0.5, 0.1, scores)

    with Store.open(run) as store:
        source = load_task(run / "task")
        world = World(train, keep_log=False, keep_published=False)
        coordinator = Coordinator(recover(store, source), run.name, source.programs, 7)
        instructions = Instructions(run)
        gateway = Gateway(coordinator, store, url="mqtt://127.0.0.1:1", username="x", password="y", instructions=instructions)
        world.add(COORDINATOR, coordinator)
        for number in range(devices):
            name, bps = f"pi-{number:04d}", LINKS_BPS[number % 5]
            nonce = name.encode().ljust(16, b".")
            world.add(name, Device(Identity(name, nonce, nonce, 100, 20), {}, bps), up_bps=bps, down_bps=4 * bps)
        board = Board(gateway)
        controls = Controls(gateway, instructions, source.task, run / "task" / "task.toml")
        page = Page(("127.0.0.1", 0), Access(TOKEN, host), board, controls, Runs(run.parent), run.parent / ".gateway", run, every_s)
        page.start()
        try:
            yield Rig(run, page, board, gateway, store, world, instructions)
        finally:
            page.close()
            gateway._writer.close()
