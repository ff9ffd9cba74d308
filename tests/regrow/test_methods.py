"""Names of methods: what they imply, what stands above them, and what is refused."""

from __future__ import annotations

import sys

import msgspec
import pytest

from regrow.errors import LocalError
from regrow.levels import densities_of
from regrow.methods import ABLATIONS, METHODS, named
from regrow.task import Task, parse_task

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="the gateway reads task.toml, and it runs on Python 3.11 and newer")


def parsed(text: str) -> Task:
    return parse_task(f'name = "toy"\n{text}')


@pytest.mark.parametrize("name", METHODS)
def test_a_name_alone_is_a_whole_task(name: str) -> None:
    task = parsed(f'[method]\nname = "{name}"\n')
    assert task.method.name == name
    assert (densities_of(task) == (1.0,)) == (task.method.density == "full")


def test_no_name_is_fedgmr_by_our_own_trigger() -> None:
    assert parsed("") == parsed('[method]\nname = "fedgmr-pace"\n')
    assert parsed("").restoration.trigger == "pace"
    papers = parsed('[method]\nname = "fedgmr"\n')
    assert papers.restoration.trigger == "plateau"
    assert msgspec.structs.replace(papers.method, name="fedgmr-pace") == parsed("").method


def test_what_the_table_of_algorithms_says() -> None:
    fedasync = parsed('[method]\nname = "fedasync"\n')
    assert (fedasync.trigger.kind, fedasync.method.aggregation, fedasync.restoration.trigger) == ("arrival", "mix", "none")
    assert parsed('[method]\nname = "fedavg"\n').trigger.kind == "all"
    assert parsed('[method]\nname = "fedbuff"\n').trigger.kind == "count"
    prfl = parsed('[method]\nname = "prfl"\n')
    assert (prfl.method.importance, prfl.method.staleness, prfl.restoration.step) == ("g", "hinge", "fixed")
    assert len(densities_of(prfl)) == 64
    fjord, heterofl = (parsed(f'[method]\nname = "{name}"\n') for name in ("fjord", "heterofl"))
    assert fjord.method == msgspec.structs.replace(heterofl.method, name="fjord", local="ordered_dropout")
    subfedavg = parsed('[method]\nname = "subfedavg"\n')
    assert (subfedavg.method.local, subfedavg.method.aggregation, subfedavg.method.buffered) == ("personal_masks", "mask", False)
    assert (fjord.trigger.kind, subfedavg.trigger.kind, subfedavg.restoration.trigger) == ("all", "all", "none")


def test_what_the_task_says_stands_above_the_name() -> None:
    task = parsed('[method]\nname = "fedasync"\nmixing = 0.3\n[trigger]\nkind = "count"\ncount = 2\n')
    assert (task.method.mixing, task.method.staleness_a, task.trigger.kind) == (0.3, 0.5, "count")


def test_additions_and_ablations() -> None:
    restored = named("fiarse+restore")
    assert restored["method"]["importance"] == "w"
    assert restored["restoration"]["trigger"] == "plateau"
    assert restored["trigger"]["kind"] == "fastest"
    assert "restoration" in named("fiarse+async")
    assert named("fiarse+async")["restoration"]["trigger"] == "none"
    assert named("fedgmr-ga")["method"] == {"name": "fedgmr", "aggregation": "gradient"}
    assert all(named(f"fedgmr-{part}") for part in ABLATIONS)


@pytest.mark.parametrize("name", ["fedsgd", "fedgmr-everything", "fedgmr+luck", "", "fedgmr-", "fedavg+"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(LocalError, match="fedasync"):
        named(name)


@pytest.mark.parametrize("name", ["fiarse+restore", "heterofl+async", "fedgmr-fa", "fedgmr-sync", "fedgmr+restore-no-buffer"])
def test_a_task_takes_composed_names(name: str) -> None:
    task, tables = parsed(f'[method]\nname = "{name}"\n'), named(name)
    assert task.method.name == name
    for section in ("method", "trigger", "restoration"):
        for key, value in tables.get(section, {}).items():
            assert key == "name" or getattr(getattr(task, section), key) == value
    assert parsed('[method]\nname = "fedgmr-fa"\naggregation = "mask"\n').method.aggregation == "mask"


@pytest.mark.parametrize("name", ["fedsgd", "fedgmr-everything", ""])
def test_a_wrong_name_in_a_task_has_its_line_and_the_known_ones(name: str) -> None:
    with pytest.raises(LocalError, match=rf"task\.toml:4: name at .*'{name}'.*fedasync.*\+restore.*no-buffer"):
        parsed(f'seed = 1\n[method]\nname = "{name}"\n')


def test_a_wrong_table_keeps_its_own_error() -> None:
    with pytest.raises(LocalError, match=r"task\.toml:3.*fedsgd"):
        parsed('[method]\nname = "fedsgd"\n')
    with pytest.raises(LocalError, match="trigger"):
        parsed('trigger = 3\n[method]\nname = "fedavg"\n')
    with pytest.raises(LocalError, match="weigh_by_examples"):
        parsed('[method]\nname = "fedasync"\nweigh_by_examples = true\n')
