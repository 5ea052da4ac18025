"""The gradient rule against the equations of its README written out in float64, and unrolled against one by one."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_streams import KNOWN_ITEMS, START_MS, random_model

from stream_adapt.adapt import Adapter
from stream_adapt.meta.objective.contract import Problem, Sequences
from stream_adapt.meta.objective.gradient import Gradient
from stream_adapt.meta.objective.prequential import predict
from stream_adapt.models import Model
from stream_adapt.record import Adapted, Batch

Vector = np.ndarray[Any, np.dtype[np.float64]]

#: Rows are rounded to float32 after every event.
TOLERANCE = 1e-5

both_steps = pytest.mark.parametrize("normalized", [True, False])


def one_user(n: int, items: list[int], levels: list[int]) -> Batch:
    """n events of one user, one window each, hours apart."""
    rng = np.random.default_rng(3)
    return Batch(
        event_ids=[str(k) for k in range(n)],
        user_ids=["u"] * n,  # type: ignore[list-item]
        item_ids=[f"i{k}" for k in items],  # type: ignore[misc]
        features=[None] * n,
        timestamps_ms=START_MS + np.cumsum(rng.integers(0, 5 * 3_600_000, n)),
        levels=np.array(levels, np.int8),
        partitions=np.zeros(n, np.int32),
        offsets=np.arange(n) * 1000,
    )


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def by_hand(model: Model, events: Batch) -> tuple[list[float], list[float], Vector]:
    """Scores before and after each event, and the user's last weights: the README's equations, without a row."""
    t = {name: getattr(model.weights, name).astype(np.float64) for name in model.weights.__struct_fields__[1:]}
    size, (alpha, kappa, beta) = model.spec.dimension, t["readout"]
    w, w0, items = t["prior_mean"], t["prior_mean"], {}
    scores, updates, hour = [], [], None
    place = {h: k for k, h in enumerate(model.weights.item_hash)}
    adapter = Adapter(model)
    slots = adapter.items.slots([0] * len(events), events.item_ids)
    for k, item in enumerate(events.item_ids):
        at = place[adapter.items.rows["hash"][slots[k]]]
        v, bv = (1 / (1 / v0 + t["item_events"][at] / t["noise"][0]) for v0 in t["item_variance"][[1, 0]])
        mean, variance = items.get(item, (np.zeros(size + 1), np.append(np.full(size, v), bv)))
        now = events.timestamps_ms[k] / 3.6e6
        if hour is not None:
            w = w0 + np.exp(-(t["leak"][0] + t["leak"][1] * math.log(1 + now - hour))) * (w - w0)
        x = np.append(t["item_vector"][at][:size] + mean[:size], 1.0)
        z0 = t["bias"][0] + t["item_vector"][at][size] + mean[size]
        v_item = variance[size] + w[:size] ** 2 @ variance[:size]

        def p(weights: Vector, x: Vector = x, z0: float = z0, v_item: float = v_item) -> float:
            return sigmoid(alpha * (z0 + weights @ x) / math.sqrt(1 + kappa * v_item) + beta)

        scores.append(p(w))
        q = sigmoid(z0 + w @ x)
        e, curvature = sigmoid(t["level_scores"][events.levels[k]]) - q, q * (1 - q)
        one = np.append(w[:size], 1.0)
        variance = 1 / (1 / variance + curvature * one**2)
        items[item] = mean + variance * e * one, variance
        rates = t["prior_variance"]
        w = w + rates * e * x / (1 + curvature * x @ (rates * x) if model.spec.normalized else 1)
        updates.append(p(w))
        hour = now
    return scores, updates, w - w0


@both_steps
def test_service_computes_the_equations(normalized: bool) -> None:
    rng = np.random.default_rng(0)
    events = one_user(60, rng.integers(0, 8, 60).tolist(), rng.integers(0, 5, 60).tolist())
    model = random_model(rule="gradient", normalized=normalized, window=1000)
    adapter = Adapter(model)
    said: Adapted = adapter.adapt(events)
    scores, updates, deviation = by_hand(model, events)
    np.testing.assert_allclose(said.score, scores, atol=TOLERANCE)
    np.testing.assert_allclose(said.updated_score, updates, atol=TOLERANCE)
    np.testing.assert_allclose(adapter.users.rows["d"][0], deviation, atol=TOLERANCE)


@both_steps
def test_training_unrolls_what_service_says(normalized: bool) -> None:
    """With items that cannot move, and a readout that shows the logit; a shorter sequence beside it, padded."""
    events = one_user(40, list(range(40)), np.random.default_rng(1).integers(0, 5, 40).tolist())
    model = random_model(rule="gradient", normalized=normalized)
    still = {"item_variance": np.full(2, 1e-12, np.float32), "readout": np.array([1.1, 0.0, 0.2], np.float32)}
    model = msgspec.structs.replace(model, weights=msgspec.structs.replace(model.weights, **still))
    adapter = Adapter(model)
    said = adapter.adapt(events)
    t = {name: torch.from_numpy(getattr(model.weights, name)) for name in model.weights.__struct_fields__[1:]}
    known = np.searchsorted(model.weights.item_hash, adapter.items.rows["hash"][:KNOWN_ITEMS])
    vectors = t["item_vector"][known].double()
    x = torch.cat([vectors[:, :-1], torch.ones(40, 1)], 1)
    prior = vectors[:, -1] + t["bias"] + x @ t["prior_mean"].double()
    levels = torch.from_numpy(events.levels).long()
    hours = torch.from_numpy(np.diff(events.timestamps_ms, prepend=events.timestamps_ms[0]) / 3.6e6)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, 7:] = False
    columns = [c[None].repeat(2, *[1] * c.ndim) for c in (x, prior, t["level_scores"][levels], hours)]
    columns[0][1, 7:] = 9.0
    numbers = (t[name] for name in ("prior_variance", "noise", "leak", "readout", "level_scores"))
    rule = Gradient(*numbers, normalized=normalized)
    seen = Sequences(*columns, real)
    logits = predict(Problem(rule, seen, levels[None].repeat(2, 1), torch.zeros(4), 3))
    np.testing.assert_allclose(torch.sigmoid(logits[0]).numpy(), said.score, atol=TOLERANCE)
    torch.testing.assert_close(logits[0, :7], logits[1, :7])
    np.testing.assert_allclose(torch.sigmoid(rule.frozen(seen))[0].numpy(), said.frozen_score, atol=TOLERANCE)
