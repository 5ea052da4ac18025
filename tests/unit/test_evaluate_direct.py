"""The baseline without meta-learning: trained on the first half alone, tuned on its end, and it does learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from rich.progress import Progress

from stream_adapt.datasets import Source, synthetic
from stream_adapt.evaluate import direct
from stream_adapt.evaluate.direct import Rates, with_rates
from stream_adapt.evaluate.halves import alone
from stream_adapt.evaluate.replay import ReplayOptions, replay
from stream_adapt.meta import direct as training
from stream_adapt.meta import sequences
from stream_adapt.meta.direct import Directly
from stream_adapt.meta.settling import settled
from stream_adapt.meta.trainer import TrainSettings
from stream_adapt.models import LearnerSpec
from stream_adapt.testing.model import random_model

EVENTS, HALF = 2000, 1000
QUICK = TrainSettings(epochs=3, validation_share=0.0)


@pytest.fixture(scope="module", autouse=True)
def small_grid() -> Iterator[None]:
    """Two values of each rate, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "GRID", {name: values[:2] for name, values in direct.GRID.items()})
        patch.setattr(direct, "ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def source() -> Source:
    return synthetic.source(synthetic.Synthetic(events=EVENTS, users=60, items=40, drift="none"))


@pytest.fixture(scope="module")
def spec(source: Source) -> LearnerSpec:
    return LearnerSpec(source.features, source.feedback, dimension=4)


@pytest.fixture(scope="module")
def trained(source: Source, spec: LearnerSpec) -> Directly:
    return training.train(sequences.read_log(list(source.events())[:HALF], spec), spec, QUICK, "cpu")


def test_users_differ_after_training_and_new_ones_start_at_their_mean(trained: Directly) -> None:
    assert trained.user_variance.min() > 0
    assert np.abs(trained.weights.prior_mean).max() > 0


def test_rates_are_scalars_set_by_hand(trained: Directly) -> None:
    weights = with_rates(trained, Rates(taste=2.0, bias=0.5, noise=3.0, leak=0.01, slope=1.2))
    variance = trained.user_variance
    np.testing.assert_allclose(weights.prior_variance[:-1], 2.0 * variance[:-1].mean(), rtol=1e-6)
    assert weights.prior_variance[-1] == pytest.approx(0.5 * variance[-1])
    assert weights.noise == 3.0
    np.testing.assert_allclose(weights.leak, [0.01, 0.03])
    np.testing.assert_array_equal(trained.weights.item_vector, weights.item_vector)


def test_the_rates_chosen_are_no_worse_than_where_the_search_starts(
    source: Source, spec: LearnerSpec, trained: Directly
) -> None:
    rest = alone(list(source.events())[HALF : HALF + 300], spec)
    start = Rates(**{name: values[0] for name, values in direct.GRID.items()})
    chosen = direct.tuned(trained, spec, rest)
    losses = [direct._loss(direct.served(trained, spec, rates), rest) for rates in (start, chosen)]
    assert losses[1] <= losses[0]


def test_items_are_settled_under_the_rates_chosen(source: Source, spec: LearnerSpec) -> None:
    first = alone(list(source.events())[:HALF], spec)
    plain, rates = direct.model(first, spec, msgspec.structs.replace(QUICK, settled=0.0), "cpu")
    model, same = direct.model(first, spec, QUICK, "cpu")
    assert rates == same
    log = sequences.read_log(first.events, spec)
    expected = settled(plain.weights, plain.spec, plain.manifest.fitted, log, QUICK.settled)
    np.testing.assert_array_equal(expected.item_vector, model.weights.item_vector)
    assert not np.array_equal(plain.weights.item_vector, model.weights.item_vector)


def test_training_without_meta_learning_never_asks_the_rule(
    source: Source, spec: LearnerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_adapt.meta.objective.kalman.predict", lambda *_: pytest.fail("the rule was asked"))
    log = sequences.read_log(list(source.events())[:HALF], spec)
    training.train(log, spec, msgspec.structs.replace(QUICK, epochs=1), "cpu")


def test_it_is_served_as_the_model_is_and_sees_no_label_of_the_second_half(
    source: Source, spec: LearnerSpec, tmp_path_factory: pytest.TempPathFactory
) -> None:
    columns = {name: [event.features.get(name) for event in source.events()] for name in source.features}
    model = random_model(tmp_path_factory.mktemp("models"), spec, [f"item-{k}" for k in range(40)], columns)
    options = ReplayOptions(model=model, baselines="direct", device="cpu")
    turned = [
        event if i <= HALF + 300 or event.label is None else msgspec.structs.replace(event, label=6.0 - event.label)
        for i, event in enumerate(source.events())
    ]
    torch.manual_seed(0)
    run = replay(source, options, Progress(disable=True))
    other = replay(replace(source, events=lambda: iter(turned)), options, Progress(disable=True))
    said, otherwise = (r.baselines["direct"].probabilities for r in (run, other))
    assert said[:302].tobytes() == otherwise[:302].tobytes()
    assert said.tobytes() != otherwise.tobytes()
    made = run.result().baselines["direct"]
    assert made.auc > 0.55
    assert made.train_s is not None
