"""What a person can do from the page: pause the run, let it go on, end it, change when it ends, and tell a device of a fleet to rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from broker_server.gateway import Gateway
from broker_server.instructions import Instructions, Told, as_told
from regrow.errors import LocalError, UsageError
from regrow.methods import defaults_of
from regrow.task import Stop, Task

if TYPE_CHECKING:
    from broker_server.fleet.members import Standing
    from broker_server.fleet.registry import Registry

Option = tuple[str, str, str]  # name, value, where it comes from
_STANDING: dict[str, Standing] = {"pause": "paused", "resume": "active", "drain": "draining"}
_T = TypeVar("_T")


class DeviceOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tell one device of the fleet."""

    device: str
    do: Literal["pause", "resume", "drain"]


class Controls:
    """Those of one served run; `do` is called from the page's threads, `look` from the gateway's.

    Args:
        gateway: what is paused and ended.
        instructions: what the run has been told, which the gateway heeds.
        task: the run's own, as it was when the run began.
        file: its task.toml.
        registry: of the fleet, where there is one.
        options: of `regrow serve`, as they are in force.
    """

    def __init__(
        self,
        gateway: Gateway,
        instructions: Instructions,
        task: Task,
        file: Path,
        registry: Registry | None = None,
        options: Sequence[Option] = (),
    ) -> None:
        self._gateway, self._instructions, self._task, self._file = gateway, instructions, task, file
        self._registry, self._options = registry, options
        self._one_at_a_time = threading.Lock()
        self.actions: Mapping[str, Callable[[bytes], str]] = {
            "pause": self._pause,
            "start": self._start,
            "stop": self._stop,
            "end": self._end,
            "device": self._device,
        }

    def look(self) -> None:
        """Let the coordinator know when it is to end."""
        ledger = self._gateway.coordinator.ledger
        wanted = as_told(self._task, self._instructions.told)
        if ledger.task.stop != wanted.stop:
            ledger.task = wanted
            self._gateway.nudge()

    # ---- what can be done ------------------------------------------------------------------------------------------------------------

    def do(self, action: str, body: bytes) -> str:
        """Do it; returns what was done, for people.

        Raises:
            UsageError: there is no such action, or the body is not what it takes.
            LocalError: it cannot be done.
        """
        if action not in self.actions:
            raise UsageError(f"there is no action {action!r}: {', '.join(self.actions)}")
        with self._one_at_a_time:
            return self.actions[action](body)

    def _pause(self, _: bytes) -> str:
        return self._tell(paused=True, said="paused: devices finish what they have and get no new work")

    def _start(self, _: bytes) -> str:
        return self._tell(paused=False, said="the run goes on")

    def _tell(self, *, paused: bool, said: str) -> str:
        self._instructions.tell(msgspec.structs.replace(self._instructions.told, paused=paused))
        self._gateway.nudge()
        return said

    def _stop(self, _: bytes) -> str:
        self._gateway.stop()
        return "stopping: the gateway writes the model and the metrics, and this page ends with it"

    def _end(self, body: bytes) -> str:
        stop = None if body.strip() == b"null" else _decoded(body, Stop)
        if stop == Stop():
            raise UsageError(
                "nothing was changed: say after how many seconds, after how many aggregations or at which accuracy the run ends "
                "(any of them), or As in task.toml"
            )
        self._instructions.tell(Told(paused=self._instructions.told.paused, stop=stop))
        return "the run ends as its task.toml says" if stop is None else f"the run ends {_in_words(stop)}"

    def _device(self, body: bytes) -> str:
        if self._registry is None:
            raise UsageError("devices of a fleet can be paused one by one; this gateway has none: `regrow fleet init` makes one")
        from broker_server.fleet import members

        order = _decoded(body, DeviceOrder)
        members.stand(self._registry, order.device, _STANDING[order.do])
        return f"{order.device}: {_STANDING[order.do]}"

    # ---- settings --------------------------------------------------------------------------------------------------------------------

    def table(self) -> dict[str, Any]:
        """What the page's settings show."""
        told = self._instructions.told
        now = msgspec.to_builtins(as_told(self._task, told).stop)
        source = "the page" if told.stop is not None else "task.toml"
        return {
            "paused": told.paused,
            "stop": now,
            "stop_source": source,
            "fleet": self._registry is not None,
            "task": [{"name": name, "value": value, "source": where} for name, value, where in settings_of(self._task, self._file)],
            "serve": [{"name": name, "value": value, "source": where} for name, value, where in self._options],
        }


def settings_of(task: Task, file: Path) -> list[Option]:
    """Every setting of a task but [stop], and whether task.toml, the method's name or a default says it.

    Raises:
        LocalError: the file cannot be read.
    """
    import tomllib  # Python 3.11: only the gateway reads tasks

    try:
        said = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise LocalError(f"{file}: {error}") from error
    by_method = defaults_of(task.method.name)
    rows: list[Option] = []
    for section, value in msgspec.to_builtins(task).items():
        keys = value.items() if isinstance(value, dict) else ((None, value),)
        for key, each in keys if section != "stop" else ():
            table, name = (said, section) if key is None else (said.get(section, {}), key)
            of_method = key != "name" and name in by_method.get(section, {})
            source = "task.toml" if name in table else f"method {task.method.name}" if of_method else "default"
            rows.append((section if key is None else f"{section}.{key}", msgspec.json.encode(each).decode(), source))
    return rows


def _in_words(stop: Stop) -> str:
    parts = [f"after {stop.seconds:g} s"] if stop.seconds is not None else []
    parts += [f"after {stop.aggregations} aggregations"] if stop.aggregations is not None else []
    parts += [f"at accuracy {stop.accuracy:g}"] if stop.accuracy is not None else []
    return " or ".join(parts) or "when restoration has finished"


def _decoded(body: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(str(error)) from error
