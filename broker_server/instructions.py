"""What a person has told a run while it is served: to pause, and when to end. Kept in its folder, so it holds across restarts.

A pause is the coordinator's own `Standing` for everybody: whoever has work finishes it, and nobody gets new work. Its run's clock goes on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from broker_server.durable import write_private
from regrow import topics
from regrow.errors import LocalError
from regrow.machine import Event, Received, Standing
from regrow.task import Stop, Task

FILE = "instructions.json"


class Told(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file. stop: in place of [stop] in the run's task.toml, None as that says."""

    paused: bool = False
    stop: Stop | None = None


class Instructions:
    """Those of one run. `tell` may be called from any thread, `before` belongs to the one that steps the coordinator.

    Raises:
        LocalError: the file is there and cannot be read.
    """

    def __init__(self, run: Path) -> None:
        self._file = run / FILE
        self.told = _read(self._file)
        self._fleet = Standing()
        self._resting: frozenset[str] = frozenset()

    def tell(self, told: Told) -> None:
        """Take new instructions; they are durable when this returns.

        Raises:
            LocalError: they cannot be written; the old ones hold.
        """
        try:
            write_private(self._file, msgspec.json.format(msgspec.json.encode(told), indent=1) + b"\n")
        except OSError as error:
            raise LocalError(f"{self._file}: {os.strerror(error.errno or 0)}; check the disk and the owner of the run's folder") from error
        self.told = told

    def before(self, event: Event, devices: Mapping[str, object]) -> tuple[Event, ...]:
        """What the coordinator hears in place of an event of its link. devices: those that its ledger knows."""
        if isinstance(event, Standing):
            self._fleet = event
            return (self._standing(),)
        if not self.told.paused:
            if not self._resting:
                return (event,)
            resting: frozenset[str] = frozenset()
        else:
            name = topics.device_of(event.topic) if isinstance(event, Received) else None
            if self._resting and (name is None or name in self._resting):
                return (event,)
            resting = self._resting.union(devices, () if name is None else (name,))
        if resting == self._resting:
            return (event,)
        self._resting = resting
        return (self._standing(), event)

    def _standing(self) -> Standing:
        return Standing(self._fleet.paused, (self._fleet.draining | self._resting) - self._fleet.paused)


def as_told(task: Task, told: Told) -> Task:
    """The task with what was told in place of what it says."""
    return task if told.stop is None else msgspec.structs.replace(task, stop=told.stop)


def _read(file: Path) -> Told:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Told)
    except FileNotFoundError:
        return Told()
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise LocalError(f"{file}: {error}; correct or remove it, and the run goes on as its task.toml says") from error
