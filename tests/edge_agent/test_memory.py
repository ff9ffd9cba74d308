"""What an agent offers to training: of the machine, and within the control groups that it is in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edge_agent.memory import spare_bytes

ROOT = Path(__file__).parents[2]


def write(path: Path, **files: str) -> None:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "proc/self")
    return tmp_path


def test_a_machine_without_limits_offers_nine_tenths_of_what_is_available(root: Path) -> None:
    assert spare_bytes(1000, root) == 900
    (root / "proc/self/cgroup").write_text("0::/\n")
    assert spare_bytes(1000, root) == 900
    assert spare_bytes() > 0


def test_the_tightest_group_counts_and_idle_files_are_no_use(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/system/agent\n")
    write(root / "sys/fs/cgroup/system", memory__max="max\n", memory__current="900\n", memory__stat="inactive_file 0\n")
    write(root / "sys/fs/cgroup/system/agent", memory__max="500\n", memory__current="300\n", memory__stat="anon 5\ninactive_file 200\n")
    assert spare_bytes(1000, root) == 360
    (root / "sys/fs/cgroup/system/memory.max").write_text("1000\n")
    assert spare_bytes(1000, root) == 90
    (root / "sys/fs/cgroup/system/memory.high").write_text("950\n")
    assert spare_bytes(1000, root) == 45, "above it a job would be slowed down for ever"
    (root / "sys/fs/cgroup/system/memory.max").write_text("max\n")
    assert spare_bytes(1000, root) == 45


def test_version_one_says_the_same_in_other_files(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("5:memory:/box\n3:cpu,cpuacct:/box\n")
    group = root / "sys/fs/cgroup/memory/box"
    write(group, memory__limit_in_bytes="400", memory__usage_in_bytes="500", memory__stat="total_inactive_file 0\n")
    assert spare_bytes(1000, root) == 0, "more in use than allowed"
    (group / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert spare_bytes(1000, root) == 900


def test_under_the_shipped_unit_the_whole_leaf_cnn_can_be_trained(root: Path) -> None:
    unit = (ROOT / "deploy/regrow-agent.service").read_text()
    high, most = (2**20 * int(re.findall(rf"^Memory{name}=(\d+)M$", unit, re.MULTILINE)[0]) for name in ("High", "Max"))
    (root / "proc/self/cgroup").write_text("0::/agent\n")
    in_use = 110_000_000  # about what an agent holds before its first job: interpreter, onnxruntime, some data
    write(
        root / "sys/fs/cgroup/agent",
        memory__max=f"{most}\n", memory__high=f"{high}\n", memory__current=f"{in_use}\n", memory__stat="inactive_file 0\n",
    )  # fmt: skip
    rows = json.loads((ROOT / "bench/results/step-memory.json").read_text())["rows"]
    stated_mb = [row["stated_mb_with_validation"] for row in rows if (row["model"], row["density"]) == ("leaf_cnn", "masks")]
    assert spare_bytes(2**30, root) >= 1e6 * stated_mb[0]
