"""Asks devices what ails them, through the gateway that runs: a folder of questions, and a machine beside the coordinator's that asks them.

    doctor/DEVICE.request    a question, as JSON: its number, and until when it is of use (unix seconds); written by `regrow doctor`
    doctor/DEVICE.asked      the same, once it was said to the device
    doctor/DEVICE.report     the DoctorReport, as it came
    doctor/lock              held by the process that asks

Nothing here is durable: whoever asks waits, or asks again.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from broker_server.credentials import write_private
from regrow import topics, wire
from regrow.errors import LocalError, PeerError
from regrow.machine import Connected, Disconnected, Effect, Event, Publish, Received, Subscribe

log = logging.getLogger(__name__)
FOLDER = "doctor"
LOOK_S = 0.5
POLL_S = 0.1
WAIT_S = 40.0


class Question(msgspec.Struct, frozen=True):
    """What one file asks."""

    number: int
    until_s: float


class Inquirer:
    """Asks what the folder asks. `step` takes every event of the link; whoever owns the link carries the effects out.

    Args:
        folder: of the questions.
        clock: unix seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = folder, clock
        self._connected = False
        self._look_s = float("-inf")
        self._asked: dict[str, int] = {}

    def step(self, event: Event | None, now: float, *, leads: bool = True) -> list[Effect]:  # noqa: ARG002 - it is about no task
        """Take an event in, or None for the time alone. leads: of no concern here."""
        if isinstance(event, Connected):
            self._connected = True
            return [Subscribe((topics.doctor_report("+"),))]
        if isinstance(event, Disconnected):
            self._connected = False
        elif isinstance(event, Received) and (device := topics.parse_doctor_report(event.topic)) is not None:
            self._hear(device, event)
        if not self._connected or now < self._look_s:
            return []
        self._look_s = now + LOOK_S
        return self._ask()

    def _ask(self) -> list[Effect]:
        effects: list[Effect] = []
        now_s = self._clock()
        for file in sorted(self._folder.glob("*.request")):
            question = _read(file)
            if question is None or question.until_s < now_s or not topics.NAME.match(file.stem):
                file.unlink(missing_ok=True)
                continue
            self._asked[file.stem] = question.number
            effects.append(Publish(topics.doctor_request(file.stem), wire.encode(wire.DoctorRequest(number=question.number, now_s=now_s))))
            with suppress(FileNotFoundError):  # whoever asked has given up
                file.replace(file.with_suffix(".asked"))
        return effects

    def _hear(self, device: str, event: Received) -> None:
        """Keep an answer that was asked for; a device cannot fill the disk with others."""
        try:
            report = wire.decode(event.payload, wire.DoctorReport)[0]
        except PeerError as error:
            log.warning("%s: %s", device, error)
            return
        if report.number == self._asked.get(device):
            del self._asked[device]
            with suppress(OSError):
                write_private(self._folder / f"{device}.report", bytes(event.payload))


@contextmanager
def inquirer_of(home: Path) -> Iterator[Inquirer | None]:
    """The one inquirer of a gateway's home for as long as the block takes, or None when another process is it."""
    folder = home / FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield Inquirer(folder)


def ask(home: Path, device: str, wait_s: float = WAIT_S) -> wire.DoctorReport:
    """What a device finds, asked through the gateway that runs with this home.

    Raises:
        LocalError: no gateway picked the question up, or the device did not answer in time.
    """
    folder = home / FOLDER
    topics.check_name(device, "device")
    if not home.is_dir():
        raise LocalError(f"{home} is not there: name the gateway's runs with --runs")
    folder.mkdir(exist_ok=True, mode=0o700)
    files = {kind: folder / f"{device}.{kind}" for kind in ("request", "asked", "report")}
    number = time.time_ns() // 1_000_000
    files["report"].unlink(missing_ok=True)
    write_private(files["request"], msgspec.json.encode(Question(number, time.time() + wait_s)))
    until_s = time.monotonic() + wait_s
    try:
        while time.monotonic() < until_s:
            report = _answer(files["report"], number)
            if report is not None:
                return report
            time.sleep(POLL_S)
        if files["request"].exists():
            raise LocalError(f"nobody picked the question up in {wait_s:g} s: is `regrow serve` running here, and connected to its broker?")
        raise LocalError(f"{device} did not answer in {wait_s:g} s: it is off, has no connection, or runs an older agent; ask it there")
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


def _answer(file: Path, number: int) -> wire.DoctorReport | None:
    try:
        report = wire.decode(file.read_bytes(), wire.DoctorReport)[0]
    except (OSError, PeerError):
        return None
    return report if report.number == number else None


def _read(file: Path) -> Question | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Question)
    except (OSError, msgspec.DecodeError):
        return None
