"""The estimator on made-up links, and on real ones: a paced link to a real broker while the machine is busy."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator

import paho.mqtt.client as paho
import pytest

from edge_agent.uplink import UplinkMeter, packet_bytes
from regrow.errors import LocalError
from regrow.machine import Acknowledged, Publish
from tests.broker_server.scenarios import Rig

TOPIC = "regrow/v1/task/run/device/d0/update/0000017/0003"


def feed(meter: UplinkMeter, at_s: float, chunks: list[int], bps: float, latency_s: float) -> float:
    """Chunks sent back to back from `at_s`, each acknowledged `latency_s` after its last byte; returns the last time."""
    free_s = at_s
    for chunk_bytes in chunks:
        started_s, free_s = free_s, free_s + chunk_bytes * 8 / bps
        meter.add(chunk_bytes, started_s, free_s + latency_s)
    return free_s + latency_s


def test_never_measured_is_none() -> None:
    meter = UplinkMeter()
    assert meter.estimate_bps is None
    assert meter.mean_bps is None
    meter.add(200, 0.0, 0.05)  # a heartbeat tells the latency, not the rate
    meter.finish()
    assert meter.estimate_bps is None


@pytest.mark.parametrize("bps", [200e3, 1e6, 4e6])
@pytest.mark.parametrize("latency_s", [0.001, 0.05])
def test_the_latency_is_taken_off(bps: float, latency_s: float) -> None:
    meter, at_s = UplinkMeter(), 0.0
    for _ in range(20):
        at_s = feed(meter, at_s + 1, [200], bps, latency_s)
        at_s = feed(meter, at_s + 1, [int(bps / 40)] * 2, bps, latency_s)  # 0.4 s in two chunks that overlap
    assert meter.estimate_bps == pytest.approx(bps, rel=1e-6)


def test_without_a_heartbeat_the_latency_stays_in() -> None:
    meter = UplinkMeter()
    feed(meter, 0.0, [25_000], 200e3, 0.1)
    assert meter.estimate_bps == pytest.approx(25_000 * 8 / 1.1)


def test_a_slower_link_is_believed_after_two_seconds() -> None:
    meter, at_s = UplinkMeter(), 0.0
    for bps in (4e6, 400e3):
        for _ in range(12):
            at_s = feed(meter, at_s + 1, [int(bps / 8 * 0.2)], bps, 0.0)
        assert meter.estimate_bps == pytest.approx(bps, rel=1e-3)


def test_a_long_transfer_loses_its_first_second() -> None:
    """A second of start-up at a tenth of the rate; ten seconds follow."""
    meter = UplinkMeter()
    meter.add(2_500, 0.0, 1.0)
    at_s = 1.0
    for _ in range(10):
        meter.add(25_000, at_s, at_s + 1.0)
        at_s += 1.0 - 1e-3
    assert meter.estimate_bps == pytest.approx(200e3, rel=2e-3)
    short = UplinkMeter()
    short.add(2_500, 0.0, 1.0)
    short.add(25_000, 0.999, 2.0)
    assert short.estimate_bps == pytest.approx(27_500 * 8 / 2)


def test_raw_samples_are_a_bounded_queue_and_its_mean() -> None:
    meter, at_s = UplinkMeter(kept=3), 0.0
    for rate in (1e6, 2e6, 3e6, 4e6, 5e6):
        at_s = feed(meter, at_s + 1, [int(rate / 8 * 2.5)], rate, 0.0)
        meter.finish()
    assert list(meter.samples) == pytest.approx([3e6, 4e6, 5e6])
    assert meter.mean_bps == pytest.approx(4e6)


def test_the_state_survives_as_json() -> None:
    meter, at_s = UplinkMeter(kept=4), 0.0
    for size_bytes in (200, 60_000, 200, 60_000):
        at_s = feed(meter, at_s + 1, [size_bytes], 200e3, 0.02)
    again = UplinkMeter.from_state(json.loads(json.dumps(meter.to_state())))
    assert again.estimate_bps == meter.estimate_bps == pytest.approx(200e3)
    assert again.samples == meter.samples
    assert again.to_state() == meter.to_state()


@pytest.mark.parametrize(
    "change",
    [
        {"kept": 0},
        {"kept": None},
        {"samples_bps": [-1]},
        {"samples_bps": [float("nan")]},
        {"transfers": [[1, 2]]},
        {"transfers": [["a", 1, True]]},
        {"tiny": [1]},
        {"tiny": [True, 1]},
    ],
)
def test_a_state_that_does_not_check_out_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(LocalError):
        UplinkMeter.from_state({**UplinkMeter().to_state(), **change})
    with pytest.raises(LocalError):
        UplinkMeter.from_state({})


@pytest.mark.parametrize("sample", [(0, 0.0, 1.0), (1, 1.0, 1.0), (1, 2.0, 1.0), (1, float("nan"), 1.0)])
def test_a_sample_that_cannot_be_is_refused(sample: tuple[int, float, float]) -> None:
    with pytest.raises(LocalError, match="impossible"):
        UplinkMeter().add(*sample)


@pytest.mark.parametrize("size_bytes", [0, 70, 71, 16_331, 16_332, 2_097_099, 2_097_100])
def test_packet_bytes_is_what_paho_sends(size_bytes: int) -> None:
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client._sock = object()  # type: ignore[assignment]  # connected, as far as publish() looks
    client.on_socket_register_write = lambda *_: None  # so that the packet stays in the queue
    client.publish(TOPIC, bytes(size_bytes), qos=1)
    assert len(client._out_packet[0]["packet"]) == packet_bytes(TOPIC, size_bytes)
    client._sock = None


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("amqtt"), "amqtt")
    yield rig
    rig.close()


def measure(rig: Rig, device: str, bps: float, update_bytes: int, measured: dict[float, float]) -> None:
    """Heartbeat and update in turn, as a device does, until the updates have lasted 2.2 s."""
    link = rig.link(device, max_uplink_bps=bps)
    meter = UplinkMeter()
    topic = f"regrow/v1/task/run/device/{device}/update/0000017/0003"
    telemetry = f"regrow/v1/task/run/device/{device}/telemetry"
    for _ in range(int(2.2 * bps / 8 / update_bytes) + 1):
        for to, sizes in ((telemetry, [150]), (topic, [update_bytes // 2] * 2)):
            for token, size_bytes in enumerate(sizes):
                link.perform(Publish(to, bytes(size_bytes), token=token))
            waiting = len(sizes)
            while waiting:
                for event in link.poll(1.0):
                    assert isinstance(event, Acknowledged), event
                    meter.add(packet_bytes(to, event.sent_bytes), event.started_s, event.acked_s)
                    waiting -= 1
    link.close()
    estimate_bps = meter.estimate_bps
    assert estimate_bps is not None
    measured[bps] = estimate_bps


def test_within_a_tenth_of_the_cap_on_a_busy_machine(rig: Rig) -> None:
    """Four real links at once, beside two processes that do nothing but compute."""
    links = [(200e3, 6_000), (800e3, 24_000), (2e6, 50_000), (4e6, 90_000)]
    measured: dict[float, float] = {}
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(2)]
    try:
        threads = [
            threading.Thread(target=measure, args=(rig, f"d{i}", bps, size_bytes, measured), daemon=True)
            for i, (bps, size_bytes) in enumerate(random.Random(1).sample(links, len(links)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    errors = {bps: measured[bps] / bps - 1 for bps, _ in links}
    print("error of the measured uplink:", {f"{bps / 1e3:.0f} kbit/s": f"{error:+.2%}" for bps, error in errors.items()})
    assert all(abs(error) < 0.1 for error in errors.values()), errors
