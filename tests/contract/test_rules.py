"""What every update rule promises, for every rule found in `learner/rules/` and every variant that it declares."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_streams import (
    CALIBRATED,
    VARIANTS,
    adapt_all,
    assert_said_equal,
    cut,
    model_of,
    part,
    random_stream,
    rows_of,
    state_of,
    with_weights,
)

from stream_adapt.adapt import Adapter
from stream_adapt.learner.feedback import MOST_LEVELS, Feedback, LabelCuts
from stream_adapt.models import LearnerSpec, Model, RuleName, SlowWeights
from stream_adapt.record import Adapted, Batch, Flag
from stream_adapt.state.row import RowError

DEVICES = ("cpu", "torch-cpu")

pytestmark = pytest.mark.parametrize(("rule", "variant"), VARIANTS)
both_devices = pytest.mark.parametrize("device", DEVICES)


def test_a_model_can_name_the_rule(rule: RuleName, variant: str) -> None:
    assert rule in get_args(get_type_hints(LearnerSpec)["rule"])
    assert rule == model_of(rule, variant).spec.rule


@both_devices
def test_an_event_is_scored_as_by_the_frozen_model_when_user_and_item_are_new(
    rule: RuleName, variant: str, device: str
) -> None:
    events = random_stream(50, users=50)
    first = [k for k in range(50) if events.user_ids[k] not in events.user_ids[:k]]
    first = [k for k in first if events.item_ids[k] not in events.item_ids[:k]]
    said = Adapter(model_of(rule, variant), device).adapt(part(events, first))
    if not variant.endswith(CALIBRATED):  # frozen scores are the model's without adapting, and without calibrator
        np.testing.assert_allclose(said.frozen_score, said.score, rtol=0, atol=1e-7)
    assert np.any(said.updated_score != said.score)


@both_devices
def test_real_valued_labels_teach_as_finely_as_they_are_cut(rule: RuleName, variant: str, device: str) -> None:
    """The same event of users who are new, with label upon label: the next score rises from each cut to the next."""
    cuts = tuple(np.linspace(-1, 1, MOST_LEVELS + 1)[1:-1].tolist())
    names = tuple(map(str, range(MOST_LEVELS)))
    feedback = Feedback(names, names[MOST_LEVELS // 2], LabelCuts((-1.0, 1.0), cuts))
    model = model_of(rule, variant, feedback=feedback)
    alike = msgspec.structs.replace(model.weights, level_noise=np.ones(MOST_LEVELS, np.float32))
    labels = np.random.default_rng(2).uniform(-1, 1, 300)
    event, n = part(random_stream(1), [0]), len(labels)
    events = replace(
        part(event, [0] * n),
        user_ids=[f"u{k}" for k in range(n)],  # type: ignore[arg-type]
        levels=feedback.level_of(labels.tolist(), [""] * n),
        offsets=np.arange(n) % 16,  # one window: the item stays as it is
    )
    said = Adapter(with_arrays(model, alike), device).adapt(events)
    np.testing.assert_array_equal(said.score, said.score[0])
    order = np.argsort(labels)
    rises, same = np.diff(said.updated_score[order]), np.diff(events.levels[order]) == 0
    assert len(np.unique(events.levels)) > 100
    np.testing.assert_allclose(rises[same], 0, rtol=0, atol=1e-12)
    assert np.all(rises[~same] > 1e-6)


@both_devices
def test_scoring_changes_nothing(rule: RuleName, variant: str, device: str) -> None:
    adapter = Adapter(model_of(rule, variant), device)
    adapt_all(adapter, [random_stream(300)])
    before = state_of(adapter)
    later = random_stream(200, seed=1, first_offset=10_000)
    later.levels[:] = -1
    said = adapter.adapt(later)
    for kept, now in zip(before, state_of(adapter), strict=True):
        assert kept == {key: row for key, row in now.items() if key in kept}
    np.testing.assert_array_equal(said.score, said.updated_score)
    assert np.all(said.flags & Flag.SCORE_ONLY)


def test_a_score_does_not_know_its_own_level(rule: RuleName, variant: str) -> None:
    events, other = random_stream(100), random_stream(100)
    other.levels[-1] = (events.levels[-1] + 2) % 5
    said, otherwise = (Adapter(model_of(rule, variant)).adapt(e) for e in (events, other))
    np.testing.assert_array_equal(said.score, otherwise.score)
    np.testing.assert_array_equal(said.uncertainty, otherwise.uncertainty)


def test_one_by_one_and_many_at_once_are_the_same_byte_for_byte(rule: RuleName, variant: str) -> None:
    events = random_stream(20_000, users=500)
    model = model_of(rule, variant, window=256)
    expected = Adapter(model)
    said = adapt_all(expected, cut(events, 4096))
    for size in (1, 7):
        adapter = Adapter(model)
        assert_said_equal(said, adapt_all(adapter, cut(events, size)))
        assert state_of(expected) == state_of(adapter)


def one_window(seed: int) -> Batch:
    """16 offsets of one partition, with users and items that meet again."""
    events = random_stream(16, seed=seed, users=5)
    events.partitions[:] = 0
    events.offsets[:] = 1600 + np.arange(16)
    return events


@given(seed=st.integers(0, 99), device=st.sampled_from(DEVICES), order=st.permutations(range(16)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_other_users_within_a_window_changes_no_user(
    rule: RuleName, variant: str, seed: int, device: str, order: list[int]
) -> None:
    events, before = one_window(seed), random_stream(80, users=5)
    before.partitions[:] = 0
    of_user = {u: iter([k for k in range(16) if events.user_ids[k] == u]) for u in set(events.user_ids)}
    moved = [next(of_user[events.user_ids[k]]) for k in order]  # each user's own events stay in order
    adapters, said = [Adapter(model_of(rule, variant), device) for _ in range(2)], []
    for adapter, at in zip(adapters, (list(range(16)), moved), strict=True):
        adapt_all(adapter, [before])
        window = part(events, at)
        window.offsets[:] = events.offsets
        said.append(adapter.adapt(window))
    if device == "cpu":  # torch computes an exponential differently by its place in a vector
        assert rows_of(adapters[0].users) == rows_of(adapters[1].users)
        np.testing.assert_array_equal(said[0].score[moved], said[1].score)
    np.testing.assert_allclose(said[0].score[moved], said[1].score, rtol=0, atol=1e-6)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_rows_come_back_from_their_bytes(rule: RuleName, variant: str, data: st.DataObject) -> None:
    adapter = Adapter(model_of(rule, variant))
    layout = data.draw(st.sampled_from([adapter.users.layout, adapter.items.layout]))
    body = data.draw(st.binary(min_size=layout.row_bytes, max_size=layout.row_bytes))
    content = layout.to_bytes(np.frombuffer(body, layout.dtype)[0])
    assert body == layout.from_bytes(content).tobytes()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_are_no_row(rule: RuleName, variant: str, data: st.DataObject) -> None:
    adapter = Adapter(model_of(rule, variant))
    layout = data.draw(st.sampled_from([adapter.users.layout, adapter.items.layout]))
    content = bytearray(layout.to_bytes(np.zeros((), layout.dtype)))
    header = (1, 2, *range(4, 8))  # without the low byte of the format and the reserved one
    at = data.draw(st.sampled_from(header) | st.integers(8, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    damaged = data.draw(st.sampled_from([bytes(content), bytes(content[:-1]), bytes(content) + b"\0", b""]))
    with pytest.raises(RowError):
        layout.from_bytes(damaged)


def test_a_row_takes_the_same_memory_however_much_happened(rule: RuleName, variant: str) -> None:
    adapter = Adapter(model_of(rule, variant))
    sizes = []
    for k in range(3):
        adapt_all(adapter, [random_stream(2000, seed=k, users=4, first_offset=k * 10_000)])
        users, items = state_of(adapter)
        sizes.append((len(users), len(items), {len(row) for row in users.values()}, len(adapter.users.rows)))
    assert [sizes[0]] * 3 == sizes


@both_devices
def test_what_a_slot_held_before_makes_no_difference(rule: RuleName, variant: str, device: str) -> None:
    clean, dirty = (Adapter(model_of(rule, variant), device) for _ in range(2))
    for table in (dirty.users, dirty.items):
        table.rows.view(np.uint8)[:] = 0xFF  # NaN in every number
    assert_said_equal(clean.adapt(random_stream(300)), dirty.adapt(random_stream(300)))
    assert state_of(clean) == state_of(dirty)


@both_devices
def test_an_abort_puts_every_byte_back(rule: RuleName, variant: str, device: str) -> None:
    adapter = Adapter(model_of(rule, variant), device)
    adapt_all(adapter, [random_stream(200, users=6)])
    before = state_of(adapter)
    later = [random_stream(100, seed=k, users=40, first_offset=1000 * k) for k in (1, 2)]
    first = [adapter.adapt(batch) for batch in later]
    assert len(before[0]) < len(adapter.users)
    adapter.abort()
    assert before == state_of(adapter)
    assert (len(before[0]), len(before[1])) == (len(adapter.users), len(adapter.items))
    for said, batch in zip(first, later, strict=True):
        assert_said_equal(said, adapter.adapt(batch))


#: θ under which an update cannot be stored, by rule: what is changed, and which levels it concerns.
UNSTORABLE: dict[str, list[tuple[dict[str, float], set[int]]]] = {
    "kalman": [
        ({"level_scores": np.inf}, {4}),
        ({"level_scores": np.nan}, {4}),
        ({"level_scores": -3e38}, {4}),
        ({"bias": 1e31}, {0, 1, 2, 3, 4}),
        ({"prior_mean": 1e18, "noise": 1e-12, "prior_variance": 1e-9}, {0, 1, 2, 3, 4}),
    ],
    "gradient": [
        ({"level_scores": np.nan}, {4}),
        ({"prior_variance": 3e38, "prior_mean": 0.0}, {0, 1, 2, 3, 4}),
        ({"prior_variance": np.inf}, {0, 1, 2, 3, 4}),
    ],
}


@both_devices
def test_an_update_that_cannot_be_stored_is_undone_and_flagged(rule: RuleName, variant: str, device: str) -> None:
    for change, levels in UNSTORABLE[rule]:
        if variant.startswith("normalized") and change.get("prior_variance") == 3e38:
            continue  # such a step has a length that can be stored
        assert_undone(Adapter(with_weights(model_of(rule, variant), **change), device), levels)


def assert_undone(adapter: Adapter, levels: set[int]) -> None:
    events = random_stream(200)
    said = adapter.adapt(events)
    undone = np.isin(events.levels, list(levels))
    np.testing.assert_array_equal(undone, (said.flags & Flag.NAN_UNDONE) > 0)
    np.testing.assert_array_equal(said.score[undone], said.updated_score[undone])
    assert np.all(np.isfinite(said.score))
    for table in (adapter.users, adapter.items):
        rows = table.rows[table.partition_of >= 0]
        assert all(np.all(np.isfinite(rows[f.name])) for f in table.layout.fields)
    learned = (events.levels >= 0) & ~undone
    assert learned.sum() == adapter.users.rows["count"][adapter.users.partition_of >= 0].sum()


@both_devices
def test_an_empty_batch_is_no_work(rule: RuleName, variant: str, device: str) -> None:
    said: Adapted = Adapter(model_of(rule, variant), device).adapt(part(random_stream(3), slice(0, 0)))
    assert len(said.score) == 0


@both_devices
def test_which_items_a_user_has_met_counts_whatever_was_said_of_them(rule: RuleName, variant: str, device: str) -> None:
    model, events = model_of(rule, variant), random_stream(200)
    silent = msgspec.structs.replace(model.weights, implicit_map=np.zeros_like(model.weights.implicit_map))
    moved, still = Adapter(model, device).adapt(events), Adapter(with_arrays(model, silent), device).adapt(events)
    first = [k for k in range(200) if events.user_ids[k] not in events.user_ids[:k]]
    np.testing.assert_array_equal(moved.frozen_score, still.frozen_score)
    np.testing.assert_allclose(moved.score[first[:1]], still.score[first[:1]], rtol=0, atol=1e-12)
    assert np.mean(np.abs(moved.score - still.score) > 1e-3) > 0.5


@both_devices
def test_a_model_without_implicit_state_has_none_in_its_rows(rule: RuleName, variant: str, device: str) -> None:
    """It says what one says whose implicit state moves nothing."""
    none, some, events = model_of(rule, variant, implicit=0), model_of(rule, variant), random_stream(200)
    silent = msgspec.structs.replace(some.weights, implicit_map=np.zeros_like(some.weights.implicit_map))
    adapter = Adapter(none, device)
    assert_said_equal(Adapter(with_arrays(some, silent), device).adapt(events), adapter.adapt(events))
    assert adapter.users.rows["implicit"].shape[1] == 0


def with_arrays(model: Model, weights: SlowWeights) -> Model:
    return msgspec.structs.replace(model, weights=weights)
