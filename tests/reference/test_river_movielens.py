"""River's own evaluation of the estimator on real ratings says what the product says of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("river", reason="needs the extra 'river'")
from river import evaluate, metrics

from stream_adapt.adapt import Adapter
from stream_adapt.datasets import open_source
from stream_adapt.learner.encoder import features_struct
from stream_adapt.meta.trainer import TrainSettings, pretrain
from stream_adapt.models import LearnerSpec, read_model, write_model
from stream_adapt.record import Batch, UserEvent
from stream_adapt.river import FastWeightClassifier

TRAINED_ON, JUDGED_ON = 2_000, 1_000


class Said(metrics.LogLoss):  # type: ignore[misc]
    """The log-loss, and the probabilities that it is of."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities: list[float] = []

    def update(self, y_true: bool, y_pred: dict[bool, float], *more: float) -> None:
        self.probabilities.append(y_pred[True])
        super().update(y_true, y_pred, *more)


def as_river(events: list[UserEvent]) -> Iterator[tuple[dict[str, Any], bool]]:
    for e in events:
        named = {"user_id": e.user_id, "item_id": e.item_id, "timestamp": e.timestamp, "label": e.label}
        yield {**named, **(e.features or {})}, e.label is not None and e.label >= 4


def as_batch(events: list[UserEvent], spec: LearnerSpec) -> Batch:
    struct = features_struct(spec.features)
    levels = spec.feedback.level_of([float(e.label or 0) for e in events], [e.event_type for e in events])
    return Batch(
        event_ids=[e.event_id for e in events],
        user_ids=[e.user_id for e in events],
        item_ids=[e.item_id for e in events],
        features=[msgspec.convert(e.features, struct) for e in events],
        timestamps_ms=np.array([e.timestamp for e in events], np.int64),
        levels=levels,
        partitions=np.zeros(len(events), np.int32),
        offsets=np.arange(len(events)),
    )


@pytest.mark.parametrize("rule", ["kalman", "gradient"])
def test_progressive_validation_of_a_pretrained_model_is_the_products_own(rule: Any, tmp_path: Path) -> None:
    source = open_source("movielens-100k")
    events = list(islice(source.events(), TRAINED_ON + JUDGED_ON))
    spec = LearnerSpec(source.features, source.feedback, rule)
    settings = TrainSettings(epochs=1, validation_share=0.0, longest=64)
    trained = pretrain(events[:TRAINED_ON], spec, settings, device="cpu")
    folder = write_model(tmp_path, trained.weights, spec, trained.fitted)
    later = events[TRAINED_ON:]
    expected = Adapter(read_model(folder)).adapt(as_batch(later, spec))
    said = Said()
    evaluate.progressive_val_score(as_river(later), FastWeightClassifier(model=str(folder)), said)
    np.testing.assert_array_equal(expected.score, said.probabilities)
    assert np.any(expected.score != expected.frozen_score)
