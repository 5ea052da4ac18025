"""The batched rule learns what the sequential one learns, and gradients go through its updates."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_streams import KNOWN_ITEMS, VARIANTS, adapt_all, cut, model_of, part, random_model, random_stream, state_of
from msgspec import structs
from torch import Tensor

from stream_adapt.adapt import Adapter
from stream_adapt.errors import ConfigError
from stream_adapt.learner import rules
from stream_adapt.learner.rules import batching
from stream_adapt.learner.rules.batching import Items, Seen, Theta
from stream_adapt.learner.rules.kalman import batched
from stream_adapt.learner.rules.kalman.batched import Users
from stream_adapt.models import Covariance, RuleName
from stream_adapt.record import Adapted, Flag
from stream_adapt.state.table import Table

#: Rows are float32, and the item sums may be added up in another order.
TOLERANCE = 1e-5

every_rule = pytest.mark.parametrize(("rule", "variant"), VARIANTS)
both_covariances = pytest.mark.parametrize("covariance", get_args(Covariance))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbers(table: Table) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Every field of the rows in use `[m, …]`, in float64."""
    return {f.name: table.rows[f.name][table.partition_of >= 0].astype(np.float64) for f in table.layout.fields}


def last_bit(values: np.ndarray, times: np.ndarray | float = 1.0) -> np.ndarray:  # type: ignore[type-arg]
    """The norm `[m]` of one unit in the last place of every float32 of `[m, k]`, each times something."""
    return np.linalg.norm(np.spacing(values.astype(np.float32)) * times, axis=1)


def copy_rows(source: Table, target: Table) -> None:
    """The same rows at the same slots."""
    keys = sorted(
        (slot, partition, row_id) for partition in source.partitions for row_id, slot in source.items(partition)
    )
    slots = target.slots([partition for _, partition, _ in keys], [row_id for _, _, row_id in keys])
    target.rows[slots] = source.rows[[slot for slot, _, _ in keys]]


def assert_same_update(before: Table, expected: Table, actual: Table) -> None:
    """Row by row the changes of weights and variances agree, relative to the change and but for the last bit stored.

    An item's change is its variance times the sum of what its n events said. That sum is rounded n times, and may be
    much smaller than what it adds up: its own last bits, √n of them as in a random walk, are allowed for as well.
    """
    rows = len(before)
    old, new, other = (
        {name: field[:rows].reshape(rows, -1) for name, field in numbers(table).items()}
        for table in (before, expected, actual)
    )
    events = np.maximum(new["count"] - old["count"], 1.0)[:, 0]  # [m]
    for name in {"d", "P", "missed", "c", "delta"} & set(new):
        change, other_change = new[name] - old[name], other[name] - old[name]
        allowed = TOLERANCE * np.linalg.norm(change, axis=1) + last_bit(new[name])
        if f"{name}_sum" in new:
            allowed += np.sqrt(events) * last_bit(new[f"{name}_sum"], old[f"{name}_var"])
        assert np.all(np.linalg.norm(change - other_change, axis=1) <= allowed), name
    for name, expected_field in numbers(expected).items():
        within = 0 if before.layout.dtype[name].base.kind in "iu" else TOLERANCE
        np.testing.assert_allclose(numbers(actual)[name], expected_field, rtol=within, atol=within, err_msg=name)


def assert_said_close(expected: Adapted, actual: Adapted) -> None:
    for f in dataclasses.fields(Adapted):
        expected_column, actual_column = (np.asarray(getattr(said, f.name)) for said in (expected, actual))
        atol = 1e-6 if expected_column.dtype.kind == "f" else 0
        np.testing.assert_allclose(actual_column, expected_column, rtol=0, atol=atol, err_msg=f.name)


@every_rule
@pytest.mark.parametrize("size", [1, 3, 63, 4096])
def test_it_learns_what_the_sequential_rule_learns(rule: RuleName, variant: str, size: int) -> None:
    model = model_of(rule, variant, features=True, window=64)
    before, expected, actual = (Adapter(model, device) for device in ("cpu", "cpu", "torch-cpu"))
    adapt_all(before, [random_stream(400, seed=1, features=True)])
    for adapter in (expected, actual):
        copy_rows(before.users, adapter.users)
        copy_rows(before.items, adapter.items)
    events = random_stream(size, seed=2, hot=0.9, features=True, first_offset=1000)
    assert_said_close(expected.adapt(events), actual.adapt(events))
    assert_same_update(before.users, expected.users, actual.users)
    assert_same_update(before.items, expected.items, actual.items)


@every_rule
def test_it_does_not_matter_where_batches_are_cut(rule: RuleName, variant: str) -> None:
    events, model = random_stream(500, users=40), model_of(rule, variant)
    whole, pieces = Adapter(model, "torch-cpu"), Adapter(model, "torch-cpu")
    assert_said_close(adapt_all(whole, [events]), adapt_all(pieces, cut(events, 37)))
    for a, b in ((whole.users, pieces.users), (whole.items, pieces.items)):
        for name, field in numbers(a).items():
            np.testing.assert_allclose(numbers(b)[name], field, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 3)), max_size=60),
)
def test_rounds_hold_each_user_once_and_respect_what_came_before(drawn: list[tuple[int, int, int]]) -> None:
    user, partition, steps = np.array(drawn, dtype=np.int64).reshape(-1, 3).T
    user = user * 3 + partition  # a row belongs to one partition
    window = np.cumsum(steps)
    order, windows = batching.plan_rounds(user, partition, window)
    assert list(range(len(drawn))) == sorted(order)
    rounds = [order[a:b] for bounds in windows for a, b in pairwise(bounds)]
    assert all(len(set(user[r])) == len(r) for r in rounds)
    for u in set(user):
        assert np.flatnonzero(user == u).tolist() == [k for k in order if user[k] == u]
    for p in set(partition):
        assert sorted(window[partition == p]) == [window[k] for k in order if partition[k] == p]
    for bounds in windows:
        members = order[bounds[0] : bounds[-1]]
        assert len({(partition[k], window[k]) for k in members}) == len(set(partition[members]))
        first = user[order[bounds[0] : bounds[1]]]
        assert all(np.array_equal(first[: b - a], user[order[a:b]]) for a, b in pairwise(bounds))


@both_covariances
def test_first_rows_are_those_of_the_slab(covariance: Covariance) -> None:
    model, full = random_model(covariance), covariance == "full"
    adapter, theta = Adapter(model), Theta.of(model.weights, "cpu", model.spec.feedback.target_level)
    adapter.users.slots([0, 0], ["a", "b"])
    adapter.items.slots([0, 0], ["i0", "i49"])
    users = batched.init(theta, 2, full=full, ring=model.spec.ring)
    hashes = torch.from_numpy(adapter.items.rows["hash"][:2].view(np.int64).copy())
    known = np.searchsorted(model.weights.item_hash, adapter.items.rows["hash"][0])
    items = batching.init_items(theta, hashes, torch.tensor([known, KNOWN_ITEMS]))
    for table, rows in ((adapter.users, users), (adapter.items, items)):
        for name, value in zip(rows._fields, rows, strict=True):
            if name == "missed":  # rows have it where there is a calibrator
                assert (2, 0) == value.shape
                continue
            field = table.rows[name][:2]
            np.testing.assert_array_equal(field, value.numpy().view(field.dtype), err_msg=name)


#: What of θ those updates go through.
LEAVES = (*Theta._fields[:8], "implicit_item", "implicit_map")


def through_two_windows(covariance: Covariance) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The scores of two users' four events as a function of θ, and a θ. Items learn, and settle, on the way."""
    model = random_model(covariance, size=2)
    theta = Theta._make(t.double() for t in Theta.of(model.weights, "cpu", model.spec.feedback.target_level))
    tables = ("item_vector", "item_events", "implicit_item")
    theta = theta._replace(**{name: getattr(theta, name)[:3] for name in tables})
    rng = np.random.default_rng(5)
    known, hours = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 2]]), torch.tensor([[0, 0], [1, 5], [2, 7], [50, 7]])
    levels = torch.tensor([[0, 4], [3, 1], [4, 2], [1, -1]])
    w0 = torch.from_numpy(rng.normal(0, 0.5, (2, 3)))
    no_pairs = (torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0))

    def scores(*leaves: Tensor) -> Tensor:
        given_theta, said = theta._replace(**dict(zip(LEAVES, leaves, strict=True))), []
        users = batched.init(given_theta, 2, full=covariance == "full", ring=2, dtype=torch.float64)
        items = batching.init_items(given_theta, torch.arange(3), torch.arange(3), dtype=torch.float64)
        for t in range(4):
            settled = batching.settle(items, torch.full((3,), t // 2))
            x, c = batching.encode(given_theta, known[t], torch.zeros(2, 3), no_pairs)
            seen = seen_of(given_theta, x, c, w0, settled, known[t], hours[t], levels[t])
            seen = seen._replace(added=given_theta.implicit_item[known[t]])
            reading = batched.read(given_theta, users, seen)
            said.append(batching.read_out(given_theta, reading.z, reading.v + reading.v_item))
            users, lesson, z, v = batched.write(given_theta, users, seen, reading)
            said.append(batching.read_out(given_theta, z, v + reading.v_item))
            items = batching.add_pending(items, settled, known[t], lesson)
        return torch.cat(said)

    return scores, tuple(getattr(theta, name).clone().requires_grad_() for name in LEAVES)


def seen_of(
    theta: Theta, x: Tensor, c: Tensor, w0: Tensor, items: Items, at: Tensor, hours: Tensor, level: Tensor
) -> Seen:
    delta = torch.cat([items.delta[at], torch.zeros(len(at), 1)], 1)
    offset, time_ms = theta.bias + c + items.c[at], hours * 3_600_000
    return Seen(
        x + delta,
        w0,
        offset,
        items.c_var[at],
        items.delta_var[at],
        items.hash[at],
        time_ms,
        level,
        level.int(),
        delta[:, :0],
    )


@both_covariances
def test_gradients_through_the_updates_equal_finite_differences(covariance: Covariance) -> None:
    scores, theta = through_two_windows(covariance)
    assert torch.autograd.gradcheck(scores, theta, fast_mode=True)
    gradients = torch.autograd.grad(scores(*theta)[-4:].sum(), theta)  # of the last events: through all updates
    assert all(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("level", range(5))
def test_an_outcome_alone_is_learned_by_the_slope_and_the_curvature_of_its_likelihood(level: int) -> None:
    """With λ = 1: u is the first derivative of log p(y) in z, h the second with its sign turned."""
    alone = torch.ones(1, dtype=torch.float64)
    theta = Theta.of(random_model().weights, "cpu", target=3)._replace(outcome_weight=alone)
    z = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    variance, said = torch.linspace(0.1, 4, 7, dtype=torch.float64), torch.full((7,), level)
    p = batching.read_out(theta, z, variance)
    likelihood = torch.where(said >= 3, p, 1 - p).log().sum()
    (slope,) = torch.autograd.grad(likelihood, z, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), z)
    u, h = batched._weighed(theta, said, z, variance)
    torch.testing.assert_close(u, slope)
    torch.testing.assert_close(h, -curvature)


@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
@both_covariances
def test_variances_stay_positive_however_steep_the_readout(covariance: Covariance, device: str) -> None:
    """Without κ the outcome's curvature does not fall with the variance: what an event tells has a bound of its own."""
    model, steep = random_model(covariance), np.array([40.0, 0.0, 0.0], np.float32)
    model = structs.replace(model, weights=structs.replace(model.weights, readout=steep))
    adapter = Adapter(model, device)
    said = adapt_all(adapter, [random_stream(400, users=5)])
    assert not np.any(said.flags & Flag.NAN_UNDONE)
    rows, width = numbers(adapter.users)["P"], model.spec.dimension + 1
    assert (rows[:, np.cumsum(np.arange(1, width + 1)) - 1 if covariance == "full" else slice(None)] > 0).all()
    items = numbers(adapter.items)
    assert (items["c_var"] > 0).all()
    assert (items["c_info"] >= 0).all()


@every_rule
def test_a_row_forgets_by_the_millisecond_over_years(rule: RuleName, variant: str) -> None:
    """Hours are float64: a float32 of them would be off by half a minute after a year."""
    model = model_of(rule, variant)
    theta = Theta.of(model.weights, "cpu", model.spec.feedback.target_level)
    module = import_module(f"{rules.__name__}.{rule}.batched")
    kind = {"full": variant.startswith("full")} if rule == "kalman" else {}
    users = module.init(theta, 1, ring=2, dtype=torch.float64, **kind)
    users = users._replace(count=users.count + 1, d=users.d + 1)
    one, two = torch.ones(1, 7, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    ms = torch.tensor([31_536_000_123])  # a year
    said = module.read(theta, users, Seen(one, one, two, two, one[:, 1:], ms, ms, ms, ms.int(), one[:, :3]))
    gamma = torch.exp(-(theta.leak[0] + theta.leak[1] * math.log1p(31_536_000_123 / 3.6e6)))
    torch.testing.assert_close(said.d[0], gamma.expand(7), rtol=1e-14, atol=0)


def test_writing_leaves_the_rows_it_was_given_alone() -> None:
    model = random_model()
    theta = Theta.of(model.weights, "cpu", model.spec.feedback.target_level)
    users = batched.init(theta, 2, full=False, ring=2)
    kept = Users._make(t.clone() for t in users)
    one, two = torch.ones(2, 7, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    seen = Seen(one, one, two, two, one[:, 1:], two.long(), two.long(), two.long(), two.int(), one[:, :3])
    written = batched.write(theta, users, seen, batched.read(theta, users, seen))
    assert all(torch.equal(a, b) for a, b in zip(kept, users, strict=True))
    assert not torch.equal(users.d, written.users.d)


def test_an_unknown_device_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="device='abacus'"):
        Adapter(random_model(), "abacus")


def test_service_on_the_cpu_does_not_import_torch() -> None:
    asks = "import sys, stream_adapt.pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asks], check=False).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_rule
def test_the_gpu_repeats_itself_bit_by_bit_and_agrees_with_the_cpu(rule: RuleName, variant: str) -> None:
    model, events = model_of(rule, variant, features=True), random_stream(2000, features=True)
    here, there, again = (Adapter(model, device) for device in ("cpu", "cuda", "cuda"))
    assert_said_close(here.adapt(events), there.adapt(events))
    again.adapt(part(events, slice(None)))
    assert state_of(there) == state_of(again)
