"""Figures of quality, against definitions written out the slow way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_adapt.evaluate import metrics

#: Few different scores, so that ties are common.
_scored = st.lists(st.tuples(st.integers(0, 7).map(lambda k: k / 7), st.integers(0, 1)), min_size=1, max_size=60)


def pairwise_auc(scores, outcomes):
    """The definition: every pair of a 1 and a 0."""
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, said_a in zip(scores, outcomes, strict=True)
        if said_a == 1
        for b, said_b in zip(scores, outcomes, strict=True)
        if said_b == 0
    ]
    return sum(wins) / len(wins) if wins else math.nan


@given(_scored)
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs):
    scores, outcomes = zip(*pairs, strict=True)
    assert pairwise_auc(scores, outcomes) == pytest.approx(metrics.auc(scores, outcomes), nan_ok=True)


def test_auc_of_many_different_scores_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(1)
    outcomes = rng.integers(0, 2, 300)
    scores = rng.normal(0, 1, 300) + outcomes
    assert pairwise_auc(scores, outcomes) == pytest.approx(metrics.auc(scores, outcomes))


def test_auc_knows_the_corner_cases():
    assert metrics.auc([0.1, 0.9], [0, 1]) == 1.0
    assert metrics.auc([0.9, 0.1], [0, 1]) == 0.0
    assert metrics.auc([0.5] * 4, [0, 1, 1, 0]) == 0.5
    assert math.isnan(metrics.auc([0.1, 0.2], [1, 1]))
    assert math.isnan(metrics.auc([], []))


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and outcomes \(1,\)"):
        metrics.auc([0.1, 0.2], [1])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7).map(lambda k: k / 7), st.integers(0, 1)), max_size=60))
def test_grouped_auc_weighs_each_group_by_its_events(rows):
    per_group = []
    for group in {row[0] for row in rows}:
        own = [(score, outcome) for of, score, outcome in rows if of == group]
        per_group.append((pairwise_auc(*zip(*own, strict=True)), len(own)))
    kept = [(value, size) for value, size in per_group if not math.isnan(value)]
    expected = sum(v * s for v, s in kept) / sum(s for _, s in kept) if kept else math.nan
    groups, scores, outcomes = zip(*rows, strict=True) if rows else ((), (), ())
    assert expected == pytest.approx(metrics.grouped_auc(scores, outcomes, groups), nan_ok=True)


def test_log_loss_is_the_mean_of_minus_log_of_what_was_said_of_what_happened():
    expected = -(math.log(0.8) + math.log(1 - 0.3)) / 2
    assert expected == pytest.approx(metrics.log_loss([0.8, 0.3], [1, 0]))


def test_certainty_that_turns_out_wrong_costs_much_but_not_infinitely():
    assert -math.log(metrics.CLIP) == pytest.approx(metrics.log_loss([0.0], [1]))
    assert math.isnan(metrics.log_loss([], []))


def test_calibration_error_is_zero_when_shares_are_as_said_and_the_gap_otherwise():
    assert metrics.calibration_error([0.25] * 4, [1, 0, 0, 0]) == pytest.approx(0.0)
    assert metrics.calibration_error([0.9] * 4 + [0.1] * 4, [1] * 4 + [0] * 4) == pytest.approx(0.1)
    assert metrics.calibration_error([0.0, 1.0], [0, 1]) == pytest.approx(0.0)
    assert math.isnan(metrics.calibration_error([], []))


def test_events_are_numbered_within_their_group():
    assert metrics.nth_events("abaab").tolist() == [1, 1, 2, 3, 2]


def test_the_cold_start_curve_has_the_mean_of_each_bucket():
    nth = np.arange(1, 151)
    curve = metrics.by_nth_event(nth.astype(float), nth)
    assert [b.name for b in curve] == ["1", "2–4", "5–9", "10–19", "20–39", "40–49", "50–99", "100+"]
    assert [b.events for b in curve] == [1, 3, 5, 10, 20, 10, 50, 51]
    assert [b.value for b in curve] == [1.0, 3.0, 7.0, 14.5, 29.5, 44.5, 74.5, 125.0]


def test_a_bucket_without_events_has_no_mean():
    (first, later) = metrics.by_nth_event([0.5], [1], starts=(1, 2))
    assert (first.events, first.value) == (1, 0.5)
    assert later.events == 0
    assert math.isnan(later.value)
