"""Late and duplicate events: told by the user's row, by `step` and `batched` alike, however batches are cut."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
from learner_streams import (
    VARIANTS,
    adapt_all,
    assert_said_equal,
    cut,
    model_of,
    part,
    random_model,
    random_stream,
    state_of,
)

from stream_adapt.adapt import Adapter
from stream_adapt.learner.rules.events import Screen
from stream_adapt.models import RuleName
from stream_adapt.record import Adapted, Batch, Flag

DEDUPLICATE = Screen(barred=int(Flag.DUPLICATE))

both_devices = pytest.mark.parametrize("device", ("cpu", "torch-cpu"))
every_rule = pytest.mark.parametrize(("rule", "variant"), VARIANTS)


def one_user(*ids: str, level: int = 3) -> Batch:
    """Events of one user on one item, a second apart, each with a level."""
    events = part(random_stream(1), [0] * len(ids))
    events.event_ids[:] = ids
    events.levels[:] = level
    events.offsets[:] = np.arange(len(ids))
    events.timestamps_ms[:] = events.timestamps_ms[0] + 1000 * np.arange(len(ids))
    return events


def with_duplicates(n: int, seed: int) -> Batch:
    """A random stream in which a third of the events have the id of an earlier event of the same user."""
    events, rng = random_stream(n, seed=seed, hot=0.5), np.random.default_rng(seed)
    for k in range(n):
        earlier = [j for j in range(k) if events.user_ids[j] == events.user_ids[k]][-6:]
        if earlier and rng.random() < 0.33:
            events.event_ids[k] = events.event_ids[rng.choice(earlier)]
    return events


@both_devices
@every_rule
def test_a_duplicate_is_scored_flagged_and_teaches_nothing(rule: RuleName, variant: str, device: str) -> None:
    once, twice = (Adapter(model_of(rule, variant), device, DEDUPLICATE) for _ in range(2))
    first = once.adapt(one_user("a", "b"))
    said = twice.adapt(one_user("a", "b", "a", "b", "b"))
    assert [0, 0, *[int(Flag.DUPLICATE)] * 3] == said.flags.tolist()
    assert [1, 2, 2, 2, 2] == said.adaptations.tolist()
    assert state_of(once) == state_of(twice)
    np.testing.assert_array_equal(said.score[2:], said.updated_score[2:])
    np.testing.assert_array_equal(first.score, said.score[:2])


@both_devices
def test_duplicates_are_known_as_long_as_the_ring_holds_them(device: str) -> None:
    model = random_model()
    ids = [f"e{k}" for k in range(model.spec.ring + 1)]
    said = Adapter(model, device, DEDUPLICATE).adapt(one_user(*ids, ids[1], ids[0]))
    assert [int(Flag.DUPLICATE), 0] == said.flags[-2:].tolist()


@both_devices
def test_duplicates_are_learned_unless_told_otherwise(device: str) -> None:
    said = Adapter(random_model(), device).adapt(one_user("a", "a"))
    assert ([0, 0], [1, 2]) == (said.flags.tolist(), said.adaptations.tolist())


@both_devices
def test_an_event_that_taught_nothing_has_no_duplicates(device: str) -> None:
    adapter = Adapter(random_model(), device, DEDUPLICATE)
    adapter.adapt(one_user("a", level=-1))
    assert [0] == adapter.adapt(one_user("a")).flags.tolist()


@both_devices
@every_rule
@pytest.mark.parametrize(
    ("late_after_ms", "barred", "flags", "adaptations"),
    [
        (0, 0, [0, Flag.LATE, Flag.LATE], [1, 2, 3]),
        (0, Flag.LATE, [0, Flag.LATE, Flag.LATE], [1, 1, 1]),
        (2000, Flag.LATE, [0, 0, Flag.LATE], [1, 2, 2]),
    ],
)
def test_late_events_teach_or_not_as_told(
    rule: RuleName,
    variant: str,
    device: str,
    late_after_ms: int,
    barred: int,
    flags: list[int],
    adaptations: list[int],
) -> None:
    events = one_user("a", "b", "c")
    events.timestamps_ms[:] = events.timestamps_ms[0] - np.array([0, 2000, 2001])
    said = Adapter(model_of(rule, variant), device, Screen(late_after_ms, int(barred))).adapt(events)
    assert (flags, adaptations) == (said.flags.tolist(), said.adaptations.tolist())


@every_rule
def test_both_forms_of_the_rule_screen_alike_and_cuts_make_no_difference(rule: RuleName, variant: str) -> None:
    events, model = with_duplicates(400, seed=3), model_of(rule, variant)
    screen = Screen(60_000, int(Flag.DUPLICATE | Flag.LATE))
    whole, pieces, batched = (Adapter(model, d, screen) for d in ("cpu", "cpu", "torch-cpu"))
    said = adapt_all(whole, [events])
    assert_said_equal(said, adapt_all(pieces, cut(events, 7)))
    assert state_of(whole) == state_of(pieces)
    other = adapt_all(batched, cut(events, 50))
    np.testing.assert_array_equal(said.flags, other.flags)
    np.testing.assert_array_equal(said.adaptations, other.adaptations)
    np.testing.assert_allclose(other.score, said.score, rtol=0, atol=1e-6)
    assert min(np.count_nonzero(said.flags & f) for f in (Flag.DUPLICATE, Flag.LATE)) > 20


def test_an_abort_forgets_the_ids_it_saw() -> None:
    adapter, events = Adapter(random_model(), screen=DEDUPLICATE), with_duplicates(200, seed=4)
    calm = adapt_all(Adapter(random_model(), screen=DEDUPLICATE), [events])
    parts = []
    for start, stop in pairwise([0, 80, 160, 200]):
        adapter.adapt(part(events, slice(start, stop)))
        adapter.abort()
        parts.append(adapter.adapt(part(events, slice(start, stop))))
        adapter.commit()
    joined = Adapted(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Adapted)})
    assert_said_equal(calm, joined)
