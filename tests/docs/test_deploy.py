"""The systemd units start what the command line really has, and systemd understands them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cli.main import parser
from tests.docs.generate import ROOT

UNITS = sorted(path.name for path in (ROOT / "deploy").glob("*.service"))
VALUES = {"REGROW_OPTIONS": "", "REGROW_DATA": "x.npz", "REGROW_TASK": "task", "STATE_DIRECTORY": "/s", "CREDENTIALS_DIRECTORY": "/c"}
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
