"""Images: what their files say, what they never hold, and that wrong words are refused before anything is written."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomllib

from broker_server.fleet import boards
from broker_server.fleet.boards import SYSTEMS
from broker_server.fleet.gateway_image import GatewayImage, write_gateway
from broker_server.fleet.images import Host, Image, claimed_device, ssh_keys_of, wifi_of
from cli.main import main
from regrow.errors import LocalError

ROOT = Path(__file__).resolve().parents[3]
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMtSqQBn4+YJRPyMqiJ5ND9zTaRZMYfyXMDTKoo/OKVC someone"
CLAIM = json.dumps({"device": "pi-07", "broker": "mqtts://gw:8883", "coordinator_keys": ["00" * 32], "claim": {"token": "once"}})


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """What every image is made of: a claim, a public key, a passphrase, wheels (only their names matter to what writes images)."""
    (tmp_path / "wheels").mkdir()
    for name in ("regrow", "pip", "onnxruntime", "cryptography"):
        (tmp_path / "wheels" / f"{name}-1-py3-none-any.whl").write_bytes(b"wheel")
    for python in ("310", "311", "313"):
        (tmp_path / "wheels" / f"numpy-1-cp{python}-cp{python}-manylinux_2_28_aarch64.whl").write_bytes(b"wheel")
    (tmp_path / "claim").write_text(CLAIM)
    (tmp_path / "key.pub").write_text(f"# mine\n{KEY}\n")
    (tmp_path / "passphrase").write_text("correct horse\n")
    return ["--device", "pi-07", "--claim", str(tmp_path / "claim"), "--wheels", str(tmp_path / "wheels"), "--out", str(tmp_path / "out")]


def first_boot(tmp_path: Path) -> list[str]:
    wifi = ["--wifi", 'Field "7"', "--wifi-passphrase", str(tmp_path / "passphrase"), "--country", "DE"]
    return [*wifi, "--ssh-key", str(tmp_path / "key.pub")]


def test_cloud_init_files_name_the_device_and_let_in_one_key(tmp_path: Path, given: list[str]) -> None:
    assert main(["image", "pi", *first_boot(tmp_path), "--timezone", "Europe/Berlin", *given]) == 0
    out = tmp_path / "out"
    head, text = (out / "user-data").read_text().split("\n", 1)
    user_data: Any = json.loads(text)
    assert head == "#cloud-config"
    assert (user_data["hostname"], user_data["timezone"], user_data["ssh_pwauth"]) == ("pi-07", "Europe/Berlin", False)
    (login,) = user_data["users"]
    assert (login["name"], login["lock_passwd"], login["ssh_authorized_keys"]) == ("pi", True, [KEY])
    assert user_data["runcmd"] == [["sh", "/boot/firmware/regrow/install.sh"]]
    assert "/etc/regrow/installed" in user_data["bootcmd"][0][-1], "what a power cut interrupts goes on at the next boot"
    network: Any = json.loads((out / "network-config").read_text())
    assert list(network["wifis"]["wlan0"]["access-points"]) == ['Field "7"']
    assert (out / "regrow" / "claim.json").read_text() == CLAIM
    assert b"correct horse" not in b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_without_a_key_nobody_may_log_in(tmp_path: Path, given: list[str]) -> None:
    assert main(["image", "pi", *given]) == 0
    assert json.loads((tmp_path / "out" / "user-data").read_text().split("\n", 1)[1])["users"] == []


def test_another_claim_is_another_instance(tmp_path: Path, given: list[str]) -> None:
    ids = []
    for number, token in enumerate(("once", "twice")):
        (tmp_path / "claim").write_text(CLAIM.replace("once", token))
        given[-1] = str(tmp_path / str(number))
        assert main(["image", "pi", *given]) == 0
        ids.append(json.loads((tmp_path / str(number) / "meta-data").read_text())["instance-id"])
    assert ids[0] != ids[1]


def test_an_older_pi_os_gets_a_script_that_cmdline_starts_once(tmp_path: Path, given: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "cmdline.txt").write_text("console=tty1 root=PARTUUID=1-02 rootwait\n")
    for _ in range(2):
        assert main(["image", "pi", "--os", "pi-os-bookworm", *first_boot(tmp_path), *given]) == 0
    line = (out / "cmdline.txt").read_text()
    assert line.startswith("console=tty1 root=PARTUUID=1-02 rootwait systemd.run=/boot/firmware/firstrun.sh ")
    assert line.count("systemd.run=") == 1
    assert line.count("\n") == 1
    settings = dict(shlex.split(word)[0].split("=", 1) for word in (out / "regrow" / "device.env").read_text().splitlines())
    expected = {"DEVICE": "pi-07", "PYTHON": "3.11", "USER": "pi", "TIMEZONE": "", "COUNTRY": "DE"}
    assert settings == {f"REGROW_{name}": value for name, value in expected.items()}
    assert (out / "regrow" / "wifi" / "regrow-wifi.nmconnection").is_file()


def test_without_cmdline_the_words_for_it_are_printed(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "pi", "--os", "pi-os-bookworm", *given]) == 0
    assert "append this to the one line of cmdline.txt" in capsys.readouterr().out


def test_the_installer_script_unpacks_what_was_put_in(tmp_path: Path, given: list[str]) -> None:
    assert main(["image", "generic", "--python", "3.13", *given]) == 0
    script = (tmp_path / "out" / "install-pi-07.sh").read_bytes()
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    there = script.replace(b"scratch=$(mktemp -d)", f"scratch={unpacked}".encode()).replace(b'rm -rf "$scratch"', b"true")
    there = there.replace(b'sh "$scratch/regrow/install.sh"', b"true")  # which needs root and systemd: bench/first_boot.py
    (tmp_path / "script.sh").write_bytes(there)
    done = subprocess.run(["sh", "script.sh"], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    before = {path.relative_to(tmp_path / "out" / "regrow"): path.read_bytes() for path in (tmp_path / "out" / "regrow").rglob("*.*")}
    after = {path.relative_to(unpacked / "regrow"): path.read_bytes() for path in (unpacked / "regrow").rglob("*.*")}
    assert before == after
    assert Path("install.sh") in after
    assert after[Path("timesyncd.conf")].startswith(b"[Time]\nFallbackNTP=gw 0.")


def test_every_script_of_an_image_is_one_that_a_shell_reads() -> None:
    scripts = sorted((ROOT / "deploy" / "image").rglob("*.sh"))
    assert len(scripts) == 5
    for script in scripts:
        subprocess.run([script.read_text().splitlines()[0].removeprefix("#!"), "-n", str(script)], check=True, timeout=10)


def test_wifi_keys_are_those_of_the_standard() -> None:
    key = "f42c6fc52df0ebef9ebb4b90b38a5f902e83fe1b135a70e23aed762e9710a12e"  # IEEE 802.11i, annex H.4
    assert wifi_of("IEEE", "password", "DE").key == key


def test_wifi_is_added_later_only_to_a_partition_of_ours(tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--wifi-passphrase", str(tmp_path / "passphrase"), "--country", "DE"]
    assert main(["image", "wifi", "Field", *words, "--out", str(tmp_path)]) == 2
    assert "no boot partition" in capsys.readouterr().err
    assert main(["image", "pi", *given]) == 0
    assert main(["image", "wifi", "Field", *words, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "regrow" / "wifi" / "regrow-wifi.nmconnection").read_text()
    assert "ssid=70;105;101;108;100;" in text
    assert "correct horse" not in text


def test_a_gateway_brings_its_task_and_opens_its_network(tmp_path: Path) -> None:
    task = tmp_path / "sensors"
    task.mkdir()
    (task / "task.toml").write_text('name = "sensors"\n')
    host = Host(SYSTEMS["pi-os-trixie"], "gateway")
    image = GatewayImage(host, "field", task, wifi_of("Fleet", "correct horse", "DE"), (), "regrow-data")
    write_gateway(image, tmp_path / "regrow")
    settings = (tmp_path / "regrow" / "gateway.conf").read_text()
    assert "REGROW_HOSTS='--host gateway.internal --host 10.42.0.1'" in settings
    assert "REGROW_SSD=regrow-data" in settings
    assert "mode=ap" in (tmp_path / "regrow" / "access-point.nmconnection").read_text()
    assert "local=/internal/\nhost-record=gateway.internal,10.42.0.1\n" in (tmp_path / "regrow" / "dnsmasq.conf").read_text()
    assert (tmp_path / "regrow" / "task" / "task.toml").is_file()
    with pytest.raises(LocalError, match="one radio"):
        GatewayImage(Host(SYSTEMS["pi-os-trixie"], "gateway", image.access_point), "field", task, image.access_point)
    with pytest.raises(LocalError, match="flash pi-os-trixie"):
        GatewayImage(Host(SYSTEMS["ubuntu-24.04"], "gateway"), "field", task, image.access_point)


def test_a_jetson_gets_the_container_of_its_jetpack(tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "jetson", "--jetpack", "6.0", *given]) == 0
    out = tmp_path / "out"
    assert "REGROW_BASE=nvcr.io/nvidia/l4t-jetpack:r36.3.0" in (out / "device.env").read_text()
    assert {path.name for path in out.iterdir()} >= {"Dockerfile", "install.sh", "regrow-agent-jetson.service", "wheels", "claim.json"}
    given[-1] = str(tmp_path / "other")
    assert main(["image", "jetson", "--jetpack", "4.6", *given]) == 2
    assert "one of 6.0, 6.1, 6.2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--os", "windows"], "--os 'windows': one of pi-os-trixie"),
        (["--user", "root"], "neither root nor regrow"),
        (["--timezone", "Mars; reboot"], "--timezone"),
        (["--agent-options", "--threads $(reboot)"], "cannot be carried"),
        (["--data", "/srv/my data"], "cannot be carried"),
        (["--wifi", "x" * 33, "--wifi-passphrase", "passphrase", "--country", "DE"], "1 to 32 bytes"),
        (["--wifi", "x", "--wifi-passphrase", "passphrase"], "two capital letters"),
        (["--ssh-key", "passphrase"], "SSH public keys"),
        (["--wheels", "empty"], "no wheels in it"),
        (
            ["--os", "ubuntu-24.04"],
            "is not for Python 3.12 on aarch64; `regrow image wheels --python 3.12 --architecture aarch64 --role agent",
        ),
        (["--architecture", "x86_64"], "-manylinux_2_28_aarch64.whl is not for Python 3.13 on x86_64"),
        (["--wheels", "compiled"], "cffi-1-cp311-cp311-manylinux_2_17_aarch64.whl is not for Python 3.13 on aarch64"),
        (["--wifi", "x", "--wifi-passphrase", "not-utf-8", "--country", "DE"], "8 to 63 printable ASCII"),
        (["--device", "pi-"], "'pi-' cannot be a host name"),
        (["--data", "nothere.npz"], "no such file here"),
        (["--device", "pi-08"], "the claim is pi-07's, not pi-08's"),
        (["--claim", "nowhere"], "`regrow fleet add pi-07` writes it"),
    ],
)
def test_wrong_words_are_named(
    tmp_path: Path, given: list[str], words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "compiled").mkdir()
    for name in (
        "cffi-1-cp311-cp311-manylinux_2_17_aarch64",
        "psutil-1-cp36-abi3-manylinux2014_aarch64",
        "numpy-1-cp313-cp313-linux_aarch64",
    ):
        (tmp_path / "compiled" / f"{name}.whl").write_bytes(b"wheel")
    (tmp_path / "not-utf-8").write_bytes(b"\xff\xfepassphrase")
    (tmp_path / "pi-.claim.json").write_text(CLAIM.replace("pi-07", "pi-"))
    assert main(["image", "pi", *given, *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["pi", "--wheels", "empty"],
        ["pi", "--os", "pi-os-bookworm", "--wheels", "empty"],
        ["generic", "--python", "3.12"],
        ["generic", "--wheels", "empty"],
        ["jetson", "--torch", "torch.whl"],
        ["jetson", "--wheels", "empty"],
        ["jetson", "--jetpack", "4.6"],
        ["gateway", "--fleet-name", "field", "--task", "task", "--wheels", "empty"],
        ["wheels", "--python", "2.7"],
    ],
    ids=" ".join,
)
def test_a_refused_command_leaves_everything_as_it_was(
    tmp_path: Path, given: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "task", "card"):
        (tmp_path / folder).mkdir()
    (tmp_path / "task" / "task.toml").write_text('name = "task"\n')
    (tmp_path / "card" / "cmdline.txt").write_text("rootwait\n")
    (tmp_path / "card" / "regrow").mkdir()
    (tmp_path / "card" / "regrow" / "claim.json").write_text("of before")
    before = sorted(tmp_path.rglob("*"))
    for out in ("deep/er/out", "empty", "card"):
        command = ["image", words[0], *(given[:-2] if words[0] not in ("gateway", "wheels") else []), *words[1:], "--out", out]
        assert main(command) == 2
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "card" / "cmdline.txt").read_text() == "rootwait\n"
    assert (tmp_path / "card" / "regrow" / "claim.json").read_text() == "of before"


def test_an_image_written_again_is_the_new_one_alone(tmp_path: Path, given: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.txt").write_text("of the card")
    assert main(["image", "pi", *given]) == 0
    (tmp_path / "out" / "regrow" / "wheels" / "old-1-py3-none-any.whl").write_bytes(b"of an older image")
    (tmp_path / "out" / ".regrow-image").mkdir()  # of a command that was killed
    assert main(["image", "pi", *given]) == 0
    assert not (tmp_path / "out" / "regrow" / "wheels" / "old-1-py3-none-any.whl").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.txt", "meta-data", "network-config", "regrow", "user-data"}


def test_a_full_disk_is_named_and_nothing_stays(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(source))  # as shutil does: it names what is copied

    monkeypatch.setattr("broker_server.fleet.images.shutil.copyfile", full)
    assert main(["image", "pi", *given]) == 1
    out = tmp_path / "out"
    assert capsys.readouterr().err == f"regrow: --out {out} was not written: No space left on device ({out}); free space at {out}\n"
    assert not out.exists()


def test_wheels_for_another_python_stay_behind(tmp_path: Path, given: list[str]) -> None:
    (tmp_path / "wheels" / "psutil-1-cp36-abi3-manylinux2014_aarch64.whl").write_bytes(b"wheel")
    assert main(["image", "pi", "--os", "pi-os-bookworm", *given]) == 0
    found = {path.name for path in (tmp_path / "out" / "regrow" / "wheels").iterdir()}
    assert "psutil-1-cp36-abi3-manylinux2014_aarch64.whl" in found
    assert [name for name in found if name.startswith("numpy")] == ["numpy-1-cp311-cp311-manylinux_2_28_aarch64.whl"]


def test_what_is_secret_in_an_image_is_its_owners_alone(tmp_path: Path, given: list[str]) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.toml").write_text('name = "task"\n')
    for name in ("onnx", "amqtt", "rich"):
        (tmp_path / "wheels" / f"{name}-1-py3-none-any.whl").write_bytes(b"wheel")
    wifi = first_boot(tmp_path)[2:]
    kinds = {
        "cloud": ["pi", *first_boot(tmp_path), *given],
        "older": ["pi", "--os", "pi-os-bookworm", *first_boot(tmp_path), *given],
        "script": ["generic", *given],
        "jetson": ["jetson", *given],
        "gateway": ["gateway", "--fleet-name", "f", "--task", str(tmp_path / "task"), "--access-point", "Field", *wifi, *given[4:]],
    }
    (tmp_path / "jetson").mkdir()
    for kind, words in kinds.items():
        out = tmp_path / kind
        assert main(["image", *words, "--out", str(out)]) == 0
        assert out.stat().st_mode & 0o777 == 0o700
        assert main(["image", "wifi", "Field", *wifi[:4], "--out", str(out)]) == (0 if (out / "regrow").is_dir() else 2)
        secret = (
            b'"token": "once"',
            wifi_of("Field", "correct horse", "DE").key.encode(),
            wifi_of('Field "7"', "correct horse", "DE").key.encode(),
        )
        held = [path for path in out.rglob("*") if path.is_file() and any(word in path.read_bytes() for word in secret)]
        assert held
        assert [path for path in held if path.stat().st_mode & 0o077] == []


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert main(["image", "pi", *given]) == 2
    assert "neither empty nor a boot partition" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_no_image_holds_what_another_device_or_the_gateway_has_as_its_secret(tmp_path: Path, given: list[str]) -> None:
    pytest.importorskip("cryptography")
    from broker_server.credentials import Credentials
    from broker_server.fleet import members
    from broker_server.fleet.registry import Registry

    fleet = tmp_path / "runs" / ".gateway" / "fleet"
    members.init(fleet, "farm", ["192.0.2.1"], tls_port=8883, enrol_port=8443)
    registry = Registry(fleet)
    claims = {name: members.write_claim(registry, name, tmp_path, days=1.0, board="") for name in ("pi-07", "pi-08")}
    secrets = [Credentials(tmp_path / "runs" / ".gateway").coordinator_password.encode(), b"correct horse", b"PRIVATE KEY"]
    for key in fleet.rglob("*.key"):
        secrets += [line for line in key.read_bytes().splitlines() if not line.startswith(b"-----")]
    assert len(secrets) > 5
    own, other = (json.loads(claims[name].read_text())["claim"]["token"].encode() for name in ("pi-07", "pi-08"))
    given[given.index("--claim") + 1] = str(claims["pi-07"])
    kinds = (["pi", *first_boot(tmp_path)], ["pi", "--os", "pi-os-bookworm", *first_boot(tmp_path)], ["generic"], ["jetson"])
    for number, kind in enumerate(kinds):
        given[-1] = str(tmp_path / f"image{number}")
        assert main(["image", *kind, *given]) == 0
        held = b"".join(path.read_bytes() for path in (tmp_path / f"image{number}").rglob("*") if path.is_file() and path.suffix != ".sh")
        assert own in held, "or this test looks in the wrong place"
        assert other not in held
        assert not [secret for secret in secrets if secret in held]


def test_nothing_with_a_key_in_it_is_taken_for_a_claim_or_a_public_key(tmp_path: Path) -> None:
    for text in ("", "[]", '{"device": "pi-07"}', CLAIM.replace("once", "-----BEGIN PRIVATE KEY-----")):
        with pytest.raises(LocalError, match="the claim"):
            claimed_device(text.encode())
    (tmp_path / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(LocalError, match="private key"):
        ssh_keys_of(tmp_path / "id")
    with pytest.raises(LocalError, match=r"pi-07's, not pi-08's"):
        Image(Host(SYSTEMS["pi-os-trixie"], "pi-08"), CLAIM.encode(), "/srv/regrow/samples.npz")


def test_what_is_locked_is_what_the_distribution_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    agent = {*project["dependencies"], *extras["fleet"], "pip>=24"}
    server = {need for name in ("server", "export") for need in extras[name] if not need.startswith("regrow")}
    assert set(boards.WANTED["agent"]) == agent
    assert set(boards.WANTED["gateway"]) == agent | server


def test_every_lock_names_a_version_and_a_digest_of_all_that_is_wanted() -> None:
    for role, wanted in boards.WANTED.items():
        for architecture in boards.ARCHITECTURES:
            for python in boards.pythons(role):
                lines = boards.lock_of(python, architecture, role).read_text().splitlines()[1:]
                names = {line.split("==")[0].lower().replace("_", "-") for line in lines}
                assert names >= {need.split(">")[0] for need in wanted}
                assert all("==" in line and len(line.split("--hash=sha256:")[1]) == 64 for line in lines)


@pytest.mark.network
@pytest.mark.timeout(600)
def test_every_locked_wheel_can_still_be_had() -> None:
    for role in boards.WANTED:
        for python in boards.pythons(role):
            assert len(boards.check_lock(python, boards.BOARDS, role)) >= len(boards.WANTED[role])
