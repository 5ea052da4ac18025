"""A model without training: right in form, random in content. For tests of plumbing and for timing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from stream_adapt.learner.encoder import FittedFeature, fit
from stream_adapt.models import LearnerSpec, SlowWeights, write_model
from stream_adapt.record import FeatureValue


def random_model(
    registry: Path,
    spec: LearnerSpec | None = None,
    item_ids: Iterable[str] = (),
    feature_columns: Mapping[str, Sequence[FeatureValue]] | None = None,
    seed: int = 0,
) -> Path:
    """Writes a model whose embeddings are random and whose rates are sensible; returns its folder.

    Args:
        registry: folder that gets the version.
        spec: declared features, feedback, rule and sizes.
        item_ids: items that the model knows; others are new to it.
        feature_columns: for each declared feature some values, from which vocabularies and scales are learned.
        seed: equal seeds give equal weights.
    """
    spec = spec or LearnerSpec()
    fitted = fit(spec.features, feature_columns or {name: [] for name in spec.features})
    return write_model(registry, random_weights(spec, list(item_ids), fitted, seed), spec, fitted)


def random_weights(
    spec: LearnerSpec, item_ids: Sequence[str], fitted: Sequence[FittedFeature], seed: int = 0
) -> SlowWeights:
    """Random θ for these items and fitted features."""
    random = np.random.default_rng(seed)
    width, levels = spec.dimension + 1, len(spec.feedback.levels)

    def table(rows: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return random.normal(0.0, 0.3, (rows, width)).astype(np.float32)

    hashes = np.array([xxhash.xxh3_64_intdigest(i.encode()) for i in item_ids], dtype=np.uint64)
    hashes.sort()
    numbers = {
        "prior_mean": np.zeros(width),
        "prior_variance": np.full(width, 0.3),
        "level_scores": np.linspace(-2.5, 2.5, levels),
        "bias": [0.1],
        "noise": [1.35],
        "leak": np.full(spec.leak_shape, 0.01),
        "readout": [1.0, 0.3, 0.0],
        "item_variance": [0.2, 0.05],
        "calibrator": random.normal(0.0, 0.1, spec.calibrator_terms),
        "item_mean": random.normal(0.0, 0.1, len(hashes) if spec.calibrator_terms else 0),
    }
    return SlowWeights(
        item_hash=hashes,
        item_vector=table(len(hashes)),
        item_events=np.full(len(hashes), 20.0, dtype=np.float32),
        feature_vector=table(_rows(fitted, of_users=False)),
        user_vector=table(_rows(fitted, of_users=True)),
        implicit_item=random.normal(0.0, 0.1, (len(hashes), spec.implicit)).astype(np.float32),
        implicit_map=random.normal(0.0, 0.1, (spec.implicit, width)).astype(np.float32),
        **{name: np.asarray(value, dtype=np.float32) for name, value in numbers.items()},
    )


def _rows(fitted: Sequence[FittedFeature], *, of_users: bool) -> int:
    return sum(one.width for one in fitted if (one.feature.of == "user") is of_users)
