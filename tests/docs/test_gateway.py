"""The files of docs/gateway.md: the compose file's promises, and that Regrow and mosquitto take what is in them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker_server.broker import find_mosquitto
from broker_server.credentials import COORDINATOR, Credentials
from broker_server.transport import check_broker
from cli import settings
from cli.main import main, parser
from regrow.errors import LocalError
from tests.broker_server.test_metrics import exported
from tests.docs.blocks import blocks
from tests.docs.generate import ROOT
from tests.network.other_brokers import free_ports
from tests.testbed.processes import until

PAGE = ROOT / "docs" / "gateway.md"
COMPOSE, EXTERNAL = ROOT / "deploy" / "compose", ROOT / "deploy" / "external"
SERVICES: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
MOSQUITTO = (COMPOSE / "mosquitto.conf", EXTERNAL / "mosquitto.conf")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid"} & service.keys()
    assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", service["image"]), "a tag that names one version"
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert "mem_limit" in service
    assert not any("docker.sock" in volume for volume in service["volumes"])
    for published in service.get("ports", ()):
        assert published.startswith(("127.0.0.1:", "${REGROW_ADDRESS:-127.0.0.1}:"))


def test_secrets_are_files() -> None:
    text = (COMPOSE / "compose.yaml").read_text()
    assert set(yaml.safe_load(text)["secrets"]) == {"broker_password", "grafana_password"}
    assert not re.search(r"(?i)password\w*: *(?!/run/secrets/)[^\s{\[]", text)


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_is_there_or_named(name: str) -> None:
    made_by_the_owner = {"./broker", "./tasks"}
    for volume in SERVICES[name]["volumes"]:
        source = volume.split(":")[0]
        assert source in made_by_the_owner or not source.startswith(".") or (COMPOSE / source).exists(), source


def test_the_gateways_settings_are_taken() -> None:
    words = [*SERVICES["gateway"]["command"][:1], "--config", str(COMPOSE / "gateway.toml")]
    found = settings.parse(parser("serve"), "serve", words, set)
    assert found.broker == f"mqtt://{COORDINATOR}@mosquitto:1883"
    assert str(found.broker_password_file) == "/run/secrets/broker_password"
    assert f"gateway:{found.metrics_port}" in (COMPOSE / "prometheus.yml").read_text()
    assert str(found.metrics_port) in " ".join(SERVICES["gateway"]["healthcheck"]["test"])


def test_the_drop_in_starts_a_command() -> None:
    text = (EXTERNAL / "regrow-gateway.conf").read_text().replace("\\\n", "")
    command, *words = shlex.split(re.sub(r"\$\{?\w+\}?", "x", re.findall(r"^ExecStart=(.+)$", text, re.MULTILINE)[-1]))
    assert command == "/opt/regrow/bin/regrow"
    assert parser().parse_args(words).command == "cli.gateway:serve"


def test_the_page_shows_what_config_show_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file_block,) = (block for block in blocks(PAGE) if block.language == "toml")
    (shown,) = (block for block in blocks(PAGE) if block.language == "text")
    file = tmp_path / "gateway.toml"
    file.write_text(file_block.text)
    monkeypatch.setenv("REGROW_CONFIG", str(file))
    monkeypatch.setenv("REGROW_PORT", "1884")
    assert main(["config", "show", "--", "--host", "192.0.2.1"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.replace(str(file), "/etc/regrow/gateway.toml").splitlines()]
    assert [line for line in shown.text.splitlines() if line.split() not in printed] == []  # the page leaves options out


def test_the_page_names_every_metric() -> None:
    text = PAGE.read_text()
    for name in exported():
        family = re.sub("_(bucket|count|sum|created)$", "", name)
        assert f"`{family}`" in text or name.startswith(("process_", "python_")) or name.endswith("_created"), name


@pytest.mark.network
@pytest.mark.parametrize("file", MOSQUITTO, ids=lambda file: file.parent.name)
def test_mosquitto_takes_its_configuration(file: Path, tmp_path: Path) -> None:
    runs, files, password = tmp_path / "runs", tmp_path / "regrow", tmp_path / "secrets" / "password"
    assert main(["device", "add", "d1", "--runs", str(runs), "--out", str(tmp_path)]) == 0
    assert main(["device", "broker-files", "--runs", str(runs), "--out", str(files), "--coordinator-password", str(password)]) == 0
    (port,) = free_ports(1)
    text = re.sub(r"^listener .*$", f"listener {port} 127.0.0.1\nuser root", file.read_text(), flags=re.MULTILINE)
    (tmp_path / "mosquitto.conf").write_text(re.sub(r"/(etc/)?mosquitto/regrow", str(files), text))
    broker = subprocess.Popen([str(find_mosquitto()), "-c", str(tmp_path / "mosquitto.conf")], stderr=subprocess.DEVNULL)
    try:
        secret = password.read_text().strip()
        assert secret == Credentials(runs / ".gateway").coordinator_password
        until(lambda: answers(port, secret), "mosquitto lets the coordinator in")
        with pytest.raises(LocalError, match="refused the coordinator"):
            check_broker(f"mqtt://127.0.0.1:{port}", COORDINATOR, "wrong")
    finally:
        broker.terminate()
        broker.wait()


def answers(port: int, password: str) -> bool:
    try:
        check_broker(f"mqtt://127.0.0.1:{port}", COORDINATOR, password)
    except LocalError:
        return False
    return True
