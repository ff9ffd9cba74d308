"""The updater's units: what they start is a command, systemd understands them, and little is open to a service that runs as root."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cli.main import parser
from edge_agent.slots import GOOD
from edge_agent.update_files import AGENT, PREFIX, SETTINGS, SUFFIX
from tests.docs.generate import ROOT

SERVICE, PATH = ROOT / "deploy" / "regrow-update.service", ROOT / "deploy" / "regrow-update.path"
EXPOSURE = 2.0
NEWER_THAN_SOME = ("RestartSteps", "RestartMaxDelaySec")  # systemd 254; older ones ignore them


def value(file: Path, key: str) -> str:
    found = re.search(rf"^{key}=(.*)$", file.read_text(), re.MULTILINE)
    assert found, key
    return found[1]


def test_the_units_name_what_the_updater_uses() -> None:
    command, *arguments = value(SERVICE, "ExecStart").split()
    assert command == f"{PREFIX / GOOD}/bin/regrow"
    assert parser().parse_args(arguments).command == "cli.update:update"
    assert value(SERVICE, "ConditionPathExists") == str(SETTINGS)
    assert value(SERVICE, "ReadWritePaths").split() == [str(PREFIX), f"-{AGENT}"]
    assert value(SERVICE, "TimeoutStartSec") == "infinity"
    assert value(PATH, "PathExistsGlob") == f"{AGENT}/spool/*{SUFFIX}"
    assert value(PATH, "Unit") == SERVICE.name


@pytest.mark.network
def test_systemd_understands_them(tmp_path: Path) -> None:
    for file in (SERVICE, PATH):
        text = file.read_text().replace(f"{PREFIX / GOOD}/bin/regrow", shutil.which("true") or "/bin/true")
        (tmp_path / file.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / SERVICE.name), str(tmp_path / PATH.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = [line for line in done.stderr.splitlines() if "regrow-update" in line and not any(key in line for key in NEWER_THAN_SOME)]
    assert not said


@pytest.mark.network
def test_little_is_open() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={10 * EXPOSURE:.0f}", str(SERVICE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= EXPOSURE
    assert done.returncode == 0
