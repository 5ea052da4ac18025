"""Baselines: one contract for all of them, and each learns what it is meant to."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from stream_adapt.datasets import Source, synthetic
from stream_adapt.datasets.movielens import FEATURES
from stream_adapt.errors import ConfigError
from stream_adapt.evaluate import baselines, metrics
from stream_adapt.evaluate.baselines import DIRECT, FROZEN, NAMES, Said, chosen, measure, package_of
from stream_adapt.evaluate.halves import Halves, cut
from stream_adapt.models import LearnerSpec
from stream_adapt.record import ItemId, UserEvent, UserId

EVENTS, HALF = 2000, 1000


def _param(name: str) -> object:
    package = package_of(name)
    there = package is None or importlib.util.find_spec(package) is not None
    return pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"{package} is not installed"))


every = pytest.mark.parametrize("name", [_param(name) for name in NAMES if name not in (FROZEN, DIRECT)])


@pytest.fixture(scope="module", autouse=True)
def small_grid():
    """Tuned over a few rates only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "GRID", baselines.GRID[:4])
        yield


@pytest.fixture(scope="module")
def source() -> Source:
    return synthetic.source(synthetic.Synthetic(events=EVENTS, users=60, items=40, drift="none"))


def halves_of(source: Source, turned_after: int = EVENTS) -> Halves:
    events = [
        event if i <= turned_after or event.label is None else msgspec.structs.replace(event, label=6.0 - event.label)
        for i, event in enumerate(source.events())
    ]
    other = replace(source, events=lambda: iter(events))
    return cut(other, LearnerSpec(source.features, source.feedback), 1, warm=False)


@every
def test_labels_after_an_event_change_no_score_up_to_it(source: Source, name: str) -> None:
    true = measure(name, source.features, halves_of(source))
    turned = measure(name, source.features, halves_of(source, turned_after=HALF + 300))
    assert true.earlier.tobytes() == turned.earlier.tobytes()
    assert true.later[:302].tobytes() == turned.later[:302].tobytes()
    assert true.later.tobytes() != turned.later.tobytes()


@every
def test_scores_are_probabilities_and_better_than_none(source: Source, name: str) -> None:
    halves = halves_of(source)
    measured = measure(name, source.features, halves)
    assert np.all((measured.later >= 0) & (measured.later <= 1))
    assert metrics.auc(measured.later, halves.second.targets) > 0.55
    assert (HALF, HALF) == (len(measured.earlier), len(measured.later))
    assert measured.train_s > 0
    assert measured.events_per_s > 0


@every
def test_an_event_without_feedback_is_passed_over(source: Source, name: str) -> None:
    events = [msgspec.structs.replace(e, label=None) if i % 4 == 0 else e for i, e in enumerate(source.events())]
    silent = replace(source, events=lambda: iter(events))
    spec = LearnerSpec(source.features, source.feedback)
    measured = measure(name, source.features, cut(silent, spec, 1, warm=False))
    assert HALF * 3 // 4 == len(measured.later)


@every
def test_scoring_changes_nothing(source: Source, name: str) -> None:
    halves = halves_of(source)
    baseline = baselines._KINDS[name].make(source.features, halves.first)
    event, others = halves.first.events[0], halves.first.events[:50]
    before = baseline.score(event)
    for other in others:
        baseline.score(other)
    assert before == baseline.score(event)


def test_running_averages_by_hand() -> None:
    mean, bias = baselines.ItemMean(), baselines.RunningBias()
    event = UserEvent("1", UserId("u"), ItemId("i"), "rating", 0)
    assert mean.score(event) == bias.score(event) == 0.5
    mean.learn(event, 1)
    bias.learn(event, 1)
    assert (1 + 8 * 2 / 3) / (1 + 8) == pytest.approx(mean.score(event))
    assert mean.score(event) + 0.5 / (1 + 4) == pytest.approx(bias.score(event))


def test_more_users_and_items_than_there_was_room_for_keep_what_was_learned(source: Source) -> None:
    factors = baselines.MatrixFactorisation(halves_of(source).first)
    event = UserEvent("1", UserId("u"), ItemId("i"), "rating", 0)
    for _ in range(20):
        factors.learn(event, 1)
    before = factors.score(event)
    for k in range(3000):
        factors.score(UserEvent("2", UserId(f"u{k}"), ItemId(f"i{k}"), "rating", 0))
    assert before == factors.score(event) > 0.55


def test_what_is_said_are_words_of_categories_and_bags() -> None:
    features = {"genres": ["Drama", "War"], "year": 1994.0, "age": "25-34", "gender": "F"}
    event = UserEvent("1", UserId("u"), ItemId("i"), "rating", 0, 5.0, features)
    said = Said(FEATURES)
    assert ["genres=Drama", "genres=War"] == said.of_item(event)
    assert ["age=25-34", "gender=F"] == said.of_others(event)


def test_names_are_chosen_once_each_and_unknown_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ((), ()) == chosen("")
    assert (("item_mean", "frozen"), ()) == chosen("item_mean, frozen,item_mean")
    with pytest.raises(ConfigError, match="'svd' is not one of frozen, direct, item_mean"):
        chosen("svd")
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda _: None)
    assert {"river_logistic", "river_ftrl", "vowpal_wabbit"} == set(chosen("all")[1])
    with pytest.raises(ConfigError, match="pip install vowpalwabbit"):
        chosen("vowpal_wabbit")


@pytest.mark.skipif(importlib.util.find_spec("river") is None, reason="river is not installed")
def test_ftrls_rate_is_the_best_on_the_first_half(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate of nearly nothing learns nothing, and the second half has no say."""
    monkeypatch.setattr(baselines, "_FTRL_RATES", (1e-9, 0.1, 1e-8))
    first = halves_of(source, turned_after=HALF).first
    assert baselines.RiverLinear.tuned(source.features, first)._model.optimizer.alpha == 0.1
