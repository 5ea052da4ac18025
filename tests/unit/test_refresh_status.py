"""What the refresh's controller tells, as a file and as metrics."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from stream_adapt.drift import Statistic
from stream_adapt.metrics import FAMILIES, Metrics
from stream_adapt.refresh import status
from stream_adapt.refresh.record import Decision
from stream_adapt.refresh.status import Status

NOW_S = 1_700_000_100.0

TOLD = Status(
    leader=True,
    state="shadow",
    since_ms=1_700_000_000_000,
    champion="v1",
    challenger="v2",
    trigger=None,
    last=Decision("rejected", 1_600_000_000_000, "no better"),
    progress={"labelled_events": 7.0},
    drift=[Statistic("excess_loss", None, 0.12, 0.02), Statistic("unseen", "films", None, None)],
    alarms_ms={"excess_loss": 1_699_999_999_000},
    written_ms=1_700_000_099_000,
)


def exposed(told: Status | None, now_s: float = NOW_S) -> dict[str, float]:
    """What a scrape has of drift and refresh: series → value."""
    registry = CollectorRegistry()
    metrics = Metrics(
        registry, model_version="v1", target_level=4, tables={}, refresh=lambda: status.samples(told, now_s)
    )
    metrics._sample_refresh()
    metrics._publish()
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if "_refresh_" in sample.name or "_drift_" in sample.name
    }


def test_what_the_leader_tells_is_exposed() -> None:
    assert {
        "stream_adapt_refresh_leader": 1,
        "stream_adapt_refresh_told_timestamp_seconds": 1_700_000_099,
        "stream_adapt_refresh_state_timestamp_seconds shadow": 1_700_000_000,
        "stream_adapt_refresh_decision_timestamp_seconds rejected": 1_600_000_000,
        "stream_adapt_drift_statistic excess_loss ": 0.12,
        "stream_adapt_drift_reference excess_loss ": 0.02,
        "stream_adapt_drift_alarm_timestamp_seconds excess_loss": 1_699_999_999,
    } == exposed(TOLD)


def test_a_refresh_that_failed_is_told_apart_from_one_that_found_nothing_better() -> None:
    failed = msgspec.structs.replace(TOLD, last=Decision("rejected", 1_600_000_000_000, "killed", failed=True))
    found = exposed(failed)
    assert 1_600_000_000 == found["stream_adapt_refresh_decision_timestamp_seconds failed"]
    assert "stream_adapt_refresh_decision_timestamp_seconds rejected" not in found


@pytest.mark.parametrize("told", [None, msgspec.structs.replace(TOLD, leader=False)], ids=["nobody", "another leads"])
def test_who_does_not_lead_tells_only_that(told: Status | None) -> None:
    found = exposed(told)
    assert found == {"stream_adapt_refresh_leader": 0, "stream_adapt_refresh_told_timestamp_seconds": 0}


def test_what_a_leader_left_that_died_says_only_when_that_was() -> None:
    found = exposed(TOLD, NOW_S + 600)
    assert found == {
        "stream_adapt_refresh_leader": 0,
        "stream_adapt_refresh_told_timestamp_seconds": 1_700_000_099,
    }


def test_what_is_told_has_a_family() -> None:
    names = {family.name for family in FAMILIES}
    assert set(status.samples(TOLD, NOW_S)) <= names


def test_the_file_is_read_as_it_was_written_and_another_releases_is_left_alone(tmp_path: Path) -> None:
    assert status.read(tmp_path) is None
    status.write(tmp_path / "state", TOLD)
    assert status.read(tmp_path / "state") == TOLD
    (tmp_path / "state" / "refresh.json").write_text('{"leader": "perhaps"}')
    assert status.read(tmp_path / "state") is None
