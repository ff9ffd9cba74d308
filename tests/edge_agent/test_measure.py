"""`regrow measure uplink` against a real broker: its figures, its words, and that it leaves nothing behind; and what an agent tells."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cli.main import main
from edge_agent.agent import Agent
from edge_agent.bundle import Bundle
from edge_agent.data.source import DataSource
from edge_agent.state import StateFolder
from edge_agent.transport import MqttLink
from export.models import digits_mlp
from regrow import topics, wire
from regrow.machine import Publish
from regrow.observations import Row, TransferSeen
from tests.broker_server.scenarios import Rig
from tests.edge_agent.listening import Listening
from tests.testbed.processes import ROOT, task_text, until


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("amqtt"), "amqtt")
    yield rig
    rig.close()


def bundle(rig: Rig, device: str, folder: Path) -> str:
    return str(rig.credentials.write_bundle(device, rig.broker.url, folder))


def test_it_measures_what_the_link_lets_through(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["measure", "uplink", "--bundle", bundle(rig, "d1", tmp_path), "--seconds", "4", "--json", "--max-uplink-bps", "1000000"]
    assert main(words) == 0
    *intervals, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert summary["direction"] == "up"
    assert summary["overall_bps"] == pytest.approx(1e6, rel=0.3)
    assert summary["mean_bps"] == pytest.approx(1e6, rel=0.3)
    assert summary["low_bps"] <= summary["mean_bps"] <= summary["high_bps"]
    assert summary["interface"] == "lo"
    assert summary["interface_sent_bytes"] > summary["payload_bytes"] > 300_000
    assert len(intervals) >= 3
    for each in intervals:
        begun_s, until_s = each["estimate_from_s"], each["estimate_until_s"]
        assert (begun_s is None and until_s is None) or (each["estimate_bps"] and begun_s < until_s), each
    assert intervals[-1]["rtt_s"] is not None


def test_nothing_of_it_stays_on_the_broker(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--max-uplink-bps", "2000000", "--max-downlink-bps", "2000000"]
    assert main(["measure", "uplink", "--bundle", bundle(rig, "d2", tmp_path), "--seconds", "3", "--down", *limits]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^up: mean \S+ [kM]bit/s \(95 %", said, re.MULTILINE)
    assert (found := re.search(r"^down: mean (\S+) Mbit/s", said, re.MULTILINE))
    assert float(found[1]) == pytest.approx(2.0, rel=0.3)
    heard = [event for event in rig.flush() if "/measure/" in event.topic and event.topic.count("/") > 6]
    last = {event.topic: event.payload for event in heard}
    assert len(last) == 8
    assert any(event.payload for event in heard)
    assert not any(last.values())


def test_ctrl_c_gives_the_summary(rig: Rig, tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "cli.main", "measure", "uplink", "--bundle", bundle(rig, "d3", tmp_path), "--seconds", "100"]
    process = subprocess.Popen(
        [*command, "--every", "0.3", "--max-uplink-bps", "1000000"], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        assert process.stdout is not None
        for _ in range(4):
            assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
    assert re.search(r"^up: mean \S+ [kM]bit/s", said, re.MULTILINE)


def test_a_wrong_password_is_one_line(rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "d4.json"
    file.write_text(json.dumps({"device": "d4", "broker": rig.broker.url, "password": "wrong"}))
    assert main(["measure", "uplink", "--bundle", str(file)]) == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert "refused" in said.err
    assert not said.out


def test_an_agent_tells_of_its_probe_and_counts_telemetry_apart(rig: Rig, tmp_path: Path) -> None:
    rows: list[Row] = []
    source = DataSource(20)
    source.append(np.zeros((20, 64), np.float32), np.zeros(20, np.int64))
    tasks = wire.Tasks(tasks=[wire.TaskRef(task="t", run="r", term=1)], heartbeat_s=0.2)
    rig.publish(Publish(topics.tasks("d5"), wire.encode(tasks), retain=True))
    with StateFolder(tmp_path / "state") as folder:
        credentials = Bundle("d5", rig.broker.url, rig.credentials.password("d5"))
        agent = Agent(credentials, folder, source, max_uplink_bps=1e6, senses=Listening(rows.append))
        thread = threading.Thread(target=agent.run)
        thread.start()
        try:
            until(lambda: agent.device.phase.value == "waiting" and agent.traffic.payload_bytes.get((True, "telemetry"), 0), "a heartbeat")
        finally:
            agent.stop()
            thread.join(20)
    probes = [row for row in rows if isinstance(row, TransferSeen) and row.what == "probe"]
    assert all(row.up and row.run == "r" for row in probes)
    assert agent.traffic.payload_bytes[True, "probe"] == sum(row.payload_bytes for row in probes) <= 256 * 1024
    assert sum(row.packet_bytes for row in probes) * 8 / sum(row.seconds for row in probes) == pytest.approx(1e6, rel=0.3)
    assert agent.device.uplink_bps == pytest.approx(1e6, rel=0.3)


def test_with_an_identity_it_goes_over_tls_and_not_beside_the_agent(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from tests.testbed.certified import CertifiedFleet

    with CertifiedFleet(tmp_path / "fleet", digits_mlp(seed=1), task_text("toy", stop="seconds = 600"), kind="amqtt") as fleet:
        fleet.serve()
        agent = fleet.member("d1")
        agent.said("accepted")
        words = ["measure", "uplink", "--identity", "d1.id", "--seconds", "3", "--json", "--max-uplink-bps", "1000000"]
        beside = fleet.start(words, "beside.log")
        assert beside.ended() == 1
        assert re.fullmatch(r"regrow: .*d1\.id.*\n", beside.text())
        agent.stop()
        alone = fleet.start(words, "alone.log")
        assert alone.ended() == 0, alone.text()
        summary = json.loads(alone.text().splitlines()[-1])
    assert summary["mean_bps"] == pytest.approx(1e6, rel=0.3)
    assert summary["congestion"]
    assert summary["disconnects"] == 0


def test_beside_an_agent_of_the_same_bundle_it_measures_nothing_and_says_why(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["measure", "uplink", "--bundle", bundle(rig, "d6", tmp_path), "--seconds", "60", "--max-uplink-bps", "1000000"]
    other = MqttLink(rig.broker.url, device_id="d6", password=rig.credentials.password("d6"), rng=random.Random(1))
    over = threading.Event()

    def come_back() -> None:
        while not over.is_set():
            other.poll(0.1)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        assert main(words) == 1
    finally:
        over.set()
        thread.join()
        other.close()
    said = capsys.readouterr()
    assert "another agent uses the name d6" in said.err
    assert "mean" not in said.out
