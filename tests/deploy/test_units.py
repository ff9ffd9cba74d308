"""The systemd units start what the command line really has, systemd understands them, and they leave little open."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from broker_server.gateway import POLL_S as GATEWAY_POLL_S
from cli.main import parser
from edge_agent.agent import POLL_S as AGENT_POLL_S
from tests.docs.generate import ROOT

POLL_MOST_S = max(GATEWAY_POLL_S, AGENT_POLL_S)
UNITS = sorted(path.name for path in (ROOT / "deploy").glob("*.service") if path.name != "regrow-update.service")  # test_update_units
VALUES = {"REGROW_OPTIONS": "", "REGROW_DATA": "x.npz", "REGROW_TASK": "task", "STATE_DIRECTORY": "/s", "CREDENTIALS_DIRECTORY": "/c"}
EXPOSURE = {"regrow-agent.service": 2.0, "regrow-gateway.service": 3.0}
NEWER_THAN_SOME = ("RestartSteps", "RestartMaxDelaySec")  # systemd 254; older ones ignore them, as the unit says


def start_line(unit: str) -> list[str]:
    found = re.search(r"^ExecStart=(.*)$", (ROOT / "deploy" / unit).read_text().replace("\\\n", ""), re.MULTILINE)
    assert found
    return shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda name: VALUES[name[1]], found[1]))


@pytest.mark.parametrize("unit", UNITS)
def test_what_a_unit_starts_is_a_command(unit: str) -> None:
    command, *arguments = start_line(unit)
    assert command == "/opt/regrow/bin/regrow"
    assert parser().parse_args(arguments).command in ("cli.device:agent", "cli.gateway:serve")


@pytest.mark.network
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_a_unit(unit: str, tmp_path: Path) -> None:
    copy = tmp_path / unit
    copy.write_text((ROOT / "deploy" / unit).read_text().replace("/opt/regrow/bin/regrow", shutil.which("true") or "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False)
    said = [line for line in done.stderr.splitlines() if unit in line and not any(key in line for key in NEWER_THAN_SOME)]
    assert not said


def settings(unit: str) -> dict[str, str]:
    """Key -> value of every line; the last one where a key comes twice."""
    return dict(line.split("=", 1) for line in (ROOT / "deploy" / unit).read_text().splitlines() if re.match(r"[A-Z]\w+=", line))


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_watched_bounded_and_restarted(unit: str) -> None:
    found = settings(unit)
    assert found["Type"] == "notify"
    assert int(found["WatchdogSec"].removesuffix("s")) >= 6 * POLL_MOST_S  # fed three times in it, by a loop that turns that often
    assert found["MemoryMax"]
    assert found["LogNamespace"] == "regrow"
    assert int(found["LogRateLimitBurst"]) <= 1000
    assert found["LimitCORE"] == "0"
    assert found["Restart"] in ("always", "on-failure")
    assert found["RestartMaxDelaySec"]


def test_the_journal_of_the_units_is_bounded() -> None:
    text = (ROOT / "deploy" / "journald@regrow.conf").read_text()
    assert "\n[Journal]\n" in text
    assert "\nSystemMaxUse=64M\n" in text


@pytest.mark.network
@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_leaves_little_open(unit: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={10 * EXPOSURE[unit]:.0f}"]
    done = subprocess.run([*command, str(ROOT / "deploy" / unit)], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= EXPOSURE[unit]
    assert done.returncode == 0
