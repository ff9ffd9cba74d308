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

from edge_agent.uplink import Piece, UplinkMeter, interval_95, packet_bytes
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
    assert meter.interval_bps is None
    meter.add(200, 0.0, 0.05)  # a heartbeat tells the latency, not the rate
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


def test_a_slower_link_is_believed_after_four_seconds() -> None:
    meter, at_s = UplinkMeter(), 0.0
    for bps in (4e6, 400e3):
        for _ in range(21):
            at_s = feed(meter, at_s + 1, [int(bps / 8 * 0.2)], bps, 0.0)
        assert meter.estimate_bps == pytest.approx(bps, rel=2e-3)


def test_an_acknowledgement_at_a_time_is_enough() -> None:
    """One long transfer: the estimate follows inside it, and its slow first second is one outlier among ten."""
    meter = UplinkMeter()
    meter.add(2_500, 0.0, 1.0)
    for second in range(1, 11):
        meter.add(25_000, second - 1e-3, second + 1.0)
    assert meter.estimate_bps == pytest.approx(200e3)
    low, high = meter.interval_bps or (0.0, 0.0)
    assert low <= 200e3 <= high


def test_the_samples_are_a_bounded_queue_and_one_outage_among_them_changes_nothing() -> None:
    meter, at_s = UplinkMeter(kept=5), 0.0
    for rate in (1.00e6, 1.02e6, 0.98e6, 1.04e6, 0.05e6, 1.01e6):
        at_s = feed(meter, at_s + 1, [int(rate / 8 * 2.5)], rate, 0.0)
    assert [sample.bps for sample in meter.samples] == pytest.approx([1.02e6, 0.98e6, 1.04e6, 0.05e6, 1.01e6])
    assert meter.estimate_bps == pytest.approx((1.02e6 + 0.98e6 + 1.04e6 + 1.01e6) / 4, rel=1e-3)
    assert meter.drifts == 0


def test_the_interval_holds_the_mean_nineteen_times_of_twenty() -> None:
    """Of 400 links with normal noise of 10 %; also with an outlier among the ten samples."""
    rng = random.Random(1)
    for outlier in (False, True):
        held = 0
        for _ in range(400):
            samples = [Piece(int(rng.gauss(1e6, 1e5) / 8), 1.0) for _ in range(10)]
            if outlier:
                samples[3] = Piece(100, 12.0)
            low, high = interval_95(samples) or (0.0, 0.0)
            held += low <= 1e6 <= high
        assert 0.9 <= held / 400 <= 0.99
    assert interval_95([Piece(1000, 1.0)]) is None


def test_a_changed_link_is_told_once() -> None:
    meter, at_s = UplinkMeter(), 0.0
    for rate in (1e6, 1e6, 1e6, 1.1e6, 0.95e6, 1e6, 3e6, 3e6, 3e6, 3e6):
        at_s = feed(meter, at_s + 1, [int(rate / 8 * 1.5)], rate, 0.0)
    assert (meter.drifts, [sample.bps for sample in meter.samples]) == (1, pytest.approx([3e6] * 3))


def test_until_a_late_acknowledgement_comes_tcp_tells_of_the_slower_link() -> None:
    """20 Mbit/s, 256 KiB chunks two deep, become 250 kbit/s half a chunk after an acknowledgement: the next is due after 4.2 s."""
    meter, chunk = UplinkMeter(), 256 * 1024
    for number in range(100):
        meter.add(chunk, number * 0.1 - 1e-3, number * 0.1 + 0.1)
    assert meter.estimate_bps == pytest.approx(chunk * 80, rel=2e-3)
    changed_s, half = 10.0, chunk // 2
    for second in range(1, 6):
        meter.progress(half + int(second * 250e3 / 8), changed_s + second)
    assert meter.estimate_bps == pytest.approx(250e3, rel=2e-3)
    meter.add(chunk, 9.9, changed_s + half * 8 / 250e3)  # half of it had passed quickly: no sample
    assert meter.estimate_bps == pytest.approx(250e3, rel=2e-3)
    meter.add(chunk, 10.0, changed_s + (half + chunk) * 8 / 250e3)
    assert meter.estimate_bps == pytest.approx(250e3, rel=2e-3)
    assert meter.drifts == 1


def test_tcp_never_makes_the_estimate_larger_and_a_stall_is_no_rate() -> None:
    meter = UplinkMeter()
    for second in range(5):
        meter.add(25_000, second - 1e-3, second + 1.0)
    for delivered, second in ((0, 5.0), (500_000, 6.0), (1_000_000, 7.0), (1_000_000, 8.0), (1_000_100, 9.0), (500, 10.0), (None, 11.0)):
        meter.progress(delivered, second)
    assert meter.estimate_bps == pytest.approx(200e3, rel=2e-3)
    assert meter.taken == 5


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
        {"samples": [[-1, 1]]},
        {"samples": [[1, float("nan")]]},
        {"pool": [1, 2]},
        {"pool": ["a", 1, 1]},
        {"pool": [1, -1, 1]},
        {"pool": [1, 1, float("inf")]},
        {"tiny": [1]},
        {"tiny": [[True, 1]]},
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


def test_near_the_cap_on_a_busy_machine(rig: Rig) -> None:
    """Four real links at once, beside two processes that do nothing but compute; how near is bench/uplink.py's question."""
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
    assert all(abs(error) < 0.3 for error in errors.values()), errors
