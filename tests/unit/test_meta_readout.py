"""The readout's fit: it hears what service would say, and pulls a θ that is too sure back."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
from learner_streams import adapt_all, random_model, random_stream, with_weights

from stream_adapt.adapt import Adapter
from stream_adapt.meta import readout
from stream_adapt.meta.sequences import Log, read_batches
from stream_adapt.models import Covariance, Model
from stream_adapt.record import Batch


def lesson(n: int = 400) -> Batch:
    """Events that all carry feedback, of one partition, without gaps in the offsets."""
    batch = random_stream(n, features=True)
    taught = {"levels": np.arange(n, dtype=np.int8) * 7 % 5, "partitions": np.zeros(n, np.int32)}
    return dataclasses.replace(batch, offsets=np.arange(n), **taught)


def moved(model: Model, correction: readout.Correction) -> Model:
    return msgspec.structs.replace(model, weights=correction.apply(model.weights))


def loss(model: Model, batch: Batch) -> float:
    said = adapt_all(Adapter(model), [batch]).score
    return float(-np.log(np.where(batch.levels >= 3, said, 1 - said)).mean())


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_it_hears_what_service_says(covariance: Covariance) -> None:
    model, batch = random_model(covariance, features=True), lesson()
    log: Log = read_batches([batch])
    events = readout.encoded(model.weights, model.spec, model.manifest.fitted, log)
    z, variance = readout._linear(model.weights, model.spec, events)
    alpha, kappa, beta = model.weights.readout.tolist()
    expected = adapt_all(Adapter(model), [batch])
    np.testing.assert_allclose(expected.uncertainty, variance.sqrt().numpy(), rtol=1e-9)
    logits = alpha * z.numpy() / np.sqrt(1 + kappa * variance.numpy()) + beta
    np.testing.assert_allclose(expected.score, 1 / (1 + np.exp(-logits)), rtol=1e-9)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_model_that_is_too_sure_is_made_less_so(covariance: Covariance) -> None:
    model, batch = random_model(covariance, features=True), lesson()
    correction = readout.fit(model.weights, model.spec, model.manifest.fitted, read_batches([batch]))
    assert correction.alpha < 1
    assert correction.kappa > 1
    assert loss(moved(model, correction), batch) < loss(model, batch) - 0.1


def test_a_model_that_believes_every_event_too_much_is_given_more_noise() -> None:
    """Two users of three mostly like things: that takes more than the last event to know."""
    model, batch = with_weights(random_model(), noise=0.05), lesson()
    random = np.random.default_rng(0)
    likes = np.array([int(user[1:]) % 3 > 0 for user in batch.user_ids]) ^ (random.random(len(batch)) < 0.3)
    noisy = dataclasses.replace(batch, levels=np.where(likes, 4, 0).astype(np.int8))
    assert readout.fit(model.weights, model.spec, (), read_batches([noisy])).noise > 1


def test_a_few_events_move_it_little() -> None:
    model = random_model(features=True)
    one, all_ = (
        readout.fit(model.weights, model.spec, model.manifest.fitted, read_batches([lesson(n)])) for n in (2, 400)
    )
    assert abs(np.log(one.alpha)) < abs(np.log(all_.alpha)) / 2


def test_no_correction_changes_nothing() -> None:
    weights = random_model().weights
    same = readout.Correction().apply(weights)
    for name, array in msgspec.structs.asdict(weights).items():
        np.testing.assert_array_equal(array, getattr(same, name), err_msg=name)


def test_a_level_that_says_little_is_given_more_noise() -> None:
    """Half of the users like all things, half none; one event in four says the lowest level at random."""
    model, batch = random_model(), lesson(2_000)
    weights = msgspec.structs.replace(model.weights, level_noise=np.ones(5, np.float32))
    random = np.random.default_rng(0)
    likes = np.array([int(user[1:]) % 2 > 0 for user in batch.user_ids])
    levels = np.where(random.random(len(batch)) < 0.25, 0, np.where(likes, 4, 1)).astype(np.int8)
    found = readout.fit(weights, model.spec, (), read_batches([dataclasses.replace(batch, levels=levels)]))
    assert found.level_noise is not None
    assert found.level_noise[0] > 1.4 * found.level_noise[[1, 4]].max()
    assert list(found.level_noise[[2, 3]]) == [1.0, 1.0]  # never seen


def test_only_the_noise_and_the_readout_move() -> None:
    weights = random_model().weights
    by_level = np.array([1.0, 2.0, 0.5, 1.0, 4.0], np.float32)
    other = readout.Correction(2.0, 0.5, 3.0, 0.25, by_level).apply(weights)
    assert other.noise[0] == 2 * weights.noise[0]
    np.testing.assert_array_equal(weights.level_noise * by_level, other.level_noise)
    np.testing.assert_allclose(weights.readout * [0.5, 3, 1] + [0, 0, 0.25], other.readout, rtol=1e-6)
    for name in set(msgspec.structs.asdict(weights)) - {"noise", "readout", "level_noise"}:
        assert getattr(other, name) is getattr(weights, name), name
