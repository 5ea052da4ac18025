"""The compiled rule against the equations of design.md §5 and of the rule's README, written out with full matrices.

Nothing here is taken from the implementation: weights are w, not deviations; P is a matrix; items are kept in
information form (precision, precision × mean); feature encodings are summed anew for every event; everything is
float64 and never rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_streams import FEATURES, random_model, random_stream

from stream_adapt.adapt import Adapter
from stream_adapt.learner.encoder import Bag, Categorical, FittedFeature, Numeric
from stream_adapt.models import Calibrator, Covariance, Model
from stream_adapt.record import Adapted, Batch, Flag

Matrix = np.ndarray[Any, np.dtype[np.float64]]

#: Rows are rounded to float32 after every event; over hundreds of events that adds up to less.
TOLERANCE = 1e-5


@dataclass
class User:
    d: Matrix  # [D+1] w − w₀
    P: Matrix  # [D+1, D+1]
    f: Matrix  # [H] sum over the events learned
    count: int = 0
    last_ms: int = 0
    missed: float = 0.0
    learned: list[tuple[int, int, float]] = field(default_factory=list)  # time, level, z


@dataclass
class Item:
    """Precisions and precision × mean of D offset coordinates and, last, of the bias."""

    precision: Matrix  # [D+1]
    information: Matrix  # [D+1]
    window: int = -1
    pending: list[tuple[Matrix, float, float]] = field(default_factory=list)  # (w with 1 for the bias, e, R)

    @property
    def mean(self) -> Matrix:
        return self.information / self.precision

    def settle(self, window: int) -> None:
        """Applies what an earlier window observed: e + w_j·mean_j = w_j·value_j + noise of variance R."""
        if window == self.window:
            return
        mean = self.mean
        for w, e, r in self.pending:
            self.precision = self.precision + w * w / r
            self.information = self.information + w * (e + w * mean) / r
        self.window, self.pending = window, []


class Reference:
    """design.md §5, one event at a time."""

    def __init__(self, model: Model) -> None:
        self.spec, self.fitted = model.spec, model.manifest.fitted
        self.theta = {name: getattr(model.weights, name) for name in model.weights.__struct_fields__}
        self.theta = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in self.theta.items()}
        self.P0 = np.diag(self.theta["prior_variance"])
        self.users: dict[tuple[int, str], User] = {}
        self.items: dict[tuple[int, str], Item] = {}

    def adapt(self, events: Batch) -> Adapted:
        columns = (
            events.user_ids,
            events.item_ids,
            events.features,
            events.timestamps_ms.tolist(),
            events.levels.tolist(),
            events.partitions.tolist(),
            (events.offsets // self.spec.window).tolist(),
        )
        said = [self.event(*row) for row in zip(*columns, strict=True)]
        return Adapted(*(np.array(column) for column in zip(*said, strict=True)))

    def event(
        self, user_id: str, item_id: str, features: Any, time_ms: int, level: int, partition: int, window: int
    ) -> tuple[float, float, float, float, int, int]:
        theta, size = self.theta, self.spec.dimension
        x0, c, seen = self.item_under_theta(item_id, features)
        w0 = theta["prior_mean"] + self.encoding(features, ("user",), theta["user_vector"])
        noise, b = theta["noise"][0], theta["bias"][0]
        first_variance = 1 / (1 / theta["item_variance"][[1] * size + [0]] + seen / noise)
        user = self.users.setdefault(
            (partition, user_id), User(np.zeros(size + 1), self.P0, np.zeros(self.spec.implicit))
        )
        item = self.items.setdefault((partition, item_id), Item(1 / first_variance, np.zeros(size + 1)))

        late = user.count > 0 and time_ms < user.last_ms
        gamma = 0.0
        if user.count:
            hours = max(0, time_ms - user.last_ms) / 3.6e6
            gamma = math.exp(-(theta["leak"][0] + theta["leak"][1] * math.log(1 + hours)))
        q = user.f / math.sqrt((1 + user.count) * (1 + user.count / 512))
        leant = w0 + theta["implicit_map"].T @ q
        w = leant + gamma * user.d
        P = gamma**2 * user.P + (1 - gamma**2) * self.P0  # noqa: N806

        before = Item(item.precision, item.information, item.window, list(item.pending))
        before.settle(window)
        delta, dc, item_variance = before.mean[:size], before.mean[size], 1 / before.precision
        x = np.append(x0 + delta, 1.0)
        z, v = b + c + dc + w @ x, x @ P @ x
        v_item = item_variance[size] + w[:size] ** 2 @ item_variance[:size]
        missed_by = (level >= self.spec.feedback.target_level) - self.p(z, v + v_item)
        added = self.calibration(user, item_id, time_ms, v + v_item)
        score = self.p(z, v + v_item, added)

        xf = np.append(x0, 1.0)
        frozen_variance = xf @ self.P0 @ xf + first_variance[size] + w0[:size] ** 2 @ first_variance[:size]
        frozen = self.p(b + c + w0 @ xf, frozen_variance)
        if level < 0:
            flags = Flag.SCORE_ONLY | (Flag.LATE if late else 0)
            return score, frozen, score, math.sqrt(v + v_item), user.count, int(flags)

        r = v + noise * float(theta["level_noise"][level])
        (alpha, kappa, _), share = theta["readout"], theta["outcome_weight"][0]
        p, slope = self.p(z, v + v_item), alpha / math.sqrt(1 + kappa * (v + v_item))
        u = (1 - share) * (theta["level_scores"][level] - z) / (r + v_item) + share * slope * missed_by
        h = (1 - share) / (r + v_item) + share * slope**2 * p * (1 - p)
        e, r = u / h, 1 / h - v_item
        item.settle(window)
        item.pending.append((np.append(w[:size], 1.0), e, r))
        user.d = gamma * user.d + P @ x * u
        user.f = user.f + self.implicit(item_id)
        user.P = P - np.outer(P @ x, P @ x) * h
        if self.spec.covariance == "diagonal":
            user.P = np.diag(np.diag(user.P))
        user.count += 1
        user.missed += missed_by
        user.learned.append((time_ms, level, z))
        user.last_ms = max(user.last_ms, time_ms)
        updated = self.p(b + c + dc + (leant + user.d) @ x, x @ user.P @ x + v_item, added)
        return score, frozen, updated, math.sqrt(v + v_item), user.count, int(Flag.LATE if late else 0)

    def p(self, z: float, variance: float, added: float | None = None) -> float:
        alpha, kappa, beta = self.theta["readout"]
        logit = alpha * z / np.sqrt(1 + kappa * variance) + beta
        if added is not None:
            logit += (
                added + self.theta["calibrator"][1] * logit + self.theta["calibrator"][2] * np.clip(logit, -5, 5) ** 3
            )
        return float(1 / (1 + np.exp(-logit)))

    def calibration(self, user: User, item_id: str, time_ms: int, variance: float) -> float | None:
        """What the calibrator's terms but those of the logit add; None without one."""
        if self.spec.calibrator == "none":
            return None
        known = np.flatnonzero(self.theta["item_hash"] == np.uint64(xxhash.xxh3_64_intdigest(item_id.encode())))
        last = user.learned[-self.spec.ring :]
        near = np.array([(1 + max(0, time_ms // 1000 - then // 1000)) ** -0.5 for then, _, _ in last])
        by = np.array([(said >= self.spec.feedback.target_level) - self.p(z, variance) for _, said, z in last])
        terms = [
            1.0,
            0.0,
            0.0,
            user.missed / (user.count + 200),
            float(near @ by) / (near.sum() + 2),
            float(self.theta["item_mean"][known].sum()),
            math.sqrt(variance),
            math.log(1 + max(0, time_ms - user.last_ms) / 1000) if user.count else 0.0,
        ]
        return float(self.theta["calibrator"] @ terms)

    def item_under_theta(self, item_id: str, features: Any) -> tuple[Matrix, float, float]:
        """x `[D]`, c, and events in pretraining."""
        theta = self.theta
        x = self.encoding(features, ("item", "event"), theta["feature_vector"])
        known = np.flatnonzero(theta["item_hash"] == np.uint64(xxhash.xxh3_64_intdigest(item_id.encode())))
        x = x + theta["item_vector"][known].sum(axis=0)
        return x[:-1], float(x[-1]), float(theta["item_events"][known].sum())

    def implicit(self, item_id: str) -> Matrix:
        """f of an item `[H]`: zeros where θ does not know it."""
        known = np.flatnonzero(self.theta["item_hash"] == np.uint64(xxhash.xxh3_64_intdigest(item_id.encode())))
        f: Matrix = self.theta["implicit_item"][known].sum(axis=0)
        return f

    def encoding(self, features: Any, roles: tuple[str, ...], table: Matrix) -> Matrix:
        """Σ weight × row `[D+1]` over the declared features of these roles."""
        total = np.zeros(self.spec.dimension + 1)
        for one in self.fitted:
            value = getattr(features, one.name) if features is not None else None
            if one.feature.of in roles and value is not None:
                total += self.weights_of(one, value) @ table[one.start : one.start + one.width]
        return total

    @staticmethod
    def weights_of(one: FittedFeature, value: Any) -> Matrix:
        """Weights `[width]` of a feature's rows."""
        if isinstance(one.feature, Categorical):
            return np.array([float(v == value) for v in one.vocabulary])
        if isinstance(one.feature, Bag):
            return np.array([value.count(v) / math.sqrt(len(value) or 1) for v in one.vocabulary])
        if isinstance(one.feature, Numeric) and one.knots:
            return np.array([np.interp(value, one.knots, hat) for hat in np.eye(len(one.knots))])
        if isinstance(one.feature, Numeric):
            return np.clip([(value - one.mean) / one.scale], -5, 5)
        return np.array(value)


def matrix(packed: Matrix, width: int) -> Matrix:
    """P as a matrix."""
    if len(packed) == width:
        return np.diag(packed)
    lower = np.zeros((width, width))
    lower[np.tril_indices(width)] = packed
    return lower + np.tril(lower, -1).T


def assert_same(reference: Reference, adapter: Adapter, expected: Adapted, actual: Adapted) -> None:
    for name in ("score", "frozen_score", "updated_score", "uncertainty"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), atol=TOLERANCE, err_msg=name)
    np.testing.assert_array_equal(expected.adaptations, actual.adaptations)
    np.testing.assert_array_equal(expected.flags, actual.flags)
    size = reference.spec.dimension
    for (partition, user_id), user in reference.users.items():
        row = adapter.users.rows[adapter.users.find(partition, user_id)]
        assert (user.count, user.last_ms) == (row["count"], row["last_ms"])
        np.testing.assert_allclose(matrix(row["P"], size + 1), user.P, rtol=TOLERANCE, atol=TOLERANCE)
    for (partition, item_id), item in reference.items.items():
        row = adapter.items.rows[adapter.items.find(partition, item_id)]
        assert len(item.pending) == row["pending_count"]
        np.testing.assert_allclose(np.append(row["delta"], row["c"]), item.mean, atol=TOLERANCE)
        np.testing.assert_allclose(np.append(row["delta_var"], row["c_var"]), 1 / item.precision, rtol=TOLERANCE)


@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("calibrator", get_args(Calibrator))
@pytest.mark.parametrize("covariance", get_args(Covariance))
def test_service_computes_the_equations(
    covariance: Covariance, calibrator: Calibrator, features: bool, device: str
) -> None:
    model = random_model(covariance, features=features, calibrator=calibrator)
    reference, adapter = Reference(model), Adapter(model, device)
    for k in range(2):
        events = random_stream(500, seed=k, features=features, first_offset=5000 * k)
        assert_same(reference, adapter, reference.adapt(events), adapter.adapt(events))


@given(
    covariance=st.sampled_from(get_args(Covariance)),
    size=st.sampled_from([1, 6]),  # each is compiled once
    window=st.integers(1, 40),
    n=st.integers(1, 120),
    users=st.integers(1, 5),
    features=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_service_computes_the_equations_of_any_shape(
    covariance: Covariance, size: int, window: int, n: int, users: int, features: bool, seed: int
) -> None:
    model = random_model(covariance, features=features, seed=seed, size=size, window=window)
    reference, adapter = Reference(model), Adapter(model)
    events = random_stream(n, seed=seed, users=users, features=features)
    assert_same(reference, adapter, reference.adapt(events), adapter.adapt(events))


def test_the_streams_of_these_tests_use_every_declared_feature() -> None:
    events = random_stream(100, features=True)
    for name in FEATURES:
        assert any(f is not None and getattr(f, name) is not None for f in events.features)
