"""What `bench drift` says of refreshes: a leader beside a member on a small stream, and the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from learner_streams import KNOWN_ITEMS, START_MS, random_model

from stream_adapt.bench_recovery import RefreshRun, flipped, reached, recovery_ratio, summed
from stream_adapt.bench_streams import Member
from stream_adapt.bench_world import World
from stream_adapt.config import Config
from stream_adapt.evaluate.metrics import auc
from stream_adapt.meta.sequences import item_hashes
from stream_adapt.models import Model, Registry, read_model, write_model
from stream_adapt.record import ItemId, UserEvent, UserId
from stream_adapt.refresh.record import Request
from stream_adapt.refresh.window import Window

RATE = 500.0
SETTINGS = {"device": "cpu", "cooldown_s": 1.0, "per_day": 50, "settle_events": 1_000, "shadow_events": 1_000,
            "watch_events": 1_000, "training_s": 20.0}  # fmt: skip
DRIFT_AT, EVENTS = 4 * 1_024, 16 * 1_024


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def stream(n: int = EVENTS, drift_at: int = DRIFT_AT) -> list[UserEvent]:
    """Even items are liked, and odd ones from the drift on."""
    random = np.random.default_rng(1)
    user, item = random.integers(0, 200, n), random.integers(0, KNOWN_ITEMS, n)
    liked = (item % 2 == 0) == (np.arange(n) < drift_at)
    stars = np.clip(np.round(3 + np.where(liked, 1.2, -1.2) + random.normal(0, 1, n)), 1, 5)
    return [
        UserEvent(f"e{k}", UserId(f"u{u}"), ItemId(f"i{i}"), "rating", START_MS + 1_000 * k, float(s))
        for k, (u, i, s) in enumerate(zip(user.tolist(), item.tolist(), stars.tolist(), strict=True))
    ]


def champion(folder: Path) -> Model:
    """It knows which items are liked before the drift, and is sure of it."""
    start = random_model()
    even = np.isin(start.weights.item_hash, item_hashes([f"i{k}" for k in range(0, KNOWN_ITEMS, 2)]))
    vectors = np.zeros_like(start.weights.item_vector)
    vectors[:, -1] = np.where(even, 1.5, -1.5)
    sure = np.full_like(start.weights.item_events, 5_000)
    weights = msgspec.structs.replace(start.weights, item_vector=vectors, item_events=sure)
    return read_model(write_model(folder / "models", weights, start.spec, ()))


def world_in(folder: Path, change: Callable[[Window], Window] | None = None) -> World:
    model = champion(folder)
    sections = {"model": {"path": folder / "models"}, "state": {"dir": folder / "state"}}
    drift = {"reference_events": 2_048, "group_events": 256}
    return World(model, Config.model_validate({**sections, "refresh": SETTINGS, "drift": drift}), RATE, change)


def test_a_leader_beside_a_member_repairs_the_model_and_its_training_takes_its_time(tmp_path: Path) -> None:
    world = world_in(tmp_path)
    model = world.member.adapter.model
    alone, read = Member(model), list(Member(model).read(stream()))
    with_it, without, alarmed, promoted = [], [], [], []
    for one in read:
        with_it.append(world.take(one).score)
        without.append(alone.take(one)[0].score)
        alarmed += [world.events] * (len(world.journal.alarms) > len(alarmed))
        promoted += [world.events] * (len(world.journal.announced) > len(promoted))
    assert DRIFT_AT < alarmed[0] < promoted[0]
    newest = world.journal.announced[-1]
    assert newest.version == world.member.adapter.model.version
    first = Registry(tmp_path / "models").manifest(world.journal.announced[0].version)
    assert first.decision is not None
    took = RATE * first.decision.figures["training_s"]
    assert promoted[0] - alarmed[0] >= SETTINGS["settle_events"] + took + SETTINGS["shadow_events"]
    target = np.concatenate([one.batch.levels >= model.spec.feedback.target_level for one in read])
    after = slice(promoted[0], None)
    repaired, left_alone = (auc(np.concatenate(said)[after], target[after]) for said in (with_it, without))
    assert repaired > left_alone + 0.02


def test_a_challenger_that_learned_the_opposite_is_refused(tmp_path: Path) -> None:
    world = world_in(tmp_path, flipped(champion(tmp_path)))
    served = world.member.adapter.model
    for number, one in enumerate(Member(served).read(stream(drift_at=EVENTS))):
        if number == 2:
            world.journal.request = Request("planted", 0)
        world.take(one)
        if world.leader.state.last is not None:
            break
    decided = world.leader.state.last
    assert decided is not None
    assert "rejected" == decided.outcome
    assert decided.figures["shadow_gain"] < 0
    assert served.version == world.member.adapter.model.version


def test_log_loss_is_back_with_the_first_window_that_lies_after_the_drift_and_at_the_level() -> None:
    loss = np.concatenate([np.full(10_000, 0.5), np.full(7_000, 0.9), np.full(20_000, 0.5)])
    assert 12_000 == reached(loss, 10_000, 0.5 + 1e-9, 10_000)
    assert reached(loss, 10_000, 0.7, 10_000) == pytest.approx(9_500, abs=1)
    assert reached(loss, 10_000, 0.4, 10_000) is None
    assert reached(loss, 35_000, 0.9, 10_000) is None, "too few events are left for a window"


def run(scenario: str, **fields: object) -> RefreshRun:
    given = {"name": "a", "scenario": scenario, "seed": 0, "events": 100_000, "auc": 0.8, "auc_without": 0.8,
             "auc_last_quarter": 0.8, "auc_last_quarter_without": 0.75, "left": 60_000}  # fmt: skip
    return msgspec.convert({**given, **fields}, RefreshRun)


def test_a_ratio_without_a_recovery_to_compare_with_is_a_bound() -> None:
    assert (0.5, False) == recovery_ratio(run("permute", recovered=10_000, recovered_without=20_000))
    assert (0.25, True) == recovery_ratio(run("permute", recovered=15_000))
    assert (None, False) == recovery_ratio(run("permute", recovered_without=20_000))


def test_figures_are_of_all_seeds() -> None:
    runs = [
        run("permute", recovered=10_000, recovered_without=40_000, auc_last_quarter=0.78),
        run("permute", seed=1, recovered=15_000, same_level=6_000, as_pretrained=9_000, as_pretrained_without=36_000),
        run("flip", recovered=10_000, recovered_without=10_000),
        run("stationary", auc=0.7995),
        run("base_rate", auc=0.801),
        run("planted", planted=4, refused=4, by_hand=1, rolled_back=1),
    ]
    found = summed(runs, 100.0)
    assert 0.25 == found.recovery_ratio
    assert found.recovery_ratio_is_bound
    assert 0.04 == pytest.approx(found.auc_gain_last_quarter)
    assert {"a": [pytest.approx(-0.0005)]} == found.stationary_auc_change
    assert {"a": [pytest.approx(0.001)]} == found.harmless_auc_change
    assert (4, 4, 1, 1) == (
        found.bad_challengers, found.bad_challengers_refused, found.bad_by_hand, found.bad_rolled_back
    )  # fmt: skip
    assert (1, 1.0) == (found.cases["a flip"].healed_alone, found.cases["a flip"].recovery_ratio)
    assert [None, 0.1] == found.cases["a permute"].same_level_ratios
    assert ([None, 0.25], [False, False]) == (
        found.cases["a permute"].as_pretrained_ratios, found.cases["a permute"].as_pretrained_ratio_is_bound
    )  # fmt: skip
    assert "a planted" not in found.cases
