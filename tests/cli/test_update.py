"""`regrow fleet update` on the gateway and `regrow update` on a device: what they say, and what they refuse in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from broker_server.fleet import members
from broker_server.fleet.registry import Claim, Device, Registry
from broker_server.fleet.releases import Releases
from cli.main import main
from regrow import wire
from tests.edge_agent.release_rig import KEY, PUBLIC, bundle_of, make_wheel, manifest_of, wheels_of


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    folder = tmp_path / "fleet"
    members.init(folder, "yard", ["127.0.0.1"])
    with Registry(folder).change() as devices:
        devices.update({f"d{number}": Device(state="active", added_s=1) for number in range(8)})
    return folder


def test_a_release_is_staged_widened_shown_and_halted(fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel, _ = (str(file) for file in wheels_of(tmp_path / "wheels", "2.0.0"))
    stage = ["fleet", "update", "--fleet", str(fleet), "--wheel", wheel, "--wheels", str(tmp_path / "wheels")]
    assert main(["fleet", "update", "--fleet", str(fleet), "--status"]) == 0
    assert "no release was ever staged" in capsys.readouterr().out
    assert main([*stage, "--percent", "0", "--minutes", "5"]) == 0
    assert "release 1: regrow 2.0.0, 2 wheels, staged" in capsys.readouterr().out
    assert main([*stage, "--percent", "100", "--minutes", "5"]) == 0
    said = capsys.readouterr().out
    assert "widened" in said
    assert "100 %: 8 of 8 devices" in said
    assert main([*stage, "--percent", "20", "--minutes", "5"]) == 0
    said, complaint = capsys.readouterr()
    assert "no wider now" in said
    assert "100 %: 8 of 8 devices" in said
    assert not complaint
    releases = Releases(Registry(fleet))
    releases.note_report("d1", wire.ReleaseReport(number=1, state="fetching", percent=40, version="1.0.0"))
    releases.note_report("d2", wire.ReleaseReport(number=1, state="rolled back", reason="trial: no round"))
    assert main(["fleet", "update", "--fleet", str(fleet), "--status"]) == 0
    said = capsys.readouterr().out
    assert "fetching 40 %" in said
    assert "rolled back: trial: no round" in said
    assert main(["fleet", "update", "--fleet", str(fleet), "--status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["release"], found["halted"], len(found["devices"])) == (1, False, 8)
    assert main(["fleet", "update", "--fleet", str(fleet), "--halt"]) == 0
    assert "offered to nobody any more" in capsys.readouterr().out
    assert main([*stage, "--force-downgrade", "--contact-only", "--board", "pi"]) == 0
    newest = releases.newest()
    assert newest is not None
    manifest = newest.opened()
    assert (manifest.number, manifest.forced, manifest.wants, manifest.boards) == (2, True, "contact", ["pi"])


def test_the_status_says_why_a_device_says_nothing(fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel, _ = (str(file) for file in wheels_of(tmp_path / "wheels", "2.0.0"))
    with Registry(fleet).change() as devices:
        devices["d4"] = Device(state="claimed", added_s=1, claim=Claim(token="ab", expires_s=2))
        devices["d5"] = Device(state="claimed", added_s=1, claim=Claim(token="ab", expires_s=2**40))
        devices["d6"] = Device(state="revoked", added_s=1)
    (fleet / "seen.json").write_text(json.dumps({"d1": {"seen_s": 5, "doing": "working"}, "d6": {"seen_s": 5, "doing": "working"}}))
    assert main(["fleet", "update", "--fleet", str(fleet), "--wheel", wheel, "--wheels", str(tmp_path / "wheels")]) == 0
    Releases(Registry(fleet)).note_report("d2", wire.ReleaseReport(number=1, state="healthy"))
    capsys.readouterr()
    assert main(["fleet", "update", "--fleet", str(fleet), "--status", "--json"]) == 0
    said = {row["device"]: row["what became of it"] for row in json.loads(capsys.readouterr().out)["devices"]}
    wanted = ["never heard of", "its agent runs without --updates", "healthy", "never heard of"]
    assert [said[f"d{number}"] for number in range(4)] == wanted
    assert [said[f"d{number}"] for number in (4, 5, 6)] == ["claim expired: regrow fleet add d4", "has not joined yet", "revoked"]
    assert main(["fleet", "update", "--fleet", str(fleet), "--status"]) == 0
    assert "start it with --updates /etc/regrow/update.json there" in capsys.readouterr().out
    (fleet / "seen.json").unlink()
    assert main(["fleet", "update", "--fleet", str(fleet), "--status"]) == 0
    assert "start it with" not in capsys.readouterr().out


def test_a_full_disk_is_named_when_a_release_is_staged(
    fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    wheel, _ = (str(file) for file in wheels_of(tmp_path / "wheels", "2.0.0"))
    monkeypatch.setattr("broker_server.durable.os.fsync", full)
    assert main(["fleet", "update", "--fleet", str(fleet), "--wheel", wheel, "--wheels", str(tmp_path / "wheels")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"regrow: {fleet}/releases/files/")
    assert said.endswith(": No space left on device; free space on that disk, and say it again\n")
    assert Releases(Registry(fleet)).newest() is None


def test_a_release_without_what_it_depends_on_is_warned_of(fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs = ("onnxruntime>=1.17", "Paho_MQTT (>=2)", 'cryptography; extra == "fleet"', 'torch; extra == "torch"')
    wheel, _ = wheels_of(tmp_path / "wheels", "2.0.0", needs=needs)
    assert main(["fleet", "update", "--fleet", str(fleet), "--wheel", str(wheel)]) == 0
    assert "warning: this release lacks cryptography, onnxruntime, paho-mqtt: " in capsys.readouterr().err
    assert main(["fleet", "update", "--fleet", str(fleet), "--wheel", str(wheel), "--wheels", str(tmp_path / "wheels")]) == 0
    assert "warning: this release lacks cryptography, paho-mqtt: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--wheel", "{tmp}/none.whl"], "none.whl"),
        (["--wheel", "{tmp}/numpy-2-py3-none-any.whl"], "expected the wheel of regrow"),
        (["--wheel", "{wheel}", "--wheels", "{tmp}/empty"], "no wheel in this folder"),
        (["--halt"], "none to halt"),
    ],
)
def test_what_cannot_be_staged_is_one_line(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    wheel, _ = wheels_of(tmp_path / "wheels", "2.0.0")
    make_wheel(tmp_path, "numpy", "2", "numpy", "")
    (tmp_path / "empty").mkdir()
    assert main(["fleet", "update", "--fleet", str(fleet), *(word.format(tmp=tmp_path, wheel=wheel) for word in words)]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A prefix whose first environment says version 1.5.0; returns the settings."""
    prefix = tmp_path / "opt"
    (prefix / "a").mkdir(parents=True)
    (prefix / "a" / "release.json").write_text(json.dumps({"number": 5, "version": "1.5.0", "wheels": []}))
    (prefix / "current").symlink_to("a")
    settings = tmp_path / "update.json"
    paths = {"prefix": str(prefix), "spool": str(tmp_path / "spool"), "health": str(tmp_path / "health.json")}
    settings.write_text(json.dumps({"keys": [PUBLIC.hex()], **paths, "restart": ["true"]}))
    settings.chmod(0o644)
    return settings


def test_a_device_says_what_runs_and_whether_a_bundle_would_be_taken(
    device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--settings", str(device)]
    assert main(["update", "status", *told]) == 0
    assert f"{tmp_path / 'opt' / 'a'}: 1.5.0 current, good\n{tmp_path / 'opt' / 'b'}: empty\n" == capsys.readouterr().out
    assert main(["update", "check", *told]) == 0
    assert "no bundle in" in capsys.readouterr().out
    assert main(["update", "apply", *told]) == 0
    assert "no release was ever applied" in capsys.readouterr().out
    wheels = wheels_of(tmp_path / "wheels", "2.0.0")
    right, wrong = tmp_path / "1.bundle", tmp_path / "2.bundle"
    right.write_bytes(bundle_of(manifest_of(wheels, 1, "2.0.0"), wheels, KEY))
    wrong.write_bytes(right.read_bytes()[:-1])
    assert main(["update", "check", str(right), *told]) == 0
    assert "regrow 2.0.0: would be installed" in capsys.readouterr().out
    assert main(["update", "check", str(wrong), *told]) == 1
    assert "cut off" in capsys.readouterr().out
    assert main(["update", "apply", str(wrong), *told]) == 0
    assert "2.bundle is refused" in capsys.readouterr().out
    assert wrong.exists(), "a bundle that a person brought stays theirs"
    assert main(["update", "status", *told]) == 0
    assert "refused 2.bundle: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["rollback"], "holds no whole version to go back to"),
        (["status", "x.bundle"], "takes no bundle"),
        (["apply", "none.bundle"], "none.bundle: no such file"),
        (["check", "none.bundle"], "No such file"),
    ],
)
def test_what_a_device_cannot_do_is_said(device: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str) -> None:
    assert main(["update", *words, "--settings", str(device)]) == (2 if "takes" in why else 1)
    said = capsys.readouterr()
    assert why in said.err + said.out


def test_a_device_without_a_first_version_is_told_how_to_get_one(device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "opt" / "current").unlink()
    assert main(["update", "apply", "--settings", str(device)]) == 1
    assert "install the first version as docs/updates.md says" in capsys.readouterr().err
