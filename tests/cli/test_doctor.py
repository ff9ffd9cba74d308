"""`regrow doctor` as people run it: on a device, on a gateway, and through a gateway, with a real broker; each fault is a real one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker_server.broker import Broker
from broker_server.credentials import COORDINATOR, Credentials
from cli.main import main
from edge_agent.vitals import HEALTH
from tests.testbed.processes import ROOT, Child, Fleet, task_text, until, wide_mlp

Findings = dict[str, dict[str, str]]
LIMIT_S = 25.0


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path / "fleet", wide_mlp(1, hidden=8), task_text("digits", stop="aggregations = 100000"), shared=True) as fleet:
        fleet.add({"d1": 4000.0, "d2": 4000.0})
        yield fleet


def doctor(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Findings]:
    """(exit status, findings by name)."""
    capsys.readouterr()
    began_s = time.monotonic()
    status = main(["doctor", "--json", *map(str, words)])
    assert time.monotonic() - began_s < LIMIT_S
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    return status, found


def states(found: Findings, *names: str) -> list[str]:
    return [found[name]["state"] for name in names]


def bundle(folder: Path, **changes: Any) -> Path:
    fields = json.loads((folder / "d1.json").read_text())
    file = folder / "changed.json"
    file.write_text(json.dumps(fields | changes))
    return file


BROKER = ("network.tcp", "broker.login", "broker.rights", "broker.gateway")


def test_a_device_whose_broker_is_well(fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fleet.folder)
    status, found = doctor(capsys, "--bundle", "d1.json", "--task", fleet.task)
    assert states(found, *BROKER) == ["ok", "ok", "ok", "warn"], found  # nobody leads
    assert states(found, "onnxruntime", "training.step", "model.fit", "disk.write") == ["ok"] * 4
    assert status == (1 if any(finding["state"] == "fail" for finding in found.values()) else 0)
    fleet.serve()
    until(lambda: doctor(capsys, "--bundle", "d1.json")[1]["broker.gateway"]["state"] == "ok", "a claim to be heard")
    assert not (fleet.folder / "regrow-state-d1").exists()  # a look changes nothing


def test_lines_and_the_exit_status(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    file = bundle(fleet.folder, broker=f"mqtt://127.0.0.1:{port}")
    assert main(["doctor", "--bundle", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warn", "fail", "unknown") for line in lines)
    (line,) = (line for line in lines if "network.tcp" in line)
    said = f"127.0.0.1:{port} refuses; nothing listens on that port: start the gateway, or look at the port in the bundle"
    assert line == f"fail    network.tcp         {said}"


def test_a_wrong_password(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = doctor(capsys, "--bundle", bundle(fleet.folder, password="wrong"))
    assert status == 1
    assert states(found, *BROKER) == ["ok", "fail", "unknown", "unknown"]
    assert "regrow device add" in found["broker.login"]["cure"]


def test_something_else_on_the_port(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        file = bundle(fleet.folder, broker=f"mqtt://127.0.0.1:{silent.getsockname()[1]}")
        status, found = doctor(capsys, "--bundle", file)
    assert status == 1
    assert states(found, *BROKER) == ["ok", "fail", "unknown", "unknown"]


def test_a_broker_with_a_rule_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    credentials = Credentials(tmp_path / "home")
    credentials.add_device("d1")
    broker = Broker(tmp_path / "home", credentials, kind="amqtt")
    broker.start()  # for its configuration and a free port
    broker.stop()
    narrow = Child(["telemetry", tmp_path / "home" / "embedded.json"], tmp_path / "narrow.log", module="tests.cli.narrow_broker")
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", broker.port)) == 0, "the broker to listen")
        credentials.write_bundle("d1", broker.url, tmp_path)
        status, found = doctor(capsys, "--bundle", tmp_path / "d1.json")
    finally:
        narrow.kill()
    assert status == 1
    assert states(found, *BROKER) == ["ok", "ok", "fail", "warn"], found
    assert found["broker.rights"]["said"] == "what it says on its topics for telemetry is not delivered"


def test_a_running_agent_is_left_alone_and_answers_through_the_gateway(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.serve()
    agent = fleet.device("d1")
    agent.said("connected to")
    state = fleet.folder / "d1.state"
    until(lambda: (state / HEALTH).exists(), "its health")
    _, found = doctor(capsys, "--bundle", fleet.folder / "d1.json", "--state", state)
    assert found["broker.rights"]["state"] == "unknown"
    assert "regrow doctor --device" in found["broker.rights"]["cure"]
    assert "an agent holds it" in found["state.folder"]["said"]
    fleet.reach_version(1)
    assert "connection lost" not in agent.text()

    _, found = doctor(capsys, "--device", "d1", "--runs", fleet.runs)
    assert states(found, "network.tcp", "broker.rights", "clock.difference", "training.step", "model.fit") == ["ok"] * 5, found
    assert found["model.fit"]["said"].startswith(fleet.run.name)
    assert "an agent holds it" in found["state.folder"]["said"]
    version = fleet.version()
    fleet.reach_version(version + 2)  # it trains on
    assert "connection lost" not in agent.text()
    assert [file.name for file in (fleet.runs / ".gateway" / "doctor").iterdir()] == ["lock"]


def test_a_device_that_is_away_and_a_gateway_that_is_not_there(
    fleet: Fleet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker_server.inquiry.ask.__defaults__", (3.0,))
    assert main(["doctor", "--device", "d1", "--runs", str(fleet.runs)]) == 1
    assert "nobody picked the question up in 3 s" in capsys.readouterr().err
    fleet.serve()
    until(lambda: away(fleet, capsys), "the gateway to ask")
    assert main(["doctor", "--device", "not a name", "--runs", str(fleet.runs)]) == 2
    assert "a-z" in capsys.readouterr().err


def away(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> bool:
    assert main(["doctor", "--device", "d2", "--runs", str(fleet.runs)]) == 1
    return "d2 did not answer in 3 s" in capsys.readouterr().err


# ---- the gateway -----------------------------------------------------------------------------------------------------------------------

GATEWAY = ("gateway.access", "broker.answers", "gateway.runs", "gateway.coordinator")


def test_a_gateway_that_serves_and_one_that_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Fleet(tmp_path / "fleet", wide_mlp(1, hidden=8), task_text("digits", stop="aggregations = 100000")) as fleet:
        assert states(doctor(capsys, "--runs", fleet.runs)[1], *GATEWAY) == ["ok", "unknown", "unknown", "unknown"]
        serve = fleet.serve()
        until(
            lambda: states(doctor(capsys, "--runs", fleet.runs)[1], *GATEWAY) == ["ok"] * 4,
            lambda: str(doctor(capsys, "--runs", fleet.runs)),
        )
        assert serve.stop() == 0
        status, found = doctor(capsys, "--runs", fleet.runs)
        assert status == 1
        assert states(found, *GATEWAY) == ["ok", "fail", "ok", "warn"], found
        log = fleet.run / "log.sqlite"
        log.write_bytes(b"nonsense" + log.read_bytes()[8:])
        for more in ("-wal", "-shm"):
            (fleet.run / f"log.sqlite{more}").unlink(missing_ok=True)
        assert doctor(capsys, "--runs", fleet.runs)[1]["gateway.runs"]["state"] == "fail"


def test_passwords_that_the_broker_does_not_know(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    home = fleet.runs / ".gateway"
    fleet.credentials.render(home)
    assert doctor(capsys, "--runs", fleet.runs)[1]["gateway.access"]["state"] == "ok"
    fleet.credentials.add_device("d9")
    found = doctor(capsys, "--runs", fleet.runs)[1]["gateway.access"]
    assert (found["state"], "d9" in found["said"]) == ("warn", True)
    (home / "credentials.json").chmod(0o644)
    assert doctor(capsys, "--runs", fleet.runs)[1]["gateway.access"]["state"] == "fail"


def test_an_external_broker(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = doctor(capsys, "--runs", fleet.runs, "--broker", fleet.broker_url)
    assert states(found, "broker.answers", "broker.rights") == ["ok", "ok"], found
    wrong = f"mqtt://{COORDINATOR}:wrong@127.0.0.1:{fleet.port}"
    status, found = doctor(capsys, "--runs", fleet.runs, "--broker", wrong)
    assert (status, states(found, "broker.answers", "broker.rights")) == (1, ["ok", "fail"])
    fleet.serve()
    assert doctor(capsys, "--runs", fleet.runs, "--broker", fleet.broker_url)[1]["broker.rights"]["state"] == "unknown"


# ---- what needs more of the system -----------------------------------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize(("options", "check", "word"), [("size=1m", "disk.write", "space"), ("size=1m,ro", "disk.free", "read-only")])
def test_a_disk_that_is_full_or_read_only(fleet: Fleet, tmp_path: Path, options: str, check: str, word: str) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    fill = f"mount -t tmpfs -o size=1m none {mount} && head -c 2000000 /dev/zero >{mount}/full; mount -o remount,{options} {mount}; "
    command = f"{sys.executable} -m cli.main doctor --json --bundle {fleet.folder}/d1.json --state {mount}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", fill + command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1, done.stderr
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert (found[check]["state"], word in found[check]["said"]) == ("fail", True), found


@pytest.mark.network
def test_mosquitto_with_a_rule_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mosquitto acknowledges what it does not deliver."""
    credentials = Credentials(tmp_path / "home")
    credentials.add_device("d1")
    broker = Broker(tmp_path / "home", credentials, kind="mosquitto")
    broker.start()
    try:
        credentials.write_bundle("d1", broker.url, tmp_path)
        assert doctor(capsys, "--bundle", tmp_path / "d1.json")[1]["broker.rights"]["state"] == "ok"
        access = tmp_path / "home" / "access"
        access.write_text("".join(line for line in access.read_text().splitlines(keepends=True) if "update" not in line))
        broker._child.send_signal(1)  # type: ignore[union-attr]  # without Broker.reload, which would write the rules anew
        said = until(lambda: missing(capsys, tmp_path / "d1.json"), "the rules to be read")
    finally:
        broker.stop()
    assert said == "what it says on its topics for updates is not delivered"


def missing(capsys: pytest.CaptureFixture[str], file: Path) -> str:
    found = doctor(capsys, "--bundle", file)[1]["broker.rights"]
    return found["said"] if found["state"] == "fail" else ""


def test_without_the_gateways_packages_a_device_still_examines_itself(fleet: Fleet, tmp_path: Path) -> None:
    """The bare install has neither amqtt nor onnx; here their import is refused."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text(
        "import sys\nclass No:\n    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('amqtt', 'onnx', 'rich', 'matplotlib', 'torch', 'cryptography', 'safetensors'):\n"
        "            raise ModuleNotFoundError(name=name)\nsys.meta_path.insert(0, No())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "doctor", "--json", "--bundle", str(fleet.folder / "d1.json"), "--task", str(fleet.task)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert "Traceback" not in done.stderr
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert states(found, "broker.login", "training.step", "model.fit") == ["ok"] * 3, found
    shutil.rmtree(tmp_path / "regrow-state-d1", ignore_errors=True)


def test_onnxruntime_reports_to_nobody(tmp_path: Path) -> None:
    """What it would send it first keeps below the user's home, so an empty home is what tells."""
    home = tmp_path / "home"
    home.mkdir()
    ours = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    words = [sys.executable, "-m", "cli.main", "doctor", "--json", "--runs", str(tmp_path)]
    done = subprocess.run(words, env={**ours, "HOME": str(home), "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60, check=False)
    assert states({finding["check"]: finding for finding in json.loads(done.stdout)}, "onnxruntime", "training.step") == ["ok", "ok"]
    assert list(home.rglob("*")) == []
