"""Plans: every block has each method once, what is written is what is read, and what is no plan says so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from broker_server.field.plan import Plan, checked, drawn_blocks, in_hours, plan_text, read_plan, repetitions_of, total_s
from broker_server.field.progress import task_toml
from regrow.errors import UsageError
from regrow.methods import METHODS

PLAN = 'name = "orchard"\ntask = "watch"\ndevices = ["pi-1", "pi-2"]\nmethods = ["fedgmr", "fedavg"]\nrepetitions = 2\nrun_s = 60\n'
seconds = st.floats(min_value=0.5, max_value=3600, allow_nan=False)
plans = st.builds(
    Plan,
    name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}\Z", fullmatch=True),
    task=st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00\x7f"), min_size=1, max_size=30),
    devices=st.lists(st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}\Z", fullmatch=True), min_size=1, max_size=9, unique=True).map(tuple),
    methods=st.lists(st.sampled_from([*METHODS, "fiarse+restore", "fedgmr-fa"]), min_size=1, max_size=6, unique=True).map(tuple),
    repetitions=st.integers(1, 12),
    run_s=seconds,
    baseline_s=seconds,
    lead_s=seconds,
    sample_hz=st.floats(min_value=0.1, max_value=100),
    seed=st.integers(0, 2**31 - 1),
)


@given(plans)
def test_every_block_has_each_method_once_and_every_run_a_name_of_its_own(plan: Plan) -> None:
    whole = checked(plan, "here")
    assert len(whole.blocks) == plan.repetitions
    for block in whole.blocks:
        assert Counter(block) == Counter(plan.methods)
    runs = repetitions_of(whole)
    assert [run.number for run in runs] == list(range(1, len(plan.methods) * plan.repetitions + 1))
    assert len({run.name for run in runs}) == len(runs)
    assert Counter(run.method for run in runs) == dict.fromkeys(plan.methods, plan.repetitions)


@given(plans)
def test_a_written_plan_is_read_as_it_was(plan: Plan) -> None:
    whole = checked(plan, "here")
    text = plan_text(whole, "orchard.toml")
    file = Path(__file__).parent  # nothing is read from it: tomllib takes the text
    import msgspec

    assert checked(msgspec.convert(tomllib.loads(text), Plan), str(file)) == whole


def test_the_seed_decides_the_order_and_orders_differ() -> None:
    methods = tuple(METHODS)
    assert drawn_blocks(methods, 4, 1) == drawn_blocks(methods, 4, 1)
    assert drawn_blocks(methods, 4, 1) != drawn_blocks(methods, 4, 2)
    assert len(set(drawn_blocks(methods, 4, 1))) > 1


def test_a_plan_without_blocks_has_them_drawn(tmp_path: Path) -> None:
    file = tmp_path / "orchard.toml"
    file.write_text(PLAN)
    plan = read_plan(file)
    assert plan.blocks == drawn_blocks(plan.methods, 2, plan.seed)
    assert total_s(plan) == 4 * (2 * plan.lead_s + plan.baseline_s + 60)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('devices = ["Pi"]', "device 'Pi'"),
        ('devices = ["pi-1", "pi-1"]', "twice"),
        ("devices = []", "devices"),
        ('methods = ["fedgmr", "fedbest"]', "fedbest"),
        ("repetitions = 0", "repetitions"),
        ("run_s = -1", "run_s"),
        ("run_s = inf", "run_s"),
        ("weather = 3", "weather"),
        ('blocks = [["fedgmr", "fedavg"]]', "1 blocks for 2"),
        ('blocks = [["fedgmr", "fedgmr"], ["fedgmr", "fedavg"]]', "block 1"),
        ("name = ", "Invalid value"),
        ('name = "a-name-that-is-much-longer-than-a-run-of-this-kit-may-be-called"', "name"),
    ],
)
def test_what_is_no_plan_is_one_error_with_its_place(line: str, said: str, tmp_path: Path) -> None:
    key = line.partition(" ")[0]
    kept = [each for each in PLAN.splitlines() if not each.startswith(f"{key} ")]
    file = tmp_path / "orchard.toml"
    file.write_text("\n".join([*kept, line]) + "\n")
    with pytest.raises(UsageError, match=said) as raised:
        read_plan(file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(("given_s", "said"), [(45, "45 s"), (600, "10 min"), (12_000, "3 h 20 min")])
def test_hours_for_people(given_s: float, said: str) -> None:
    assert in_hours(given_s) == said


values = st.one_of(st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=12))
names = st.from_regex(r"[a-z_]{1,8}\Z", fullmatch=True)
tables = st.dictionaries(
    names, st.one_of(values, st.lists(st.floats(0, 1), max_size=4), st.dictionaries(st.text(max_size=6), values, max_size=3))
)


@given(st.dictionaries(names, tables, max_size=4), st.dictionaries(names, values, max_size=3))
def test_a_tasks_tables_are_written_as_toml_has_them(sections: dict[str, dict[str, object]], top: dict[str, object]) -> None:
    whole = {**top, **sections}
    assert tomllib.loads(task_toml(whole, "orchard")) == whole
