"""Items' settling: θ takes over part of what service's rows of items would hold after the log."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from learner_streams import KNOWN_ITEMS, VARIANTS, adapt_all, model_of, random_model, random_stream

from stream_adapt.adapt import Adapter
from stream_adapt.meta.sequences import read_batches
from stream_adapt.meta.settling import settled
from stream_adapt.models import Model, RuleName, SlowWeights
from stream_adapt.record import Batch


def lesson(n: int = 400) -> Batch:
    """Events that all carry feedback, of one partition, without gaps; some of them with items that θ does not know."""
    batch = random_stream(n, features=True)
    taught = {"levels": np.arange(n, dtype=np.int8) * 7 % 5, "partitions": np.zeros(n, np.int32)}
    return dataclasses.replace(batch, offsets=np.arange(n), **taught)


def settle(model: Model, batch: Batch, share: float) -> SlowWeights:
    return settled(model.weights, model.spec, model.manifest.fitted, read_batches([batch]), share)


def learned(model: Model, batch: Batch) -> dict[int, npt.NDArray[np.float64]]:
    """By hash: δ and Δc of the known items after service went over the batch, from the rows' own fields."""
    adapter, found = Adapter(model), {}
    adapt_all(adapter, [batch])
    for _, slot in adapter.items.items(0):
        row = {name: adapter.items.rows[name][slot].astype(np.float64) for name in ("c", "c_var", "delta", "delta_var")}
        sums = {name: adapter.items.rows[name][slot] for name in ("c_info", "c_sum", "delta_info", "delta_sum")}
        delta = row["delta"] + sums["delta_sum"] / (1 / row["delta_var"] + sums["delta_info"])
        c = row["c"] + sums["c_sum"] / (1 / row["c_var"] + sums["c_info"])
        found[int(adapter.items.rows["hash"][slot])] = np.append(delta, c)
    return {item: row for item, row in found.items() if item in model.weights.item_hash}


@pytest.mark.parametrize(("rule", "variant"), VARIANTS)
def test_theta_takes_over_a_share_of_what_service_would_learn_of_items(rule: RuleName, variant: str) -> None:
    model, batch = model_of(rule, variant, features=True), lesson()
    rows, before = learned(model, batch), model.weights.item_vector
    assert len(rows) == KNOWN_ITEMS
    moved = settle(model, batch, 0.5).item_vector - before
    expected = np.array([0.5 * rows[item] for item in model.weights.item_hash.tolist()])
    np.testing.assert_allclose(expected, moved, rtol=0, atol=1e-6)
    assert np.abs(expected).max() > 0.05


def test_nothing_else_of_theta_changes() -> None:
    """Not how sure it is of items, above all: the events are those that it was trained on."""
    model = random_model(features=True)
    for name, array in msgspec.structs.asdict(settle(model, lesson(), 0.5)).items():
        assert (name == "item_vector") != np.array_equal(array, getattr(model.weights, name)), name


def test_items_that_nobody_met_stay() -> None:
    model, batch = random_model(), lesson(60)
    met = set(learned(model, batch))
    assert 0 < len(met) < KNOWN_ITEMS
    unmet = [item not in met for item in model.weights.item_hash.tolist()]
    after = settle(model, batch, 0.5)
    np.testing.assert_array_equal(model.weights.item_vector[unmet], after.item_vector[unmet])


def test_without_a_share_nothing_is_done() -> None:
    model = random_model()
    assert settle(model, lesson(), 0.0) is model.weights
