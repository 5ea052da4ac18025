"""The learner as an estimator of River: River's own checks, and the same scores as the product."""

from __future__ import annotations

import doctest
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_streams import part, random_model, random_stream

pd = pytest.importorskip("pandas", reason="River's mini-batches are data frames")
river = pytest.importorskip("river", reason="needs the extra 'river'")
from river import checks, compose, datasets, evaluate, linear_model, metrics, preprocessing  # noqa: E402

import stream_adapt.river  # noqa: E402
from stream_adapt.adapt import Adapter  # noqa: E402
from stream_adapt.models import Model, write_model  # noqa: E402
from stream_adapt.record import Batch  # noqa: E402
from stream_adapt.river import FastWeightClassifier  # noqa: E402


@pytest.mark.parametrize("check", list(checks.yield_checks(FastWeightClassifier())), ids=lambda check: check.__name__)
def test_it_passes_rivers_checks(check: Callable[[Any], None]) -> None:
    assert not FastWeightClassifier()._unit_test_skips()
    check(FastWeightClassifier())


def test_its_example_prints_what_it_says() -> None:
    assert doctest.testmod(stream_adapt.river) == (0, 3)


def auc(model: Any, events: Any) -> float:
    return float(evaluate.progressive_val_score(events, model, metrics.ROCAUC(n_thresholds=200)).get())


def test_from_scratch_it_ranks_better_than_logistic_regression_in_the_same_pipeline() -> None:
    ours, theirs = FastWeightClassifier(), linear_model.LogisticRegression()
    said = [auc(preprocessing.StandardScaler() | m, datasets.Phishing()) for m in (ours, theirs)]
    assert said[0] > said[1] > 0.9


def two_tastes(n: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """Users who like one of two genres, each his own."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        user, genre = int(rng.integers(0, 50)), int(rng.integers(0, 2))
        yield {"user_id": f"u{user}", "item_id": "i", "genres": [f"g{genre}"]}, user % 2 == genre


def test_users_have_weights_of_their_own() -> None:
    shared = compose.Discard("user_id") | FastWeightClassifier()
    assert auc(FastWeightClassifier(), two_tastes(1500)) > 0.8 > 0.6 > auc(shared, two_tastes(1500))


def test_when_coordinates_run_out_features_share_them() -> None:
    model = FastWeightClassifier(dimension=3)
    for x, y in islice(datasets.Phishing(), 50):
        model.learn_one(x, y)
    assert 0.0 < model.predict_proba_one(x | {"never_seen": 2.0})[True] < 1.0


def written(folder: Path, model: Model) -> str:
    return str(write_model(folder, model.weights, model.spec, model.manifest.fitted))


def as_river(batch: Batch) -> Iterator[dict[str, Any]]:
    for user, item, features, time_ms in zip(
        batch.user_ids, batch.item_ids, batch.features, batch.timestamps_ms.tolist(), strict=True
    ):
        own = {name: getattr(features, name) for name in features.__struct_fields__} if features is not None else {}
        yield {"user_id": user, "item_id": item, "timestamp": time_ms, **own}


def one_partition(n: int) -> Batch:
    """Events that all carry feedback, through one partition, at offsets 0, 1, …"""
    events = random_stream(3 * n, features=True)
    events = part(events, np.flatnonzero(events.levels >= 0).tolist()[:n])
    events.partitions[:] = 0
    events.offsets[:] = np.arange(n)
    return events


def test_with_a_model_it_says_what_the_product_says(tmp_path: Path) -> None:
    model, events = random_model(features=True), one_partition(200)
    expected = Adapter(model).adapt(events).score
    estimator, said = FastWeightClassifier(model=written(tmp_path, model)), []
    for x, level in zip(as_river(events), events.levels.tolist(), strict=True):
        said.append(estimator.predict_proba_one(x)[True])
        estimator.learn_one({**x, "label": level + 1}, level >= 3)
    np.testing.assert_array_equal(expected, said)


def test_with_a_model_many_at_once_are_one_by_one(tmp_path: Path) -> None:
    events, path = one_partition(60), written(tmp_path, random_model())
    rows, labels = list(as_river(part(events, slice(None)))), (events.levels + 1.0).tolist()
    rows = [{"user_id": x["user_id"], "item_id": x["item_id"], "label": y} for x, y in zip(rows, labels, strict=True)]
    one, many = FastWeightClassifier(model=path), FastWeightClassifier(model=path)
    for x, y in zip(rows, labels, strict=True):
        one.learn_one(x, y >= 4)
    many.learn_many(pd.DataFrame(rows), pd.Series([y >= 4 for y in labels]))
    said = many.predict_proba_many(pd.DataFrame(rows))
    np.testing.assert_array_equal([one.predict_proba_one(x)[True] for x in rows], said[True])


def test_with_a_model_it_can_be_pickled(tmp_path: Path) -> None:
    estimator = FastWeightClassifier(model=written(tmp_path, random_model()))
    x = {"user_id": "u", "item_id": "i1"}
    estimator.learn_one({**x, "label": 5}, True)
    assert estimator.predict_proba_one(x) == pickle.loads(pickle.dumps(estimator)).predict_proba_one(x)


def test_true_or_false_is_not_enough_for_a_model_of_five_levels(tmp_path: Path) -> None:
    estimator = FastWeightClassifier(model=written(tmp_path, random_model()))
    with pytest.raises(ValueError, match="put the label itself under 'label'"):
        estimator.learn_one({"user_id": "u", "item_id": "i"}, True)


def test_with_a_model_an_event_needs_its_user_and_item(tmp_path: Path) -> None:
    estimator = FastWeightClassifier(model=written(tmp_path, random_model()))
    with pytest.raises(ValueError, match="needs 'user_id' and 'item_id'"):
        estimator.predict_proba_one({"user_id": "u"})
