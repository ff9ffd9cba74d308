"""`regrow fleet` and `regrow join` as their user meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from broker_server.fleet import members
from broker_server.fleet.registry import Registry
from cli.main import main
from edge_agent.identity import Identity
from edge_agent.identity_folder import in_use


@pytest.fixture
def runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """--runs DIR, with a fleet in it."""
    options = ["--runs", str(tmp_path / "runs")]
    assert main(["fleet", "init", "farm", "--host", "192.0.2.1", *options]) == 0
    said = capsys.readouterr().out
    assert "mqtts://192.0.2.1:8883" in said
    assert "https://192.0.2.1:8443" in said
    return options


def registry(runs: list[str]) -> Registry:
    return Registry(Path(runs[1]) / ".gateway" / "fleet")


def test_init_refuses_to_make_keys_twice(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    key = (registry(runs).folder / "ca.key").read_bytes()
    assert main(["fleet", "init", "farm", "--host", "192.0.2.1", *runs]) == 2
    assert "holds a fleet already" in capsys.readouterr().err
    assert (registry(runs).folder / "ca.key").read_bytes() == key


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["farm", "--tls-port", "99999"], "--tls-port 99999: 1 to 65535"),
        (["farm", "--enrol-port", "65536"], "--enrol-port 65536: 1 to 65535"),
        (["farm", "--tls-port", "8443"], "both 8443"),
        (["farm", "--host", "0.0.0.0"], "stands for all addresses"),
        (["farm", "--host", "::"], "stands for all addresses"),
        (["Bad Name"], "fleet 'Bad Name'"),
    ],
)
def test_init_refuses_what_no_device_could_find(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "init", "--host", "192.0.2.1", *words, "--runs", str(tmp_path / "runs")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_claim_is_written_for_its_owner_only_and_tells_no_secret_of_the_fleet(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fleet", "add", "pi-01", "--board", "pi5", "--out", str(tmp_path), *runs]) == 0
    file = tmp_path / "pi-01.claim.json"
    assert str(file) in capsys.readouterr().out
    assert file.stat().st_mode & 0o077 == 0
    text = file.read_text()
    assert "PRIVATE KEY" not in text
    token = json.loads(text)["claim"]["token"]
    assert main(["fleet", "show", "pi-01", "--json", *runs]) == 0
    assert token not in capsys.readouterr().out


def test_an_offline_identity_is_whole_and_says_what_it_is(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "add", "lab-1", "--offline", "--out", str(tmp_path), *runs]) == 0
    assert "for the lab only" in capsys.readouterr().out
    me = Identity.load(tmp_path / "lab-1")
    assert registry(runs).device("lab-1").good[0].serial == me.serial
    assert [path.name for path in tmp_path.glob("*.claim.json")] == []
    members.revoke(registry(runs), "lab-1")
    assert main(["fleet", "add", "lab-1", "--offline", "--out", str(tmp_path), *runs]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_device_that_was_put_out_does_nothing_any_more(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fleet", "add", "a", "--offline", "--out", str(tmp_path), *runs])
    (registry(runs).folder / "seen.json").write_text(json.dumps({"a": {"seen_s": 5, "doing": "working", "serial": "ab"}}))
    members.revoke(registry(runs), "a")
    capsys.readouterr()
    assert main(["fleet", "list", *runs]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["a", "revoked", "-"]


def test_list_and_show_say_what_a_device_is_and_does(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "list", *runs]) == 0
    assert "regrow fleet add NAME" in capsys.readouterr().out
    for name in ("b", "a"):
        main(["fleet", "add", name, "--offline", "--board", "pi5", "--out", str(tmp_path), *runs])
    main(["fleet", "add", "c", "--out", str(tmp_path), *runs])
    (registry(runs).folder / "seen.json").write_text(json.dumps({"a": {"seen_s": 5, "doing": "working", "serial": "ab"}}))
    capsys.readouterr()
    assert main(["fleet", "list", *runs]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "device"
    assert [row.split()[0] for row in rows] == ["a", "b", "c"]
    assert "working" in rows[0]
    assert "claim until" in rows[2]
    assert main(["fleet", "list", "--json", *runs]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["a"]["state"] == "active"
    assert found["a"]["board"] == "pi5"
    assert found["c"]["certificates"] == []
    assert main(["fleet", "revoke", "a", *runs]) == 0
    assert main(["fleet", "show", "a", *runs]) == 0
    said = capsys.readouterr().out
    assert "a: revoked" in said
    assert re.search(r"certificate 1: [0-9a-f]+, revoked \d{4}-\d\d-\d\d \d\d:\d\d$", said, re.MULTILINE)
    assert "in use" not in said


@pytest.mark.parametrize(("command", "state"), [("pause", "paused"), ("drain", "draining"), ("resume", "active")])
def test_standing_is_kept_for_the_gateway(runs: list[str], tmp_path: Path, command: str, state: str) -> None:
    main(["fleet", "add", "a", "--offline", "--out", str(tmp_path), *runs])
    assert main(["fleet", command, "a", *runs]) == 0
    assert registry(runs).device("a").state == state


def test_a_wipe_wants_to_be_meant(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fleet", "add", "a", "--offline", "--out", str(tmp_path), *runs])
    assert main(["fleet", "wipe", "a", *runs]) == 2
    assert "say --yes" in capsys.readouterr().err
    assert registry(runs).device("a").state == "active"
    assert main(["fleet", "wipe", "a", "--yes", *runs]) == 0
    assert registry(runs).device("a").state == "wiping"


@pytest.mark.parametrize("command", ["show", "revoke", "rotate", "pause", "resume", "drain"])
def test_a_device_that_is_not_there_is_one_line(runs: list[str], capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main(["fleet", command, "ghost", *runs]) == 2
    assert capsys.readouterr().err == "regrow: no device 'ghost' in this fleet: `regrow fleet list` names those that there are\n"


def test_without_a_fleet_the_cure_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "list", "--runs", str(tmp_path)]) == 2
    assert "regrow fleet init NAME" in capsys.readouterr().err


def test_join_without_a_gateway_keeps_the_claim_and_says_how_to_go_on(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fleet", "add", "a", "--out", str(tmp_path), *runs])
    file = tmp_path / "a.claim.json"
    file.write_text(file.read_text().replace("https://192.0.2.1:8443", "https://127.0.0.1:1"))
    assert main(["join", str(file), "--identity", str(tmp_path / "id")]) == 1
    said = capsys.readouterr().err
    assert "cannot be reached" in said
    assert "regrow agent --identity" in said
    assert (tmp_path / "id" / "device.json").exists()


def test_an_agent_wants_an_identity_or_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", "--data", "x.npz"]) == 2
    assert "needs identity or bundle" in capsys.readouterr().err
    bundle = tmp_path / "b.json"
    assert main(["agent", "--bundle", str(bundle), "--claim", "x", "--data", "x.npz"]) == 2
    assert "--claim begins an identity" in capsys.readouterr().err


def test_a_claim_is_kept_while_another_agent_uses_the_identity(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "add", "d1", "--offline", "--out", str(tmp_path), *runs]) == 0
    members.revoke(registry(runs), "d1")
    assert main(["fleet", "add", "d1", "--out", str(tmp_path), *runs]) == 0
    about = (tmp_path / "d1" / "device.json").read_bytes()
    command = ["agent", "--identity", str(tmp_path / "d1"), "--claim", str(tmp_path / "d1.claim.json"), "--data", "x.npz"]
    with in_use(tmp_path / "d1"):
        assert main(command) == 1
    assert f"another agent runs with the identity in {tmp_path / 'd1'}: stop it" in capsys.readouterr().err
    assert (tmp_path / "d1" / "device.json").read_bytes() == about


def test_passwords_at_a_door_need_amqtt_and_a_fleet(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from export.task import save_model
    from tests.testbed.processes import task_text, wide_mlp

    task = tmp_path / "task"
    task.mkdir()
    (task / "task.toml").write_text(task_text("t"))
    save_model(wide_mlp(0, 8), task / "model.onnx")
    for more in (["--broker-kind", "mosquitto", *runs], ["--runs", str(tmp_path / "none")]):
        assert main(["serve", str(task), "--passwords", "--plain", *more]) == 2
        assert "--passwords needs a fleet" in capsys.readouterr().err
    assert main(["serve", str(task), "--tls-port", "8883", "--plain", "--runs", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "--tls-port 8883 is for a fleet's devices, and there is no fleet in" in said
    assert "regrow fleet init" in said
