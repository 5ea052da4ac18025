"""The synthetic stream: the same under a seed, with a drift where it says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest

from stream_adapt.datasets.synthetic import Synthetic, events, source
from stream_adapt.errors import ConfigError
from stream_adapt.learner.encoder import Bag, Categorical, Numeric, Vector

SMALL = Synthetic(events=20_000, users=300, items=100)


def test_equal_parameters_give_equal_events() -> None:
    assert list(events(SMALL)) == list(events(SMALL))


def test_another_seed_gives_another_stream() -> None:
    assert list(islice(events(SMALL), 100)) != list(islice(events(replace(SMALL, seed=2)), 100))


def test_there_are_as_many_events_as_asked_for_with_names_of_their_own() -> None:
    for count in (1, 16_384, 20_000):
        stream = list(events(replace(SMALL, events=count)))
        assert count == len(stream)
        assert count == len({event.event_id for event in stream})


def test_events_are_in_time_order() -> None:
    assert all(a.timestamp <= b.timestamp for a, b in pairwise(events(SMALL)))


@pytest.mark.parametrize("drift", ["flip", "permute"])
@pytest.mark.parametrize("drift_at", [0, 5_000, 16_384, 17_001])
def test_the_stream_changes_at_the_drift_and_not_before(drift: str, drift_at: int) -> None:
    calm = list(events(replace(SMALL, drift="none")))
    drifted = list(events(replace(SMALL, drift=drift, drift_at=drift_at)))  # type: ignore[arg-type]
    assert calm[:drift_at] == drifted[:drift_at]
    changed = [index for index, (a, b) in enumerate(zip(calm, drifted, strict=True)) if a != b]
    assert drift_at <= changed[0] < drift_at + 20


def test_flip_turns_the_feedback_on_half_of_the_items_round() -> None:
    calm = list(events(replace(SMALL, drift="none")))[10_000:]
    flipped = list(events(replace(SMALL, drift="flip", drift_at=0)))[10_000:]
    turned = {a.item_id for a, b in zip(calm, flipped, strict=True) if a.label != b.label}
    assert 40 <= len(turned) <= 50
    for a, b in zip(calm, flipped, strict=True):
        assert (6 - (a.label or 0) if a.item_id in turned else a.label) == b.label


def test_permute_gives_products_other_ids_and_leaves_the_rest() -> None:
    calm = list(events(replace(SMALL, drift="none")))
    permuted = list(events(replace(SMALL, drift="permute", drift_at=0)))
    ids = {a.item_id: b.item_id for a, b in zip(calm, permuted, strict=True)}
    assert len(ids) == len(set(ids.values()))
    for a, b in zip(calm, permuted, strict=True):
        assert (ids[a.item_id], a.user_id, a.label, a.features) == (b.item_id, b.user_id, b.label, b.features)


def test_the_drift_is_at_three_quarters_unless_said_otherwise() -> None:
    assert source(SMALL).drift_at == 15_000
    assert source(replace(SMALL, drift="none")).drift_at is None
    assert source(replace(SMALL, drift_at=7)).drift_at == 7


def test_every_type_and_role_of_feature_is_there_as_declared() -> None:
    declared = SMALL.features
    assert {Categorical, Bag, Numeric, Vector} == {type(feature) for feature in declared.values()}
    assert {"item", "user", "event"} == {feature.of for feature in declared.values()}
    types = {Categorical: str, Bag: list, Numeric: float, Vector: list}
    for event in islice(events(SMALL), 500):
        assert declared.keys() == event.features.keys()
        for name, value in event.features.items():
            assert isinstance(value, types[type(declared[name])])
        assert declared["embedding"] == Vector(of="item", length=len(event.features["embedding"]))  # type: ignore[arg-type]


def test_all_five_levels_occur_popularity_is_skewed_and_users_come_in_bursts() -> None:
    stream = list(events(SMALL))
    labels = Counter(event.label for event in stream)
    assert {1.0, 2.0, 3.0, 4.0, 5.0} == labels.keys()
    assert min(labels.values()) > 0.05 * len(stream)
    popularity = sorted(Counter(event.item_id for event in stream).values(), reverse=True)
    assert popularity[0] > 10 * popularity[-1]
    assert len({event.user_id for event in stream[:200]}) < 50


def test_the_users_taste_can_be_learned_from_content() -> None:
    """A linear model per user on the embedding must beat the user's mean, or adapting could not help."""
    stream = list(events(replace(SMALL, drift="none")))
    by_user: dict[str, list[tuple[list[float], float]]] = {}
    for event in stream:
        by_user.setdefault(event.user_id, []).append((event.features["embedding"], event.label))  # type: ignore[arg-type]
    plain, linear = [], []
    for rows in (rows for rows in by_user.values() if len(rows) >= 20):
        x, y = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
        half = len(y) // 2
        mean = y[:half].mean()
        ridge = np.linalg.solve(x[:half].T @ x[:half] + 3 * np.eye(x.shape[1]), x[:half].T @ (y[:half] - mean))
        plain += ((y[half:] - mean) ** 2).tolist()
        linear += ((y[half:] - mean - x[half:] @ ridge) ** 2).tolist()
    assert np.mean(linear) < 0.7 * np.mean(plain)


@pytest.mark.parametrize("wrong", [{"events": 0}, {"items": 0}, {"burst": 0.5}, {"drift_at": 20_001}, {"noise": -1.0}])
def test_parameters_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(SMALL, **wrong)
