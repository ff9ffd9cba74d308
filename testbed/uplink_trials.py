"""Trials of the uplink meter on real links: `regrow measure uplink` in a device's namespace, beside what TCP in the hub really received.

The truth is the bytes that the broker's side of the connection received in order (TCP_INFO's bytes_received, read with `ss` in the hub),
over the same seconds that the estimate is made of. So it knows nothing of the device's acknowledgements, and headers and segments sent
again are not in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker_server.broker import Broker, find_mosquitto, mosquitto_config
from broker_server.credentials import Credentials
from regrow.errors import LocalError
from testbed.namespaces import HUB_ADDRESS, Namespaces, Spot

PORT = 1883
DEVICE = "d1"
LOOK_S = 0.2
START_S = 15.0


@dataclass(frozen=True, slots=True)
class Step:
    """A stretch of a trial: a wire rate, or a cut at rate 0."""

    seconds: float
    up_bps: float


@dataclass(frozen=True, slots=True)
class Trial:
    """name; steps, in order; loss: share of packets dropped; congestion: TCP's."""

    name: str
    steps: Sequence[Step]
    loss: float = 0.0
    congestion: str = "cubic"


@dataclass
class Truth:
    """(monotonic seconds, bytes received in the hub so far)."""

    looks: list[tuple[float, int]] = field(default_factory=list)

    def bps(self, start_s: float, end_s: float) -> float:
        """Mean rate between two times."""
        first, last = (min(bisect_left(self.looks, (at, 0)), len(self.looks) - 1) for at in (start_s, end_s))
        (first_s, first_bytes), (last_s, last_bytes) = self.looks[first], self.looks[last]
        return (last_bytes - first_bytes) * 8 / (last_s - first_s) if last_s > first_s else 0.0


@contextmanager
def broker_in(hub: str, home: Path, credentials: Credentials) -> Iterator[None]:
    """mosquitto in a namespace, as the gateway would configure it."""
    broker = Broker(home, credentials, host="0.0.0.0", port=PORT, kind="mosquitto")
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    files = credentials.render(home)
    config = home / "mosquitto.conf"
    config.write_text(mosquitto_config(broker, files.passwords, files.access))
    log = (home / "output.log").open("wb")
    command = ["ip", "netns", "exec", hub, str(find_mosquitto()), "-c", str(config)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        probe = ["ip", "netns", "exec", hub, "ss", "-tlnHO", "sport", "=", f":{PORT}"]
        deadline_s = time.monotonic() + START_S
        while not subprocess.run(probe, capture_output=True, text=True, check=True).stdout:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise LocalError(f"mosquitto did not start in {hub}: {(home / 'output.log').read_text()[-500:]}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()
        log.close()


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """What was measured and what was true, for each step: the estimate ten seconds after its beginning, and at its end."""
    credentials = Credentials(folder / "secrets")
    credentials.add_device(DEVICE)
    bundle = credentials.write_bundle(DEVICE, f"mqtt://{HUB_ADDRESS}:{PORT}", folder)
    with Namespaces(trial.congestion) as namespaces, broker_in(namespaces.hub, folder / "broker", credentials):
        spot = namespaces.device(DEVICE, trial.steps[0].up_bps, 50e6)
        if trial.loss:
            namespaces.lose(spot, trial.loss)
        seconds = sum(step.seconds for step in trial.steps)
        command = [*namespaces.inside(spot.namespace), sys.executable, "-u", "-m", "cli.main", "measure", "uplink"]
        process = subprocess.Popen(
            [*command, "--bundle", str(bundle), "--seconds", str(seconds), "--every", "0.5", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            return _followed(trial, namespaces, spot, process)
        finally:
            process.kill()
            process.wait()


def _followed(trial: Trial, namespaces: Namespaces, spot: Spot, process: subprocess.Popen[str]) -> dict[str, Any]:
    said: list[tuple[float, dict[str, Any]]] = []
    first = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            said.append((time.monotonic(), json.loads(line)))
            first.set()
        first.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    if not first.wait(START_S + 45) or not said:
        raise LocalError(f"{trial.name}: `regrow measure uplink` said nothing")
    truth = Truth()
    begun_s = said[0][0] - said[0][1]["end_s"]
    edges_s = [begun_s]
    for number, step in enumerate(trial.steps):
        if number:
            _apply(namespaces, spot, step)
        until_s = edges_s[-1] + step.seconds if number else begun_s + step.seconds
        while time.monotonic() < until_s:
            truth.looks.append((time.monotonic(), namespaces.received_bytes(PORT)))
            time.sleep(LOOK_S)
        edges_s.append(time.monotonic())
    reader.join(60)
    *intervals, (_, summary) = said
    steps = [_step(step, edges_s[at], edges_s[at + 1], intervals, truth) for at, step in enumerate(trial.steps)]
    return {"name": trial.name, "loss": trial.loss, "congestion": trial.congestion, "steps": steps, "summary": summary}


def _apply(namespaces: Namespaces, spot: Spot, step: Step) -> None:
    if step.up_bps == 0:
        namespaces.cut(spot)
        return
    namespaces.heal(spot)
    namespaces.change(spot, up_bps=step.up_bps)


def _step(step: Step, start_s: float, end_s: float, said: Sequence[tuple[float, dict[str, Any]]], truth: Truth) -> dict[str, Any]:
    """The estimate is compared with what came through in the seconds that it is made of, but after the change."""
    told: dict[str, Any] = {"wire_bps": step.up_bps, "seconds": round(end_s - start_s, 1)}
    if step.up_bps == 0:
        return told
    for name, at_s in (("after_10_s", start_s + 10.0), ("at_end", end_s)):
        lines = [interval for heard_s, interval in said if start_s < heard_s <= min(at_s, end_s) + 0.1]
        lines = [interval for interval in lines if interval.get("estimate_from_s") is not None]
        if not lines or at_s > end_s + 0.5:
            continue
        begun_s = said[0][0] - said[0][1]["end_s"]
        from_s, until_s = (begun_s + lines[-1][name] for name in ("estimate_from_s", "estimate_until_s"))
        true_bps = truth.bps(*(max(from_s, start_s + 1.0), until_s) if until_s > start_s + 2.0 else (start_s + 1.0, at_s))
        measured_bps = lines[-1]["estimate_bps"]
        told[name] = {"true_bps": round(true_bps), "measured_bps": round(measured_bps), "error": round(measured_bps / true_bps - 1, 4)}
    return told
