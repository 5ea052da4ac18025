"""What `bench drift` counts, on streams small enough to know the answer."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from rich.console import Console

from stream_adapt import bench_drift, bench_streams
from stream_adapt.bench_drift import DriftBench, judge, run_drift, show
from stream_adapt.bench_recovery import SCENARIOS, RefreshRun, new_world_level
from stream_adapt.bench_streams import Member, Run, Streams, kept_in
from stream_adapt.config import DriftSettings
from stream_adapt.datasets.drifts import KINDS
from stream_adapt.datasets.synthetic import Synthetic, source
from stream_adapt.errors import ConfigError
from stream_adapt.learning import Summary
from stream_adapt.models import LearnerSpec, read_model
from stream_adapt.record import UserEvent
from stream_adapt.testing.model import random_model

SETTINGS = DriftSettings(group_events=256, reference_events=16 * 256)


def stream(risen: range) -> list[Summary]:
    """600 windows; the score is wrong more often than it expects in some of them."""
    return [
        Summary(0, n, n * 256, n * 256 + 255, "", "v", 256, 256, (0.7 if n in risen else 0.5) * 256 + n % 3, 140.0,
                0.5 * 256, 150.0, 150.0, 0, n, n)
        for n in range(600)
    ]  # fmt: skip


def test_alarms_after_a_drift_are_detections_and_those_without_are_false() -> None:
    at = 300 * 256
    runs = [
        Run("a", None, None, stream(range(0))),
        Run("b", None, None, stream(range(100, 130))),
        Run("a", "flip", at, stream(range(300, 600))),
        Run("b", "flip", at, stream(range(0))),
        Run("a", "gradual", at, stream(range(400, 600))),
        Run("a", "base_rate", at, stream(range(310, 330))),
    ]
    found = judge(SETTINGS, runs)
    assert 1 == found.false_alarms == found.stationary["b"].false_alarms
    assert 1e6 / (2 * 600 * 256) == pytest.approx(found.false_alarms_per_million)
    assert 1 == found.harmless_alarms
    assert 2 / 3 == pytest.approx(found.detection_rate)
    (delay,) = found.cases["a flip"].delays
    assert delay is not None
    assert 256 <= delay <= 10 * 256
    assert [None] == found.cases["b flip"].delays
    assert delay == found.median_delay_events


def test_every_detector_is_judged_on_the_same_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_streams._SYNTHETIC, "synthetic", 20_000)
    parameters = Synthetic(events=20_000, drift="none")
    folder = kept_in(tmp_path) / "synthetic" / "seed-0"
    spec = LearnerSpec(parameters.features, source(parameters).feedback)
    random_model(folder, spec, [event.item_id for event in islice(source(parameters).events(), 1000)])
    options = DriftBench(sets="synthetic", seeds=1, detectors="PageHinkley,ADWIN", folder=tmp_path, recovery=False)
    settings = SETTINGS.model_copy(update={"reference_events": 8 * 256})
    first = run_drift(options, Console(quiet=True), settings)
    assert ["PageHinkley", "ADWIN"] == list(first.detectors)
    assert {f"synthetic {kind}" for kind in KINDS} == set(first.cases)
    assert 10_000 == first.stationary["synthetic"].events
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    assert first == run_drift(options, Console(quiet=True), settings)
    assert first.refresh is None
    assert kept == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.jsonl")}
    runs = {
        name: RefreshRun(name="synthetic", scenario=name, seed=0, events=10_000, auc=0.8, auc_without=0.8, left=6_000,
                         auc_last_quarter=0.8, auc_last_quarter_without=0.77, recovered=3_000)
        for name in SCENARIOS
    }  # fmt: skip
    monkeypatch.setattr(bench_drift, "refresh_run", lambda _, scenario, *__: runs[scenario])
    whole = run_drift(replace(options, recovery=True), Console(quiet=True), settings)
    assert (0.5, pytest.approx(0.03)) == (whole.recovery_ratio, whole.auc_gain_last_quarter)
    assert 0.5 == whole.cases["synthetic permute"].recovery_ratio
    assert whole.refresh is not None
    assert set(whole.refresh.cases) == {*whole.cases, "synthetic stationary"}
    some = run_drift(replace(options, recovery=True, scenarios="flip"), Console(quiet=True), settings)
    assert some.refresh is not None
    assert ["synthetic flip"] == list(some.refresh.cases)
    assert (None, 0.5) == (some.recovery_ratio, some.cases["synthetic flip"].recovery_ratio)
    shown = Console(record=True, width=200, quiet=False, file=io.StringIO())
    show(whole, shown)
    assert "≤ 0.50" in shown.export_text()


def test_a_model_of_the_new_world_is_pretrained_on_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_streams._SYNTHETIC, "synthetic", 16_000)
    streams, seen = Streams("synthetic", 0, tmp_path), list[list[str]]()
    pretrain = Streams.pretrain

    def watched(self: Streams, events: Iterable[UserEvent], registry: Path) -> None:
        given = list(events)
        seen.append([event.event_id for event in given])
        pretrain(self, given, registry)

    monkeypatch.setattr(Streams, "pretrain", watched)
    assert 0.4 < new_world_level(streams, "flip") < 0.69
    after = [event.event_id for event in islice(streams.events("flip"), streams.place, None)]
    assert [after[: len(after) // 2]] == seen


def test_what_is_tried_out_is_undone(tmp_path: Path) -> None:
    parameters = Synthetic(events=3_000, drift="none")
    events = list(source(parameters).events())
    spec = LearnerSpec(parameters.features, source(parameters).feedback)
    model = read_model(random_model(tmp_path, spec, [event.item_id for event in events[:1000]]))
    member = Member(model)
    member.learn(events[:1000])
    tried = member.try_out(events[1000:2500])
    assert tried == member.try_out(events[1000:2500]) == member.learn(events[1000:2500])


def test_a_set_or_a_detector_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="movielens-1m"):
        run_drift(DriftBench(sets="nothing", folder=tmp_path), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"'flipped' is none of permute, stationary"):
        run_drift(DriftBench(scenarios="flip,flipped", folder=tmp_path), Console(quiet=True))
    with pytest.raises(ConfigError, match="ADWIN"):
        run_drift(DriftBench(detectors="Nothing", folder=tmp_path), Console(quiet=True))
