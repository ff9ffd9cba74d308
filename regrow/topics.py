"""Every MQTT topic of protocol v1, built and parsed in one place.

A device publishes only below its own id and reads only coordinator topics and its own; the broker's ACL is written from the same words.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from regrow.errors import UsageError

ROOT = "regrow/v1"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,17})\Z")


def check_name(name: str, what: str) -> str:
    """Return the name, or raise LocalError if it cannot be one level of a topic."""
    if not NAME.match(name):
        raise UsageError(f"{what} {name!r}: use 1 to 63 of a-z, 0-9 and '-', starting with a letter or digit")
    if name in ("device", "release") and what == "task":
        raise UsageError(f"task {name!r}: this name is reserved by the topic layout; choose another")
    return name


# ---- topics of a device, whatever it trains ------------------------------------------------------------------------------------------


def status(device: str) -> str:
    return f"{ROOT}/device/{device}/status"


def hello(device: str) -> str:
    return f"{ROOT}/device/{device}/hello"


def tasks(device: str) -> str:
    return f"{ROOT}/device/{device}/tasks"


def control(device: str) -> str:
    return f"{ROOT}/device/{device}/control"


def control_report(device: str) -> str:
    return f"{ROOT}/device/{device}/control-report"


def certificate_request(device: str) -> str:
    return f"{ROOT}/device/{device}/certificate-request"


def certificate(device: str) -> str:
    return f"{ROOT}/device/{device}/certificate"


def coordinator_keys(device: str) -> str:
    return f"{ROOT}/device/{device}/keys"


def older(device: str) -> str:
    return f"{ROOT}/device/{device}/older"


def observations(device: str) -> str:
    return f"{ROOT}/device/{device}/observations"


def observations_receipt(device: str) -> str:
    return f"{ROOT}/device/{device}/observations-receipt"


def field_run(device: str) -> str:
    return f"{ROOT}/device/{device}/field"


def field_report(device: str) -> str:
    return f"{ROOT}/device/{device}/field-report"


def release(device: str) -> str:
    return f"{ROOT}/device/{device}/release"


def release_report(device: str) -> str:
    return f"{ROOT}/device/{device}/release-report"


def release_file(digest: bytes, piece: int) -> str:
    return f"{ROOT}/release/{digest.hex()}/{piece}"


def parse_of_device(topic: str, kinds: Collection[str]) -> tuple[str, str] | None:
    """(device, kind) of regrow/v1/device/{device}/{kind}, when it is one of these kinds."""
    parts = topic.split("/")
    known = len(parts) == 5 and parts[:3] == ["regrow", "v1", "device"] and parts[4] in kinds
    return (parts[3], parts[4]) if known and NAME.match(parts[3]) else None


def promotion_report(device: str, task: str) -> str:
    """Where a device says what became of a task's inference model; the coordinator hears all with two "+"."""
    return f"{ROOT}/device/{device}/promotion/{task}"


def device_of(topic: str) -> str | None:
    """The device that a topic is about: only it, or the coordinator speaking to it, says anything there. None: it is about no device."""
    parts = topic.split("/")
    at = 2 if parts[2:3] == ["device"] else 4
    return parts[at + 1] if parts[:2] == ["regrow", "v1"] and parts[at : at + 1] == ["device"] and len(parts) > at + 1 else None


def is_claim(topic: str) -> bool:
    parts = topic.split("/")
    return parts[:2] == ["regrow", "v1"] and parts[3:] == ["claim"]


def is_sealed(topic: str) -> bool:
    """Whether messages on this topic are sealed in a fleet with keys (regrow.seal).

    Not so: bytes whose digest stands in a sealed message, noise that measures a link, what a device says to itself, and last wills, which
    are hints.
    """
    parts = topic.split("/")
    if is_doctor_echo(topic):
        return False
    if parts[2:3] == ["device"]:
        return not (len(parts) == 5 and parts[4] == "status")
    if (parts[2:3] == ["release"] and len(parts) == 5) or parts[3:5] == ["promotion", "file"]:
        return False
    return not (parts[4:5] in (["chunk"], ["order"], ["program"]) or (parts[4:5] == ["device"] and parts[6:] == ["probe"]))


def doctor_request(device: str) -> str:
    """Where the gateway asks a device what ails it."""
    return f"{ROOT}/device/{device}/doctor-request"


def doctor_report(device: str) -> str:
    """Where the device answers; the gateway hears all with "+"."""
    return f"{ROOT}/device/{device}/doctor-report"


def parse_doctor_report(topic: str) -> str | None:
    """The device that answers on this topic, or None when it is another topic."""
    parts = topic.split("/")
    known = len(parts) == 5 and parts[:3] == ["regrow", "v1", "device"] and parts[4] == "doctor-report"
    return parts[3] if known and NAME.match(parts[3]) else None


def doctor_echoes(device: str) -> tuple[str, ...]:
    """One topic for each right to write that a device needs, which it may also read and nobody else listens to.

    What travels there is a random word, so it is sealed by nobody.
    """
    return (f"{ROOT}/device/{device}/doctor-echo", *(topic(device) for topic in (_ECHO.telemetry, _ECHO.probe)), _ECHO.update(device, 0, 0))


def is_doctor_echo(topic: str) -> bool:
    """Whether a topic is one of `doctor_echoes`, of any device."""
    return topic.startswith(f"{_ECHO.root}/device/") or (topic.startswith(f"{ROOT}/device/") and topic.endswith("/doctor-echo"))


# ---- topics of a task and of one run of it -------------------------------------------------------------------------------------------


def claim(task: str) -> str:
    return f"{ROOT}/{task}/claim"


def promotion(task: str) -> str:
    """Where a task's inference model is announced; with "+" that of every task."""
    return f"{ROOT}/{task}/promotion"


def promoted_file(task: str, digest: bytes, piece: int) -> str:
    return f"{ROOT}/{task}/promotion/file/{digest.hex()}/{piece}"


def parse_promotion(topic: str) -> str | None:
    """The task whose inference model is announced on this topic, or None when it is another topic."""
    parts = topic.split("/")
    known = len(parts) == 4 and parts[:2] == ["regrow", "v1"] and parts[3] == "promotion"
    return parts[2] if known and NAME.match(parts[2]) and parts[2] != "device" else None


def parse_promotion_report(topic: str) -> tuple[str, str] | None:
    """(device, task) of a device's report on a promotion, or None when it is another topic."""
    parts = topic.split("/")
    known = len(parts) == 6 and parts[:3] == ["regrow", "v1", "device"] and parts[4] == "promotion"
    return (parts[3], parts[5]) if known and NAME.match(parts[3]) and NAME.match(parts[5]) else None


@dataclass(frozen=True, slots=True)
class Run:
    """The topics below regrow/v1/{task}/{run}, which is their `root`."""

    task: str
    run: str
    root: str = field(init=False, repr=False, compare=False)  # made once: every message that comes is compared with topics below it

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", f"{ROOT}/{self.task}/{self.run}")

    def manifest(self, version: int) -> str:
        return f"{self.root}/manifest/{version}"

    def program(self, digest: bytes, piece: int) -> str:
        return f"{self.root}/program/{digest.hex()}/{piece}"

    def order(self, epoch: int, level: int, piece: int) -> str:
        return f"{self.root}/order/{epoch}/{level}/{piece}"

    def chunk(self, version: int, index: int) -> str:
        return f"{self.root}/chunk/{version}/{index}"

    def assignment(self, device: str) -> str:
        return f"{self.root}/device/{device}/assignment"

    def receipt(self, device: str) -> str:
        return f"{self.root}/device/{device}/receipt"

    def telemetry(self, device: str) -> str:
        return f"{self.root}/device/{device}/telemetry"

    def probe(self, device: str) -> str:
        return f"{self.root}/device/{device}/probe"

    def update(self, device: str, sequence: int, index: int) -> str:
        return f"{self.root}/device/{device}/update/{sequence}/{index}"

    def from_devices(self) -> tuple[str, ...]:
        """What the coordinator listens to. Probes are measured by their sender and read by nobody."""
        return (
            f"{ROOT}/device/+/status",
            f"{ROOT}/device/+/hello",
            f"{self.root}/device/+/telemetry",
            f"{self.root}/device/+/update/+/+",
        )


@dataclass(frozen=True, slots=True)
class FromDevice:
    """A parsed topic that a device published: kind is 'status', 'hello', 'telemetry' or 'update'."""

    kind: str
    device: str
    sequence: int = 0
    index: int = 0


_ECHO = Run("doctor", "echo")


def parse_from_device(topic: str, run: Run) -> FromDevice | None:
    """Return what a device says on this topic, or None when the topic is not one of this run's (the message is then ignored)."""
    parts = topic.split("/")
    if parts[:3] == ["regrow", "v1", "device"] and len(parts) == 5 and parts[4] in ("status", "hello"):
        return FromDevice(parts[4], parts[3]) if NAME.match(parts[3]) else None
    if parts[:5] != ["regrow", "v1", run.task, run.run, "device"] or len(parts) < 7 or not NAME.match(parts[5]):
        return None
    if len(parts) == 7 and parts[6] == "telemetry":
        return FromDevice("telemetry", parts[5])
    if len(parts) == 9 and parts[6] == "update" and _NUMBER.match(parts[7]) and _NUMBER.match(parts[8]):
        return FromDevice("update", parts[5], int(parts[7]), int(parts[8]))
    return None
