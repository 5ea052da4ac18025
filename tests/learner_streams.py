"""Random models and streams for tests of the learner: unknown items, declared features, gaps, late events."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import xxhash

from stream_adapt.adapt import Adapter
from stream_adapt.learner import rules
from stream_adapt.learner.encoder import Bag, Categorical, Feature, Numeric, Vector, features_struct, fit
from stream_adapt.learner.feedback import Feedback, LabelCuts
from stream_adapt.models import Calibrator, Covariance, LearnerSpec, Manifest, Model, RuleName, SlowWeights
from stream_adapt.record import Adapted, Batch
from stream_adapt.state.table import Table

LEVELS = ("1", "2", "3", "4", "5")
FEEDBACK = Feedback(LEVELS, "4", LabelCuts((1.0, 5.0), (2.0, 3.0, 4.0, 5.0)))
KNOWN_ITEMS = 40
GENRES, COUNTRIES, PLACES = ("drama", "war", "comedy"), ("fi", "ke", "pe"), ("home", "search")
FEATURES: dict[str, Feature] = {
    "genres": Bag(),
    "year": Numeric(),
    "place": Categorical(of="event"),
    "hour": Numeric(of="event", hats=4),
    "words": Vector(3, of="event"),
    "country": Categorical(of="user"),
    "age": Numeric(of="user"),
}
#: Of a calibrator: none is 0, and all of them are seen in a score.
COEFFICIENTS = np.array([-0.2, 0.3, -0.02, 5.0, 0.8, 0.5, 0.4, -0.05], np.float32)
#: Some time in 2020.
START_MS = 1_600_000_000_000


def random_model(
    covariance: Covariance = "diagonal",
    *,
    rule: RuleName = "kalman",
    normalized: bool = True,
    features: bool = False,
    seed: int = 0,
    size: int = 6,
    window: int = 16,
    implicit: int = 3,
    calibrator: Calibrator = "none",
    feedback: Feedback = FEEDBACK,
) -> Model:
    """A model of D = `size` that knows the items i0 … i39."""
    rng = np.random.default_rng(seed)
    declared = FEATURES if features else {}
    spec = LearnerSpec(
        declared,
        feedback,
        rule,
        covariance=covariance,
        normalized=normalized,
        dimension=size,
        window=window,
        ring=4,
        implicit=implicit,
        calibrator=calibrator,
    )
    columns = {
        "genres": [GENRES],
        "year": [1990.0, 2010.0],
        "place": PLACES,
        "hour": list(range(24)),
        "words": [(0.0, 0.0, 0.0)],
        "country": COUNTRIES,
        "age": [20.0, 60.0],
    }
    fitted = fit(declared, columns)
    rows = {of: sum(f.width for f in fitted if (f.feature.of == "user") == (of == "user")) for of in ("user", "x")}
    hashes = np.array([xxhash.xxh3_64_intdigest(f"i{k}".encode()) for k in range(KNOWN_ITEMS)], np.uint64)

    def normal(*shape: int) -> Any:
        return rng.normal(0, 0.4, shape).astype(np.float32)

    weights = SlowWeights(
        item_hash=np.sort(hashes),
        item_vector=normal(KNOWN_ITEMS, size + 1),
        item_events=rng.integers(0, 50, KNOWN_ITEMS).astype(np.float32),
        feature_vector=normal(rows["x"], size + 1),
        user_vector=normal(rows["user"], size + 1),
        prior_mean=normal(size + 1),
        prior_variance=rng.uniform(0.1, 0.6, size + 1).astype(np.float32),
        level_scores=np.linspace(-2.5, 2.2, len(feedback.levels)).astype(np.float32),
        bias=normal(1),
        noise=np.array([1.3], np.float32),
        level_noise=np.resize(np.array([1.5, 1.2, 0.7, 0.9, 1.1], np.float32), len(feedback.levels)),
        outcome_weight=np.array([0.25 if rule == "kalman" else 0.0], np.float32),
        leak=_leak(spec, rng),
        readout=np.array([1.1, 0.3, 0.2], np.float32),
        item_variance=np.array([0.2, 0.05], np.float32),
        implicit_item=normal(KNOWN_ITEMS, implicit),
        implicit_map=normal(implicit, size + 1),
    )
    if spec.calibrator_terms:
        means = np.random.default_rng(seed).normal(0, 0.2, KNOWN_ITEMS).astype(np.float32)
        weights = msgspec.structs.replace(weights, calibrator=COEFFICIENTS, item_mean=means)
    return Model(Manifest(1, "v", 0, "", spec, fitted), weights)


#: Ends the name of a variant of a rule that is served with a calibrator.
CALIBRATED = ", calibrated"
#: Every rule that is found, with every variant that it declares, without a calibrator and with one.
VARIANTS = [
    (name, variant + end) for name in rules.names() for variant in rules.find(name).variants for end in ("", CALIBRATED)
]


def model_of(rule: RuleName, variant: str, **more: Any) -> Model:
    """A random model under one of `VARIANTS`."""
    settings = rules.find(rule).variants[variant.removesuffix(CALIBRATED)]
    return random_model(rule=rule, calibrator="linear" if variant.endswith(CALIBRATED) else "none", **settings, **more)


def _leak(spec: LearnerSpec, rng: np.random.Generator) -> Any:
    if spec.leak_shape == (2,):
        return np.array([0.01, 0.02], np.float32)
    return rng.uniform(0.01, 0.05, (2, spec.dimension + 1)).astype(np.float32)


def with_weights(model: Model, **changes: float) -> Model:
    """The model with some of its arrays' last entries set."""
    arrays = {name: getattr(model.weights, name).copy() for name in changes}
    for name, value in changes.items():
        arrays[name][-1] = value
    return msgspec.structs.replace(model, weights=msgspec.structs.replace(model.weights, **arrays))


def random_stream(
    n: int, *, seed: int = 0, users: int = 12, hot: float = 0.0, first_offset: int = 0, features: bool = False
) -> Batch:
    """n events of `users` users, a share `hot` of them by one user; every fifth event has no level.

    A user's events come through one partition of 3; offsets have gaps. Items i40 … i49 are unknown to the model. Every
    fifth user sends no features.
    """
    rng = np.random.default_rng(seed)
    who = np.where(rng.random(n) < hot, 0, rng.integers(0, users, n))
    partitions = (who % 3).astype(np.int32)
    offsets = first_offset + np.cumsum(rng.integers(1, 3, n))
    steps_ms = np.where(rng.random(n) < 0.1, -5_000_000, np.exp(rng.normal(12, 3, n))).astype(np.int64)
    struct = features_struct(FEATURES) if features else None
    return Batch(
        event_ids=[f"e{first_offset}-{k}" for k in range(n)],
        user_ids=[f"u{k}" for k in who],  # type: ignore[misc]
        item_ids=[f"i{k}" for k in rng.integers(0, KNOWN_ITEMS + 10, n)],  # type: ignore[misc]
        features=[struct(**random_features(rng, int(k))) if struct and k % 5 else None for k in who],
        timestamps_ms=START_MS + first_offset * 3_600_000 + np.cumsum(steps_ms),
        levels=np.where(rng.random(n) < 0.2, -1, rng.integers(0, len(LEVELS), n)).astype(np.int8),
        partitions=partitions,
        offsets=offsets,
    )


def random_features(rng: np.random.Generator, user: int) -> dict[str, Any]:
    """Some of the declared features; those of users depend on the user alone."""
    given = {
        "genres": tuple(rng.choice([*GENRES, "unknown"], rng.integers(0, 4)).tolist()),
        "year": float(rng.integers(1900, 2030)),
        "place": str(rng.choice([*PLACES, "elsewhere"])),
        "hour": float(rng.uniform(-2, 26)),
        "words": tuple(rng.normal(size=3).tolist()),
    }
    return {name: value for name, value in given.items() if rng.random() < 0.7} | {
        "country": (*COUNTRIES, "xx")[user % 4],
        "age": 10.0 + 5 * user,
    }


def part(batch: Batch, at: slice | Sequence[int]) -> Batch:
    """Some events of a batch."""
    which = np.arange(len(batch))[at]
    columns = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch) if f.name != "erasures"}
    chosen = {
        k: c[which] if isinstance(c, np.ndarray) else [c[i] for i in which] if c else c for k, c in columns.items()
    }
    return Batch(**chosen)


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in batches of `size`."""
    for start, stop in pairwise([*range(0, len(batch), size), len(batch)]):
        yield part(batch, slice(start, stop))


def adapt_all(adapter: Adapter, batches: Iterator[Batch] | list[Batch]) -> Adapted:
    """Adapts to and commits every batch; what was said of all events."""
    said = []
    for batch in batches:
        said.append(adapter.adapt(batch))
        adapter.commit()
    return Adapted(**{f.name: np.concatenate([getattr(s, f.name) for s in said]) for f in dataclasses.fields(Adapted)})


def rows_of(table: Table) -> dict[tuple[int, str], bytes]:
    """Every row's bytes, by partition and id."""
    return {
        (partition, row_id): table.layout.to_bytes(table.rows[slot])
        for partition in table.partitions
        for row_id, slot in table.items(partition)
    }


def state_of(adapter: Adapter) -> tuple[dict[tuple[int, str], bytes], dict[tuple[int, str], bytes]]:
    """All rows of users and of items."""
    return rows_of(adapter.users), rows_of(adapter.items)


def assert_said_equal(expected: Adapted, actual: Adapted) -> None:
    """Bit by bit."""
    for f in dataclasses.fields(Adapted):
        np.testing.assert_array_equal(getattr(expected, f.name), getattr(actual, f.name), err_msg=f.name)
