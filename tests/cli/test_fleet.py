"""`regrow fleet` and `regrow join` as their user meets them."""

from __future__ import annotations

import base64
import json
import re
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

pytest.importorskip("cryptography")

from broker_server.fleet import coordinator_key, members
from broker_server.fleet.authority import Authority, check_request, verify
from broker_server.fleet.registry import Claim, Registry
from cli.main import main
from edge_agent import identity
from edge_agent.enrolment import TIMEOUT_S
from edge_agent.identity import Identity
from edge_agent.identity_folder import About, adopt, in_use
from regrow.errors import LocalError, PeerError


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
    assert re.search(r"^  added: \d{4}-\d\d-\d\d \d\d:\d\d$", said, re.MULTILINE)
    assert not re.search(r"\[|_s:", said), "no list of Python, no name of a field"


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
    assert main(["join", str(file), "--identity", str(tmp_path / "id"), "--wait", "0"]) == 1
    said = capsys.readouterr().err
    assert "cannot be reached" in said
    assert "regrow agent --identity" in said
    assert (tmp_path / "id" / "device.json").exists()


def test_join_asks_again_while_the_gateway_opens_its_door(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["fleet", "add", "a", "--out", str(tmp_path), *runs])
    answers = iter([PeerError("the door cannot be reached"), PeerError("the door cannot be reached"), SimpleNamespace(device="a")])

    def enrol(_: Path, __: float) -> object:
        answer = next(answers)
        if isinstance(answer, PeerError):
            raise answer
        return answer

    monkeypatch.setattr("cli.join.enrol", enrol)
    monkeypatch.setattr("cli.join.AGAIN_S", 0.0)
    assert main(["join", str(tmp_path / "a.claim.json"), "--identity", str(tmp_path / "id")]) == 0
    said = capsys.readouterr().out
    assert said.count("cannot join yet: the door cannot be reached; trying for 20 s") == 1
    assert "a is in fleet" in said


def test_join_waits_no_longer_for_a_silent_gateway_than_it_was_told(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["fleet", "add", "a", "--out", str(tmp_path), *runs])
    file = tmp_path / "a.claim.json"
    monkeypatch.setattr("cli.join.LEAST_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        file.write_text(file.read_text().replace("192.0.2.1:8443", f"127.0.0.1:{silent.getsockname()[1]}"))
        began_s = time.monotonic()
        assert main(["join", str(file), "--identity", str(tmp_path / "id"), "--wait", "0.2"]) == 1
        assert time.monotonic() - began_s < TIMEOUT_S / 2
    assert capsys.readouterr().out.splitlines()[-1].endswith(" to let a in"), "before it waits"


def test_join_again_with_the_claim_that_let_the_device_in_is_well(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["fleet", "add", "a", "--out", str(tmp_path), *runs])
    file, folder = tmp_path / "a.claim.json", tmp_path / "id"

    def answered(about: About, fields: dict[str, str], _: float) -> tuple[int, dict[str, object]]:
        csr, key, proof = (base64.b64decode(fields[name]) for name in ("csr", "signing_key", "proof"))
        assert about.claim is not None
        request = check_request(csr, key, proof, about.device)
        try:
            pem = members.enrol(registry(runs), Authority(registry(runs).folder), about.device, about.claim.token, request)
        except PeerError as error:
            return 403, {"error": str(error)}
        return 200, {"certificate": pem}

    monkeypatch.setattr("edge_agent.enrolment._post", answered)
    join = ["join", str(file), "--identity", str(folder)]
    assert main(join) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with in_use(folder):
        assert main(join) == 0
    assert "a is in fleet farm already" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == {**before, "running": b""}
    members.revoke(registry(runs), "a")
    assert main(["fleet", "add", "a", "--out", str(tmp_path), *runs]) == 0
    assert main(join) == 0
    assert "already" not in capsys.readouterr().out, "this claim is another one"
    file.write_text("{")
    assert main(join) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"regrow: {file}: not a device's identity or claim")
    assert "copy it from the gateway again" in said
    assert "revoke" not in said


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
        assert main(["join", str(tmp_path / "d1.claim.json"), "--identity", str(tmp_path / "d1")]) == 1
    assert capsys.readouterr().err.count(f"another agent runs with the identity in {tmp_path / 'd1'}: stop it") == 2
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


def test_another_claim_says_that_the_one_before_is_of_no_use(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fleet", "add", "pi-01", "--out", str(tmp_path), *runs]
    assert main(words) == 0
    assert "no longer works" not in capsys.readouterr().out
    first = (tmp_path / "pi-01.claim.json").read_bytes()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "the claim made before, until 20" in said
    assert "no longer works: use this file in its place" in said
    assert (tmp_path / "pi-01.claim.json").read_bytes() != first
    with registry(runs).change() as devices:
        claim = devices["pi-01"].claim
        assert claim is not None
        devices["pi-01"] = msgspec.structs.replace(devices["pi-01"], claim=msgspec.structs.replace(claim, expires_s=5))
    assert main(words) == 0
    assert "no longer works" not in capsys.readouterr().out, "it had ended by itself"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "x", "--days", "1e9"], "--days: '1e9' is not a number of days above 0 and up to 3650"),
        (["add", "x", "--days", "0"], "--days: '0' is not a number above 0"),
        (["add", "x", "--days", "nan"], "--days: 'nan' is not a number above 0"),
        (["rotate", "--coordinator", "--days", "1e300"], "--days: '1e300' is not a number of days above 0 and up to 3650"),
        (["update", "--wheel", "x", "--minutes", "1e9"], "--minutes: '1e9' is not a number of minutes above 0 and up to 10080"),
        (["update", "--wheel", "x", "--percent", "1e9"], "--percent: '1e9' is not a number from 0 to 100"),
        (["init", "x", "--tls-port", "1e9"], "--tls-port: '1e9' is not a whole number above 0"),
        (["init", "x", "--enrol-port", "0"], "--enrol-port: '0' is not a whole number above 0"),
    ],
)
def test_numbers_have_bounds_that_are_told(runs: list[str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fleet", *words, *runs])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)
    assert registry(runs).devices() == {}


def test_the_longest_claim_can_be_made_and_shown(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "add", "x", "--days", "3650", "--out", str(tmp_path), *runs]) == 0
    assert main(["fleet", "list", *runs]) == 0
    assert main(["fleet", "show", "x", *runs]) == 0
    assert "x: claimed" in capsys.readouterr().out


def test_a_registry_of_an_earlier_version_is_read_and_its_unused_field_goes(runs: list[str]) -> None:
    file = registry(runs).folder / "devices.json"
    file.write_text(json.dumps({"version": 1, "devices": {"a": {"state": "active", "added_s": 5, "percentile": 42.5}}}))
    assert registry(runs).device("a").state == "active"
    members.stand(registry(runs), "a", "paused")
    assert "percentile" not in file.read_text()
    file.write_text(json.dumps({"version": 1, "devices": {"a": {"state": "active", "added_s": 5, "percent": 42.5}}}))
    with pytest.raises(LocalError, match=r"devices\.json does not check out: .*percent.*restore the fleet's folder"):
        registry(runs).devices()


def test_the_coordinators_key_is_changed_by_a_command_that_says_how_far_it_is(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        main(["fleet", "add", name, "--offline", "--out", str(tmp_path), *runs])
    main(["fleet", "add", "c", "--out", str(tmp_path), *runs])
    capsys.readouterr()
    rotate = ["fleet", "rotate", "--coordinator", *runs]
    assert main([*rotate, "--finish"]) == 2
    assert "`regrow fleet rotate --coordinator` begins it" in capsys.readouterr().err
    assert main(rotate) == 0
    said = capsys.readouterr().out
    assert "announces to the devices under the old one" in said
    assert "back up" in said
    assert "0 of 2 devices know the new key; not yet: a, b; claims made before it, not used yet: c;" in said
    first = registry(runs).fleet().key_change_until_s
    coordinator_key.heard(registry(runs), "a", 1)
    assert main([*rotate, "--days", "60"]) == 0
    assert "1 of 2 devices know the new key; not yet: b; claims" in capsys.readouterr().out
    later = registry(runs).fleet().key_change_until_s
    assert first is not None
    assert later is not None
    assert later > first
    assert main([*rotate, "--finish"]) == 0
    said = capsys.readouterr().out
    assert "b missed the change of the coordinator's key and hears nothing any more: `regrow fleet revoke b`" in said
    assert "the claim of c is from before the change of the coordinator's key: `regrow fleet add c` makes another" in said
    assert main(["fleet", "add", "c", "--out", str(tmp_path), *runs]) == 0
    assert main(["fleet", "show", "c", *runs]) == 0
    assert "before the change" not in capsys.readouterr().out
    for words in (["list"], ["show", "b"]):
        assert main(["fleet", *words, *runs]) == 0
        assert "b missed the change of the coordinator's key" in capsys.readouterr().out
    assert main(["fleet", "show", "a", *runs]) == 0
    assert "missed" not in capsys.readouterr().out
    assert main(["fleet", "list", *runs]) == 0
    _, a, b, c, *_ = capsys.readouterr().out.splitlines()
    assert ["  hears nothing  " in row for row in (a, b, c)] == [False, True, False]
    main(["doctor", "--json", *runs])
    found = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}["gateway.devices"]
    assert found["state"] == "warn"
    assert found["said"].startswith("b missed the change of the coordinator's key")
    assert main(["doctor", "--device", "b", *runs]) == 1
    assert capsys.readouterr().err.startswith(
        "regrow: b missed the change of the coordinator's key and hears nothing any more: `regrow fleet"
    )


def test_a_claim_that_has_expired_is_told_with_the_command_that_helps(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fleet", "add", "a", "--out", str(tmp_path), *runs])
    with registry(runs).change() as devices:
        devices["a"] = msgspec.structs.replace(devices["a"], claim=Claim(token="ab", expires_s=5))
    capsys.readouterr()
    for words, said in ((["list"], "a       claim expired  "), (["show", "a"], "a: claim expired\n")):
        assert main(["fleet", *words, *runs]) == 0
        found = capsys.readouterr().out
        assert said in found
        assert "the claim of a has expired: `regrow fleet add a` makes another" in found
    assert main(["doctor", "--device", "a", *runs]) == 1
    assert "its claim has expired: `regrow fleet add a` makes another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rotate"], "say whose keys"),
        (["rotate", "a", "--coordinator"], "say whose keys"),
        (["rotate", "a", "--finish"], "--days and --finish are for --coordinator"),
        (["rotate", "a", "--days", "3"], "--days and --finish are for --coordinator"),
    ],
)
def test_rotate_is_told_whose_keys(runs: list[str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", *words, *runs]) == 2
    assert said in capsys.readouterr().err


def test_releases_stay_signed_by_the_key_that_updaters_believe(runs: list[str], tmp_path: Path) -> None:
    folder = registry(runs).folder
    first = Authority(folder).signing_key
    coordinator_key.begin(registry(runs))
    assert coordinator_key.finish(registry(runs)) == []
    assert Authority(folder).signing_key != first == Authority(folder).release_key
    assert verify(first, b"release", Authority(folder).sign_release(b"release"))
    claim = json.loads(members.write_claim(registry(runs), "a", tmp_path).read_text())
    assert claim["coordinator_keys"] == [Authority(folder).signing_key.hex()]
    assert claim["release_keys"] == [first.hex()]
    main(["fleet", "add", "b", "--offline", "--out", str(tmp_path), *runs])
    assert Identity.load(tmp_path / "b").about.keys_number == 2, "it knows the newest"


@pytest.mark.parametrize("command", [["fleet", "init", "other", "--host", "h", "--fleet", "{tmp}/other"], ["fleet", "add", "x"]])
def test_a_full_disk_is_named_with_the_file_and_the_cure(
    runs: list[str], tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")  # of a write the system names no file

    monkeypatch.setattr("broker_server.durable.os.fsync", full)
    assert main([*(word.format(tmp=tmp_path) for word in command), "--out", str(tmp_path), *runs][: None if "add" in command else -4]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"regrow: {tmp_path}")
    assert said.endswith(": No space left on device; free space on that disk, and say it again\n")


@pytest.mark.parametrize("name", ["device.key", "signing.key"])
def test_a_key_that_is_missing_is_named_with_the_commands_that_help(
    runs: list[str], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fleet", "add", "a", "--offline", "--out", str(tmp_path), *runs])
    (tmp_path / "a" / name).unlink()
    capsys.readouterr()
    assert main(["agent", "--identity", str(tmp_path / "a"), "--data", "x.npz"]) == 1
    cure = f"`regrow fleet revoke a` and `regrow fleet add a` on the gateway, then `regrow join a.claim.json --identity {tmp_path / 'a'}`"
    assert capsys.readouterr().err == (f"regrow: {tmp_path / 'a' / name} is missing; let this device in anew: {cure} on the device\n")


def test_an_agent_whose_certificate_has_ended_is_told_the_commands(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("broker_server.fleet.authority.DEVICE_DAYS", -3)
        main(["fleet", "add", "a", "--offline", "--out", str(tmp_path), *runs])
    assert main(["agent", "--identity", str(tmp_path / "a"), "--data", str(tmp_path / "none.npz")]) in (1, 2)
    (said,) = [record.getMessage() for record in caplog.records if "ended" in record.getMessage()]
    assert said.startswith("by this clock the certificate of a ended on 20")
    assert f"`regrow join a.claim.json --identity {tmp_path / 'a'}`" in said
    members.revoke(registry(runs), "a")
    claim = members.write_claim(registry(runs), "a", tmp_path)
    enrolled = enrolled_with(registry(runs), tmp_path / "a", claim)
    assert enrolled.ended(time.time()) == ""


def enrolled_with(fleet: Registry, folder: Path, claim: Path) -> Identity:
    """As by `regrow join`, but for the way of the request."""
    about = adopt(folder, claim)
    assert about.claim is not None
    asked = identity.request(folder)
    request = check_request(asked.csr, asked.signing_key, asked.proof, about.device)
    return identity.accept(folder, members.enrol(fleet, Authority(fleet.folder), about.device, about.claim.token, request).encode())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "9464", "--metrics-port", "9464"], "--metrics-port and --port are both 9464"),
        (["--tls-port", "1883"], "--port and --tls-port are both 1883"),
        (["--port", "8883"], "--port and the fleet's --tls-port are both 8883"),
        (["--metrics-port", "8443"], "--metrics-port and the fleet's --enrol-port are both 8443"),
        (["--tls-port", "8443"], "--tls-port and the fleet's --enrol-port are both 8443"),
    ],
)
def test_serve_wants_ports_that_differ(
    runs: list[str], tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.task import save_model
    from tests.testbed.processes import task_text, wide_mlp

    task = tmp_path / "task"
    task.mkdir()
    (task / "task.toml").write_text(task_text("t"))
    save_model(wide_mlp(0, 8), task / "model.onnx")
    assert main(["serve", str(task), "--plain", *words, *runs]) == 2
    complaint = capsys.readouterr().err
    assert f"regrow: {said}: each needs a port of its own; say another {said.split()[0]}\n" == complaint
