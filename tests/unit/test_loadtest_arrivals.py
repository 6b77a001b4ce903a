"""When requests arrive: distributions, seeds, ramps, replays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loadtest.schedule.arrivals import RampUp, drawn, replayed


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(drawn(20_000, 50.0, 1.0, seed=1))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)
    # The memoryless one: a share of 1/e is longer than the mean.
    assert (gaps > 1 / 50).mean() == pytest.approx(math.exp(-1), abs=0.015)


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_burstiness_is_the_shape_of_the_gamma_distribution(burstiness: float) -> None:
    """Its coefficient of variation is 1 / sqrt(shape)."""
    gaps = np.diff(drawn(50_000, 10.0, burstiness, seed=2))
    assert gaps.mean() == pytest.approx(0.1, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_infinite_burstiness_is_a_clock() -> None:
    assert drawn(4, 2.0, math.inf, seed=0) == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_an_infinite_rate_is_all_at_once() -> None:
    assert drawn(3, math.inf, 1.0, seed=0).tolist() == [0.0, 0.0, 0.0]


def test_every_seed_takes_the_same_time() -> None:
    for seed in range(5):
        assert drawn(100, 20.0, 0.5, seed)[-1] == pytest.approx(5.0)


def test_a_seed_gives_the_same_arrivals_and_another_gives_others() -> None:
    first, again, other = (drawn(50, 5.0, 1.0, seed) for seed in (7, 7, 8))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_the_draws_are_those_of_vllm() -> None:
    """It draws one gap after another from numpy's global generator, and stretches the whole."""
    generator = np.random.RandomState(3)
    gaps = [generator.gamma(shape=0.5, scale=1 / (10.0 * 0.5)) for _ in range(40)]
    expected = np.cumsum(gaps) * (40 / 10.0) / sum(gaps)
    assert drawn(40, 10.0, 0.5, seed=3) == pytest.approx(expected)


@pytest.mark.parametrize(("strategy", "middle_rps"), [("linear", 5.0), ("exponential", 3.0)])
def test_a_ramp_grows_from_one_rate_to_the_other(strategy: str, middle_rps: float) -> None:
    ramp = RampUp(strategy, 1.0, 9.0)  # type: ignore[arg-type]
    gaps = np.diff(drawn(101, math.inf, math.inf, 0, ramp), prepend=0.0)
    assert 1 / gaps[[0, 50, 100]] == pytest.approx([1.0, middle_rps, 9.0])


def test_a_replay_begins_at_zero_and_is_scaled() -> None:
    assert replayed([10.0, 11.0, 14.0], 0.5, 0.0, seed=0).tolist() == [0.0, 0.5, 2.0]


def test_jitter_spreads_a_coarse_clock() -> None:
    times = replayed([0.0] * 500 + [3.0] * 500, 1.0, 3.0, seed=4)
    assert len(np.unique(times)) == 1000
    assert times.min() == 0
    assert 5.5 < times.max() < 6.0
    assert (times[:500] < 3.0).all()
    assert times.tolist() == replayed([0.0] * 500 + [3.0] * 500, 1.0, 3.0, seed=4).tolist()
