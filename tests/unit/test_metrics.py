"""Metrics: what is counted and when, that it adds up, what it costs, and that PromQL finds the figures again."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from confluent_kafka import KafkaError
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from stream_adapt.commit import Outcome
from stream_adapt.decode import REASONS
from stream_adapt.follow import Standing
from stream_adapt.kafka.connections import Connections
from stream_adapt.metrics import (
    COLD_START,
    END_TO_END_EDGES_S,
    EXPRESSIONS,
    FAMILIES,
    SCORE_BUCKETS,
    SCORE_EDGES,
    STAGES,
    WHICH,
    Family,
    Metrics,
    _ScoreCounts,
    auc_from_buckets,
    calibration_error_from_buckets,
    reference,
)
from stream_adapt.record import NO_LEVEL, Adapted, Batch, DeadLetter, Flag, ItemId, Outputs, UserId, Work
from stream_adapt.runner import Observer
from stream_adapt.state.row import ControlRow, Field, Kind, Layout
from stream_adapt.state.table import Table

NOW_S = 1_700_000_000.0

Scores = npt.NDArray[np.float64]
Targets = npt.NDArray[np.bool_]


class FakeConsumer:
    def __init__(self, lags: dict[int, int] | None = None) -> None:
        self.lags = lags or {}
        self.asked = 0

    def lag(self) -> dict[int, int]:
        self.asked += 1
        return self.lags


class Clock:
    def __init__(self, now: float = NOW_S) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def tables() -> dict[Kind, Table]:
    return {
        kind: Table(Layout(kind, (Field("w", "<f4", (2,), "weights"),)), lambda _table, _slot, _id: None)
        for kind in (Kind.USER, Kind.ITEM)
    }


class Member:
    """One process: its registry, its metrics and its clock."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.clock = Clock()
        self.tables = tables()
        self.connections = Connections(self.clock)
        self.metrics = Metrics(
            self.registry,
            model_version="v1",
            target_level=1,
            tables=self.tables,
            connections=self.connections,
            clock=self.clock,
        )

    def value(self, sample: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"stream_adapt_{sample}", labels)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


@pytest.fixture
def member() -> Member:
    return Member()


def work_of(
    score: npt.ArrayLike,
    target: npt.ArrayLike | None = None,
    *,
    frozen: npt.ArrayLike | None = None,
    age_s: npt.ArrayLike = 0.0,
    flags: npt.ArrayLike = 0,
    reasons: tuple[str, ...] = (),
) -> Work:
    scores = np.atleast_1d(np.asarray(score, dtype=np.float64))
    n = len(scores)
    levels = np.full(n, NO_LEVEL, np.int8) if target is None else np.asarray(target).astype(np.int8).reshape(n)
    ages_ms = np.broadcast_to(np.asarray(age_s) * 1000, n)
    batch = Batch(
        event_ids=[f"event-{i}" for i in range(n)],
        user_ids=[UserId(f"secret-user-{i}") for i in range(n)],
        item_ids=[ItemId(f"item-{i}") for i in range(n)],
        features=[None] * n,
        timestamps_ms=(NOW_S * 1000 - ages_ms).astype(np.int64),
        levels=levels,
        partitions=np.zeros(n, np.int32),
        offsets=np.arange(n, dtype=np.int64),
    )
    adapted = Adapted(
        score=scores,
        frozen_score=scores if frozen is None else np.asarray(frozen, dtype=np.float64),
        updated_score=scores,
        uncertainty=np.ones(n),
        adaptations=np.ones(n, np.int64),
        flags=np.broadcast_to(np.asarray(flags, dtype=np.uint8), n),
    )
    letters = [DeadLetter(b"k", b"v", 0, n + i, reason, "") for i, reason in enumerate(reasons)]
    return Work(outputs=[], batch=batch, adapted=adapted, dead_letters=letters, seconds=0.001)


def shards(*partitions: int, next_offset: int = 7) -> dict[int, ControlRow]:
    return {p: ControlRow(p, next_offset, "v1", "topic-id") for p in partitions}


def exact_auc(score: Scores, target: Targets) -> float:
    """Mann–Whitney, ties one half."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    positives, negatives = int(target.sum()), int((~target).sum())
    return float((ranks[inverse][target].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def exact_log_loss(score: Scores, target: Targets) -> float:
    return float(-np.log(np.where(target, score, 1 - score)).mean())


def sample_events(n: int, seed: int, mean: float = 0.5, spread: float = 1.2) -> tuple[Scores, Scores, Targets]:
    """Adapted scores, worse frozen ones, and targets: logits around `mean`."""
    random = np.random.default_rng(seed)
    logit = random.normal(mean, spread, n)
    noise = random.normal(0, spread, n)
    target = random.random(n) < 1 / (1 + np.exp(-logit))
    return 1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(-(logit + noise))), target


def by_bucket(members: list[Member], which: str) -> dict[str, list[float]]:
    """Negatives, positives and summed scores by bucket, over all members."""

    samples = [
        {(s.name, *sorted(s.labels.values())): s.value for family in member.metrics.collect() for s in family.samples}
        for member in members
    ]

    def column(sample: str, *labels: str) -> list[float]:
        keys = [(f"stream_adapt_{sample}", *sorted((which, bucket, *labels))) for bucket in SCORE_BUCKETS]
        return [sum(found[key] for found in samples) for key in keys]

    return {
        "negatives": column("bucket_scores_total", "0"),
        "positives": column("bucket_scores_total", "1"),
        "probabilities": column("bucket_probability_total"),
    }


# What is counted, and when


def test_it_is_an_observer_of_the_loop(member: Member) -> None:
    observer: Observer = member.metrics

    assert observer is member.metrics


def test_every_dead_letter_reason_stage_and_outcome_is_zero_before_the_first_event(member: Member) -> None:
    zeros = [member.value("dead_letters_total", reason=reason) for reason in REASONS]
    zeros += [member.value("stage_seconds_total", stage=stage) for stage in STAGES]
    zeros += [member.value("transactions_total", outcome=outcome.value) for outcome in Outcome]
    zeros += [member.value("flagged_scores_total", flag=str(flag.name).lower()) for flag in Flag]

    assert zeros == [0.0] * len(zeros)


def test_events_are_scores_plus_dead_letters_and_advance_only_with_a_commit(member: Member) -> None:
    member.metrics.polled(5)
    member.metrics.aborted()
    assert member.value("events_total") == 0.0

    member.metrics.polled(5)
    member.metrics.committed(work_of([0.2, 0.7, 0.9], reasons=("not_json", "null_key")), Outcome.COMMITTED)

    assert member.value("polled_records_total") == 10.0
    assert member.value("events_total") == 5.0
    assert member.value("scores_total") == 3.0
    assert member.value("dead_letters_total", reason="not_json") == 1.0
    assert member.value("dead_letters_total", reason="null_key") == 1.0
    assert member.value("batch_records_bucket", le="4.0") == 0.0
    assert member.value("batch_records_bucket", le="16.0") == 1.0


def test_scores_that_are_withheld_are_counted_apart(member: Member) -> None:
    member.metrics.committed(replace(work_of([0.2, 0.7, 0.9], reasons=("not_json",)), withheld=2), Outcome.COMMITTED)
    names = ("events_total", "scores_total", "withheld_scores_total")
    assert [4.0, 1.0, 2.0] == [member.value(name) for name in names]


def test_a_scrape_at_any_moment_sees_events_equal_scores_plus_dead_letters(member: Member) -> None:
    done = threading.Event()

    def scrape() -> list[tuple[float, float]]:
        seen: list[tuple[float, float]] = []
        while not done.is_set() or not seen:
            found = {s.name + str(s.labels): s.value for f in member.metrics.collect() for s in f.samples}
            dead = sum(value for name, value in found.items() if name.startswith("stream_adapt_dead_letters_total"))
            seen.append((found["stream_adapt_events_total{}"], found["stream_adapt_scores_total{}"] + dead))
        return seen

    seen: list[tuple[float, float]] = []
    reader = threading.Thread(target=lambda: seen.extend(scrape()))
    reader.start()
    try:
        for _ in range(300):
            member.metrics.committed(work_of([0.2, 0.7], reasons=("not_json",)), Outcome.COMMITTED)
    finally:
        done.set()
        reader.join()

    assert all(events == outputs for events, outputs in seen)
    assert member.value("events_total") == 900.0


@pytest.mark.parametrize("outcome", [Outcome.COMMITTED, Outcome.RECOVERED])
def test_transactions_are_counted_by_outcome(member: Member, outcome: Outcome) -> None:
    member.metrics.committed(work_of([0.5]), outcome)
    member.metrics.aborted()

    assert member.value("transactions_total", outcome=outcome.value) == 1.0
    assert member.value("transactions_total", outcome="aborted") == 1.0


def test_end_to_end_is_commit_time_less_event_time_and_never_negative(member: Member) -> None:
    ages = [-5.0, 0.001, 0.02, 0.02, 7200.0]
    member.metrics.committed(work_of([0.5] * 5, age_s=ages), Outcome.COMMITTED)

    assert member.value("end_to_end_seconds_bucket", le="0.001") == 2.0
    assert member.value("end_to_end_seconds_bucket", le="0.025") == 4.0
    assert member.value("end_to_end_seconds_bucket", le=f"{END_TO_END_EDGES_S[-1]}") == 4.0
    assert member.value("end_to_end_seconds_count") == 5.0
    assert member.value("end_to_end_seconds_sum") == pytest.approx(7200.041)


def test_stage_seconds_and_runs_show_with_the_next_tick(member: Member) -> None:
    member.metrics.stage("decode", 0.25)
    member.metrics.stage("decode", 0.5)
    member.metrics.tick(FakeConsumer(), {})

    assert member.value("stage_seconds_total", stage="decode") == 0.75
    assert member.value("stage_runs_total", stage="decode") == 2.0


def test_lag_and_position_end_with_the_partition(member: Member) -> None:
    member.metrics.rebalanced("assigned", [0, 1])
    member.metrics.tick(FakeConsumer({0: 5, 1: 0}), shards(0, 1))
    assert member.value("lag_records", partition="0") == 5.0
    assert member.value("next_offset", partition="1") == 7.0
    assert member.value("assigned_partitions") == 2.0

    member.metrics.rebalanced("revoked", [0])
    assert member.value("lag_records", partition="0") is None
    assert member.value("next_offset", partition="0") is None
    member.metrics.tick(FakeConsumer({1: 3}), shards(1))

    assert member.value("lag_records", partition="1") == 3.0
    assert member.value("assigned_partitions") == 1.0
    assert member.value("rebalances_total", kind="assigned") == 1.0
    assert member.value("rebalances_total", kind="revoked") == 1.0


def test_lag_in_seconds_is_the_age_of_the_last_committed_event_while_records_wait(member: Member) -> None:
    consumer = FakeConsumer({0: 5, 1: 0, 2: 9})
    member.metrics.tick(consumer, shards(0, 1, 2))
    assert member.value("lag_seconds", partition="0") is None

    member.metrics.committed(work_of([0.5] * 3, age_s=[90.0, 40.0, 30.0]), Outcome.COMMITTED)
    member.clock.now += 10
    member.metrics.tick(consumer, shards(0, 1, 2))

    assert member.value("lag_seconds", partition="0") == pytest.approx(40.0)
    assert member.value("lag_seconds", partition="1") == 0.0
    assert member.value("lag_seconds", partition="2") is None
    assert member.value("lag_records", partition="2") == 9.0


def test_a_record_after_a_quiet_hour_is_not_an_hour_late(member: Member) -> None:
    consumer = FakeConsumer({0: 0})
    member.metrics.committed(work_of([0.5], age_s=3600.0), Outcome.COMMITTED)
    member.metrics.tick(consumer, shards(0))
    consumer.lags = {0: 1}
    member.clock.now += 2
    member.metrics.tick(consumer, shards(0))
    assert member.value("lag_seconds", partition="0") == pytest.approx(2.0)

    member.metrics.rebalanced("revoked", [0])
    member.metrics.tick(consumer, shards(0))

    assert member.value("lag_seconds", partition="0") is None


def test_the_last_turn_is_the_start_until_there_is_one(member: Member) -> None:
    assert member.value("last_turn_timestamp_seconds") == NOW_S

    member.clock.now += 0.1
    member.metrics.tick(FakeConsumer(), {})

    assert member.value("last_turn_timestamp_seconds") == NOW_S + 0.1


def test_what_clients_say_of_their_connections_shows_while_the_loop_waits(member: Member) -> None:
    assert member.value("client_errors_total", kind="connection") == 0.0

    member.connections.failed(KafkaError(KafkaError._ALL_BROKERS_DOWN))
    member.clock.now += 7

    assert member.value("client_errors_total", kind="connection") == 1.0
    assert member.value("unreachable_seconds") == 7.0


def test_changelog_records_and_their_bytes_are_those_committed(member: Member) -> None:
    rows = [Outputs("c", [b"a", b"b"], [b"12345", None], None, [0, 0], [-1, -1])]
    member.metrics.committed(replace(work_of([0.5]), rows=rows), Outcome.COMMITTED)

    assert member.value("changelog_records_total") == 2.0
    assert member.value("changelog_bytes_total") == 5.0


def test_gpu_memory_is_what_torch_has_reserved_and_absent_without_a_gpu(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torch(initialized: bool) -> SimpleNamespace:
        names = {"is_initialized": lambda: initialized, "device_count": lambda: 1, "memory_reserved": lambda _: 2048}
        return SimpleNamespace(cuda=SimpleNamespace(**names))

    for initialized, shown in ((False, None), (True, 2048.0)):
        monkeypatch.setitem(sys.modules, "torch", torch(initialized))
        member.clock.now += 2
        member.metrics.tick(FakeConsumer(), {})
        assert member.value("gpu_memory_bytes", device="0") == shown


def test_lag_is_asked_for_once_a_second_and_after_a_rebalance(member: Member) -> None:
    consumer = FakeConsumer({0: 1})
    for advance in (0.0, 0.4, 0.4, 0.4):
        member.clock.now += advance
        member.metrics.tick(consumer, shards(0))
    assert consumer.asked == 2

    member.metrics.rebalanced("assigned", [1])
    member.metrics.tick(consumer, shards(0, 1))

    assert consumer.asked == 3


def test_rows_and_their_bytes_are_those_of_the_tables(member: Member) -> None:
    member.tables[Kind.USER].slots([0, 0], ["a", "b"])
    member.metrics.tick(FakeConsumer(), {})

    assert member.value("rows", kind="user") == 2.0
    assert member.value("rows", kind="item") == 0.0
    assert member.value("slab_bytes", kind="user") == member.tables[Kind.USER].slab_bytes > 0
    assert member.value("index_bytes", kind="user") == member.tables[Kind.USER].index_bytes > 0
    assert member.value("expired_rows_total", kind="user") == 0.0


def test_expired_rows_are_counted(member: Member) -> None:
    member.tables[Kind.USER].expired = 3
    member.metrics.tick(FakeConsumer(), {})

    assert member.value("expired_rows_total", kind="user") == 3.0


def test_the_last_commit_is_the_start_until_there_is_one(member: Member) -> None:
    assert member.value("last_commit_timestamp_seconds") == NOW_S

    member.clock.now += 60
    member.metrics.committed(work_of([0.5]), Outcome.COMMITTED)

    assert member.value("last_commit_timestamp_seconds") == NOW_S + 60


def test_a_new_model_takes_the_place_of_the_old_one(member: Member) -> None:
    member.metrics.following(Standing("v2", swaps=1), {})

    assert member.value("model_info", version="v1") is None
    assert member.value("model_info", version="v2") == 1.0
    assert (member.value("model_swaps_total"), member.value("model_outdated")) == (1.0, 0.0)


def test_a_model_that_is_not_served_is_counted_by_its_reason_and_by_who_waits_for_it(member: Member) -> None:
    refusals = {"missing": 0, "damaged": 2, "unfit": 1}
    member.metrics.following(Standing("v1", "v2", "damaged", "its SHA-256 is another", 0, refusals), {3: "v2"})

    assert refusals == {reason: member.value("models_refused_total", reason=reason) for reason in refusals}
    assert (member.value("model_outdated"), member.value("model_waiting_partitions")) == (1.0, 1.0)


# Learning


def test_flags_are_counted_one_by_one(member: Member) -> None:
    flags = [Flag.LATE | Flag.NAN_UNDONE, Flag.LATE, 0]
    member.metrics.committed(work_of([0.5] * 3, flags=flags), Outcome.COMMITTED)

    counted = {flag.name: member.value("flagged_scores_total", flag=str(flag.name).lower()) for flag in Flag}

    assert counted == {"SCORE_ONLY": 0.0, "NAN_UNDONE": 1.0, "LATE": 2.0, "DUPLICATE": 0.0}


def test_log_loss_is_that_of_events_with_a_target(member: Member) -> None:
    member.metrics.committed(work_of([0.9, 0.2, 0.6], [1, 0, NO_LEVEL], frozen=[0.5, 0.5, 0.5]), Outcome.COMMITTED)

    assert member.value("log_loss_count", which="adapted") == 2.0
    assert member.value("log_loss_sum", which="adapted") == pytest.approx(-np.log(0.9) - np.log(0.8))
    assert member.value("log_loss_sum", which="frozen") == pytest.approx(2 * np.log(2))


def test_cold_start_is_log_loss_by_which_of_its_users_events_each_was(member: Member) -> None:
    work = work_of([0.9, 0.8, 0.7, 0.6], [1, 1, 1, 1], frozen=[0.5] * 4)
    nth = np.array([1, 3, 4, 1_000_000], dtype=np.int64)
    member.metrics.committed(replace(work, adapted=replace(work.adapted, adaptations=nth)), Outcome.COMMITTED)

    def summed(which: str, nth: str) -> list[float | None]:
        return [member.value(f"cold_start_log_loss_{part}", which=which, nth=nth) for part in ("count", "sum")]

    assert summed("adapted", "1") == pytest.approx([1.0, -np.log(0.9)])
    assert summed("adapted", "2") == [0.0, 0.0]
    assert summed("adapted", "3-4") == pytest.approx([2.0, -np.log(0.8) - np.log(0.7)])
    assert summed("frozen", "65+") == pytest.approx([1.0, np.log(2)])


def test_every_number_of_events_has_its_bucket() -> None:
    for n in range(1, 200):
        label = COLD_START[max(first for first in COLD_START if first <= n)]
        low, _, high = label.rstrip("+").partition("-")
        assert int(low) <= n
        assert n <= int(high or low) or label.endswith("+")
        assert _ScoreCounts._NTH.take(n, mode="clip") == list(COLD_START.values()).index(label)


def test_how_far_events_move_their_own_scores_is_summed(member: Member) -> None:
    work = work_of([0.5, 0.5, 0.5], [1, 0, 1])
    moved = replace(work.adapted, updated_score=np.array([0.75, 0.25, np.nan]))
    member.metrics.committed(replace(work, adapted=moved), Outcome.COMMITTED)

    assert member.value("score_change_count") == 3.0
    assert member.value("score_change_sum") == 0.5


def test_scores_of_zero_one_and_nan_leave_the_sums_finite(member: Member) -> None:
    member.metrics.committed(work_of([0.0, 1.0, np.nan, 0.5], [1, 0, 1, 1]), Outcome.COMMITTED)

    assert member.value("scores_total") == 4.0
    assert member.value("log_loss_count", which="adapted") == 3.0
    assert member.value("log_loss_sum", which="adapted") == pytest.approx(-2 * np.log(1e-7) + np.log(2))


def test_a_score_at_an_edge_belongs_to_the_bucket_below(member: Member) -> None:
    just_above = np.array(SCORE_EDGES) + 1e-7
    member.metrics.committed(work_of(SCORE_EDGES, np.ones(len(SCORE_EDGES))), Outcome.COMMITTED)
    member.metrics.committed(work_of(just_above, np.zeros(len(SCORE_EDGES))), Outcome.COMMITTED)

    buckets = by_bucket([member], "adapted")

    assert buckets["positives"] == [1.0] * len(SCORE_EDGES) + [0.0]
    assert buckets["negatives"] == [0.0] + [1.0] * len(SCORE_EDGES)


def test_the_histogram_is_the_buckets_summed_up(member: Member) -> None:
    score, frozen, target = sample_events(5000, seed=1)
    member.metrics.committed(work_of(score, target, frozen=frozen), Outcome.COMMITTED)

    for which, scores in zip(WHICH, (score, frozen), strict=True):
        cumulative = [member.value("score_bucket", which=which, target="1", le=le) for le in SCORE_BUCKETS]
        assert cumulative == np.cumsum(by_bucket([member], which)["positives"]).tolist()
        assert member.value("score_sum", which=which, target="1") == pytest.approx(scores[target].sum())
        assert member.value("score_sum", which=which, target="0") == pytest.approx(scores[~target].sum())


@pytest.mark.parametrize(
    ("mean", "spread"),
    [(0.5, 1.2), (0.0, 0.4), (-3.5, 0.5), (-5.0, 1.0), (4.0, 0.6)],
    ids=["ratings", "narrow", "clicks", "rare clicks", "mostly yes"],
)
def test_auc_from_buckets_of_three_members_is_exact_to_a_two_hundredth(mean: float, spread: float) -> None:
    members = [Member() for _ in range(3)]
    events = [sample_events(20_000, seed, mean, spread) for seed in range(3)]
    for each, (score, frozen, target) in zip(members, events, strict=True):
        each.metrics.committed(work_of(score, target, frozen=frozen), Outcome.COMMITTED)
    score, frozen, target = (np.concatenate(columns) for columns in zip(*events, strict=True))

    for which, scores in zip(WHICH, (score, frozen), strict=True):
        buckets = by_bucket(members, which)
        assert exact_auc(scores, target) == pytest.approx(
            auc_from_buckets(buckets["negatives"], buckets["positives"]), abs=0.005
        )


def test_calibration_error_is_the_distance_between_promised_and_seen() -> None:
    assert calibration_error_from_buckets([5, 2], [5, 8], [4.0, 8.5]) == pytest.approx((1.0 + 0.5) / 20)


def test_figures_of_nothing_are_nan() -> None:
    assert np.isnan(auc_from_buckets([0, 0], [1, 0]))
    assert np.isnan(calibration_error_from_buckets([0], [0], [0]))


# Size and cost


def test_cardinality_is_what_the_table_says_and_three_for_each_partition(member: Member) -> None:
    fixed = sum(len(f.combinations()) * _samples_of_a_series(f) for f in FAMILIES if not f.is_open)
    for batch in range(20):
        score, frozen, target = sample_events(500, seed=batch)
        member.metrics.committed(work_of(score, target, frozen=frozen, reasons=("not_json",)), Outcome.COMMITTED)
    member.metrics.tick(FakeConsumer({0: 1, 1: 2}), shards(0, 1))

    samples = [s for family in member.metrics.collect() for s in family.samples]

    # Model and build; lag and position of two partitions, and the first one's lag in seconds.
    assert len(samples) == fixed + 2 + 2 * 2 + 1
    assert fixed < 1000


def _samples_of_a_series(family: Family) -> int:
    return {"histogram": len(family.edges) + 3, "summary": 2}.get(family.type, 1)


def test_no_user_item_or_event_is_named(member: Member) -> None:
    member.metrics.committed(work_of([0.5] * 3, [1, 0, 1]), Outcome.COMMITTED)

    assert re.findall(r"secret-user|item-\d|event-\d", member.text()) == []
    assert not {"user", "user_id", "item", "item_id", "event_id"} & {label for f in FAMILIES for label in f.labels}


def test_counting_a_batch_costs_a_fraction_of_observing_each_event_once(member: Member) -> None:
    score, frozen, target = sample_events(16_384, seed=0)
    ages = np.sort(np.random.default_rng(0).random(len(score)))[::-1]
    work = work_of(score, target, frozen=frozen, age_s=ages, flags=np.arange(len(score)) % 50 == 0)
    histogram = Histogram("observed", "For comparison.", registry=None)

    def observe(histogram: Histogram, times: int) -> None:
        for _ in range(times):
            histogram.observe(0.1)

    def least_cpu_s(call: Callable[[], object], times: int) -> float:
        seconds = []
        for _ in range(times):
            started = time.thread_time()
            call()
            seconds.append(time.thread_time() - started)
        return min(seconds)

    ours = least_cpu_s(lambda: member.metrics.committed(work, Outcome.COMMITTED), 20) / len(score)
    one_observation = least_cpu_s(lambda: observe(histogram, 1000), 20) / 1000

    assert ours < one_observation / 4


# Documentation


def test_what_is_exposed_is_what_the_table_declares(member: Member) -> None:
    exposed = {family.name: family for family in text_string_to_metric_families(member.text())}
    declared = {f.name.removesuffix("_total") if f.type == "counter" else f.name: f for f in FAMILIES}

    assert declared.keys() == exposed.keys()
    assert {name: f.help for name, f in declared.items()} == {name: f.documentation for name, f in exposed.items()}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family_is_named_by_the_rules_and_documented(family: Family) -> None:
    assert family.name.startswith("stream_adapt_")
    assert family.name.endswith("_total") == (family.type == "counter")
    assert family.name.endswith("_info") == (family.type == "info")
    assert not re.search(r"_(ms|millis|minutes|kb|mb)(_|$)", family.name)
    assert f"| `{family.name}` | {family.type} |" in reference()
    assert family.help.endswith(".")
    assert "|" not in family.help


def test_every_expression_is_documented_and_names_only_what_exists() -> None:
    exposed = {f.name + suffix for f in FAMILIES for suffix in ("", "_bucket", "_sum", "_count")}

    for expression in EXPRESSIONS:
        assert expression.promql in reference()
        assert set(re.findall(r"stream_adapt_\w+", expression.promql)) <= exposed


promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")


@promtool
def test_promtool_finds_no_fault_in_the_exposition(member: Member) -> None:
    found = subprocess.run(["promtool", "check", "metrics"], input=member.text(), capture_output=True, text=True)

    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@promtool
def test_promql_over_three_members_finds_the_exact_figures(tmp_path: Path) -> None:
    members, events = [Member() for _ in range(3)], [sample_events(8_000, seed) for seed in range(3)]
    before = [_samples(each) for each in members]
    for each, (score, frozen, target) in zip(members, events, strict=True):
        each.metrics.stage("adapt", 0.5)
        each.metrics.committed(work_of(score, target, frozen=frozen, reasons=("not_json",)), Outcome.COMMITTED)
        each.clock.now += 1
        each.metrics.tick(FakeConsumer({0: 1}), shards(0))
    series = [
        f"  - series: '{_with_instance(name, k)}'\n    values: '{before[k].get(name, value)} {value}'"
        for k, each in enumerate(members)
        for name, value in _samples(each).items()
    ]
    score, frozen, target = (np.concatenate(columns) for columns in zip(*events, strict=True))
    expected = _exact_figures(score, frozen, target, members)
    file = tmp_path / "promql.yaml"
    file.write_text(
        "tests:\n- interval: 10m\n  input_series:\n"
        + "\n".join(series)
        + "\n  promql_expr_test:\n"
        + "".join(_expression_test(e.promql, expected.get(e.name)) for e in EXPRESSIONS)
    )

    found = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60)

    assert expected.keys() < {expression.name for expression in EXPRESSIONS}
    assert (found.returncode, found.stdout + found.stderr) == (0, f"Unit Testing:  {file}\n  SUCCESS\n\n")


def _exact_figures(
    score: Scores, frozen: Scores, target: Targets, members: list[Member]
) -> dict[str, tuple[float, dict[str, float]]]:
    """By expression: how close it must come, and its exact value by `which` ("" for none)."""
    auc = {w: exact_auc(s, target) for w, s in zip(WHICH, (score, frozen), strict=True)}
    loss = {w: exact_log_loss(s, target) for w, s in zip(WHICH, (score, frozen), strict=True)}
    return {
        "AUC": (0.005, auc),
        "AUC lift": (0.005, {"": auc["adapted"] - auc["frozen"]}),
        "log-loss": (1e-9, loss),
        "log-loss lift": (1e-9, {"": loss["frozen"] - loss["adapted"]}),
        "calibration": (1e-9, {w: s.mean() / target.mean() for w, s in zip(WHICH, (score, frozen), strict=True)}),
        "calibration error": (1e-9, {w: calibration_error_from_buckets(**by_bucket(members, w)) for w in WHICH}),
        "dead-letter share": (1e-9, {"": 3 / 24_003}),
    }


def _expression_test(promql: str, expected: tuple[float, dict[str, float]] | None) -> str:
    """An expression must come close to the exact figures or, where there are none, answer at all."""
    labels = [""]
    if expected is None:
        promql = f"count({promql}) > bool 0"
    else:
        tolerance, figures = expected
        exact = " or ".join(f'label_replace(vector({float(x)!r}), "which", "{w}", "", "")' for w, x in figures.items())
        promql = f"abs(({promql}) - on (which) ({exact})) < bool {tolerance}"
        labels = [f'which="{which}"' if which else "" for which in figures]
    text = "\n".join(f"      {line}" for line in promql.splitlines())
    samples = "".join(f"    - labels: '{{{label}}}'\n      value: 1\n" for label in labels)
    return f"  - expr: |\n{text}\n    eval_time: 10m\n    exp_samples:\n{samples}"


def _samples(member: Member) -> dict[str, float]:
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in member.text().splitlines()
        if not line.startswith("#")
    }


def _with_instance(name: str, instance: int) -> str:
    return f'{name[:-1]},instance="{instance}"}}' if name.endswith("}") else f'{name}{{instance="{instance}"}}'
