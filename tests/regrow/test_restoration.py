import msgspec
import pytest

from regrow.errors import LocalError
from regrow.reference import score_levels
from regrow.restoration import (
    PACE_ROUNDS,
    Counter,
    RestorationConfig,
    RestorationState,
    evaluate,
    next_density,
    next_point,
    planned,
)

LADDER = (0.05, 0.1, 0.2, 0.5, 1.0)


class Run:
    """Evaluations one after another; the densities go back in, and the state through JSON, as the coordinator does."""

    def __init__(self, config: RestorationConfig, densities: dict[str, float]) -> None:
        self.config, self.densities = config, densities
        self.state = RestorationState()
        self.finished = False
        self.reasons: list[str] = []

    def step(self, levels: dict[float, float], whole: float | None, progress: float = 0.0, times: int = 1) -> dict[str, float]:
        for _ in range(times):
            state, self.densities, self.finished, self.reasons = evaluate(self.state, self.config, self.densities, levels, whole, progress)
            self.state = msgspec.json.decode(msgspec.json.encode(state), type=RestorationState)
            assert self.state == state
        return self.densities


def test_a_stalled_client_goes_up_one_rung_and_is_then_left_alone() -> None:
    run = Run(RestorationConfig(patience=2), {"a": 0.05, "b": 1.0})
    flat = {0.05: 0.5, 0.1: 0.5, 1.0: 0.5}
    assert run.step(flat, None, times=2) == {"a": 0.05, "b": 1.0}  # best, then stalled once
    assert run.step(flat, None) == {"a": 0.1, "b": 1.0}
    assert "a: no progress" in run.reasons[0]
    assert run.step(flat, None, times=4) == {"a": 0.1, "b": 1.0}  # 2p evaluations left alone
    assert run.step(flat, None, times=2) == {"a": 0.1, "b": 1.0}  # a new best, stalled once
    assert run.step(flat, None) == {"a": 0.2, "b": 1.0}
    assert run.state.minimum == {"a": 0.2}


def test_only_progress_beyond_min_delta_counts() -> None:
    run = Run(RestorationConfig(patience=2, min_delta=0.01), {"a": 0.05})
    for score in (0.50, 0.52, 0.529, 0.54, 0.545):
        assert run.step({0.05: score}, None) == {"a": 0.05}
    assert run.step({0.05: 0.55}, None) == {"a": 0.1}


def test_a_level_without_reports_leaves_the_counter_alone() -> None:
    run = Run(RestorationConfig(patience=1), {"a": 0.05})
    assert run.step({0.1: 0.5}, None, times=50) == {"a": 0.05}
    assert run.state.clients["a"] == Counter()


def test_a_stalled_global_model_raises_the_minimum_and_resets_every_counter() -> None:
    run = Run(RestorationConfig(patience=3), {"a": 0.05, "b": 0.05, "c": 0.5})
    run.step({0.5: 0.4}, 0.6, times=3)
    assert run.state.clients["c"].stalled == 2
    assert run.step({0.5: 0.5}, 0.6) == {"a": 0.1, "b": 0.1, "c": 0.5}
    assert run.state.rho_min == 0.1
    assert run.state.whole == Counter()
    assert set(run.state.clients.values()) == {Counter()}
    assert run.step({}, 0.6, times=4) == {"a": 0.2, "b": 0.2, "c": 0.5}


@pytest.mark.parametrize(("patience", "last"), [(2, 10), (20, 50)])
def test_finished_when_the_full_model_has_lost_its_final_patience(patience: int, last: int) -> None:
    run = Run(RestorationConfig(patience=patience, ladder=(0.5, 1.0)), {"a": 0.5})
    assert run.step({}, 0.6, times=patience + 1) == {"a": 1.0}
    run.step({1.0: 0.6}, 0.6, times=last)
    assert not run.finished
    run.step({1.0: 0.6}, 0.6)
    assert run.finished


def test_without_a_trigger_nothing_happens() -> None:
    run = Run(RestorationConfig(trigger="none", patience=1), {"a": 0.05})
    assert run.step({0.05: 0.5}, 0.5, progress=1.0, times=99) == {"a": 0.05}
    assert not run.finished


def test_planned_points_raise_everybody_by_one_rung_each() -> None:
    run = Run(RestorationConfig(trigger="fixed", patience=1), {"a": 0.05, "b": 0.2})
    assert run.step({0.05: 0.5}, 0.5, 0.19, times=9) == {"a": 0.05, "b": 0.2}  # no plateau
    assert run.step({}, 0.5, 0.2) == {"a": 0.1, "b": 0.5}
    assert run.step({}, 0.5, 0.39) == {"a": 0.1, "b": 0.5}
    assert run.step({}, 0.5, 0.61) == {"a": 0.5, "b": 1.0}  # two points at once
    assert run.step({}, 0.5, 0.8) == {"a": 1.0, "b": 1.0}
    assert not run.finished
    run.step({}, 0.5, 1.0)
    run.step({}, 0.5, 1.1, times=4)
    assert not run.finished
    run.step({}, 0.5, 1.2)
    assert run.finished


def test_mixed_uses_both() -> None:
    run = Run(RestorationConfig(trigger="mixed", patience=2), {"a": 0.05})
    assert run.step({0.05: 0.5}, None, times=3) == {"a": 0.1}
    assert run.step({}, None, 0.2) == {"a": 0.2}
    assert run.state.rho_min == 0.1


def test_pace_gives_the_largest_density_whose_round_is_short_against_the_time_that_training_has_lasted() -> None:
    """tbar 100 s, 32 rounds: density 0.05 is a round of 5 s, borne from 160 s on; 0.1 from 320 s, 0.2 from 640 s, 1.0 from 3200 s."""
    assert PACE_ROUNDS == 32
    config = RestorationConfig(trigger="pace")
    rounds = {"slow": 100.0, "quick": 5.0}
    densities = {"slow": 0.05, "quick": 0.5, "silent": 0.05}
    seen = {}
    for elapsed_s in (0.0, 159.0, 319.0, 320.0, 639.0, 640.0, 3199.0, 3200.0):
        _, after, finished, reasons = evaluate(
            RestorationState(), config, densities, {}, None, 0.0, elapsed_s=elapsed_s, full_round_s=rounds
        )
        seen[elapsed_s] = after["slow"]
        assert not finished
        assert after["silent"] == 0.05, "without a measured round it stays where it is"
        assert (after["quick"] == 1.0) == (elapsed_s >= 160.0)
        assert len(reasons) == sum(after[who] != densities[who] for who in densities)
    assert list(seen.values()) == [0.05, 0.05, 0.05, 0.1, 0.1, 0.2, 0.5, 1.0]


def test_pace_never_lowers_and_ends_by_the_final_patience() -> None:
    config = RestorationConfig(trigger="pace", patience=2)
    state, densities, finished, evaluations = RestorationState(), {"a": 0.5}, False, 0
    while not finished:
        state, densities, finished, _ = evaluate(state, config, densities, {}, 0.6, 0.0, elapsed_s=10.0, full_round_s={"a": 1000.0})
        evaluations += 1
        assert densities["a"] >= 0.5
    # A stalled global model raises rho_min from 0.05 over 0.1, 0.2 and 0.5 to 1.0 and then ends it: five times the final patience.
    assert (evaluations, densities) == (5 * (5 * 2 + 1), {"a": 1.0})


def test_prfl_recovers_by_a_fixed_step_and_remembers_the_minimum() -> None:
    config = RestorationConfig(step="fixed", delta_density=0.2, patience=1)
    run = Run(config, {"a": 0.25})
    run.step({0.25: 0.5}, None)
    assert run.step({0.25: 0.5}, None) == {"a": 29 / 64}  # 0.45 to the nearest 1/64
    assert run.state.minimum == {"a": 29 / 64}
    assert next_density(config, 0.9) == 1.0
    assert next_density(RestorationConfig(step="fixed", delta_density=0.001), 0.5) == 33 / 64
    assert [next_density(RestorationConfig(), rung) for rung in LADDER] == [0.1, 0.2, 0.5, 1.0, 1.0]
    assert next_density(RestorationConfig(), 0.3) == 0.5


def test_who_joins_late_is_as_far_as_everybody() -> None:
    config = RestorationConfig(patience=5)
    late = RestorationState(rho_min=0.5)
    _, after, _, reasons = evaluate(late, config, {"old": 1.0, "new": 0.05}, {}, None, 0.0)
    assert after == {"old": 1.0, "new": 0.5}
    assert reasons == ["new: joined below 0.5"]
    _, after, _, _ = evaluate(RestorationState(), config, {"tiny": 1 / 64}, {}, None, 0.0)
    assert after == {"tiny": 1 / 64}, "nobody was raised yet"


def test_who_left_is_forgotten_and_who_joins_starts_afresh() -> None:
    run = Run(RestorationConfig(patience=2), {"a": 0.05})
    run.step({0.05: 0.5}, None, times=2)
    run.densities = {"b": 0.05}
    assert run.step({0.05: 0.5}, None) == {"b": 0.05}
    assert run.state.clients == {"b": Counter(best=0.5)}


def test_score_levels_weighs_by_examples() -> None:
    assert score_levels([(0.5, 0.8, 10), (0.05, 0.4, 30), (0.05, 0.8, 10), (1.0, 0.9, 0)]) == {0.05: 0.5, 0.5: 0.8}


@pytest.mark.parametrize(
    "wrong",
    [
        {"trigger": "later"},
        {"step": "jump"},
        {"patience": 0},
        {"every": 0},
        {"delta_density": 0.0},
        {"min_delta": float("nan")},
        {"ladder": (0.5,)},
        {"ladder": (0.5, 0.1, 1.0)},
        {"planned": (0.5, 0.2)},
    ],
)
def test_a_wrong_configuration_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(LocalError):
        RestorationConfig(**wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_planned_points_need_no_evaluation() -> None:
    config, state = RestorationConfig(trigger="mixed"), RestorationState()
    assert planned(state, config, {"a": 0.05}, 0.19, {}) == (state, {"a": 0.05}, [])
    state, densities, reasons = planned(state, config, {"a": 0.05, "b": 0.5}, 0.41, {"b": 0.6})
    assert (state.points, state.rho_min, densities, len(reasons)) == (2, 0.2, {"a": 0.2, "b": 0.6}, 2)
    assert next_point(state, config) == 0.6
    plateau = RestorationConfig(trigger="plateau")
    assert (planned(RestorationState(), plateau, {"a": 0.05}, 9.0, {})[1], next_point(state, plateau)) == ({"a": 0.05}, None)
