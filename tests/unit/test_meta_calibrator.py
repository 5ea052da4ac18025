"""The calibrator's fit: it finds what the model misses, from users that come warm, and is kept in the model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_streams import KNOWN_ITEMS, adapt_all, model_of, random_model, random_stream

from stream_adapt.adapt import Adapter
from stream_adapt.errors import ModelError, ModelUnfit
from stream_adapt.meta import calibrator, refine, sequences
from stream_adapt.meta.calibrator import _most_likely
from stream_adapt.meta.sequences import Log, item_hashes, read_batches
from stream_adapt.models import CALIBRATOR_TERMS, LearnerSpec, Model, check_successor, read_model, write_model
from stream_adapt.record import Batch

LIKED = 3


def lesson(n: int = 2_000) -> Batch:
    """Users 0, 1, … of whom the first half always like things and the others never do, whatever the model thinks."""
    batch = random_stream(n, users=40)
    likes = np.array([int(user[1:]) < 20 for user in batch.user_ids])
    levels = np.where(likes, LIKED + 1, LIKED - 2).astype(np.int8)
    return dataclasses.replace(batch, levels=levels, offsets=np.arange(n), partitions=np.zeros(n, np.int32))


def halves(batch: Batch) -> tuple[Log, Log]:
    log = read_batches([batch])
    first = np.arange(len(log)) < len(log) // 2
    return log.where(first), log.where(~first)


def loss(model: Model, batch: Batch) -> float:
    said = adapt_all(Adapter(model), [batch]).score[len(batch) // 2 :]
    liked = batch.levels[len(batch) // 2 :] >= LIKED
    return float(-np.log(np.where(liked, said, 1 - said)).mean())


def calibrated(model: Model, coefficients: Any) -> Model:
    weights = msgspec.structs.replace(model.weights, calibrator=coefficients)
    return msgspec.structs.replace(model, weights=weights)


@pytest.mark.parametrize("rule", ["kalman", "gradient"])
def test_it_makes_probabilities_of_later_events_better(rule: str) -> None:
    model, batch = random_model(rule=rule, calibrator="linear"), lesson()  # type: ignore[arg-type]
    silent = calibrated(model, np.zeros(len(CALIBRATOR_TERMS), np.float32))
    coefficients = calibrator.fit(model.weights, model.spec, (), *halves(batch))
    assert coefficients.shape == (len(CALIBRATOR_TERMS),)
    assert loss(calibrated(model, coefficients), batch) < loss(silent, batch) - 0.05


def test_users_come_warm() -> None:
    """With the earlier events the fit sees misses that add up; without them another calibrator comes out."""
    model = random_model(calibrator="linear")
    earlier, later = halves(lesson())
    nothing = earlier.where(np.zeros(len(earlier), bool))
    warm, cold = (calibrator.fit(model.weights, model.spec, (), before, later) for before in (earlier, nothing))
    assert np.abs(warm - cold).max() > 0.01


def test_a_few_events_move_it_little() -> None:
    """A term that tells every target."""

    def found(n: int) -> float:
        term = torch.tensor([1.0, -1.0] * (n // 2), dtype=torch.float64)
        return float(_most_likely(torch.zeros_like(term), torch.stack([term * 0 + 1, term], 1), (term + 1) / 2)[1])

    assert 0 < found(4) < 0.2 < 2 < found(4_000)


def test_it_is_the_most_likely_one() -> None:
    """A logit that is off by known terms, over many events."""
    random = np.random.default_rng(0)
    logits, terms = random.normal(0, 1, 20_000), random.normal(0, 1, (20_000, 3))
    terms[:, 0], true = 1.0, np.array([0.4, -0.8, 0.3])
    targets = (random.random(20_000) < 1 / (1 + np.exp(-logits - terms @ true))).astype(np.float64)
    found = _most_likely(*(torch.from_numpy(a) for a in (logits, terms, targets)))
    np.testing.assert_allclose(true, found, atol=0.06)


def test_an_item_mean_is_how_much_more_often_it_reached_the_target() -> None:
    hashes = np.sort(item_hashes(["a", "b", "c"]))
    items = item_hashes(["a"] * 4 + ["b"] * 4)
    levels = np.array([4, 4, 4, 4, 0, 0, 0, 4])
    log = Log(np.zeros(8, np.int64), items, np.arange(8), levels, [None] * 8)
    means = dict(zip(hashes.tolist(), sequences.item_means(log, hashes, LIKED).tolist(), strict=True))
    overall = 5 / 8
    expected = [4 * (1 - overall) / 8, (1 - 4 * overall) / 8, 0.0]
    np.testing.assert_allclose(expected, [means[h] for h in item_hashes(["a", "b", "c"]).tolist()], rtol=1e-6)


def test_a_model_with_one_comes_back_from_disk(tmp_path: Path) -> None:
    model = model_of("kalman", "full, calibrated")
    back = read_model(write_model(tmp_path, model.weights, model.spec, ()))
    assert "linear" == back.spec.calibrator
    for name in ("calibrator", "item_mean", "item_vector"):
        np.testing.assert_array_equal(getattr(model.weights, name), getattr(back.weights, name))


def test_a_model_without_one_is_written_as_before_there_were_any(tmp_path: Path) -> None:
    model = random_model()
    folder = write_model(tmp_path, model.weights, model.spec, ())
    assert "calibrator" not in json.loads((folder / "manifest.json").read_bytes())["spec"]
    assert b"calibrator" not in (folder / "model.safetensors").read_bytes()
    assert b"item_mean" not in (folder / "model.safetensors").read_bytes()


def test_a_model_that_says_it_has_one_must_have_it(tmp_path: Path) -> None:
    model = random_model()
    spec = msgspec.structs.replace(model.spec, calibrator="linear")
    with pytest.raises(ModelError, match="calibrator has shape"):
        write_model(tmp_path, model.weights, spec, ())


def test_rows_do_not_pass_between_models_with_and_without_one() -> None:
    with pytest.raises(ModelUnfit, match="calibrator='linear' and not 'none'"):
        check_successor(random_model(), random_model(calibrator="linear"))


def test_a_challenger_keeps_its_champions(tmp_path: Path) -> None:
    champion = random_model(calibrator="linear")
    random, names = np.random.default_rng(0), [f"i{k}" for k in range(KNOWN_ITEMS)]
    item = random.integers(0, KNOWN_ITEMS, 1_500)
    levels = np.clip(2 * (item % 2) + random.integers(0, 3, 1_500), 0, 4)
    users = np.unique(random.integers(0, 30, 1_500), return_inverse=True)[1].astype(np.int64)
    log = Log(users, item_hashes([names[k] for k in item]), np.arange(1_500) * 60_000, levels, [None] * 1_500)
    settings = msgspec.structs.replace(refine.SETTINGS, epochs=2)
    trained = refine.refine(log, champion, settings, "cpu")
    challenger = read_model(write_model(tmp_path, trained.weights, champion.spec, (), parent="v"))
    check_successor(champion, challenger)
    np.testing.assert_array_equal(champion.weights.calibrator, challenger.weights.calibrator)
    old, new = champion.weights, challenger.weights
    at = np.searchsorted(new.item_hash, old.item_hash)
    better_known = new.item_events[at] == old.item_events
    assert 0 < better_known.sum() < KNOWN_ITEMS
    np.testing.assert_array_equal(old.item_mean[better_known], new.item_mean[at][better_known])
    assert np.all(old.item_mean[~better_known] != new.item_mean[at][~better_known])


def test_a_row_of_the_default_learner_has_512_bytes_and_with_a_calibrator_520() -> None:
    from stream_adapt.learner import rules

    sizes = [rules.user_layout(LearnerSpec(calibrator=c)).row_bytes for c in ("none", "linear")]  # type: ignore[arg-type]
    assert [512, 520] == sizes
