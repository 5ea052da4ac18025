"""Better, worse, the same, and noise: what a comparison of two models says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from stream_adapt.refresh.decide import FEWEST_USERS, Comparison, compare

MARGIN, ERROR = 0.0005, 0.01


def said(gain: float, seed: int = 0, users: int = 150, each: int = 30, personal: float = 0.0) -> Comparison:
    """Two models of a logit whose truth is known; the second is nearer to it by about `gain`, if above 0.

    `personal` is by how much the second is off for a user as a whole: losses of one user then hang together.
    """
    random = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), each)
    truth = random.normal(0, 1, len(user))
    target = random.random(len(user)) < 1 / (1 + np.exp(-truth))
    off = math.sqrt(8 * abs(gain)) * random.normal(0, 1, len(user))  # log-loss grows by about p(1−p)/2·off²
    own = personal * random.normal(0, 1, users)[user]
    first, second = (truth + off, truth + own) if gain > 0 else (truth, truth + off + own)
    return compare(user, target, *(1 / (1 + np.exp(-z)) for z in (first, second)))


def test_a_better_challenger_is_beyond_the_margin_and_a_worse_one_short_of_it() -> None:
    better, worse = said(0.03), said(-0.03)
    assert better.beyond(MARGIN, ERROR)
    assert not better.short_of(MARGIN, ERROR)
    assert worse.short_of(MARGIN, ERROR)
    assert not worse.beyond(MARGIN, ERROR)
    assert better.auc_challenger > better.auc_champion


def test_the_same_model_is_neither() -> None:
    same = said(0.0)
    assert (0.0, 0.0) == (same.gain, same.t)
    assert not same.beyond(0.0, ERROR)
    assert not same.short_of(0.0, ERROR)


def test_a_gain_below_the_margin_is_not_enough_however_certain() -> None:
    found = said(0.03)
    assert found.beyond(found.gain, ERROR)
    assert not found.beyond(found.gain + 1e-6, ERROR)


@pytest.mark.parametrize("personal", [0.0, 0.7])
def test_of_challengers_that_differ_by_chance_alone_no_more_than_the_error_pass(personal: float) -> None:
    """The champion is off by as much as the challenger, for users as a whole, too."""
    error, passed, tries = 0.05, 0, 150
    for seed in range(tries):
        random = np.random.default_rng(seed)
        users = np.repeat(np.arange(60), random.integers(1, 40, 60))
        truth = random.normal(0, 1, len(users))
        target = random.random(len(users)) < 1 / (1 + np.exp(-truth))
        both = [truth + random.normal(0, 0.3, len(users)) + personal * random.normal(0, 1, 60)[users] for _ in "ab"]
        passed += compare(users, target, *(1 / (1 + np.exp(-z)) for z in both)).beyond(0.0, error)
    assert passed <= stats.binom.ppf(0.999, tries, error)


def test_users_count_and_not_events() -> None:
    """With losses that hang together within users, the error of a mean over events would be far too small."""
    found = said(0.001, users=40, each=400, personal=1.0)
    naive = said(0.001, users=16_000, each=1, personal=1.0)
    assert found.standard_error > 1.5 * naive.standard_error


def test_with_few_users_nothing_is_decided() -> None:
    few = said(0.2, users=FEWEST_USERS - 1, each=300)
    assert few.gain > 0.05
    assert not few.beyond(MARGIN, ERROR)


def test_a_challenger_that_says_nothing_finite_is_as_wrong_as_can_be() -> None:
    users, target = np.repeat(np.arange(40), 25), np.tile([True, False, True, True, False], 200)
    nan = compare(users, target, np.full(1000, 0.6), np.full(1000, math.nan))
    assert nan.log_loss_challenger > 10
    assert nan.short_of(MARGIN, ERROR)


def test_nothing_compared_decides_nothing() -> None:
    nothing = compare(np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0), np.zeros(0))
    assert not nothing.beyond(0.0, ERROR)
    assert not nothing.short_of(0.0, ERROR)
    assert "log_loss_champion" not in nothing.figures()
