"""What an agent offers to training: of the machine, and within the control groups that it is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.memory import spare_bytes


def write(path: Path, **files: str) -> None:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "proc/self")
    return tmp_path


def test_a_machine_without_limits_offers_three_quarters_of_what_is_available(root: Path) -> None:
    assert spare_bytes(1000, root) == 750
    (root / "proc/self/cgroup").write_text("0::/\n")
    assert spare_bytes(1000, root) == 750
    assert spare_bytes() > 0


def test_the_tightest_group_counts_and_idle_files_are_no_use(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/system/agent\n")
    write(root / "sys/fs/cgroup/system", memory__max="max\n", memory__current="900\n", memory__stat="inactive_file 0\n")
    write(root / "sys/fs/cgroup/system/agent", memory__max="500\n", memory__current="300\n", memory__stat="anon 5\ninactive_file 200\n")
    assert spare_bytes(1000, root) == 300
    (root / "sys/fs/cgroup/system/memory.max").write_text("1000\n")
    assert spare_bytes(1000, root) == 75


def test_version_one_says_the_same_in_other_files(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("5:memory:/box\n3:cpu,cpuacct:/box\n")
    group = root / "sys/fs/cgroup/memory/box"
    write(group, memory__limit_in_bytes="400", memory__usage_in_bytes="500", memory__stat="total_inactive_file 0\n")
    assert spare_bytes(1000, root) == 0, "more in use than allowed"
    (group / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert spare_bytes(1000, root) == 750
