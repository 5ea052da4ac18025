"""A challenger: what it keeps of the champion, what it learns, and when there is none."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from learner_streams import KNOWN_ITEMS, random_model

from stream_adapt.meta import refine
from stream_adapt.meta.sequences import Log, item_hashes
from stream_adapt.models import check_successor, write_model
from stream_adapt.models import read_model as read

QUICK = msgspec.structs.replace(refine.SETTINGS, epochs=2)
NEW = ("new-1", "new-2")


def log_of(n: int = 1_500, seed: int = 0, bias: float = 3.0) -> Log:
    """Feedback that hangs on the item alone: even items and new ones are liked, odd ones are not."""
    random = np.random.default_rng(seed)
    names = [*(f"i{k}" for k in range(KNOWN_ITEMS)), *NEW]
    item = random.integers(0, len(names), n)
    liked = np.where((item % 2 == 0) | (item >= KNOWN_ITEMS), bias, -bias)
    levels = np.clip(np.round(2.5 + 0.5 * liked + random.normal(0, 0.5, n)), 0, 4).astype(np.int64)
    users = np.unique(random.integers(0, 30, n), return_inverse=True)[1].astype(np.int64)
    return Log(users, item_hashes([names[k] for k in item]), np.arange(n) * 60_000, levels, [None] * n)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("rule", ["kalman", "gradient"])
def test_a_challenger_follows_its_champion_and_learns_what_is_new(rule: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    champion = random_model(rule=rule)  # type: ignore[arg-type]
    trained = refine.refine(log_of(), champion, QUICK, "cpu")
    folder = write_model(tmp_path, trained.weights, champion.spec, trained.fitted, parent="v")
    challenger = read(folder)
    check_successor(champion, challenger)
    old, new = champion.weights, challenger.weights
    kept = (
        "prior_variance",
        "level_scores",
        "noise",
        "level_noise",
        "leak",
        "readout",
        "item_variance",
        "outcome_weight",
    )
    for name in kept:
        assert np.array_equal(getattr(old, name), getattr(new, name)), name
    assert set(old.item_hash.tolist()) | set(item_hashes(list(NEW)).tolist()) == set(new.item_hash.tolist())
    at = np.searchsorted(new.item_hash, item_hashes(list(NEW)))
    assert (new.item_vector[at, -1] > 0).all(), "new items are liked"
    figures = trained.figures
    assert figures["slice_log_loss_all"] < figures["slice_log_loss_champion"]
    assert "carry" == trained.rows


def both_worlds() -> tuple[Log, Log]:
    """Events before and after the world moved, and the latter alone."""
    before, after = log_of(seed=1, bias=-3.0), log_of(seed=2)
    both = Log(
        np.concatenate([before.users, after.users]),
        np.concatenate([before.items, after.items]),
        np.concatenate([before.times_ms, before.times_ms[-1] + after.times_ms]),
        np.concatenate([before.levels, after.levels]),
        before.features + after.features,
    )
    return both, after


def test_where_the_world_moved_the_events_since_win_and_items_are_only_as_well_known_as_by_them() -> None:
    both, after = both_worlds()
    newer = np.arange(len(both)) >= len(both) - len(after)
    trained = refine.refine(both, random_model(), QUICK, "cpu", newer=newer)
    figures = trained.figures
    assert figures["slice_log_loss_newer"] < figures["slice_log_loss_all"]
    assert figures["slice_log_loss_anew"] < figures["slice_log_loss_all"]
    assert ("anew", len(after)) == (trained.about["trained_on"], trained.about["events"])
    assert "restart_items" == trained.rows
    assert (refine.counted(after, trained.weights.item_hash) == trained.weights.item_events).all()
    assert len(after) == trained.weights.item_events.sum()


def test_candidates_are_judged_by_events_since_the_world_moved() -> None:
    log = log_of(n=20_000)
    moved = np.arange(20_000) >= 18_000
    few = refine.newest(log, moved, refine.SETTINGS)
    assert 500 == few.sum() == few[18_000:].sum(), "a quarter of them"
    many = refine.newest(log, np.arange(20_000) >= 1_000, refine.SETTINGS)
    assert 1_900 == many.sum() == many[-1_900:].sum(), "a tenth"
    assert 2_000 == refine.newest(log, None, refine.SETTINGS).sum()


def test_from_noise_nothing_is_learned_and_there_is_no_challenger() -> None:
    champion = random_model()
    first = refine.refine(log_of(), champion, msgspec.structs.replace(QUICK, epochs=6), "cpu")
    champion = msgspec.structs.replace(champion, weights=first.weights)
    noise = log_of()
    random = np.random.default_rng(5)
    held = len(noise) - len(noise) // 10
    noise.levels[:held] = random.permutation(4 - noise.levels[:held])  # and what was held out is as it was
    with pytest.raises(refine.NoBetter, match="nothing was learned that helps") as found:
        refine.refine(noise, champion, QUICK, "cpu")
    assert found.value.figures["slice_log_loss_all"] >= found.value.figures["slice_log_loss_champion"]


def test_the_items_of_the_champion_stay_when_there_is_no_room_for_new_ones() -> None:
    champion = random_model()
    few = refine.vocabulary(log_of(), champion, max_items=KNOWN_ITEMS + 1)
    assert KNOWN_ITEMS + 1 == len(few.item_hash)
    assert set(champion.weights.item_hash.tolist()) < set(few.item_hash.tolist())
    assert (few.item_events[few.index(champion.weights.item_hash)] >= champion.weights.item_events).all()
