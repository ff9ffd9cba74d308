"""Meters outside the device that say watts by themselves: over a serial line, or on a topic of the broker that the agent uses."""

from __future__ import annotations

import json
import os
import re
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_agent.energy.meter import Reading, Unmeasured, Watts, implausible, look
from regrow.errors import LocalError
from regrow.observations import Certainty

SILENT_S = 15.0
_LINE = re.compile(r"(?:[A-Za-z_][\w .-]{0,31}[:=]\s*)?([+-]?\d{1,9}(?:\.\d{0,9})?(?:e[+-]?\d{1,2})?)\s*(mW|W|kW)?", re.IGNORECASE)
_UNITS = {"": 1.0, "mw": 1e-3, "w": 1.0, "kw": 1e3}
_KEYS = ("watts", "power", "apower")  # the last is a Shelly's, "Power" a Tasmota's
_MOST_BYTES = 4096


def watts_in(text: str) -> float:
    """The watts that a line or a message says: a number, "4.52 W", "P=4520mW", or JSON with "watts", "power" or "apower".

    Raises:
        LocalError: it says something else.
    """
    text = text.strip()
    if text.startswith("{"):
        return _in_json(text)
    found = _LINE.fullmatch(text)
    if found is None:
        raise LocalError(f"{text[:40]!r} is no number of watts")
    return float(found[1]) * _UNITS[(found[2] or "").lower()]


def _in_json(text: str) -> float:
    try:
        said: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LocalError(f"{text[:40]!r} is no JSON") from error
    for part in (said, *(value for value in said.values() if isinstance(value, dict))):
        for name, value in part.items():
            if name.lower() in _KEYS and isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
    raise LocalError(f"{text[:40]!r} names no {', '.join(_KEYS)}")


class Told:
    """The newest value of a meter that speaks when it likes; it holds until it is SILENT_S old."""

    def __init__(self, since_s: float) -> None:
        self._heard: tuple[float, Reading] = (since_s, Unmeasured("has said nothing yet"))

    def hear(self, text: str, at_s: float) -> None:
        """A line or a message has come. From any thread."""
        try:
            watts = watts_in(text)
        except LocalError as error:
            self._heard = (at_s, Unmeasured(str(error)))
            return
        why = implausible(watts)
        self._heard = (at_s, Unmeasured(why) if why else Watts(watts, at_s))

    def garbled(self, why: str, at_s: float) -> None:
        """Something has come that is no line and no message."""
        self._heard = (at_s, Unmeasured(why))

    def latest(self, now: float) -> Reading:
        """The newest value, at the time at which it came."""
        at_s, reading = self._heard
        if isinstance(reading, Watts) and now - at_s > SILENT_S:
            return Unmeasured(f"silent for {now - at_s:.0f} s")
        return reading


class SerialMeter:
    """Lines with watts from a serial device, which may be plugged in and out.

    Args:
        path: "/dev/ttyUSB0".
        baud: of the line, one that termios knows.

    Raises:
        LocalError: no such speed.
    """

    certainty: Certainty = "measured"
    gap_s = SILENT_S
    most_hz = 100.0

    def __init__(self, path: Path, baud: int = 115_200, clock: Callable[[], float] = time.monotonic) -> None:
        speed = getattr(termios, f"B{baud}", None)
        if speed is None:
            raise LocalError(f"{baud} baud is no speed of a serial line; 9600 and 115200 are common")
        self.name = f"serial {path.name}"[:64]
        self._path, self._speed, self._clock = path, speed, clock
        self._told = Told(clock())
        self._descriptor: int | None = None
        self._rest = b""
        self._whole = False  # whether `_rest` begins where a line does

    def read(self) -> Reading:
        return look(self._watts)

    def _watts(self) -> Watts:
        now = self._clock()
        *lines, self._rest = re.split(rb"[\r\n]+", self._rest + self._drain())
        if lines and not self._whole:
            del lines[0]  # we came in its middle
            self._whole = True
        if len(self._rest) > _MOST_BYTES:
            self._rest, self._whole = b"", False
            self._told.garbled(f"sends no lines: {_MOST_BYTES} bytes without an end of line; check its speed in baud", now)
        spoken = [line for line in lines if line.strip()]
        if spoken:
            self._told.hear(spoken[-1].decode("ascii", "replace"), now)
        reading = self._told.latest(now)
        if isinstance(reading, Watts):
            return reading
        raise LocalError(f"{self._path}: {reading.reason if isinstance(reading, Unmeasured) else reading}")

    def _drain(self) -> bytes:
        """What has come since the last reading."""
        if self._descriptor is None:
            self._open()
        try:
            data = os.read(self._descriptor or 0, 16 * _MOST_BYTES)
        except BlockingIOError:
            return b""
        except OSError as error:
            self.close()
            raise LocalError(f"{self._path}: {error.strerror or error}; is it plugged in?") from error
        if not data:
            self.close()
            raise LocalError(f"{self._path} has ended; is it plugged in?")
        return data

    def _open(self) -> None:
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            mode = termios.tcgetattr(self._descriptor)
            mode[0] = mode[1] = mode[3] = 0  # bytes as they come
            mode[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
            mode[4] = mode[5] = self._speed
            mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
            termios.tcsetattr(self._descriptor, termios.TCSANOW, mode)
        except (OSError, termios.error) as error:
            self.close()
            why = error.args[-1] if error.args else error
            raise LocalError(f"{self._path}: {why}; plug the meter in, and let the agent's user into the group dialout") from error

    def close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
        self._descriptor, self._rest, self._whole = None, b"", False


class MqttMeter:
    """Watts on a topic of the agent's broker; whoever holds the link calls `hear`.

    Args:
        topic: without wildcards.
    """

    certainty: Certainty = "measured"
    gap_s = SILENT_S
    most_hz = 100.0

    def __init__(self, topic: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = f"mqtt {topic}"[:64]
        self.topic, self._clock = topic, clock
        self._told = Told(clock())

    def hear(self, payload: bytes | bytearray | memoryview, now: float) -> None:
        """A message has come on the topic, at monotonic `now`. From any thread."""
        self._told.hear(bytes(payload[:_MOST_BYTES]).decode("utf-8", "replace"), now)

    def read(self) -> Reading:
        reading = self._told.latest(self._clock())
        return Unmeasured(f"{self.topic}: {reading.reason}"[:200]) if isinstance(reading, Unmeasured) else reading

    def close(self) -> None:
        """The link is somebody else's."""
