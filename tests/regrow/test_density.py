import pytest

from regrow.density import (
    full_density_goodput_bps,
    full_density_round_s,
    full_density_speed,
    initial_density,
    mean_round_s,
    relative_density,
    remember_round,
)
from regrow.errors import LocalError

LADDER = (0.05, 0.1, 0.2, 0.5, 1.0)


def test_initial_classes_of_the_papers_ten_clients() -> None:
    links = [5e6, 2.5e6, 1e6, 0.5e6, *[0.25e6] * 6]
    full = full_density_goodput_bps(sorted(links))
    assert full == 2.5e6  # the nearest rank of 90 % of ten is the ninth
    explicit = [initial_density(link, LADDER, 5e6) for link in links]
    assert explicit == [1.0, 0.5, 0.2, 0.1, *[0.05] * 6]
    assert [initial_density(link, LADDER, full) for link in links[:5]] == [1.0, 1.0, 0.5, 0.2, 0.1]


@pytest.mark.parametrize(("ratio", "density"), [(0.01, 0.05), (0.055, 0.05), (0.056, 0.1), (0.55, 0.5), (0.56, 1.0), (7.0, 1.0)])
def test_the_lowest_rung_that_holds_nine_tenths(ratio: float, density: float) -> None:
    assert initial_density(ratio * 1e6, LADDER, 1e6) == density


def test_the_full_density_speed_is_not_one_devices_word() -> None:
    assert full_density_speed([3.0]) == 3.0
    assert full_density_speed([2.0, 10.0]) == 2.0
    for honest in (4, 9, 30):
        assert full_density_speed([*[10.0] * honest, 1e6]) == 10.0
    assert full_density_speed([1.0, *[10.0] * 18, 1e6]) == 10.0
    assert full_density_speed([*[10.0] * 5, *[1e6] * 4]) == 100.0, "several are believed up to 10 times the median"
    paper = [0.05, 0.05, 0.1, 0.1, 0.2, 0.2, 0.5, 0.5, 1.0, 1.0]
    assert full_density_speed(paper) == full_density_goodput_bps(paper) == 1.0


def test_wrong_links_are_refused() -> None:
    for link, full, ladder in ((0.0, 1.0, LADDER), (1.0, 0.0, LADDER), (1.0, float("nan"), LADDER), (1.0, 1.0, (0.5,))):
        with pytest.raises(LocalError):
            initial_density(link, ladder, full)


def simulate(links_bps: list[float], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Uploads of an 8 MB model with little compute, everybody from density 1: densities and the round times they give."""
    model_bytes, compute_s = 8_000_000, 0.001
    links = {str(i): link for i, link in enumerate(links_bps)}
    densities = dict.fromkeys(links, 1.0)
    windows: dict[str, tuple[float, ...]] = dict.fromkeys(links, ())
    times = {}
    for _ in range(rounds):
        for who, link in links.items():
            normalised = full_density_round_s(compute_s * densities[who], densities[who], model_bytes, link)
            windows[who] = remember_round(windows[who], normalised, 5)
        means = {who: mean for who, times in windows.items() if (mean := mean_round_s(times)) is not None}
        densities = {who: relative_density(min(means.values()), mean) for who, mean in means.items()}
        times = {who: compute_s * rho + 8 * model_bytes * rho / links[who] for who, rho in densities.items()}
    return densities, times


def test_links_of_20_10_4_2_1_converge_and_all_rounds_take_about_as_long() -> None:
    densities, times = simulate([20e6, 10e6, 4e6, 2e6, 1e6], 12)
    assert list(densities.values()) == [1.0, 32 / 64, 13 / 64, 6 / 64, 3 / 64]  # 1, .5, .2, .1, .05 to the nearest 1/64
    assert max(times.values()) <= 1.1 * min(times.values())


def test_the_rule_does_not_chase_its_tail() -> None:
    short, _ = simulate([20e6, 1e6], 2)
    assert simulate([20e6, 1e6], 40)[0] == short


def test_a_raised_minimum_holds_and_the_grid_bounds_below() -> None:
    assert (relative_density(1.0, 1.0), relative_density(1.0, 1000.0)) == (1.0, 1 / 64)
    assert relative_density(1.0, 1000.0, 0.45) == 29 / 64
    assert mean_round_s(()) is None


def test_the_window_is_a_fifo() -> None:
    window: tuple[float, ...] = ()
    for round_s in (1.0, 2.0, 3.0, 4.0):
        window = remember_round(window, round_s, 3)
    assert window == (2.0, 3.0, 4.0)
    assert full_density_round_s(0.5, 0.1, 1_000_000, 8e6) == pytest.approx(6.0)
    for bad in (lambda: remember_round((), 0.0, 3), lambda: full_density_round_s(1.0, 0.0, 1, 1.0), lambda: remember_round((), 1.0, 0)):
        with pytest.raises(LocalError):
            bad()
